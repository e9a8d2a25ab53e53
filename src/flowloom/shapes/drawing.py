"""Clean pictures of the shapes world: what the models learn from and what the detector knows.

A picture is 32 x 32 RGB in [-1, 1]: flat background, every object a flat binary mask of 7 or 11 px.
Centres lie on a 4 px grid that always meets the models' 4 px patches alike; bounding boxes keep at
least 1 px between them. From two objects on there are few arrangements: models that saw objects
anywhere drew the right ones in wrong numbers and places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, PromptSpec

SIZE = 32
BACKGROUND = -0.7
PIXELS = {"small": 7, "large": 11}
PALETTE = {
    "red": (0.9, -0.9, -0.8),
    "green": (-0.7, 0.8, -0.7),
    "blue": (-0.7, -0.4, 1.0),
    "yellow": (1.0, 0.95, -0.8),
    "purple": (0.5, -0.8, 0.9),
    "cyan": (-0.6, 0.9, 0.95),
    "orange": (1.0, 0.0, -0.9),
    "white": (1.0, 1.0, 1.0),
}
# From four objects on, and for three of a kind: places on a 3 x 3 lattice, as on dice and dominoes.
_ARRANGEMENTS = {
    3: ((0, 4, 8), (2, 4, 6), (3, 4, 5), (1, 4, 7)),
    4: ((0, 2, 6, 8), (1, 3, 5, 7), (0, 1, 3, 4)),
    5: ((0, 2, 4, 6, 8), (1, 3, 4, 5, 7), (0, 1, 2, 4, 7)),
    6: ((0, 2, 3, 5, 6, 8), (0, 1, 2, 6, 7, 8), (0, 1, 2, 3, 4, 5)),
}
_NEAR, _FAR = 10, 22
"""Rows and columns on which two or three different objects stand; large ones fit too."""
_GRID = np.arange(6, 27, 4)


@dataclasses.dataclass(frozen=True)
class Placed:
    """One object of a picture."""

    shape: str
    """One of `SHAPES`."""
    color: str
    """One of `COLORS`."""
    size: str
    """One of `SIZES`."""
    row: int
    """Of its centre, pixels from the top."""
    column: int
    """Of its centre, pixels from the left."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right in pixels; bottom and right are the first ones outside."""
        half = PIXELS[self.size] // 2
        return self.row - half, self.column - half, self.row + half + 1, self.column + half + 1


def mask(shape: str, pixels: int) -> np.ndarray:
    """Binary mask of one shape, `[pixels, pixels]` bool; `pixels` is odd."""
    half = pixels // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    if shape == "circle":
        return x**2 + y**2 <= (half + 0.3) ** 2
    if shape == "square":
        return np.ones((pixels, pixels), bool)
    if shape == "triangle":
        return np.abs(x) <= (y + half + 1) // 2
    if shape == "star":
        return np.sqrt(np.abs(x)) + np.sqrt(np.abs(y)) <= {3: 2.0, 5: 2.75}[half]
    raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")


MASKS = {(shape, size): mask(shape, PIXELS[size]) for shape in SHAPES for size in SIZES}


def render(
    spec: PromptSpec,
    rng: np.random.Generator,
    *,
    colors: Sequence[str] = COLORS,
    size: int = SIZE,
) -> np.ndarray:
    """Draw one picture that a prompt describes exactly; see `compose` and `draw`."""
    return draw(compose(spec, rng, colors=colors), size)


def compose(
    spec: PromptSpec, rng: np.random.Generator, *, colors: Sequence[str] = COLORS
) -> tuple[Placed, ...]:
    """Choose what a prompt leaves open.

    Args:
        spec: What to show.
        rng: Source of layout, open colours and open sizes.
        colors: Colours that may stand where the prompt names none.
    """
    items = []
    for item in spec.objects:
        tint = item.color or colors[int(rng.integers(len(colors)))]
        # Three and more of a kind are small, or they would not fit.
        scale = item.size or SIZES[int(rng.integers(2))]
        if item.count > 2:
            scale = "small"
        items += [(item.shape, tint, scale)] * item.count
    places = _layout(items, spec.relation, rng)
    return tuple(
        Placed(shape, tint, scale, int(row), int(column))
        for (shape, tint, scale), (row, column) in zip(items, places, strict=True)
    )


def draw(objects: Sequence[Placed], size: int = SIZE) -> np.ndarray:
    """Paint objects on the background, later ones over earlier ones.

    Args:
        objects: What to paint; boxes lie inside the picture.
        size: Side in pixels; other sizes than 32 are enlarged by repetition (a multiple of 32).

    Returns:
        `[3, size, size]` float32 in [-1, 1].

    Raises:
        ValueError: `size` is not a multiple of 32.
    """
    if size % SIZE:
        raise ValueError(f"size: got {size}, expected a multiple of {SIZE}")
    picture = np.full((3, SIZE, SIZE), BACKGROUND, np.float32)
    for item in objects:
        top, left, bottom, right = item.box
        window = picture[:, top:bottom, left:right]
        window[:, MASKS[item.shape, item.size]] = np.asarray(PALETTE[item.color], np.float32)[
            :, None
        ]
    repeat = size // SIZE
    return picture if repeat == 1 else picture.repeat(repeat, 1).repeat(repeat, 2)


def _layout(
    items: Sequence[tuple[str, str, str]], relation: str | None, rng: np.random.Generator
) -> np.ndarray:
    """Centres `[n, 2]` (row, column) whose boxes keep 1 px apart and satisfy the relation."""
    if len(items) == 1:
        return rng.choice(_GRID, 2)[None]
    if relation is not None:
        across = rng.choice((_NEAR, _FAR))
        first, second = (_NEAR, _FAR) if relation in ("left", "above") else (_FAR, _NEAR)
        if relation in ("left", "right"):
            return np.array([[across, first], [across, second]])
        return np.array([[first, across], [second, across]])
    if len(items) == 2 or len(set(items)) == 3:
        places = rng.permutation(4)[: len(items)]
        return np.where(np.stack([places // 2, places % 2], 1) == 0, _NEAR, _FAR)
    # The lattice is 8 px apart, in one of its four places on the 4 px grid.
    choices = _ARRANGEMENTS[len(items)]
    slots = np.array(choices[rng.integers(len(choices))])
    origin = rng.integers(0, 2, 2)
    return np.stack([_GRID[origin[0] + 2 * (slots // 3)], _GRID[origin[1] + 2 * (slots % 3)]], 1)
