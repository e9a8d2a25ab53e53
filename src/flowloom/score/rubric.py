"""Scores as rubrics: named terms in [0, 1], each with a weight, and the breakdown beside the total.

    score = product of required terms  *  (1 - sum_i w_i (1 - s_i)) over the others

A term without a weight is required: the score is 0 where it is. A term with weight w takes up to
the share w away. Where nothing is required and the weights sum to 1, the score is their weighted
mean. The score is in [0, 1]; `flowloom.score.standard` has it in units of a dataset's spread.

To add a scorer, write one function in `flowloom.score.scorers` and name it in one `Term`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from flowloom.config import check
from flowloom.score.scorers import Scorer, crispness, faithfulness, thrift
from flowloom.shapes import detector

RESERVED = ("score", "flops")
"""What a row holds beside the terms."""
COST_WEIGHT = 0.2
"""Of `thrift` in the rubric `shapes-thrift`."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Term:
    """One named part of a rubric."""

    name: str
    """Its column in the breakdown: lower-case letters, digits, _."""
    scorer: Scorer
    """Gives values in [0, 1]."""
    weight: float | None = None
    """Share of the score it can take away; None: required, it multiplies."""
    needs_cost: bool = False
    """Whether it means nothing where the counted cost is not known."""

    def __post_init__(self) -> None:
        """Check the fields."""
        fine = _NAME.fullmatch(self.name) is not None and self.name not in RESERVED
        expected = f"lower-case letters, digits and _, not {' or '.join(RESERVED)}"
        check(fine, "term.name", self.name, expected)
        if self.weight is not None:
            # Also false for NaN.
            check(0 < self.weight <= 1, f"term {self.name}.weight", self.weight, "in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Named weighted terms."""

    name: str
    """What users call it."""
    terms: tuple[Term, ...]
    """Its parts."""
    batch_size: int = 32
    """Pictures scored at once; changes no score."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(bool(self.terms), "terms", self.terms, "at least one")
        twice = [name for name, n in Counter(t.name for t in self.terms).items() if n > 1]
        check(not twice, "terms", twice, "different names")
        weights = [term.weight for term in self.terms if term.weight is not None]
        check(sum(weights) <= 1 + 1e-9, "terms.weight", weights, "weights with a sum of at most 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")

    @property
    def columns(self) -> tuple[str, ...]:
        """What is scored: `score` and the terms by name."""
        return ("score", *(term.name for term in self.terms))

    @property
    def needs_cost(self) -> bool:
        """Whether a term means nothing where the counted cost is not known."""
        return any(term.needs_cost for term in self.terms)

    def score(
        self,
        prompts: Sequence[str],
        images: Sequence[np.ndarray],
        flops: Sequence[int] | None = None,
    ) -> list[dict[str, float]]:
        """Score pictures.

        Args:
            prompts: One per picture.
            images: `[3, H, W]` in [-1, 1]; sizes may differ, all are judged at the native size.
            flops: Counted cost of each picture; None where it is not known, and 0 in the rows.

        Returns:
            One row per picture: `score`, each term by name, and `flops`.

        Raises:
            ValueError: Lengths differ, a prompt is outside what a term can judge, a term needs
                costs and got none, or a term's values are not one per picture in [0, 1].
            FloatingPointError: A picture or a term is not finite.
        """
        if flops is None and self.needs_cost:
            raise ValueError(f"rubric {self.name!r}: got no counted costs, expected one a picture")
        costs = [0] * len(images) if flops is None else list(flops)
        if not len(prompts) == len(images) == len(costs):
            raise ValueError(
                f"score: got {len(prompts)} prompts, {len(images)} images and {len(costs)} costs, "
                "expected as many of each"
            )
        rows = []
        for first in range(0, len(images), self.batch_size):
            part = slice(first, first + self.batch_size)
            rows += self._score(prompts[part], images[part], costs[part])
        return rows

    def _score(
        self, prompts: Sequence[str], images: Sequence[np.ndarray], costs: Sequence[int]
    ) -> list[dict[str, float]]:
        native = [detector.to_native(torch.as_tensor(np.array(image))[None]) for image in images]
        images_BCHW, flops_B = torch.cat(native), np.asarray(costs, float)
        values = {
            term.name: self._checked(term, prompts, term.scorer(prompts, images_BCHW, flops_B))
            for term in self.terms
        }
        total_B = np.ones(len(images))
        for term in self.terms:
            if term.weight is None:
                total_B *= values[term.name]
        shares = [(t.weight, values[t.name]) for t in self.terms if t.weight is not None]
        lost_B = sum((weight * (1 - value) for weight, value in shares), np.zeros(len(images)))
        # Weights that sum to 1 up to rounding may take a little more than all.
        columns = {"score": np.clip(total_B * (1 - lost_B), 0, 1), **values}
        return [
            {name: float(column[row]) for name, column in columns.items()} | {"flops": int(cost)}
            for row, cost in enumerate(costs)
        ]

    def _checked(self, term: Term, prompts: Sequence[str], values_B: np.ndarray) -> np.ndarray:
        """A term's values, clipped by rounding errors only."""
        where = f"{self.name}: {term.name}"
        if values_B.shape != (len(prompts),):
            raise ValueError(f"{where}: got shape {values_B.shape}, expected ({len(prompts)},)")
        for prompt, value in zip(prompts, values_B.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{where} is not finite for {prompt!r}")
            if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
                raise ValueError(f"{where}: got {value} for {prompt!r}, expected one in [0, 1]")
        return np.clip(values_B, 0, 1)


def shapes_rubric(cost_weight: float | None = None) -> Rubric:
    """The embedded world's score: faithfulness * (0.8 + 0.2 crispness), in [0, 1].

    Args:
        cost_weight: Share of the score that cost can take away, at most 0.8; None leaves cost out.
    """
    terms = [Term("faithfulness", faithfulness), Term("crispness", crispness, 0.2)]
    if cost_weight is None:
        return Rubric("shapes", tuple(terms))
    terms.append(Term("thrift", thrift, cost_weight, needs_cost=True))
    return Rubric("shapes-thrift", tuple(terms))


RUBRICS: dict[str, Callable[[], Rubric]] = {
    "shapes": shapes_rubric,
    "shapes-thrift": lambda: shapes_rubric(COST_WEIGHT),
}


def get_rubric(name: str) -> Rubric:
    """A rubric by name.

    Raises:
        ValueError: There is none of this name; lists the names.
    """
    if name not in RUBRICS:
        raise ValueError(f"rubric: got {name!r}, expected one of {', '.join(RUBRICS)}")
    return RUBRICS[name]()


def score_images(
    rubric_name: str, prompts: Sequence[str], images: Sequence[np.ndarray]
) -> list[dict[str, float]]:
    """Score pictures `[3, H, W]` in [-1, 1] with a rubric by name; see `Rubric.score`."""
    return get_rubric(rubric_name).score(prompts, images)
