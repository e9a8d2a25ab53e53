"""Grids of pictures with their prompts, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flowloom.render.png import to_uint8

_GAP, _LINE, _FONT = 4, 18, 12
_LEAST_SIDE = 64
"""Smaller pictures are enlarged by a whole number of times."""
_PAPER, _INK, _SOFT = (255, 255, 255), (29, 31, 34), (99, 104, 111)


def write_comparison(
    path: Path,
    prompts: Sequence[str],
    sides: Mapping[str, Sequence[Sequence[np.ndarray]]],
    num_columns: int = 2,
) -> None:
    """Write a PNG: under each prompt one row of pictures for each generator, noise by noise.

    Args:
        path: File to write.
        prompts: One per group of pictures.
        sides: What a generator is called, such as base and tuned, to its pictures by prompt: the
            same number for each prompt, the same noise in the same column, `[3, H, W]` in [-1, 1],
            all of one size.
        num_columns: Prompts beside each other.

    Raises:
        ValueError: A generator has not as many groups as there are prompts.
    """
    from PIL import Image, ImageDraw, ImageFont

    for name, rows in sides.items():
        if len(rows) != len(prompts):
            raise ValueError(
                f"grid: got pictures of {len(rows)} prompts for {name!r}, expected {len(prompts)}"
            )
    first = next(iter(sides.values()))[0]
    zoom = max(1, -(-_LEAST_SIDE // first[0].shape[1]))
    height, width = (side * zoom for side in first[0].shape[1:])
    font = ImageFont.load_default(_FONT)
    margin = max(round(font.getlength(name)) + 2 * _GAP for name in sides)
    texts = max(round(font.getlength(prompt)) for prompt in prompts)
    cell_width = max(margin + len(first) * (width + _GAP), texts) + 3 * _GAP
    cell_height = _LINE + len(sides) * (height + _GAP) + 2 * _GAP
    num_lines = -(-len(prompts) // num_columns)
    size = (min(num_columns, len(prompts)) * cell_width, num_lines * cell_height)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    for index, prompt in enumerate(prompts):
        left = index % num_columns * cell_width + _GAP
        top = index // num_columns * cell_height + _GAP
        pen.text((left, top), prompt, fill=_INK, font=font)
        for row, (name, rows) in enumerate(sides.items()):
            y = top + _LINE + row * (height + _GAP)
            pen.text((left, y + height / 2), name, fill=_SOFT, font=font, anchor="lm")
            for column, image in enumerate(rows[index]):
                picture = Image.fromarray(to_uint8(image))
                picture = picture.resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(picture, (left + margin + column * (width + _GAP), y))
    canvas.save(path)
