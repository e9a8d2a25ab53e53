"""Scores as rubrics: named terms with ranges and weights, and the breakdown beside the total.

A term's raw value x counts as s = (x - low) / (high - low). There are two kinds of rubric:

    product: score = product of required terms  *  (1 - sum_i w_i (1 - s_i)) over the others
    sum:     score = sum_i w_i s_i

In a product every x lies in [low, high]. A term without a weight is required: the score is 0 where
it is. A term with weight w takes up to the share w away. Where nothing is required and the weights
sum to 1, the score is their weighted mean. The score is in [0, 1]. In a sum any finite x will do,
and so the score is any finite number. `flowloom.score.standard` has scores in units of a dataset's
spread.

To add a scorer, write one function in `flowloom.score.scorers` and name it in one `Term`; those
with a model are put together by `flowloom.score.build.build_rubric`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from flowloom.config import check
from flowloom.score.scorers import Scorer, crispness, faithfulness, likeness, thrift
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
    """Gives one finite raw value a picture. What has a method `close` is closed with the rubric."""
    weight: float | None = None
    """Share of a product's score it can take away, or its factor in a sum; None: required, it
    multiplies."""
    needs_cost: bool = False
    """Whether it means nothing where the counted cost is not known."""
    low: float = 0.0
    """Raw value that counts 0."""
    high: float = 1.0
    """Raw value that counts 1; below `low` where less is better."""
    native: bool = True
    """Whether its pictures are one tensor at the shapes world's 32 x 32; else they come as they
    are, each `[3, H, W]`."""

    def __post_init__(self) -> None:
        """Check the fields."""
        fine = _NAME.fullmatch(self.name) is not None and self.name not in RESERVED
        expected = f"lower-case letters, digits and _, not {' or '.join(RESERVED)}"
        check(fine, "term.name", self.name, expected)
        if self.weight is not None:
            # Also false for NaN.
            check(0 < self.weight <= 1, f"term {self.name}.weight", self.weight, "in (0, 1]")
        ends = (self.low, self.high)
        apart = all(map(math.isfinite, ends)) and self.low != self.high
        check(apart, f"term {self.name}.low, high", ends, "two different finite numbers")

    def standardised(self, raw_B: np.ndarray) -> np.ndarray:
        """(x - low) / (high - low)."""
        return (raw_B - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Named weighted terms."""

    name: str
    """What users call it."""
    terms: tuple[Term, ...]
    """Its parts."""
    batch_size: int = 32
    """Pictures scored at once; changes no score."""
    kind: Literal["product", "sum"] = "product"
    """How the terms make the score; see the head of this file."""
    timeout_s: float | None = None
    """Seconds that a term may take for a batch, first loading included; None: any time."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(bool(self.terms), "terms", self.terms, "at least one")
        twice = [name for name, n in Counter(t.name for t in self.terms).items() if n > 1]
        check(not twice, "terms", twice, "different names")
        weights = [term.weight for term in self.terms if term.weight is not None]
        if self.kind == "sum":
            without = [term.name for term in self.terms if term.weight is None]
            check(not without, "terms", without, "a weight for every term of a sum")
        else:
            fine = sum(weights) <= 1 + 1e-9
            check(fine, "terms.weight", weights, "weights with a sum of at most 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")
        limit = self.timeout_s
        check(limit is None or limit > 0, "timeout_s", limit, "> 0 or null")

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
            images: `[3, H, W]` in [-1, 1]; sizes may differ.
            flops: Counted cost of each picture; None where it is not known, and 0 in the rows.

        Returns:
            One row per picture: `score`, each term's raw value by name, and `flops`.

        Raises:
            ValueError: Lengths differ, a prompt is outside what a term can judge, a term needs
                costs and got none, or its values are not one per picture or, in a product, not
                in its range.
            FloatingPointError: A picture or a term is not finite.
            TimeoutError: A term took longer than `timeout_s`.
            RuntimeError: A scorer broke down; names term, prompt and cause.
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

    def close(self) -> None:
        """Let go of the models of its terms; a rubric that is used again loads them again."""
        for term in self.terms:
            close = getattr(term.scorer, "close", None)
            if close is not None:
                close()

    def _score(
        self, prompts: Sequence[str], images: Sequence[np.ndarray], costs: Sequence[int]
    ) -> list[dict[str, float]]:
        pictures = [torch.as_tensor(np.array(image)) for image in images]
        native_BCHW = None
        if any(term.native for term in self.terms):
            native_BCHW = torch.cat([detector.to_native(image[None]) for image in pictures])
        flops_B = np.asarray(costs, float)
        values = {}
        for term in self.terms:
            seen = native_BCHW if term.native else pictures
            values[term.name] = self._checked(
                term, prompts, self._run(term, prompts, seen, flops_B)
            )
        columns = {"score": self._total(values, len(images)), **values}
        return [
            {name: float(column[row]) for name, column in columns.items()} | {"flops": int(cost)}
            for row, cost in enumerate(costs)
        ]

    def _total(self, values: dict[str, np.ndarray], count: int) -> np.ndarray:
        """The two equations at the head of this file."""
        standard = {term.name: term.standardised(values[term.name]) for term in self.terms}
        shares = [(t.weight, standard[t.name]) for t in self.terms if t.weight is not None]
        if self.kind == "sum":
            return sum((weight * value for weight, value in shares), np.zeros(count))
        total_B = np.ones(count)
        for term in self.terms:
            if term.weight is None:
                total_B *= standard[term.name]
        lost_B = sum((weight * (1 - value) for weight, value in shares), np.zeros(count))
        # Weights that sum to 1 up to rounding may take a little more than all.
        return np.clip(total_B * (1 - lost_B), 0, 1)

    def _run(self, term: Term, prompts: Sequence[str], images: Any, flops_B: np.ndarray) -> Any:
        """What a term's scorer gives; breakdowns name term, prompt and cause."""
        where = f"{self.name}: {term.name}"
        others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        try:
            if self.timeout_s is None:
                return term.scorer(prompts, images, flops_B)
            return _within(self.timeout_s, lambda: term.scorer(prompts, images, flops_B))
        except _LateError:
            raise TimeoutError(
                f"{where}: no values after {self.timeout_s} s for {prompts[0]!r}{others}"
            ) from None
        except (ValueError, FloatingPointError):
            # About a prompt, a picture or a file: they name it themselves.
            raise
        except Exception as error:
            cause = " ".join(str(error).split()) or "no message"
            raise RuntimeError(
                f"{where}: broke down for {prompts[0]!r}{others}: {type(error).__name__}: {cause}"
            ) from error

    def _checked(self, term: Term, prompts: Sequence[str], values_B: np.ndarray) -> np.ndarray:
        """A term's raw values; in a product clipped, by rounding errors only."""
        where = f"{self.name}: {term.name}"
        if values_B.shape != (len(prompts),):
            raise ValueError(f"{where}: got shape {values_B.shape}, expected ({len(prompts)},)")
        low, high = sorted((term.low, term.high))
        slack = _TOLERANCE * (high - low)
        for prompt, value in zip(prompts, values_B.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{where} is not finite for {prompt!r}")
            if self.kind == "product" and not low - slack <= value <= high + slack:
                ends = f"[{low:g}, {high:g}]"
                raise ValueError(f"{where}: got {value} for {prompt!r}, expected one in {ends}")
        return np.clip(values_B, low, high) if self.kind == "product" else values_B


class _LateError(Exception):
    """A call had not returned in time."""


def _within(limit_s: float, call: Callable[[], Any]) -> Any:
    """The result of a call, made in a thread of its own so that a hanging one can be left."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # A daemon: Python ends without waiting for it.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise _LateError
    return results[0]


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
    "shapes-likeness": lambda: Rubric("shapes-likeness", (Term("likeness", likeness),)),
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
