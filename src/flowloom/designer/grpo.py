"""GRPO on the frozen reward ensemble; nothing is rendered.

arXiv 2402.03300; FlowRL, arXiv 2505.21478. Departures: 1. probabilities are under the grammar mask,
in rollout, ratio, KL and entropy alike; 2. the reward is mean - beta * std of the ensemble;
3. forced tokens carry no loss; 4. losses are means over choices, not over sequences; 5. advantages
are not divided by the group's std (as in Dr. GRPO, arXiv 2503.20783): with it the policy sharpens
to nearly one workflow; 6. the KL is exact, summed over legal tokens, where k3's gradient is that of
KL(reference || policy): that lets mass go where the reference has none, and there the ensemble was
never trained and is wrong.
One process: flowloom run train_grpo --recipe demo

Shapes: P prompts, G designs per prompt, B = P * G rows, T tokens, N choices of the rows at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowloom.dataset import triplets as triplet_data
from flowloom.designer.config import GRPOConfig
from flowloom.designer.guidance import masked_entropy, masked_kl
from flowloom.designer.loading import load_pair
from flowloom.designer.policy import VOCABULARY_FILE
from flowloom.designer.rollout import choice_logprobs, rollout
from flowloom.designer.sft import is_valid
from flowloom.reward.ensemble import Ensemble
from flowloom.runs import Run, write_state
from flowloom.workflow import Catalogue, Grammar, Vocabulary, decode


def train_grpo(
    config: GRPOConfig, run: Run, *, catalogue: Path, triplets: Path, designer: Path, reward: Path
) -> dict[str, float]:
    """Optimise a designer against a reward ensemble.

    Args:
        config: Its configuration.
        run: Run folder; `out` becomes an adapter folder.
        catalogue: Folder of `publish_generator`.
        triplets: Folder of `build_triplets`; only its unrendered train prompts are used.
        designer: Designer folder of `train_sft`: start and reference.
        reward: Ensemble folder of `calibrate_reward`.

    Returns:
        Means over the last steps.

    Raises:
        FloatingPointError: A loss or reward is not finite, or the trust region is left; names
            the step.
    """
    torch.set_num_threads(config.num_threads)

    # Load
    installed = Catalogue.load(catalogue / "catalogue.json.gz")
    policy, reference = load_pair(designer)
    vocabulary = Vocabulary.from_json(json.loads((designer / VOCABULARY_FILE).read_text()))
    grammar = Grammar(installed, vocabulary, policy.config.num_workflow_tokens)
    scorer = CachedReward(Ensemble.load(reward))
    prompts = [row["prompt"] for row in triplet_data.load_unrendered_prompts(triplets)]

    # Build
    policy.embedding.requires_grad_(False)
    tuned = list(policy.tuned_parameters().values())
    optimizer = torch.optim.AdamW(
        tuned, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    G = config.designs_per_prompt
    rows_per_minibatch = config.prompts_per_step * G // config.num_minibatches

    # Resume
    checkpoint = run.work / "state.pt"
    start, history = 0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        start, history, scorer.known = state["step"], state["history"], state["rewards"]
        run.log(f"resumed at step {start}")

    # Loop
    for step in range(start, config.num_steps):
        # Roll out
        rng = np.random.default_rng([config.seed, step])
        repeated = config.prompts_per_step > len(prompts)
        drawn = rng.choice(len(prompts), config.prompts_per_step, replace=repeated)
        batch = [prompts[i] for i in drawn]
        sampled = rollout(policy, grammar, batch, G, seed=(config.seed << 32) + step)
        sequences, tokens = sampled.sequences, sampled.tokens

        # Score
        rewards_B = torch.tensor(scorer([p for p in batch for _ in range(G)], tokens))
        if not rewards_B.isfinite().all():
            raise FloatingPointError(f"train_grpo: step {step}: a reward is not finite")
        advantages_B = group_advantages(rewards_B.view(-1, G), config.divide_by_std).flatten()

        # Update
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
        prompts_PL = policy.encode_prompts(batch)
        choices = []
        for first in range(0, len(tokens), rows_per_minibatch):
            rows_B = torch.arange(first, first + rows_per_minibatch)
            part = sequences.select(rows_B)
            prompt_rows = prompts_PL[first // G : (first + rows_per_minibatch) // G]
            width = part.choice_BT.shape[1]
            old_N = sampled.logprobs_BT[rows_B, :width][part.choice_BT]
            advantages_N = advantages_B[rows_B, None].expand(-1, width)[part.choice_BT]
            with torch.no_grad():
                reference_NV, _ = choice_logprobs(reference, prompt_rows, part)
            logprobs_NV, logprobs_N = choice_logprobs(policy, prompt_rows, part)
            kl_N = masked_kl(logprobs_NV, reference_NV)
            entropy_N = masked_entropy(logprobs_NV)
            gain_N = clipped_gain(logprobs_N, old_N, advantages_N, config.clip)
            loss = -(gain_N - config.kl_coef * kl_N + config.entropy_coef * entropy_N).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tuned, config.grad_clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise FloatingPointError(f"train_grpo: step {step}: loss is {loss.item()}")
            optimizer.step()
            with torch.no_grad():
                moved_N = k3(logprobs_N, old_N)
                choices.append((kl_N.mean(), entropy_N.mean(), moved_N.mean()))

        # Log
        kl, entropy, moved = torch.tensor(choices).unbind(1)
        # Valid by construction; one design of each group shows that it stays so.
        valid = [is_valid(decode(row, grammar), installed) for row in tokens[::G]]
        record = {
            "grpo/reward": rewards_B.mean().item(),
            "grpo/reward_within_std": rewards_B.view(-1, G).std(1).mean().item(),
            "grpo/kl": kl.mean().item(),
            "grpo/entropy": entropy.mean().item(),
            "grpo/step_kl": moved.max().item(),
            "grpo/unique_frac": len(set(map(tuple, tokens))) / len(tokens),
            "grpo/mean_tokens": sequences.lengths_B.float().mean().item(),
            "grpo/valid_frac": sum(valid) / len(valid),
        }
        run.metric(step, record)
        history.append(record)
        if record["grpo/step_kl"] > config.max_step_kl:
            raise FloatingPointError(
                f"train_grpo: step {step}: moved {record['grpo/step_kl']:.3g} nats per choice, "
                f"expected at most max_step_kl = {config.max_step_kl}"
            )
        if (step + 1) % 5 == 0 or step + 1 == config.num_steps:
            short = ("reward", "kl", "entropy", "unique_frac", "mean_tokens")
            shown = ", ".join(f"{name} {record['grpo/' + name]:.3g}" for name in short)
            run.log(f"step {step + 1}/{config.num_steps}: {shown}")

        # Save
        if (step + 1) % config.checkpoint_every == 0:
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "history": history, "rewards": scorer.known}
            write_state(checkpoint, state)

    policy.save_adapter(run.out, designer)
    last = history[-5:]
    metrics = {name: sum(row[name] for row in last) / len(last) for name in last[0]}
    return {"grpo/first_reward": history[0]["grpo/reward"], **metrics}


def group_advantages(rewards_PG: Tensor, divide_by_std: bool) -> Tensor:
    """A = r - mean of the group, divided by its standard deviation on wish. Shape P G."""
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if divide_by_std:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)
    return advantages_PG


def k3(target_N: Tensor, sampled_N: Tensor) -> Tensor:
    """Estimate KL(sampled || target) from samples: r - 1 - log r with r = target / sampled.

    Unbiased and never negative (Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio_N = target_N - sampled_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def clipped_gain(logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r, 1 - e, 1 + e) A) with r = pi / pi_old (arXiv 2402.03300, equation 3).

    Args:
        logprobs_N: log pi of the choices made, with gradient.
        old_N: log pi_old, from the rollout.
        advantages_N: Advantage of the design each choice belongs to.
        clip: Range e.
    """
    ratio_N = (logprobs_N - old_N).exp()
    return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N)


class CachedReward:
    """The ensemble's reward, asked once for each (prompt, design) of the run."""

    def __init__(self, ensemble: Ensemble):
        """Start with nothing known."""
        self.ensemble = ensemble
        self.known: dict[tuple[str, tuple[int, ...]], float] = {}

    def __call__(self, prompts: Sequence[str], tokens: Sequence[list[int]]) -> list[float]:
        """Rewards of designs, one per prompt."""
        keys = [(p, tuple(row)) for p, row in zip(prompts, tokens, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        if new:
            rewards = self.ensemble.reward([p for p, _ in new], [list(row) for _, row in new])
            self.known.update(zip(new, map(float, rewards), strict=True))
        return [self.known[key] for key in keys]
