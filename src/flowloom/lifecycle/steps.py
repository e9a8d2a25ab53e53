"""What every component does with a stage's result: hand artifact, metrics and summary on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flowloom.runs import StageResult, home, write_json

MAX_ROWS = 30
"""Metrics in the summary of a step."""
NOTHING = "nothing"
"""File that makes the folder it is in no artifact at all. An engine passes every artifact or none,
whatever a step found; and an empty folder would not do, for object stores keep none."""


class Artifact(Protocol):
    """The part of a pipeline engine's output artifact that is used here."""

    uri: str
    path: str
    metadata: dict[str, Any]


class Folder(Protocol):
    """The part of a pipeline engine's input artifact that is used here."""

    path: str


class Metrics(Protocol):
    """The part of a pipeline engine's metrics artifact that is used here."""

    def log_metric(self, metric: str, value: float) -> None:
        """Record a final metric."""


def folders(**artifacts: Folder | Sequence[Folder] | None) -> dict[str, Any]:
    """Input name to the folder (or list of folders) that its artifact is, for `stages.run`.

    Left out is an optional input that was not given (None), or of which there is nothing to give.
    """
    return {
        name: [Path(item.path) for item in artifact]
        if isinstance(artifact, Sequence)
        else Path(artifact.path)
        for name, artifact in artifacts.items()
        if artifact is not None and not _is_nothing(artifact)
    }


def _is_nothing(artifact: Folder | Sequence[Folder]) -> bool:
    return not isinstance(artifact, Sequence) and (Path(artifact.path) / NOTHING).is_file()


def hand_over(
    result: StageResult,
    artifact: Artifact,
    metrics: Metrics | None = None,
    summary: Folder | None = None,
    file: str | None = None,
) -> None:
    """Make `artifact` the stage's artifact; log its final metrics, and write them for a person.

    On one machine the artifact points to the run folder; where the engine stores artifacts itself
    (its address has a scheme such as `s3://`) the folder is copied to where the engine takes it.

    Args:
        result: What the stage left.
        artifact: The component's output artifact.
        metrics: The component's metrics artifact, if it has one.
        summary: The component's Markdown artifact, if it has one.
        file: The one file of the folder that the artifact is, if it is a file.
    """
    _point(artifact, result.out_dir / file if file else result.out_dir, result.digest)
    if metrics is not None:
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
    if summary is not None:
        Path(summary.path).parent.mkdir(parents=True, exist_ok=True)
        Path(summary.path).write_text(markdown(result))
    _leave_record(result)


def hand_on(artifact: Artifact, recalled: Mapping[str, str], part: str) -> None:
    """Make `artifact` what an earlier turn left, or nothing.

    Args:
        artifact: The component's output artifact.
        recalled: Digests by part (`recall.find`); empty where there was no such turn.
        part: Which of them.
    """
    from flowloom.lifecycle import recall

    if recalled:
        _point(artifact, recall.bring(recalled[part]), recalled[part])
    else:
        Path(artifact.path).mkdir(parents=True, exist_ok=True)
        (Path(artifact.path) / NOTHING).touch()


def _point(artifact: Artifact, source: Path, digest: str) -> None:
    if "://" not in artifact.uri:
        artifact.uri = str(source)
    elif source.is_file():
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, artifact.path)
    else:
        shutil.copytree(source, artifact.path, dirs_exist_ok=True)
    artifact.metadata["digest"] = digest


def markdown(result: StageResult) -> str:
    """A stage's result for a person: final metrics, digest, and key of its run folder."""
    metrics = sorted(result.metrics.items())
    rows = [f"| `{name}` | {value:.6g} |" for name, value in metrics[:MAX_ROWS]]
    table = "\n".join(["| metric | value |", "|---|---:|", *rows])
    left = len(metrics) - MAX_ROWS
    more = f"{left} more in the step's metrics.\n\n" if left > 0 else ""
    run = f"{result.stage}/{result.out_dir.parent.name}"
    return f"## {result.stage}\n\n{table}\n\n{more}Digest `{result.digest}`, run `{run}`\n"


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
