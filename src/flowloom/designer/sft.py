"""Supervised fine-tuning of the designer: maximum likelihood of workflows under the grammar mask.

Phase 1 fits the prior on prompt-workflow pairs. Phase 2 fits the best cells of each train prompt of
the triplets: score-conditioned fine-tuning as in ComfyGen-FT (arXiv 2410.01731), with the score's
condition replaced by a choice.

Departures: 1. the likelihood is of legal tokens against legal tokens, so nothing is spent on
learning the grammar; 2. forced tokens carry no loss; 3. cells are chosen by shrunk means
(`selection`).
One process: flowloom run train_sft --recipe demo

Shapes: B sequences of a batch, T tokens, N choices in it, L prompt positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowloom.dataset import triplets as triplet_data
from flowloom.dataset.pairs import read_pairs
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.config import SFTConfig
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.designer.rollout import Sequences, choice_logprobs, replay, rollout
from flowloom.designer.selection import best_cells, shrunk_means
from flowloom.runs import Run, write_json, write_state
from flowloom.workflow import Catalogue, Grammar, Vocabulary, Workflow, decode, encode, validate

POOL_BATCHES = 8
"""Batches sorted by length together: little padding, still random company."""


def train_sft(
    config: SFTConfig, run: Run, *, catalogue: Path, pairs: Path, triplets: Path
) -> dict[str, float]:
    """Train a designer from scratch.

    Args:
        config: Its configuration.
        run: Run folder; `out` becomes a designer folder.
        catalogue: Folder of `publish_generator`.
        pairs: Folder of `build_pairs`.
        triplets: Folder of `build_triplets`.

    Returns:
        Losses in nats per choice, validity, distinct share and length of samples.

    Raises:
        FloatingPointError: The loss is not finite; names the step.
    """
    torch.set_num_threads(config.num_threads)

    # Load
    installed = Catalogue.load(catalogue / "catalogue.json.gz")
    vocabulary = Vocabulary.build(installed)
    grammar = Grammar(installed, vocabulary, config.policy.num_workflow_tokens)
    pair_rows = read_pairs(pairs, columns=("prompt", "workflow"))
    train_rows = triplet_data.load(triplets, "train")
    tokenizer = WordTokenizer.fit([*pair_rows["prompt"], *train_rows["prompt"]])

    # Build
    policy = Policy(config.policy, tokenizer, vocabulary.size, config.seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    prior = _Examples(pair_rows["prompt"], _encode(pair_rows["workflow"], grammar), grammar)
    chosen = best_cells(
        shrunk_means(*(train_rows[c] for c in ("prompt", "kind", "fingerprint", "score"))),
        config.best_per_prompt,
    )
    workflow_of = dict(zip(train_rows["fingerprint"], train_rows["workflow"], strict=True))
    best = _Examples(
        [prompt for prompt, _ in chosen],
        _encode([workflow_of[fingerprint] for _, fingerprint in chosen], grammar),
        grammar,
    )
    phases = [
        (step, phase, span)
        for phase, span in enumerate((config.prior_steps, config.best_steps))
        for step in range(span)
    ]
    streams = [
        examples.batches(config.batch_size, (config.seed, phase))
        for phase, examples in enumerate((prior, best))
    ]

    # Resume
    checkpoint = run.work / "state.pt"
    start, losses = 0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]
        run.log(f"resumed at step {start}")

    # Loop
    for step, (in_phase, phase, span) in enumerate(phases):
        rows = next(streams[phase])
        if step < start:
            continue
        examples = (prior, best)[phase]

        # Update
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        lr = config.lr * warm * (1.0 - 0.9 * in_phase / span)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sequences = examples.sequences.select(rows)
        _, logprobs_N = choice_logprobs(policy, examples.prompt_ids(policy, rows), sequences)
        loss = -logprobs_N.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"train_sft: step {step}: loss is {loss.item()}")
        optimizer.step()

        # Log
        losses.append(loss.item())
        nats = -logprobs_N.sum().item() / len(rows)
        name = ("prior", "best")[phase]
        run.metric(step, {f"sft/{name}_loss": losses[-1], f"sft/{name}_nats": nats, "sft/lr": lr})
        if (step + 1) % 50 == 0 or step + 1 == len(phases):
            run.log(f"step {step + 1}/{len(phases)} {name}: {losses[-1]:.3f} nats per choice")

        # Save
        if (step + 1) % config.checkpoint_every == 0:
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            write_state(checkpoint, {**state, "step": step + 1, "losses": losses})

    policy.save(run.out)
    write_json(run.out / VOCABULARY_FILE, vocabulary.to_json())
    prompts = sorted(set(train_rows["prompt"]))
    sampled = _sample(policy, grammar, prompts, config.num_samples, config.seed)
    metrics = {"sft/params": float(sum(weight.numel() for weight in policy.parameters()))}
    for name, part in zip(("prior", "best"), np.split(losses, [config.prior_steps]), strict=True):
        if len(part):
            metrics[f"sft/{name}_loss"] = float(part[-10:].mean())
    metrics.update({f"sft/{name}": value for name, value in sampled.items()})
    run.log(f"samples: {sampled['valid_frac']:.3f} valid, {sampled['unique_frac']:.3f} distinct")
    return metrics


def is_valid(workflow: Workflow, catalogue: Catalogue) -> bool:
    """Whether a workflow has no error; warnings are allowed."""
    return all(problem.severity != "error" for problem in validate(workflow, catalogue))


class _Examples:
    """Prompts and designs, replayed through the grammar once."""

    def __init__(self, prompts: Sequence[str], designs: Sequence[list[int]], grammar: Grammar):
        self.prompts = list(prompts)
        self.sequences: Sequences = replay(grammar, designs)

    def prompt_ids(self, policy: Policy, rows: Tensor) -> Tensor:
        return policy.encode_prompts([self.prompts[row] for row in rows.tolist()])

    def batches(self, batch_size: int, key: Sequence[int]) -> Iterator[Tensor]:
        """Endless batches of rows of like length; epoch e is a function of (key, e)."""
        lengths = self.sequences.lengths_B.numpy()
        num = len(lengths)
        if num == 0:
            raise ValueError("train_sft: got no examples, expected at least one")
        # With fewer rows than a batch, an epoch is repeated until it fills one.
        repeats = -(-batch_size // num)
        epoch = 0
        while True:
            rng = np.random.default_rng([*key, epoch])
            order = np.concatenate([rng.permutation(num) for _ in range(repeats)])
            order = order[: len(order) // batch_size * batch_size]
            pools = [
                order[at : at + POOL_BATCHES * batch_size]
                for at in range(0, len(order), POOL_BATCHES * batch_size)
            ]
            by_length = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
            order = np.concatenate(by_length)
            for batch in rng.permutation(len(order) // batch_size):
                yield torch.from_numpy(order[batch * batch_size : (batch + 1) * batch_size])
            epoch += 1


def _encode(workflows: Sequence[str], grammar: Grammar) -> list[list[int]]:
    """Tokens of template workflows (API JSON), each distinct one encoded once."""
    known: dict[str, list[int]] = {}
    for text in workflows:
        if text not in known:
            known[text] = encode(Workflow.from_api(json.loads(text)), grammar).tokens
    return [known[text] for text in workflows]


def _sample(
    policy: Policy, grammar: Grammar, prompts: Sequence[str], num: int, seed: int
) -> dict[str, float]:
    """Validity (1 by construction), distinct share and mean length of `num` samples."""
    prompts = [prompts[i % len(prompts)] for i in range(num)]
    designs = rollout(policy, grammar, prompts, seed=seed).tokens
    workflows = [decode(tokens, grammar) for tokens in designs]
    valid = [is_valid(workflow, grammar.catalogue) for workflow in workflows]
    unique = {workflow.template_fingerprint() for workflow in workflows}
    return {
        "valid_frac": float(np.mean(valid)),
        "unique_frac": len(unique) / num,
        "mean_tokens": float(np.mean([len(tokens) for tokens in designs])),
    }
