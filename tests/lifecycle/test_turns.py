"""Turns and their steps.

Facts pinned:
- the latest turn is resumed if every field of its key is the same, finished or not;
- the champion is asked for once, when a turn starts, and never changes in it;
- a turn asked for by its number is the latest or the next, and the next is started once;
- what a turn goes on from is found once, when it starts, and stays in its record;
- one process at a time works on a turn;
- on a cluster the turn has the engine's run's name: its first step freezes the champion, once, and
  its end and error are in the record and in the tracking run, a mistaken recipe too; one that was
  stopped did not finish, and one that never began leaves nothing;
- a step with other code or data than the turn's is refused;
- a step's artifact points to the run folder, or is copied where the engine stores artifacts; what
  is nothing is left out of a step's inputs.
"""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest

from flowloom import runs
from flowloom.lifecycle import recall, spool, turns
from flowloom.lifecycle.steps import MAX_ROWS, NOTHING, folders, hand_on, hand_over, markdown

FIELDS = {
    "pipeline": "continuous_training",
    "recipe": "demo",
    "overrides": {},
    "data": "d",
    "catalogue": "c",
    "code": "k",
}


def never():
    raise AssertionError("asked for the champion")


def test_the_same_key_resumes():
    first = turns.open_turn(FIELDS, lambda: "7")
    assert (first.name, first.champion) == ("0001", "7")
    assert turns.open_turn(FIELDS, never).name == "0001"
    first.mark("finished")
    again = turns.open_turn(FIELDS, never)
    assert (again.name, again.champion, again.record["status"]) == ("0001", "7", "finished")
    again.mark("running")  # finds all it made: stays finished
    assert turns.load("0001").record["status"] == "finished"


@pytest.mark.parametrize("field", turns.KEY_FIELDS)
def test_any_other_key_starts_a_turn(field):
    turns.open_turn(FIELDS, lambda: None)
    changed = {"train_sft": {"lr": 1}} if field == "overrides" else "other"
    assert turns.open_turn(FIELDS | {field: changed}, lambda: None).name == "0002"


def test_a_new_turn_is_asked_for():
    turns.open_turn(FIELDS, lambda: None)
    assert turns.open_turn(FIELDS, lambda: "1", new=True).champion == "1"
    # Only the latest counts: its key decides.
    assert turns.open_turn(FIELDS, never).name == "0002"


def test_a_turn_by_number_is_the_latest_or_the_next():
    with pytest.raises(ValueError, match=r"turn: got 2, expected 1 \(there is none yet\)"):
        turns.open_turn(FIELDS, never, number=2)
    assert turns.open_turn(FIELDS, lambda: None, number=1).name == "0001"
    assert turns.open_turn(FIELDS, never, number=1).name == "0001"
    # The same key, and yet the next turn: its number asks for it, once.
    assert turns.open_turn(FIELDS, lambda: "1", number=2).champion == "1"
    assert turns.open_turn(FIELDS, never, number=2).champion == "1"
    for wrong in (0, 1, 4):
        with pytest.raises(ValueError, match=rf"turn: got {wrong}, expected 2 .* or 3"):
            turns.open_turn(FIELDS, never, number=wrong)
    with pytest.raises(ValueError, match="turn 2: was started with another recipe, data, expected"):
        turns.open_turn(FIELDS | {"recipe": "smoke", "data": "e"}, never, number=2)
    assert turns.latest().name == "0002"


def test_the_key_is_what_the_run_depends_on():
    key = turns.key("continuous_training", "demo", {"train_sft": {"steps": (1, 2)}})
    assert tuple(key) == turns.KEY_FIELDS
    assert key["overrides"] == {"train_sft": {"steps": [1, 2]}}


def test_one_process_at_a_time():
    turn = turns.open_turn(FIELDS, lambda: None)
    with (
        turns.held(turn),
        pytest.raises(ValueError, match=r"turn 0001: process \d+ works on it"),
        turns.held(turn),
    ):
        pass
    # Whoever held it before leaves no part of its number in the message.
    (turn.dir / "lock").write_text("12345678901")
    with (
        turns.held(turn),
        pytest.raises(ValueError, match=rf"turn 0001: process {os.getpid()} works on it"),
        turns.held(turn),
    ):
        pass


LEFT = {"version": "1", "catalogue": "c", "triplets": "t", "adapter": "a"}
LATER = {**LEFT, "version": "2"}


