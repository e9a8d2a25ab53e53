"""Making an artifact again.

Facts pinned:
- inputs come from the remote by their digest, never from a run folder; nothing made before counts;
- a chain is repeated in order and stops at the first artifact that differs, its file named;
- a replaced or an added field of the configuration is named, and so is what no run made;
- every recipe's configuration comes back from `config.json` as it was, derived fields too;
- a stage that fails here is said to fail; a model's folder is built again from published parts;
- in a second checkout, with the tracker and the remote alone, a chain gives the same bytes, and
  with one byte of data or one value of the configuration changed that is named (slow).
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowloom import recipes, runs
from flowloom.config import override, to_dict
from flowloom.lifecycle import (
    registry,
    reproduce,
    storage,
    tracking,
    versioning,
)
from flowloom.lifecycle.record import Subject
from flowloom.lifecycle.records import Records, first_difference
from flowloom.lifecycle.versioning import Difference
from flowloom.recipes import RECIPES

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    text: str = "x"


def finished(stage, text, inputs=None):
    run = runs.open_run(stage, Config(text), inputs or {})
    run.begin()
    (run.out / "a.txt").write_text(text)
    result = run.finish({})
    versioning.publish(result.out_dir)
    return result


@pytest.fixture
def chain():
    """Three runs, each from the one before; the digests."""
    pairs = finished("build_pairs", "pairs").digest
    designer = finished("train_sft", "designer", {"pairs": pairs}).digest
    adapter = finished("train_grpo", "adapter", {"designer": designer}).digest
    return [pairs, designer, adapter]


@pytest.fixture
def stages_that_write(monkeypatch):
    """Stages write their configuration's text; returns what each was given."""
    given = []

    def repeat(identity, inputs, folder, fresh):
        seen = {n: [runs.folder_digest(p) for p in paths] for n, paths in inputs.items()}
        given.append((identity["stage"], seen))
        assert not any(home in str(p) for ps in inputs.values() for p in ps for home in ("runs",))
        assert storage.is_held(fresh)  # nobody who cleans up takes it away
        out = folder / "out"
        out.mkdir()
        (out / "a.txt").write_text(identity["config"]["text"])
        (folder / "config.json").write_text(json.dumps(identity))
        return out, runs.folder_digest(out)

    monkeypatch.setattr(reproduce, "_repeat", repeat)
    return given


def go(folder_or_id, only=None, model=False, overrides=None):
    records, lines = Records(), []
    subject = records.subject(folder_or_id)
    if model:
        subject = dataclasses.replace(subject, version="1")
    found = reproduce.reproduce(
        records, reproduce.plan(records, subject, only), overrides, say=lines.append
    )
    return found, lines


def folder_of(stage):
    (folder,) = (runs.home() / "runs" / stage).iterdir()
    return str(folder)


def test_a_run_is_repeated_from_published_inputs(chain, stages_that_write):
    shutil.rmtree(folder_of("train_sft"))  # the remote has it
    found, lines = go(folder_of("train_grpo"))
    assert found.equal
    assert stages_that_write == [("train_grpo", {"designer": [chain[1]]})]
    assert lines[0].startswith("equal: train_grpo")
    assert list((runs.home() / "reproduce").iterdir()) == []


def test_a_version_is_repeated_from_data_on(chain, stages_that_write):
    found, _ = go(folder_of("train_grpo"), model=True)
    assert [item.stage for item in found.outcomes] == ["build_pairs", "train_sft", "train_grpo"]
    assert found.equal
    found, _ = go(folder_of("train_grpo"), only="train_sft", model=True)
    assert [item.stage for item in found.outcomes] == ["train_sft"]
    with pytest.raises(ValueError, match="--only: got 'zoom', expected one of build_pairs"):
        go(folder_of("train_grpo"), only="zoom")


def test_a_chain_goes_on_from_what_it_made(chain, stages_that_write):
    shutil.rmtree(runs.home() / "store")
    found, _ = go(folder_of("train_grpo"), model=True)
    assert found.equal
    assert [seen for _, seen in stages_that_write] == [
        {}, {"pairs": [chain[0]]}, {"designer": [chain[1]]},
    ]  # fmt: skip


