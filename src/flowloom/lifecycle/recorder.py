"""Writes spool entries to MLflow.

The tracker may die between any two calls, and after one that it carried out without an answer. So
an entry is recorded again as a whole, and each call either changes nothing the second time (tags,
parameters, inputs, files, a run found by its tags) or sends the very same points of metrics, which
MLflow's database keeps once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flowloom.lifecycle import run_facts, spool, versioning
from flowloom.lifecycle.mlflow_tree import (
    AddressError,
    connect,
    given_run,
    is_down,
    is_ours,
    stage_run,
    turn_run,
)
from flowloom.lifecycle.run_facts import Point, flatten
from flowloom.lifecycle.spool import TURN, Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_BATCH = 100
"""Parameters or tags in one call: MLflow's own bound."""
MAX_POINTS = 900
"""Points of metrics in one call, beside tags: MLflow takes 1000 things."""
_SO_FAR = "flowloom.metrics"
"""Tag that says which lines of which file of metrics are recorded."""
_FINAL = "flowloom.final"
_OF_FAILURES = {"flowloom.error", "flowloom.log_tail"}
"""Tags of an attempt that a later one makes untrue."""
_CHANGING_TURN_FIELDS = ("status", "stages", "seconds", "outcome")
_MLFLOW_STATUS = {
    "finished": "FINISHED",
    "reused": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}


