"""What every component does with a stage's result: hand the artifact and the metrics on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from flowloom.runs import StageResult, home, write_json


class Artifact(Protocol):
    """The part of a pipeline engine's output artifact that is used here."""

    uri: str
    path: str
    metadata: dict[str, Any]


class Metrics(Protocol):
    """The part of a pipeline engine's metrics artifact that is used here."""

    def log_metric(self, metric: str, value: float) -> None:
        """Record a final metric."""


def hand_over(result: StageResult, artifact: Artifact, metrics: Metrics | None = None) -> None:
    """Make `artifact` the stage's artifact and log its final metrics.

    On one machine the artifact points to the run folder; where the engine stores artifacts itself
    (its address has a scheme such as `s3://`) the folder is copied to where the engine takes it.
    """
    if "://" in artifact.uri:
        shutil.copytree(result.out_dir, artifact.path, dirs_exist_ok=True)
    else:
        artifact.uri = str(result.out_dir)
    artifact.metadata["digest"] = result.digest
    if metrics is not None:
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
    _leave_record(result)


def _leave_record(result: StageResult) -> None:
    """Tell the turn, if the step belongs to one on this machine, what the step did."""
    turn = os.environ.get("FLOWLOOM_TURN")
    step = os.environ.get("FLOWLOOM_STEP", result.stage)
    folder = home() / "turns" / (turn or "") / "steps"
    if turn is None or not folder.is_dir():
        return
    run_dir = result.out_dir.parent
    record = {
        "step": step,
        "stage": result.stage,
        "key": run_dir.name,
        "out": str(result.out_dir),
        "digest": result.digest,
        "cached": result.cached,
        "stage_s": 0.0 if result.cached else _seconds(run_dir / "timing.json"),
        "metrics": result.metrics,
    }
    write_json(folder / f"{step}.json", record)


def _seconds(path: Path) -> float:
    return float(json.loads(path.read_text())["seconds"])
