"""FDFO as one writes it from diffusers' training examples and autograd: the peer of our loop.

The network has our weights and equations, in blocks written as diffusers writes them: modules, one
operation after the other, attention by `scaled_dot_product_attention`. What is usual there is kept:
a pipeline-like sampling loop around `FlowMatchEulerDiscreteScheduler` that looks up each timestep,
prompts encoded in every call and repeated for the pictures of each, keys and values of the text
computed in every step, a deep copy of the model as reference (or PEFT's adapters, switched off),
one backward pass per denoising step on all of its rows.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

from flowloom.generator.pairs import branch_noise
from flowloom.shapes import prompts as language
from flowloom.shapes.model import MLP, ImageBlock, ShapesModel

TRAIN_TIMESTEPS = 1000


class PlainMLP(MLP):
    """`MLP` one operation after the other."""

    def forward(self, x_BND):
        """Apply it to every token."""
        return self.down(F.relu(self.up(x_BND)).square())


class PlainBlock(ImageBlock):
    """`ImageBlock` one operation after the other."""

    def forward(self, x_BND, text_k, text_v, bias, signal_BD):
        """Update every image token."""
        parts = self.modulation(signal_BD)[: len(x_BND), None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h = F.layer_norm(x_BND, x_BND.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        k, v = torch.cat([k, text_k], 1), torch.cat([v, text_v], 1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x_BND = x_BND + (1 + gate_a) * self.to_out(mixed.transpose(1, 2).flatten(2))
        h = F.layer_norm(x_BND, x_BND.shape[-1:]) * (1 + scale_m) + shift_m
        return x_BND + (1 + gate_m) * self.mlp(h)


def plain_copy(model):
    """A copy of a shapes model in plain blocks."""
    copied = ShapesModel(model.config)
    copied.load_state_dict(model.state_dict())
    for module in copied.modules():
        if isinstance(module, ImageBlock):
            module.__class__ = PlainBlock
        elif isinstance(module, MLP):
            module.__class__ = PlainMLP
    return copied


def peft_copy(model, adapter):
    """A plain copy with PEFT's layers, that begin where those of an `Adapter` stand."""
    import peft

    options = adapter.config
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=list(adapter.layers)
    )
    tuned = peft.get_peft_model(plain_copy(model), config)
    for path, layer in adapter.layers.items():
        theirs = tuned.get_base_model().get_submodule(path)
        for part in ("lora_A", "lora_B"):
            getattr(theirs, part)["default"].weight.data.copy_(getattr(layer, part).detach())
    return tuned


class DiffusersFDFO:
    """Rollout and update; equations as in the paper's pseudo-code."""

    def __init__(self, model, reference, config, num_steps):
        """Take the model, its reference (None: PEFT's adapters off) and an `FDFOConfig`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.model, self.reference = model, reference
        self.config, self.num_steps = config, num_steps
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)

    @contextlib.contextmanager
    def as_reference(self):
        """The model before tuning."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.model

    def encode_prompt(self, model, prompts):
        """Both pictures' embeddings of each prompt, as `num_images_per_prompt` repeats them."""
        embeds = model.encode_text([language.tokenize(prompt) for prompt in prompts])
        return embeds[torch.arange(len(prompts)).repeat_interleave(2)]

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
        embeds = self.encode_prompt(self.model, prompts)
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
        return prompts, kept, x

    def update(self, prompts, kept, images, rewards, optimizer, num_minibatches, grad_clip=1.0):
        """Optimiser steps on shuffled pairs, a backward pass per denoising step; last norm."""
        half_reward = (rewards[0::2] - rewards[1::2]) / 2
        half_image = (images[0::2] - images[1::2]) / 2
        half_reward = torch.stack([half_reward, -half_reward], 1).flatten()
        half_image = torch.stack([half_image, -half_image], 1).flatten(0, 1)
        square = half_image.pow(2).mean(dim=(1, 2, 3))
        d = half_image / (square + self.config.min_rms**2)[:, None, None, None]
        clip = self.config.trust / ((square.sqrt() + 1e-6) * math.sqrt(images[0].numel()))
        for pair_ids in torch.randperm(len(prompts)).chunk(num_minibatches):
            rows = torch.stack([2 * pair_ids, 2 * pair_ids + 1], 1).flatten()
            texts = [prompts[pair] for pair in pair_ids]
            optimizer.zero_grad()
            with torch.no_grad(), self.as_reference() as reference:
                embeds = self.encode_prompt(reference, texts)
            for x, timestep, v_old in kept:
                t = timestep.expand(len(rows))
                v = self.predict(self.model, x[rows], t, self.encode_prompt(self.model, texts))
                with torch.no_grad(), self.as_reference() as reference:
                    v_reference = self.predict(reference, x[rows], t, embeds)
                error = (v - v_old[rows] + d[rows]).pow(2).mean(dim=(1, 2, 3))
                ratio = torch.exp(d[rows].pow(2).mean(dim=(1, 2, 3)) - error)
                penalty = half_reward[rows].abs() / (2 * clip[rows]) * (ratio - 1).pow(2)
                loss = (-half_reward[rows] * ratio + penalty).mean()
                loss = loss + self.config.kl_coef * (v - v_reference).pow(2).mean()
                (loss / self.num_steps).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
            optimizer.step()
        return float(norm)
