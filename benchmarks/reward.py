"""How well the reward predicts: against a truth of many seeds per cell, on held-out prompts.

    python -m benchmarks.reward [--root DIR]... [--prompts 161] [--seeds 64] [--cells 2000]
                                [--quick] [--json] [--out DIR]

`--root` is a folder of `benchmarks.rounds`, by default that of its first seed, or any with
`catalogue`, `pairs`, `triplets` and `reward` in it; repeated, the truth is rendered once. Cells of
a held-out prompt: one workflow of the train pairs and two that the data's search would try (of the
nearest concept's best, seven in ten edited); beside them one workflow that was never trained on.
Coverage is of single renders of other cells of the same sort. The noise ceiling is what a perfect
predictor would reach: the rank correlation of two halves of the seeds, stepped up to all of them
(Spearman and Brown).
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.rounds import FIRST_SEED
from flowloom import recipes
from flowloom.dataset import triplets
from flowloom.dataset.cells import Cell, Rendered, Template
from flowloom.dataset.plan import Plan
from flowloom.dataset.splits import HELD_OUT_WORKFLOW, TRAIN
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.reward.calibration import spearman, within_spearman
from flowloom.reward.ensemble import Ensemble
from flowloom.runs import Run
from flowloom.shapes.prompts import PromptSpec, parse
from flowloom.workflow import Catalogue, Workflow

SEED_BASE, SEED_STRIDE = 1 << 42, 16
MIN_GAP = 0.02
"""Pairs of a prompt's cells whose true scores differ by less say nothing of accuracy."""
NEW = "new workflow"
PROCESSES = 2


def list_cells(
    root: Path, recipe: str, num_prompts: int, seed: int
) -> list[tuple[PromptSpec, Template, str]]:
    """Cells of held-out prompts, each with its sort: `pair`, `evolved` or `new workflow`."""
    catalogue = Catalogue.load(root / "catalogue" / "catalogue.json.gz")
    config = recipes.resolve(recipe).build_triplets
    pairs = triplets.read_templates(root / "pairs", catalogue, 20)
    plan = Plan(config, catalogue, pairs)
    rows = triplets.load(root / "triplets")
    spec_of = {spec.text: spec for spec in plan.train}
    flows = dict(zip(rows["fingerprint"], rows["workflow"], strict=True))
    template_of = {
        name: Template(Workflow.from_api(json.loads(text)), name) for name, text in flows.items()
    }
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    new: dict[str, None] = {}
    names = ("split", "prompt", "fingerprint", "origin", "score")
    for split, prompt, name, origin, score in zip(*(rows[n] for n in names), strict=True):
        if split == TRAIN and prompt in spec_of:
            scores[prompt, name, origin].append(score)
        elif split == HELD_OUT_WORKFLOW:
            new[name] = None
    history = []
    for (prompt, name, origin), values in scores.items():
        flow, seeds = template_of[name].workflow, (0,) * len(values)
        cell = Cell(spec_of[prompt], flow, name, TRAIN, origin, seeds)
        history.append(Rendered(cell, tuple(values)))
    rng = np.random.default_rng(seed)
    prompts = [row["prompt"] for row in triplets.load_prompts(root / "triplets")]
    specs = [parse(prompts[k % len(prompts)]) for k in range(num_prompts)]
    grown, _ = plan.evolved([s for s in specs for _ in range(2)], history, rng, 0.3, part=False)
    known = [template for found in plan.pairs.values() for template in found]
    cells = [(spec, template, "evolved") for spec, template in grown]
    for spec in specs:
        cells.append((spec, known[int(rng.integers(len(known)))], "pair"))
        cells.append((spec, template_of[sorted(new)[int(rng.integers(len(new)))]], NEW))
    return cells


def render_cells(
    root: Path, out: Path, name: str, cells: Sequence[tuple[PromptSpec, Template, str]], seeds: int
) -> np.ndarray:
    """Scores, shape (cells, seeds); what was rendered before is read."""
    first = SEED_BASE + (len(name) << 36)
    jobs = []
    for c, (spec, template, _) in enumerate(cells):
        for s in range(seeds):
            flow = template.workflow.fill(spec.text, seed=first + SEED_STRIDE * (c * seeds + s))
            jobs.append(JudgedJob(flow, f"{c:05d}-{s:03d}", spec.text, keep=False))
    run = Run("reward", out / f"{name}-{len(cells)}-{seeds}")
    run.begin()
    rows = render_and_score(
        jobs, run, "scores", catalogue_dir=root / "catalogue", rubric="shapes", chunk_size=256,
        num_processes=PROCESSES,
    )  # fmt: skip
    return np.array([rows[job.id]["score"] for job in jobs]).reshape(len(cells), seeds)


