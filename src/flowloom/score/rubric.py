"""Scores as rubrics: named terms in [0, 1], each with a weight, and the breakdown beside the total.

    score = product of required terms  *  (1 - sum_i w_i (1 - s_i)) over the others

A term without a weight is required: the score is 0 where it is. A term with weight w takes up to
the share w away. Where nothing is required and the weights sum to 1, the score is their weighted
mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.config import check
from flowloom.shapes import detector
from flowloom.shapes.prompts import parse

Scorer = Callable[[Sequence[str], Tensor, np.ndarray], np.ndarray]
"""`(prompts, images_BCHW in [-1, 1], flops_B) -> values_B in [0, 1]`."""
THRIFT_FLOPS = 1e9


@dataclasses.dataclass(frozen=True)
class Term:
    """One named part of a rubric."""

    name: str
    """Its column in the breakdown."""
    scorer: Scorer
    """Gives values in [0, 1]."""
    weight: float | None = None
    """Share of the score it can take away; None: required, it multiplies."""


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Named weighted terms."""

    name: str
    """What users call it."""
    terms: tuple[Term, ...]
    """Its parts."""
    batch_size: int = 32
    """Pictures scored at once."""

    def __post_init__(self) -> None:
        weights = [term.weight for term in self.terms if term.weight is not None]
        in_range = all(0 <= weight <= 1 for weight in weights) and sum(weights) <= 1 + 1e-9
        check(in_range, "terms.weight", weights, "weights >= 0 with a sum of at most 1")

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
            flops: Counted cost of each picture, or None where it is not known (0).

        Returns:
            One row per picture: `score`, each term by name, and `flops`.

        Raises:
            ValueError: Lengths differ, or a prompt is outside what a term can judge.
            FloatingPointError: A term is not finite.
        """
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

    def _score(self, prompts, images, costs) -> list[dict[str, float]]:
        native = [detector.to_native(torch.as_tensor(np.array(image))[None]) for image in images]
        images_BCHW = torch.cat(native)
        values = {
            term.name: term.scorer(prompts, images_BCHW, np.asarray(costs, float))
            for term in self.terms
        }
        for name, column in values.items():
            if not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column))[0])
                raise FloatingPointError(f"{self.name}: {name} is not finite for {prompts[row]!r}")
        total = np.ones(len(images))
        for term in self.terms:
            if term.weight is None:
                total *= values[term.name]
        shares = [(t.weight, values[t.name]) for t in self.terms if t.weight is not None]
        total *= 1 - sum((weight * (1 - value) for weight, value in shares), np.zeros(len(images)))
        return [
            {
                "score": float(total[row]),
                **{name: float(column[row]) for name, column in values.items()},
                "flops": int(costs[row]),
            }
            for row in range(len(images))
        ]


def faithfulness(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """How well the shapes on a picture answer its prompt (`shapes.detector.score`).

    Raises:
        ValueError: A prompt is outside the grammar of the shapes world.
    """
    return detector.score(images_BCHW, [parse(prompt) for prompt in prompts]).double().numpy()


def crispness(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """How pure the colours are (`shapes.detector.crispness`)."""
    return detector.crispness(images_BCHW).double().numpy()


def thrift(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """1 / (1 + flops / THRIFT_FLOPS): 1 for free, 1/2 at a thousand million."""
    return 1 / (1 + flops_B / THRIFT_FLOPS)


def shapes_rubric(cost_weight: float | None = None) -> Rubric:
    """The embedded world's score: faithfulness * (0.8 + 0.2 crispness), in [0, 1].

    Args:
        cost_weight: Share of the score that cost can take away, at most 0.8; None leaves cost out.
    """
    terms = [Term("faithfulness", faithfulness), Term("crispness", crispness, 0.2)]
    if cost_weight is not None:
        terms.append(Term("thrift", thrift, cost_weight))
    return Rubric("shapes", tuple(terms))


RUBRICS: dict[str, Callable[[], Rubric]] = {"shapes": shapes_rubric}


def get_rubric(name: str) -> Rubric:
    """A rubric by name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in RUBRICS:
        raise ValueError(f"rubric: got {name!r}, expected one of {', '.join(RUBRICS)}")
    return RUBRICS[name]()


def score_images(
    rubric_name: str, prompts: Sequence[str], images: Sequence[np.ndarray]
) -> list[dict[str, float]]:
    """Score pictures `[3, H, W]` in [-1, 1] with a rubric by name; see `Rubric.score`."""
    return get_rubric(rubric_name).score(prompts, images)
