"""Flow-GRPO (arXiv 2505.05470): policy gradients on a flow sampled as a stochastic equation.

Each Euler step becomes a Gaussian, so it has a likelihood; G pictures of one prompt are judged
against each other, and each step of a picture is made more or less likely by the clipped ratio.
Few stochastic steps, the rest deterministic, is Flow-GRPO-Fast.

Departures from the paper:
1. The last step is deterministic, so no noise is left in the pictures that are judged; the paper
   adds it and leaves the step out of training.
2. The stochastic window of Flow-GRPO-Fast is drawn per prompt, not per epoch.

Shapes: P prompts, G pictures per prompt (neighbours), B = P * G rows, T steps, S stochastic steps
among them, C channels, H x W pixels, D = C * H * W.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowloom.config import check
from flowloom.generator.config import FlowGRPOConfig
from flowloom.generator.method import Paths
from flowloom.generator.velocity import Generator, Velocity


@dataclasses.dataclass(frozen=True)
class NoisyPaths(Paths):
    """The stochastic steps of a rollout."""

    states_SBCHW: Tensor
    """x before each of them."""
    velocities_SBCHW: Tensor
    """The velocity that was followed."""
    noise_SBCHW: Tensor
    """Standard normal noise that was added."""
    times_SB: Tensor
    """t of each."""
    gains_SB: Tensor
    """`gain` of each."""


class FlowGRPO:
    """Flow-GRPO as a `method.Method`; a unit is (prompt, picture, noisy step)."""

    def __init__(self, config: FlowGRPOConfig, times: Sequence[float]):
        """Take the configuration and the T + 1 falling times of a rollout.

        Raises:
            ValueError: More noisy steps are wanted than there are; the last one has no noise.
        """
        self.config, self.times = config, times
        most = len(times) - 2
        self.num_noisy = most if config.window is None else config.window
        num_trained = config.num_train_steps or self.num_noisy
        for field, value in (("window", self.num_noisy), ("num_train_steps", num_trained)):
            expected = f"at most {most}, all but the last of {most + 1} sampling steps"
            check(1 <= value <= most, f"method.{field}", value, expected)

    @property
    def num_branches(self) -> int:
        """Pictures G of each prompt."""
        return self.config.group_size

    def roll_out(self, flow: Generator, prompts: Sequence[str], seeds: Sequence[int]) -> NoisyPaths:
        """Sample G pictures of each prompt; its noisy steps are one window."""
        last_first = len(self.times) - 2 - self.num_noisy
        if self.config.window_frac is not None:
            last_first = min(last_first, int(self.config.window_frac * (len(self.times) - 1)))
        noise = group_noise(
            seeds,
            self.config.group_size,
            self.num_noisy,
            flow.shape,
            last_first=last_first,
            shared=self.config.shared_noise,
        )
        start_BCHW, noise_SBCHW, first_B = (part.to(flow.device) for part in noise)
        prompts_B = [text for text in prompts for _ in range(self.config.group_size)]
        return roll_out(
            flow,
            prompts_B,
            start_BCHW,
            noise_SBCHW,
            first_B,
            self.times,
            self.config.noise_level,
        )

    def advantages(self, rewards_B: Tensor) -> Tensor:
        """How much better than its group each picture is, normalised."""
        return group_advantages(rewards_B, self.config.group_size, self.config.divide_by)

    def units(self, advantages_B: Tensor, rng: np.random.Generator) -> np.ndarray:
        """All or `num_train_steps` of the noisy steps of each picture, shuffled; `[U, 3]`."""
        num_rows, num_taken = len(advantages_B), self.config.num_train_steps or self.num_noisy
        steps_BS = np.tile(np.arange(self.num_noisy), (num_rows, 1))
        taken = rng.permuted(steps_BS, axis=1)[:, :num_taken].ravel()
        rows = np.repeat(np.arange(num_rows), num_taken)
        prompts, branches = np.divmod(rows, self.config.group_size)
        return rng.permutation(np.stack([prompts, branches, taken], 1))

    def loss(
        self,
        flow: Generator,
        paths: NoisyPaths,
        advantages_B: Tensor,
        units: np.ndarray,
        count: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped objective of these units, and their divergence from the base."""
        config = self.config
        rows = torch.from_numpy(units[:, 0] * config.group_size + units[:, 1])
        steps = torch.from_numpy(units[:, 2])
        x_BCHW, t_B = paths.states_SBCHW[steps, rows], paths.times_SB[steps, rows]
        gain_B = paths.gains_SB[steps, rows]
        texts = [paths.prompts_B[int(row)] for row in rows]
        v_BCHW = flow.velocity(x_BCHW, t_B, texts)
        log_ratio_B = log_ratio(
            v_BCHW, paths.velocities_SBCHW[steps, rows], paths.noise_SBCHW[steps, rows], gain_B
        )
        loss = clipped(log_ratio_B, advantages_B[rows].to(v_BCHW.device), config.clip).sum() / count
        far_B = (log_ratio_B.detach().exp() - 1).abs() > config.clip
        logged = {"train/surrogate": loss.detach(), "train/clipped": far_B.sum() / count}
        if config.kl_coef > 0:
            v_base_BCHW = flow.base_velocity(x_BCHW, t_B, texts)
            kl = step_kl(v_BCHW, v_base_BCHW, gain_B).sum() / count
            logged["train/kl"] = kl.detach()
            loss = loss + config.kl_coef * kl
        return loss, logged


