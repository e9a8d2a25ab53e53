"""What is known of pictures without a reward: features to tell them apart by, errors to clean ones.

In the shapes world features are soft maps of what the detector sees. Noise of deviation .2 and a
fade by 15 % leave them as they are, where it moves pixels by .43 of the distance between layouts of
one prompt, and a pyramid of means by .18; another shape moves them by .48 of that distance and the
pyramid by .35.

Shapes: B pictures, C channels, H x W pixels, O detections, K attributes, G cells a side, F
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.score.scorers import read_prompt
from flowloom.shapes import detector
from flowloom.shapes.drawing import SIZE
from flowloom.shapes.redrawing import redrawing_errors

CELL, BLUR = 4, 3.0
"""Side of a map's cell and deviation of an object's place in it, pixels."""
_SCALE = 6**-0.5
"""An object that moves far changes shape, size and colour at two places: that is distance 1."""


@dataclasses.dataclass(frozen=True)
class PictureFacts:
    """Facts of a batch of pictures."""

    features_BF: np.ndarray
    """An embedding whose distances mean something."""
    errors: dict[str, np.ndarray]
    """Named errors `[B]`, less is better; where nothing of the kind is known, none."""


Look = Callable[[Sequence[str], Tensor], PictureFacts]
"""`(prompts, images_BCHW)`, pictures in [-1, 1]."""


def pyramid(prompts: Sequence[str], images_BCHW: Tensor) -> PictureFacts:
    """Means over 8 x 8 and 4 x 4 cells: features of any pictures, where no embedding is at hand."""
    parts = [F.adaptive_avg_pool2d(images_BCHW.double(), side).flatten(1) for side in (8, 4)]
    # A value stands for its share of the picture: the distance is one of root mean squares.
    features = [part / part.shape[1] ** 0.5 for part in parts]
    return PictureFacts(torch.cat(features, 1).numpy(), {})


def look_at_shapes(prompts: Sequence[str], images_BCHW: Tensor) -> PictureFacts:
    """Facts in the shapes world; pictures of other sizes are judged at its native size.

    Errors: `shown` and `asked` of `flowloom.shapes.redrawing`.

    Raises:
        ValueError: A prompt is outside the language.
        FloatingPointError: A picture is not finite.
    """
    seen = detector.detect(images_BCHW)
    specs = [read_prompt(prompt) for prompt in prompts]
    return PictureFacts(object_maps(seen), redrawing_errors(images_BCHW, specs, seen))


def object_maps(seen: detector.Detections) -> np.ndarray:
    """Where each shape, size and colour is seen, `[B, K * G * G]`.

    Every detection adds its existence times its probabilities, as a bump of unit length at its
    place. Distances: 1 for an object moved far, .58 for one of another colour, 1.2 (clipped by the
    overlap) for another layout of a mean prompt.
    """
    odds = seen.attributes_BOSZK
    names_BOK = torch.cat([odds.sum((3, 4)), odds.sum((2, 4)), odds.sum((2, 3))], 2)
    names_BOK = names_BOK * seen.exists_BO[..., None]
    middles_G = torch.arange(SIZE // CELL) * CELL + (CELL - 1) / 2
    away_BO2G = seen.centers_BO2[..., None].float() - middles_G
    bumps_BO2G = torch.exp(-away_BO2G.square() / (2 * BLUR**2))
    bumps_BO2G = bumps_BO2G / bumps_BO2G.square().sum(-1, keepdim=True).sqrt()
    rows_BOG, columns_BOG = bumps_BO2G.unbind(2)
    maps_BKGG = torch.einsum("bok,bog,boh->bkgh", names_BOK, rows_BOG, columns_BOG)
    return maps_BKGG.flatten(1).double().numpy() * _SCALE