def test_what_is_gone_on_from_is_frozen_when_a_turn_starts(monkeypatch):
    monkeypatch.setattr(recall, "find", lambda *given: LATER)
    turn = turns.open_turn(FIELDS, lambda: None, recalled=lambda: LEFT)
    assert turns.open_turn(FIELDS, never, recalled=never).record["recalled"] == LEFT
    assert turns.recalled("config", "auto") == LATER  # belongs to no turn
    monkeypatch.setenv("FLOWLOOM_TURN", turn.name)
    assert turns.recalled("config", "auto") == LEFT
    turns.load("0001").mark("finished")
    assert turns.recalled("config", "auto") == LEFT
    first = turns.open_turn({**FIELDS, "code": "x"}, lambda: None, recalled=dict)
    monkeypatch.setenv("FLOWLOOM_TURN", first.name)
    assert turns.recalled("config", "auto") == {}  # a first turn stays one


def test_on_a_cluster_the_first_step_freezes_it(on_a_cluster, monkeypatch):
    asked = []
    monkeypatch.setattr(recall, "find", lambda *given: asked.append(given) or LEFT)
    turns.begin("continuous_training", "smoke", {}, "")
    assert turns.recalled("config", "auto") == LEFT
    assert turns.recalled("config", "auto") == LEFT
    turns.close("SUCCEEDED", None)
    assert turns.load("run-7").record["recalled"] == LEFT
    assert asked == [("config", "auto")]


def test_an_unknown_turn_is_named():
    with pytest.raises(ValueError, match="turn: got '0009', expected one in"):
        turns.load("0009")


class Metrics:
    def __init__(self):
        self.values = {}

    def log_metric(self, metric, value):
        self.values[metric] = value


def test_a_local_artifact_points_to_the_run_folder(make_run, monkeypatch):
    turn = turns.open_turn(FIELDS, lambda: None)
    monkeypatch.setenv("FLOWLOOM_TURN", turn.name)
    monkeypatch.setenv("FLOWLOOM_STEP", "train_reward-2")
    result = make_run().result()
    artifact = SimpleNamespace(uri="/tmp/kfp/out", path="/tmp/kfp/out", metadata={})
    metrics = Metrics()
    hand_over(result, artifact, metrics)
    assert artifact.uri == str(result.out_dir)
    assert artifact.metadata == {"digest": result.digest}
    assert metrics.values == {"eval/score": 0.5}
    (step,) = turn.steps()
    assert (step["step"], step["digest"], step["cached"]) == ("train_reward-2", result.digest, True)
    assert step["stage_s"] == 0.0
    turn.mark("finished")
    assert turns.load("0001").record["stages"] == {"train_reward-2": result.digest}


