"""Several rewards at once, each in units of its own differences.

In a weighted sum the term whose values differ most between pictures of one prompt rules the
update, and that is the easy one; a hard term starves. Divided by its own scale first, each term
pulls with its weight.

Shapes: B rows (those of a prompt are neighbours), J terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1e-12


class Balance:
    """Running mean squares of the terms' differences within prompts."""

    def __init__(self, weights: Sequence[float], num_epochs: float):
        """Take the terms' weights, and over how many epochs their scales are averaged."""
        self.weights_J = np.array(weights) / sum(weights)
        self.decay = 1 - 1 / max(num_epochs, 1.0)
        self.squares = np.zeros(1 + len(weights))
        self.seen = 0.0

    def __call__(self, total_B: Tensor, terms_BJ: Tensor, num_branches: int) -> Tensor:
        """The balanced reward of each row; updates the scales with this batch first.

            R = S sum_j w_j s_j / S_j,   S = running rms of the differences from the prompt's mean

        S of the total keeps the size that rewards had, which penalties are weighed against.

        Args:
            total_B: The score itself.
            terms_BJ: Standardised terms s.
            num_branches: Pictures per prompt.
        """
        all_BJ = torch.cat([total_B[:, None], terms_BJ], 1).double().numpy()
        apart = all_BJ.reshape(-1, num_branches, all_BJ.shape[1])
        apart = apart - apart.mean(1, keepdims=True)
        self.squares = self.decay * self.squares + (1 - self.decay) * np.square(apart).mean((0, 1))
        self.seen = self.decay * self.seen + (1 - self.decay)
        total, *scales = np.sqrt(self.squares / self.seen)
        # A term that never differs says nothing, and must not be blown up.
        pairs = zip(self.weights_J, scales, strict=True)
        gains_J = [w * total / s if s > _SMALLEST else 0.0 for w, s in pairs]
        return (terms_BJ.double() @ torch.tensor(gains_J, dtype=torch.float64)).float()

    def scales(self, names: Sequence[str]) -> dict[str, float]:
        """The running scale of each term by name."""
        scales_J = np.sqrt(self.squares[1:] / max(self.seen, _SMALLEST))
        return dict(zip(names, scales_J.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"squares": self.squares.tolist(), "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.squares, self.seen = np.array(state["squares"]), state["seen"]
