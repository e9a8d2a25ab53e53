"""Calibrate the ensemble on prompts that no member has seen: units, pessimism, intervals, honesty.

Intervals are split conformal (arXiv 2107.07511), by range of the prediction: with n calibration
renders in a range, the residuals' order statistics number ceil((n + 1) (1 - a / 2)) from above and
from below bound a new render's residual with probability 1 - a, whatever the model. Renders of one
prompt are not exchangeable with those of another, so the coverage reported is measured across
prompts: calibrated on one half of them, counted on the other.

Shapes: R renders, C cells (prompt, workflow), K members.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flowloom.dataset import triplets as triplet_table
from flowloom.reward import member
from flowloom.reward.config import CalibrationConfig
from flowloom.reward.ensemble import CALIBRATION_FILE, Ensemble
from flowloom.runs import Run, write_json
from flowloom.workflow import Workflow


def calibrate_reward(
    config: CalibrationConfig, run: Run, *, catalogue: Path, triplets: Path, members: Sequence[Path]
) -> dict[str, float]:
    """Join members to an ensemble and calibrate it on the calibration split.

    Args:
        config: How.
        run: Run folder; `out` becomes an ensemble folder for `Ensemble.load`.
        catalogue: Folder that `publish_generator` wrote.
        triplets: Folder of `build_triplets`.
        members: Folders of `train_reward`.

    Raises:
        ValueError: There is no member, or members were trained on different data.
    """
    # Gather the members; what their inputs mean must be the same.
    torch.set_num_threads(config.num_threads)
    members = [Path(path) for path in members]
    if not members:
        raise ValueError("members: got none, expected at least one folder of train_reward")
    records = [json.loads((path / member.RECORD_FILE).read_text()) for path in members]
    for path, record in zip(members, records, strict=True):
        for name in (*member.UNITS, "catalogue", "num_rows"):
            if record[name] != records[0][name]:
                raise ValueError(
                    f"{path}: got {name} {record[name]}, "
                    f"expected {records[0][name]} as in {members[0]}"
                )
    for k, path in enumerate(members):
        shutil.copyfile(path / member.WEIGHTS_FILE, run.out / f"member-{k}.safetensors")
        shutil.copyfile(path / member.RECORD_FILE, run.out / f"member-{k}.json")
    for name in (member.TOKENIZER_FILE, member.VOCABULARY_FILE):
        shutil.copyfile(members[0] / name, run.out / name)
    shutil.copyfile(catalogue / member.CATALOGUE_FILE, run.out / member.CATALOGUE_FILE)
    units = {"members": len(members), "beta": config.beta, "coverage": config.coverage}
    units |= {"intercept": records[0]["mean"], "slope": records[0]["std"]}
    units |= {"edges": [], "low": [0.0], "high": [0.0], "spread_limit": 0.0}
    write_json(run.out / CALIBRATION_FILE, units)
    ensemble = Ensemble.load(run.out)

    # Predict every calibration cell.
    columns = triplet_table.load(triplets, "calibration")
    cells = list(dict.fromkeys(columns["cell"]))
    place = {cell: c for c, cell in enumerate(cells)}
    cell_of_R = np.array([place[cell] for cell in columns["cell"]])
    first_C = np.unique(cell_of_R, return_index=True)[1]
    prompts_C = [columns["prompt"][row] for row in first_C]
    flows_C = [Workflow.from_api(json.loads(columns["workflow"][row])) for row in first_C]
    scores_R = np.array(columns["score"], float)
    means_C = np.bincount(cell_of_R, scores_R) / np.bincount(cell_of_R)
    predicted_KC = ensemble.predict_workflows(prompts_C, flows_C)
    mean_C, std_C = predicted_KC.mean(0), predicted_KC.std(0)

    # Fit units and intervals on all prompts, and measure coverage across halves of them.
    fitted = fit(mean_C, cell_of_R, scores_R, config)
    number = {text: k for k, text in enumerate(dict.fromkeys(prompts_C))}
    half_C = np.array([number[text] % 2 for text in prompts_C])
    covered = []
    for half in (0, 1):
        inside_R = half_C[cell_of_R] == half
        part = fit(mean_C, cell_of_R[inside_R], scores_R[inside_R], config)
        low_C, high_C = interval(part, mean_C)
        other_R = ~inside_R
        at_R = cell_of_R[other_R]
        covered.append((scores_R[other_R] >= low_C[at_R]) & (scores_R[other_R] <= high_C[at_R]))
    low_C, high_C = interval(fitted, mean_C)
    fitted["spread_limit"] = float(np.quantile(std_C, config.familiar_frac))

    # Judge.
    errors_C = np.abs(units["intercept"] + units["slope"] * mean_C - means_C)
    metrics = {
        "reward/spearman": spearman(mean_C, means_C),
        "reward/spearman_within": within_spearman(mean_C, means_C, prompts_C),
        "reward/spearman_ceiling": noise_ceiling(cell_of_R, scores_R),
        "reward/member_spearman": float(np.mean([spearman(p, means_C) for p in predicted_KC])),
        "reward/spread_error_spearman": spearman(std_C, errors_C),
        "reward/spread": float(std_C.mean()),
        "reward/bias": float((units["intercept"] + units["slope"] * mean_C - means_C).mean()),
        "reward/slope": fitted["slope"] / units["slope"],
        "reward/coverage": float(np.concatenate(covered).mean()),
        "reward/interval_width": float((high_C - low_C)[cell_of_R].mean()),
        "reward/cells": float(len(cells)),
    }
    metrics = {name: round(value, 6) for name, value in metrics.items()}
    write_json(run.out / CALIBRATION_FILE, {**units, **fitted, "metrics": metrics})
    shown = ("spearman", "spearman_within", "spearman_ceiling", "coverage")
    run.log(", ".join(f"{name} {metrics[f'reward/{name}']:.3f}" for name in shown))
    return metrics


def fit(
    predicted_C: np.ndarray, cell_of_R: np.ndarray, scores_R: np.ndarray, config: CalibrationConfig
) -> dict:
    """Line from standardised predictions to rubric units, and conformal bounds by range.

    Returns:
        intercept, slope; edges between the ranges of the predicted score; low and high, what to add
        to it.
    """
    predicted_R = predicted_C[cell_of_R]
    spread = predicted_R.var()
    centered = scores_R - scores_R.mean()
    slope = float((predicted_R * centered).mean() / spread) if spread > 0 else 0.0
    slope = max(slope, 0.0)
    intercept = float(scores_R.mean() - slope * predicted_R.mean())
    line = {"intercept": intercept, "slope": slope}
    shown_R = np.clip(intercept + slope * predicted_R, 0, 1)
    levels = np.arange(1, config.num_bins) / config.num_bins
    edges = np.unique(np.quantile(shown_R, levels))
    bins_R = np.searchsorted(edges, shown_R)
    low, high = [], []
    for index in range(len(edges) + 1):
        bounds = conformal_bounds((scores_R - shown_R)[bins_R == index], 1 - config.coverage)
        low.append(bounds[0])
        high.append(bounds[1])
    return {**line, "edges": edges.tolist(), "low": low, "high": high}


def interval(fitted: dict, predicted_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of single renders in rubric units."""
    shown_C = np.clip(fitted["intercept"] + fitted["slope"] * predicted_C, 0, 1)
    bins_C = np.searchsorted(fitted["edges"], shown_C)
    low_C = shown_C + np.array(fitted["low"])[bins_C]
    high_C = shown_C + np.array(fitted["high"])[bins_C]
    return np.clip(low_C, 0, 1), np.clip(high_C, 0, 1)


