"""What policies are compared on: prompts, noise, and each policy's design for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowloom.config import check
from flowloom.designer.design import Design
from flowloom.evaluation.config import EvaluateConfig
from flowloom.workflow import Workflow

SEED_BASE = 1 << 40
"""Render seeds start here: far from those of training data."""
SEED_STRIDE = 16
"""Between two renders' seeds, so that a workflow's second sampler (seed + 1) has its own noise."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """What every policy is rendered on."""

    prompts: list[str]
    """P prompts, kinds in turn."""
    kinds: list[str]
    """Their kinds."""
    seeds_PS: np.ndarray
    """Render seeds."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The design a policy renders for one prompt."""

    workflow: Workflow
    """A template."""
    fingerprint: str
    """Its template fingerprint."""
    predicted: float
    """Predicted score of a single render."""
    interval: tuple[float, float]
    """Where a single render's score is predicted to lie."""
    num_tokens: int
    """Length of its code."""

    @classmethod
    def of(cls, design: Design) -> Choice:
        """A design that a designer with a reward ensemble lists."""
        assert design.score is not None
        assert design.interval is not None
        return cls(
            design.workflow, design.fingerprint, design.score, design.interval, len(design.tokens)
        )

    def to_row(self) -> list[Any]:
        """As a row of JSON."""
        return [
            self.workflow.to_api(),
            self.fingerprint,
            self.predicted,
            *self.interval,
            self.num_tokens,
        ]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Choice:
        """What `to_row` wrote."""
        api, fingerprint, predicted, low, high, num_tokens = row
        return cls(Workflow.from_api(api), fingerprint, predicted, (low, high), num_tokens)


def make_frame(config: EvaluateConfig, held_out: Sequence[Mapping[str, str]]) -> Frame:
    """The first prompts (kinds are in turn) with a render seed of its own for each render.

    Raises:
        ValueError: There are fewer prompts than asked for.
    """
    number = config.num_prompts
    expected = f"at most {len(held_out)}, the held-out prompts of the triplets"
    check(number <= len(held_out), "num_prompts", number, expected)
    count = np.arange(number * config.num_seeds).reshape(number, config.num_seeds)
    first = SEED_BASE + (config.seed << 24)
    return Frame(
        [row["prompt"] for row in held_out[:number]],
        [row["kind"] for row in held_out[:number]],
        first + SEED_STRIDE * count,
    )
