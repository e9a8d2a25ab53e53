"""What recording makes of a tracker that fails at any moment.

Facts pinned:
- a tracker that carries out a call and dies before it answers, at any of the calls, leaves after
  all repeats the tree of an undisturbed recording: no run and no point of a metric twice;
- a client that asks twice for a run by itself, or two machines at once, leave one run;
- steps that a resumed run logs again are recorded once, on another disk too;
- a run that was handed over is joined, by a turn or by one stage; what else comes is its child; one
  that is gone is made up for;
- an entry that cannot be recorded does not hold up the rest;
- a stage whose process died after finishing is published and recorded as finished.
"""

import json
import shutil

import pytest
from mlflow.exceptions import MlflowException

from flowloom import runs
from flowloom.lifecycle import spool, tracking, turns, versioning
from flowloom.lifecycle.mlflow_tree import PARENT
from flowloom.lifecycle.pointer import read_pointer

CALLS = (
    "create_run",
    "delete_run",
    "delete_tag",
    "get_experiment_by_name",
    "get_metric_history",
    "get_run",
    "log_artifact",
    "log_batch",
    "log_inputs",
    "search_runs",
    "set_tag",
    "set_terminated",
    "update_run",
)


class Losing:
    """A tracker that carries out every call, but dies before it answers one that is new to it."""

    def __init__(self, client):
        self._client, self._known, self._up = client, set(), True
        self.lost = []

    def start(self):
        self._up = True

    def __getattr__(self, name):
        if name not in CALLS:
            return getattr(self._client, name)

        def call(*args, **kwargs):
            if not self._up:
                raise MlflowException("no answer")
            answer = getattr(self._client, name)(*args, **kwargs)
            said = f"{name}: {args} {kwargs}"
            if said not in self._known:
                self._known.add(said)
                self.lost.append(name)
                self._up = False
                raise MlflowException("no answer")
            return answer

        return call

    def search_experiments(self, **_):
        if not self._up:
            raise MlflowException("no answer")


