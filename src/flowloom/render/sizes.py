"""Sides of pictures and latents as nodes set them, and the limit on pixels."""

from __future__ import annotations

from torch import Tensor

from flowloom.render import images
from flowloom.workflow import Catalogue

PATCH = 4
"""Sides of latents are whole patches of this many pixels."""


def check_pixels(catalogue: Catalogue, height: int, width: int) -> None:
    """Refuse a picture above the catalogue's limit.

    Raises:
        ValueError: It has too many pixels.
    """
    limit = catalogue.limits.pixels
    if height * width > limit:
        raise ValueError(f"size: got {width} x {height} pixels, expected at most {limit} in all")


def whole_patches(side: float) -> int:
    """The side rounded down to whole patches, at least one."""
    return max(int(side) // PATCH, 1) * PATCH


def scaled(sides: tuple[int, int], factor: float) -> tuple[int, int]:
    """Sides times a factor, rounded to whole patches."""
    height, width = (max(round(side / PATCH * factor), 1) * PATCH for side in sides)
    return height, width


def wanted(sides: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Sides that a node asks for, where 0 is what keeps the shape and two zeros keep the size."""
    if height == width == 0:
        return sides
    if width == 0:
        width = max(1, round(sides[1] * height / sides[0]))
    elif height == 0:
        height = max(1, round(sides[0] * width / sides[1]))
    return height, width


def center_crop(x_CHW: Tensor, height: int, width: int) -> Tensor:
    """The middle of a picture, as much of it as has the shape of `height` x `width`."""
    old_height, old_width = x_CHW.shape[1:]
    top = left = 0
    if old_width * height > width * old_height:
        left = min(round((old_width - old_height * width / height) / 2), (old_width - 1) // 2)
    else:
        top = min(round((old_height - old_width * height / width) / 2), (old_height - 1) // 2)
    return x_CHW[:, top : old_height - top, left : old_width - left]


def cut_to_patches(x_CHW: Tensor) -> Tensor:
    """The middle of a picture whose sides are whole patches.

    Raises:
        ValueError: A side is less than a patch.
    """
    height, width = x_CHW.shape[1:]
    if min(height, width) < PATCH:
        raise ValueError(f"size: got {width} x {height} pixels, expected sides of {PATCH} and more")
    top, left = height % PATCH // 2, width % PATCH // 2
    return x_CHW[
        :, top : top + height // PATCH * PATCH, left : left + width // PATCH * PATCH
    ].contiguous()


def resized(x_CHW: Tensor, height: int, width: int, method: str, crop: str = "disabled") -> Tensor:
    """Resample, after cutting the middle out where `crop` is `center`."""
    if crop == "center":
        x_CHW = center_crop(x_CHW, height, width)
    return images.resize(x_CHW[None], height, width, method)[0]
