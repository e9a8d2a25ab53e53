"""Errors of pictures to clean drawings: of what is seen on them, and of what was asked for.

They see what the detector forgives: blurred edges, wrong tints, dirt, values out of range.

Shapes: B pictures, C channels, H x W pixels, O detections; S shapes, Z sizes, K colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flowloom.shapes import detector
from flowloom.shapes.drawing import BACKGROUND, MASKS, PALETTE, PIXELS, SIZE, Placed
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, PromptSpec


def redrawing_errors(
    images_BCHW: Tensor, specs: Sequence[PromptSpec], seen: detector.Detections
) -> dict[str, np.ndarray]:
    """Mean squared errors per value at the native size, `[B]` each.

    Args:
        images_BCHW: Pictures in [-1, 1].
        specs: What was asked for.
        seen: What `detector.detect` found on them.

    Returns:
        `shown`: to the best clean drawing of what is seen. `asked`: to a clean drawing of what was
        asked for, at the places where that is seen best; an object for which nothing is seen costs
        what leaving it out of a drawing would.
    """
    pictures = detector.to_native(images_BCHW.float()).numpy()
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
    return {"shown": np.array(shown), "asked": np.array(asked)}


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