@pytest.fixture
def in_turn(monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    monkeypatch.setenv("FLOWLOOM_TURN", "0001")


@pytest.fixture
def handed(tracked):
    """A task's run that an engine made, below that of its pipeline run."""
    experiment = engines_experiment(tracked)
    above = tracked.create_run(experiment).info.run_id
    return tracked.create_run(experiment, tags={PARENT: above}).info.run_id


def engines_experiment(client):
    where = (runs.home() / "engine").as_uri()
    return client.create_experiment("pipelines", artifact_location=where)


def everything(client):
    """All runs as (name, tags that do not vary, params, points, inputs, files, status)."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    return sorted(map(facts, client.search_runs(experiments), [client] * 99), key=str)


def facts(run, client):
    names = sorted(run.data.metrics)
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": {
            k: v for k, v in run.data.tags.items() if k in ("flowloom.kind", "flowloom.digest")
        },
        "params": run.data.params,
        "points": [
            (name, p.step, p.value)
            for name in names
            for p in client.get_metric_history(run.info.run_id, name)
        ],
        "inputs": [i.dataset.name for i in run.inputs.dataset_inputs],
        "files": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
    }


def finished(make_run, **config):
    run = make_run(**config)
    with tracking.recorded(run):
        versioning.publish(run.dir / "out")
    return run


def history(client, run_id, name="train/loss"):
    return [(p.step, p.value) for p in client.get_metric_history(run_id, name)]


def stages_of(client):
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, "tags.`flowloom.kind` = 'stage'")


@pytest.mark.parametrize("joined", [False, True])
def test_an_answer_lost_at_any_call(tracked, make_run, handed, in_turn, joined):
    run = make_run()
    (run.dir / "out" / "grid.png").write_bytes(b"picture")
    identity = json.loads((run.dir / "config.json").read_text())
    identity |= {"inputs": {"pairs": "0" * 32 + ".dir", "champion": "3"}, "data": None}
    (run.dir / "config.json").write_text(json.dumps(identity))
    entry = spool.Entry(
        str(run.dir), run.stage, "finished", "0001", 1000, 2000, join=handed if joined else None
    )
    entry.leave()
    losing = Losing(tracked)
    while tracking.drain(tracking.Recorder(losing)):
        losing.start()
    assert losing.lost.count("create_run") == (0 if joined else 2)  # of the turn and the stage
    assert losing.lost.count("log_batch") == 3  # parameters, points, tags: no repeat differed
    assert losing.lost.count("log_artifact") == 3
    after_all = everything(tracked)
    (child,) = stages_of(tracked)
    assert (child.info.run_id == handed) == joined
    assert history(tracked, child.info.run_id) == [(1, 2.0), (2, 1.0)]
    assert history(tracked, child.info.run_id, "eval/score") == [(2, 0.5)]
    assert len(after_all) == (2 if joined else 4)
    (one,) = [item for item in after_all if item["tags"].get("flowloom.kind") == "stage"]
    assert one["inputs"] == ["pairs"]
    assert one["files"] == ["config.json", "log.txt", "pictures"]
    assert one["status"] == ("RUNNING" if joined else "FINISHED")


@pytest.mark.parametrize("times", [2, 3])
def test_a_run_asked_for_more_than_once_is_one(tracked, make_run, in_turn, monkeypatch, times):
    real = tracked.create_run

    def impatient(experiment_id, started_ms, tags, name):
        """A client whose first tries got no answer."""
        for _ in range(times):
            made = real(experiment_id, started_ms, tags, name)
        return made

    monkeypatch.setattr(tracked, "create_run", impatient)
    finished(make_run)
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    found = everything(tracked)
    assert [item["name"] for item in found] == ["train_sft", "turn 0001"]


def test_two_machines_make_the_run_of_a_turn_at_once(tracked, make_run, in_turn, monkeypatch):
    """Another machine's run appears between looking and making: the first one counts."""
    real = tracked.create_run

    def raced(experiment_id, started_ms, tags, name):
        if tags["flowloom.kind"] == "turn":
            theirs = {**tags, "flowloom.made": "theirs"}
            raced.other = real(experiment_id, started_ms - 5, theirs, name).info.run_id
        return real(experiment_id, started_ms, tags, name)

    monkeypatch.setattr(tracked, "create_run", raced)
    finished(make_run)
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = stages_of(tracked)
    assert child.data.tags[PARENT] == raced.other
    assert len(everything(tracked)) == 2


def test_a_run_that_another_machine_made_too_late_is_left_to_it(
    tracked, make_run, in_turn, monkeypatch
):
    real = tracked.create_run

    def raced(experiment_id, started_ms, tags, name):
        made = real(experiment_id, started_ms, tags, name)
        if tags["flowloom.kind"] == "turn":
            theirs = {**tags, "flowloom.made": "theirs"}
            raced.other = real(experiment_id, started_ms + 5, theirs, name).info.run_id
        return made

    monkeypatch.setattr(tracked, "create_run", raced)
    finished(make_run)
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = stages_of(tracked)
    assert child.data.tags[PARENT] != raced.other
    assert tracked.get_run(raced.other).info.lifecycle_stage == "active"


def test_a_stage_moves_below_the_run_of_its_turn_that_counts(tracked, make_run, in_turn):
    """Another machine's run, made earlier, is seen only after the stage was recorded once."""
    run = make_run(finish=False)
    with runs.exclusive(run), tracking.recorded(run):
        assert tracking.drain(tracking.Recorder(tracked)) == 1
        ours = tracked.get_run(stages_of(tracked)[0].data.tags[PARENT])
        tags = {k: v for k, v in ours.data.tags.items() if k.startswith("flowloom.")}
        theirs = tracked.create_run(ours.info.experiment_id, ours.info.start_time - 5, tags)
        run.finish({})
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = stages_of(tracked)
    assert child.data.tags[PARENT] == theirs.info.run_id


def test_people_who_share_a_tracker_have_their_own_turns(
    tracked, make_run, in_turn, monkeypatch, tmp_path
):
    uri = tracking.tracking_uri()
    finished(make_run)
    tracking.drain(tracking.Recorder(tracked))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "other"))
    finished(make_run)
    tracking.drain(tracking.Recorder(tracked))
    assert [item["name"] for item in everything(tracked)] == ["train_sft"] * 2 + ["turn 0001"] * 2
    # Steps of an engine's run have no disk in common, and its name is enough.
    for home in ("third", "fourth"):
        monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / home))
        monkeypatch.setenv("FLOWLOOM_TURN", "5f0e-b1")
        finished(make_run)
        tracking.drain(tracking.Recorder(tracked))
    assert [item["name"] for item in everything(tracked)].count("turn 5f0e-b1") == 1


