"""Finite Difference Flow Optimization (FDFO, arXiv 2603.12893) of one checkpoint on a score.

Two pictures are sampled from one noise and one prompt with independent churn. The better one minus
the worse one is the direction in which the reward rises; at every point that either sample visited,
the velocity is pulled so that sampling goes there. No back-propagation through the sampler, no
likelihood: the whole run is one action.

Departures from the paper:
1. The clip c of the surrogate is scaled to picture size and pair distance (`pairs.trust_clip`); the
   paper's 0.03 belongs to its 65,536 dimensions and would stop learning at 3,072.
2. All weights of the small model are tuned, not a LoRA.
3. A penalty toward the velocity of the base, kl_coef * mean (v - v_base)^2, against reward hacking.
4. Equal time steps instead of SD3's shifted ones; both branches of a (pair, step) stay in one
   minibatch.

One process: flowloom run tune_generator --recipe demo

Shapes: P pairs, B = 2 * P rows, T steps, U = T * P units (both branches of a pair at a step),
C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowloom.generator import pairs
from flowloom.generator.config import PromptsConfig, TuneGeneratorConfig
from flowloom.generator.pictures import write_grid
from flowloom.generator.velocity import ShapesFlow, Velocity
from flowloom.render.models import ModelStore, file_record
from flowloom.render.samplers import sample
from flowloom.render.schedules import schedule
from flowloom.runs import Run, write_json, write_state
from flowloom.score.rubric import Rubric, get_rubric
from flowloom.shapes import prompts as language
from flowloom.shapes.model import load, save

SHAPE = (3, 32, 32)
GRID_SEEDS = 4
OUT_OF_RANGE = 1.05
MAX_DRAWS = 30
FOLDER = "checkpoints"
_PROMPTS, _NOISE, _SHUFFLE, _EVALUATION = range(4)


def tune_generator(config: TuneGeneratorConfig, run: Run) -> dict[str, float]:
    """Tune `config.base` and write the tuned checkpoint, its catalogue record, grids and curve.

    Raises:
        ValueError: The base is not in the catalogue or not on disk.
        FloatingPointError: A picture, a reward, a loss or a gradient is not finite; names epoch and
            step.
    """
    # Load the base, and what the checkpoint's record takes over from it.
    torch.set_num_threads(config.num_threads)
    store = ModelStore.open(None)
    base = store.checkpoint(config.base)
    base_file = store.catalogue.file(FOLDER, config.base)
    assert base_file is not None, "the store has just loaded it"
    rubric = get_rubric(config.rubric)

    # Build the tuned copy, its optimiser and the held-out prompts.
    model = copy.deepcopy(base).requires_grad_(True)
    flow, base_flow = (ShapesFlow(m, config.guidance) for m in (model, base))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
    )
    times = schedule("simple", config.num_steps, shift=config.time_shift)
    held_out = draw_prompts(
        config.prompts, "holdout", config.num_eval_prompts, (config.seed, _EVALUATION)
    )

    # Resume, or judge the base.
    state_path = run.work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve, before = state["epoch"], state["curve"], state["before"]
        run.log(f"resumed after epoch {first} of {config.num_epochs}")
    else:
        before = evaluate(config, base, rubric, held_out)
        first, curve = 0, []
        run.log(f"base: score {before['serve/score']:.3f} as served")

    for epoch in range(first, config.num_epochs):
        # Roll out pairs and score them.
        prompts = draw_prompts(
            config.prompts, "train", config.pairs_per_epoch, (config.seed, _PROMPTS, epoch)
        )
        seeds = torch_seeds((config.seed, _NOISE, epoch), len(prompts))
        start_PCHW, fresh_TBCHW = pairs.pair_noise(seeds, config.num_steps, SHAPE)
        paths = pairs.roll_out(flow, prompts, start_PCHW, fresh_TBCHW, config.churn, times)
        doubled = [prompt for prompt in prompts for _ in range(2)]
        try:
            rewards_B = score(rubric, doubled, paths.images_BCHW)
        except FloatingPointError as error:
            raise FloatingPointError(f"epoch {epoch}: {error}") from error

        # Update the velocity along all paths.
        order_U = choose_units(config, rewards_B, epoch)
        logged = update(
            config, flow, base_flow, optimizer, doubled, paths, rewards_B, order_U, epoch
        )

        # Log, save.
        logged["train/reward"] = float(rewards_B.mean())
        logged["train/out_of_range"] = out_of_range(paths.images_BCHW)
        curve.append({"images": 2 * len(prompts) * (epoch + 1), **logged})
        run.metric(epoch + 1, logged)
        done = epoch + 1
        if done % config.checkpoint_every == 0 or done == config.num_epochs:
            state = {"epoch": done, "curve": curve, "before": before}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_state(state_path, state)
            run.log(f"epoch {done} of {config.num_epochs}: reward {logged['train/reward']:.3f}")

    # Write the checkpoint as it will be loaded, and judge that.
    path = run.out / "models" / FOLDER / config.name
    save(path, model)
    tuned = load(path)
    after = evaluate(config, tuned, rubric, held_out)
    record = file_record(
        path,
        FOLDER,
        family=base_file.family,
        role=base_file.role,
        licence=base_file.licence,
        card=config.card,
    )
    write_json(run.out / "file.json", dataclasses.asdict(record))
    write_json(run.out / "curve.json", {"before": before, "after": after, "epochs": curve})
    for name, judged in (("before", base), ("after", tuned)):
        draw_grid(config, judged, held_out, run.out / f"grid_{name}.png")
    metrics = {f"generator/{key.replace('/', '_')}_before": value for key, value in before.items()}
    metrics |= {f"generator/{key.replace('/', '_')}_after": value for key, value in after.items()}
    metrics["generator/lift"] = after["serve/score"] - before["serve/score"]
    metrics["generator/images"] = float(curve[-1]["images"])
    return metrics


def update(
    config: TuneGeneratorConfig,
    flow: ShapesFlow,
    base_flow: Velocity,
    optimizer: torch.optim.Optimizer,
    prompts_B: Sequence[str],
    paths: pairs.Trajectories,
    rewards_B: Tensor,
    order_U: np.ndarray,
    epoch: int,
) -> dict[str, float]:
    """`num_minibatches` optimiser steps on one rollout; unit u is pair u % P at step u // P."""
    dR_B, d_BCHW, rms_B = pairs.finite_difference(rewards_B, paths.images_BCHW, config.min_rms)
    c_B = pairs.trust_clip(rms_B, paths.images_BCHW[0].numel(), config.trust)
    num_pairs = len(prompts_B) // 2
    sums = dict.fromkeys(("train/loss", "train/drift", "train/clipped", "train/grad_norm"), 0.0)
    for index, units in enumerate(np.array_split(order_U, config.num_minibatches)):
        steps = torch.from_numpy(units // num_pairs).repeat_interleave(2)
        rows = torch.from_numpy(
            np.stack([units % num_pairs * 2, units % num_pairs * 2 + 1], 1).ravel()
        )
        x_BCHW, t_B = paths.states_TBCHW[steps, rows], paths.times_T[steps]
        texts = [prompts_B[int(row)] for row in rows.tolist()]
        v_BCHW = flow.velocity(x_BCHW, t_B, texts)
        log_rho_B = pairs.log_ratio(v_BCHW, paths.velocities_TBCHW[steps, rows], d_BCHW[rows])
        loss = pairs.surrogate(log_rho_B, dR_B[rows], c_B[rows]).mean()
        drift = v_BCHW.new_zeros(())
        if config.kl_coef > 0:
            with torch.no_grad():
                v_base_BCHW = base_flow.velocity(x_BCHW, t_B, texts)
            drift = (v_BCHW - v_base_BCHW).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + config.kl_coef * drift).backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), config.grad_clip)
        _check_finite(norm, "gradient norm", epoch, index)
        step = epoch * config.num_minibatches + index
        optimizer.param_groups[0]["lr"] = config.lr * rate(config, step)
        optimizer.step()
        with torch.no_grad():
            far_B = (log_rho_B.exp() - 1).abs() > c_B[rows]
        values = (loss.item(), drift.item(), far_B.float().mean().item(), norm.item())
        for key, value in zip(sums, values, strict=True):
            sums[key] += value / config.num_minibatches
    return {
        **sums,
        "train/pair_rms": float(rms_B.mean()),
        "train/pair_gap": float(dR_B.abs().mean() * 2),
    }


