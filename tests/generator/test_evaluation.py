"""Judging a generator.

Facts pinned here:
- A base against itself: every gain 0, every ratio 1, drift 0, no sign of hacking.
- Scores, kinds, satisfied shares, values out of range and spread by hand, for a generator whose
  pictures are known.
- Drift is the mean squared difference of velocities at the states of the base's path, by hand.
- Each setting is drawn with its own guidance and steps; noise is a function of seed and row alone,
  so batches change nothing.
- What was judged survives JSON; seconds are no part of it.
- Signs of hacking: a held-out reward that fell, errors that grew, values out of range, collapse;
  what chance allows, or is below the stated bounds, is none.
- The noise of a judgement is its seed's, that of a grid another; spread is a deviation over seeds.
- Grids show prompts, the base's row and the tuned one's below it; charts have Student's intervals.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowloom.generator import charts, evaluation
from flowloom.generator.evaluation import draw, draw_rows, drift, judge, noise, times
from flowloom.generator.judged import Judged, describe, gain, ratio, signs_of_hacking
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.picture_facts import PictureFacts
from flowloom.generator.pictures import write_comparison
from flowloom.score.rubric import Rubric, Term, get_rubric
from flowloom.shapes import drawing
from flowloom.shapes.drawing import Placed

ATOL = 1e-5
TUNED = Setting(num_steps=2)
CONFIG = JudgingConfig(num_seeds=2, serve=Setting(num_steps=3, guidance=2.0))
STRICT = dataclasses.replace(CONFIG, satisfied_score=0.65)
PROMPTS = ("a circle", "a red star", "two blue stars", "a star")


class Painter:
    """Draws one flat grey per prompt; a guidance g makes it g times as far from the background."""

    shape, device = (3, 32, 32), torch.device("cpu")

    def __init__(self, levels, base_levels=None, guidance=None, kept=0.0):
        """Take the value of each prompt's picture, and how much of the noise stays in it."""
        self.levels, self.base_levels = levels, base_levels or levels
        self.guidance, self.kept = guidance, kept

    def with_guidance(self, guidance):
        return Painter(self.levels, self.base_levels, guidance, self.kept)

    def aims(self, levels, prompts):
        aims_B = torch.tensor([levels[prompt] for prompt in prompts]) * (self.guidance or 1)
        return aims_B[:, None, None, None]

    def velocity(self, x_BCHW, t_B, prompts):
        return (x_BCHW - self.aims(self.levels, prompts)) / t_B[:, None, None, None]

    def base_velocity(self, x_BCHW, t_B, prompts):
        return (x_BCHW - self.aims(self.base_levels, prompts)) / t_B[:, None, None, None]

    def decode(self, x_BCHW):
        return x_BCHW


def brightness(prompts, images_BCHW, flops):
    return (images_BCHW.double().flatten(1).mean(1).numpy() + 1) / 2


def darkness(prompts, images_BCHW, flops):
    return 1 - brightness(prompts, images_BCHW, flops)


BRIGHT = Rubric("bright", (Term("brightness", brightness),))
DARK = Rubric("dark", (Term("darkness", darkness),))


def look(prompts, images_BCHW):
    # Detections on flat grey would hang on rounding.
    brightness_B1 = images_BCHW.double().flatten(1).mean(1, keepdim=True).numpy()
    return PictureFacts(brightness_B1, {"shown": np.full(len(prompts), 0.25)})


def judge_levels(levels, base=None, config=CONFIG, **more):
    painter = Painter(
        dict(zip(PROMPTS, levels, strict=True)), base and dict(zip(PROMPTS, base, strict=True))
    )
    return judge(painter, PROMPTS, config, [BRIGHT], TUNED, held_out=[DARK], look=look, **more)