def test_steps_logged_again_are_recorded_once(tracked, make_run, in_turn):
    run = make_run(finish=False)
    with runs.exclusive(run), tracking.recorded(run):
        run.metric(3, {"train/loss": 0.5})
        tracking.drain(tracking.Recorder(tracked))
        # Resumed from a checkpoint at step 1, the run passes steps 2 and 3 again.
        for step, loss in ((2, 1.0), (3, 0.5), (4, 0.25)):
            run.metric(step, {"train/loss": loss})
        tracking.drain(tracking.Recorder(tracked))
        run.finish({"train/loss": 0.25})
    tracking.drain(tracking.Recorder(tracked))
    (child,) = stages_of(tracked)
    assert history(tracked, child.info.run_id) == [(1, 2.0), (2, 1.0), (3, 0.5), (4, 0.25)]


def test_an_attempt_on_another_disk_adds_only_what_is_new(tracked, make_run, handed, monkeypatch):
    """The engine runs a task again on a fresh machine and hands over the same run."""
    monkeypatch.setenv("MLFLOW_RUN_ID", handed)
    uri = tracking.tracking_uri()
    run = make_run(finish=False)
    with pytest.raises(ValueError, match="evicted"), tracking.recorded(run):
        raise ValueError("evicted")
    assert history(tracked, handed) == [(1, 2.0), (2, 1.0)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shutil.rmtree(run.dir)
    run = make_run(finish=False)
    run.metric(3, {"train/loss": 0.5})
    with tracking.recorded(run):
        run.finish({"eval/score": 1.0})
        versioning.publish(run.dir / "out")
    assert history(tracked, handed) == [(1, 2.0), (2, 1.0), (3, 0.5)]
    tags = tracked.get_run(handed).data.tags
    assert "flowloom.error" not in tags
    assert tags["flowloom.digest"] == run.result().digest


def test_a_pipeline_run_in_one_process_has_its_run_joined_by_the_turn(
    tracked, make_run, monkeypatch, in_turn
):
    given = tracked.create_run(engines_experiment(tracked)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    turn = turns.open_turn(dict.fromkeys(turns.KEY_FIELDS, "x"), lambda: None)
    with turns.held(turn):
        turn.mark("running")
        for lr in (1.0, 2.0):
            finished(make_run, lr=lr)
        tracking.drain(tracking.Recorder(tracked))
        turn.mark("finished")
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    assert [run.data.tags[PARENT] for run in stages_of(tracked)] == [given] * 2
    joined = tracked.get_run(given)
    assert (joined.info.status, joined.data.tags["flowloom.turn"]) == ("RUNNING", "0001")
    assert len(everything(tracked)) == 3


def test_the_turn_of_an_engine_is_the_run_above_its_tasks(tracked, handed, monkeypatch):
    """A step says that the turn runs, and ends; nobody holds its folder in between."""
    monkeypatch.setenv("MLFLOW_RUN_ID", handed)
    folder = runs.home() / "turns" / "5f0e-b1"
    folder.mkdir(parents=True)
    (folder / "turn.json").write_text(json.dumps({"recipe": "demo", "status": "running"}))
    tracking.leave_turn(folder, "running")
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    above = tracked.get_run(tracked.get_run(handed).data.tags[PARENT])
    assert (above.info.status, above.data.tags["flowloom.status"]) == ("RUNNING", "running")
    assert "flowloom.kind" not in tracked.get_run(handed).data.tags
    monkeypatch.delenv("MLFLOW_RUN_ID")
    tracking.leave_turn(folder, "running")
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (own,) = [item for item in everything(tracked) if item["name"] == "turn 5f0e-b1"]
    assert own["status"] == "RUNNING"


def test_a_second_stage_does_not_overwrite_a_run_that_was_handed_over(
    tracked, make_run, handed, monkeypatch
):
    monkeypatch.setenv("MLFLOW_RUN_ID", handed)
    finished(make_run, lr=1.0)
    finished(make_run, lr=2.0)
    first, second = sorted(stages_of(tracked), key=lambda run: run.info.run_id != handed)
    assert first.data.params == {"lr": "1.0"}
    assert second.data.params == {"lr": "2.0"}
    assert second.data.tags[PARENT] == handed


def test_what_the_engine_logged_stays(tracked, make_run, handed, monkeypatch):
    tracked.log_param(handed, "lr", "fast")
    monkeypatch.setenv("MLFLOW_RUN_ID", handed)
    finished(make_run)
    assert tracked.get_run(handed).data.params == {"lr": "fast", "flowloom.lr": "0.1"}
    tracking.reused(make_run())
    assert tracked.get_run(handed).data.tags["flowloom.reused"] == "false"  # the same run again


def test_a_handed_over_run_that_is_gone_is_made_up_for(tracked, make_run, handed, monkeypatch):
    tracked.delete_run(handed)
    for run_id, lr in ((handed, 1.0), ("0" * 32, 2.0)):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        finished(make_run, lr=lr)
    assert [run.info.status for run in stages_of(tracked)] == ["FINISHED"] * 2


def test_entries_that_the_tracker_refuses_do_not_hold_up_the_rest(
    tracked, make_run, in_turn, monkeypatch
):
    for lr in (1.0, 2.0, 3.0):
        run = finished(make_run, lr=lr)
        record = json.loads((run.dir / "result.json").read_text())
        record["metrics"] = {"not: allowed?": 1.0}
        (run.dir / "result.json").write_text(json.dumps(record))
    finished(make_run, stage="zoom")
    assert tracking.drain(tracking.Recorder(tracked)) == 3
    assert "zoom" in [item["name"] for item in everything(tracked)]


def test_a_stage_that_died_unpublished_is_published_when_it_is_recorded(tracked, make_run, in_turn):
    run = make_run()  # finished, and killed before it could publish
    spool.Entry(str(run.dir), run.stage, "running", "0001", 0).leave()
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = stages_of(tracked)
    assert child.info.status == "FINISHED"
    assert json.loads(child.data.tags["flowloom.artifact"])["md5"] == run.result().digest


def test_a_stage_that_could_not_publish_is_finished_by_the_next_use(tracked, make_run, in_turn):
    run = make_run()
    with pytest.raises(ValueError, match="unreachable"), tracking.recorded(run):
        raise ValueError("remote: unreachable")
    tracking.reused(run)
    assert tracking.drain(tracking.Recorder(tracked)) == 0
    (child,) = stages_of(tracked)
    assert (child.info.status, "flowloom.error" in child.data.tags) == ("FINISHED", False)


def test_only_the_first_process_records(make_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run = make_run()
    with tracking.recorded(run):
        pass
    tracking.reused(run)
    assert not spool.spool_dir().exists()


def test_inputs_are_datasets_known_by_digest(tracked, make_run, in_turn):
    made = finished(make_run, stage="build_pairs")
    digest = made.result().digest
    run = make_run(lr=0.5)
    identity = json.loads((run.dir / "config.json").read_text())
    identity["inputs"] = {"pairs": digest, "parts": f"{'a' * 32},{'b' * 32}.dir", "champion": "3"}
    identity["data"] = "c" * 32 + ".dir"
    (run.dir / "config.json").write_text(json.dumps(identity))
    with tracking.recorded(run):
        versioning.publish(run.dir / "out")
    tracking.drain(tracking.Recorder(tracked))
    (child,) = [item for item in stages_of(tracked) if item.info.run_name == "train_sft"]
    found = {i.dataset.name: i for i in tracked.get_run(child.info.run_id).inputs.dataset_inputs}
    assert sorted(found) == ["data", "pairs", "parts.0", "parts.1"]
    pairs = found["pairs"].dataset
    assert (pairs.digest, pairs.source_type) == (digest, "dvc")
    assert read_pointer(json.loads(pairs.source)) == read_pointer(made.dir / "pointer.json")
    assert [tag.value for tag in found["pairs"].tags] == ["pairs"]
    assert found["parts.1"].dataset.digest == "b" * 32 + ".dir"


def test_pictures_are_few_and_small(tracked, make_run, in_turn):
    run = make_run()
    pictures = run.dir / "out" / "pictures"
    pictures.mkdir()
    for k in range(20):
        (pictures / f"{k:02d}.png").write_bytes(b"p")
    (run.dir / "out" / "zzz.png").write_bytes(b"grid")
    (run.dir / "out" / "huge.png").write_bytes(bytes((1 << 20) + 1))
    with tracking.recorded(run):
        versioning.publish(run.dir / "out")
    tracking.drain(tracking.Recorder(tracked))
    (child,) = stages_of(tracked)
    found = [item.path for item in tracked.list_artifacts(child.info.run_id, "pictures")]
    assert sorted(found) == [*(f"pictures/{k:02d}.png" for k in range(11)), "pictures/zzz.png"]
