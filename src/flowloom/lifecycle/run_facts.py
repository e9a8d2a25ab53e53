"""What a run folder has to tell a tracker: parameters, tags, points of metrics, inputs, pictures.

Nothing here knows MLflow. Asked again, each gives the same, so that recording again is harmless.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.lifecycle import packages
from flowloom.lifecycle.spool import Entry, now_ms
from flowloom.runs import home, write_json

MAX_TEXT = 5000
"""Characters of a tag or parameter: MLflow's bounds are 8000 and 6000."""
LOG_TAIL_LINES = 30
MAX_PICTURES = 12
"""Pictures of one artifact: its grids and charts first, then examples."""
MAX_PICTURE_BYTES = 1 << 20
_PICTURES = (".png", ".svg", ".jpg")
_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of one metric."""

    name: str
    """Its name, `area/name`."""
    value: float
    """Its value."""
    ms: int
    """When it was first seen, in milliseconds since the epoch."""
    step: int
    """At which step."""


@dataclasses.dataclass(frozen=True)
class Input:
    """An artifact, or the data, that a run read."""

    name: str
    """Name of the input; those of a list are numbered (`members.0`)."""
    digest: str
    """Its digest, as DVC writes it."""
    pointer: Mapping[str, Any]
    """Its DVC pointer; the digest alone where the run that wrote it is on another machine."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What `metrics.jsonl` holds so far."""

    file_id: str
    """Tells this file from that of another attempt on another disk."""
    lines: int
    """Number of its lines that are whole."""
    points: Sequence[Sequence[Point]]
    """The points of each line; a step that a resumed run passed again is not there twice."""
    last_step: int
    """The highest step."""


def identity(folder: Path) -> dict[str, Any]:
    """What the run's key is made of: configuration, inputs, data and code."""
    return json.loads((folder / "config.json").read_text())


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as MLflow parameters: `{"data.batch_size": "16"}`."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def tags(entry: Entry, folder: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run; `known` is its identity."""
    found = {
        "flowloom.kind": "stage",
        "flowloom.stage": entry.stage,
        "flowloom.key": folder.name,
        "flowloom.turn": entry.turn or "none",
        "flowloom.code": known["code"],
        "flowloom.data": known["data"] or "untracked",
        "flowloom.run_dir": str(folder),
        "flowloom.reused": str(entry.status == "reused").lower(),
    }
    for name, digest in known["inputs"].items():
        found[f"flowloom.input.{name}"] = str(digest)
    if entry.commit:
        found["mlflow.source.git.commit"] = entry.commit
    if entry.status == "finished":
        found["flowloom.packages"] = json.dumps(packages.versions(), sort_keys=True)
    catalogue = _catalogue_hash(folder, known["inputs"].get("catalogue"))
    if catalogue:
        found["flowloom.catalogue"] = catalogue
    if os.environ.get("FLOWLOOM_IMAGE"):
        found["flowloom.image"] = os.environ["FLOWLOOM_IMAGE"]
    if (folder / "result.json").is_file():
        found["flowloom.digest"] = json.loads((folder / "result.json").read_text())["digest"]
    pointer = folder / "pointer.json"
    if pointer.is_file():
        found["flowloom.artifact"] = json.dumps(json.loads(pointer.read_text()), sort_keys=True)
    if entry.error:
        found["flowloom.error"] = entry.error
    if entry.status in ("failed", "killed") and (folder / "log.txt").is_file():
        last = (folder / "log.txt").read_text().splitlines()[-LOG_TAIL_LINES:]
        found["flowloom.log_tail"] = "\n".join(last)
    return {key: value[-MAX_TEXT:] for key, value in found.items()}


def metrics(folder: Path) -> Metrics:
    """The run's metrics over steps, each with the moment at which its line was first seen.

    The moments are kept in the folder (`metrics_ms.json`) before anybody hears of them: a point
    sent again, since the answer was lost, is the same point.
    """
    path = folder / "metrics.jsonl"
    # A last line without its newline is still being written.
    text = path.read_text() if path.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    noted = _note_lines(folder / "metrics_ms.json", len(lines))
    last: dict[str, int] = {}
    points: list[list[Point]] = []
    moments = iter(noted["seen"])
    end, ms = next(moments, (0, 0))
    for number, line in enumerate(lines):
        while number >= end:
            end, ms = next(moments)
        row = json.loads(line)
        step = int(row.pop("step"))
        fresh = [name for name in row if step > last.get(name, -1)]
        points.append([Point(name, float(row[name]), ms, step) for name in fresh])
        last |= dict.fromkeys(fresh, step)
    return Metrics(noted["id"], len(lines), points, max(last.values(), default=0))


def final_points(folder: Path, over_steps: Metrics) -> list[Point]:
    """The run's final metrics, once it has any: a point each, at its last step."""
    path = folder / "result.json"
    if not path.is_file():
        return []
    values = dict(json.loads(path.read_text())["metrics"])
    timing = folder / "timing.json"
    if timing.is_file():
        values["time/stage_s"] = json.loads(timing.read_text())["seconds"]
    step, ms = over_steps.last_step, path.stat().st_mtime_ns // 1_000_000
    there = {(p.name, p.step, p.value) for line in over_steps.points for p in line}
    points = [Point(name, float(value), ms, step) for name, value in values.items()]
    return [p for p in points if (p.name, p.step, p.value) not in there]


def inputs(known: Mapping[str, Any]) -> list[Input]:
    """The data and the artifacts that a run read; `known` is its identity."""
    digests: list[tuple[str, str]] = []
    for name, value in known["inputs"].items():
        parts = str(value).split(",")
        many = len(parts) > 1
        digests += [(f"{name}.{k}" if many else name, part) for k, part in enumerate(parts)]
    digests = [(name, digest) for name, digest in digests if _DIGEST.fullmatch(digest)]
    pointers = _pointers() if digests else {}
    found = [Input(name, digest, pointers.get(digest, {"md5": digest})) for name, digest in digests]
    if known["data"]:
        found.append(Input("data", known["data"], {"md5": known["data"], "path": "data"}))
    return found


def pictures(folder: Path) -> list[Path]:
    """A few small pictures of the artifact: grids and charts, then examples."""
    out = folder / "out"
    found = [*sorted(out.glob("*")), *sorted((out / "pictures").glob("*"))]
    small = [
        path
        for path in found
        if path.suffix in _PICTURES and path.is_file() and path.stat().st_size <= MAX_PICTURE_BYTES
    ]
    return small[:MAX_PICTURES]


def _note_lines(path: Path, lines: int) -> dict[str, Any]:
    """Note that the file of metrics has so many lines now; returns `{"id", "seen": [[n, ms]]}`."""
    if path.is_file():
        noted = json.loads(path.read_text())
    else:
        noted = {"id": secrets.token_hex(4), "seen": []}
    seen = noted["seen"]
    if not path.is_file() or (seen[-1][0] if seen else 0) < lines:
        if lines:
            seen.append([lines, now_ms()])
        write_json(path, noted)
    return noted


def _pointers() -> dict[str, dict[str, Any]]:
    """The pointers of the artifacts made on this machine, by digest."""
    found = [json.loads(path.read_text()) for path in home().glob("runs/*/*/pointer.json")]
    return {pointer["md5"]: pointer for pointer in found}


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
