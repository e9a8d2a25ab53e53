"""Record runs in MLflow: a parent run per turn, a child run per stage.

A run folder already holds all there is to record. So a stage only leaves a *spool entry* (a JSON
file in `<home>/spool`) naming its folder, and whoever has MLflow imported records it:

- `FLOWLOOM_TRACKING=spool` (set by the local pipeline runner): a follower process,
  `python -m flowloom.lifecycle.tracking --follow`, imports MLflow once for all stages of the turn
  and records entries as they appear, until its standard input closes.
- otherwise (a stage run alone, a task on a cluster) the stage records its entry itself at its end.

An entry stays until it is recorded, so a tracking server that is down loses nothing and stops no
stage. Recording a folder twice gives one MLflow run: it is found by its key and turn.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import versioning
from flowloom.runs import Run, home, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "flowloom"
TURN = "turn"
"""What stands for the stage in the entry of a turn."""
LOG_TAIL_LINES = 30
MAX_FAILURES = 2
"""Entries that may fail before the tracker is taken to be down for now."""
MAX_BATCH = 100
"""Parameters or tags in one call: MLflow's own bound."""
_CHANGING_TURN_FIELDS = ("status", "stages", "seconds", "outcome")
_MLFLOW_STATUS = {
    "finished": "FINISHED",
    "reused": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}
MAX_TEXT = 5000
"""Characters of a tag or parameter: MLflow's bounds are 8000 and 6000."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of one stage that is to be recorded."""

    dir: str
    """Its run folder."""
    stage: str
    """Its name."""
    status: str
    """`running`, `finished`, `failed` or `reused` (finished by an earlier turn)."""
    turn: str | None
    """The turn it belongs to, if any."""
    started_ms: int
    """When it started, in milliseconds since the epoch."""
    ended_ms: int | None = None
    """When it ended; `None` while it runs."""
    commit: str | None = None
    """Git commit of the checkout it ran in, if it ran in one."""
    error: str | None = None
    """What stopped it, if it failed."""
    join: str | None = None
    """MLflow run to write to, if the pipeline engine made one for this task."""
    step: str | None = None
    """The pipeline's step that it is, if any: a turn runs some stages more than once."""

    @property
    def path(self) -> Path:
        """Where the entry lies."""
        return spool_dir() / f"{self.turn or 'alone'}-{self.stage}-{Path(self.dir).name}.json"

    @property
    def noted(self) -> bool:
        """Whether the run, finished, was recorded for this turn before."""
        return self._note in _read_notes(Path(self.dir))

    @property
    def _note(self) -> str:
        return f"turn {self.turn} in {tracking_uri()}"

    def note(self) -> None:
        """Remember, in the run folder, that it was recorded for this turn."""
        notes = _read_notes(Path(self.dir))
        if self._note not in notes:
            write_json(Path(self.dir) / "recorded.json", [*notes, self._note])