class Recorder:
    """Writes entries to MLflow. Client calls only: no run becomes the process's active one.

    (With `MLFLOW_RUN_ID` set, `mlflow.start_run` would overwrite the run it names, whatever parent
    it is given: mlflow issue 15713.)
    """

    def __init__(self, client: MlflowClient | None = None):
        """Use `client`, or one of the tracker in use."""
        self._client = client
        self._shown: dict[Path, tuple[str, int]] = {}

    @property
    def client(self) -> MlflowClient:
        """The MLflow client; importing MLflow waits until there is something to record."""
        if self._client is None:
            self._client = connect()
        return self._client

    def drain(self) -> int:
        """Record every entry that waits, unless the tracker is down.

        Returns:
            The number left over: of runs still going, and of those that could not be recorded.
        """
        with spool.draining():
            for path in spool.waiting():
                try:
                    self.take(path)
                except Exception as error:
                    # Whatever the tracker throws, the entry stays and the stages go on.
                    print(f"[tracking] {path.name} stays: {_one_line(error)}", file=sys.stderr)
                    # A folder that cannot be read says nothing about the tracker.
                    unread = isinstance(error, (KeyError, TypeError, ValueError))
                    unread = unread and not isinstance(error, AddressError)
                    if not unread and (self._client is None or is_down(self._client, error)):
                        break
            return len(spool.waiting())

    def take(self, path: Path) -> None:
        """Record the entry at `path`, and remove it if its run has ended."""
        entry, text = spool.read(path)
        folder = Path(entry.dir)
        if not folder.is_dir():
            print(f"[tracking] {path.name}: {entry.dir} is gone", file=sys.stderr)
            path.unlink()
            return
        # No process holds a turn that an engine runs: its last step says how it ends.
        going = entry.status == "running" and not (entry.stage == TURN and entry.by_engine)
        if going and not entry.alive():
            entry, going = _of_the_dead(entry, folder), False
        if going:
            metrics = folder / "metrics.jsonl"
            state = text, metrics.stat().st_size if metrics.is_file() else 0
            if self._shown.get(path) != state:
                self.record(entry)
                self._shown[path] = state
            return
        self.record(entry)
        if entry.status in ("finished", "reused") and entry.stage != TURN:
            entry.note()
        spool.remove(path, text)

    def record(self, entry: Entry) -> str:
        """Bring the MLflow run of `entry` up to date.

        Returns:
            Its MLflow run id.
        """
        folder = Path(entry.dir)
        if entry.stage == TURN:
            return self._record_turn(entry, folder)
        identity = run_facts.identity(folder)
        tags = run_facts.tags(entry, folder, identity)
        joined = given_run(self.client, entry.join)
        if joined and _is_of_another(joined, folder.name):
            entry, joined = dataclasses.replace(entry, parent=entry.join), None
        run = joined or stage_run(self.client, entry)
        run_id = run.info.run_id
        if "flowloom.stage" not in run.data.tags:
            self._log_params(run, identity["config"])
            self._log_inputs(run_id, run_facts.inputs(identity))
        points, progress = self._points(run, folder)
        for start in range(0, len(points), MAX_POINTS):
            self._log_points(run_id, points[start : start + MAX_POINTS])
        self._log_tags(run, tags | progress)
        for key in _OF_FAILURES & run.data.tags.keys() - tags.keys():
            self.client.delete_tag(run_id, key)
        if entry.status != "running":
            self._log_files(run_id, folder)
        self._set_status(run, entry)
        return run_id

    def _record_turn(self, entry: Entry, folder: Path) -> str:
        record = json.loads((folder / "turn.json").read_text())
        run = turn_run(self.client, entry)
        frozen = {name: record[name] for name in record if name not in _CHANGING_TURN_FIELDS}
        self._log_params(run, frozen)
        tags = {
            "flowloom.kind": TURN,
            "flowloom.turn": str(entry.turn),
            "flowloom.status": entry.status,
        }
        outcome = record.get("outcome", {})
        tags |= {f"flowloom.{k}": str(outcome[k]) for k in ("step", "error") if outcome.get(k)}
        if entry.commit:
            tags["mlflow.source.git.commit"] = entry.commit
        self._log_tags(run, tags)
        self.client.log_artifact(run.info.run_id, str(folder / "turn.json"))
        self._set_status(run, entry)
        return run.info.run_id

    def _set_status(self, run: Run, entry: Entry) -> None:
        if not is_ours(run):
            return
        if entry.status != "running":
            status = _MLFLOW_STATUS[entry.status]
            self.client.set_terminated(run.info.run_id, status, end_time=entry.ended_ms)
        elif run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")

    def _log_params(self, run: Run, config: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        there, params = run.data.params, []
        for key, text in flatten(config).items():
            value = text[: run_facts.MAX_TEXT]
            # The engine logs a task's arguments, some by the same name in another form.
            name = key if there.get(key, value) == value else f"flowloom.{key}"
            if there.get(name) != value:
                params.append(Param(name, value))
        for start in range(0, len(params), MAX_BATCH):
            self.client.log_batch(run.info.run_id, params=params[start : start + MAX_BATCH])

    def _log_inputs(self, run_id: str, inputs: list[run_facts.Input]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = []
        for item in inputs:
            counts = {k: item.pointer[k] for k in ("size", "nfiles") if k in item.pointer}
            dataset = Dataset(
                name=item.name,
                digest=item.digest,
                source_type="dvc",
                source=json.dumps(dict(item.pointer), sort_keys=True),
                profile=json.dumps(counts) if counts else None,
            )
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item.name)]))
        if datasets:
            self.client.log_inputs(run_id, datasets)

    def _points(self, run: Run, folder: Path) -> tuple[list[Point], dict[str, str]]:
        """The points that the run lacks, and the tags that say so once it has them."""
        metrics, tags = run_facts.metrics(folder), run.data.tags
        file_id, _, lines = tags.get(_SO_FAR, "").partition(":")
        known = file_id == metrics.file_id
        points = [p for line in metrics.points[int(lines) if known else 0 :] for p in line]
        final = [] if tags.get(_FINAL) else run_facts.final_points(folder, metrics)
        if not known and run.data.metrics:
            # An attempt whose disk is gone recorded some of these steps.
            names = {p.name for p in [*points, *final]} & set(run.data.metrics)
            there = {(name, step) for name in names for step in self._steps(run, name)}
            points = [p for p in points if (p.name, p.step) not in there]
            final = [p for p in final if (p.name, p.step) not in there]
        progress = {_SO_FAR: f"{metrics.file_id}:{metrics.lines}"}
        if (folder / "result.json").is_file():
            progress[_FINAL] = "true"
        return [*points, *final], progress

    def _steps(self, run: Run, name: str) -> list[int]:
        return [m.step for m in self.client.get_metric_history(run.info.run_id, name)]

    def _log_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(
            run_id, metrics=[Metric(p.name, p.value, p.ms, p.step) for p in points]
        )

    def _log_tags(self, run: Run, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = [RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v]
        for start in range(0, len(changed), MAX_BATCH):
            self.client.log_batch(run.info.run_id, tags=changed[start : start + MAX_BATCH])

    def _log_files(self, run_id: str, folder: Path) -> None:
        for name in ("config.json", "log.txt", "pointer.json"):
            if (folder / name).is_file():
                self.client.log_artifact(run_id, str(folder / name))
        for path in run_facts.pictures(folder):
            self.client.log_artifact(run_id, str(path), "pictures")


def _is_of_another(run: Run, key: str) -> bool:
    """Whether a run that was handed over is taken, by a turn or another stage: then it is above."""
    tags = run.data.tags
    return tags.get("flowloom.kind") == TURN or tags.get("flowloom.key", key) != key


def _of_the_dead(entry: Entry, folder: Path) -> Entry:
    """What became of a run whose process is gone without a word.

    Raises:
        ValueError: It had finished, and what it made cannot be published now.
    """
    result = folder / "result.json"
    if not result.is_file():
        return dataclasses.replace(entry, status="killed", ended_ms=spool.now_ms())
    if not (folder / "pointer.json").is_file():
        versioning.publish(folder / "out")
    ended_ms = result.stat().st_mtime_ns // 1_000_000
    return dataclasses.replace(entry, status="finished", ended_ms=ended_ms)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
