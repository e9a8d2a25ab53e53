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
from flowloom.shapes.drawing import BACKGROUND, MASKS, PALETTE, PIXELS, SIZE, Placed
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, PromptSpec

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

    Errors, mean squared per value: `shown`, to the best clean drawing of what is seen on the
    picture; `asked`, to a clean drawing of what the prompt asks for, at the places where that is
    seen best. An object for which nothing is seen costs what leaving it out of a drawing would.

    Raises:
        ValueError: A prompt is outside the language.
        FloatingPointError: A picture is not finite.
    """
    seen = detector.detect(images_BCHW)
    pictures = detector.to_native(images_BCHW.float()).numpy()
    specs = [read_prompt(prompt) for prompt in prompts]
    shown, asked = [], []
    for row, (picture, spec) in enumerate(zip(pictures, specs, strict=True)):
        exists_O = seen.exists_BO[row].numpy()
        odds_OSZK = seen.attributes_BOSZK[row].numpy()
        centers_O2 = seen.centers_BO2[row].numpy()
        found = [
            _placed(odds_OSZK[o], centers_O2[o]) for o in range(len(exists_O)) if exists_O[o] > 0
        ]
        shown.append(redrawing_error(picture, found, only_better=True))
        wanted, missing = _wanted(spec, exists_O, odds_OSZK, centers_O2)
        error = redrawing_error(picture, wanted, only_better=False)
        asked.append(error + sum(map(_energy, missing)) / picture.size)
    errors = {"shown": np.array(shown), "asked": np.array(asked)}
    return PictureFacts(object_maps(seen), errors)


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


def redrawing_error(
    picture_CHW: np.ndarray, objects: Sequence[Placed], *, only_better: bool
) -> float:
    """Mean squared error of a picture to a clean drawing of objects, painted in their order.

    Args:
        picture_CHW: `[3, 32, 32]`.
        objects: Boxes lie inside the picture.
        only_better: Leave out every object that would make the error larger.
    """
    clean_CHW = np.full_like(picture_CHW, BACKGROUND)
    for item in objects:
        top, left, bottom, right = item.box
        window = clean_CHW[:, top:bottom, left:right]
        target = picture_CHW[:, top:bottom, left:right]
        inside = MASKS[item.shape, item.size]
        tint_C1 = np.asarray(PALETTE[item.color], np.float32)[:, None]
        before = np.square(window[:, inside] - target[:, inside]).sum()
        if only_better and np.square(tint_C1 - target[:, inside]).sum() >= before:
            continue
        window[:, inside] = tint_C1
    return float(np.square(clean_CHW - picture_CHW).mean(dtype=float))


def _placed(odds_SZK: np.ndarray, center_2: np.ndarray) -> Placed:
    """The most probable object at a place, moved until its box lies inside the picture."""
    shape, size, color = np.unravel_index(int(odds_SZK.argmax()), odds_SZK.shape)
    half = PIXELS[SIZES[size]] // 2
    row, column = np.clip(center_2, half, SIZE - 1 - half)
    return Placed(SHAPES[shape], COLORS[color], SIZES[size], int(row), int(column))


def _energy(item: Placed) -> float:
    """Squared difference that an object makes to the background."""
    tint_3 = np.asarray(PALETTE[item.color]) - BACKGROUND
    return float(MASKS[item.shape, item.size].sum() * np.square(tint_3).sum())


def _wanted(
    spec: PromptSpec, exists_O: np.ndarray, odds_OSZK: np.ndarray, centers_O2: np.ndarray
) -> tuple[list[Placed], list[Placed]]:
    """What a prompt asks for: each object where it is seen best, and those that nothing is seen of.

    What the prompt leaves open is as seen.
    """
    free = exists_O > 0
    placed, missing = [], []
    for item in spec.objects:
        named_SZK = np.ones(odds_OSZK.shape[1:])
        named_SZK *= np.array([item.shape == name for name in SHAPES])[:, None, None]
        named_SZK *= np.array([item.size in (None, name) for name in SIZES])[:, None]
        named_SZK *= np.array([item.color in (None, name) for name in COLORS])
        # A combination that the detector rules out is still one of those to choose from.
        match_OSZK = (odds_OSZK + 1e-9) * named_SZK
        value_O = match_OSZK.sum((1, 2, 3)) * exists_O
        for _ in range(item.count):
            if not free.any():
                missing.append(_placed(named_SZK, np.zeros(2)))
                continue
            best = int(np.where(free, value_O, -1).argmax())
            free[best] = False
            placed.append(_placed(match_OSZK[best], centers_O2[best]))
    return placed, missing
