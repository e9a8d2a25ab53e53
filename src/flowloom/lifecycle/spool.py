"""The spool: on disk, what is still to be recorded in MLflow.

A run folder already holds all there is to record. So a stage only leaves an *entry* (a JSON file in
`<home>/spool`) naming its folder, which takes a millisecond and needs no tracker. An entry stays
until it is recorded.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowloom.runs import home, write_json

TURN = "turn"
"""What stands for the stage in the entry of a turn."""
_NOTES = "recorded.json"


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
    parent: str | None = None
    """MLflow run that stands for the turn, if one was handed to the process that runs it whole."""
    step: str | None = None
    """The pipeline's step that it is, if any: a turn runs some stages more than once."""

    @property
    def path(self) -> Path:
        """Where the entry lies."""
        return spool_dir() / f"{self.turn or 'alone'}-{self.stage}-{Path(self.dir).name}.json"

    @property
    def by_engine(self) -> bool:
        """Whether it belongs to a turn that a pipeline engine runs."""
        return self.turn is not None and named_by_engine(self.turn)

    @property
    def noted(self) -> bool:
        """Whether the run, finished, was recorded for this turn before."""
        return self._note in _read_notes(Path(self.dir))

    @property
    def _note(self) -> str:
        into = f" as {self.join}" if self.join else ""
        return f"turn {self.turn} in {tracking_uri()}{into}"

    def note(self) -> None:
        """Remember, in the run folder, that it was recorded for this turn."""
        notes = _read_notes(Path(self.dir))
        if self._note not in notes:
            write_json(Path(self.dir) / _NOTES, [*notes, self._note])

    def leave(self) -> None:
        """Put the entry into the spool, in place of what an earlier attempt left there."""
        with _writing():
            write_json(self.path, dataclasses.asdict(self))

    def alive(self) -> bool:
        """Whether some process holds the run folder, as `runs.exclusive` does."""
        with (Path(self.dir) / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def read(path: Path) -> tuple[Entry, str]:
    """The entry at `path`, and its text."""
    text = path.read_text()
    return Entry(**json.loads(text)), text


def remove(path: Path, text: str) -> None:
    """Remove an entry that was recorded, unless its run was started again meanwhile."""
    with _writing():
        if path.is_file() and path.read_text() == text:
            path.unlink()


def waiting() -> list[Path]:
    """The entries that wait."""
    return sorted(spool_dir().glob("*.json"))


def spool_dir() -> Path:
    """The folder of entries waiting to be recorded."""
    return home() / "spool"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else the SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def followed() -> bool:
    """Whether another process records what the stages leave."""
    return os.environ.get("FLOWLOOM_TRACKING") == "spool"


def of_environment() -> dict[str, Any]:
    """The fields of an entry that the process's surroundings decide."""
    given = os.environ.get("MLFLOW_RUN_ID")
    return {
        "turn": os.environ.get("FLOWLOOM_TURN"),
        "step": os.environ.get("FLOWLOOM_STEP"),
        "commit": git_commit(),
        # One process that runs all steps of a turn was handed one run: that of the turn.
        "join": None if followed() else given,
        "parent": given if followed() else None,
    }


def scope(turn: str | None) -> str:
    """What tells this turn, or a stage run alone, from one of the same name of somebody else.

    Several people may share a tracker, and each has a turn 0001.
    """
    if turn is not None and named_by_engine(turn):
        return ""
    path = home() / "tracking.id"
    if not path.is_file():
        with _writing():
            if not path.is_file():
                partial = path.with_name(path.name + ".partial")
                partial.write_text(secrets.token_hex(8))
                os.replace(partial, path)
    return path.read_text()


def named_by_engine(turn: str) -> bool:
    """Whether a pipeline engine named a turn, which gives no name twice; else it is a number."""
    return not turn.isdigit()


@contextmanager
def draining() -> Iterator[None]:
    """One process at a time looks for an MLflow run and makes it if there is none."""
    with _locked("drain.lock"):
        yield


def git_commit() -> str | None:
    """`FLOWLOOM_COMMIT`, else that of the checkout around the working folder, if any."""
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


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@contextmanager
def _writing() -> Iterator[None]:
    """Held for the moment of a write, never while a tracker is asked: no stage waits for one."""
    with _locked("write.lock"):
        yield


@contextmanager
def _locked(name: str) -> Iterator[None]:
    spool_dir().mkdir(parents=True, exist_ok=True)
    with (spool_dir() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_notes(folder: Path) -> list[str]:
    path = folder / _NOTES
    return json.loads(path.read_text()) if path.is_file() else []