def judge(predicted_C: np.ndarray, true_C: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Rank correlations, pooled and within prompts, and accuracy on pairs of a prompt's cells."""
    right = total = 0
    names = np.array(prompts)
    for prompt in dict.fromkeys(prompts):
        (rows,) = np.nonzero(names == prompt)
        true_gap, gap = (np.subtract.outer(x[rows], x[rows]) for x in (true_C, predicted_C))
        told = true_gap > MIN_GAP
        total += int(told.sum())
        right += int((told & (gap > 0)).sum())
    return {
        "spearman": spearman(predicted_C, true_C),
        "within": within_spearman(predicted_C, true_C, prompts),
        "pairs": right / max(total, 1),
    }


def ceiling(scores_CS: np.ndarray) -> float:
    """Rank correlation of a perfect predictor with the means of all seeds."""
    half = scores_CS.shape[1] // 2
    r = spearman(scores_CS[:, :half].mean(1), scores_CS[:, half : 2 * half].mean(1))
    return float(np.sqrt(2 * r / (1 + r)))


def measure(
    root: Path,
    truth: Sequence[tuple[PromptSpec, Template, str]],
    scores_CS: np.ndarray,
    single: Sequence[tuple[PromptSpec, Template, str]],
    single_C: np.ndarray,
) -> dict[str, Any]:
    """All figures of one ensemble."""
    ensemble = Ensemble.load(root / "reward")
    predicted_KC = ensemble.predict_workflows(
        [spec.text for spec, *_ in truth], [template.workflow for _, template, _ in truth]
    )
    mean_C, spread_C, true_C = predicted_KC.mean(0), predicted_KC.std(0), scores_CS.mean(1)
    sorts = np.array([sort for *_, sort in truth])
    prompts = np.array([spec.text for spec, *_ in truth])
    result: dict[str, Any] = {"members": len(predicted_KC)}
    wanted = {"held-out prompts": sorts != NEW, "and workflows": sorts == NEW}
    wanted |= {sort: sorts == sort for sort in ("pair", "evolved")}
    for name, rows in wanted.items():
        found = judge(mean_C[rows], true_C[rows], prompts[rows].tolist())
        alone = [judge(row[rows], true_C[rows], prompts[rows].tolist()) for row in predicted_KC]
        low_C = mean_C[rows] - ensemble.calibration["beta"] * spread_C[rows]
        result[name] = found | {
            "cells": int(rows.sum()),
            "ceiling": ceiling(scores_CS[rows]),
            "one member": float(np.mean([row["spearman"] for row in alone])),
            "lower bound": spearman(low_C, true_C[rows]),
        }
    score_C = ensemble.to_rubric(mean_C)
    result["spread_error"] = spearman(spread_C, np.abs(score_C - true_C))
    result["bias"] = float((score_C - true_C).mean())
    tokens = [ensemble.table.codec.encode(template.workflow).tokens for _, template, _ in single]
    _, low_C, high_C = ensemble.score_and_interval([spec.text for spec, *_ in single], tokens)
    inside_C = (low_C <= single_C) & (single_C <= high_C)
    result["coverage"] = float(inside_C.mean())
    result["coverage_cells"] = len(single)
    result["interval_width"] = float((high_C - low_C).mean())
    return result


def main() -> None:
    """Print a table for each root; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, action="append", help="folder of parts")
    parser.add_argument("--recipe", default="bench", help="recipe that the data was built with")
    parser.add_argument("--prompts", type=int, default=161, help="held-out prompts, 4 cells each")
    parser.add_argument("--seeds", type=int, default=64, help="seeds of each of these cells")
    parser.add_argument("--cells", type=int, default=2000, help="cells rendered once, for coverage")
    parser.add_argument("--quick", action="store_true", help="few cells and seeds")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--out", type=Path, default=Path("build/reward"), help="keeps renders")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.seeds, options.cells, options.recipe = 10, 8, 40, "smoke"
    torch.set_num_threads(1)
    roots = options.root or [FIRST_SEED]
    first = roots[0]
    truth = list_cells(first, options.recipe, options.prompts, seed=77)
    single = list_cells(first, options.recipe, -(-options.cells // 4), seed=78)[: options.cells]
    scores_CS = render_cells(first, options.out, "truth", truth, options.seeds)
    single_C = render_cells(first, options.out, "single", single, 1)[:, 0]
    result = {}
    for root in roots:
        found = result[str(root)] = measure(root, truth, scores_CS, single, single_C)
        print(f"\n{root}: {found['members']} members")
        for name, row in found.items():
            if isinstance(row, dict):
                print(f"  {name:18}", ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        for name in ("coverage", "coverage_cells", "interval_width", "spread_error", "bias"):
            print(f"  {name:18} {found[name]:.4g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
