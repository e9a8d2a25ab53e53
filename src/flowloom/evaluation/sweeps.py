"""Guidance and temperature varied: what a policy scores against how many workflows it still draws.

Output-space guidance mixes log-probabilities of two policies; the weight-space variant mixes their
weights, theta_w = theta_0 + w (theta_1 - theta_0), and runs one (arXiv 2601.04670 reports that both
move almost linearly during such training).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowloom.designer.design import Designer
from flowloom.designer.loading import extrapolated
from flowloom.evaluation.policies import Draw, sample

OUTPUT, WEIGHTS, TEMPERATURE = "guidance", "guidance in weights", "temperature, no guidance"
"""The curves."""
_LABEL_OFFSETS = {OUTPUT: 24, TEMPERATURE: -24, WEIGHTS: -42}


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a sweep: single samples."""

    curve: str
    """`OUTPUT`, `WEIGHTS` or `TEMPERATURE`."""
    value: float
    """w, or the temperature."""

    @property
    def name(self) -> str:
        """Such as `w 1.5`."""
        letter = {OUTPUT: "w", WEIGHTS: "weights w", TEMPERATURE: "T"}[self.curve]
        return f"{letter} {self.value:g}"


def points_of(
    guidances: Sequence[float], temperatures: Sequence[float], weights: Sequence[float]
) -> list[Point]:
    """Points of the three curves."""
    return [
        *(Point(OUTPUT, value) for value in guidances),
        *(Point(TEMPERATURE, value) for value in temperatures),
        *(Point(WEIGHTS, value) for value in weights),
    ]


def sample_point(
    designer: Designer, point: Point, prompts: Sequence[str], seed: int
) -> list[list[int]]:
    """Tokens of one design for each prompt, all points with the same random numbers."""
    if point.curve == TEMPERATURE:
        return sample(designer, Draw("grpo", temperature=point.value), prompts, seed)
    if point.curve == OUTPUT:
        return sample(designer, Draw("grpo", guidance=point.value), prompts, seed)
    mixed = copy.copy(designer)
    mixed.tuned = extrapolated(designer.tuned, designer.reference, point.value)
    return sample(mixed, Draw("grpo"), prompts, seed)


def check_endpoints(designer: Designer, prompts: Sequence[str], seed: int) -> dict[str, int]:
    """Whether w = 0 designs as the SFT policy does, and w = 1 as the tuned one, token by token.

    Returns:
        Tokens compared at each end.

    Raises:
        AssertionError: They differ.
    """
    compared = {}
    for weight, plain in ((0.0, Draw("sft")), (1.0, Draw("grpo"))):
        guided = sample(designer, Draw("grpo", guidance=weight), prompts, seed)
        expected = sample(designer, plain, prompts, seed)
        assert guided == expected, f"w = {weight:g} designs other workflows than {plain.who} alone"
        compared[f"w {weight:g}"] = sum(map(len, expected))
    return compared


def draw_sweep(path: Path, rows: Sequence[dict[str, Any]], fixed: float) -> None:
    """Write a PNG: rendered score against distinct workflows, a line per curve, labelled points.

    Args:
        path: File to write.
        rows: `curve`, `value`, `score`, `se`, `collapsed` (of `n` designs) and `raw` of each point.
        fixed: Score of the best fixed workflow, a line across.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    colors = {OUTPUT: "#0b7a75", TEMPERATURE: "#c46a1b", WEIGHTS: "#6a5acd"}
    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=110, layout="constrained")
    for curve, color in colors.items():
        of_curve = [row for row in rows if row["curve"] == curve]
        if not of_curve:
            continue
        x, y = ([row[name] for row in of_curve] for name in ("collapsed", "score"))
        axes.plot(x, y, color=color, marker="o", label=curve, lw=1.8, ms=5)
        axes.errorbar(x, y, [row["se"] for row in of_curve], color=color, alpha=0.25, fmt="none")
        for row in of_curve:
            letter = "T" if curve == TEMPERATURE else "w"
            axes.annotate(
                f"{letter} {row['value']:g}",
                (row["collapsed"], row["score"]),
                # Curves run close together: each has its labels at a distance of its own.
                xytext=(0, _LABEL_OFFSETS[curve]),
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                fontsize=8.5,
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "lw": 0.7},
            )
    axes.axhline(fixed, color="#8a8f98", lw=1, ls="--")
    axes.annotate(
        "best fixed workflow",
        (0.008, fixed),
        xycoords=("axes fraction", "data"),
        ha="left",
        va="bottom",
        color="#636870",
        fontsize=8.5,
    )
    axes.set_xlabel(
        f"distinct workflows among {rows[0]['n']} designs, near-equal ones counted once"
    )
    axes.set_ylabel("rendered score, standard error of prompts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path)
    plt.close(figure)
