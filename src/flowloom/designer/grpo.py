"""GRPO on the frozen reward ensemble; nothing is rendered, unless to watch.

arXiv 2402.03300; FlowRL, arXiv 2505.21478. Departures: 1. probabilities are under the grammar mask,
in rollout, ratio, KL and entropy alike; 2. the reward is mean - beta * std of the ensemble;
3. forced tokens carry no loss; 4. losses are means over choices, not over sequences; 5. advantages
are not divided by the group's std (as in Dr. GRPO, arXiv 2503.20783): with it the policy sharpens
to nearly one workflow; 6. the KL is exact, summed over legal tokens, where k3's gradient is that of
KL(reference || policy): that lets mass go where the reference has none, and there the ensemble was
never trained and is wrong; 7. on wish the KL is paid by the designs of largest spread alone (after
GARDO, arXiv 2512.24138), and the entropy bonus while entropy is below a floor.
One process: flowloom run train_grpo --recipe demo
N processes, which share a file system: torchrun --nproc-per-node N -m flowloom run train_grpo

Shapes: P prompts, G designs per prompt, B = P * G rows, T tokens, N choices of the rows at hand. A
process samples and learns from some of the B rows; rewards are known to all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.config import check
from flowloom.dataset import triplets as triplet_data
from flowloom.designer.config import GRPOConfig
from flowloom.designer.guidance import masked_entropy, masked_kl
from flowloom.designer.loading import load_pair
from flowloom.designer.objective import (
    clipped_gain,
    group_advantages,
    is_clipped,
    k3,
    most_uncertain,
    moved,
)
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.designer.proposals import write_proposals
from flowloom.designer.rollout import Rollout, choice_logprobs, rollout
from flowloom.designer.sft import is_valid
from flowloom.designer.watch import Watch
from flowloom.processes import Processes
from flowloom.reward.ensemble import Ensemble
from flowloom.runs import Run, write_state
from flowloom.workflow import Catalogue, Grammar, Vocabulary, decode

LATER_ROUND = 1 << 20
"""Added to the seed of a run that goes on from another: other prompts, other noise."""


def train_grpo(
    config: GRPOConfig, run: Run, *, catalogue: Path, triplets: Path, designer: Path, reward: Path,
    start: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Optimise a designer against a reward ensemble.

    Args:
        config: Its configuration.
        run: Run folder; `out` becomes an adapter folder, with `proposals.parquet` on wish.
        catalogue: Folder of `publish_generator`.
        triplets: Folder of `build_triplets`; only its unrendered train prompts are used.
        designer: Designer folder of `train_sft`: the reference, and the start without `start`.
        reward: Ensemble folder of `calibrate_reward`.
        start: Adapter folder of that designer to go on from.

    Returns:
        Means over the last steps.

    Raises:
        ValueError: The prompts of a minibatch cannot be shared by the processes.
        FloatingPointError: A loss or reward is not finite, or the trust region is left; names
            the step.
    """
    torch.set_num_threads(config.num_threads)
    if start is not None:
        config = dataclasses.replace(config, seed=config.seed + LATER_ROUND)
    processes = Processes()
    G, num_groups = config.designs_per_prompt, config.prompts_per_step
    groups_P = own_groups(config, processes.num, processes.rank)

    # Load
    installed = Catalogue.load(catalogue / "catalogue.json.gz")
    policy, reference = load_pair(designer, start)
    vocabulary = Vocabulary.from_json(json.loads((designer / VOCABULARY_FILE).read_text()))
    grammar = Grammar(installed, vocabulary, policy.config.num_workflow_tokens)
    scorer = CachedReward(Ensemble.load(reward))
    listed = triplet_data.load_unrendered_prompts(triplets)
    prompts = [row["prompt"] for row in listed]

    # Build
    tuned = policy.tuned_parameters()
    weights = list(tuned.values())
    policy.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rows_B = (groups_P[:, None] * G + torch.arange(G)).flatten()
    whole = functools.partial(_whole, processes, rows_B=rows_B, num_rows=num_groups * G)
    # Positions among the rows of this process: one tensor per backward pass.
    parts = torch.arange(len(rows_B)).chunk(config.num_minibatches * config.accumulate)
    minibatches = [
        parts[first : first + config.accumulate]
        for first in range(0, len(parts), config.accumulate)
    ]
    watch = None
    if config.watch_every is not None and processes.is_first:
        watch = Watch(config, catalogue, scorer.ensemble, prompts)

    # Resume
    checkpoint = run.work / "state.pt"
    first, history, watched = 0, [], {}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, weight in tuned.items():
                weight.copy_(state["policy"][name])
        optimizer.load_state_dict(state["optimizer"])
        first, history, watched = state["step"], state["history"], state["watched"]
        scorer.known = state["rewards"]
        if processes.is_first:
            run.log(f"resumed at step {first}")

    # Loop
    for step in range(first, config.num_steps):
        # Roll out
        batch = _draw(prompts, config, step)
        own = [batch[group] for group in groups_P]
        sampled = _roll_out(policy, grammar, own, rows_B, config, step)
        sequences, tokens = sampled.sequences, sampled.tokens

        # Score: each process its own designs, then every row is known to all.
        scored_B2 = torch.tensor(scorer([p for p in own for _ in range(G)], tokens))
        padding = policy.config.num_workflow_tokens - sequences.tokens_BT.shape[1]
        tokens_BT = whole(F.pad(sequences.tokens_BT, (0, padding)))
        lengths_B = whole(sequences.lengths_B)
        rewards_B, spreads_B = whole(scored_B2).unbind(1)
        if not rewards_B.isfinite().all():
            raise FloatingPointError(f"train_grpo: step {step}: a reward is not finite")
        designs = [row[:n] for row, n in zip(tokens_BT.tolist(), lengths_B.tolist(), strict=True)]
        scorer.learn([p for p in batch for _ in range(G)], designs, rewards_B, spreads_B)
        advantages_PG = group_advantages(
            rewards_B.view(-1, G), config.divide_by_std, config.advantage_clip
        )
        advantages_B = advantages_PG.flatten()[rows_B]
        penalised_B = None
        if config.kl_gate_frac is not None:
            penalised_B = most_uncertain(spreads_B, config.kl_gate_frac)[rows_B]

        # Count choices; their mean surprise estimates the entropy per choice without bias.
        num_B = sequences.choice_BT.sum(1)
        num_M = processes.sum(torch.stack([num_B[torch.cat(some)].sum() for some in minibatches]))
        surprise = processes.sum(-sampled.logprobs_BT.sum()) / num_M.sum()
        floor = config.entropy_floor
        entropy_coef = config.entropy_coef if floor is None or surprise < floor else 0.0

        # Update
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
        prompts_PL = policy.encode_prompts(batch)[groups_P]
        updates = []
        for index, minibatch in [*enumerate(minibatches)] * config.epochs:
            num = int(num_M[index])
            sums = torch.zeros(5)
            optimizer.zero_grad()
            for part_B in minibatch:
                part = sequences.select(part_B)
                prompt_rows = prompts_PL[part_B[0] // G : part_B[-1] // G + 1]
                with torch.no_grad():
                    reference_NV, reference_N = choice_logprobs(reference, prompt_rows, part)
                logprobs_NV, logprobs_N = choice_logprobs(policy, prompt_rows, part)
                choice_BT, device = part.choice_BT, logprobs_N.device
                of_N = choice_BT.nonzero()[:, 0]
                old_N = sampled.logprobs_BT[part_B, : choice_BT.shape[1]][choice_BT].to(device)
                advantages_N = advantages_B[part_B][of_N].to(device)
                if config.kl == "exact":
                    kl_N = masked_kl(logprobs_NV, reference_NV)
                else:
                    kl_N = k3(reference_N, logprobs_N)
                penalty_N = kl_N
                if penalised_B is not None:
                    penalty_N = kl_N * penalised_B[part_B][of_N].to(device)
                entropy_N = masked_entropy(logprobs_NV)
                gain_N = clipped_gain(logprobs_N, old_N, advantages_N, config.clip)
                objective_N = gain_N - config.kl_coef * penalty_N + entropy_coef * entropy_N
                loss = -objective_N.sum() / num
                loss.backward()
                with torch.no_grad():
                    moved_N = moved(logprobs_N, old_N)
                    clipped_N = is_clipped(logprobs_N, old_N, advantages_N, config.clip)
                    measured = (-objective_N, kl_N, entropy_N, moved_N, clipped_N)
                    sums += torch.stack([values_N.sum().float() for values_N in measured]).cpu()
            processes.sum_gradients(weights)
            means = processes.sum(sums) / num
            norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
            if not (means[0].isfinite() and norm.isfinite()):
                raise FloatingPointError(f"train_grpo: step {step}: loss is {means[0].item()}")
            optimizer.step()
            updates.append(torch.cat([means[1:], norm.cpu()[None]]))

        # Log
        kl, entropy, step_kl, clipped, norms = torch.stack(updates).unbind(1)
        # Valid by construction; one design of each group shows that it stays so.
        valid = [is_valid(decode(row, grammar), installed) for row in tokens[::G]]
        valid_P = _whole(processes, torch.tensor(valid).float(), groups_P, num_groups)
        record = {
            "grpo/reward": rewards_B.mean().item(),
            "grpo/reward_within_std": rewards_B.view(-1, G).std(1).mean().item(),
            "grpo/spread": spreads_B.mean().item(),
            "grpo/kl": kl.mean().item(),
            "grpo/entropy": entropy.mean().item(),
            "grpo/step_kl": step_kl.max().item(),
            "grpo/clip_frac": clipped.mean().item(),
            "grpo/grad_norm": norms.mean().item(),
            "grpo/unique_frac": len(set(map(tuple, designs))) / len(designs),
            "grpo/mean_tokens": lengths_B.float().mean().item(),
            "grpo/valid_frac": valid_P.mean().item(),
        }
        history.append(record)
        looked = {}
        if watch is not None and watch.is_due(step):
            looked = watched = watch.look(policy, grammar, step)
        if processes.is_first:
            run.metric(step, record | looked)
        if record["grpo/step_kl"] > config.max_step_kl:
            raise FloatingPointError(
                f"train_grpo: step {step}: moved {record['grpo/step_kl']:.3g} nats per choice, "
                f"expected at most max_step_kl = {config.max_step_kl}"
            )
        if processes.is_first and ((step + 1) % 5 == 0 or step + 1 == config.num_steps):
            short = ("reward", "kl", "entropy", "unique_frac", "mean_tokens")
            shown = ", ".join(f"{name} {record['grpo/' + name]:.3g}" for name in short)
            run.log(f"step {step + 1}/{config.num_steps}: {shown}")

        # Save
        if processes.is_first and (step + 1) % config.checkpoint_every == 0:
            state = {"policy": {name: weight.detach() for name, weight in tuned.items()}}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "history": history}
            write_state(checkpoint, {**state, "watched": watched, "rewards": scorer.known})

    last = history[-5:]
    metrics = {name: sum(row[name] for row in last) / len(last) for name in last[0]}
    metrics = {"grpo/first_reward": history[0]["grpo/reward"], **metrics, **watched}
    if processes.is_first:
        policy.save_adapter(run.out, designer)
        if config.num_proposals is not None:
            metrics["grpo/proposals"] = write_proposals(
                run.out,
                policy,
                grammar,
                scorer.ensemble,
                listed,
                triplet_data.load_calibration_prompts(triplets),
                config.num_proposals,
                (config.seed << 32) + config.num_steps,
            )
    return metrics


