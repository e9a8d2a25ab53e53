"""Finite Difference Flow Optimization (FDFO, arXiv 2603.12893) as a method of `tune_generator`.

Two pictures are sampled from one noise and one prompt with independent churn. The better one minus
the worse one is the direction in which the reward rises; at every point that either sample visited,
the velocity is pulled so that sampling goes there. No back-propagation through the sampler, no
likelihood: the whole run is one action.

Departures from the paper:
1. The clip c of the surrogate is scaled to picture size and pair distance (`pairs.trust_clip`); the
   paper's 0.03 belongs to its 65,536 dimensions and would stop learning at 3,072.
2. A penalty toward the velocity of the base, kl_coef * mean (v - v_base)^2, against reward hacking.
3. The branches of a noise at a step stay in one minibatch; what is shuffled is (noise, step).
4. More than two branches per noise, on wish (`pairs.centred`).
5. The pull at the first steps alone, on wish (`pull_frac`).

Shapes: P prompts with a noise each, K branches, B = P * K rows (a noise's are neighbours), T steps,
N rows of a pass, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.generator import pairs
from flowloom.generator.config import FDFOConfig
from flowloom.generator.method import Paths
from flowloom.generator.velocity import Generator


@dataclasses.dataclass(frozen=True)
class Branches(Paths):
    """A rollout with all that its rows visited, and the signal of its pictures."""

    visited: pairs.Trajectories
    """States and velocities, on the generator's device."""
    d_BCHW: Tensor
    """Normalised difference from the other branches (`pairs.normalised`)."""
    rms_B: Tensor
    """Its size before."""


class FDFO:
    """The method of the paper."""

    def __init__(self, config: FDFOConfig, times: Sequence[float]):
        """Take the options, and the T + 1 falling times from 1 to 0 of a rollout."""
        self.config, self.times = config, times
        self.num_branches = config.num_branches

    def roll_out(self, flow: Generator, prompts: Sequence[str], seeds: Sequence[int]) -> Branches:
        """Sample K branches of one noise per prompt."""
        num_steps, K = len(self.times) - 1, self.num_branches
        start, fresh = pairs.branch_noise(seeds, num_steps, flow.shape, K)
        start, fresh = start.to(flow.device), fresh.to(flow.device)
        visited = pairs.roll_out(flow, prompts, start, fresh, self.config.churn, self.times)
        d_BCHW, rms_B = pairs.normalised(visited.images_BCHW, K, self.config.min_rms)
        texts = [prompt for prompt in prompts for _ in range(K)]
        return Branches(visited.images_BCHW, texts, visited, d_BCHW, rms_B)

    def advantages(self, rewards_B: Tensor) -> Tensor:
        """dR, the distance from the mean of the branches."""
        return pairs.centred(rewards_B, self.num_branches)

    def units(self, advantages_B: Tensor, rng: np.random.Generator) -> np.ndarray:
        """(noise, step), shuffled: a share of all steps of the noises with the largest gaps."""
        num_steps = len(self.times) - 1
        gaps_P = advantages_B.unflatten(0, (-1, self.num_branches)).abs().amax(1).numpy()
        kept = np.argsort(-gaps_P, kind="stable")[: math.ceil(self.config.keep_frac * len(gaps_P))]
        steps, noises = np.divmod(np.arange(num_steps * len(kept)), len(kept))
        units_U2 = rng.permutation(np.stack([np.sort(kept)[noises], steps], 1))
        return units_U2[: math.ceil(self.config.train_frac * len(units_U2))]

    def loss(
        self,
        flow: Generator,
        paths: Branches,
        advantages_B: Tensor,
        units: np.ndarray,
        count: int,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The clipped surrogate on all branches of these (noise, step), and the penalty."""
        K, visited = self.num_branches, paths.visited
        rows_N = (units[:, :1] * K + np.arange(K)).ravel()
        rows = torch.from_numpy(rows_N)
        steps = torch.from_numpy(units[:, 1]).repeat_interleave(K)
        x_BCHW, t_B = visited.states_TBCHW[steps, rows], visited.times_T[steps]
        texts = [paths.prompts_B[int(row)] for row in rows_N]
        dR_B, rms_B = advantages_B[rows].to(x_BCHW.device), paths.rms_B[rows]
        c_B = pairs.trust_clip(rms_B, x_BCHW[0].numel(), self.config.trust)

        v_BCHW = flow.velocity(x_BCHW, t_B, texts)
        v_ref_BCHW = visited.velocities_TBCHW[steps, rows]
        log_rho_B = pairs.log_ratio(v_BCHW, v_ref_BCHW, paths.d_BCHW[rows])
        pulled_B = steps.to(dR_B.device) < self.config.pull_frac * visited.times_T.numel()
        loss = (pairs.surrogate(log_rho_B, dR_B, c_B) * pulled_B).sum() / (count * K)
        drift = loss.new_zeros(())
        if self.config.kl_coef > 0:
            v_base_BCHW = flow.base_velocity(x_BCHW, t_B, texts)
            drift = (v_BCHW - v_base_BCHW).square().flatten(1).mean(1).sum() / (count * K)
        with torch.no_grad():
            far_B = (log_rho_B.exp() - 1).abs() > c_B
            means = {"clipped": far_B.float(), "pair_rms": rms_B, "pair_gap": 2 * dR_B.abs()}
        logged = {f"train/{key}": value_B.sum() / (count * K) for key, value_B in means.items()}
        logged |= {"train/surrogate": loss.detach(), "train/drift": drift.detach()}
        return loss + self.config.kl_coef * drift, logged
