"""Text chunks of PNG files, where ComfyUI keeps the workflow that made a picture.

Chunk `prompt` holds API JSON, chunk `workflow` the editor's format (COMFYUI.md 4). Reading needs no
imaging library and is bounded: files come from strangers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class PngError(ValueError):
    """A file is no PNG, or breaks a bound; the message says what, where, got, expected."""


def read_chunks(source: str | Path | bytes) -> dict[str, str]:
    """Texts by key (tEXt, zTXt, iTXt) of a PNG file or of its bytes; the first of equal keys.

    Raises:
        PngError: it is no PNG, is cut off, or a text is larger than the bound.
    """
    raise NotImplementedError


def write_chunks(path: str | Path, texts: Mapping[str, str]) -> None:
    """Put texts into an existing PNG file, in place of those with equal keys; whole or not at all.

    Raises:
        PngError: the file is no PNG, or a key is not 1 to 79 Latin-1 characters.
    """
    raise NotImplementedError
