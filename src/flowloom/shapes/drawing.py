"""Clean pictures of the shapes world: what the models learn from and what the detector knows.

A picture is 32 x 32 RGB in [-1, 1]: flat background, every object a flat binary mask of 7 or 11 px.
Centres lie on a 4 px grid that always meets the models' 4 px patches alike; bounding boxes keep at
least 1 px between them.
"""

from __future__ import annotations

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
# From three objects on: places on a 3 x 3 lattice, as on dice and dominoes. With free places the
# models drew the right objects in wrong numbers; few arrangements let them learn to count.
_ARRANGEMENTS = {
    3: ((0, 4, 8), (2, 4, 6), (3, 4, 5), (1, 4, 7)),
    4: ((0, 2, 6, 8), (1, 3, 5, 7), (0, 1, 3, 4)),
    5: ((0, 2, 4, 6, 8), (1, 3, 4, 5, 7), (0, 1, 2, 4, 7)),
    6: ((0, 2, 3, 5, 6, 8), (0, 1, 2, 6, 7, 8), (0, 1, 2, 3, 4, 5)),
}
_GRID = np.arange(6, 27, 4)
_CELLS = np.array([(y, x) for y in _GRID for x in _GRID])


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
    """Draw one picture that a prompt describes exactly.

    Args:
        spec: What to draw; colours and sizes it leaves open are drawn at random.
        rng: Source of layout, open colours and open sizes.
        colors: Colours that may stand where the prompt names none.
        size: Side in pixels; other sizes than 32 are enlarged by repetition (a multiple of 32).

    Returns:
        `[3, size, size]` float32 in [-1, 1].

    Raises:
        ValueError: `size` is not a multiple of 32.
    """
    if size % SIZE:
        raise ValueError(f"size: got {size}, expected a multiple of {SIZE}")
    items = []
    for item in spec.objects:
        tint = item.color or colors[int(rng.integers(len(colors)))]
        # From three objects on only small ones fit; below, all objects of a count share one size.
        scale = item.size or SIZES[int(rng.integers(2))]
        if item.count > 2:
            scale = "small"
        items += [(item.shape, tint, scale)] * item.count
    picture = np.full((3, SIZE, SIZE), BACKGROUND, np.float32)
    for (shape, tint, scale), (y, x) in zip(items, _layout(items, spec.relation, rng), strict=True):
        half = PIXELS[scale] // 2
        window = picture[:, y - half : y + half + 1, x - half : x + half + 1]
        window[:, MASKS[shape, scale]] = np.asarray(PALETTE[tint], np.float32)[:, None]
    repeat = size // SIZE
    return picture if repeat == 1 else picture.repeat(repeat, 1).repeat(repeat, 2)


def _layout(items: list, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    """Centres `[n, 2]` (row, column) whose boxes keep 1 px apart and satisfy the relation."""
    if len(items) > 2:
        # The lattice is 8 px apart, in one of its four places on the 4 px grid.
        choices = _ARRANGEMENTS[len(items)]
        slots = np.array(choices[rng.integers(len(choices))])
        origin = rng.integers(0, 2, 2)
        return np.stack(
            [_GRID[origin[0] + 2 * (slots // 3)], _GRID[origin[1] + 2 * (slots % 3)]], 1
        )
    first = _CELLS[rng.integers(len(_CELLS))]
    if len(items) == 1:
        return first[None]
    apart = (PIXELS[items[0][2]] + PIXELS[items[1][2]]) // 2 + 1
    while True:
        dy, dx = (_CELLS - first).T
        free = np.maximum(np.abs(dy), np.abs(dx)) >= apart
        if relation:
            along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
            across = dy if relation in ("left", "right") else dx
            free &= along >= np.abs(across) + 4
        places = np.flatnonzero(free)
        if len(places):
            return np.stack([first, _CELLS[rng.choice(places)]])
        first = _CELLS[rng.integers(len(_CELLS))]
