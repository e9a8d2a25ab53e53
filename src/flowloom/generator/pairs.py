"""The equations of FDFO (arXiv 2603.12893) as pure functions: rollout, signal, clipped surrogate.

A pair is one noise and one prompt sampled twice with independent churn. Its reward difference over
its picture difference is a finite difference of the reward, and the velocity everywhere along both
paths is pulled against it.

With K > 2 branches of one noise, each is compared with the mean of the others (a leave-one-out
baseline, our extension). K pictures then hold K - 1 independent directions instead of K / 2.

Shapes: P noises, K branches of each, B = K * P rows (the branches of a noise are neighbours),
T steps, C channels, H x W pixels, D = C * H * W.
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


def branch_noise(
    seeds: Sequence[int],
    num_steps: int,
    shape: Sequence[int],
    num_branches: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Normal noise of each prompt: a function of its seed alone, whatever batch it is in.

    Returns:
        The shared start `[P, C, H, W]`, and the branches' churn `[T, B, C, H, W]`: first the
        start's, then one per step but the last, which adds none.
    """
    K, draws = num_branches, []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.randn(1 + K * num_steps, *shape, generator=generator, dtype=dtype))
    draws_PNCHW = torch.stack(draws)
    fresh_PTKCHW = draws_PNCHW[:, 1:].unflatten(1, (num_steps, K))
    return draws_PNCHW[:, 0], fresh_PTKCHW.transpose(0, 1).flatten(1, 2)


def roll_out(
    flow: Velocity,
    prompts: Sequence[str],
    start_PCHW: Tensor,
    fresh_TBCHW: Tensor,
    churn: float,
    times: Sequence[float] | None = None,
) -> Trajectories:
    """Sample all branches of each noise; no gradients.

    Args:
        flow: What is tuned.
        prompts: P prompts.
        start_PCHW: Shared noise of the branches.
        fresh_TBCHW: Their independent noise; its length is the number of steps T.
        churn: gamma; 0 would make the branches equal.
        times: T + 1 falling times from 1 to 0; None takes equal steps.
    """
    num_steps, num_branches = len(fresh_TBCHW), fresh_TBCHW.shape[1] // len(prompts)
    if times is None:
        times = [1 - step / num_steps for step in range(num_steps)] + [0.0]
    texts = [prompt for prompt in prompts for _ in range(num_branches)]
    states, velocities = [], []
    with torch.inference_mode():
        x_BCHW = churn_start(start_PCHW.repeat_interleave(num_branches, 0), fresh_TBCHW[0], churn)
        for step, (t, s) in enumerate(itertools.pairwise(times)):
            fresh = fresh_TBCHW[step + 1] if s > 0 else torch.zeros_like(x_BCHW)
            v_BCHW = flow.velocity(x_BCHW, x_BCHW.new_full((len(x_BCHW),), t), texts)
            states.append(x_BCHW)
            velocities.append(v_BCHW)
            x_BCHW = churn_step(x_BCHW, v_BCHW, t, s, fresh, churn)
    # Copies made outside of inference mode: training saves them for its backward pass.
    times_T = torch.tensor(times[:-1], dtype=x_BCHW.dtype, device=x_BCHW.device)
    return Trajectories(torch.stack(states), times_T, torch.stack(velocities), x_BCHW.clone())


def centred(values_B: Tensor, num_branches: int = 2) -> Tensor:
    """y_i minus the mean of all K branches of its noise; any shape after B.

        y_i - mean_j y_j = (K - 1) / K * (y_i - mean_{j != i} y_j),   K = 2: (y_i - y_j) / 2

    The leave-one-out difference up to a factor that cancels in dR dx / |dx|^2.
    """
    values_PK = values_B.unflatten(0, (-1, num_branches))
    if num_branches == 2:
        # Exactly antisymmetric, which a mean of two is only up to rounding.
        half = (values_PK[:, 0] - values_PK[:, 1]) / 2
        return torch.stack([half, -half], 1).flatten(0, 1)
    return (values_PK - values_PK.mean(1, keepdim=True)).flatten(0, 1)


def normalised(
    images_BCHW: Tensor, num_branches: int = 2, min_rms: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Direction of each row i away from the other branches.

        dx = centred(x0),   d = dx / (mean(dx^2) + min_rms^2)

    Dividing by the mean *square* makes dR * d, with dR = centred(R), the gradient of the reward
    along dx: with x0 = mu + e and R linear, dR d / D = dR dx / |dx|^2 has the mean
    E[u u^T] grad R, u = dx / |dx|, for any K; K branches give K - 1 independent u.

    Args:
        images_BCHW: x0.
        num_branches: K.
        min_rms: Distance below which a pair fades out. The paper's 1e-3 only avoids 0 / 0; where a
            model often draws the same picture twice, such pairs have huge d, no signal, and would
            rule the clipped gradient.

    Returns:
        d `[B, C, H, W]`, rms(dx) `[B]`.
    """
    dx_BCHW = centred(images_BCHW, num_branches)
    square_B = dx_BCHW.square().flatten(1).mean(1)
    d_BCHW = dx_BCHW / (square_B + min_rms**2)[:, None, None, None]
    return d_BCHW, square_B.sqrt()


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
