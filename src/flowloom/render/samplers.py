"""Samplers of a flow model from its denoised picture, for a batch of rows with own schedules.

A flow model mixes x_t = (1 - t) x0 + t eps and is asked for D(x, t), its estimate of x0. The
probability flow is dx/dt = (x - D) / t. In ComfyUI's words t is sigma.

All samplers but `heun` ask once per step, and their steps from t to t' < t are one linear form

    x' = keep x + data (D + change (D - D_before)) + fresh z,    z standard normal,

whose four coefficients are functions of the schedule alone (`coefficients`), computed up front for
all rows and steps.

Shapes: B rows of a batch, N of them still running, S the largest number of steps, C channels,
H x W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde")
NOISY_SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde")
"""Samplers that draw fresh noise."""

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x_NCHW, t_N, rows_N) -> x0_NCHW` for the N <= B rows of the batch whose indices are `rows_N`.

The same `rows_N` object is handed in for as long as the same rows run.
"""
StepNoise = Callable[[int, int], Tensor]
"""`(row, step) -> z_CHW`, standard normal; a function of the row's seed and the row's step."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The linear form of every step, float64 arrays of one shape; see the module."""

    keep: np.ndarray
    """Factor of the state."""
    data: np.ndarray
    """Factor of the denoised picture."""
    change: np.ndarray
    """Share of the last change of the denoised picture that is added to it."""
    fresh: np.ndarray
    """Standard deviation of the noise that is added."""


def coefficients(sampler: str, t_BS: np.ndarray, t_next_BS: np.ndarray) -> Coefficients:
    """The steps of a sampler from times t to times t' < t, `[B, S]`; a row's steps are in order.

    euler: The flow's derivative is held: x' = x + (t' - t) (x - D) / t = (t'/t) x + (1 - t'/t) D.

    euler_ancestral: An Euler step to t_down < t', then noise up to t' such that the marginal is
        kept. At t_down the state is (1 - t_down) x0 + t_down eps. Scaled by
        s = (1 - t') / (1 - t_down) its data has the weight 1 - t' that belongs to t' and its noise
        the deviation s t_down; fresh noise of deviation sqrt(t'^2 - s^2 t_down^2) fills it up to
        t'. t_down = t'^2 / t is ComfyUI's, the ancestral step of a variance-exploding process
        (eta = 1) read with t for sigma.

    dpmpp_2m: DPM-Solver++(2M) (arXiv 2211.01095, alg. 2) with alpha = 1 - t, sigma = t,
        lambda = log((1 - t) / t), h = lambda' - lambda. Its factor alpha' (1 - e^-h) is 1 - t'/t,
        so it is Euler's step from an extrapolated D + h / (2 h_before) (D - D_before). The first
        step has no D_before, the one after t = 1 has h_before = inf, and the one to t' = 0, with
        h = inf, goes to D itself: all three are of first order.

    dpmpp_2m_sde: SDE-DPM-Solver++(2M) of the same paper, sec. 5, in its midpoint form:
        x' = (t'/t) e^-h x + (1 - t') (1 - e^-2h) (D + h / (2 h_before) (D - D_before))
        + t' sqrt(1 - e^-2h) z, with e^-h = (1 - t) t' / (t (1 - t')): 0 at t = 1 and at t' = 0.
    """
    t, t_next = t_BS, t_next_BS
    ratio, none = t_next / t, np.zeros_like(t)
    if sampler in ("euler", "heun"):
        return Coefficients(ratio, 1 - ratio, none, none)
    if sampler == "euler_ancestral":
        down = t_next * ratio
        scale = (1 - t_next) / (1 - down)
        fresh = np.sqrt(np.maximum(t_next**2 - (scale * down) ** 2, 0))
        return Coefficients(scale * down / t, scale * (1 - down / t), none, fresh)
    change = _extrapolation(t, t_next)
    if sampler == "dpmpp_2m":
        return Coefficients(ratio, 1 - ratio, change, none)
    decay = (1 - t) * ratio / (1 - t_next)
    grown = 1 - decay**2
    return Coefficients(ratio * decay, (1 - t_next) * grown, change, t_next * np.sqrt(grown))


def _extrapolation(t_BS: np.ndarray, t_next_BS: np.ndarray) -> np.ndarray:
    """h / (2 h_before) per step, h the step in lambda; 0 where either is infinite or missing."""
    with np.errstate(divide="ignore"):
        h_BS = np.log(1 - t_next_BS) - np.log(t_next_BS) - np.log(1 - t_BS) + np.log(t_BS)
    change_BS = np.zeros_like(h_BS)
    usable = np.isfinite(h_BS[:, 1:]) & np.isfinite(h_BS[:, :-1])
    np.divide(h_BS[:, 1:], 2 * h_BS[:, :-1], out=change_BS[:, 1:], where=usable)
    return change_BS


