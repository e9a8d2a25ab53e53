"""What policies are compared on: prompts, noise, and each policy's design for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from flowloom.config import check
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
