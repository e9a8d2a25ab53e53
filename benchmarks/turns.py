"""What to render next: the designs on which the ensemble is least certain, or any.

    python -m benchmarks.turns [--recipe demo] [--add N] [--repeats 1] [--prompts 96]
                               [--designs 2] [--seeds 16] [--quick] [--json] [--out DIR]

Begins where a first turn of the recipe ended: its stages are found in `FLOWLOOM_HOME` if it ran
there with this code, else they run. Of the designs that its policy proposed last, N are rendered
once each: those on which the reward's members disagree most, and N random ones (by default a
quarter of the proposals; both sets with the proposals for calibration prompts). The ensemble is
fitted anew with each, and judged, like the one before, on other designs of the policy, for held-out
prompts, against means of many seeds. A repeat draws other designs at random and trains with another
seed; figures are means over repeats, and intervals (95 %) are of resampled prompts, the same for
all: they say nothing of other repeats.

error      mean of |predicted score - mean score| over designs
spearman   rank correlation of the two
coverage   share of single renders inside the conformal interval, which promises 90 %
width      of that interval
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.rounds import build_data
from flowloom import recipes, stages
from flowloom.dataset import triplets as rows_of
from flowloom.dataset.designed import PROPOSALS_FILE
from flowloom.dataset.splits import TRAIN
from flowloom.dataset.tables import read_table
from flowloom.designer.loading import load_policy
from flowloom.designer.rollout import rollout
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.recipes.recipe import Recipe
from flowloom.reward.calibration import spearman
from flowloom.reward.ensemble import Ensemble
from flowloom.runs import Run, input_digest
from flowloom.workflow import Catalogue, Grammar, Vocabulary, Workflow, decode

BEFORE, SPREAD, RANDOM = "none added", "most uncertain", "random"
SEED_BASE, SEED_STRIDE = 1 << 43, 16
MEASURES = ("error", "spearman", "coverage", "width")
MEMBERS = 3
PROCESSES = 2


@dataclasses.dataclass(frozen=True)
class Design:
    """A design for a held-out prompt."""

    prompt: str
    tokens: tuple[int, ...]
    workflow: Workflow


def first_turn(recipe: Recipe) -> dict[str, Path]:
    """Folders of the parts that a first turn ends with, made as the pipeline makes them."""
    parts = build_data(recipe)
    names = ("catalogue", "pairs", "triplets")
    parts["designer"] = _run("train_sft", recipe.train_sft, parts, *names)
    for number in range(2):
        start = {"start": parts["adapter"]} if number else {}
        if number:
            designs = {"earlier": parts["triplets"], "proposals": parts["adapter"]}
            config = recipe.build_triplets
            parts["triplets"] = _run(
                "build_triplets", config, parts, "catalogue", "pairs", **designs
            )
        parts["reward"] = fit(recipe, parts)
        names = ("catalogue", "triplets", "designer", "reward")
        parts["adapter"] = _run("train_grpo", recipe.train_grpo, parts, *names, **start)
    return parts


def fit(recipe: Recipe, parts: dict[str, Path], seed: int | None = None) -> Path:
    """The ensemble of some triplets; with another training seed on wish."""
    members = []
    for number in range(MEMBERS):
        config = dataclasses.replace(recipe.train_reward, member=number)
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        members.append(_run("train_reward", config, parts, "catalogue", "triplets"))
    config = recipe.calibrate_reward
    return _run("calibrate_reward", config, parts, "catalogue", "triplets", members=members)


def added(recipe: Recipe, parts: dict[str, Path], by: str, num: int, repeat: int) -> Path:
    """The triplets with some of the proposals, rendered."""
    config = dataclasses.replace(
        recipe.build_triplets, num_designed=num, designed_seeds=1, designed_by=by, seed=repeat
    )
    designs = {"earlier": parts["triplets"], "proposals": parts["adapter"]}
    return _run("build_triplets", config, parts, "catalogue", "pairs", **designs)


def draw(parts: dict[str, Path], num_prompts: int, num_designs: int) -> list[Design]:
    """Different designs of the policy, for held-out prompts, at temperature 1."""
    catalogue = Catalogue.load(parts["catalogue"] / "catalogue.json.gz")
    vocabulary = Vocabulary.from_json(
        json.loads((parts["designer"] / "vocabulary.json").read_text())
    )
    policy = load_policy(parts["designer"], parts["adapter"])
    grammar = Grammar(catalogue, vocabulary, policy.config.num_workflow_tokens)
    prompts = [row["prompt"] for row in rows_of.load_prompts(parts["triplets"])[:num_prompts]]
    asked = [prompt for prompt in prompts for _ in range(num_designs)]
    tokens = rollout(policy, grammar, asked, seed=99).tokens
    cells = dict.fromkeys((prompt, tuple(row)) for prompt, row in zip(asked, tokens, strict=True))
    return [Design(prompt, row, decode(row, grammar).canonical(catalogue)) for prompt, row in cells]


def render(designs: Sequence[Design], parts: dict[str, Path], rubric: str, seeds: int, out: Path):
    """Scores, shape (designs, seeds); what was rendered before is read."""
    jobs = []
    for c, design in enumerate(designs):
        for s in range(seeds):
            noise = SEED_BASE + SEED_STRIDE * (c * seeds + s)
            flow = design.workflow.fill(design.prompt, seed=noise)
            jobs.append(JudgedJob(flow, f"{c:05d}-{s:03d}", design.prompt, keep=False))
    digest = input_digest(parts["adapter"])[:12]
    run = Run("turns", out / f"{digest}-{len(designs)}-{seeds}")
    run.begin()
    found = render_and_score(
        jobs, run, "scores", catalogue_dir=parts["catalogue"], rubric=rubric, chunk_size=256,
        num_processes=PROCESSES,
    )  # fmt: skip
    return np.array([found[job.id]["score"] for job in jobs]).reshape(len(designs), seeds)


def predict(reward: Path, designs: Sequence[Design], scores_CS: np.ndarray) -> dict[str, Any]:
    """Of each design: predicted score, its error, share of renders inside the interval, width."""
    prompts, tokens = [d.prompt for d in designs], [d.tokens for d in designs]
    predicted_C, low_C, high_C = Ensemble.load(reward).score_and_interval(prompts, tokens)
    inside_CS = (low_C[:, None] <= scores_CS) & (scores_CS <= high_C[:, None])
    return {
        "predicted": predicted_C,
        "error": np.abs(predicted_C - scores_CS.mean(1)),
        "coverage": inside_CS.mean(1),
        "width": high_C - low_C,
    }


def measure(found: Sequence[dict[str, Any]], true_C: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`MEASURES` of some designs, means over repeats."""
    values = []
    for one in found:
        ranks = spearman(one["predicted"][rows], true_C[rows])
        means = {name: one[name][rows].mean() for name in ("error", "coverage", "width")}
        values.append([{**means, "spearman": ranks}[name] for name in MEASURES])
    return np.mean(values, axis=0)