def test_values_by_hand():
    found = judge_levels([0.0, 0.2, 0.6, -0.4], config=STRICT)
    # As tuned a picture is its level, as served twice that, cut off at 1; a score is (x + 1) / 2.
    expected = {"tuned": [0.5, 0.6, 0.8, 0.3], "serve": [0.5, 0.7, 1.0, 0.1]}
    for name, scores_P in expected.items():
        np.testing.assert_allclose(found.values[f"{name}/score"], scores_P, atol=ATOL)
        np.testing.assert_allclose(
            found.values[f"{name}/score/bright/brightness"], scores_P, atol=ATOL
        )
        dark_P = 1 - np.array(scores_P)
        np.testing.assert_allclose(found.values[f"{name}/score/dark/score"], dark_P, atol=ATOL)
        np.testing.assert_allclose(found.values[f"{name}/spread"], 0, atol=ATOL)
        assert not found.values[f"{name}/diversity/all"].any()
    assert (found.trained, found.held_out) == (("bright",), ("dark",))
    # Only 2 * .6 = 1.2 is beyond 1.05.
    assert found.values["serve/out_of_range"].tolist() == [0, 0, 1, 0]
    assert not found.values["tuned/out_of_range"].any()
    assert found.num_images == 2 * len(PROMPTS) * 2
    summary = found.summary()
    assert summary["serve/score"] == pytest.approx(2.3 / 4, abs=ATOL)
    assert summary["serve/single"] == pytest.approx(0.3, abs=ATOL)
    assert summary["serve/colors"] == pytest.approx(0.7, abs=ATOL)
    assert summary["serve/counting"] == pytest.approx(1.0, abs=ATOL)
    assert summary["tuned/score/se"] == pytest.approx(np.std([5, 6, 8, 3], ddof=1) / 20, abs=ATOL)
    assert summary["serve/single/se"] == pytest.approx(np.std([5, 1], ddof=1) / 200**0.5, abs=ATOL)
    assert summary["serve/satisfied/single"] == 0
    assert summary["serve/satisfied/colors"] == 1
    assert summary["tuned/score/dark/score"] == pytest.approx(0.45, abs=ATOL)


def test_satisfied_is_above_the_threshold():
    found = judge_levels([0.0, 0.2, 0.6, -0.4], config=STRICT)
    assert found.values["tuned/satisfied/share"].tolist() == [0, 0, 1, 0]
    assert found.values["serve/satisfied/share"].tolist() == [0, 1, 1, 0]
    assert np.isnan(found.values["tuned/diversity/satisfied"]).tolist() == [1, 1, 0, 1]


def test_out_of_range_is_beyond_both_ends_and_a_little():
    # Served at twice the level: 1.02, -1.2, 1.04 and 1.06.
    found = judge_levels([0.51, -0.6, 0.52, 0.53])
    assert found.values["serve/out_of_range"].tolist() == [0, 1, 0, 1]


class Still(Painter):
    """Leaves the noise as it is."""

    def __init__(self):
        super().__init__({})

    def with_guidance(self, guidance):
        return self

    def velocity(self, x_BCHW, t_B, prompts):
        return torch.zeros_like(x_BCHW)

    base_velocity = velocity


def test_noise_is_the_seeds_and_spread_by_hand():
    for seed in (0, 3):
        config = dataclasses.replace(CONFIG, num_seeds=3, seed=seed, grid_seeds=3)
        found = judge(Still(), PROMPTS, config, [BRIGHT], TUNED, look=look)
        images_PSN = noise((3, 32, 32), 12, (seed, 1)).clamp(-1, 1).numpy().reshape(4, 3, -1)
        for name in ("serve", "tuned"):
            spread_P = images_PSN.std(1).mean(1)
            np.testing.assert_allclose(found.values[f"{name}/spread"], spread_P, atol=ATOL)
            scores_P = (images_PSN.mean((1, 2)) + 1) / 2
            np.testing.assert_allclose(found.values[f"{name}/score"], scores_P, atol=ATOL)
        # A grid does not show the pictures that are judged.
        rows = np.array(draw_rows(Still(), PROMPTS[:1], config)).reshape(3, -1)
        assert np.abs(rows - images_PSN[0]).max(1).min() > 1


def test_times_are_shifted():
    assert times(Setting(num_steps=2)) == pytest.approx([1, 0.5, 0])
    assert times(Setting(num_steps=2, time_shift=3.0)) == pytest.approx([1, 0.75, 0])


