"""Prompt and image to score."""

from __future__ import annotations

from typing import Any

_NAMES = ("Rubric", "Term", "score_images", "shapes_rubric")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flowloom.score import rubric

    return getattr(rubric, name)
