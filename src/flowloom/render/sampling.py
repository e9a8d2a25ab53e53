"""Sampling from a flow model: time schedules, Euler, Heun, guidance, as pure functions.

A flow model knows the velocity v = eps - x0 of the straight path (arXiv 2210.02747, 2209.03003)

    x_t = (1 - t) x0 + t eps,    t = 1 noise, t = 0 image,

and sampling integrates dx/dt = v(x, t) from t = 1 down to 0. In ComfyUI's words t is sigma.

Shapes: B rows, S the largest number of steps in the batch, C channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KARRAS_RHO = 7.0
KARRAS_T_MIN = 0.05
"""Smallest non-zero time of `karras`: the models' time floor, below which velocity is damped."""

SCHEDULERS = ("simple", "karras")
SAMPLERS = ("euler", "heun")

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x_NCHW, t_N, rows_N) -> v_NCHW` for the N <= B rows of the batch whose indices are `rows_N`."""


def shift_time(t: float, shift: float) -> float:
    """Move a time toward noise: t' = s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def simple_schedule(num_steps: int, shift: float = 1.0) -> list[float]:
    """Times 1 = t_0 > ... > t_n = 0 with equal gaps before the model's shift."""
    return [shift_time(1 - i / num_steps, shift) for i in range(num_steps)] + [0.0]


def karras_schedule(num_steps: int, t_min: float = KARRAS_T_MIN) -> list[float]:
    """Karras et al. (arXiv 2206.00364), eq. 5, with t for sigma: t_i^(1/rho) falls linearly.

        t_i = (1 + i / (n - 1) (t_min^(1/rho) - 1))^rho for i < n,   t_n = 0

    So it leaves the noise quickly and spends its steps near the image.
    """
    end = t_min ** (1 / KARRAS_RHO)
    last = max(num_steps - 1, 1)
    return [(1 + i / last * (end - 1)) ** KARRAS_RHO for i in range(num_steps)] + [0.0]


def schedule(name: str, num_steps: int, denoise: float = 1.0, shift: float = 1.0) -> list[float]:
    """Times of one sampling run, `n + 1` numbers ending in 0.

    With `denoise` d < 1 it is the tail of a longer schedule, as in ComfyUI: the last `num_steps`
    steps of floor(num_steps / d), so the number of steps stays and the start moves to about t = d.

    Args:
        name: One of `SCHEDULERS`.
        num_steps: Steps to run, >= 1.
        denoise: In [0, 1]; 0 gives an empty run, `[]`.
        shift: Time shift of the model; `simple` follows it.

    Raises:
        ValueError: An unknown scheduler.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(SCHEDULERS)}")
    if denoise <= 0:
        return []
    total = num_steps if denoise >= 1 else int(num_steps / denoise)
    times = simple_schedule(total, shift) if name == "simple" else karras_schedule(total)
    return times[-(num_steps + 1) :]


def num_evaluations(sampler: str, num_steps: int) -> int:
    """Velocity evaluations of a run: Euler one per step, Heun two but for the last step."""
    return num_steps if sampler == "euler" else max(2 * num_steps - 1, 0)


def add_noise(latent_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t_B111 = t_B[:, None, None, None]
    return (1 - t_B111) * latent_BCHW + t_B111 * noise_BCHW


def guide(positive: Tensor, negative: Tensor, cfg_B: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): v = v_neg + cfg (v_pos - v_neg)."""
    return negative + cfg_B[:, None, None, None] * (positive - negative)


def sample(
    velocity: Velocity, x_BCHW: Tensor, times: Sequence[Sequence[float]], sampler: str
) -> Tensor:
    """Integrate dx/dt = v from each row's first time to its last.

    Rows may have different schedules and lengths; a row whose schedule is over is left alone.

    Euler: x' = x + (t' - t) v(x, t).
    Heun: x' = x + (t' - t) (v(x, t) + v(x_euler, t')) / 2, and Euler for the step that ends at t' =
        0 (Karras et al., algorithm 1).

    Args:
        velocity: The field; called with the rows that still run.
        x_BCHW: State at each row's first time; not changed.
        times: B falling schedules.
        sampler: One of `SAMPLERS`.

    Returns:
        `[B, C, H, W]`, the state at each row's last time.

    Raises:
        ValueError: An unknown sampler.
        FloatingPointError: The result is not finite.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler_name: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    x = x_BCHW.clone()
    for step in range(max(len(row) for row in times) - 1):
        running = [row for row, ts in enumerate(times) if step + 1 < len(ts)]
        rows = torch.tensor(running)
        t = x.new_tensor([times[row][step] for row in running])
        t_next = x.new_tensor([times[row][step + 1] for row in running])
        dt = (t_next - t)[:, None, None, None]
        x_t = x[rows]
        v = velocity(x_t, t, rows)
        x_next = x_t + dt * v
        second = torch.nonzero(t_next > 0).flatten() if sampler == "heun" else []
        if len(second):
            v_next = velocity(x_next[second], t_next[second], rows[second])
            x_next[second] = x_t[second] + dt[second] * (v[second] + v_next) / 2
        x[rows] = x_next
    if not math.isfinite(float(x.sum())):
        raise FloatingPointError(
            "sampling: got a picture that is not finite, expected finite numbers"
        )
    return x
