"""Supervised fine-tuning of the designer: maximum likelihood of workflows under the grammar mask.

Phase 1 fits the prior on prompt-workflow pairs, streamed from token shards (`examples`). Phase 2,
where there are triplets, fits the best cells of each train prompt; or, with `score_levels`, all
cells after a word for their score, as ComfyGen-FT (arXiv 2410.01731).

Departures: 1. the likelihood is of legal tokens against legal tokens, so nothing is spent on
learning the grammar; 2. forced tokens carry no loss; 3. cells are judged by shrunk means
(`selection`).
One process: flowloom run train_sft --recipe demo
N processes: torchrun --nproc-per-node N -m flowloom run train_sft --recipe demo

Shapes: B sequences of a batch, T tokens, N choices in it, L prompt positions.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowloom.dataset import triplets as triplet_data
from flowloom.dataset.pairs import stream_pairs
from flowloom.dataset.splits import PAIR_SPLITS, TRAIN
from flowloom.designer.config import SFTConfig
from flowloom.designer.examples import Examples, pair_examples, write_shard
from flowloom.designer.extension import CATALOGUE_FILE, load_extended
from flowloom.designer.loading import build_policy
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.designer.rollout import choice_logprobs, rollout
from flowloom.designer.score_levels import (
    levels_of,
    prompt_for_best,
    prompt_with_level,
    save_levels,
)
from flowloom.designer.selection import best_cells, shrunk_means
from flowloom.processes import Processes
from flowloom.runs import Run, write_json, write_state
from flowloom.workflow import Catalogue, Grammar, Vocabulary, Workflow, decode, validate

PHASES = ("prior", "best")
EVAL_ROWS = 64
"""Held-out pairs per forward pass."""


def train_sft(
    config: SFTConfig, run: Run, *, catalogue: Path, pairs: Path, triplets: Path | None = None,
    start: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a designer.

    Args:
        config: Its configuration.
        run: Run folder; `out` becomes a designer folder.
        catalogue: Folder of `publish_generator`, or any with a `catalogue.json.gz`; copied.
        pairs: Folder of `build_pairs`.
        triplets: Folder of `build_triplets`; without it there is no phase 2, and nothing that was
            ever rendered is needed.
        start: Designer folder to go on from, its vocabulary extended to files that came since;
            `config.policy` then says nothing. Without it a designer is trained from scratch.

    Returns:
        Losses in nats per choice, also of held-out pairs and there per workflow; validity, distinct
        share and length of samples. Nothing in a process that another one logs for.

    Raises:
        ValueError: Nothing to train on, or a batch smaller than the number of processes.
        FloatingPointError: The loss is not finite; names the step.
    """
    torch.set_num_threads(config.num_threads)

    # Validate
    processes = Processes()
    if config.batch_size < processes.num:
        raise ValueError(f"batch_size: got {config.batch_size}, expected >= {processes.num}")
    spans = (config.prior_steps, config.best_steps if triplets else 0)
    if not sum(spans):
        raise ValueError("prior_steps: got 0 without triplets, expected a step")

    # Load
    installed = Catalogue.load(catalogue / CATALOGUE_FILE)
    begun, vocabulary = None, Vocabulary.build(installed)
    if start is not None:
        begun, vocabulary = load_extended(start, installed)
    num_tokens = (begun.config if begun else config.policy).num_workflow_tokens
    grammar = Grammar(installed, vocabulary, num_tokens)
    if processes.is_first:
        _write_examples(config, run, grammar, catalogue, pairs, triplets)
    processes.wait()
    shards = [sorted(run.work.glob(f"{name}-*.arrow")) for name in PHASES]
    data = [Examples(paths, vocabulary.size) if paths else None for paths in shards]
    texts = {prompt for examples in data if examples for prompt in examples.prompts()}
    texts |= {prompt_with_level("", level) for level in range(config.score_levels or 0)}

    # Build
    policy = begun or build_policy(
        config.policy, vocabulary=vocabulary, catalogue=installed, texts=sorted(texts),
        seed=config.seed,
    )  # fmt: skip
    weights = policy.trainable_parameters()
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    phases = [(step, phase, span) for phase, span in enumerate(spans) for step in range(span)]
    streams = [
        examples.batches(config.batch_size, (config.seed, phase)) if examples else None
        for phase, examples in enumerate(data)
    ]

    # Resume
    checkpoint = run.work / "state.pt"
    first, losses = 0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["policy"][name])
        optimizer.load_state_dict(state["optimizer"])
        first, losses = state["step"], state["losses"]
        if processes.is_first:
            run.log(f"resumed at step {first}")

    # Loop
    policy.train()
    for step, (in_phase, phase, span) in enumerate(phases):
        examples, stream = data[phase], streams[phase]
        assert examples
        assert stream
        rows = next(stream)
        if step < first:
            continue

        # Update
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        lr = config.lr * warm * (1.0 - 0.9 * in_phase / span)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        # Dropout, where a model has it, is a function of (seed, step, rank) too.
        torch.manual_seed(_dropout_seed(config.seed, step, processes.rank))
        # Divided by what a batch has on average: by its own number, whose batches are of like
        # length, short workflows would count for more than long ones.
        usual = len(rows) * float(examples.num_choices.mean())
        nats, mine = torch.zeros(()), rows[processes.rank :: processes.num]
        for part in mine.split(config.micro_batch_size or len(mine)):
            part_nats = -_logprob(policy, examples, part)
            (part_nats / usual).backward()
            nats += part_nats.detach().cpu()
        loss = processes.sum(nats) / int(examples.num_choices[rows].sum())
        processes.sum_gradients(weights.values())
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.grad_clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"train_sft: step {step}: loss is {loss.item()}")
        optimizer.step()

        # Log
        losses.append(loss.item())
        name = PHASES[phase]
        if not processes.is_first:
            continue
        per_row = losses[-1] * float(examples.num_choices[rows].mean())
        values = {f"sft/{name}_loss": losses[-1], f"sft/{name}_nats": per_row, "sft/lr": lr}
        run.metric(step, values)
        if (step + 1) % 50 == 0 or step + 1 == len(phases):
            run.log(f"step {step + 1}/{len(phases)} {name}: {losses[-1]:.3f} nats per choice")

        # Save
        if (step + 1) % config.checkpoint_every == 0:
            state = {"policy": dict(weights), "optimizer": optimizer.state_dict()}
            write_state(checkpoint, {**state, "step": step + 1, "losses": losses})

    # Report
    if not processes.is_first:
        return {}
    policy.eval()
    policy.save(run.out)
    write_json(run.out / VOCABULARY_FILE, vocabulary.to_json())
    shutil.copyfile(catalogue / CATALOGUE_FILE, run.out / CATALOGUE_FILE)
    save_levels(run.out, config.score_levels)
    metrics = {"sft/params": float(sum(weight.numel() for weight in policy.parameters()))}
    for name, part in zip(PHASES, np.split(losses, [config.prior_steps]), strict=True):
        if len(part):
            metrics[f"sft/{name}_loss"] = float(part[-10:].mean())
    held_out = sorted(run.work.glob("held-out-*.arrow"))
    if held_out:
        metrics |= _held_out(policy, Examples(held_out, vocabulary.size))
    prior = data[0]
    assert prior
    prompts = [prompt_for_best(prompt, config.score_levels) for prompt in sorted(prior.prompts())]
    sampled = _sample(policy, grammar, prompts, config.num_samples, config.seed)
    run.log(
        ", ".join(f"{name.removeprefix('sft/')} {value:.4g}" for name, value in sampled.items())
    )
    return metrics | sampled


