"""A running mean of the tuned weights: what is watched, judged and exported.

Single steps of reward tuning follow few pictures, and their noise is a walk around the course that
the reward sets; the mean of the last epochs is nearer to that course (Polyak and Juditsky, 1992).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from flowloom.generator.velocity import Generator


class WeightAverage:
    """Exponential mean over epochs, from the base on; without a horizon it is the weights."""

    def __init__(self, flow: Generator, num_epochs: float | None):
        """Take the untuned generator and over about how many epochs the mean reaches."""
        self.decay = None if num_epochs is None else 1 - 1 / num_epochs
        self.mean: dict[str, Tensor] = {}
        if self.decay is not None:
            self.mean = {name: value.detach().clone() for name, value in flow.state_dict().items()}

    @torch.no_grad()
    def update(self, flow: Generator) -> None:
        """mean <- decay * mean + (1 - decay) * weights."""
        if self.decay is None:
            return
        for name, value in flow.state_dict().items():
            self.mean[name].lerp_(value.detach(), 1 - self.decay)

    @contextmanager
    def applied(self, flow: Generator) -> Iterator[None]:
        """The generator has the mean inside, and its own weights again after."""
        if self.decay is None:
            yield
            return
        own = {name: value.detach().clone() for name, value in flow.state_dict().items()}
        flow.load_state_dict(self.mean)
        try:
            yield
        finally:
            flow.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run goes on from."""
        return self.mean

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self.mean = dict(state)
