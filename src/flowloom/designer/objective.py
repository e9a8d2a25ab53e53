"""The parts of GRPO's objective. Pure functions.

Shapes: P prompts, G designs per prompt, B = P * G rows, N choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_RATIO = 10.0
"""Of probabilities after and before an update, where it is measured how far a policy moved."""


def group_advantages(
    rewards_PG: Tensor, divide_by_std: bool = False, clip: float | None = None
) -> Tensor:
    """A = r - mean of the group, divided by its standard deviation on wish. Shape P G.

    Args:
        rewards_PG: Rewards, a prompt's designs in a row.
        divide_by_std: As in arXiv 2402.03300; Dr. GRPO (arXiv 2503.20783) does not.
        clip: Largest |A|, or None.
    """
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if divide_by_std:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)
    return advantages_PG if clip is None else advantages_PG.clamp(-clip, clip)


def k3(target_N: Tensor, sampled_N: Tensor) -> Tensor:
    """Estimate KL(sampled || target) from samples: r - 1 - log r with r = target / sampled.

    Unbiased and never negative (Schulman, "Approximating KL divergence", 2020). With the reference
    as target and the policy as sampled, the KL of arXiv 2402.03300, equation 4.
    """
    log_ratio_N = target_N - sampled_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def moved(logprobs_N: Tensor, old_N: Tensor) -> Tensor:
    """`k3` of a policy from the one that sampled, with no ratio above `MAX_RATIO`.

    One choice that was all but impossible and has become likely says little of where the policy
    went, and would outweigh a thousand others.
    """
    return k3(torch.minimum(logprobs_N, old_N + math.log(MAX_RATIO)), old_N)


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


def is_clipped(logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """Where `clipped_gain` has no gradient because the choice has gained enough. Shape N."""
    ratio_N = (logprobs_N - old_N).exp()
    above_N, below_N = ratio_N > 1 + clip, ratio_N < 1 - clip
    return (above_N & (advantages_N > 0)) | (below_N & (advantages_N < 0))


def most_uncertain(spread_B: Tensor, frac: float) -> Tensor:
    """True for the share `frac` of rows with the largest spread, at least one; ties all count.

    After GARDO (arXiv 2512.24138), which holds only samples of high reward uncertainty to the
    reference: where the reward is sure of itself, the policy may leave it.
    """
    num = math.ceil(frac * len(spread_B))
    return spread_B >= spread_B.sort(descending=True).values[num - 1]