def num_evaluations(sampler: str, times: Sequence[float]) -> int:
    """Denoiser evaluations of one row: one per step; Heun two, but one for a step that ends at 0.

    Args:
        sampler: One of `SAMPLERS`.
        times: The row's schedule.
    """
    num_steps = max(len(times) - 1, 0)
    if sampler != "heun":
        return num_steps
    return num_steps + sum(t > 0 for t in times[1:])


def sample(
    denoise: Denoiser,
    x_BCHW: Tensor,
    times: Sequence[Sequence[float]],
    sampler: str,
    step_noise: StepNoise | None = None,
) -> tuple[Tensor, Tensor]:
    """Run every row from its first time to its last.

    Rows may have different schedules and lengths; a row whose schedule is over is left alone, and
    nothing of a row depends on the others of its batch but float rounding. `heun` is algorithm 1 of
    arXiv 2206.00364 without churn; the others are in `coefficients`.

    Args:
        denoise: Called with the rows that still run, long schedules first.
        x_BCHW: State at each row's first time; not changed.
        times: B strictly falling schedules in [0, 1]; one with fewer than two times is no step.
        sampler: One of `SAMPLERS`.
        step_noise: Fresh noise; needed by `NOISY_SAMPLERS`, not called by the others.

    Returns:
        States at the rows' last times, and the denoised pictures of their last steps (the state
        itself for a row without steps); both `[B, C, H, W]`.

    Raises:
        ValueError: An unknown sampler, or a schedule that does not fall within [0, 1].
        FloatingPointError: A result is not finite; names the sampler and the rows of the batch.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler_name: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    # Long schedules first: the rows that still run are then a prefix, and a view.
    order = sorted(range(len(times)), key=lambda row: -len(times[row]))
    order_B = torch.tensor(order, device=x_BCHW.device)
    x = x_BCHW[order_B]
    last_x, last_x0, before = x.clone(), x.clone(), x
    for index, step in enumerate(_plan(sampler, times, order, x)):
        x, before = x[: step.num_rows], before[: step.num_rows]
        x0 = denoise(x, step.t, step.rows)
        data = x0
        if step.change is not None:
            data = torch.addcmul(x0, step.change, x0 - before)
        x_next = torch.addcmul(step.data * data, step.keep, x)
        if sampler in NOISY_SAMPLERS and step.inner is not None:
            assert step_noise is not None, f"{sampler} needs step_noise"
            fresh = torch.stack([step_noise(row, index) for row in step.inner_rows.tolist()])
            x_next[step.inner] = x_next[step.inner].addcmul(step.fresh[step.inner], fresh)
        if sampler == "heun" and step.inner is not None:
            x_next[step.inner] += _heun_correction(denoise, step, x, x0, x_next)
        x, before = x_next, x0
        if step.num_going_on < step.num_rows:
            over = slice(step.num_going_on, step.num_rows)
            last_x[over], last_x0[over] = x[over], x0[over]
    _check_finite(last_x, order, sampler)
    back_B = torch.argsort(order_B)
    return last_x[back_B], last_x0[back_B]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of the rows that still run, as tensors: factors are `[N, 1, 1, 1]`."""

    num_rows: int
    """N."""
    num_going_on: int
    """Rows, from the first, that have another step."""
    rows: Tensor
    """`[N]` indices in the batch."""
    t: Tensor
    """`[N]` times."""
    keep: Tensor
    data: Tensor
    change: Tensor | None
    """None where it is 0 for all rows."""
    fresh: Tensor
    inner: slice | Tensor | None
    """Positions among the N of the rows that do not step to t' = 0; None where there are none."""
    inner_rows: Tensor
    """The same as indices in the batch."""
    inner_t_next: Tensor
    """Their t'."""


