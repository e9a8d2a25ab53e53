"""FDFO as one writes it from diffusers' training examples and autograd: the peer of our loop.

The network is ours, as a diffusers transformer would be called: with pictures, a timestep and the
encoded prompts. What is usual there is kept: a pipeline-like sampling loop around
`FlowMatchEulerDiscreteScheduler` that looks up each timestep, prompts encoded row by row in every
call, a deep copy of the model as reference, one backward pass per denoising step.
"""

from __future__ import annotations

import copy
import math

import torch

from flowloom.generator.pairs import branch_noise
from flowloom.shapes import prompts as language

TRAIN_TIMESTEPS = 1000


class DiffusersFDFO:
    """Rollout and update; equations as in the paper's pseudo-code."""

    def __init__(self, model, config, num_steps):
        """Take the model (it is copied twice) and an `FDFOConfig`-like set of options."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.model = copy.deepcopy(model).requires_grad_(True)
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.config, self.num_steps = config, num_steps
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)

    def encode_prompt(self, model, prompts):
        """What a pipeline does at the start of each call."""
        return model.encode_text([language.tokenize(prompt) for prompt in prompts])

    def predict(self, model, x, timestep, embeds):
        """Velocity at a diffusers timestep, `[B]` in [0, 1000]."""
        return model.velocity(x, timestep / TRAIN_TIMESTEPS, embeds)

    def churned(self, v, timestep, x, fresh):
        """A scheduler step with churn, looked up by timestep as schedulers do."""
        index = self.scheduler.index_for_timestep(timestep)
        t, s = self.scheduler.sigmas[index], self.scheduler.sigmas[index + 1]
        g = self.config.churn
        k = math.sqrt((g + 1) ** 2 - 1)
        r = s / (1 + g - g * s)
        x = (x + (r - t) * v) / (1 + g * r)
        return x + fresh * (r * k / (1 + g * r))

    @torch.no_grad()
    def sample(self, prompts, seeds):
        """Pictures of both branches of each prompt, and what training needs of every step."""
        shape = (3, self.model.config.native_size, self.model.config.native_size)
        start, fresh = branch_noise(seeds, self.num_steps, shape)
        doubled = [prompt for prompt in prompts for _ in range(2)]
        embeds = self.encode_prompt(self.model, doubled)
        self.scheduler.set_timesteps(sigmas=[1 - i / self.num_steps for i in range(self.num_steps)])
        g = self.config.churn
        k = math.sqrt((g + 1) ** 2 - 1)
        x = start.repeat_interleave(2, 0) / (g + 1) + fresh[0] * k / (g + 1)
        kept = []
        for i, timestep in enumerate(self.scheduler.timesteps):
            v = self.predict(self.model, x, timestep.expand(len(x)), embeds)
            kept.append((x, timestep, v))
            noise = fresh[i + 1] if i + 1 < self.num_steps else torch.zeros_like(x)
            x = self.churned(v, timestep, x, noise)
        return doubled, kept, x

    def update(self, doubled, kept, images, rewards, optimizer, num_minibatches, grad_clip=1.0):
        """Optimiser steps on shuffled pairs, a backward pass per denoising step; last norm."""
        half_reward = (rewards[0::2] - rewards[1::2]) / 2
        half_image = (images[0::2] - images[1::2]) / 2
        half_reward = torch.stack([half_reward, -half_reward], 1).flatten()
        half_image = torch.stack([half_image, -half_image], 1).flatten(0, 1)
        square = half_image.pow(2).mean(dim=(1, 2, 3))
        d = half_image / (square + self.config.min_rms**2)[:, None, None, None]
        clip = self.config.trust / ((square.sqrt() + 1e-6) * math.sqrt(images[0].numel()))
        for pair_ids in torch.randperm(len(doubled) // 2).chunk(num_minibatches):
            rows = torch.stack([2 * pair_ids, 2 * pair_ids + 1], 1).flatten()
            prompts = [doubled[row] for row in rows]
            optimizer.zero_grad()
            with torch.no_grad():
                embeds = self.encode_prompt(self.reference, prompts)
            for x, timestep, v_old in kept:
                t = timestep.expand(len(rows))
                v = self.predict(self.model, x[rows], t, self.encode_prompt(self.model, prompts))
                with torch.no_grad():
                    v_reference = self.predict(self.reference, x[rows], t, embeds)
                error = (v - v_old[rows] + d[rows]).pow(2).mean(dim=(1, 2, 3))
                ratio = torch.exp(d[rows].pow(2).mean(dim=(1, 2, 3)) - error)
                penalty = half_reward[rows].abs() / (2 * clip[rows]) * (ratio - 1).pow(2)
                loss = (-half_reward[rows] * ratio + penalty).mean()
                loss = loss + self.config.kl_coef * (v - v_reference).pow(2).mean()
                (loss / self.num_steps).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
            optimizer.step()
        return float(norm)