def group_noise(
    seeds: Sequence[int],
    group_size: int,
    num_noisy: int,
    shape: Sequence[int],
    *,
    last_first: int = 0,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of each group and where its window begins: a function of its seed alone.

    Args:
        seeds: One per prompt.
        group_size: G.
        num_noisy: S.
        shape: Of x.
        last_first: Last step at which a window may begin.
        shared: Whether the pictures of a group start from one noise.
        dtype: Of the noise.

    Returns:
        The start `[B, C, H, W]`, the noise of the steps `[S, B, C, H, W]`, and the first noisy step
        of each row `[B]`.
    """
    draws, firsts = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        firsts += [int(torch.randint(last_first + 1, (), generator=generator))] * group_size
        draw = torch.randn(1 + num_noisy, group_size, *shape, generator=generator, dtype=dtype)
        if shared:
            draw[0] = draw[0, 0].clone()
        draws.append(draw)
    start_BCHW, *noise = torch.cat(draws, 1).unbind(0)
    return start_BCHW, torch.stack(noise), torch.tensor(firsts)


def roll_out(
    flow: Velocity,
    prompts_B: Sequence[str],
    start_BCHW: Tensor,
    noise_SBCHW: Tensor,
    first_B: Tensor,
    times: Sequence[float],
    scale: float,
) -> NoisyPaths:
    """Sample with noise in the S steps from `first_B` on; no gradients.

    Args:
        flow: What is tuned.
        prompts_B: The prompt of each row.
        start_BCHW: x at the first time.
        noise_SBCHW: Standard normal noise.
        first_B: First noisy step of each row; its window ends before the last step.
        times: T + 1 falling times, the last one 0.
        scale: a of the noise level.
    """
    num_noisy, num_rows = noise_SBCHW.shape[:2]
    rows = torch.arange(num_rows, device=start_BCHW.device)
    states, velocities, gains = [], [], []
    with torch.inference_mode():
        x_BCHW = start_BCHW
        for step, (t, s) in enumerate(itertools.pairwise(times)):
            v_BCHW = flow.velocity(x_BCHW, x_BCHW.new_full((num_rows,), t), prompts_B)
            states.append(x_BCHW)
            velocities.append(v_BCHW)
            sigma = noise_level(t, s, scale) if s > 0 else 0.0
            gains.append(gain(t, s, sigma) if sigma > 0 else 0.0)
            place_B = step - first_B
            noisy_B = (place_B >= 0) & (place_B < num_noisy)
            sigma_B = torch.where(noisy_B, sigma, 0.0).to(x_BCHW.dtype)[:, None, None, None]
            x_BCHW, std_B = sde_step(x_BCHW, v_BCHW, t, s, sigma_B)
            x_BCHW = x_BCHW + std_B * noise_SBCHW[place_B.clamp(0, num_noisy - 1), rows]
    # Copies made outside of inference mode: training saves them for its backward pass.
    steps_SB = first_B + torch.arange(num_noisy, device=rows.device)[:, None]
    times_T = torch.tensor(times[:-1], dtype=start_BCHW.dtype, device=rows.device)
    gains_T = torch.tensor(gains, dtype=start_BCHW.dtype, device=rows.device)
    return NoisyPaths(
        x_BCHW.clone(),
        prompts_B,
        torch.stack(states)[steps_SB, rows],
        torch.stack(velocities)[steps_SB, rows],
        noise_SBCHW,
        times_T[steps_SB],
        gains_T[steps_SB],
    )


def noise_level(t: float, s: float, scale: float) -> float:
    """sigma_t = a sqrt(t / (1 - t)), a = `scale`; at t = 1 that of the step's end s."""
    t = t if t < 1 else s
    return scale * math.sqrt(t / (1 - t))


def sde_step(
    x: Tensor, v: Tensor, t: float, s: float, sigma: Tensor | float
) -> tuple[Tensor, Tensor | float]:
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
