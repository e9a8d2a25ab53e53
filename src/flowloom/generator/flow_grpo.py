"""Flow-GRPO (arXiv 2505.05470): policy gradients on a flow sampled as a stochastic equation.

Each Euler step becomes a Gaussian, so it has a likelihood; G pictures of one prompt are judged
against each other, and each step of a picture is made more or less likely by the clipped ratio.
Few stochastic steps, the rest deterministic, is Flow-GRPO-Fast.

Departures from the paper:
1. The last step is deterministic, so no noise is left in the pictures that are judged; the paper
   adds it and leaves the step out of training.
2. Where a group starts from one noise, its deterministic steps before the first stochastic one are
   taken once.

Shapes: P prompts, G pictures per prompt (neighbours), B = P * G rows, T steps, S stochastic steps
among them, C channels, H x W pixels, D = C * H * W.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def noise_level(t: float, s: float, scale: float) -> float:
    """sigma_t = a sqrt(t / (1 - t)), a = `scale`; at t = 1 that of the step's end s."""
    t = t if t < 1 else s
    return scale * math.sqrt(t / (1 - t))


def sde_step(x: Tensor, v: Tensor, t: float, s: float, sigma: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of one Euler-Maruyama step t -> s < t.

    With x_t = (1 - t) x0 + t eps and v = E[eps - x0 | x_t], E[eps | x_t] = x + (1 - t) v, and the
    score of p_t is -E[eps | x_t] / t. For any sigma, the equation run from t = 1 down

        dx = (v - sigma^2 / 2 score) dt + sigma dw = (v + sigma^2 / (2 t) (x + (1 - t) v)) dt
             + sigma dw

    has the marginals of dx = v dt (Flow-GRPO, eq. 9). One step of it:

        mean = x - (t - s) (v + sigma^2 / (2 t) (x + (1 - t) v)),   std = sigma sqrt(t - s)
    """
    pull = sigma**2 / (2 * t)
    mean = x - (t - s) * (v + pull * (x + (1 - t) * v))
    return mean, sigma * math.sqrt(t - s)


def gain(t: float, s: float, sigma: float) -> float:
    """How far, in standard deviations, the mean of a step moves per unit of velocity.

    (d mean / d v) / std = -sqrt(t - s) (1 / sigma + sigma (1 - t) / (2 t)).
    """
    return -math.sqrt(t - s) * (1 / sigma + sigma * (1 - t) / (2 * t))


def log_ratio(v_BCHW: Tensor, v_old_BCHW: Tensor, noise_BCHW: Tensor, gain_B: Tensor) -> Tensor:
    """log p(x_s | x_t; v) - log p(x_s | x_t; v_old), each the mean over D; `[B]`.

    With eps the noise that led to x_s and u = gain (v - v_old) the distance of the means in
    standard deviations, it is mean(eps^2 - (eps - u)^2) / 2 = mean(u (2 eps - u)) / 2. This form
    does not subtract large numbers from each other.
    """
    u_BCHW = gain_B[:, None, None, None] * (v_BCHW - v_old_BCHW)
    return (u_BCHW * (2 * noise_BCHW - u_BCHW)).flatten(1).mean(1) / 2


def step_kl(v_BCHW: Tensor, v_base_BCHW: Tensor, gain_B: Tensor) -> Tensor:
    """KL of a step from the base's: two Gaussians of equal variance; mean over D, `[B]`.

    |mean - mean_base|^2 / (2 std^2) = gain^2 |v - v_base|^2 / 2.
    """
    return gain_B.square() * (v_BCHW - v_base_BCHW).square().flatten(1).mean(1) / 2


def group_advantages(
    rewards_B: Tensor,
    group_size: int,
    divide_by: Literal["group", "batch"] | None = "group",
    min_std: float = 1e-4,
) -> Tensor:
    """A = (R - mean of its group) / (std + min_std); `[B]`, neighbours are a group.

    Args:
        rewards_B: R of the whole batch.
        group_size: G.
        divide_by: Whose standard deviation: the group's, that of all rewards, or none.
        min_std: Keeps groups whose rewards agree from being blown up.
    """
    rewards_PG = rewards_B.unflatten(0, (-1, group_size))
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if divide_by == "group":
        centred_PG = centred_PG / (rewards_PG.std(1, correction=0, keepdim=True) + min_std)
    elif divide_by == "batch":
        centred_PG = centred_PG / (rewards_B.std(correction=0) + min_std)
    return centred_PG.flatten()


def clipped(log_ratio_B: Tensor, advantages_B: Tensor, clip: float) -> Tensor:
    """L = -min(rho A, clamp(rho, 1 - clip, 1 + clip) A) per row (arXiv 1707.06347, eq. 7)."""
    rho_B = log_ratio_B.exp()
    return -torch.minimum(rho_B * advantages_B, rho_B.clamp(1 - clip, 1 + clip) * advantages_B)