def choose_units(config: TuneGeneratorConfig, rewards_B: Tensor, epoch: int) -> np.ndarray:
    """Units to train on, shuffled: a share of all steps of the pairs with the largest gaps."""
    gaps_P = pairs.half_difference(rewards_B)[::2].abs().numpy()
    kept = np.argsort(-gaps_P, kind="stable")[: math.ceil(config.keep_frac * len(gaps_P))]
    units = (np.arange(config.num_steps)[:, None] * len(gaps_P) + np.sort(kept)).ravel()
    shuffled = np.random.default_rng((config.seed, _SHUFFLE, epoch)).permutation(units)
    return shuffled[: math.ceil(config.train_frac * len(units))]


def rate(config: TuneGeneratorConfig, step: int) -> float:
    """Learning rate factor: linear warm-up, then linear to 0 after the last step."""
    num_steps = config.num_epochs * config.num_minibatches
    return min(1.0, (step + 1) / (config.warmup_steps + 1)) * (1 - step / num_steps)


def draw_prompts(
    config: PromptsConfig, split: str, count: int, entropy: Sequence[int]
) -> list[str]:
    """`count` prompts of one split, kinds in turn; a function of `entropy`.

    A kind's meanings differ until it has no more of them to offer.
    """
    rng = np.random.default_rng(entropy)
    specs: list[language.PromptSpec] = []
    while len(specs) < count:
        kind = config.kinds[len(specs) % len(config.kinds)]
        drawn = {spec.meaning for spec in specs}
        found = []
        while not found or (found[-1].meaning in drawn and len(found) < MAX_DRAWS):
            spec = language.sample_prompt(rng, kinds=(kind,), shapes=config.shapes)
            found += [spec] if language.split_of(spec) == split else []
        specs.append(found[-1])
    return [spec.text for spec in specs]


