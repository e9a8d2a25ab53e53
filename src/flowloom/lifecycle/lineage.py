"""Where an artifact comes from: from a model version down to data, code and commit.

Every artifact is a digest, and the run that made it names the digests it read. An artifact that no
run made, or several did, is said to be so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flowloom.lifecycle.records import Record, Records

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
    done: dict[str, Artifact] = {}
    # A loop, not a recursion: turn upon turn, a lineage grows long.
    waiting = [(digest, True, False) for digest in reversed(digests)]
    opened: dict[str, Artifact] = {}
    while waiting:
        digest, followed, closing = waiting.pop()
        if closing:
            done[digest] = opened[digest]
            continue
        known = opened.get(digest)
        if known and (known.followed or not followed):
            continue
        done.pop(digest, None)  # known as an opponent, and now part of the lineage itself
        makers = records.by_digest(digest)
        chosen = (first or {}).get(digest)
        if chosen:
            makers = (chosen, *(record for record in makers if record.key != chosen.key))
        opened[digest] = Artifact(digest=digest, makers=makers, followed=followed)
        waiting.append((digest, followed, True))
        read = [maker.artifacts for maker in makers] if every and followed else []
        for read_from in reversed(read or [opened[digest].inputs]):
            for name, inputs in reversed(list(read_from.items())):
                waiting += [(item, name != OPPONENT, False) for item in reversed(inputs)]
    return Lineage(roots=tuple(digests), artifacts=done)


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
