"""PNG files that carry the workflow which made them, as ComfyUI's do.

Chunk `prompt` holds the API format, chunk `workflow` the same laid out as the editor's file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from flowloom.workflow import Catalogue, Workflow, read_chunks, to_ui, write_chunks


def to_uint8(image_CHW: np.ndarray) -> np.ndarray:
    """`[C, H, W]` in [-1, 1] to `[H, W, C]` bytes; -1 is 0 and 1 is 255."""
    clipped = np.clip((image_CHW + 1) / 2, 0, 1)
    return np.round(clipped * 255).astype(np.uint8).transpose(1, 2, 0)


def from_uint8(pixels_HWC: np.ndarray) -> np.ndarray:
    """The inverse of `to_uint8`, up to rounding."""
    return pixels_HWC.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


def write(path: str | Path, image_CHW: np.ndarray, workflow: Workflow | None = None) -> None:
    """Write a picture, with its workflow where given; the file appears whole or not at all.

    Args:
        path: Where to; folders before it are made.
        image_CHW: `[3, H, W]` in [-1, 1].
        workflow: Of the embedded catalogue's classes.

    Raises:
        ValueError: The workflow has a class that the embedded catalogue lacks.
    """
    path = Path(path)
    texts = {}
    if workflow is not None:
        drawn = to_ui(workflow, Catalogue.load("embedded"))
        texts = {"prompt": json.dumps(workflow.to_api()), "workflow": json.dumps(drawn)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        Image.fromarray(to_uint8(image_CHW)).save(partial, format="PNG")
        if texts:
            write_chunks(partial, texts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[np.ndarray, Workflow | None]:
    """Read a picture as `[3, H, W]` float32 in [-1, 1] and the workflow in its chunk `prompt`.

    Raises:
        ValueError: The file is no picture, or the chunk is no workflow.
    """
    try:
        with Image.open(path) as file:
            is_png = file.format == "PNG"
            image = from_uint8(np.asarray(file.convert("RGB")))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: got a file that cannot be read, expected a picture") from error
    text = read_chunks(Path(path)).get("prompt") if is_png else None
    if text is None:
        return image, None
    try:
        return image, Workflow.from_api(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: chunk 'prompt': {error}") from error