def test_the_first_difference_ends_it_and_is_named(chain, stages_that_write):
    folder = Path(folder_of("train_sft"))
    identity = json.loads((folder / "config.json").read_text())
    identity["config"]["text"] = "changed"
    (folder / "config.json").write_text(json.dumps(identity))
    found, lines = go(folder_of("train_grpo"), model=True)
    assert not found.equal
    assert [item.equal for item in found.outcomes] == [True, False]
    assert found.left == ("train_grpo",)
    assert any("train_sft: config.json: is not the one the run was made with" in c for c in lines)
    expected = runs.hashlib.md5(b"designer").hexdigest()
    assert f"expected {expected}" in found.outcomes[1].difference
    assert found.to_dict()["first_difference"]["stage"] == "train_sft"


def test_a_file_too_few_or_too_many_is_a_difference(tmp_path):
    (tmp_path / "b").write_text("b")
    digest = runs.hashlib.md5(b"b").hexdigest()
    assert first_difference({"b": digest}, tmp_path) is None
    assert first_difference({"a": digest, "b": digest}, tmp_path) == Difference("a", digest, None)
    assert first_difference({}, tmp_path) == Difference("b", None, digest)


def test_a_replaced_value_is_named_as_the_cause(chain, stages_that_write):
    found, lines = go(folder_of("train_grpo"), overrides={"text": "other"})
    assert not found.equal
    assert found.changes == ("train_grpo: config: text: got other, the run had adapter",)
    assert lines[0] == f"not as it was: {found.changes[0]}"


def test_a_field_that_this_checkout_adds_is_named(chain, stages_that_write, monkeypatch):
    written = reproduce._repeat

    def newer(identity, inputs, folder, fresh):
        out, got = written(identity, inputs, folder, fresh)
        config = {**identity, "config": {**identity["config"], "new": 1}}
        (folder / "config.json").write_text(json.dumps(config))
        return out, got

    monkeypatch.setattr(reproduce, "_repeat", newer)
    found, _ = go(folder_of("train_grpo"))
    assert found.changes == ("train_grpo: config: new: got 1, the run had (none)",)


def test_what_was_made_is_kept_if_asked_for(chain, stages_that_write):
    records, lines = Records(), []
    plan = reproduce.plan(records, records.subject(folder_of("train_grpo")))
    reproduce.reproduce(records, plan, say=lines.append, keep=True)
    (kept,) = (runs.home() / "reproduce").iterdir()
    assert lines[-1] == f"kept: {kept}"
    assert (kept / "again" / "00-train_grpo" / "out" / "a.txt").read_text() == "adapter"


def test_what_no_run_made_cannot_be_made_again():
    lost = "0" * 32 + ".dir"
    finished("train_sft", "designer", {"pairs": lost})
    with pytest.raises(ValueError, match=f"artifact {lost}: no recorded run made it"):
        go(folder_of("train_sft"), model=True)
    unknown = Subject(title="flow-designer version 1", digest=lost, record=None, version="1")
    with pytest.raises(ValueError, match="version 1: no recorded run made it; nothing to"):
        reproduce.plan(Records(), unknown)


def test_an_input_that_nobody_published_is_one_line(chain, stages_that_write):
    shutil.rmtree(runs.home() / "store")
    with pytest.raises(ValueError, match="got no manifest"):
        go(folder_of("train_grpo"))


def test_every_configuration_comes_back_from_its_json():
    for name in RECIPES:
        recipe = recipes.resolve(name)
        for field in dataclasses.fields(recipe):
            config = getattr(recipe, field.name)
            recorded = json.dumps(to_dict(config))
            again = override(type(config)(), json.loads(recorded))
            assert json.dumps(to_dict(again)) == recorded, (name, field.name)


def test_a_stage_that_fails_here_is_an_outcome_of_its_own(chain):
    found, lines = go(folder_of("train_grpo"))  # the real stage knows no such configuration
    assert found.failed
    assert not found.equal
    assert found.outcomes[0].got is None
    assert lines[-1].startswith("failed here: train_grpo: ")
    assert "text" in lines[-1]