def test_a_base_against_itself():
    levels = [0.0, 0.2, 0.4, -0.4]
    base, again = judge_levels(levels), judge_levels(levels)
    assert base.to_dict() == again.to_dict()
    for name in base.values:
        change = gain(base, again, name)
        if change.n:
            assert (change.mean, change.low, change.high) == (0, 0, 0)
            whole = ratio(base, again, name)
            assert (whole.mean, whole.low, whole.high) == (1, 1, 1)
    assert not base.values["serve/drift/velocity"].any()
    assert signs_of_hacking(base, again) == []


def test_drift_by_hand():
    base = dict.fromkeys(PROMPTS, 0.1)
    tuned = base | {PROMPTS[0]: 0.4}
    found = judge_levels(tuned.values(), base.values())
    # v - v_base = -.3 / t, at t = 1, 1/2 (tuned) and at 1, 2/3, 1/3 with guidance 2.
    schedule = {name: times(s)[:-1] for name, s in (("tuned", TUNED), ("serve", CONFIG.serve))}
    for name, gap in (("tuned", 0.3), ("serve", 0.6)):
        expected = np.mean([(gap / t) ** 2 for t in schedule[name]])
        drift_P = found.values[f"{name}/drift/velocity"]
        np.testing.assert_allclose(drift_P, [expected, 0, 0, 0], rtol=1e-3, atol=ATOL)


def test_drift_is_measured_on_the_path_of_the_base():
    class Growing(Painter):
        def velocity(self, x_BCHW, t_B, prompts):
            return self.base_velocity(x_BCHW, t_B, prompts) + x_BCHW

    flow = Growing(dict.fromkeys(PROMPTS, 0.5))
    start_BCHW = noise(flow.shape, 4, (0,))
    found_B = drift(flow, PROMPTS, start_BCHW, [1.0, 0.5, 0.0])
    # The base goes straight from z to .5, so halfway it is at their mean.
    halfway_BCHW = (start_BCHW + 0.5) / 2
    expected_B = torch.stack([start_BCHW, halfway_BCHW]).square().mean((0, 2, 3, 4))
    torch.testing.assert_close(found_B, expected_B)


def test_drift_uses_some_of_the_seeds():
    class Noisy(Painter):
        def velocity(self, x_BCHW, t_B, prompts):
            return self.base_velocity(x_BCHW, t_B, prompts) + x_BCHW

    flow = Noisy(dict.fromkeys(PROMPTS, 0.0))
    both = dataclasses.replace(CONFIG, num_drift_seeds=2, rows_per_pass=3)
    noise_BCHW = noise(flow.shape, 8, (0, 1))
    every_B = drift(flow, [p for p in PROMPTS for _ in range(2)], noise_BCHW, times(TUNED)).numpy()
    for config, expected_P in ((CONFIG, every_B[::2]), (both, every_B.reshape(4, 2).mean(1))):
        found = evaluation._drift(
            flow, TUNED, [p for p in PROMPTS for _ in range(2)], noise_BCHW, config
        )
        np.testing.assert_allclose(found, expected_P, rtol=1e-6)


def test_euler_by_hand():
    class Still(Painter):
        def velocity(self, x_BCHW, t_B, prompts):
            return x_BCHW

    flow = Still({})
    start_BCHW = noise(flow.shape, 2, (5,))
    drawn = draw(flow, ["a", "b"], start_BCHW, Setting(num_steps=2))
    # x <- x + (s - t) x, twice with s - t = -1/2.
    torch.testing.assert_close(drawn, start_BCHW / 4)


def test_batches_change_nothing():
    whole = judge_levels([0.0, 0.2, 0.6, -0.4])
    small = judge_levels([0.0, 0.2, 0.6, -0.4], config=dataclasses.replace(CONFIG, rows_per_pass=1))
    for name, values_P in whole.values.items():
        np.testing.assert_allclose(small.values[name], values_P, atol=ATOL)
    rows = noise((2, 3, 4), 5, (0, 7))
    assert torch.equal(noise((2, 3, 4), 2, (0, 7)), rows[:2])
    assert not torch.equal(noise((2, 3, 4), 5, (1, 7)), rows)
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 5