def own_groups(config: GRPOConfig, num_processes: int, rank: int) -> Tensor:
    """Groups of a step that this process samples and learns from: a share of each minibatch.

    Raises:
        ValueError: A minibatch has no whole number of groups per process and backward pass.
    """
    per_minibatch = config.prompts_per_step // config.num_minibatches
    passes = num_processes * config.accumulate
    expected = f"a divisor of the {per_minibatch} prompts of a minibatch"
    check(per_minibatch % passes == 0, "processes * accumulate", passes, expected)
    return (
        torch.arange(config.prompts_per_step)
        .view(-1, num_processes, per_minibatch // num_processes)[:, rank]
        .flatten()
    )


def _draw(prompts: Sequence[str], config: GRPOConfig, step: int) -> list[str]:
    """The prompts of a step: a function of (seed, step), repeated only where there are too few."""
    rng = np.random.default_rng([config.seed, step])
    num, repeated = config.prompts_per_step, config.prompts_per_step > len(prompts)
    drawn: list[int] = rng.choice(len(prompts), num, replace=repeated).tolist()
    return [prompts[i] for i in drawn]


def _roll_out(
    policy: Policy,
    grammar: Grammar,
    prompts: Sequence[str],
    rows_B: Tensor,
    config: GRPOConfig,
    step: int,
) -> Rollout:
    """Designs of some of a step's prompts; row b is a function of (policy, seed, step, b) alone."""
    return rollout(
        policy,
        grammar,
        prompts,
        config.designs_per_prompt,
        seed=(config.seed << 32) + step,
        streams=rows_B.tolist(),
    )


def _whole(processes: Processes, part_B: Tensor, rows_B: Tensor, num_rows: int) -> Tensor:
    """All rows of a step, put together from those of each process."""
    whole_B = part_B.new_zeros(num_rows, *part_B.shape[1:])
    whole_B[rows_B] = part_B
    return processes.sum(whole_B)


class CachedReward:
    """The ensemble's reward and spread, asked once for each (prompt, design) of the run."""

    def __init__(self, ensemble: Ensemble):
        """Start with nothing known."""
        self.ensemble = ensemble
        self.known: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}

    def __call__(
        self, prompts: Sequence[str], tokens: Sequence[list[int]]
    ) -> list[tuple[float, float]]:
        """Rewards and spreads of designs, one per prompt."""
        keys = _keys(prompts, tokens)
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        if new:
            asked = [p for p, _ in new], [list(row) for _, row in new]
            rewards, (_, spreads) = self.ensemble.reward(*asked), self.ensemble.predict(*asked)
            pairs = zip(map(float, rewards), map(float, spreads), strict=True)
            self.known.update(zip(new, pairs, strict=True))
        return [self.known[key] for key in keys]

    def learn(
        self,
        prompts: Sequence[str],
        tokens: Sequence[list[int]],
        rewards_B: Tensor,
        spreads_B: Tensor,
    ) -> None:
        """Remember what other processes asked."""
        pairs = zip(rewards_B.tolist(), spreads_B.tolist(), strict=True)
        for key, pair in zip(_keys(prompts, tokens), pairs, strict=True):
            self.known.setdefault(key, pair)


def _keys(prompts: Sequence[str], tokens: Sequence[list[int]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(p, tuple(row)) for p, row in zip(prompts, tokens, strict=True)]
