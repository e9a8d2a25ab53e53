"""Prompt and image to score."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Rubric": "rubric",
    "RubricConfig": "config",
    "Standard": "standard",
    "Term": "rubric",
    "TermConfig": "config",
    "build_rubric": "build",
    "get_rubric": "rubric",
    "score_images": "rubric",
    "shapes_rubric": "rubric",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