class Drawer(Painter):
    """Paints what a function says for a prompt and the first value of its start."""

    def __init__(self, choose, guidance=None):
        self.choose, self.guidance = choose, guidance

    def with_guidance(self, guidance):
        return Drawer(self.choose, guidance)

    def velocity(self, x_BCHW, t_B, prompts):
        # Every picture of these tests is dark there, so that at t = 1 alone it is noise.
        if float(t_B[0]) == 1:
            self.bits = x_BCHW[:, 0, 0, 0] > 0
        pairs = zip(prompts, self.bits.tolist(), strict=True)
        aims = np.stack([drawing.draw(self.choose(*pair)) for pair in pairs])
        return (x_BCHW - torch.from_numpy(aims)) / t_B[:, None, None, None]

    base_velocity = velocity


def circle(color, row, column):
    return [Placed("circle", color, "large", row, column)]


def judge_drawer(choose, num_seeds=8):
    config = dataclasses.replace(CONFIG, num_seeds=num_seeds)
    prompts = ("a red circle", "a large red disc")
    return judge(Drawer(choose), prompts, config, [get_rubric("shapes")], TUNED)


def test_spread_of_wrong_content_is_no_diversity():
    # Of two places one has the wrong colour; tuning repairs the colour and keeps the places.
    base = judge_drawer(
        lambda prompt, bit: circle("red", 10, 10) if bit else circle("blue", 22, 22)
    )
    tuned = judge_drawer(
        lambda prompt, bit: circle("red", 10, 10) if bit else circle("red", 22, 22)
    )
    collapsed = judge_drawer(lambda prompt, bit: circle("red", 10, 10))
    assert not base.values["serve/diversity/satisfied"].any()
    assert base.wrong_share().mean == 1
    assert tuned.wrong_share().mean == 0
    assert gain(base, tuned, "serve/diversity/satisfied").low > 0.4
    assert ratio(base, tuned, "serve/diversity/all").mean == pytest.approx(1, abs=0.2)
    np.testing.assert_allclose(tuned.values["serve/error/shown"], 0, atol=ATOL)
    assert (base.values["serve/error/asked"] > 0.01).all()
    signs = signs_of_hacking(tuned, collapsed)
    assert signs == ["serve/diversity/satisfied fell to 0.00 of the base's"]


def test_signs_of_hacking():
    base = judge_levels([0.0, 0.2, 0.4, -0.4])
    brighter = judge_levels([0.7, 0.7, 0.7, 0.7])
    signs = signs_of_hacking(base, brighter)
    assert any(sign.startswith("serve/score/dark/score fell: 0.450 -> 0.000") for sign in signs)
    assert any(sign.startswith("serve/out_of_range grew: 0.0000 -> 1.0000") for sign in signs)
    assert not any("bright" in sign for sign in signs)
    # A term of a reward that was trained on may starve beside the others.
    starved = base.values | {"serve/score/bright/brightness": np.zeros(4)}
    (sign,) = signs_of_hacking(base, dataclasses.replace(base, values=starved))
    assert sign.startswith("serve/score/bright/brightness fell: 0.550 -> 0.000, -0.550 (-0.")
    grown = dataclasses.replace(
        base, values=base.values | {"serve/error/shown": base.values["serve/error/shown"] * 1.2}
    )
    assert ["error" in sign for sign in signs_of_hacking(base, grown)] == [True]