def test_a_remote_artifact_is_copied(make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TURN", "run-7")  # whose record is on no disk of this step
    result = make_run().result()
    place = tmp_path / "s3" / "bucket" / "designer"
    artifact = SimpleNamespace(uri="s3://bucket/designer", path=str(place), metadata={})
    hand_over(result, artifact)
    assert artifact.uri == "s3://bucket/designer"
    assert (place / "nested" / "weights.bin").read_bytes() == b"\x00\x01\x02"
    page = SimpleNamespace(uri="s3://bucket/page", path=str(tmp_path / "x" / "page"), metadata={})
    hand_over(result, page, file="model.json")
    assert json.loads((tmp_path / "x" / "page").read_text()) == {"lr": 0.1}


def test_a_summary_says_how_many_metrics_it_leaves_out(make_run):
    result = make_run().result()
    metrics = {f"eval/{number:02d}": 1.0 for number in range(MAX_ROWS)}
    assert "more in" not in markdown(dataclasses.replace(result, metrics=metrics))
    shown = markdown(dataclasses.replace(result, metrics={**metrics, "eval/score": 0.5}))
    assert "1 more in the step's metrics." in shown
    assert "eval/score" not in shown


def test_what_was_left_is_copied_where_the_engine_stores_artifacts(tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "rows").write_text("r")
    monkeypatch.setattr(recall, "bring", lambda digest: tmp_path / digest)
    artifact = SimpleNamespace(uri="s3://b/x", path=str(tmp_path / "s3" / "x"), metadata={})
    hand_on(artifact, LEFT, "triplets")
    assert (tmp_path / "s3" / "x" / "rows").read_text() == "r"
    assert (artifact.uri, artifact.metadata) == ("s3://b/x", {"digest": "t"})
    nothing = SimpleNamespace(uri="s3://b/y", path=str(tmp_path / "s3" / "y"), metadata={})
    hand_on(nothing, {}, "triplets")
    assert folders(earlier=artifact, proposals=nothing) == {"earlier": tmp_path / "s3" / "x"}
    # A file says so: object stores keep no empty folders, and what was lost is missed.
    (tmp_path / "s3" / "y" / NOTHING).unlink()
    assert set(folders(proposals=nothing)) == {"proposals"}


def test_inputs_become_folders(tmp_path):
    one, two = SimpleNamespace(path=str(tmp_path / "1")), SimpleNamespace(path=str(tmp_path / "2"))
    assert folders(a=one, members=[one, two]) == {
        "a": tmp_path / "1",
        "members": [tmp_path / "1", tmp_path / "2"],
    }


@pytest.fixture
def on_a_cluster(tracked, monkeypatch):
    """A client of the tracker."""
    monkeypatch.setenv("FLOWLOOM_TURN", "run-7")
    monkeypatch.delenv("FLOWLOOM_TRACKING", raising=False)
    return tracked


def test_a_turn_on_a_cluster_is_recorded(on_a_cluster, monkeypatch):
    from flowloom.lifecycle import registry, tracking

    monkeypatch.setattr(registry, "champion", lambda: SimpleNamespace(version="3"))
    assert turns.begin("continuous_training", "smoke", {}, "auto") == "3"
    monkeypatch.setattr(registry, "champion", lambda: SimpleNamespace(version="4"))
    assert turns.begin("continuous_training", "smoke", {}, "auto") == "3"
    assert turns.latest() is None  # turns of this machine are counted apart
    (run,) = on_a_cluster.search_runs([tracking.experiment(on_a_cluster)])
    assert run.info.status == "RUNNING"  # seen from the start
    turns.close("FAILED", "Task turn failed.")
    record = turns.load("run-7").record
    assert (record["status"], record["champion"]) == ("failed", "3")
    assert record["outcome"] == {"state": "FAILED", "error": "Task turn failed."}
    (run,) = on_a_cluster.search_runs([tracking.experiment(on_a_cluster)])
    assert run.info.status == "FAILED"
    assert run.data.params["recipe"] == "smoke"
    assert run.data.tags["flowloom.error"] == "Task turn failed."


@pytest.mark.parametrize("named", ["", "3"])
def test_on_a_cluster_the_opponent_is_none_or_the_one_named(on_a_cluster, monkeypatch, named):
    from flowloom.lifecycle import registry

    assert turns.begin("continuous_training", "smoke", {}, "auto") == ""  # there is none yet
    monkeypatch.setenv("FLOWLOOM_TURN", "run-8")
    monkeypatch.setattr(registry, "champion", lambda: SimpleNamespace(version="4"))
    assert turns.begin("continuous_training", "smoke", {}, named) == named
    assert turns.load("run-8").champion == (named or None)


def test_a_turn_that_was_stopped_did_not_finish(on_a_cluster):
    turns.begin("continuous_training", "smoke", {}, "")
    turns.close("CANCELLED", None)
    assert turns.load("run-7").record["status"] == "failed"


def test_a_turn_that_never_began_ends_all_the_same(monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TURN", "run-7")
    turns.close("FAILED", "Task begin_turn failed.")
    assert not (runs.home() / "turns").exists()


def test_the_end_of_a_turn_waits_for_the_process_that_records(monkeypatch):
    turn = turns.open_turn(FIELDS, lambda: None)
    monkeypatch.setenv("FLOWLOOM_TURN", turn.name)
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    turns.close("SUCCEEDED", None)
    assert [path.name for path in spool.waiting()] == ["0001-turn-0001.json"]


def test_other_code_or_data_than_the_turns_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {'a' * 32}.dir\n")
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))
    begun = turns.sources()
    turns.check_sources("train_sft", begun)
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {'b' * 32}.dir\n")
    with pytest.raises(
        ValueError, match=rf"train_sft: sources: got .*bbb\.dir, expected the turn's {begun}"
    ):
        turns.check_sources("train_sft", begun)


def test_a_mistaken_recipe_is_the_turns_failure(on_a_cluster):
    # The record is made first: the step that refuses the recipe has a turn to fail in.
    turns.begin("continuous_training", "huge", {}, "")
    turns.close("FAILED", None)
    assert turns.load("run-7").record["status"] == "failed"


def test_a_turn_of_this_machine_keeps_its_champion(monkeypatch):
    turn = turns.open_turn(FIELDS, lambda: "7")
    monkeypatch.setenv("FLOWLOOM_TURN", turn.name)
    assert turns.begin("continuous_training", "smoke", {}, "auto") == "7"
    monkeypatch.delenv("FLOWLOOM_TURN")
    assert turns.begin("continuous_training", "smoke", {}, "") == ""
    turns.close("SUCCEEDED", None)  # belongs to no turn: there is nothing to record
    assert turns.load("0001").record["status"] == "new"
