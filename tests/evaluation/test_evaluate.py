"""Facts pinned: the shape of evaluation.json; a killed run ends with the bytes of an uninterrupted
one; policies share prompts and noise; a champion brings its own
models, and score-conditioned SFT its own prompts; what is not decodable or not valid is counted;
predictions against renders by hand."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest

from flowloom.evaluation.comparison import predictions
from flowloom.evaluation.config import POLICIES, EvaluateConfig
from flowloom.evaluation.evaluate import TIMING_FILE, evaluate
from flowloom.evaluation.frame import SEED_STRIDE, Choice, make_frame
from flowloom.evaluation.statistics import paired_interval
from flowloom.evaluation.unrendered import check_designs
from flowloom.runs import Run, folder_digest
from flowloom.workflow import Catalogue, Grammar, decode, random_workflows
from tests.evaluation.parts import KINDS, write_model
from tests.render.tiny import flow

CONFIG = EvaluateConfig(
    num_prompts=6,
    num_seeds=2,
    num_designs=2,
    num_unrendered=20,
    num_resamples=200,
    num_grid_prompts=2,
    chunk_size=16,
    num_processes=1,
)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """An uninterrupted run."""
    return _evaluate(tmp_path_factory.mktemp("run"), CONFIG, parts)


def _evaluate(folder, config, parts, **more):
    run = Run("evaluate", folder)
    run.begin()
    run.metrics = evaluate(config, run, **parts, **more)
    return run


def _read(run):
    return json.loads((run.out / "evaluation.json").read_text())


def test_evaluation_says_what_the_gate_and_the_report_read(run):
    record = _read(run)
    assert record["opponent"] == "best_fixed"
    assert set(record["policies"]) == set(POLICIES)
    assert set(record["paired"]) == {f"vs_{name}" for name in POLICIES if name != "grpo"}
    for interval in record["paired"].values():
        assert set(interval) == {"mean", "low", "high", "n"}
        assert interval["n"] == 6
        assert interval["low"] <= interval["mean"] <= interval["high"]
    by_kind = record["paired_by_kind"]["vs_best_fixed"]
    assert {kind: row["n"] for kind, row in by_kind.items()} == dict.fromkeys(KINDS, 2)
    lead = sum(row["mean"] for row in by_kind.values()) / 3
    assert lead == pytest.approx(record["paired"]["vs_best_fixed"]["mean"], abs=1e-12)
    for policy in record["policies"].values():
        assert {"mean", "se", "by_kind", "flops_mean"} <= set(policy)
        assert set(policy["by_kind"]) == {"colors", "counting", "single"}
    for name in ("designs", "random_designs"):
        checked = record[name]
        assert (checked["n"], checked["valid"], checked["decodable"]) == (20, 20, 20)
        assert 0 < checked["unique_frac"] <= 1
    for policy in record["policies"].values():
        assert 0 <= policy["coverage"] <= 1
        assert abs(policy["predicted_error"]) <= policy["predicted_abs_error"] <= 1
        assert 1 <= policy["num_collapsed"] <= policy["num_workflows"] <= 6
    # What the panel and the neighbours hold was rendered for training; the panel's best was not.
    assert record["policies"]["retrieval"]["similarity"] == 1.0
    assert record["policies"]["best_fixed"]["similarity"] < 1.0
    assert record["coverage_level"] == 0.9
    assert set(record["diversity"]) == {"grpo", "grpo_unguided", "sft"}
    for row in record["diversity"].values():
        # Six held-out prompts and six that nothing was rendered for.
        assert row["n"] == 12
        assert 1 <= row["collapsed"] <= row["raw"] <= 12
    assert set(record["predicted_vs_true"]) == {"spearman", "gap"}
    assert run.metrics["score/grpo"] == record["policies"]["grpo"]["mean"]
    assert run.metrics["paired/vs_sft_low"] == record["paired"]["vs_sft"]["low"]
    assert all(np.isfinite(value) for value in run.metrics.values())


def test_rows_hold_every_render_and_give_the_same_figures(run):
    rows = parquet.read_table(run.out / "rows.parquet").to_pydict()
    assert len(rows["score"]) == len(POLICIES) * 6 * 2
    scores = {
        policy: np.array(
            [s for s, p in zip(rows["score"], rows["policy"], strict=True) if p == policy]
        ).reshape(6, 2)
        for policy in POLICIES
    }
    record = _read(run)
    again = paired_interval(scores["grpo"], scores["best_fixed"], num_resamples=200)
    assert dataclasses.asdict(again) == record["paired"]["vs_best_fixed"]
    # Policies share prompts and seeds, and no two renders of a policy share a seed.
    frames = {
        policy: [
            (prompt, seed)
            for prompt, seed, p in zip(rows["prompt"], rows["seed"], rows["policy"], strict=True)
            if p == policy
        ]
        for policy in POLICIES
    }
    assert all(frame == frames["grpo"] for frame in frames.values())
    seeds = sorted({seed for _, seed in frames["grpo"]})
    assert len(seeds) == 12
    assert min(np.diff(seeds)) == SEED_STRIDE
    (fixed,) = {
        f for f, p in zip(rows["fingerprint"], rows["policy"], strict=True) if p == "best_fixed"
    }
    assert fixed


def test_killed_run_ends_with_the_same_bytes(run, parts, tmp_path):
    whole = folder_digest(run.out)
    shutil.copytree(run.work, tmp_path / "killed" / "work")
    for name in ("checked.json", "scores-ours-0001.json"):
        (tmp_path / "killed" / "work" / name).unlink()
    assert folder_digest(_evaluate(tmp_path / "killed", CONFIG, parts).out) == whole


def test_grid_and_examples_show_both_policies(run):
    from PIL import Image

    examples = json.loads((run.out / "examples.json").read_text())["examples"]
    assert [example["prompt"] for example in examples] == ["a red star", "four circles"]
    for example in examples:
        assert list(example["designs"]) == ["best_fixed", "grpo"]
        for design in example["designs"].values():
            assert len(design["renders"]) == 2
            assert design["models"]
            assert all((run.out / render["picture"]).is_file() for render in design["renders"])
    with Image.open(run.out / "grid.png") as grid:
        assert grid.width > 4 * 96


def test_champion_is_the_opponent_where_there_is_one(parts, tmp_path):
    champion = write_model(tmp_path / "model", parts, guidance=CONFIG.guidance)
    config = dataclasses.replace(
        CONFIG, policies=("grpo", "best_fixed"), num_unrendered=2, num_prompts=3
    )
    record = _read(_evaluate(tmp_path / "run", config, parts, champion=champion))
    assert record["opponent"] == "champion"
    # The champion is the same model with the same models and guidance: no difference at all.
    assert record["paired"]["vs_champion"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert record["policies"]["champion"]["mean"] == record["policies"]["grpo"]["mean"]


def test_conditioned_joins_where_its_designer_is_given(parts, tmp_path):
    config = dataclasses.replace(
        CONFIG, policies=("grpo", "best_fixed", "sft"), num_unrendered=2, num_prompts=3
    )
    given = _evaluate(tmp_path / "given", config, parts, conditioned=parts["designer"])
    record = _read(given)
    assert set(record["policies"]) == {"grpo", "best_fixed", "sft", "conditioned"}
    assert record["diversity"]["conditioned"] == record["diversity"]["sft"]
    timing = json.loads((given.dir / TIMING_FILE).read_text())
    assert set(timing["designs_per_s"]) == set(timing["score_per_render_s"])
    assert timing["pictures"] > 0
    # The seconds of a policy's pictures are their share of the flops.
    seconds = {
        name: row["mean"] / timing["score_per_render_s"][name]
        for name, row in record["policies"].items()
    }
    ratio = record["policies"]["sft"]["flops_mean"] / record["policies"]["grpo"]["flops_mean"]
    assert seconds["sft"] / seconds["grpo"] == pytest.approx(ratio)
    config = dataclasses.replace(config, policies=("grpo", "best_fixed", "conditioned_one"))
    with pytest.raises(ValueError, match="policies: got 'conditioned_one', expected the input"):
        _evaluate(tmp_path / "without", config, parts)


def test_predictions_by_hand():
    choices = [
        Choice(flow(), "", predicted, interval, 20)
        for predicted, interval in ((0.5, (0.2, 0.6)), (0.2, (0.1, 0.3)))
    ]
    # Rendered means .3 and .3: errors +.2 and -.1; three of four renders are inside.
    found = predictions(choices, np.array([[0.2, 0.4], [0.3, 0.3001]]))
    assert found["predicted"] == pytest.approx(0.35)
    assert found["predicted_error"] == pytest.approx(0.05, abs=1e-4)
    assert found["predicted_abs_error"] == pytest.approx(0.15, abs=1e-4)
    assert found["coverage"] == 0.75


def test_more_prompts_than_there_are_is_an_error(parts):
    held_out = json.loads((parts["triplets"] / "prompts.json").read_text())
    with pytest.raises(ValueError, match="num_prompts: got 7, expected at most 6"):
        make_frame(dataclasses.replace(CONFIG, num_prompts=7), held_out)


def test_what_is_wrong_with_a_design_is_counted():
    catalogue = Catalogue.load("embedded")
    grammar = Grammar(catalogue)
    rows = [encoded.tokens for encoded in random_workflows(grammar, 4, 0)]
    assert check_designs(rows, grammar) == {
        "n": 4,
        "valid": 4,
        "decodable": 4,
        "unique_frac": 1.0,
    }
    cut = rows[0][:-3]
    assert check_designs([*rows, cut, rows[1]], grammar) == {
        "n": 6,
        "valid": 5,
        "decodable": 5,
        "unique_frac": 4 / 6,
    }
    # Readable, but a file is not installed where it is judged.
    used = decode(rows[0], grammar).to_api().values()
    (name, *_) = (n["inputs"]["ckpt_name"] for n in used if "ckpt_name" in n["inputs"])
    left = tuple(file for file in catalogue.files if file.name != name)
    without = dataclasses.replace(catalogue, files=left)
    judged = Grammar(without, grammar.vocabulary.extend(without))
    found = check_designs(rows * 5, judged)
    assert found["decodable"] == 20
    assert found["valid"] < 20


@pytest.mark.parametrize(
    "bad",
    [
        {"policies": ("grpo",)},
        {"policies": ("grpo", "best_fixed", "luck")},
        {"num_prompts": 0},
        {"level": 1.0},
        {"cold_temperature": 0.0},
    ],
)
def test_bad_configurations_name_the_field(bad):
    (field,) = bad
    with pytest.raises(ValueError, match=f"^{field}: got"):
        EvaluateConfig(**bad)
