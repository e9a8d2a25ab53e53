"""Scores as a condition: a word before the prompt says how good the workflow after it is.

ComfyGen-FT (arXiv 2410.01731) trains on workflows of every quality with their score in the prompt,
and asks for the highest score when it is used. Here a score is the quantile of a cell among those
of its prompt, so that easy prompts have no better words than hard ones. The word stands first,
where a long prompt that is cut keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flowloom.runs import write_json

LEVELS_FILE = "score_levels.json"
MAX_LEVELS = 26


def prompt_with_level(prompt: str, level: int) -> str:
    """The prompt after the word of a level, 0 for the worst: letters only, one word of any text."""
    return f"scorelevel{chr(ord('a') + level)} {prompt}"


def prompt_for_best(prompt: str, levels: int | None) -> str:
    """The prompt that asks a designer trained with `levels` levels for the best; None is plain."""
    return prompt if levels is None else prompt_with_level(prompt, levels - 1)


def levels_of(scores: Mapping[tuple[str, str], float], num: int) -> dict[tuple[str, str], int]:
    """Level of each cell: its quantile among the cells of its prompt, in `num` equal parts.

    Args:
        scores: (prompt, fingerprint) to score, such as `selection.shrunk_means`.
        num: Levels.

    Returns:
        Each cell's level, 0 to `num - 1`; equal scores of a prompt share one.
    """
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), score in scores.items():
        by_prompt.setdefault(prompt, []).append(score)
    ranked = {prompt: np.sort(values) for prompt, values in by_prompt.items()}

    def level(prompt: str, score: float) -> int:
        ranks = ranked[prompt]
        below = np.searchsorted(ranks, score, "left") + np.searchsorted(ranks, score, "right")
        return min(int(num * below / (2 * len(ranks))), num - 1)

    return {cell: level(cell[0], score) for cell, score in scores.items()}


def save_levels(folder: Path, levels: int | None) -> None:
    """Record in a designer folder what it was trained with; nothing without levels."""
    if levels is not None:
        write_json(folder / LEVELS_FILE, {"levels": levels})


def load_levels(designer_dir: Path) -> int | None:
    """Levels that a designer was trained with, for `prompt_for_best`; None if with none."""
    path = designer_dir / LEVELS_FILE
    return json.loads(path.read_text())["levels"] if path.is_file() else None