def conformal_bounds(residuals: np.ndarray, alpha: float) -> tuple[float, float]:
    """What a new residual lies between with probability >= 1 - alpha.

    -1 and 1 where there are too few residuals to say.
    """
    ordered = np.sort(residuals)
    n = len(ordered)
    rank = int(np.ceil((n + 1) * (1 - alpha / 2)))
    if rank > n:
        return -1.0, 1.0
    return float(ordered[n - rank]), float(ordered[rank - 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    order = np.argsort(values, kind="stable")
    result = np.empty(len(values))
    result[order] = np.arange(len(values))
    _, group = np.unique(values, return_inverse=True)
    return (np.bincount(group, result) / np.bincount(group))[group]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; 0 where one side is constant."""
    return pearson(ranks(x), ranks(y))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; 0 where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def within_spearman(x: np.ndarray, y: np.ndarray, prompts: Sequence[str]) -> float:
    """Rank correlation of what is left when each prompt's mean is taken off both sides."""
    group = np.unique(np.array(prompts), return_inverse=True)[1]
    count = np.bincount(group)
    x = x - (np.bincount(group, x) / count)[group]
    y = y - (np.bincount(group, y) / count)[group]
    return spearman(x, y)


def noise_ceiling(cell_of_R: np.ndarray, scores_R: np.ndarray) -> float:
    """Correlation of a perfect predictor with these cell means: sqrt(their reliability).

    Reliability = 1 - var(render) / n / var(cell means), with n the mean number of renders of a
    cell.
    """
    count = np.bincount(cell_of_R)
    means = np.bincount(cell_of_R, scores_R) / count
    freedom = len(scores_R) - len(count)
    if freedom <= 0 or means.var() == 0:
        return 0.0
    noise = ((scores_R - means[cell_of_R]) ** 2).sum() / freedom
    return float(np.sqrt(max(0.0, 1 - (noise / count).mean() / means.var())))