def is_valid(workflow: Workflow, catalogue: Catalogue) -> bool:
    """Whether a workflow has no error; warnings are allowed."""
    return all(problem.severity != "error" for problem in validate(workflow, catalogue))


def _write_examples(
    config: SFTConfig, run: Run, grammar: Grammar, catalogue: Path, pairs: Path,
    triplets: Path | None,
) -> None:  # fmt: skip
    """Token shards of both phases and of held-out pairs, those that are missing."""
    shards = pair_examples(pairs, catalogue, grammar, run.work, config.num_processes)
    held_out = (
        row
        for table in stream_pairs(pairs, PAIR_SPLITS[1:], ("prompt", "workflow"))
        for row in zip(table["prompt"], table["workflow"], strict=True)
    )
    some = list(itertools.islice(held_out, config.num_held_out))
    if some:
        write_shard(run.work / "held-out-00000.arrow", some, grammar)
    if triplets is None:
        if config.best_steps:
            run.log("no triplets: phase 1 alone")
    elif config.best_steps:
        write_shard(run.work / "best-00000.arrow", _good_cells(config, triplets), grammar)
    run.log(f"{len(shards)} shards of pairs")


def _good_cells(config: SFTConfig, triplets: Path) -> list[tuple[str, str]]:
    """Prompts and workflows of phase 2: the best cells, or all of them with their level."""
    rows = triplet_data.load(triplets, TRAIN)
    workflow_of = dict(zip(rows["fingerprint"], rows["workflow"], strict=True))
    scores = shrunk_means(*(rows[name] for name in ("prompt", "kind", "fingerprint", "score")))
    if config.score_levels is None:
        chosen = best_cells(scores, config.best_per_prompt)
    else:
        levels = levels_of(scores, config.score_levels)
        chosen = [(prompt_with_level(cell[0], k), cell[1]) for cell, k in levels.items()]
    return [(prompt, workflow_of[fingerprint]) for prompt, fingerprint in chosen]


def _logprob(policy: Policy, examples: Examples, rows: Tensor) -> Tensor:
    """Log-likelihood of some designs under the mask, summed over their choices."""
    prompts, sequences = examples.select(rows)
    return choice_logprobs(policy, policy.encode_prompts(prompts), sequences)[1].sum()


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _held_out(policy: Policy, examples: Examples) -> dict[str, float]:
    """Masked likelihood of pairs that were not trained on, in nats."""
    with torch.no_grad():
        parts = torch.arange(len(examples)).split(EVAL_ROWS)
        nats = -sum(float(_logprob(policy, examples, rows)) for rows in parts)
    return {
        "sft/held_out_loss": nats / float(examples.num_choices.sum()),
        "sft/held_out_nats": nats / len(examples),
    }


def _sample(
    policy: Policy, grammar: Grammar, prompts: Sequence[str], num: int, seed: int
) -> dict[str, float]:
    """Validity (1 by construction), distinct share and mean length of `num` samples."""
    prompts = [prompts[place * len(prompts) // num] for place in range(num)]
    designs = rollout(policy, grammar, prompts, seed=seed).tokens
    workflows = [decode(tokens, grammar) for tokens in designs]
    valid = [is_valid(workflow, grammar.catalogue) for workflow in workflows]
    unique = {workflow.template_fingerprint() for workflow in workflows}
    return {
        "sft/valid_frac": float(np.mean(valid)),
        "sft/unique_frac": len(unique) / num,
        "sft/mean_tokens": float(np.mean([len(tokens) for tokens in designs])),
    }
