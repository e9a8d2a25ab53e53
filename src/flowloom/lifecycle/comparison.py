"""Two runs side by side: configuration, inputs, metrics and pictures."""

from __future__ import annotations

import base64
import dataclasses
import json
import mimetypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom.lifecycle import remotes
from flowloom.lifecycle.record import Record, Subject
from flowloom.lifecycle.records import Records, asked, entries_of
from flowloom.lifecycle.run_facts import flatten
from flowloom.lifecycle.surroundings import different

PICTURES = (".png", ".jpg", ".svg")
SECONDS = "time/"
"""Metrics that say how long it took: they differ between equal runs."""
Row = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A final metric of two runs."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """Second minus first, where both have it."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the same name in two artifacts."""

    name: str
    a: str | None
    """Digest in the first, if it has it."""
    b: str | None
    """Digest in the second."""

    @property
    def verdict(self) -> str:
        """Whether it is the same picture."""
        if self.a is None or self.b is None:
            return "in one alone"
        return "equal" if self.a == self.b else "differs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two runs have in common, and what not."""

    titles: tuple[str, str]
    """How to call them."""
    facts: tuple[Row, ...]
    """Stage, artifact, data, code, commit, catalogue."""
    config: tuple[Row, ...]
    """Fields that differ."""
    inputs: tuple[Row, ...]
    """Inputs that differ."""
    metrics: tuple[Metric, ...]
    """All final metrics of either."""
    pictures: tuple[Picture, ...]
    """All pictures of either."""
    records: tuple[Record, Record]
    """The runs whose pictures they are."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "runs": list(self.titles),
            "facts": _rows(self.facts),
            "config": _rows(self.config),
            "inputs": _rows(self.inputs),
            "metrics": {
                m.name: {"a": m.a, "b": m.b, "difference": m.difference} for m in self.metrics
            },
            "pictures": {p.name: {"a": p.a, "b": p.b, "verdict": p.verdict} for p in self.pictures},
        }


def compare(records: Records, a: Subject, b: Subject) -> Comparison:
    """Compare two runs, or the runs that two model versions come from.

    Of a model version, metrics and pictures are those of its evaluation.

    Raises:
        ValueError: One of them was made by no recorded run.
    """
    sides = (_record(a), _record(b))
    measured = (_measured(records, sides[0]), _measured(records, sides[1]))
    metrics = [_metrics(records, record) for record in measured]
    pictures = [_pictures(record) for record in measured]
    identities = [records.identity(record) for record in measured]
    configs = [flatten(identity["config"]) for identity in identities]
    inputs = [
        {name: ", ".join(values) for name, values in record.inputs.items()} for record in sides
    ]
    return Comparison(
        titles=(a.title, b.title),
        facts=tuple(
            (name, _fact(sides[0], name), _fact(sides[1], name))
            for name in ("stage", "digest", "data", "code", "commit", "catalogue")
        ),
        config=tuple(different(*configs)),
        inputs=tuple(different(*inputs)),
        metrics=tuple(
            Metric(name=name, a=metrics[0].get(name), b=metrics[1].get(name))
            for name in sorted(metrics[0].keys() | metrics[1].keys())
        ),
        pictures=tuple(
            Picture(name=name, a=pictures[0].get(name), b=pictures[1].get(name))
            for name in sorted(pictures[0].keys() | pictures[1].keys())
        ),
        records=measured,
    )


def page(found: Comparison) -> str:
    """The comparison as one HTML page, pictures in it."""
    from importlib.resources import files

    from jinja2 import Environment

    source = files("flowloom.lifecycle").joinpath("comparison.html.j2").read_text()
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    shown = [
        (
            picture,
            _embedded(found.records[0], picture.name, picture.a),
            _embedded(found.records[1], picture.name, picture.b),
        )
        for picture in found.pictures
    ]
    return template.render(found=found, pictures=shown)


def _fact(record: Record, name: str) -> str:
    return str(getattr(record, name) or "(none)")


def _record(subject: Subject) -> Record:
    if subject.record is None:
        raise ValueError(f"{subject.title}: no recorded run made it, expected one to compare")
    return subject.record


def _measured(records: Records, record: Record) -> Record:
    """The run that has metrics and pictures: of a registered model, its evaluation."""
    for digest in record.artifacts.get("evaluation", ()) if record.stage == "register" else ():
        makers = records.by_digest(digest)
        if makers:
            return makers[0]
    return record


def _metrics(records: Records, record: Record) -> dict[str, float]:
    if record.folder and (record.folder / "result.json").is_file():
        return dict(json.loads((record.folder / "result.json").read_text())["metrics"])
    if records.client is None or not record.run_ids:
        return {}
    with asked():
        found = records.client.get_run(record.run_ids[0]).data.metrics
    return {name: value for name, value in found.items() if not name.startswith(SECONDS)}


def _pictures(record: Record) -> dict[str, str]:
    """Digest by path of the pictures of an artifact."""
    entries = entries_of(record.digest, record) if record.digest else None
    return {name: md5 for name, md5 in (entries or {}).items() if Path(name).suffix in PICTURES}


def _embedded(record: Record, name: str, digest: str | None) -> str | None:
    """A picture as a data URL; `None` where the artifact has none or it cannot be had."""
    if digest is None:
        return None
    local = record.folder / "out" / name if record.folder else None
    if local and local.is_file():
        data = local.read_bytes()
    else:
        remote = remotes.find(record.pointer.remote if record.pointer else remotes.STORE)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "picture"
            if not remote.get(digest, target):
                return None
            data = target.read_bytes()
    kind = mimetypes.guess_type(name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _rows(rows: tuple[Row, ...]) -> Mapping[str, dict[str, str]]:
    return {name: {"a": a, "b": b} for name, a, b in rows}
