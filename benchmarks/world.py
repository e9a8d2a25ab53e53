"""Shipped models of the shapes world by concept, and what choosing per prompt gains.

    python -m benchmarks.world [--models DIR] [--prompts N] [--seeds N] [--quick] [--json]

Held-out prompts as `sample_prompt` draws them, 8 Euler steps at guidance 2.5, score =
faithfulness * (.8 + .2 crispness). The best fixed setting, the best per kind and the best per
prompt are chosen on one half of the seeds and scored on the other, averaged over 40 random halves.

Shapes: S settings (checkpoint, or base + LoRA), P prompts, R seeds (renders), B pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from flowloom.shapes import detector, prompts
from flowloom.shapes import model as shapes_model

KINDS = ("single", "two", "counting", "colors")


def sample(model, token_ids, noise_BCHW, *, steps=8, guidance=2.5):
    """Euler from t = 1 to 0 with classifier-free guidance against the empty prompt."""
    B = len(noise_BCHW)
    cond = model.encode_text(token_ids)
    empty = model.encode_text([prompts.tokenize("")] * B)
    both = shapes_model.Conditioning.cat([cond, empty])
    x_BCHW = noise_BCHW
    times = torch.linspace(1, 0, steps + 1)
    for t, s in itertools.pairwise(times):
        v, v_empty = model.velocity(x_BCHW.repeat(2, 1, 1, 1), t.expand(2 * B), both).chunk(2)
        x_BCHW = x_BCHW + (s - t) * (v_empty + guidance * (v - v_empty))
    return x_BCHW.clamp(-1, 1)


def render_scores(model, specs, num_seeds, *, steps=8, guidance=2.5, batch=32):
    """Scores `[P, R]` (seed r is one noise for all prompts and models) and ms per picture."""
    noise_RCHW = torch.stack(
        [
            torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(r))
            for r in range(num_seeds)
        ]
    )
    rows = [(p, r) for p in range(len(specs)) for r in range(num_seeds)]
    scores_PR = np.zeros((len(specs), num_seeds))
    seconds = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        chosen = [specs[p] for p, _ in part]
        ids = [prompts.tokenize(spec.text) for spec in chosen]
        began = time.process_time()
        with torch.no_grad():
            noise = noise_RCHW[[r for _, r in part]]
            images = sample(model, ids, noise, steps=steps, guidance=guidance)
        seconds += time.process_time() - began
        faithful = detector.score(images, chosen)
        value = faithful * (0.8 + 0.2 * detector.crispness(images))
        for (p, r), v in zip(part, value.tolist(), strict=True):
            scores_PR[p, r] = v
    return scores_PR, 1e3 * seconds / len(rows)


def choice_gap(scores_SPR, groups, num_splits=40, seed=0):
    """Mean score of the best fixed model, best per group, best per prompt, on unseen seeds."""
    rng = np.random.default_rng(seed)
    totals = np.zeros(3)
    groups = np.asarray(groups)
    num_prompts = scores_SPR.shape[1]
    for _ in range(num_splits):
        order = rng.permutation(scores_SPR.shape[2])
        half = len(order) // 2
        choose_SP = scores_SPR[:, :, order[:half]].mean(2)
        judge_SP = scores_SPR[:, :, order[half:]].mean(2)
        fixed = judge_SP[choose_SP.mean(1).argmax()].mean()
        best_P = np.zeros(num_prompts, int)
        for group in np.unique(groups):
            best_P[groups == group] = choose_SP[:, groups == group].mean(1).argmax()
        by_group = judge_SP[best_P, np.arange(num_prompts)].mean()
        by_prompt = judge_SP[choose_SP.argmax(0), np.arange(num_prompts)].mean()
        totals += (fixed, by_group, by_prompt)
    means = (totals / num_splits).round(3).tolist()
    return dict(zip(("fixed", "per_group", "per_prompt"), means, strict=True))


def evaluation_prompts(count, seed=0):
    """Held-out prompts of the demo's kinds."""
    rng = np.random.default_rng(seed)
    specs = []
    while len(specs) < count:
        spec = prompts.sample_prompt(rng, kinds=KINDS)
        if prompts.split_of(spec) == "holdout":
            specs.append(spec)
    return specs


def concept(spec):
    """The cell of the printed table: kind and family, counts split at three."""
    families = prompts.prompt_concepts(spec)
    if spec.kind in ("single", "two"):
        return f"{spec.kind} {families['shapes']}"
    if spec.kind == "colors":
        return f"colors {families['colors']}"
    if spec.objects[0].count > 3:
        return "count 4-6"
    family = families["shapes"] if families["colors"] == "any" else families["colors"]
    return f"count 1-3 {family}"


def settings(models_dir):
    """Name -> model: every checkpoint, and the base with every LoRA merged at strength 1."""
    models = {
        path.stem.removeprefix("shapes-"): shapes_model.load(path)
        for path in sorted((models_dir / "checkpoints").glob("*.safetensors"))
    }
    for path in sorted((models_dir / "loras").glob("*.safetensors")):
        lora = shapes_model.load_lora(path)
        name = f"base + {path.stem.removeprefix('shapes-')}"
        models[name] = shapes_model.apply_lora(models["base"], lora, 1.0, 1.0)
    return models


def main():
    """Print the table and the gaps; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, default=Path("data/models"))
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="40 prompts, 4 seeds: under a minute")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_prompts, num_seeds = (40, 4) if options.quick else (options.prompts, options.seeds)
    specs = evaluation_prompts(num_prompts)
    cells = [concept(spec) for spec in specs]
    began = time.perf_counter()
    scores, ms_per_image = {}, []
    for name, model in settings(options.models).items():
        scores[name], ms = render_scores(model, specs, num_seeds)
        ms_per_image.append(ms)
    names = list(scores)
    print(f"{'':20}{'n':>4} " + " ".join(f"{name[:10]:>10}" for name in names))
    table = {}
    for cell in sorted(set(cells)):
        rows = [i for i, other in enumerate(cells) if other == cell]
        table[cell] = {name: round(float(scores[name][rows].mean()), 3) for name in names}
        values = " ".join(f"{table[cell][name]:10.2f}" for name in names)
        print(f"{cell:20}{len(rows):4} {values}")
    means = {name: round(float(scores[name].mean()), 3) for name in names}
    print(f"{'all':20}{len(specs):4} " + " ".join(f"{means[name]:10.2f}" for name in names))
    gap = choice_gap(np.stack(list(scores.values())), [spec.kind for spec in specs])
    per_concept = choice_gap(np.stack(list(scores.values())), cells)["per_group"]
    result = {
        "fixed": gap["fixed"],
        "per_kind": gap["per_group"],
        "per_concept": per_concept,
        "per_prompt": gap["per_prompt"],
        "sampling_cpu_ms_per_image": round(float(np.mean(ms_per_image)), 2),
        "wall_s": round(time.perf_counter() - began, 1),
    }
    print("  ".join(f"{key} {value}" for key, value in result.items()))
    if options.json:
        print(json.dumps({**result, "settings": means, "cells": table}))


if __name__ == "__main__":
    main()