@pytest.mark.parametrize(
    ("name", "base", "tuned", "sign"),
    [
        # Beyond the prompts' chance, or not.
        ("score/dark/score", [0.5] * 4, [0.4, 0.4, 0.3, 0.49], "fell"),
        ("score/dark/score", [0.5] * 4, [0.2, 0.6, 0.4, 0.6], None),
        ("error/shown", [0.2] * 4, [0.24] * 4, "grew"),
        ("error/shown", [0.2] * 4, [0.21] * 4, None),
        ("error/shown", [0.2] * 4, [0.2, 0.2, 0.2, 0.36], None),
        ("out_of_range", [0.0] * 4, [0.02] * 4, "grew"),
        ("out_of_range", [0.0] * 4, [0.005] * 4, None),
        ("out_of_range", [0.0] * 4, [0.0, 0.0, 0.0, 0.1], None),
        ("diversity/satisfied", [1.0] * 4, [0.75] * 4, "fell"),
        ("diversity/satisfied", [1.0] * 4, [0.85] * 4, None),
        ("diversity/satisfied", [1.0] * 4, [0.4, 0.4, 1.0, 1.0], None),
    ],
)
def test_bounds_of_the_signs(name, base, tuned, sign):
    plain = judge_levels([0.0, 0.2, 0.4, -0.4])
    sides = [
        dataclasses.replace(plain, values=plain.values | {f"serve/{name}": np.array(values_P)})
        for values_P in (base, tuned)
    ]
    said = [line.replace(":", "").split(" ")[:2] for line in signs_of_hacking(*sides)]
    assert said == ([[f"serve/{name}", sign]] if sign else [])


def test_words_about_diversity():
    plain = judge_levels([0.0, 0.2, 0.4, -0.4])

    def apart(satisfied_P, all_P, wrong_P):
        names = ("satisfied", "all", "wrong")
        rows = dict(zip(names, map(np.array, (satisfied_P, all_P, wrong_P)), strict=True))
        values = {f"serve/diversity/{name}": values_P for name, values_P in rows.items()}
        return dataclasses.replace(plain, values=plain.values | values)

    base = apart([1.0, 1.0, 1.0, np.nan], [2.0] * 4, [1.0] * 4)
    tuned = apart([0.5, 0.5, 0.5, 1.0], [1.5] * 4, [0.3] * 4)
    text = "\n".join(describe(base, tuned))
    assert "satisfy their prompt: 0.50 (0.50 to 0.50) of the base's, 3 prompts counted, 1" in text
    assert "among all pictures: 0.75 (0.75 to 0.75) of the base's" in text
    assert "wrong content makes: 0.50 -> 0.20." in text


def test_words():
    base, tuned = judge_levels([0.0, 0.2, 0.4, -0.4]), judge_levels([0.12, 0.3, 0.46, -0.4])
    lines = describe(base, tuned, "tuned")
    assert lines[0] == "Score: 0.525 -> 0.560, +0.035 (+0.013 to +0.055) on 4 prompts."
    by_kind = "colors 0.60 -> 0.65, counting 0.70 -> 0.73, single 0.40 -> 0.43."
    assert lines[1] == f"By kind of prompt: {by_kind}"
    text = "\n".join(lines)
    assert "Pictures that satisfy their prompt, share: 0.500 -> 0.750" in text
    assert "Reward trained on, bright, brightness: 0.525 -> 0.560" in text
    assert "Reward not trained on, dark, score: 0.475 -> 0.440, -0.035" in text
    assert "Diversity among pictures that satisfy their prompt: 1.00 (1.00 to 1.00)" in text
    assert "2 prompts counted, 2 left out" in text
    one = dataclasses.replace(CONFIG, num_seeds=1)
    alone = judge_levels([0.0, 0.2, 0.4, -0.4], config=one)
    lines += describe(alone, alone)
    assert "Diversity: not known from one picture per prompt." in lines
    assert all("\n" not in line and "nan" not in line for line in lines)


def test_json_keeps_everything_but_seconds():
    found = judge_levels([0.0, 0.2, 0.6, -0.4])
    assert found.wall_s > 0
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert "wall_s" not in row
    again = Judged.from_dict(row)
    assert again.to_dict() == found.to_dict()
    assert again.summary() == found.summary()
    assert again.prompts == found.prompts


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rubrics": []}, "got 4 prompts and 0 rubrics"),
        ({"prompts": []}, "got 0 prompts and 1 rubrics"),
        ({"held_out": [BRIGHT]}, "expected different names"),
        ({"kinds": ["one"]}, r"got 1 kinds, expected one per prompt \(4\)"),
    ],
)
def test_mistakes_are_named(more, message):
    call = {"prompts": PROMPTS, "rubrics": [BRIGHT]} | more
    with pytest.raises(ValueError, match=message):
        judge(Painter(dict.fromkeys(PROMPTS, 0.0)), config=CONFIG, tuned=TUNED, **call)