def compare(
    arms: dict[str, list[dict[str, Any]]],
    designs: Sequence[Design],
    true_C: np.ndarray,
    num_resamples: int,
) -> dict[str, Any]:
    """Figures of each arm and of each difference, with intervals of resampled prompts."""
    prompts = list(dict.fromkeys(design.prompt for design in designs))
    rows_P = [[c for c, d in enumerate(designs) if d.prompt == prompt] for prompt in prompts]
    rng = np.random.default_rng(0)
    chosen = [np.arange(len(designs))]
    for _ in range(num_resamples):
        drawn = rng.integers(len(prompts), size=len(prompts))
        chosen.append(np.concatenate([rows_P[p] for p in drawn]).astype(int))
    values = {
        arm: np.array([measure(found, true_C, rows) for rows in chosen])
        for arm, found in arms.items()
    }
    pairs = [(SPREAD, RANDOM), (SPREAD, BEFORE), (RANDOM, BEFORE)]
    values |= {f"{ours} - {theirs}": values[ours] - values[theirs] for ours, theirs in pairs}
    return {arm: _with_interval(found) for arm, found in values.items()}


def _with_interval(values_RM: np.ndarray) -> dict[str, dict[str, float]]:
    """The first row, and quantiles of the others."""
    low_M, high_M = np.quantile(values_RM[1:], (0.025, 0.975), axis=0)
    columns = zip(MEASURES, values_RM[0], low_M, high_M, strict=True)
    return {n: {"mean": float(m), "low": float(a), "high": float(b)} for n, m, a, b in columns}


def _run(stage: str, config: Any, parts: dict[str, Path], *names: str, **more: Any) -> Path:
    return stages.run(stage, config, {name: parts[name] for name in names} | more).out_dir


def show(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the table."""
    say(
        f"{result['added']} of {result['pool']} proposals added to {result['renders']} renders; "
        f"{result['designs']} designs for {result['prompts']} held-out prompts, "
        f"{result['seeds']} seeds each; {result['repeats']} repeats"
    )
    for arm, found in result["arms"].items():
        say(arm)
        for name, value in found.items():
            say(f"  {name:9} {value['mean']:+.4f}  ({value['low']:+.4f} to {value['high']:+.4f})")


def main() -> None:
    """Print every figure with its interval; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="demo", help="recipe of all stages")
    parser.add_argument("--add", type=int, help="designs added; default: a quarter of the pool")
    parser.add_argument("--repeats", type=int, default=1, help="draws and training seeds")
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--designs", type=int, default=2, help="designs of each")
    parser.add_argument("--seeds", type=int, default=16, help="renders of each design")
    parser.add_argument("--resamples", type=int, default=2000, help="of prompts")
    parser.add_argument("--quick", action="store_true", help="recipe smoke, few prompts")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--out", type=Path, default=Path("build/turns"), help="keeps renders")
    options = parser.parse_args()
    if options.quick:
        options.recipe, options.prompts, options.resamples = "smoke", 8, 200
    torch.set_num_threads(1)
    recipe = recipes.resolve(options.recipe)
    parts = first_turn(recipe)
    splits = read_table(parts["adapter"] / PROPOSALS_FILE)["split"]
    pool = sum(split == TRAIN for split in splits)
    add = options.add or max(1, pool // 4)
    designs = draw(parts, options.prompts, options.designs)
    rubric = recipe.build_triplets.rubric
    scores_CS = render(designs, parts, rubric, options.seeds, options.out)
    arms: dict[str, list[dict[str, Any]]] = {BEFORE: [], SPREAD: [], RANDOM: []}
    for repeat in range(options.repeats):
        seed = recipe.train_reward.seed + repeat
        for arm, by in ((BEFORE, None), (SPREAD, "spread"), (RANDOM, "random")):
            grown = added(recipe, parts, by, add, repeat) if by else parts["triplets"]
            reward = fit(recipe, {**parts, "triplets": grown}, seed)
            arms[arm].append(predict(reward, designs, scores_CS))
    result = {
        "recipe": options.recipe, "pool": pool, "added": add, "repeats": options.repeats,
        "renders": len(rows_of.load(parts["triplets"])["cell"]), "designs": len(designs),
        "prompts": len({design.prompt for design in designs}), "seeds": options.seeds,
        "arms": compare(arms, designs, scores_CS.mean(1), options.resamples),
    }  # fmt: skip
    show(result, print)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
