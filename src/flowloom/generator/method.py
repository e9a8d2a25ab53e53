"""What the loop asks of a method: to roll out, to say what is trained on, and its loss.

`flowloom.generator.fdfo` and `flowloom.generator.flow_grpo` are the methods. The loop
(`flowloom.generator.tune`) draws prompts, scores, steps the optimiser, resumes and works in N
processes; a method knows nothing of these.

Shapes: P prompts, K pictures per prompt, B = P * K rows (a prompt's are neighbours), U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from flowloom.generator.velocity import Generator


@dataclasses.dataclass(frozen=True)
class Paths:
    """What a rollout leaves; a method adds what it needs later."""

    images_BCHW: Tensor
    """Where the rows ended, x0: pictures, or latents that `Generator.decode` makes pictures."""
    prompts_B: Sequence[str]
    """The prompt of each row."""


class Method(Protocol):
    """A way to tune a velocity by the rewards of its pictures."""

    @property
    def num_branches(self) -> int:
        """Pictures K of each prompt."""
        ...

    def roll_out(self, flow: Generator, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """Sample K pictures of each prompt, without gradients.

        Args:
            flow: What is tuned.
            prompts: Those of this process, P of them.
            seeds: One per prompt; its K rows are a function of (weights, prompt, seed) alone,
                whatever batch or process they are drawn in.

        Returns:
            `Paths` of P * K rows.
        """
        ...

    def advantages(self, rewards_B: Tensor) -> Tensor:
        """How much better each row is than the others of its prompt.

        Args:
            rewards_B: Of the whole batch, in all processes alike.

        Returns:
            `[B]`; what `units` and `loss` are given.
        """
        ...

    def units(self, advantages_B: Tensor, rng: np.random.Generator) -> np.ndarray:
        """What is trained on, shuffled.

        Args:
            advantages_B: Of the whole batch, in all processes alike.
            rng: Seeded alike in all processes; draw all of the shuffle from it.

        Returns:
            `[U, ...]` integers. The first column is the prompt (its process trains on the unit),
            others are the method's own, a step for example. The loop cuts U into minibatches.
        """
        ...

    def loss(
        self, flow: Generator, paths: Any, advantages_B: Tensor, units: np.ndarray, count: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The part of a minibatch's objective that these units make.

        Args:
            flow: What is tuned; gradients flow to its parameters.
            paths: What `roll_out` returned in this process.
            advantages_B: Of the rows of `paths`.
            units: Some of `units`; the first column counts the prompts of `paths`.
            count: Units of the whole minibatch, in all passes and processes.

        Returns:
            The sum over these units divided by `count`, so that passes and processes add up, and
            values to log (`train/...`), divided alike, without gradients.
        """
        ...
