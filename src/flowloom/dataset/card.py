"""Dataset cards: what a folder of shards holds, for programs (`card.json`) and people (`card.md`).

A card is a function of rows, configuration and catalogue alone: no time, no path, no process count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from flowloom.config import to_dict
from flowloom.runs import file_md5, write_json

CARD_JSON, CARD_MD = "card.json", "card.md"
_MODULUS = 1 << 256
_BAR = 40
_NO_ROWS_CHANGE = ("num_processes", "part", "workflows_file")


class ContentDigest:
    """Digest of a multiset of rows: the same for any order and any cut into shards.

    The sum of the rows' SHA-256 modulo 2^256, so digests of parts add up to that of the whole. It
    names content and finds accidents; it is no defence against forged rows.
    """

    def __init__(self) -> None:
        self._sum = 0
        self.num_rows = 0

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add rows given as columns of plain values; names count, their order does not."""
        names = sorted(columns)
        for values in zip(*(columns[name] for name in names), strict=True):
            row = json.dumps(dict(zip(names, values, strict=True)), separators=(",", ":"))
            self._sum += int.from_bytes(hashlib.sha256(row.encode()).digest(), "big")
            self.num_rows += 1

    def merge(self, other: ContentDigest) -> None:
        """Add the rows of another digest."""
        self._sum += other._sum
        self.num_rows += other.num_rows

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return f"{self._sum % _MODULUS:064x}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a dataset."""

    title: str
    """Name of the dataset."""
    summary: str
    """What a row is and how to read it, in a few sentences."""
    catalogue: str
    """Hash of the catalogue that the workflows are written for."""
    config: Mapping[str, Any]
    """The configuration, without what changes no row."""
    files: Sequence[Mapping[str, Any]]
    """A row of `describe_files` per shard."""
    content: str
    """`ContentDigest` of all rows."""
    counts: Mapping[str, Mapping[str, int]]
    """Rows by value of a column, by column."""
    histograms: Mapping[str, Mapping[str, Sequence[float]]]
    """`histogram` of a quantity, by its name."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further facts; they stand beside the fields in `card.json`."""

    def to_json(self) -> dict[str, Any]:
        """The content of `card.json`."""
        fields = dataclasses.asdict(self)
        extra = fields.pop("extra")
        num_rows = sum(row["rows"] for row in self.files)
        return {**extra, **fields, "rows": num_rows}

    def write(self, folder: Path) -> None:
        """Write both files into a folder."""
        write_json(folder / CARD_JSON, self.to_json())
        (folder / CARD_MD).write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """The content of `card.md`."""
        num_rows = sum(row["rows"] for row in self.files)
        num_bytes = sum(row["bytes"] for row in self.files)
        parts = [
            f"# {self.title}",
            self.summary,
            _table(
                ["", ""],
                [
                    ["rows", f"{num_rows:,}"],
                    ["shards", f"{len(self.files):,}"],
                    ["bytes", f"{num_bytes:,}"],
                    ["content digest", f"`{self.content}`"],
                    ["catalogue", f"`{self.catalogue}`"],
                ],
            ),
        ]
        for column, counts in self.counts.items():
            rows = [[str(value), f"{count:,}"] for value, count in counts.items()]
            parts += [f"## Rows by {column}", _table([column, "rows"], rows)]
        for name, bins in self.histograms.items():
            parts += [f"## Histogram of {name}", _bars(bins)]
        if self.extra:
            parts += ["## Further facts", _fenced(self.extra)]
        parts += ["## Configuration", _fenced(self.config)]
        rows = [
            [row["file"], f"{row['rows']:,}", f"{row['bytes']:,}", f"`{row['md5']}`"]
            for row in self.files
        ]
        parts += ["## Files", _table(["file", "rows", "bytes", "md5"], rows)]
        return "\n\n".join(parts) + "\n"


def row_config(config: Any) -> dict[str, Any]:
    """A stage's configuration without what changes no row, and files by their content alone."""
    fields = to_dict(config)
    for name in _NO_ROWS_CHANGE:
        fields.pop(name, None)
    del fields["prompts"]["prompts_file"]
    return fields


def read_card(folder: Path) -> dict[str, Any]:
    """The content of a dataset's `card.json`.

    Raises:
        ValueError: There is none.
    """
    path = folder / CARD_JSON
    if not path.is_file():
        raise ValueError(f"card: got no {str(path)!r}, expected the folder of a dataset stage")
    return json.loads(path.read_text())


def describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """`{"file", "rows", "bytes", "md5"}` of each Parquet file, in the order given."""
    return [
        {
            "file": path.name,
            "rows": parquet.read_metadata(path).num_rows,
            "bytes": path.stat().st_size,
            "md5": file_md5(path),
        }
        for path in paths
    ]


def count_values(values: Iterable[Any]) -> dict[str, int]:
    """Rows by value, sorted by value."""
    return sorted_counts(Counter(str(value) for value in values))


def sorted_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of their values."""
    return {value: counts[value] for value in sorted(counts)}


def histogram(values: Sequence[float] | np.ndarray, edges: Sequence[float]) -> dict[str, list]:
    """Rows between edges: `from` (lower edge of each bin) and `rows`; the last edge is inside.

    Raises:
        ValueError: A value lies outside the edges, so that the bins would not add up.
    """
    values = np.asarray(values)
    inside = (values >= edges[0]) & (values <= edges[-1])
    if not inside.all():
        got = values[~inside][0]
        raise ValueError(f"histogram: got {got}, expected {edges[0]} to {edges[-1]}")
    counts = np.histogram(values, edges)[0]
    return {"from": list(edges[:-1]), "rows": counts.tolist()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bars(bins: Mapping[str, Sequence[float]]) -> str:
    most = max(max(bins["rows"], default=0), 1)
    lines = [
        f"{low:>10g}  {int(count):>10,}  {'#' * round(_BAR * count / most)}".rstrip()
        for low, count in zip(bins["from"], bins["rows"], strict=True)
    ]
    return "\n".join(["```", *lines, "```"])


def _fenced(value: Mapping[str, Any]) -> str:
    return "\n".join(["```json", json.dumps(value, indent=1, sort_keys=True), "```"])
