"""Shipped models of the shapes world by kind and shape family, and what choosing per prompt gains.

    python -m benchmarks.world [--models data/models] [--seeds 32] [--quick] [--json]

8 Euler steps at guidance 2.5, score = faithfulness * (.8 + .2 crispness). The best fixed model and
the best per prompt are chosen on one half of the seeds and scored on the other half, averaged over
40 random halves.

Shapes: S models, P prompts, R seeds (renders), B pictures.
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
    return dict(
        zip(("fixed", "per_kind", "per_prompt"), (totals / num_splits).round(3), strict=True)
    )


def evaluation_prompts(per_cell, *, split="holdout", seed=0):
    """Prompts of every demo kind x {round, angular, mixed}, at most `per_cell` of each cell."""
    rng = np.random.default_rng(seed)
    cells: dict[tuple, list] = {}
    for _ in range(20000):
        spec = prompts.sample_prompt(rng, kinds=KINDS)
        if split and prompts.split_of(spec) != split:
            continue
        cell = cells.setdefault((spec.kind, prompts.prompt_concepts(spec)["shapes"]), [])
        if len(cell) < per_cell:
            cell.append(spec)
    return [spec for key in sorted(cells) for spec in cells[key]]
