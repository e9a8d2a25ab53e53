"""The equations of FDFO (arXiv 2603.12893) as pure functions: rollout, signal, clipped surrogate.

A pair is one noise and one prompt sampled twice with independent churn. Its reward difference over
its picture difference is a finite difference of the reward, and the velocity everywhere along both
paths is pulled against it.

Shapes: P pairs, B = 2 * P rows (the two branches of a pair are neighbours), T steps, C channels,
H x W pixels, D = C * H * W.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowloom.generator.velocity import Velocity


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Every visited state of a rollout."""

    states_TBCHW: Tensor
    """x before each step."""
    times_T: Tensor
    """t of each step, falling from 1."""
    velocities_TBCHW: Tensor
    """v_ref, the velocity that was followed."""
    images_BCHW: Tensor
    """Where the rows ended, x0."""


def churn_start(noise: Tensor, fresh: Tensor, churn: float) -> Tensor:
    """x = z / (g + 1) + eps k / (g + 1), k = sqrt((g + 1)^2 - 1): as z, again N(0, I)."""
    grown = churn + 1
    return noise / grown + fresh * math.sqrt(grown**2 - 1) / grown


def churn_step(x: Tensor, v: Tensor, t: float, s: float, fresh: Tensor, churn: float) -> Tensor:
    """One step t -> s: go a little beyond s, to r, then add noise that leads back to s.

        r = s / (1 + g - g s),   x' = (x + (r - t) v) / (1 + g r) + eps r k / (1 + g r)

    The last step, s = 0, has r = 0 and so adds no noise.
    """
    r = s / (1 + churn - churn * s)
    k = math.sqrt((churn + 1) ** 2 - 1)
    return (x + (r - t) * v) / (1 + churn * r) + fresh * (r * k / (1 + churn * r))


def pair_noise(
    seeds: Sequence[int], num_steps: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Normal noise of each pair: a function of its seed alone, whatever batch it is in.

    Returns:
        The shared start `[P, C, H, W]`, and the branches' churn `[T, B, C, H, W]`: first the
        start's, then one per step but the last, which adds none.
    """
    draws = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.randn(1 + 2 * num_steps, *shape, generator=generator, dtype=dtype))
    draws_PNCHW = torch.stack(draws)
    fresh_PTbCHW = draws_PNCHW[:, 1:].unflatten(1, (num_steps, 2))
    return draws_PNCHW[:, 0], fresh_PTbCHW.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def roll_out(
    flow: Velocity,
    prompts: Sequence[str],
    start_PCHW: Tensor,
    fresh_TBCHW: Tensor,
    churn: float,
    times: Sequence[float] | None = None,
) -> Trajectories:
    """Sample both branches of each pair from its one noise.

    Args:
        flow: What is tuned.
        prompts: P prompts.
        start_PCHW: Shared noise of each pair.
        fresh_TBCHW: Independent noise of the branches; its length is the number of steps T.
        churn: gamma; 0 would make the branches equal.
        times: T + 1 falling times from 1 to 0; None takes equal steps.
    """
    num_steps = len(fresh_TBCHW)
    if times is None:
        times = [1 - step / num_steps for step in range(num_steps)] + [0.0]
    doubled = [prompt for prompt in prompts for _ in range(2)]
    x_BCHW = churn_start(start_PCHW.repeat_interleave(2, 0), fresh_TBCHW[0], churn)
    states, velocities = [], []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        fresh = fresh_TBCHW[step + 1] if s > 0 else torch.zeros_like(x_BCHW)
        v_BCHW = flow.velocity(x_BCHW, x_BCHW.new_full((len(x_BCHW),), t), doubled)
        states.append(x_BCHW)
        velocities.append(v_BCHW)
        x_BCHW = churn_step(x_BCHW, v_BCHW, t, s, fresh, churn)
    times_T = torch.tensor(times[:-1], dtype=x_BCHW.dtype)
    return Trajectories(torch.stack(states), times_T, torch.stack(velocities), x_BCHW)


def half_difference(values_B: Tensor) -> Tensor:
    """(y_i - y_j) / 2 of each row i and its pair's other branch j; any shape after B."""
    first, second = values_B.unflatten(0, (-1, 2)).unbind(1)
    half = (first - second) / 2
    return torch.stack([half, -half], 1).flatten(0, 1)


def finite_difference(
    rewards_B: Tensor, images_BCHW: Tensor, min_rms: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """Signal of each row i with partner j.

        dR = (R_i - R_j) / 2,   dx = (x0_i - x0_j) / 2,   d = dx / (mean(dx^2) + min_rms^2)

    Dividing by the mean *square* makes dR * d the gradient of the reward along dx.

    Args:
        rewards_B: R.
        images_BCHW: x0.
        min_rms: Distance below which a pair fades out. The paper's 1e-3 only avoids 0 / 0; where a
            model often draws the same picture twice, such pairs have huge d, no signal, and would
            rule the clipped gradient.

    Returns:
        dR `[B]`, d `[B, C, H, W]`, rms(dx) `[B]`.
    """
    dR_B = half_difference(rewards_B)
    dx_BCHW = half_difference(images_BCHW)
    square_B = dx_BCHW.square().flatten(1).mean(1)
    d_BCHW = dx_BCHW / (square_B + min_rms**2)[:, None, None, None]
    return dR_B, d_BCHW, square_B.sqrt()


def log_ratio(v_BCHW: Tensor, v_ref_BCHW: Tensor, d_BCHW: Tensor) -> Tensor:
    """log rho = mean(d^2) - mean((v - v_ref + d)^2) = -mean(u (u + 2 d)), u = v - v_ref; `[B]`.

    The second form does not subtract large numbers from each other.
    """
    u_BCHW = v_BCHW - v_ref_BCHW
    return -(u_BCHW * (u_BCHW + 2 * d_BCHW)).flatten(1).mean(1)


def surrogate(log_ratio_B: Tensor, dR_B: Tensor, c_B: Tensor) -> Tensor:
    """L = -dR rho + |dR| / (2 c) (rho - 1)^2 per row, least at rho = 1 + c sign(dR).

    The clipped surrogate as a penalty: Simple Policy Optimization, arXiv 2401.16025.
    """
    rho_B = log_ratio_B.exp()
    return -dR_B * rho_B + dR_B.abs() / (2 * c_B) * (rho_B - 1).square()


def trust_clip(rms_B: Tensor, num_elements: int, trust: float) -> Tensor:
    """c = trust / (rms(dx) sqrt(D)), `[B]`.

    A change of velocity of size u per element that has nothing to do with d moves log rho by about
    2 u / (rms(dx) sqrt(D)); so c has to grow with that, or the penalty bites on noise. trust = 10
    is c = 3 at D = 768 and rms(dx) = 0.12; the paper's 0.03 belongs to D = 65,536.
    """
    return trust / ((rms_B + 1e-6) * math.sqrt(num_elements))
