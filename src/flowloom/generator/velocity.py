"""What tuning needs of a generator: its velocity. Exact ones, and that of a shapes checkpoint.

Convention: x_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is noise.

Shapes: B rows, C channels, H x W pixels, D = C * H * W.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flowloom.generator.adapters import Adapter
from flowloom.shapes import prompts as language
from flowloom.shapes.model import ShapesModel, TextKeys

_MAX_TEXTS = 1000


class Velocity(Protocol):
    """A flow that can be sampled; gradients flow to whatever parameters it has."""

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """v(x, t | prompt), like `x_BCHW`."""
        ...


class Generator(Velocity, Protocol):
    """What the loop tunes: a pretrained flow whose velocity has parameters to train.

    States x are pictures in the shapes world and latents of an autoencoder elsewhere.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of x, without batch: (3, 32, 32), or latents (16, 64, 64)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where x and t are expected."""
        ...

    def base_velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The velocity before tuning, guided alike; without gradients."""
        ...

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1], float32 on the CPU, not clamped; no gradients."""
        ...

    def with_guidance(self, guidance: float | None) -> Generator:
        """The same generator, sharing its weights, with another guidance scale; None: without."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is tuned."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The tuned tensors by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        ...


class Untuned:
    """A generator as it was before tuning, for judging."""

    def __init__(self, flow: Generator):
        """Take the tuned one."""
        self.flow = flow
        self.shape, self.device = flow.shape, flow.device
        self.velocity = self.base_velocity = flow.base_velocity
        self.decode = flow.decode

    def with_guidance(self, guidance: float | None) -> Untuned:
        """The same with another guidance scale."""
        return Untuned(self.flow.with_guidance(guidance))

    def parameters(self) -> Iterator[nn.Parameter]:
        """None of them."""
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is tuned."""


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


class MixtureFlow:
    """The exact velocity of a mixture of Gaussians N(mean_k, variance_k), variance per element.

    x_t of component k is N((1 - t) mean_k, (1 - t)^2 variance_k + t^2); with r_k(x, t) the share of
    component k in the density at x, E[x0 | x_t] = sum_k r_k E[x0 | x_t, k], the latter as in
    `GaussianFlow`, and v = (x_t - E[x0 | x_t]) / t.
    """

    def __init__(self, means_KCHW: Tensor, variances_KCHW: Tensor, weights_K: Tensor):
        """Take means, variances and weights of the K components; the weights sum to 1."""
        self.means_KCHW, self.variances_KCHW = means_KCHW, variances_KCHW
        self.weights_K = weights_K

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The exact velocity; prompts do not matter."""
        t = t_B[:, None, None, None, None]
        spread_BKCHW = (1 - t) ** 2 * self.variances_KCHW + t**2
        away_BKCHW = x_BCHW[:, None] - (1 - t) * self.means_KCHW
        log_density_BK = (
            -(away_BKCHW.square() / spread_BKCHW + spread_BKCHW.log()).flatten(2).sum(2)
        )
        share_BK = (self.weights_K.log() + log_density_BK / 2).softmax(1)
        clean_BKCHW = self.means_KCHW + (1 - t) * self.variances_KCHW / spread_BKCHW * away_BKCHW
        clean_BCHW = (share_BK[:, :, None, None, None] * clean_BKCHW).sum(1)
        return (x_BCHW - clean_BCHW) / t_B[:, None, None, None]


class ShapesFlow:
    """The velocity of a shapes checkpoint, with classifier-free guidance where a scale is given."""

    device = torch.device("cpu")

    def __init__(
        self,
        model: ShapesModel,
        guidance: float | None = None,
        *,
        base: ShapesModel | None = None,
        adapter: Adapter | None = None,
    ):
        """Take the model and the guidance scale w: v = v_empty + w (v_prompt - v_empty).

        Args:
            model: What is tuned: all of it, or its adapter.
            guidance: w; None: v = v_prompt.
            base: The model before tuning, where all of it is tuned.
            adapter: The LoRA that `model` has; switched off, the model is its own base.
        """
        self.model, self.guidance, self.base, self.adapter = model, guidance, base, adapter
        side = model.config.native_size
        self.shape = (3, side, side)
        self._texts, self._base_texts = _Texts(model), _Texts(base or model)

    def with_guidance(self, guidance: float | None) -> ShapesFlow:
        """The same model with another guidance scale."""
        twin = copy.copy(self)
        twin.guidance = guidance
        return twin

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is tuned."""
        return iter(self.adapter.parameters()) if self.adapter else self.model.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The tuned tensors by name."""
        return dict((self.adapter or self.model).state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        (self.adapter or self.model).load_state_dict(state)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """The pictures that the states are."""
        return x_BCHW.detach().cpu()

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The model's velocity; equal prompts are encoded once."""
        return self._velocity(self.model, self._texts, x_BCHW, t_B, prompts)

    @torch.no_grad()
    def base_velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The velocity before tuning; prompts are encoded once in all."""
        if self.adapter is not None:
            with self.adapter.off():
                return self._velocity(self.model, self._base_texts, x_BCHW, t_B, prompts)
        if self.base is None:
            raise ValueError("ShapesFlow: got neither base nor adapter, expected one of them")
        return self._velocity(self.base, self._base_texts, x_BCHW, t_B, prompts)

    def _velocity(
        self,
        model: ShapesModel,
        texts: _Texts,
        x_BCHW: Tensor,
        t_B: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        if self.guidance is None:
            return model.velocity(x_BCHW, t_B, texts(prompts))
        both = texts([*prompts, *[""] * len(prompts)])
        v_2BCHW = model.velocity(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both)
        v_prompt, v_empty = v_2BCHW.chunk(2)
        return v_empty + self.guidance * (v_prompt - v_empty)


class _Texts:
    """What a model's blocks see of prompts; without gradients it is kept until weights change."""

    def __init__(self, model: ShapesModel):
        self.model = model
        self.version = -1
        self.rows: dict[str, int] = {}
        self.keys: TextKeys | None = None

    def __call__(self, prompts: Sequence[str]) -> TextKeys:
        different = list(dict.fromkeys(prompts))
        if torch.is_grad_enabled():
            row_of, keys = {text: row for row, text in enumerate(different)}, self._read(different)
        else:
            keys, row_of = self._kept(different), self.rows
        return keys[torch.tensor([row_of[text] for text in prompts])]

    def _read(self, texts: Sequence[str]) -> TextKeys:
        encoded = self.model.encode_text([language.tokenize(text) for text in texts])
        return self.model.text_keys(encoded)

    def _kept(self, different: Sequence[str]) -> TextKeys:
        # Every change in place, an optimiser's too, raises a tensor's version.
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self.version or len(self.rows) > _MAX_TEXTS:
            self.version, self.rows, self.keys = version, {}, None
        new = [text for text in different if text not in self.rows]
        if new:
            read = self._read(new)
            self.rows |= {text: len(self.rows) + row for row, text in enumerate(new)}
            self.keys = read if self.keys is None else TextKeys.cat([self.keys, read])
        assert self.keys is not None
        return self.keys
