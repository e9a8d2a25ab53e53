"""Where an artifact comes from: from a model version down to data, code and commit.

Every artifact is a digest, and the run that made it names the digests it read. An artifact that no
run made, or several did, is said to be so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flowloom.lifecycle.record import Record
from flowloom.lifecycle.records import Records

OPPONENT = "champion"
"""Input that is another model version: whom a candidate was compared with. Its own lineage is not
part of this one's; the artifact is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact in a lineage."""

    digest: str
    """Its digest."""
    makers: tuple[Record, ...]
    """The runs that made it; the first one is followed."""
    followed: bool = True
    """Whether what it was made from is part of this lineage."""

    @property
    def inputs(self) -> Mapping[str, tuple[str, ...]]:
        """Digests it was made from, by the input's name."""
        return self.makers[0].artifacts if self.makers and self.followed else {}

    @property
    def problem(self) -> str | None:
        """What is not as it should be, for a person."""
        if not self.makers:
            return "no recorded run made it"
        if len(self.makers) > 1:
            others = ", ".join(str(record) for record in self.makers[1:])
            return f"{len(self.makers)} runs made it, also {others}"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Everything that artifacts were made from."""

    roots: tuple[str, ...]
    """What was asked about."""
    artifacts: Mapping[str, Artifact]
    """By digest; what something was made from comes before it."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it, from the roots down."""
        records = [artifact.makers[0] for artifact in self.artifacts.values() if artifact.makers]
        return {
            "roots": list(self.roots),
            "artifacts": [_row(item) for item in reversed(list(self.artifacts.values()))],
            "data": sorted({record.data or "untracked" for record in records}),
            "code": sorted({record.code for record in records}),
            "commits": sorted({record.commit for record in records if record.commit}),
            "catalogues": sorted({record.catalogue for record in records if record.catalogue}),
            "problems": [
                f"{item.digest}: {item.problem}" for item in self.artifacts.values() if item.problem
            ],
        }


def trace(
    records: Records,
    digests: Sequence[str],
    first: Mapping[str, Record] | None = None,
    *,
    every: bool = False,
) -> Lineage:
    """The lineage of artifacts.

    Args:
        records: Where runs are looked up.
        digests: The artifacts.
        first: Runs to follow for artifacts that several made.
        every: Follow all runs that made an artifact instead of the first.
    """
    makers: dict[str, tuple[Record, ...]] = {}

    def read(digest: str) -> list[tuple[str, str]]:
        """Name and digest of what an artifact was made from."""
        if digest not in makers:
            makers[digest] = _makers(records, digest, (first or {}).get(digest))
        counted = makers[digest] if every else makers[digest][:1]
        inputs = [item for maker in counted for item in maker.artifacts.items()]
        return [(name, item) for name, digests in inputs for item in digests]

    # Loops, not recursions: turn upon turn, a lineage grows long.
    followed: set[str] = set()
    ahead = list(digests)
    while ahead:
        digest = ahead.pop()
        if digest not in followed:
            followed.add(digest)
            ahead += [item for name, item in read(digest) if name != OPPONENT]
    done: dict[str, Artifact] = {}
    opened: set[str] = set()
    waiting = [(digest, False) for digest in reversed(digests)]
    while waiting:
        digest, closing = waiting.pop()
        if closing:
            done[digest] = Artifact(
                digest=digest, makers=makers[digest], followed=digest in followed
            )
        elif digest not in opened:
            opened.add(digest)
            waiting.append((digest, True))
            below = read(digest)
            waiting += [(item, False) for _, item in reversed(below) if digest in followed]
    return Lineage(roots=tuple(digests), artifacts=done)


def _makers(records: Records, digest: str, chosen: Record | None) -> tuple[Record, ...]:
    """The runs that made an artifact, `chosen` in front."""
    makers = records.by_digest(digest)
    if chosen is None:
        return makers
    return (chosen, *(record for record in makers if record.key != chosen.key))


def _row(artifact: Artifact) -> dict[str, Any]:
    return {
        "digest": artifact.digest,
        "followed": artifact.followed,
        "made_by": [
            {
                "stage": record.stage,
                "key": record.key,
                "runs": list(record.run_ids),
                "folder": str(record.folder) if record.folder else None,
                "inputs": {name: list(values) for name, values in record.inputs.items()},
                "code": record.code,
                "data": record.data,
                "commit": record.commit,
                "catalogue": record.catalogue,
            }
            for record in artifact.makers
        ],
    }
