"""Charts of reward against pictures drawn, for several methods.

Shapes: R runs (training seeds), N judgements of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.stats import t as student

COLORS = ("#0b7a75", "#c46a1b", "#6a5acd", "#8a8f98", "#b03a5b", "#3b6ea5")
_SOFT, _GRID = "#636870", "#e4e6ea"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One method's rewards over its course."""

    images_N: np.ndarray
    """Pictures drawn for training until each judgement."""
    rewards_RN: np.ndarray
    """Reward of each run at each judgement."""


def band(rewards_RN: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs and the ends of its Student interval, `[N]` each; one run has no width."""
    num_runs = len(rewards_RN)
    mean_N = rewards_RN.mean(0)
    if num_runs < 2:
        return mean_N, mean_N, mean_N
    factor = float(student.ppf((1 + level) / 2, num_runs - 1))
    half_N = factor * rewards_RN.std(0, ddof=1) / num_runs**0.5
    return mean_N, mean_N - half_N, mean_N + half_N


def write_reward_chart(path: Path, panels: Mapping[str, Mapping[str, Curve]]) -> None:
    """Write a chart, PNG or SVG by its name: one panel per reward, one line per method.

    Lines are means over runs, bands their 95 % intervals, faint lines the runs. All panels count
    the same pictures and share the colours of methods.

    Args:
        path: File to write.
        panels: What a reward is called ("trained on", "not trained on") to methods and their
            curves.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    color_of = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    figure, axes_row = plt.subplots(
        1,
        len(panels),
        figsize=(4.6 * len(panels), 3.7),
        dpi=120,
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (title, curves) in zip(axes_row[0], panels.items(), strict=True):
        for name, curve in curves.items():
            color = color_of[name]
            mean_N, low_N, high_N = band(curve.rewards_RN)
            if len(curve.rewards_RN) > 1:
                axes.plot(curve.images_N, curve.rewards_RN.T, color=color, lw=0.7, alpha=0.3)
                axes.fill_between(
                    curve.images_N, low_N, high_N, color=color, alpha=0.12, linewidth=0
                )
            axes.plot(curve.images_N, mean_N, color=color, lw=1.9, label=name)
        axes.set_title(title, fontsize=10, loc="left", color=_SOFT)
        axes.set_xlabel("pictures drawn for training", fontsize=9, color=_SOFT)
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_SOFT)
        axes.tick_params(labelsize=8.5, labelcolor=_SOFT, length=0)
        axes.margins(x=0.02)
    axes_row[0][0].set_ylabel("mean reward", fontsize=9, color=_SOFT)
    axes_row[0][0].legend(frameon=False, fontsize=9, loc="best")
    # No date or version in it: equal charts have equal bytes.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    plt.close(figure)
