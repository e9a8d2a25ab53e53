"""Schedules: the falling times at which a flow model is asked, t = 1 noise, t = 0 picture.

A flow model mixes x_t = (1 - t) x0 + t eps. ComfyUI calls t sigma, and defines its schedulers over
a table of the model's sigmas; for a flow model that is

    sigma_k = shift_time(k / 1000, shift),    k = 1 .. 1000.

One departure: `karras` and `exponential` end at T_MIN instead of the table's first entry. Every
schedule is a list of floats that ends in an appended 0 and falls strictly: a time that would come
twice is asked once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from flowloom.shapes.model import T_FLOOR

TABLE_SIZE = 1000
T_MIN = T_FLOOR
"""Smallest non-zero time of `karras` and `exponential`, before the model's shift.

The models' training loss no longer grows below it, so they are not good for finer noise. With the
table's 0.001 these two would spend half of their steps between a picture and the same picture.
"""

RHO = 7.0
"""Exponent of `karras`: the paper's choice for images."""
BETA_SHAPE = 0.6
"""Both parameters of the distribution behind `beta`: the paper's choice."""

SCHEDULERS = ("simple", "normal", "karras", "exponential", "sgm_uniform", "beta")


def schedule(name: str, num_steps: int, *, denoise: float = 1.0, shift: float = 1.0) -> list[float]:
    """Times of one sampling run, usually `num_steps + 1` numbers ending in 0.

    With `denoise` d < 1 it is the tail of a longer schedule, as in ComfyUI: the last `num_steps`
    steps of floor(num_steps / d), so the number of steps stays and the start moves to about t = d.

    Args:
        name: One of `SCHEDULERS`.
        num_steps: Steps to run, >= 1; more steps than the table has entries are not run.
        denoise: In [0, 1]; 0 gives an empty run, `[]`.
        shift: Time shift of the model, > 0.

    Raises:
        ValueError: An unknown scheduler, no steps, or a shift <= 0.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(SCHEDULERS)}")
    if denoise <= 0:
        return []
    total = num_steps if denoise >= 1 else int(num_steps / denoise)
    _check_steps(num_steps)
    if name == "simple":
        times = _simple(total, shift)
    elif name == "normal":
        times = _even(total, shift, with_end=True)
    elif name == "sgm_uniform":
        times = _even(total, shift, with_end=False)
    elif name == "karras":
        times = karras(total, shift_time(T_MIN, shift))
    elif name == "exponential":
        times = exponential(total, shift_time(T_MIN, shift))
    else:
        times = beta(total, shift=shift)
    return times[-(num_steps + 1) :]


def shift_time(t: float, shift: float) -> float:
    """Move a time toward noise: t' = s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23).

    Raises:
        ValueError: A shift <= 0 would leave no times.
    """
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, expected a number > 0")
    return shift * t / (1 + (shift - 1) * t)


def percent_to_sigma(percent: float, shift: float = 1.0) -> float:
    """Where a share of the sampling range has passed: shift_time(1 - p), in [0, 1]."""
    return shift_time(min(max(1 - percent, 0.0), 1.0), shift)


def _simple(num_steps: int, shift: float) -> list[float]:
    """Table entries at equal strides from the top: k_i = 1000 - floor(1000 i / n)."""
    return _entries((TABLE_SIZE - i * TABLE_SIZE // num_steps for i in range(num_steps)), shift)


def _even(num_steps: int, shift: float, *, with_end: bool) -> list[float]:
    """Sigmas of equally spaced timesteps from that of sigma_1000 to that of sigma_1.

    The timestep of a sigma is the sigma itself, shifted already, in ComfyUI as in diffusers: so the
    end of the range is shifted twice where the model has a shift.
    """
    end = shift_time(1 / TABLE_SIZE, shift)
    timesteps = np.linspace(1, end, num_steps + (not with_end))[:num_steps]
    return _ending(shift_time(t, shift) for t in timesteps.tolist())


def karras(
    num_steps: int, sigma_min: float, sigma_max: float = 1.0, rho: float = RHO
) -> list[float]:
    """Karras et al. (arXiv 2206.00364), eq. 5: sigma_i^(1/rho) falls linearly.

        sigma_i = (a + i / (n - 1) (b - a))^rho,    a = sigma_max^(1/rho), b = sigma_min^(1/rho)

    Args:
        num_steps: Steps n, >= 1.
        sigma_min: Last non-zero time, >= 0.
        sigma_max: First time; above 1 it is taken as 1, there is no more noise in a flow model.
        rho: Exponent > 0; the larger, the more steps near the picture.

    Raises:
        ValueError: A number out of its range.
    """
    sigma_max = _check_range(num_steps, sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, expected a number > 0")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = np.linspace(*ends, num_steps)[1:] ** rho
    return _ending([sigma_max, *inner.tolist()])


def exponential(num_steps: int, sigma_min: float, sigma_max: float = 1.0) -> list[float]:
    """log sigma falls linearly from sigma_max to sigma_min; `karras` as rho goes to infinity.

    Args:
        num_steps: Steps n, >= 1.
        sigma_min: Last non-zero time, > 0.
        sigma_max: First time; above 1 it is taken as 1.

    Raises:
        ValueError: A number out of its range.
    """
    sigma_max = _check_range(num_steps, sigma_min, sigma_max)
    if sigma_min == 0:
        raise ValueError("sigma_min: got 0, expected a number > 0, its logarithm is taken")
    inner = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num_steps)[1:])
    return _ending([sigma_max, *inner.tolist()])


def beta(
    num_steps: int, alpha: float = BETA_SHAPE, beta: float = BETA_SHAPE, *, shift: float = 1.0
) -> list[float]:
    """Table entries at quantiles of a Beta distribution (arXiv 2407.12173): dense at both ends.

    Step i takes entry k = 1 + round(999 F^-1(1 - i / n)). Entries met twice are asked once, so many
    steps become fewer.

    Args:
        num_steps: Steps n, >= 1.
        alpha: First parameter, > 0.
        beta: Second parameter, > 0.
        shift: Time shift of the model, > 0.

    Raises:
        ValueError: A number out of its range.
    """
    from scipy.special import betaincinv  # scipy takes long to import, few schedules need it

    _check_steps(num_steps)
    for field, value in (("alpha", alpha), ("beta", beta)):
        if not value > 0:
            raise ValueError(f"{field}: got {value}, expected a number > 0")
    quantiles = betaincinv(alpha, beta, 1 - np.arange(num_steps) / num_steps)
    entries = np.rint(quantiles * (TABLE_SIZE - 1)).astype(int) + 1
    return _entries(entries.tolist(), shift)


def split(times: list[float], step: int) -> tuple[list[float], list[float]]:
    """Cut a schedule at a step: both parts hold the time at which they meet (SplitSigmas)."""
    return times[: step + 1], times[step:]


def part(
    times: list[float], start_at_step: int, end_at_step: int, *, keep_noise: bool
) -> list[float]:
    """The steps [start, end) of a schedule, as KSamplerAdvanced runs them.

    Args:
        times: The whole schedule.
        start_at_step: First step to run; at or after the end nothing is run, `[]`.
        end_at_step: Step to stop before.
        keep_noise: Whether a run that stops early leaves its noise in; otherwise its last step goes
            straight to 0.
    """
    if end_at_step < len(times) - 1:
        times = times[: end_at_step + 1]
        if not keep_noise:
            times = [*times[:-1], 0.0]
    return times[start_at_step:] if start_at_step < len(times) - 1 else []


def _entries(ks: Iterable[int], shift: float) -> list[float]:
    """The schedule of some entries of the table."""
    return _ending(shift_time(k / TABLE_SIZE, shift) for k in ks)


def _ending(sigmas: Iterable[float]) -> list[float]:
    """A strictly falling schedule that ends in 0: what does not fall is dropped."""
    times: list[float] = []
    for sigma in (*sigmas, 0.0):
        if not times or sigma < times[-1]:
            times.append(sigma)
    return times


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"steps: got {num_steps}, expected at least 1")


def _check_range(num_steps: int, sigma_min: float, sigma_max: float) -> float:
    """The first time of an explicit range.

    Raises:
        ValueError: A number out of its range.
    """
    _check_steps(num_steps)
    sigma_max = min(sigma_max, 1.0)
    if not 0 <= sigma_min <= sigma_max or sigma_max == 0:
        raise ValueError(
            f"sigma_min: got {sigma_min}, expected 0 <= sigma_min <= sigma_max = {sigma_max:g}"
        )
    return sigma_max
