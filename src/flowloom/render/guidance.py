"""What a GUIDER link carries, and how it makes one denoised picture of several predictions.

Every guider is one formula over the predictions D_0, D_1, ... of its conditionings,

    D = scale * guide(D_pair[0], D_pair[1], cfg) + sum_k extra_k D_k,

where `guide` is classifier-free guidance, rescaled where the model says so (RescaleCFG).

Shapes: N rows of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowloom.render import samplers
from flowloom.render.conditioning import Texts
from flowloom.render.models import Weights


@dataclasses.dataclass(frozen=True)
class Model:
    """What a MODEL link carries."""

    weights: Weights
    """Of the transformer."""
    shift: float = 1.0
    """Time shift (ModelSamplingSD3, ModelSamplingAuraFlow)."""
    rescale: float = 0.0
    """Multiplier of RescaleCFG; 0 is off."""


@dataclasses.dataclass(frozen=True, eq=False)
class Guider:
    """A model, the conditionings it is called with, and the formula of the module."""

    model: Model
    conditionings: tuple[Texts, ...]
    """Those whose prediction is needed, first the one that is wanted."""
    pair: tuple[int, int] | None = None
    """Which two `cfg` is between; None where the first prediction is taken as it is."""
    cfg: float = 1.0
    scale: float = 1.0
    extra: tuple[float, ...] = ()
    """Empty where all are 0."""


def basic(model: Model, positive: Texts) -> Guider:
    """No guidance (BasicGuider)."""
    return Guider(model, (positive,))


def classifier_free(model: Model, positive: Texts, negative: Texts, cfg: float) -> Guider:
    """Guidance away from a negative; ComfyUI leaves the negative's call out where `cfg` is 1."""
    if math.isclose(cfg, 1.0):
        return basic(model, positive)
    return Guider(model, (positive, negative), (0, 1), cfg)


def dual(
    model: Model,
    first: Texts,
    second: Texts,
    negative: Texts,
    cfg_conds: float,
    cfg_second: float,
    nested: bool,
) -> Guider:
    """Guidance between three conditionings (DualCFGGuider), with a = cfg_conds, b = cfg_second.

    regular: D = guide(D_2, D_neg, b) + a (D_1 - D_2).
    nested: D = D_neg + b (guide(D_1, D_2, a) - D_neg).
    """
    if nested:
        extra = (0.0, 0.0, 1 - cfg_second)
        return Guider(model, (first, second, negative), (0, 1), cfg_conds, cfg_second, extra)
    if math.isclose(cfg_second, 1.0):
        if math.isclose(cfg_conds, 1.0):
            return basic(model, first)
        # The negative has no weight; this is guidance by `a`, but without rescaling.
        return Guider(model, (first, second), (1, 1), 1.0, 1.0, (cfg_conds, -cfg_conds))
    extra = (cfg_conds, -cfg_conds, 0.0)
    return Guider(model, (first, second, negative), (1, 2), cfg_second, 1.0, extra)


class Rows:
    """The guiders of N rows, ready to be applied at every step."""

    def __init__(self, guiders: Sequence[Guider]):
        """Sort the rows by what is to be done to them."""
        self.num_slots = max(len(guider.conditionings) for guider in guiders)
        self._guiders = guiders
        plain = [
            row
            for row, guider in enumerate(guiders)
            if guider.pair == (0, 1) and not guider.extra and guider.scale == 1
        ]
        self._plain = torch.tensor(plain)
        self._all_plain = len(plain) == len(guiders)
        self._cfg = torch.tensor([guiders[row].cfg for row in plain])
        self._rescale = torch.tensor([guiders[row].model.rescale for row in plain])
        self._other = [
            row for row, guider in enumerate(guiders) if guider.extra or guider.scale != 1
        ]

    def apply(self, x_NCHW: Tensor, predictions: Sequence[Tensor]) -> Tensor:
        """Guided denoised pictures.

        Args:
            x_NCHW: States.
            predictions: By conditioning, `[N, C, H, W]` each; rows without it hold anything.
        """
        wanted = predictions[0]
        if self._all_plain:
            return _guided(x_NCHW, wanted, predictions[1], self._cfg, self._rescale)
        out = wanted.clone()
        if len(self._plain):
            rows = self._plain
            positive, negative = (prediction[rows] for prediction in predictions[:2])
            out[rows] = _guided(x_NCHW[rows], positive, negative, self._cfg, self._rescale)
        for row in self._other:
            guider, one = self._guiders[row], slice(row, row + 1)
            assert guider.pair is not None
            positive, negative = (predictions[slot][one] for slot in guider.pair)
            cfg, rescale = torch.tensor([guider.cfg]), torch.tensor([guider.model.rescale])
            picture = guider.scale * _guided(x_NCHW[one], positive, negative, cfg, rescale)
            for slot, weight in enumerate(guider.extra):
                if weight:
                    picture = picture + weight * predictions[slot][one]
            out[one] = picture
        return out


def _guided(
    x_NCHW: Tensor, positive: Tensor, negative: Tensor, cfg_N: Tensor, rescale_N: Tensor
) -> Tensor:
    out = samplers.guide(positive, negative, cfg_N)
    rows = torch.nonzero(rescale_N).flatten()
    if len(rows):
        out[rows] = samplers.rescale_guidance(
            x_NCHW[rows], positive[rows], out[rows], rescale_N[rows]
        )
    return out