def test_a_stage_is_told_nothing_of_where_to_record(chain, monkeypatch):
    given = {}

    def run(command, env, stderr, **_):
        given.update(env)
        stderr.write("no\n")
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    forgotten = {"FLOWLOOM_TURN", "FLOWLOOM_STEP", "FLOWLOOM_STORE", "MLFLOW_RUN_ID"}
    for name in forgotten:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())
    go(folder_of("build_pairs"))
    assert not {*forgotten, "MLFLOW_TRACKING_URI"} & given.keys()
    assert given["FLOWLOOM_TRACKING"] == "spool"
    assert Path(given["FLOWLOOM_HOME"]).parent == runs.home() / "reproduce"


def test_nested_fields_are_replaced_one_by_one():
    config = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}
    changed = reproduce._replaced(config, {"a": {"c": {"d": 5}}})
    assert changed == {"a": {"b": 1, "c": {"d": 5, "e": 3}}, "f": 4}
    assert config["a"]["c"]["d"] == 2


def test_a_decision_cannot_be_repeated():
    finished("promote", "decision")
    with pytest.raises(ValueError, match="decides by the registry as it is"):
        go(folder_of("promote"))


def test_a_model_is_put_together_again_from_its_published_parts(tracked, make_parts):
    parts = make_parts()
    for part in parts.values():
        versioning.publish(part)
    result, version = registry.register(parts)
    shutil.rmtree(result.out_dir.parent)
    records, lines = Records(), []
    plan = reproduce.plan(records, records.subject(f"flow-designer/{version}"), from_inputs=True)
    found = reproduce.reproduce(records, plan, say=lines.append)
    assert found.equal, lines
    assert [item.got for item in found.outcomes] == [result.digest]


SMALL = {
    "tune_generator": {
        "num_epochs": 1, "images_per_epoch": 4,
        "judging": {"num_prompts": 2, "num_grid_prompts": 1},
    },
    "publish_generator": {},
    "build_pairs": {"num_pairs": 40},
}  # fmt: skip
"""A chain with what the smallest recipe still has too much of."""


@pytest.mark.slow
def test_a_second_checkout_reproduces_and_names_what_changed(tracked, tmp_path, monkeypatch):
    from flowloom import stages

    made = {}
    smoke = recipes.resolve("smoke")
    for stage, changed in SMALL.items():
        given = {"publish_generator": "generator", "build_pairs": "catalogue"}.get(stage)
        inputs = {given: list(made.values())[-1].out_dir} if given else {}
        made[stage] = stages.run(stage, override(getattr(smoke, stage), changed), inputs)
    first = runs.home()
    shutil.rmtree(first / "runs")  # only the tracker and the remote are left

    second = tmp_path / "second"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("src", "data", "data-seed", ".dvc"):
        shutil.copytree(ROOT / name, second / name, ignore=skip if name == "src" else None)
    shutil.copyfile(ROOT / "data.dvc", second / "data.dvc")
    monkeypatch.chdir(second)
    there = {
        "FLOWLOOM_HOME": second / ".flowloom", "FLOWLOOM_STORE": first / "store",
        "MLFLOW_TRACKING_URI": f"sqlite:///{first / 'mlflow.db'}", "PYTHONPATH": second / "src",
    }  # fmt: skip
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    (pairs,) = Records().by_digest(made["build_pairs"].digest)
    (run_id,) = pairs.run_ids

    found, lines = go(run_id, model=True)
    assert [item.stage for item in found.outcomes] == list(SMALL), lines
    assert [item.got for item in found.outcomes] == [result.digest for result in made.values()]
    assert found.equal
    assert found.changes == ()

    found, lines = go(run_id, overrides={"num_pairs": 41})
    assert found.changes == ("build_pairs: config: num_pairs: got 41, the run had 40",)
    assert lines[-1].startswith("different: build_pairs: got ")

    weights = second / "data" / "models" / "checkpoints" / "shapes-base.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1001] ^= 1
    weights.write_bytes(data)
    found, lines = go(run_id, model=True)
    assert [item.stage for item in found.outcomes if not item.equal] == ["tune_generator"], lines
    assert found.left == ("publish_generator", "build_pairs")
    assert found.changes[1].startswith("data: models/checkpoints/shapes-base.safetensors: got dig")