def _plan(
    sampler: str, times: Sequence[Sequence[float]], order: Sequence[int], like: Tensor
) -> list[_Step]:
    """Everything about the steps that the pictures do not decide.

    Raises:
        ValueError: A schedule does not fall within [0, 1].
    """
    num_steps_B = np.array([max(len(times[row]) - 1, 0) for row in order])
    shape = (len(order), int(num_steps_B.max(initial=0)))
    # Steps that a row does not have are never read; they are filled with one that divides no zero.
    t_BS, t_next_BS = np.full(shape, 0.75), np.full(shape, 0.5)
    for index, row in enumerate(order):
        ts = np.asarray(times[row], dtype=float)
        if len(ts) and not (ts[0] <= 1 and ts[-1] >= 0 and (np.diff(ts) < 0).all()):
            raise ValueError(f"times of row {row}: got {ts}, expected a strict fall within [1, 0]")
        t_BS[index, : num_steps_B[index]] = ts[:-1]
        t_next_BS[index, : num_steps_B[index]] = ts[1:]
    form = coefficients(sampler, t_BS, t_next_BS)
    arrays = (t_BS, t_next_BS, form.keep, form.data, form.change, form.fresh)
    tensors = torch.from_numpy(np.stack(arrays)).to(like)
    rows_B, steps, rows = torch.tensor(order, device=like.device), [], None
    for index in range(shape[1]):
        num_rows = int((num_steps_B > index).sum())
        if rows is None or len(rows) != num_rows:
            rows = rows_B[:num_rows]
        t, t_next, *factors = tensors[:, :num_rows, index]
        keep, data, change, fresh = (factor[:, None, None, None] for factor in factors)
        positions = torch.nonzero(t_next).flatten()
        inner: slice | Tensor | None = positions if len(positions) else None
        inner_rows = rows[positions]
        if len(positions) == num_rows:
            inner, inner_rows = slice(None), rows
        steps.append(
            _Step(
                num_rows=num_rows,
                num_going_on=int((num_steps_B > index + 1).sum()),
                rows=rows,
                t=t,
                keep=keep,
                data=data,
                change=change if form.change[:num_rows, index].any() else None,
                fresh=fresh,
                inner=inner,
                inner_rows=inner_rows,
                inner_t_next=t_next[positions],
            )
        )
    return steps


def _heun_correction(
    denoise: Denoiser, step: _Step, x: Tensor, x0: Tensor, x_euler: Tensor
) -> Tensor:
    """(t' - t) (d(x_euler, t') - d(x, t)) / 2 with d = (x - D) / t, for the inner rows."""
    x, x0, x_euler, t = x[step.inner], x0[step.inner], x_euler[step.inner], step.t[step.inner]
    t_next = step.inner_t_next
    x0_next = denoise(x_euler, t_next, step.inner_rows)
    t, t_next = t[:, None, None, None], t_next[:, None, None, None]
    return (t_next - t) / 2 * ((x_euler - x0_next) / t_next - (x - x0) / t)


def _check_finite(x_BCHW: Tensor, order: Sequence[int], sampler: str) -> None:
    finite_B = torch.isfinite(x_BCHW).flatten(1).all(1).tolist()
    bad = sorted(row for row, finite in zip(order, finite_B, strict=True) if not finite)
    if bad:
        raise FloatingPointError(
            f"sampler {sampler}: got pictures that are not finite in rows "
            f"{', '.join(map(str, bad))} of the batch, expected finite numbers"
        )


def add_noise(latent_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The state at which a run begins: x_t = (1 - t) latent + t noise.

    With zero noise it undoes `leave`, so a run that stopped early goes on where it was.
    """
    return torch.lerp(latent_BCHW, noise_BCHW, t_B[:, None, None, None])


def leave(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The latent that is stored of a state at time t: x / (1 - t), as in ComfyUI.

    At t = 1 the state is noise alone and no latent gives it back; it is stored as it is.
    """
    data_B = torch.where(t_B < 1, 1 - t_B, 1.0)
    return x_BCHW / data_B[:, None, None, None]


def guide(positive: Tensor, negative: Tensor, cfg_B: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): D = D_neg + cfg (D_pos - D_neg).

    It is the same formula in denoised pictures and in velocities: both are linear in each other.
    """
    return torch.lerp(negative, positive, cfg_B[:, None, None, None])


def rescale_guidance(
    x_BCHW: Tensor, positive: Tensor, guided: Tensor, multiplier_B: Tensor
) -> Tensor:
    """Guided velocities scaled toward the deviation of the unguided (arXiv 2305.08891, sec. 3.4).

        v = v_cfg (m std(v_pos) / std(v_cfg) + 1 - m),    std over C, H, W

    With v = (x - D) / t the time cancels, so it is written in x - D. ComfyUI's node takes v for a
    variance-preserving model's; a flow model's own velocity is meant here.

    Args:
        x_BCHW: State.
        positive: Denoised pictures of the positive conditioning.
        guided: Denoised pictures after `guide`.
        multiplier_B: m; 0 changes nothing.
    """
    v_cfg = x_BCHW - guided
    wanted_B = (x_BCHW - positive).flatten(1).std(1)
    ratio_B = wanted_B / v_cfg.flatten(1).std(1).clamp(min=torch.finfo(v_cfg.dtype).tiny)
    factor_B = torch.lerp(torch.ones_like(ratio_B), ratio_B, multiplier_B)
    return x_BCHW - factor_B[:, None, None, None] * v_cfg