def test_other_prompts_are_not_compared():
    base = judge_levels([0.0, 0.2, 0.6, -0.4])
    other = dataclasses.replace(base, prompts=base.prompts[::-1])
    with pytest.raises(ValueError, match="other prompts"):
        gain(base, other, "serve/score")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_seeds": 0}, "num_seeds"),
        ({"num_drift_seeds": 5}, "num_drift_seeds"),
        ({"held_out_rubrics": ("a", "a")}, "held_out_rubrics"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        JudgingConfig(**change)
    with pytest.raises(ValueError, match=r"^guidance: got"):
        Setting(num_steps=1, guidance=0.0)


def test_kinds_of_other_worlds():
    found = judge_levels([0.0, 0.2, 0.6, -0.4], kinds=["x", "y", "y", "x"])
    assert found.summary()["tuned/x"] == pytest.approx(0.4, abs=ATOL)


def test_prompts_of_other_worlds():
    prompts = ("a cat", "a circle")
    flow = Painter({"a cat": 0.2, "a circle": 0.4})
    found = judge(flow, prompts, CONFIG, [BRIGHT], TUNED)
    assert found.kinds == ("prompts", "prompts")
    assert not any("error" in name for name in found.values)
    assert found.summary()["tuned/prompts"] == pytest.approx(0.65, abs=ATOL)
    assert "By kind of prompt: prompts 0.80 -> 0.80." in describe(found, found)


def test_rows_of_a_grid():
    config = dataclasses.replace(CONFIG, num_grid_prompts=2, grid_seeds=3)
    rows = draw_rows(Painter(dict.fromkeys(PROMPTS, 0.6)), PROMPTS, config)
    assert [len(row) for row in rows] == [2 + 1] * 2
    # Guidance 2 would make it 1.2: pictures are as the renderer hands them on.
    np.testing.assert_allclose(rows, 1.0)


def test_grid_shows_base_above_tuned(tmp_path):
    black, white = (np.full((3, 32, 32), value, np.float32) for value in (-1, 1))
    sides = {"base": [[black, black]] * 3, "tuned": [[white, black]] * 3}
    write_comparison(tmp_path / "grid.png", PROMPTS[:3], sides, num_columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    # Enlarged to 64 px: of six pictures under three prompts, five tiles in two rows are black.
    tall = (pixels == 0).sum(0)
    assert tall.max() == 128
    assert (tall == 128).sum() == 3 * 64
    assert (tall == 64).sum() >= 3 * 64
    with pytest.raises(ValueError, match="pictures of 3 prompts for 'base', expected 4"):
        write_comparison(tmp_path / "bad.png", PROMPTS, sides)


def test_band_is_students():
    rewards_RN = np.array([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    mean_N, low_N, high_N = charts.band(rewards_RN)
    # t(.975, 2) = 4.3027; the deviation of 1, 2, 3 is 1.
    np.testing.assert_allclose(mean_N, [2, 2])
    np.testing.assert_allclose(high_N, [2 + 4.3027 / 3**0.5, 2], atol=1e-4)
    np.testing.assert_allclose(low_N, [2 - 4.3027 / 3**0.5, 2], atol=1e-4)
    for ends_N in charts.band(rewards_RN[:1]):
        np.testing.assert_allclose(ends_N, [1, 2])


def test_charts_have_equal_bytes(tmp_path):
    curve = charts.Curve(images_N=np.array([0, 64]), rewards_RN=np.array([[0.2, 0.4], [0.2, 0.5]]))
    panels = {"trained on": {"FDFO": curve, "Flow-GRPO": curve}, "not trained on": {"FDFO": curve}}
    for name in ("chart.png", "again.png"):
        charts.write_reward_chart(tmp_path / name, panels)
    assert (tmp_path / "chart.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert min(Image.open(tmp_path / "chart.png").size) > 300
