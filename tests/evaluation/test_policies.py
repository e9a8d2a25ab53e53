"""Facts pinned: names say who, how often and how sharp; w = 0 designs what SFT designs and w = 1
what the tuned policy does, token by token; a single design is the first sample, several give the
best by prediction; likeliest tokens do not depend on the seed; weights at w = 0 and 1 are the
ends; a render is scored once."""

import dataclasses
import json

import numpy as np
import pytest

from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.designer.loading import extrapolated
from flowloom.evaluation.config import EvaluateConfig
from flowloom.evaluation.policies import Conditioned, Draw, choices_of, choose, draw_of, sample
from flowloom.evaluation.scores import ScoreBook
from flowloom.evaluation.sweeps import (
    OUTPUT,
    WEIGHTS,
    Point,
    check_endpoints,
    draw_sweep,
    points_of,
    sample_point,
)
from flowloom.runs import Run
from tests.evaluation.parts import PROMPTS

CONFIG = EvaluateConfig(num_designs=3, guidance=1.25, cold_temperature=0.25)


@pytest.fixture(scope="module")
def designer(parts):
    folders = (parts[name] for name in ("catalogue", "designer", "adapter", "reward"))
    return Designer.from_parts(*folders, stored_policies(parts["triplets"]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", Draw("grpo", 3, 1.25)),
        ("grpo_one", Draw("grpo", 1, 1.25)),
        ("grpo_unguided", Draw("grpo", 3)),
        ("grpo_unguided_cold_one", Draw("grpo", 1, 1.0, 0.25)),
        ("sft_cold", Draw("sft", 3, 1.0, 0.25)),
        ("conditioned_one", Draw("conditioned")),
        ("retrieval", Draw("retrieval")),
    ],
)
def test_names_say_how_a_policy_draws(name, expected):
    assert draw_of(name, CONFIG) == expected


@pytest.mark.parametrize("name", ["grpo_two", "random_one", "grpo_greedy_one", "unguided", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"policies: got '{name}', expected one of"):
        draw_of(name, CONFIG)


def test_guidance_ends_are_the_two_policies(designer):
    compared = check_endpoints(designer, PROMPTS["test"], 0)
    assert set(compared) == {"w 0", "w 1"}
    assert min(compared.values()) > 6 * 10
    # The ends differ, or nothing was shown.
    rows = [sample(designer, Draw(who), PROMPTS["test"], 0) for who in ("sft", "grpo")]
    assert rows[0] != rows[1]
    swapped = Designer(
        designer.catalogue,
        designer.vocabulary,
        designer.tuned,
        designer.tuned,
        designer.ensemble,
        designer.policies,
    )
    mixed = Point(OUTPUT, 0.0)
    assert sample_point(designer, mixed, PROMPTS["test"], 0) == rows[0]
    assert sample_point(swapped, mixed, PROMPTS["test"], 0) == rows[1]


def test_weights_are_mixed_linearly(designer):
    for weight, end in ((0.0, designer.reference), (1.0, designer.tuned)):
        mixed = extrapolated(designer.tuned, designer.reference, weight).tuned_parameters()
        for name, value in end.tuned_parameters().items():
            assert np.allclose(mixed[name].detach(), value.detach(), atol=1e-6)
    before, after = (p.head.weight.detach() for p in (designer.reference, designer.tuned))
    beyond = extrapolated(designer.tuned, designer.reference, 3.0).head.weight.detach()
    # The head was scaled from 1 to 1.5: three times the way is 2.5.
    assert np.allclose(after, 1.5 * before, rtol=1e-5)
    assert np.allclose(beyond, 2.5 * before, rtol=1e-5)
    at_one = sample_point(designer, Point(WEIGHTS, 1.0), PROMPTS["test"][:2], 0)
    assert at_one == sample(designer, Draw("grpo"), PROMPTS["test"][:2], 0)


def test_one_is_the_first_sample_and_several_give_the_best(designer, parts):
    prompts = PROMPTS["test"][:3]
    asked = Conditioned.load(parts["designer"])
    one = choose(designer, Draw("sft"), prompts, 4)
    rows = sample(designer, Draw("sft"), prompts, 4)
    assert [c.fingerprint for c in one] == [
        c.fingerprint for c in choices_of(designer, prompts, rows)
    ]
    draw = Draw("conditioned", 4)
    several = choices_of(
        designer,
        [prompt for prompt in prompts for _ in range(4)],
        sample(designer, draw, prompts, 4, asked),
    )
    best = choose(designer, draw, prompts, 4, asked)
    for p, choice in enumerate(best):
        assert choice.predicted == max(c.predicted for c in several[4 * p : 4 * p + 4])
        low, high = choice.interval
        assert low <= choice.predicted <= high
    with pytest.raises(ValueError, match="got conditioned, expected its designer"):
        choose(designer, draw, prompts, 4)


def test_conditioned_reads_the_word_of_the_best_level(parts):
    asked = Conditioned(Conditioned.load(parts["designer"]).policy, 4)
    assert asked.prompts(["a star"]) == ["scoreleveld a star"]
    assert Conditioned.load(parts["designer"]).prompts(["a star"]) == ["a star"]


def test_likeliest_tokens_do_not_depend_on_the_seed(designer):
    draw = draw_of("grpo_greedy", CONFIG)
    prompts = PROMPTS["test"][:2]
    assert sample(designer, draw, prompts, 1) == sample(designer, draw, prompts, 2)
    plain = dataclasses.replace(draw, temperature=1.0)
    assert sample(designer, plain, prompts, 1) != sample(designer, plain, prompts, 2)


def test_scores_are_rendered_once_and_kept(designer, parts, tmp_path, monkeypatch):
    from flowloom.evaluation import scores

    calls = []
    render = scores.render_and_score
    monkeypatch.setattr(
        scores,
        "render_and_score",
        lambda jobs, *rest, **options: calls.append(len(jobs)) or render(jobs, *rest, **options),
    )
    run = Run("guidance", tmp_path)
    run.work.mkdir()

    def book():
        return ScoreBook(run, parts["catalogue"], chunk_size=8, num_processes=1)

    prompts = PROMPTS["test"][:2]
    first = choose(designer, Draw("best_fixed"), prompts, 0)
    second = choose(designer, Draw("retrieval"), prompts, 0)
    seeds = np.arange(4).reshape(2, 2)
    one = book()
    one.want(second, prompts, seeds)
    assert one.num_wanted == 4
    found = one.scores(first, prompts, seeds)
    assert found.shape == (2, 2)
    again = book()
    assert np.array_equal(again.scores(first, prompts, seeds), found)
    again.scores(second, prompts, seeds[:, :1])
    assert calls == [8]
    # Another seed of one prompt alone is new.
    again.scores(second, prompts, np.array([[0, 9], [2, 3]]))
    assert calls == [8, 1]


def test_sweep_picture_is_written(tmp_path):
    points = points_of((0.0, 1.0), (0.5,), ())
    assert [point.name for point in points] == ["w 0", "w 1", "T 0.5"]
    rows = [
        {**dataclasses.asdict(point), "score": 0.3, "se": 0.01, "collapsed": k, "n": 40}
        for k, point in enumerate(points)
    ]
    path = tmp_path / "sweep.png"
    draw_sweep(path, json.loads(json.dumps(rows)), 0.25)
    assert path.read_bytes().startswith(b"\x89PNG")
