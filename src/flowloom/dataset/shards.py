"""A round's renders in shards of fixed size, and the files that keep their scores.

A shard's file is called NAME.DIGEST.parquet, with a digest of its own bytes, and holds a digest of
what was rendered and how it was scored. So a file that was cut, changed or made for another plan is
noticed before a number of it is used; what a killed process left half written has another name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from flowloom.dataset.cells import Cell, Rendered
from flowloom.dataset.scoring import ScoredJob
from flowloom.render.engine import batch_key
from flowloom.workflow import Workflow

PART_FILE = "part.json"
_DIGITS = 16
_NAME = re.compile(rf"(round-\d+-\d{{5}})\.([0-9a-f]{{{_DIGITS}}})\.parquet")
_CONTENT = b"content"

Scores = dict[str, np.ndarray]
"""A column of values by name, one per render."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Renders that one worker makes at once, the unit of resuming."""

    name: str
    """Round and number."""
    number: int
    """Its number in the round; machine k of N renders those that leave k when divided by N."""
    places: np.ndarray
    """Which of the round's renders."""
    content: str
    """Digest of cells, seeds, catalogue and rubric."""


class Round:
    """The renders of a round, cut into shards.

    What steers the next round comes first, so that it is planned while the others are rendered.
    Within both parts renders whose samplers can share a batch lie together, and the shards that
    take longest come first, so that all workers end together.
    """

    def __init__(self, number: int, cells: Sequence[Cell], size: int, context: str):
        """Cut the cells' renders.

        Args:
            number: Of the round.
            cells: What to render, each with its seeds.
            size: Renders per shard.
            context: What else the scores depend on, such as catalogue and rubric.
        """
        self.number, self.cells = number, cells
        counts = [len(cell.seeds) for cell in cells]
        self._cell_of = np.repeat(np.arange(len(cells)), counts)
        self._first = np.cumsum([0, *counts])
        templates = {cell.fingerprint: cell.workflow for cell in cells}
        key_of = {name: batch_key(workflow) for name, workflow in templates.items()}
        work_of = {name: estimate_work(workflow) for name, workflow in templates.items()}
        keys = [key_of[cell.fingerprint] for cell in cells]
        work = [work_of[cell.fingerprint] for cell in cells]
        parts: list[list[int]] = [[], []]
        for place, c in enumerate(self._cell_of.tolist()):
            parts[not cells[c].steers].append(place)
        self.shards: list[Shard] = []
        self.num_steering = 0
        for part in parts:
            part.sort(key=lambda place: (keys[self._cell_of[place]], place))
            shards = []
            for first in range(0, len(part), size):
                places = np.array(part[first : first + size])
                at = len(self.shards) + len(shards)
                content = self._content(places, context)
                shards.append(Shard(f"round-{number}-{at:05d}", at, places, content))
            shards.sort(key=lambda s: -sum(work[self._cell_of[place]] for place in s.places))
            self.num_steering = self.num_steering or len(shards)
            self.shards += shards

    @property
    def num_renders(self) -> int:
        """Pictures of the round."""
        return len(self._cell_of)

    def jobs(self, shard: Shard) -> list[ScoredJob]:
        """The renders of a shard."""
        return [self._job(place) for place in shard.places.tolist()]

    def rendered(self, scores_R: np.ndarray) -> list[Rendered]:
        """Every cell with its scores, those that steer nothing without."""
        values = scores_R.tolist()
        return [
            Rendered(
                cell,
                tuple(values[self._first[c] : self._first[c + 1]]) if cell.steers else (),
            )
            for c, cell in enumerate(self.cells)
        ]

    def _seed(self, place: int) -> tuple[Cell, int]:
        c = self._cell_of[place]
        cell = self.cells[c]
        return cell, cell.seeds[place - self._first[c]]

    def _job(self, place: int) -> ScoredJob:
        cell, seed = self._seed(place)
        prompt = cell.spec.text
        name = f"cell {cell.origin} {cell.fingerprint[:12]} on {prompt!r}, seed {seed}"
        return ScoredJob(workflow=cell.workflow.fill(prompt, seed=seed), id=name, prompt=prompt)

    def _content(self, places: np.ndarray, context: str) -> str:
        digest = hashlib.sha256(context.encode())
        for place in places.tolist():
            cell, seed = self._seed(place)
            digest.update(f"\n{cell.fingerprint} {seed} {cell.spec.text}".encode())
        return digest.hexdigest()


