"""Standardised scores: (x - mean) / sd with constants frozen from a dataset's train split.

The constants are computed once, stored beside the dataset (`STANDARD_FILE`), and applied as they
are ever after: a score keeps its meaning while policies and prompts change. They belong to one
rubric and one catalogue, and are refused for any other.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowloom.config import to_dict
from flowloom.runs import write_json
from flowloom.score.rubric import Rubric

STANDARD_FILE = "standard.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """Means and standard deviations of a rubric's score and terms."""

    rubric: str
    """Name of the rubric."""
    weights: dict[str, float | None]
    """Its terms and their weights; None: required."""
    catalogue: str
    """Hash of the catalogue whose workflows were scored."""
    split: str
    """Rows they are computed from."""
    num_rows: int
    """How many these were."""
    means: dict[str, float]
    """Of `score` and each term by name."""
    sds: dict[str, float]
    """Population standard deviations; 0 where all rows were equal."""

    @classmethod
    def fit(
        cls,
        rubric: Rubric,
        catalogue: str,
        columns: Mapping[str, Sequence[float]],
        split: str = "train",
    ) -> Standard:
        """Compute the constants; equal rows in any order give the same numbers.

        Args:
            rubric: What the rows were scored with.
            catalogue: Hash of the catalogue.
            columns: `score` and each term by name, the rows of the split alone.
            split: Its name.

        Raises:
            ValueError: A column lacks, is empty or has another length.
        """
        lengths = {name: len(columns.get(name, ())) for name in rubric.columns}
        if len(set(lengths.values())) != 1 or not lengths["score"]:
            raise ValueError(f"standard: got rows {lengths}, expected as many of each, at least 1")
        means, sds = {}, {}
        for name in rubric.columns:
            values = [float(value) for value in columns[name]]
            if min(values) == max(values):
                # Their sum is rounded, and would give them a spread.
                means[name], sds[name] = values[0], 0.0
                continue
            # fsum rounds once, so neither order nor machine matters.
            means[name] = math.fsum(values) / len(values)
            squares = ((value - means[name]) ** 2 for value in values)
            sds[name] = math.sqrt(math.fsum(squares) / len(values))
        return cls(
            rubric=rubric.name,
            weights={term.name: term.weight for term in rubric.terms},
            catalogue=catalogue,
            split=split,
            num_rows=lengths["score"],
            means=means,
            sds=sds,
        )

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        write_json(Path(path), {"format": FORMAT, **to_dict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Standard:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is damaged; names it.
            OSError: There is none.
        """
        try:
            row = json.loads(Path(path).read_text())
            found = cls(**_fields(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: got a file without standardisation constants, expected one that "
                f"`build_triplets` wrote ({error})"
            ) from error
        return found

    def check(self, rubric: Rubric, catalogue: str) -> None:
        """Make sure that the constants are of this rubric and catalogue.

        Raises:
            ValueError: They are not; names both.
        """
        if rubric.name != self.rubric:
            raise ValueError(
                f"standard: got constants of rubric {self.rubric!r}, expected {rubric.name!r}"
            )
        weights = {term.name: term.weight for term in rubric.terms}
        if weights != self.weights:
            raise ValueError(
                f"standard: got constants of rubric {self.rubric!r} with weights {self.weights}, "
                f"expected {weights}"
            )
        if catalogue != self.catalogue:
            raise ValueError(
                f"standard: got constants of catalogue {self.catalogue}, expected {catalogue}"
            )

    def apply(
        self, rubric: Rubric, catalogue: str, columns: Mapping[str, Sequence[float]]
    ) -> dict[str, np.ndarray]:
        """Standardise what `rubric` gave; columns that are not scores are left out.

        Args:
            rubric: What the rows were scored with.
            catalogue: Hash of the catalogue of their workflows.
            columns: `score`, terms, or some of them.

        Returns:
            (x - mean) / sd by name, float64.

        Raises:
            ValueError: The constants are of another rubric or catalogue, or a column was constant
                when they were computed.
        """
        self.check(rubric, catalogue)
        result = {}
        for name in columns:
            if name not in self.means:
                continue
            if not self.sds[name]:
                raise ValueError(
                    f"standard: got {name!r}, which was {self.means[name]} in all {self.num_rows} "
                    "rows, expected a score with spread"
                )
            result[name] = (np.asarray(columns[name], float) - self.means[name]) / self.sds[name]
        return result


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """Check the layout of a stored file."""
    if row.pop("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}")
    names = {"score", *row["weights"]}
    for key in ("means", "sds"):
        if set(row[key]) != names or not all(math.isfinite(v) for v in row[key].values()):
            raise ValueError(f"{key}: expected finite numbers for {', '.join(sorted(names))}")
    return row
