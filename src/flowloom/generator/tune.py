"""Reward tuning of a generator: the loop of `tune_generator`, whatever the method.

Each epoch draws pictures of some prompts, has them scored while the next ones are drawn, and takes
a few optimiser steps on what the method makes of them: FDFO (`fdfo`) or Flow-GRPO (`flow_grpo`).
N processes draw different prompts; what is trained on is shuffled over all of them, each computes
its own pictures' share of a minibatch, and gradients are summed. N do what one does, up to the
order of summation.

One process: flowloom run tune_generator --recipe demo
N processes, which share a file system: torchrun --nproc-per-node N -m flowloom run tune_generator

Shapes: P prompts, K pictures per prompt, B = P * K rows, b rows of this process, U units that are
trained on, 1J: the score and its J terms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.config import check
from flowloom.generator.averaging import WeightAverage
from flowloom.generator.balance import Balance
from flowloom.generator.card import CARD, write_card
from flowloom.generator.config import FDFOConfig, TuneGeneratorConfig
from flowloom.generator.evaluation import draw_rows, judge, times
from flowloom.generator.fdfo import FDFO
from flowloom.generator.flow_grpo import FlowGRPO
from flowloom.generator.judged import Judged, describe, signs_of_hacking
from flowloom.generator.judging_config import Setting
from flowloom.generator.method import Method
from flowloom.generator.pictures import write_comparison
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Part, Share, roll_out
from flowloom.generator.source import load_source, write_source
from flowloom.generator.velocity import Generator, Untuned
from flowloom.generator.watch import Watch
from flowloom.processes import Processes
from flowloom.runs import Run, write_json, write_state
from flowloom.score.build import build_rubric
from flowloom.score.rubric import Rubric

_PROMPTS, _NOISE, _SHUFFLE, _EVALUATION = range(4)


def tune_generator(config: TuneGeneratorConfig, run: Run) -> dict[str, float]:
    """Tune a generator; write its files, their catalogue records, card, grids and curve.

    Raises:
        ValueError: The base is not to be had, or the epoch cannot be shared or cut as configured.
        FloatingPointError: A picture, a reward, a loss or a gradient is not finite; names epoch
            and step.
        RuntimeError: A rollout or a score failed, here or in another process; names the epoch.
    """
    torch.set_num_threads(config.num_threads)
    processes = Processes()
    num_prompts = config.images_per_epoch // config.method.num_branches
    expected = f"at most the {num_prompts} prompts of an epoch"
    check(processes.num <= num_prompts, "processes", processes.num, expected)

    # Load
    rubric = build_rubric(config.rubric, config.score_timeout_s)
    prompts_EP = [
        draw_prompts(config.prompts, "train", num_prompts, (config.seed, _PROMPTS, epoch))
        for epoch in range(config.num_epochs)
    ]
    entropy = (config.seed, _EVALUATION)
    held_out = draw_prompts(config.prompts, "holdout", config.judging.num_prompts, entropy)
    watch = Watch(config, rubric, processes)
    asked = [prompt for some in (*prompts_EP, held_out, watch.all_prompts) for prompt in some]
    source = load_source(config, list(dict.fromkeys(asked)), processes)
    flow = source.flow

    # Build
    setting = Setting(
        num_steps=config.num_steps, guidance=config.guidance, time_shift=config.time_shift
    )
    method = build_method(config, setting)
    optimizer = torch.optim.AdamW(
        flow.parameters(),
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
    )
    balance = None
    if config.balance_epochs is not None:
        weights = [term.weight or 1.0 for term in rubric.terms]
        balance = Balance(weights, config.balance_epochs)
    average = WeightAverage(flow, config.average_epochs)
    share = Share(processes, num_prompts, method.num_branches)

    # Resume, or judge the base
    state_path = run.work / "state.pt"
    first, curve, before = 0, [], None
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        flow.load_state_dict(state["generator"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        watch.load_state_dict(state["watch"])
        if balance is not None:
            balance.load_state_dict(state["balance"])
        first, curve = state["epoch"], state["curve"]
        before = Judged.from_dict(state["before"])
        _log(processes, run, f"resumed after epoch {first} of {config.num_epochs}")
    elif processes.is_first:
        before = _judge(config, flow, rubric, setting, held_out)
        run.log(f"base: score {before.interval('serve/score').mean:.3f} as served")

    # Loop
    started_s = time.perf_counter()
    for epoch in range(first, config.num_epochs):
        # Look at held-out prompts
        if watch.is_due(epoch):
            with average.applied(flow):
                _metric(processes, run, epoch, watch.look(flow, epoch))
        if watch.stopped:
            _log(processes, run, f"stopped before epoch {epoch}: {watch.reason}")
            break

        # Roll out own prompts, and score them meanwhile
        seeds_P = torch_seeds((config.seed, _NOISE, epoch), num_prompts)
        parts, scored_B1J, wild_b = roll_out(
            flow, method, rubric, prompts_EP[epoch], seeds_P, share, config.sample_rows, epoch
        )
        rewards_B = scored_B1J[:, 0]
        if balance is not None:
            rewards_B = balance(rewards_B, scored_B1J[:, 1:], method.num_branches)

        # Update the velocity along all paths
        advantages_B = method.advantages(rewards_B)
        rng = np.random.default_rng((config.seed, _SHUFFLE, epoch))
        units_U = method.units(advantages_B, rng)
        logged = update(config, method, flow, optimizer, share, parts, advantages_B, units_U, epoch)
        average.update(flow)

        # Log
        logged["train/reward"] = float(scored_B1J[:, 0].mean())
        for column, term in enumerate(rubric.terms, 1):
            logged[f"train/term/{term.name}"] = float(scored_B1J[:, column].mean())
        logged["train/out_of_range"] = float(share.whole(wild_b).mean())
        names = [f"train/scale/{term.name}" for term in rubric.terms]
        logged |= balance.scales(names) if balance is not None else {}
        curve.append({"images": len(rewards_B) * (epoch + 1), **logged})
        done = epoch + 1
        _metric(processes, run, done, logged)

        # Save
        is_last = done == config.num_epochs
        if processes.is_first and (done % config.checkpoint_every == 0 or is_last):
            assert before is not None, "the first process judged it"
            state = {"epoch": done, "curve": curve, "before": before.to_dict()}
            state |= {"generator": flow.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average.state_dict(), "watch": watch.state_dict()}
            state |= {"balance": balance.state_dict()} if balance is not None else {}
            write_state(state_path, state)
            per_epoch_s = (time.perf_counter() - started_s) / (done - first)
            run.log(
                f"epoch {done} of {config.num_epochs}: reward {logged['train/reward']:.3f}, "
                f"{curve[-1]['images']} images, {per_epoch_s * (config.num_epochs - done):.0f} s "
                "left"
            )
    flow.load_state_dict(average.state_dict() or flow.state_dict())
    if watch.config is not None and not watch.stopped:
        _metric(processes, run, config.num_epochs, watch.look(flow, config.num_epochs))
    if watch.best is not None:
        flow.load_state_dict(watch.best)
    if before is None or not processes.is_first:
        return {}

    # Write the files, and judge them as they will be loaded
    exported, tuned = write_source(config, source, run.out)
    after = _judge(config, tuned.flow, rubric, setting, held_out)
    shown = held_out[: config.judging.num_grid_prompts]
    sides = {"before": Untuned(flow), "after": tuned.flow}
    rows = {name: draw_rows(one, held_out, config.judging) for name, one in sides.items()}
    write_comparison(run.out / "grid.png", shown, rows)
    scores = {"before": before.summary(), "after": after.summary()}
    write_json(run.out / "curve.json", {**scores, "epochs": curve, "looks": watch.looks})
    write_json(run.out / "judged.json", {"before": before.to_dict(), "after": after.to_dict()})
    metrics = {
        f"generator/{key.replace('/', '_')}_{when}": value
        for when, values in scores.items()
        for key, value in values.items()
    }
    metrics["generator/lift"] = scores["after"]["serve/score"] - scores["before"]["serve/score"]
    metrics["generator/images"] = float(curve[-1]["images"])
    write_card(run.out / CARD, config, exported, metrics, describe(before, after))
    for sign in signs_of_hacking(before, after):
        run.log(f"against the gain: {sign}")
    return metrics


def build_method(config: TuneGeneratorConfig, setting: Setting) -> Method:
    """The method that the configuration names.

    Raises:
        ValueError: It does not fit the number of steps.
    """
    if isinstance(config.method, FDFOConfig):
        return FDFO(config.method, times(setting))
    return FlowGRPO(config.method, times(setting))


def update(
    config: TuneGeneratorConfig,
    method: Method,
    flow: Generator,
    optimizer: torch.optim.Optimizer,
    share: Share,
    parts: Sequence[Part],
    advantages_B: Tensor,
    units_U: np.ndarray,
    epoch: int,
) -> dict[str, float]:
    """`num_minibatches` optimiser steps on one rollout; returns means to log.

    Raises:
        ValueError: There are fewer units than minibatches.
        FloatingPointError: A loss or a gradient is not finite; names epoch and step.
    """
    num_minibatches, weights = config.num_minibatches, list(flow.parameters())
    expected = f"at most the {len(units_U)} units that are trained on"
    check(num_minibatches <= len(units_U), "num_minibatches", num_minibatches, expected)
    sums: dict[str, Tensor] = {}
    norms = 0.0
    for index, minibatch_U in enumerate(np.array_split(units_U, num_minibatches)):
        optimizer.zero_grad(set_to_none=True)
        for part, some_U in passes(config, parts, minibatch_U):
            K, own = method.num_branches, part.prompts
            own_b = advantages_B[own.start * K : own.stop * K]
            loss, logged = method.loss(flow, part.paths, own_b, some_U, len(minibatch_U))
            loss.backward()
            for key, value in {"train/loss": loss.detach(), **logged}.items():
                sums[key] = sums.get(key, 0.0) + value.float().cpu() / num_minibatches
        share.processes.sum_gradients(weights)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm: got {norm} at epoch {epoch}, step {index}, expected a number"
            )
        norms += norm / num_minibatches
        optimizer.param_groups[0]["lr"] = config.lr * rate(config, epoch * num_minibatches + index)
        optimizer.step()
    if not sums:
        # No unit was this process's: it still has to know what the others sum up.
        some_U = np.where(np.arange(units_U.shape[1]) == 0, 0, units_U[:1])
        with torch.no_grad():
            _, logged = method.loss(flow, parts[0].paths, advantages_B, some_U, 1)
        sums = {key: torch.zeros(()) for key in ("train/loss", *logged)}
    means = share.processes.sum(torch.stack(list(sums.values())))
    return dict(zip(sums, means.tolist(), strict=True)) | {"train/grad_norm": norms}


def passes(
    config: TuneGeneratorConfig, parts: Sequence[Part], minibatch_U: np.ndarray
) -> Iterator[tuple[Part, np.ndarray]]:
    """The units of a minibatch that are this process's, by part and backward pass."""
    for part in parts:
        prompts_U = minibatch_U[:, 0]
        own_U = minibatch_U[(part.prompts.start <= prompts_U) & (prompts_U < part.prompts.stop)]
        # From here on prompts are counted within the part.
        own_U = own_U - np.eye(1, own_U.shape[1], dtype=int) * part.prompts.start
        size = config.units_per_pass or max(len(own_U), 1)
        for first in range(0, len(own_U), size):
            yield part, own_U[first : first + size]


def rate(config: TuneGeneratorConfig, step: int) -> float:
    """Learning rate factor: linear warm-up, then to 0 after the last step, or as it is."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "constant":
        return warm
    return warm * (1 - step / (config.num_epochs * config.num_minibatches))


def torch_seeds(entropy: Sequence[int], count: int) -> list[int]:
    """`count` seeds for torch; a function of `entropy`."""
    return np.random.default_rng(entropy).integers(2**63, size=count).tolist()


def _judge(
    config: TuneGeneratorConfig,
    flow: Generator,
    rubric: Rubric,
    setting: Setting,
    held_out: Sequence[str],
) -> Judged:
    others = [
        build_rubric(name, config.score_timeout_s) for name in config.judging.held_out_rubrics
    ]
    return judge(flow, held_out, config.judging, [rubric], setting, held_out=others)


def _log(processes: Processes, run: Run, message: str) -> None:
    if processes.is_first:
        run.log(message)


def _metric(processes: Processes, run: Run, step: int, values: Mapping[str, float]) -> None:
    if processes.is_first:
        run.metric(step, values)
