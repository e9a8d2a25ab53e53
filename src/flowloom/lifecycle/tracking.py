"""Record runs in MLflow: a parent run per turn, a child run per stage.

A run folder already holds all there is to record. So a stage only leaves an entry in the spool
(`lifecycle.spool`), and whoever has MLflow imported records it (`lifecycle.recorder`):

- `FLOWLOOM_TRACKING=spool` (set by the local pipeline runner): a follower process,
  `python -m flowloom.lifecycle.tracking --follow`, imports MLflow once for all stages of the turn
  and records entries as they appear, until its standard input closes.
- otherwise (a stage run alone, a task on a cluster) the stage records its entry itself at its end.

A tracking server that is down loses nothing and stops no stage: what waits is recorded by the next
stage or turn, or by `python -m flowloom.lifecycle.tracking --drain`. A pipeline engine that hands
over a run (`MLFLOW_RUN_ID`) has it joined: by the task it was made for, or by the turn where one
process runs all of it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flowloom.lifecycle import spool, versioning
from flowloom.lifecycle.mlflow_tree import EXPERIMENT, be_quiet, connect, experiment
from flowloom.lifecycle.recorder import Recorder
from flowloom.lifecycle.run_facts import MAX_TEXT, flatten
from flowloom.lifecycle.spool import TURN, Entry, now_ms, spool_dir, tracking_uri
from flowloom.runs import Run, is_follower

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "EXPERIMENT",
    "MAX_TEXT",
    "Entry",
    "Recorder",
    "connect",
    "drain",
    "experiment",
    "flatten",
    "follow",
    "leave_turn",
    "record_now",
    "recorded",
    "reused",
    "spool_dir",
    "tracking_uri",
]


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Have what happens inside recorded as a run of its stage, failures too.

    Of processes that work together (torchrun) only the first one records.
    """
    if is_follower():
        yield
        return
    entry = _entry(run, "running")
    entry.leave()
    try:
        yield
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        dataclasses.replace(entry, status="failed", ended_ms=now_ms(), error=text).leave()
        _drain_unless_followed()
        raise
    dataclasses.replace(entry, status="finished", ended_ms=now_ms()).leave()
    _drain_unless_followed()


def reused(run: Run) -> None:
    """Link a run that was finished before to the turn, or the engine's run, that now uses it.

    Also publishes its artifact if the process died between finishing and publishing.
    """
    if is_follower():
        return
    if not (run.dir / "pointer.json").is_file():
        versioning.publish(run.dir / "out")
    entry = dataclasses.replace(_entry(run, "reused"), ended_ms=now_ms())
    if entry.turn is None and entry.join is None:
        return
    if entry.path.is_file():
        before, _ = spool.read(entry.path)
        if before.status in ("finished", "reused"):
            return
        # Its process died, or could not publish, after the stage itself had finished.
        entry = dataclasses.replace(before, status="finished", ended_ms=now_ms(), error=None)
    elif entry.noted:
        return
    entry.leave()
    _drain_unless_followed()


def leave_turn(folder: Path, status: str) -> None:
    """Have a turn (its folder) recorded as `running`, `finished` or `failed`."""
    at_ms = now_ms()
    given = os.environ.get("MLFLOW_RUN_ID")
    by_task = spool.named_by_engine(folder.name)
    Entry(
        dir=str(folder),
        stage=TURN,
        status=status,
        turn=folder.name,
        started_ms=at_ms,
        ended_ms=None if status == "running" else at_ms,
        commit=spool.git_commit(),
        join=given if by_task else None,
        parent=None if by_task else given,
    ).leave()


def record_now(run: Run) -> tuple[MlflowClient, str]:
    """Record a run at once, for a stage that goes on to use its MLflow run.

    Returns:
        The client and the MLflow run id.
    """
    entry = _entry(run, "finished" if run.done else "running")
    recorder = Recorder()
    with spool.draining():
        run_id = recorder.record(dataclasses.replace(entry, ended_ms=entry.started_ms))
    return recorder.client, run_id


def drain(recorder: Recorder | None = None) -> int:
    """Record every entry that waits.

    Returns:
        The number left over: of runs still going, and of those the tracker would not take.
    """
    return (recorder or Recorder()).drain()


def follow(every_s: float = 2.0) -> None:
    """Record entries as they appear until standard input closes, then what is left."""
    import select

    be_quiet()
    pause_s, recorder = every_s, Recorder()
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], pause_s)
        closing = bool(ready) and not sys.stdin.read(1)
        started_s = time.monotonic()
        left = drain(recorder)
        if closing:
            if left:
                _say_what_waits(left)
            return
        # A slow or absent tracker is asked less often.
        pause_s = min(30.0, max(every_s, 3 * (time.monotonic() - started_s)))


def _entry(run: Run, status: str) -> Entry:
    return Entry(
        dir=str(run.dir),
        stage=run.stage,
        status=status,
        started_ms=now_ms(),
        **spool.of_environment(),
    )


def _drain_unless_followed() -> None:
    if not spool.followed():
        drain()


def _say_what_waits(left: int) -> None:
    again = "`python -m flowloom.lifecycle.tracking --drain` records them"
    print(f"[tracking] {left} runs wait in {spool_dir()}: {again}", file=sys.stderr)


def _main(arguments: list[str]) -> None:
    if arguments == ["--follow"]:
        follow()
    elif arguments == ["--drain"]:
        left = drain()
        if left:
            _say_what_waits(left)
            sys.exit(1)
    else:
        sys.exit("usage: python -m flowloom.lifecycle.tracking --follow | --drain")


if __name__ == "__main__":
    _main(sys.argv[1:])
