"""Grids of pictures with their prompts, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from flowloom.render.png import to_uint8

_GAP, _LINE, _ZOOM = 4, 14, 2


def write_grid(
    path: Path, prompts: Sequence[str], rows: Sequence[Sequence[np.ndarray]], num_columns: int = 2
) -> None:
    """Write a PNG: under each prompt its pictures side by side, `num_columns` prompts to a line.

    Args:
        path: File to write.
        prompts: One per group of pictures.
        rows: For each prompt its pictures, `[3, H, W]` in [-1, 1], all of one size.
        num_columns: Prompts beside each other.
    """
    height, width = rows[0][0].shape[1:]
    height, width = height * _ZOOM, width * _ZOOM
    cell_width = len(rows[0]) * (width + _GAP) + 2 * _GAP
    cell_height = _LINE + height + 2 * _GAP
    num_lines = -(-len(prompts) // num_columns)
    canvas = Image.new("RGB", (num_columns * cell_width, num_lines * cell_height), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (prompt, images) in enumerate(zip(prompts, rows, strict=True)):
        left = index % num_columns * cell_width + _GAP
        top = index // num_columns * cell_height + _GAP
        pen.text((left, top), prompt, fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(to_uint8(image)).resize(
                (width, height), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (left + column * (width + _GAP), top + _LINE))
    canvas.save(path)
