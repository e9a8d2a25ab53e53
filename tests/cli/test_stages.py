"""Facts pinned: a stage alone runs what it needs first, each once; overrides reach it alone."""

import json

import pytest

from flowloom import stages
from flowloom.cli.stages import fields
from flowloom.evaluation.config import EvaluateConfig
from flowloom.runs import StageResult


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stages that do nothing but are remembered: (name, config, inputs)."""
    made = []

    def run(name, config, inputs=None):
        made.append((name, config, dict(inputs or {})))
        suffix = f"-{config.member}" if name == "train_reward" else ""
        return StageResult(name, tmp_path / f"{name}{suffix}", "d.dir", {"a/b": 0.5}, False)

    monkeypatch.setattr(stages, "run", run)
    return made


def test_dry_run_shows_every_field_and_runs_nothing(run, run_json, calls):
    status, answer = run_json("run", "evaluate", "--dry-run", "--set", "num_prompts=7")
    assert status == 0
    assert set(answer) == {"stage", "config", "inputs"}
    assert answer["config"]["num_prompts"] == 7
    assert answer["inputs"]["reward"] == "stage calibrate_reward"
    assert "champion" not in answer["inputs"]
    status, out, _ = run("run", "evaluate", "--dry-run")
    assert status == 0
    assert "Bootstrap resamples." in out
    assert calls == []


def test_what_a_stage_needs_runs_first_and_once(run_json, calls):
    status, answer = run_json("run", "train_grpo", "--set", "num_steps=3")
    assert status == 0
    names = [name for name, _, _ in calls]
    assert names == [
        "tune_generator",
        "publish_generator",
        "build_pairs",
        "build_triplets",
        "train_sft",
        "train_reward",
        "train_reward",
        "train_reward",
        "calibrate_reward",
        "train_grpo",
    ]
    by_name = {name: (config, inputs) for name, config, inputs in calls}
    config, inputs = by_name["train_grpo"]
    assert config.num_steps == 3
    assert inputs["reward"].name == "calibrate_reward"
    assert [path.name for path in by_name["calibrate_reward"][1]["members"]] == [
        "train_reward-0",
        "train_reward-1",
        "train_reward-2",
    ]
    assert answer == {
        "stage": "train_grpo",
        "out": str(inputs["reward"].parent / "train_grpo"),
        "digest": "d.dir",
        "cached": False,
        "metrics": {"a/b": 0.5},
    }


def test_given_inputs_are_not_made(run, calls, tmp_path):
    for name in ("evaluation", "generator"):
        (tmp_path / name).mkdir()
    status, out, _ = run(
        "run",
        "report",
        "--input",
        f"evaluation={tmp_path / 'evaluation'}",
        "--input",
        f"generator={tmp_path / 'generator'}",
    )
    assert status == 0
    assert "a/b" in out
    ((name, _, inputs),) = calls
    assert name == "report"
    assert inputs == {key: tmp_path / key for key in ("evaluation", "generator")}


def test_members_given_twice_are_a_list(run, calls, tmp_path):
    for name in ("catalogue", "triplets", "one", "two"):
        (tmp_path / name).mkdir()
    places = [("catalogue", "catalogue"), ("triplets", "triplets")]
    places += [("members", "one"), ("members", "two")]
    options = [word for k, v in places for word in ("--input", f"{k}={tmp_path / v}")]
    assert run("run", "calibrate_reward", *options)[0] == 0
    ((_, _, inputs),) = calls
    assert inputs["members"] == [tmp_path / "one", tmp_path / "two"]


def test_every_field_is_explained():
    rows = list(fields(EvaluateConfig()))
    assert len(rows) == len({name for name, _, _ in rows})
    assert all(doc for _, _, doc in rows)
    assert json.dumps([value for _, value, _ in rows])


def test_list_names_every_stage(run):
    status, out, _ = run("run", "list")
    assert status == 0
    assert all(name in out for name in stages.STAGES)
