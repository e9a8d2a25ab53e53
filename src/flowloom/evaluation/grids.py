"""The picture pair grid: two policies on the same prompts and noise, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ZOOM, GAP, LINE = 3, 6, 16
_SIZE = 32
_PAPER, _INK, _SOFT = (255, 255, 255), (29, 31, 34), (99, 104, 111)


def write_pair_grid(
    path: Path, folder: Path, examples: Sequence[dict[str, Any]], sides: Sequence[tuple[str, str]]
) -> None:
    """Write a PNG: one line per prompt, its designs by the policies side by side, scores below.

    Args:
        path: File to write.
        folder: Where the examples' pictures lie.
        examples: As in `examples.json`.
        sides: Policies from left to right, with what to call them.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    cell = _SIZE * ZOOM
    num_seeds = max(len(e["designs"][name]["renders"]) for e in examples for name, _ in sides)
    side_width = num_seeds * (cell + GAP) + 3 * GAP
    height = 2 * LINE + cell + 2 * GAP
    canvas = Image.new(
        "RGB", (len(sides) * side_width + GAP, LINE + GAP + len(examples) * height), _PAPER
    )
    pen = ImageDraw.Draw(canvas)
    for column, (_, label) in enumerate(sides):
        pen.text((GAP + column * side_width, 3), label, fill=_INK, font=font)
    for row, example in enumerate(examples):
        top = LINE + GAP + row * height
        pen.text((GAP, top), example["prompt"], fill=_INK, font=font)
        for column, (name, _) in enumerate(sides):
            for index, render in enumerate(example["designs"][name]["renders"]):
                left = GAP + column * side_width + index * (cell + GAP)
                with Image.open(folder / render["picture"]) as picture:
                    # Designs may scale their pictures; the judge looks at the native size too.
                    tile = picture.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
                canvas.paste(tile, (left, top + LINE))
                text = f"{render['score']:.2f}"
                pen.text((left, top + LINE + cell + 1), text, fill=_SOFT, font=font)
    canvas.save(path)
