"""Muon (Jordan, 2024) in float32, batched over matrices of one shape.

torch's own works in bfloat16, which is slow on a CPU at this size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan, 2024), batched over equal shapes."""

    def __init__(self, params: Sequence[Tensor], momentum: float):
        self.momentum = momentum
        groups: dict[tuple, list[Tensor]] = {}
        for p in params:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its gradient."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalize(torch.lerp(grads, buffer, self.momentum))
            scale = lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps of the quintic (3.4445, -4.7750, 2.0315) on `[n, rows, columns]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
