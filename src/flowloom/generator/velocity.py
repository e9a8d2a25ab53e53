"""What FDFO needs of a generator: its velocity. An exact one, and that of a shapes checkpoint.

Convention: x_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is noise.

Shapes: B rows, C channels, H x W pixels, D = C * H * W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flowloom.shapes import prompts as language
from flowloom.shapes.model import Conditioning, ShapesModel


class Velocity(Protocol):
    """A flow that can be sampled; gradients flow to whatever parameters it has."""

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """v(x, t | prompt), like `x_BCHW`."""
        ...


class GaussianFlow:
    """The exact velocity of data N(mean, variance), variance per element.

    With x0 ~ N(m, C): E[x0 | x_t] = m + A (x_t - (1 - t) m), A = (1 - t) C / ((1 - t)^2 C + t^2),
    and v = (x_t - E[x0 | x_t]) / t.
    """

    def __init__(self, mean_CHW: Tensor, variance_CHW: Tensor):
        """Take mean and variance of the data."""
        self.mean_CHW, self.variance_CHW = mean_CHW, variance_CHW

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The exact velocity; prompts do not matter."""
        t = t_B[:, None, None, None]
        gain = (1 - t) * self.variance_CHW / ((1 - t) ** 2 * self.variance_CHW + t**2)
        clean_BCHW = self.mean_CHW + gain * (x_BCHW - (1 - t) * self.mean_CHW)
        return (x_BCHW - clean_BCHW) / t


class ShapesFlow:
    """The velocity of a shapes checkpoint, with classifier-free guidance where a scale is given."""

    def __init__(self, model: ShapesModel, guidance: float | None = None):
        """Take the model and the guidance scale w: v = v_empty + w (v_prompt - v_empty)."""
        self.model, self.guidance = model, guidance

    def parameters(self) -> Iterator[nn.Parameter]:
        """What can be tuned."""
        return self.model.parameters()

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The model's velocity; equal prompts are encoded once."""
        different = list(dict.fromkeys(prompts))
        row_of = {text: row for row, text in enumerate(different)}
        texts = different if self.guidance is None else [*different, ""]
        encoded = self.model.encode_text([language.tokenize(text) for text in texts])
        cond = encoded[torch.tensor([row_of[text] for text in prompts])]
        if self.guidance is None:
            return self.model.velocity(x_BCHW, t_B, cond)
        empty = encoded[torch.full((len(prompts),), len(different))]
        v_2BCHW = self.model.velocity(
            torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), Conditioning.cat([cond, empty])
        )
        v_prompt, v_empty = v_2BCHW.chunk(2)
        return v_empty + self.guidance * (v_prompt - v_empty)