def torch_seeds(entropy: Sequence[int], count: int) -> list[int]:
    """`count` seeds for torch; a function of `entropy`."""
    return np.random.default_rng(entropy).integers(2**63, size=count).tolist()


@torch.no_grad()
def draw(flow: Velocity, prompts: Sequence[str], noise_BCHW: Tensor, times: list[float]) -> Tensor:
    """Pictures by Euler steps without churn, in batches of 32."""
    pictures = []
    for first in range(0, len(prompts), 32):
        texts, noise = prompts[first : first + 32], noise_BCHW[first : first + 32]

        def denoise(x, t, rows, texts=texts):
            v = flow.velocity(x, t, [texts[int(row)] for row in rows.tolist()])
            return x - t[:, None, None, None] * v

        pictures.append(sample(denoise, noise, [times] * len(texts), "euler")[0])
    return torch.cat(pictures)


def score(rubric: Rubric, prompts: Sequence[str], images_BCHW: Tensor) -> Tensor:
    """Rubric scores of pictures as the renderer would hand them on, clamped to [-1, 1]; `[B]`."""
    rows = rubric.score(prompts, list(images_BCHW.clamp(-1, 1).numpy()))
    return torch.tensor([row["score"] for row in rows])


def out_of_range(images_BCHW: Tensor) -> float:
    """Share of values beyond +-1.05: a first sign of a hacked reward."""
    return float((images_BCHW.abs() > OUT_OF_RANGE).float().mean())


def evaluate(
    config: TuneGeneratorConfig, model, rubric: Rubric, held_out: list[str]
) -> dict[str, float]:
    """Judge a model on held-out prompts, as it is served and as it is tuned, with fixed noise.

    Returns:
        For `serve` and `tuned`: `score`, one score per kind, `out_of_range`, and `spread`, the
        standard deviation of pixels over the seeds of a prompt.
    """
    prompts = [prompt for prompt in held_out for _ in range(config.eval_seeds)]
    seeds = torch_seeds((config.seed, _EVALUATION, 1), len(prompts))
    noise_BCHW = torch.stack([_noise(seed) for seed in seeds])
    kinds = np.array([language.parse(prompt).kind for prompt in prompts])
    result = {}
    settings = {
        "serve": (config.serve_guidance, schedule("simple", config.serve_steps)),
        "tuned": (config.guidance, schedule("simple", config.num_steps, shift=config.time_shift)),
    }
    for name, (guidance, times) in settings.items():
        images_BCHW = draw(ShapesFlow(model, guidance), prompts, noise_BCHW, times)
        scores_B = score(rubric, prompts, images_BCHW).numpy()
        result[f"{name}/score"] = float(scores_B.mean())
        for kind in sorted(set(kinds)):
            result[f"{name}/{kind}"] = float(scores_B[kinds == kind].mean())
        result[f"{name}/out_of_range"] = out_of_range(images_BCHW)
        by_prompt = images_BCHW.unflatten(0, (len(held_out), config.eval_seeds))
        result[f"{name}/spread"] = float(by_prompt.std(1, correction=0).mean())
    return {key: round(value, 6) for key, value in result.items()}


def draw_grid(config: TuneGeneratorConfig, model, held_out: Sequence[str], path: Path) -> None:
    """Write pictures of the first held-out prompts as served; the same noise for every model."""
    prompts = held_out[: config.num_grid_prompts]
    doubled = [prompt for prompt in prompts for _ in range(GRID_SEEDS)]
    seeds = torch_seeds((config.seed, _EVALUATION, 2), GRID_SEEDS) * len(prompts)
    noise_BCHW = torch.stack([_noise(seed) for seed in seeds])
    images_BCHW = draw(
        ShapesFlow(model, config.serve_guidance),
        doubled,
        noise_BCHW,
        schedule("simple", config.serve_steps),
    )
    rows = images_BCHW.numpy().reshape(len(prompts), GRID_SEEDS, *SHAPE)
    write_grid(path, prompts, [list(row) for row in rows])


def _noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _check_finite(value: Tensor, what: str, epoch: int, step: int) -> None:
    if not torch.isfinite(value):
        raise FloatingPointError(f"{what}: got {float(value)} at epoch {epoch}, step {step}")
