"""The rows of a dataset of triplets, one per render, and its card."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowloom.dataset.card import (
    Card,
    ContentDigest,
    count_values,
    describe_files,
    histogram,
    row_config,
)
from flowloom.dataset.cells import Cell
from flowloom.dataset.config import BuildTripletsConfig
from flowloom.dataset.shards import Scores
from flowloom.dataset.splits import TRAIN
from flowloom.dataset.tables import write_table

_CELL = (
    ("cell", pa.int32()),
    ("prompt", pa.string()),
    ("kind", pa.string()),
    ("workflow", pa.string()),
    ("fingerprint", pa.string()),
    ("seed", pa.int64()),
)
_LAST = (("split", pa.string()), ("origin", pa.string()))
_BINS = 10
_NUM_BEST = 8


def shard_schema(terms: Sequence[str]) -> pa.Schema:
    """Columns that rendering gives: score, the terms of the rubric by name, counted cost."""
    floats = [(name, pa.float32()) for name in ("score", *terms)]
    return pa.schema([*floats, ("flops", pa.int64())])


def schema(terms: Sequence[str]) -> pa.Schema:
    """Columns of the dataset for a rubric with these terms.

    Raises:
        ValueError: A term has the name of another column.
    """
    fields = [*_CELL, *shard_schema(terms), *_LAST]
    names = [field[0] if isinstance(field, tuple) else field.name for field in fields]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"rubric: got a term {twice[0]!r}, expected no name of another column")
    return pa.schema(fields)


class Rows:
    """Columns that grow round by round. A workflow on a prompt is one cell, whatever the round."""

    def __init__(self, terms: Sequence[str]):
        """Take the rubric's terms."""
        self.schema = schema(terms)
        self.columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        self._scored = shard_schema(terms).names
        self._cells: dict[tuple[str, str], int] = {}
        self._texts: dict[str, str] = {}

    @property
    def num_cells(self) -> int:
        """Different cells."""
        return len(self._cells)

    def keep(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Begin with the rows of an earlier dataset.

        Raises:
            ValueError: It has other columns: it was scored by another rubric.
        """
        if set(columns) != set(self.columns):
            raise ValueError(
                f"earlier: got columns {', '.join(columns)}, expected {', '.join(self.columns)}"
            )
        for name, values in columns.items():
            self.columns[name] += values
        cells = zip(columns["prompt"], columns["fingerprint"], columns["cell"], strict=True)
        self._cells.update({(prompt, name): cell for prompt, name, cell in cells})

    def add(self, cells: Sequence[Cell], scores: Scores) -> None:
        """Append a round: every seed of every cell, with the scores in that order."""
        for cell in cells:
            number = self._cells.setdefault((cell.spec.text, cell.fingerprint), len(self._cells))
            values = {
                "cell": number,
                "prompt": cell.spec.text,
                "kind": cell.spec.kind,
                "workflow": self._text(cell),
                "fingerprint": cell.fingerprint,
                "split": cell.split,
                "origin": cell.origin,
            }
            for name, value in values.items():
                self.columns[name] += [value] * len(cell.seeds)
            self.columns["seed"] += cell.seeds
        for name in self._scored:
            self.columns[name] += scores[name].tolist()

    def means(self, first: int = 0) -> dict[str, float]:
        """Mean score from a row on, by origin; of rows outside the train split by split."""
        values: dict[str, list[float]] = defaultdict(list)
        columns = [self.columns[name][first:] for name in ("split", "origin", "score")]
        for split, origin, score in zip(*columns, strict=True):
            values[origin if split == TRAIN else split].append(score)
        return {name: float(np.mean(found)) for name, found in sorted(values.items())}

    def of_split(self, split: str, names: Sequence[str]) -> dict[str, list[Any]]:
        """Some columns of the rows of one split."""
        kept = [row for row, value in enumerate(self.columns["split"]) if value == split]
        return {name: [self.columns[name][row] for row in kept] for name in names}

    def write(self, folder: Path, rows_per_file: int) -> list[Path]:
        """Write `triplets-00000-of-00001.parquet` and so on."""
        total = len(self.columns["cell"])
        num_files = -(-total // rows_per_file)
        paths = []
        for k in range(num_files):
            part = slice(k * rows_per_file, (k + 1) * rows_per_file)
            path = folder / f"triplets-{k:05d}-of-{num_files:05d}.parquet"
            columns = {name: values[part] for name, values in self.columns.items()}
            write_table(path, columns, self.schema)
            paths.append(path)
        return paths

    def _text(self, cell: Cell) -> str:
        text = self._texts.get(cell.fingerprint)
        if text is None:
            text = json.dumps(cell.workflow.to_api(), separators=(",", ":"))
            self._texts[cell.fingerprint] = text
        return text


def make_card(
    config: BuildTripletsConfig,
    rows: Rows,
    paths: Sequence[Path],
    catalogue: str,
    panel: Sequence[Mapping[str, Any]],
) -> Card:
    """The card of a dataset that was written to `paths`; `catalogue` is a hash."""
    columns = rows.columns
    content = ContentDigest()
    content.add(columns)
    return Card(
        title="triplets",
        summary=(
            "A row is one render: a prompt, a workflow (API JSON, a template with slots for text "
            "and seed), a seed, the score of the picture and what it is made of, and the counted "
            "cost (floating-point operations of the networks). A cell is a workflow on a prompt. "
            "Train on the split `train` alone: `calibration` has other prompts, "
            "`held_out_workflow` other workflows on train prompts."
        ),
        catalogue=catalogue,
        config=row_config(config),
        files=describe_files(paths),
        content=content.hexdigest(),
        counts={name: count_values(columns[name]) for name in ("split", "origin", "kind")},
        histograms={"score": histogram(columns["score"], (np.arange(_BINS + 1) / _BINS).tolist())},
        extra={
            "cells": rows.num_cells,
            "prompts": _different(columns, "prompt"),
            "workflows": _different(columns, "fingerprint"),
            "groups": _groups(columns),
            "flops": {
                "mean": float(np.mean(columns["flops"])),
                "max": max(columns["flops"]),
            },
            "best_fixed": [
                {**row, "mean": round(row["mean"], 4)}
                for row in (
                    {name: value for name, value in row.items() if name != "workflow"}
                    for row in panel[:_NUM_BEST]
                )
            ],
        },
    )


def _different(columns: Mapping[str, Sequence[Any]], name: str) -> dict[str, int]:
    """Different values by split."""
    found: dict[str, set] = defaultdict(set)
    for split, value in zip(columns["split"], columns[name], strict=True):
        found[split].add(value)
    return {split: len(values) for split, values in sorted(found.items())}


def _groups(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Renders and mean score by split, origin and kind."""
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    keys = zip(columns["split"], columns["origin"], columns["kind"], strict=True)
    for key, score in zip(keys, columns["score"], strict=True):
        scores[key].append(score)
    return [
        {
            "split": split,
            "origin": origin,
            "kind": kind,
            "renders": len(values),
            "mean": round(float(np.mean(values)), 4),
        }
        for (split, origin, kind), values in sorted(scores.items())
    ]