def spool_dir() -> Path:
    """The folder of entries waiting to be recorded."""
    return home() / "spool"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else the SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Have what happens inside recorded as a run of its stage, failures too."""
    entry = Entry(
        dir=str(run.dir),
        stage=run.stage,
        status="running",
        turn=os.environ.get("FLOWLOOM_TURN"),
        started_ms=_now_ms(),
        commit=_git_commit(),
        join=os.environ.get("MLFLOW_RUN_ID"),
        step=os.environ.get("FLOWLOOM_STEP"),
    )
    _leave(entry)
    try:
        yield
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        _leave(dataclasses.replace(entry, status="failed", ended_ms=_now_ms(), error=text))
        _drain_unless_followed()
        raise
    _leave(dataclasses.replace(entry, status="finished", ended_ms=_now_ms()))
    _drain_unless_followed()


def reused(run: Run) -> None:
    """Link a run that was finished before to the turn that now uses it.

    Also publishes its artifact if the process died between finishing and publishing.
    """
    if not (run.dir / "pointer.json").is_file():
        versioning.publish(run.dir / "out")
    turn = os.environ.get("FLOWLOOM_TURN")
    if turn is None:
        return
    now_ms = _now_ms()
    times, step = (now_ms, now_ms), os.environ.get("FLOWLOOM_STEP")
    entry = Entry(str(run.dir), run.stage, "reused", turn, *times, _git_commit(), step=step)
    if not entry.path.exists() and not entry.noted:
        _leave(entry)
        _drain_unless_followed()


def leave_turn(folder: Path, status: str) -> None:
    """Have a turn (its folder) recorded as `running`, `finished` or `failed`."""
    now_ms = _now_ms()
    ended_ms = None if status == "running" else now_ms
    _leave(Entry(str(folder), TURN, status, folder.name, now_ms, ended_ms, _git_commit()))


def record_now(run: Run) -> tuple[MlflowClient, str]:
    """Record a run at once, for a stage that goes on to use its MLflow run.

    Returns:
        The client and the MLflow run id.
    """
    now_ms = _now_ms()
    names = {"turn": "FLOWLOOM_TURN", "join": "MLFLOW_RUN_ID", "step": "FLOWLOOM_STEP"}
    given = {field: os.environ.get(name) for field, name in names.items()}
    status = "finished" if run.done else "running"
    entry = Entry(
        dir=str(run.dir), stage=run.stage, status=status, started_ms=now_ms, ended_ms=now_ms,
        commit=_git_commit(), **given,
    )  # fmt: skip
    recorder = Recorder()
    with _draining():
        return recorder.client, recorder.record(entry)


def drain(recorder: Recorder | None = None) -> int:
    """Record every entry that waits.

    Returns:
        The number left over: of runs still going, and of those the tracker would not take.
    """
    recorder = recorder or Recorder()
    failures = 0
    with _draining():
        for path in sorted(spool_dir().glob("*.json")):
            try:
                recorder.take(path)
            except Exception as error:
                # Whatever the tracker throws, the entry stays and the stages go on.
                print(f"[tracking] {path.name} stays: {_one_line(error)}", file=sys.stderr)
                # A folder that cannot be read says nothing about the tracker.
                failures += not isinstance(error, (KeyError, TypeError, ValueError))
                if failures == MAX_FAILURES:
                    break
        return len(list(spool_dir().glob("*.json")))


def follow(every_s: float = 2.0) -> None:
    """Record entries as they appear until standard input closes, then what is left."""
    import select

    _be_quiet()
    spool_dir().mkdir(parents=True, exist_ok=True)
    with (spool_dir() / "follower.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pause_s, recorder = every_s, Recorder()
        while True:
            ready, _, _ = select.select([sys.stdin], [], [], pause_s)
            closing = bool(ready) and not sys.stdin.read(1)
            started_s = time.monotonic()
            left = drain(recorder)
            if closing:
                if left:
                    print(f"[tracking] {left} runs wait in {spool_dir()}", file=sys.stderr)
                return
            # A slow or absent tracker is asked less often.
            pause_s = min(30.0, max(every_s, 3 * (time.monotonic() - started_s)))


class Recorder:
    """Writes spool entries to MLflow. Client calls only: no run becomes the process's active one.

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

    def take(self, path: Path) -> None:
        """Record the entry at `path`, and remove it if its run has ended."""
        text = path.read_text()
        entry = Entry(**json.loads(text))
        if not Path(entry.dir).is_dir():
            print(f"[tracking] {path.name}: {entry.dir} is gone", file=sys.stderr)
            path.unlink()
            return
        if entry.status == "running" and not _alive(entry):
            entry = dataclasses.replace(entry, status="killed", ended_ms=_now_ms())
        if entry.status == "running":
            metrics = Path(entry.dir) / "metrics.jsonl"
            state = text, metrics.stat().st_size if metrics.is_file() else 0
            if self._shown.get(path) != state:
                self.record(entry)
                self._shown[path] = state
            return
        self.record(entry)
        if entry.status in ("finished", "reused") and entry.stage != TURN:
            entry.note()
        # The same run may have been started again meanwhile: then its new entry stays.
        if path.read_text() == text:
            path.unlink()

    def record(self, entry: Entry) -> str:
        """Bring the MLflow run of `entry` up to date.

        Returns:
            Its MLflow run id.
        """
        folder = Path(entry.dir)
        if entry.stage == TURN:
            return self._record_turn(entry, folder)
        identity = json.loads((folder / "config.json").read_text())
        tags = self._tags(entry, folder, identity)
        run_id = entry.join or self._child(entry, folder.name)
        known = self.client.get_run(run_id).data
        if "flowloom.stage" not in known.tags:
            self._log_params(run_id, identity["config"])
        first = int(known.tags.get("flowloom.lines", 0))
        lines = self._log_metrics(run_id, folder, first, final="flowloom.final" not in known.tags)
        tags["flowloom.lines"] = str(lines)
        if (folder / "result.json").is_file():
            tags["flowloom.final"] = "true"
        self._log_tags(run_id, {k: v for k, v in tags.items() if known.tags.get(k) != v})
        if entry.status != "running":
            self._log_files(run_id, folder)
        if not entry.join:  # the engine that made the run also closes it
            self._set_status(run_id, entry)
        return run_id

    def turn_run(self, turn: str) -> str:
        """The MLflow run of a turn, made if needed."""
        experiment_id = experiment(self.client)
        found = self.client.search_runs(
            [experiment_id], f"tags.`flowloom.kind` = 'turn' and tags.`flowloom.turn` = '{turn}'"
        )
        if found:
            return found[0].info.run_id
        tags = {"flowloom.kind": "turn", "flowloom.turn": turn}
        return self.client.create_run(experiment_id, tags=tags, run_name=f"turn {turn}").info.run_id

    def _record_turn(self, entry: Entry, folder: Path) -> str:
        run_id = self.turn_run(str(entry.turn))
        record = json.loads((folder / "turn.json").read_text())
        frozen = {name: record[name] for name in record if name not in _CHANGING_TURN_FIELDS}
        known = self.client.get_run(run_id).data
        self._log_params(run_id, {k: v for k, v in frozen.items() if k not in known.params})
        tags = {"flowloom.status": entry.status}
        outcome = record.get("outcome", {})
        tags |= {f"flowloom.{k}": str(outcome[k]) for k in ("step", "error") if outcome.get(k)}
        if entry.commit:
            tags["mlflow.source.git.commit"] = entry.commit
        self._log_tags(run_id, tags)
        self.client.log_artifact(run_id, str(folder / "turn.json"))
        self._set_status(run_id, entry)
        return run_id

    def _set_status(self, run_id: str, entry: Entry) -> None:
        if entry.status == "running":
            self.client.update_run(run_id, status="RUNNING")
        else:
            status = _MLFLOW_STATUS[entry.status]
            self.client.set_terminated(run_id, status, end_time=entry.ended_ms)

    def _child(self, entry: Entry, key: str) -> str:
        experiment_id = experiment(self.client)
        turn = entry.turn or "none"
        query = f"tags.`flowloom.key` = '{key}' and tags.`flowloom.turn` = '{turn}'"
        found = self.client.search_runs(
            [experiment_id], f"{query} and tags.`flowloom.kind` = 'stage'"
        )
        if found:
            return found[0].info.run_id
        tags = {"flowloom.kind": "stage", "flowloom.turn": turn, "flowloom.key": key}
        if entry.turn:
            tags["mlflow.parentRunId"] = self.turn_run(entry.turn)
        return self.client.create_run(
            experiment_id,
            start_time=entry.started_ms,
            tags=tags,
            run_name=entry.step or entry.stage,
        ).info.run_id

    def _tags(self, entry: Entry, folder: Path, identity: Mapping[str, Any]) -> dict[str, str]:
        tags = {
            "flowloom.stage": entry.stage,
            "flowloom.key": folder.name,
            "flowloom.code": identity["code"],
            "flowloom.data": identity["data"] or "untracked",
            "flowloom.run_dir": str(folder),
            "flowloom.reused": str(entry.status == "reused").lower(),
        }
        for name, digest in identity["inputs"].items():
            tags[f"flowloom.input.{name}"] = str(digest)
        if entry.commit:
            tags["mlflow.source.git.commit"] = entry.commit
        catalogue = _catalogue_hash(folder, identity["inputs"].get("catalogue"))
        if catalogue:
            tags["flowloom.catalogue"] = catalogue
        if os.environ.get("FLOWLOOM_IMAGE"):
            tags["flowloom.image"] = os.environ["FLOWLOOM_IMAGE"]
        pointer = folder / "pointer.json"
        if pointer.is_file():
            tags["flowloom.artifact"] = json.dumps(json.loads(pointer.read_text()), sort_keys=True)
        if entry.error:
            tags["flowloom.error"] = entry.error
        if entry.status in ("failed", "killed") and (folder / "log.txt").is_file():
            last = (folder / "log.txt").read_text().splitlines()[-LOG_TAIL_LINES:]
            tags["flowloom.log_tail"] = "\n".join(last)
        return {key: value[-MAX_TEXT:] for key, value in tags.items()}

    def _log_params(self, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:MAX_TEXT]) for key, value in flatten(config).items()]
        for start in range(0, len(params), MAX_BATCH):
            self.client.log_batch(run_id, params=params[start : start + MAX_BATCH])

    def _log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        batch = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(batch), MAX_BATCH):
            self.client.log_batch(run_id, tags=batch[start : start + MAX_BATCH])

    def _log_metrics(self, run_id: str, folder: Path, first: int, final: bool) -> int:
        """Log the lines of `metrics.jsonl` from number `first` on; returns the number of lines."""
        from mlflow.entities import Metric

        path = folder / "metrics.jsonl"
        # A last line without its newline is still being written.
        text = path.read_text() if path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        now_ms, step = _now_ms(), 0
        metrics = []
        for number, line in enumerate(lines):
            row = json.loads(line)
            step = max(step, int(row.pop("step")))
            if number >= first:
                at = int(json.loads(line)["step"])
                metrics += [Metric(name, float(value), now_ms, at) for name, value in row.items()]
        if final and (folder / "result.json").is_file():
            values = dict(json.loads((folder / "result.json").read_text())["metrics"])
            timing = folder / "timing.json"
            if timing.is_file():
                values["time/stage_s"] = json.loads(timing.read_text())["seconds"]
            metrics += [Metric(name, float(value), now_ms, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])
        return len(lines)

    def _log_files(self, run_id: str, folder: Path) -> None:
        for name in ("config.json", "log.txt", "pointer.json"):
            if (folder / name).is_file():
                self.client.log_artifact(run_id, str(folder / name))


