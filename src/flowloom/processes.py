"""The processes that train together: those of torchrun or `accelerate launch`, else this one.

Every process knows the whole batch, which is a function of (seed, step), and works on its slice;
losses are divided by counts of the whole batch, so gradients are summed, not averaged. N processes
then do what one does, up to the order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor


class Processes:
    """This process among those of its group; alone, nothing of accelerate is imported."""

    def __init__(self):
        """Join the group that the environment names."""
        self.num, self.rank = 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self.num = self._accelerator.num_processes
            self.rank = self._accelerator.process_index

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on once every process has come here."""
        if self.num > 1:
            self._accelerator.wait_for_everyone()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.num == 1:
            return value
        reduced = self._accelerator.reduce(value.to(self._accelerator.device), "sum")
        assert isinstance(reduced, Tensor)
        return reduced.to(value.device)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; none counts as 0."""
        if self.num == 1:
            return
        weights = list(parameters)
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in weights]
        # One message for all of them.
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        parts = flat.split([grad.numel() for grad in grads])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight)