class ShardFiles:
    """The shards in the work folder of a run, and those that other machines made."""

    def __init__(self, own: Path, given: Sequence[Path], log: Callable[[str], None]):
        """Find the files.

        Args:
            own: Folder to write to. A damaged file here is named, removed and made again.
            given: Folders of other runs, read at any depth. A damaged file here is an error.
            log: Takes a line for a person.

        Raises:
            ValueError: A given folder holds no shard, or lacks one.
        """
        self.own, self._log = own, log
        self.own_paths: list[Path] = []
        """Files in `own` that were read or written."""
        self._own = _find(own)
        self._given: dict[str, list[Path]] = {}
        for folder in given:
            found = _find(folder)
            # A part has none where there are more parts than shards.
            if not found and not any(folder.rglob(PART_FILE)):
                raise ValueError(
                    f"parts: got no shard in {str(folder)!r}, expected the folder of a run of "
                    "build_triplets with `part`"
                )
            _check_lists(folder)
            for name, paths in found.items():
                self._given.setdefault(name, []).extend(paths)

    def read(self, shard: Shard) -> Scores | None:
        """The scores of a shard; None if no file has them.

        Raises:
            ValueError: A given file is damaged, or made for another plan.
        """
        for path in self._own.get(shard.name, []):
            try:
                scores = _read(path, shard)
            except ValueError as error:
                self._log(f"{error}; it is rendered again")
                path.unlink()
            else:
                self.own_paths.append(path)
                return scores
        for path in self._given.get(shard.name, []):
            return _read(path, shard)
        return None

    def write(self, shard: Shard, scores: Mapping[str, Any], schema: pa.Schema) -> Scores:
        """Keep the scores of a shard; the file appears whole or not at all.

        Returns:
            The scores as they will be read.

        Raises:
            OSError: It cannot be written; names the file.
        """
        table = pa.table({name: scores[name] for name in schema.names}, schema=schema)
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata({_CONTENT: shard.content.encode()})
        parquet.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        path = self.own / f"{shard.name}.{_digest(data)}.parquet"
        # Named by process: a run that was killed may have left a writer that still ends its file.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        self.own_paths.append(path)
        return _columns(table)


def estimate_work(workflow: Workflow) -> float:
    """About how many network calls at the first picture's size a workflow takes; to order by."""
    area, total = 1.0, 0.0
    for node_id in workflow.order():
        node = workflow.nodes[node_id]
        scale = node.inputs.get("scale_by")
        if isinstance(scale, (int, float)):
            area *= float(scale) ** 2
        steps = node.inputs.get("steps")
        if isinstance(steps, int):
            calls = 1 + (node.inputs.get("cfg") != 1.0)
            calls *= 1 + ("heun" in str(node.inputs.get("sampler_name")))
            total += area * steps * calls
    return total


def _find(folder: Path) -> dict[str, list[Path]]:
    """Files by the name of their shard."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("round-*.parquet")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(match[1], []).append(path)
    return found


def _check_lists(folder: Path) -> None:
    """Raise unless every shard that a part lists is there."""
    for record in sorted(folder.rglob(PART_FILE)):
        for name in json.loads(record.read_text())["shards"]:
            if not (record.parent / name).is_file():
                raise ValueError(
                    f"parts: got no {str(record.parent / name)!r}, which {PART_FILE} lists"
                )


def _read(path: Path, shard: Shard) -> Scores:
    data = path.read_bytes()
    digest, expected = _digest(data), path.name.split(".")[1]
    if digest != expected:
        raise ValueError(
            f"{path}: got {len(data)} bytes with digest {digest}, expected {expected}: the shard "
            "is damaged"
        )
    table = parquet.read_table(pa.BufferReader(data))
    content = (table.schema.metadata or {}).get(_CONTENT, b"").decode()
    if content != shard.content:
        raise ValueError(
            f"{path}: got a shard of another plan ({content[:12]}), expected {shard.content[:12]}: "
            "equal configuration, catalogue and pairs"
        )
    return _columns(table)


def _columns(table: pa.Table) -> Scores:
    return {name: table[name].to_numpy() for name in table.column_names}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