def connect() -> MlflowClient:
    """A client of the tracker and registry in use; a server that is down is not waited for."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    _be_quiet()
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment(client: MlflowClient) -> str:
    """Id of the experiment all runs are in, made if needed."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # A server decides itself where artifacts go.
        local = tracking_uri().startswith("sqlite:")
        root = (home() / "mlartifacts").as_uri() if local else None
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=root)
        except MlflowException:
            # Another process made it meanwhile; if not, the next line says what is wrong.
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return found.experiment_id


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as MLflow parameters: `{"data.batch_size": "16"}`."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _catalogue_hash(folder: Path, digest: str | None) -> str | None:
    """Hash of the catalogue that a run wrote or read, where it is on this machine."""
    from flowloom.workflow.catalogue import Catalogue

    made = [folder]
    if digest:
        # The artifact that was read is known by its digest: look for the run that wrote it.
        results = home().glob("runs/publish_generator/*/result.json")
        made += [p.parent for p in results if json.loads(p.read_text())["digest"] == digest]
    for run_dir in made:
        path = run_dir / "out" / "catalogue.json.gz"
        if path.is_file():
            return Catalogue.load(path).hash
    return None


def _read_notes(folder: Path) -> list[str]:
    path = folder / "recorded.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _leave(entry: Entry) -> None:
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(entry.path, dataclasses.asdict(entry))


@contextmanager
def _draining() -> Iterator[None]:
    """One process at a time looks for an MLflow run and makes it if there is none."""
    spool_dir().mkdir(parents=True, exist_ok=True)
    with (spool_dir() / "drain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _drain_unless_followed() -> None:
    if os.environ.get("FLOWLOOM_TRACKING") != "spool":
        drain()


def _alive(entry: Entry) -> bool:
    """Whether some process holds the run folder, as `runs.exclusive` does."""
    with (Path(entry.dir) / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _git_commit() -> str | None:
    given = os.environ.get("FLOWLOOM_COMMIT")
    if given:
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _be_quiet() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    if sys.argv[1:] != ["--follow"]:
        sys.exit("usage: python -m flowloom.lifecycle.tracking --follow")
    follow()
