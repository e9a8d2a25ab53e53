"""Recording of runs.

Facts pinned:
- a turn is a parent run, each of its stages a child with parameters, metrics over steps, tags and
  the pointer to its artifact, named like its step where it is one of a pipeline;
- recording the same folder twice gives one MLflow run, and no metric twice;
- a dead tracker loses nothing and stops no stage, nor does one whose address is mistaken, which is
  said in one line, once;
- a failed stage is recorded as failed, with its error and the end of its log;
- a run that the pipeline engine made is joined, not closed, and no second one is made.
"""

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from flowloom import cli, runs
from flowloom.lifecycle import spool, tracking, turns, versioning
from flowloom.workflow.catalogue import Catalogue


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A configuration without fields."""


@pytest.fixture
def spooled(monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    monkeypatch.setenv("FLOWLOOM_TURN", "0001")


def runs_of(client, kind="stage"):
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    query = f"tags.`flowloom.kind` = '{kind}'"
    return client.search_runs([experiment.experiment_id], query) if experiment else []


def record(run, status="finished"):
    with tracking.recorded(run):
        if status == "failed":
            raise ValueError("loss: got nan at step 3")
        versioning.publish(run.dir / "out")


def test_a_step_of_a_pipeline_names_its_run(tracked, make_run, spooled, monkeypatch):
    steps = ["train_sft-0", "train_sft_round_2-0"]
    for lr, step in enumerate(steps, start=1):
        monkeypatch.setenv("FLOWLOOM_STEP", step)
        record(make_run(lr=float(lr)))
    tracking.drain(tracking.Recorder(tracked))
    assert sorted(run.info.run_name for run in runs_of(tracked)) == steps


def test_a_stage_is_a_child_of_its_turn(tracked, make_run, spooled):
    run = make_run(lr=0.25)
    record(run)
    assert runs_of(tracked) == []  # a stage only leaves an entry
    assert tracking.drain(tracking.Recorder(tracked)) == 0

    (turn,), (child,) = runs_of(tracked, "turn"), runs_of(tracked)
    assert child.info.run_name == "train_sft"
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == turn.info.run_id
    assert child.data.params == {"lr": "0.25"}
    assert child.data.metrics["eval/score"] == 0.5
    assert child.data.metrics["time/stage_s"] >= 0
    history = tracked.get_metric_history(child.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    tags = child.data.tags
    assert tags["flowloom.key"] == run.dir.name
    assert json.loads(tags["flowloom.artifact"])["md5"] == run.result().digest
    assert {"flowloom.code", "flowloom.data", "mlflow.source.git.commit"} <= set(tags)
    assert sorted(item.path for item in tracked.list_artifacts(child.info.run_id)) == [
        "config.json",
        "log.txt",
        "pointer.json",
    ]


def test_the_catalogue_is_named_by_its_hash(tracked, make_run, spooled):
    embedded = Catalogue.load("embedded")
    writer = make_run("publish_generator", finish=False)
    packed = gzip.compress(json.dumps(embedded.to_json()).encode(), mtime=0)
    (writer.out / "catalogue.json.gz").write_bytes(packed)
    digest = writer.finish({}).digest
    reader = runs.open_run("build_pairs", Nothing(), {"catalogue": digest})
    reader.begin()
    (reader.out / "pairs.txt").write_text("a star")
    reader.finish({})
    for run in (writer, reader):
        record(run)
    tracking.drain(tracking.Recorder(tracked))
    assert [child.data.tags["flowloom.catalogue"] for child in runs_of(tracked)] == (
        [embedded.hash] * 2
    )


def test_recording_twice_gives_one_run(tracked, make_run, spooled):
    run = make_run()
    for _ in range(2):
        record(run)
        assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = runs_of(tracked)
    assert len(tracked.get_metric_history(child.info.run_id, "train/loss")) == 2
    assert len(tracked.get_metric_history(child.info.run_id, "eval/score")) == 1


def test_a_finished_run_is_linked_to_a_new_turn_once(tracked, make_run, spooled, monkeypatch):
    run = make_run()
    record(run)
    tracking.drain(tracking.Recorder(tracked))
    tracking.reused(run)  # the same turn again: known
    assert list(tracking.spool_dir().glob("*.json")) == []
    monkeypatch.setenv("FLOWLOOM_TURN", "0002")
    tracking.reused(run)
    tracking.drain(tracking.Recorder(tracked))
    found = {child.data.tags["flowloom.turn"]: child.data.tags for child in runs_of(tracked)}
    assert sorted(found) == ["0001", "0002"]
    assert found["0002"]["flowloom.reused"] == "true"
    assert found["0002"]["flowloom.artifact"] == found["0001"]["flowloom.artifact"]


def test_an_artifact_whose_publication_was_cut_off_is_published_later(make_run):
    run = make_run()
    tracking.reused(run)
    assert json.loads((run.dir / "pointer.json").read_text())["md5"] == run.result().digest


def test_a_dead_tracker_loses_nothing(tracked, make_run, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = make_run()
    record(run)  # tries at once, as a task on a cluster does
    assert "stays" in capsys.readouterr().err
    assert len(list(tracking.spool_dir().glob("*.json"))) == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = runs_of(tracked)
    assert child.info.status == "FINISHED"


@pytest.mark.parametrize(
    "uri",
    ["ftp://x", "mlflow.example.com:5000", "http:/x", "sqlite://x.db", "postgresql:x", "runs"],
)
def test_a_mistaken_address_is_one_line_and_loses_nothing(uri, make_run, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said = f"MLFLOW_TRACKING_URI: got '{uri}', expected a server's address"
    with pytest.raises(ValueError, match=re.escape(said)):
        tracking.connect()
    assert cli.main(["lineage"]) == cli.USAGE
    assert capsys.readouterr().err.startswith(f"flowloom lineage: {said}")
    for lr in (1.0, 2.0):
        record(make_run(lr=lr))
    capsys.readouterr()
    assert tracking.drain() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_entry_that_changed_while_it_was_recorded_stays(make_run, spooled):
    record(make_run())
    (path,) = spool.waiting()
    entry, text = spool.read(path)
    dataclasses.replace(entry, status="running").leave()
    spool.remove(path, text)
    assert spool.read(path)[0].status == "running"
    spool.remove(path, path.read_text())
    assert spool.waiting() == []


def test_one_bad_entry_does_not_hold_up_the_rest(tracked, make_run, spooled, capsys):
    bad, gone, good = make_run(lr=1.0), make_run(lr=2.0), make_run("zoom")
    for run in (bad, gone, good):
        record(run)
    (bad.dir / "config.json").write_text("{}")
    shutil.rmtree(gone.dir)
    assert tracking.drain(tracking.Recorder(tracked)) == 1
    assert [child.info.run_name for child in runs_of(tracked)] == ["zoom"]
    assert "KeyError" in capsys.readouterr().err


def test_a_failure_is_recorded(tracked, make_run):
    run = make_run(finish=False)
    with pytest.raises(ValueError, match="loss: got nan"):
        record(run, "failed")
    (child,) = runs_of(tracked)
    assert child.info.status == "FAILED"
    assert child.data.tags["flowloom.error"] == "ValueError: loss: got nan at step 3"
    assert child.data.tags["flowloom.log_tail"] == "step 2 of 2"
    # The same command again: the same MLflow run, now finished.
    run.finish({})
    record(run)
    (child,) = runs_of(tracked)
    assert child.info.status == "FINISHED"


def test_a_killed_stage_is_not_left_running(tracked, make_run, spooled):
    run = make_run(finish=False)
    tracking.Entry(str(run.dir), run.stage, "running", "0001", 0).leave()
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    assert [child.info.status for child in runs_of(tracked)] == ["KILLED"]


def test_a_running_stage_is_shown_as_it_goes(tracked, make_run, spooled):
    from flowloom.runs import exclusive

    run = make_run(finish=False)
    with exclusive(run), tracking.recorded(run):
        assert tracking.drain(tracking.Recorder(tracked)) == 1
        (child,) = runs_of(tracked)
        assert (child.info.status, child.data.metrics) == ("RUNNING", {"train/loss": 1.0})
        run.metric(3, {"train/loss": 0.5})
        run.finish({})
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = runs_of(tracked)
    assert (child.info.status, child.data.metrics["train/loss"]) == ("FINISHED", 0.5)
    assert len(tracked.get_metric_history(child.info.run_id, "train/loss")) == 3


def test_a_run_of_the_engine_is_joined(tracked, make_run, monkeypatch):
    given = tracked.create_run(tracking.experiment(tracked)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    monkeypatch.setenv("FLOWLOOM_TURN", "0001")
    record(make_run())
    (joined,) = runs_of(tracked)
    assert joined.info.run_id == given
    assert runs_of(tracked, "turn") == []
    assert joined.info.status == "RUNNING"
    assert joined.data.params == {"lr": "0.1"}
    assert joined.data.metrics["train/loss"] == 1.0


def test_a_turn_is_recorded(tracked):
    fields = dict.fromkeys(turns.KEY_FIELDS, "x") | {"overrides": {"train_sft": {"lr": 1}}}
    turn = turns.open_turn(fields, lambda: "3")
    with turns.held(turn):
        turn.mark("running")
        assert tracking.drain(tracking.Recorder(tracked)) == 1
        turn.mark("finished", seconds={"total": 1.0})
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (parent,) = runs_of(tracked, "turn")
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "turn 0001"
    assert parent.data.params["champion"] == "3"
    assert parent.data.params["overrides.train_sft.lr"] == "1"


def test_the_follower_records_what_is_left_and_ends(tracked, make_run, spooled):
    record(make_run())
    done = subprocess.run(
        [sys.executable, "-m", "flowloom.lifecycle.tracking", "--follow"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tracking.spool_dir().glob("*.json")) == []
    assert [child.info.status for child in runs_of(tracked)] == ["FINISHED"]


def test_parameters_are_flat():
    config = {"lr": 0.1, "policy": {"width": 64, "name": "a"}, "steps": [1, 2], "none": None}
    assert tracking.flatten(config) == {
        "lr": "0.1",
        "policy.width": "64",
        "policy.name": "a",
        "steps": "[1, 2]",
        "none": "null",
    }
