"""Which of a prompt's rendered workflows are good, when single renders are mostly noise.

A cell is a (prompt, workflow) pair; its score is modelled as

    y = kind + prompt + workflow + cell + render noise,

every effect but the kind's with mean zero and a variance of its own. Variances come from moments,
effects from their posterior means given the coarser ones (James and Stein's shrinkage): a cell seen
in few seeds is drawn toward what its workflow and kind do elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shrunk_means(
    prompts: Sequence[str],
    kinds: Sequence[str],
    fingerprints: Sequence[str],
    scores: Sequence[float],
) -> dict[tuple[str, str], float]:
    """Posterior mean score of each cell.

    Args:
        prompts: Prompt of each render.
        kinds: Its kind.
        fingerprints: Its workflow.
        scores: Its score.

    Returns:
        (prompt, fingerprint) to score, in order of first appearance.

    Raises:
        ValueError: A score is not finite, or there is none.
    """
    y = np.asarray(scores, float)
    if not len(y) or not np.isfinite(y).all():
        raise ValueError(f"scores: got {len(y)} with non-finite ones, expected finite scores")
    cells = list(zip(prompts, fingerprints, strict=True))
    names, cell = _index(cells)
    num_seeds = np.bincount(cell)
    means = np.bincount(cell, y) / num_seeds
    freedom = len(y) - len(names)
    noise = ((y - means[cell]) ** 2).sum() / freedom if freedom else 0.0

    first = np.zeros(len(names), int)
    first[cell[::-1]] = np.arange(len(y))[::-1]
    levels = [_index([values[i] for i in first])[1] for values in (kinds, prompts, fingerprints)]
    error = noise / num_seeds
    fitted = (np.bincount(levels[0], means) / np.bincount(levels[0]))[levels[0]]
    for level in levels[1:]:
        fitted = fitted + _effect(means - fitted, level)[level]
    rest = means - fitted
    variance = max(float((rest**2).mean() - error.mean()), 0.0)
    shrink = variance / (variance + error) if variance else np.zeros(len(names))
    return dict(zip(names, (fitted + shrink * rest).tolist(), strict=True))


def best_cells(shrunk: dict[tuple[str, str], float], num_per_prompt: int) -> list[tuple[str, str]]:
    """The best cells of each prompt, best first; ties go to the smaller fingerprint."""
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for (prompt, fingerprint), score in shrunk.items():
        by_prompt.setdefault(prompt, []).append((-score, fingerprint))
    return [
        (prompt, fingerprint)
        for prompt, cells in by_prompt.items()
        for _, fingerprint in sorted(cells)[:num_per_prompt]
    ]


def _index(values: Sequence) -> tuple[list, np.ndarray]:
    """Distinct values in order of first appearance, and the index of each."""
    names = dict.fromkeys(values)
    order = {name: k for k, name in enumerate(names)}
    return list(names), np.array([order[value] for value in values])


def _effect(rest: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Shrunk mean of `rest` in each group of `level`.

    With s^2 the variance within groups and k members, the raw means vary by a^2 + s^2 / k; the
    effect is a^2 / (a^2 + s^2 / k) of the raw mean.
    """
    size = np.bincount(level)
    raw = np.bincount(level, rest) / size
    freedom = len(rest) - len(size)
    if freedom == 0:
        return np.zeros(len(size))
    within = ((rest - raw[level]) ** 2).sum() / freedom
    between = max(float((size * (raw**2 - within / size)).sum() / size.sum()), 0.0)
    return raw * between / (between + within / size) if between else np.zeros(len(size))
