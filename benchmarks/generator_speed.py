"""Pictures per CPU second of `tune_generator` against the usual loop of diffusers and autograd.

    python -m benchmarks.generator_speed [--lora] [--same-network] [--quick] [--json]

FDFO on the shipped checkpoint, one thread; all weights, or a LoRA of rank 8 (theirs is PEFT's).
Both sides sample the same pairs with the same noise, get the same rewards (given, not scored) and
take the same number of optimiser steps on the same number of rows; before anything is timed, their
gradients of one whole rollout are compared. Turns alternate; medians of CPU seconds.

With --same-network the peer gets our blocks as well, so what is left is the loop around them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.diffusers_fdfo import DiffusersFDFO, peft_copy, plain_copy
from flowloom.generator import tune
from flowloom.generator.adapters import Adapter
from flowloom.generator.config import FDFOConfig, PromptsConfig, TuneGeneratorConfig
from flowloom.generator.judging_config import Setting
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Part, Share
from flowloom.generator.velocity import ShapesFlow
from flowloom.processes import Processes
from flowloom.render.models import ModelStore

SAME_NORM = 1e-3
LAYERS = ("to_q", "to_k", "to_v", "to_out", "text_k", "text_v", "up", "down")


class Ours:
    """The loop's rollout and update."""

    def __init__(self, model, config):
        """Take the model, which is copied."""
        self.config = config
        copied = copy.deepcopy(model).requires_grad_(True)
        if config.lora is None:
            self.flow = ShapesFlow(copied, base=model)
        else:
            self.flow = ShapesFlow(copied, adapter=fresh_adapter(copied, config.lora))
        self.method = tune.build_method(config, Setting(num_steps=config.num_steps, guidance=None))
        self.optimizer = torch.optim.AdamW(self.flow.parameters(), lr=config.lr)

    def sample(self, prompts, seeds):
        """Draw in parts, as the loop does."""
        size = max(self.config.sample_rows // 2, 1)
        self.parts = []
        for first in range(0, len(prompts), size):
            some = range(first, min(first + size, len(prompts)))
            texts = prompts[some.start : some.stop]
            paths = self.method.roll_out(self.flow, texts, seeds[some.start : some.stop])
            self.parts.append(Part(some, paths))
        self.num_prompts = len(prompts)

    def update(self, rewards, epoch):
        """Train; the mean gradient norm."""
        advantages = self.method.advantages(rewards)
        units = self.method.units(advantages, np.random.default_rng(epoch))
        share = Share(Processes(), self.num_prompts, 2)
        logged = tune.update(
            self.config,
            self.method,
            self.flow,
            self.optimizer,
            share,
            self.parts,
            advantages,
            units,
            epoch,
        )
        return logged["train/grad_norm"]


class Twin:
    """The loop of diffusers' examples."""

    def __init__(self, model, config, same_network=False):
        """Take the model, which is copied."""
        self.config = config
        if config.lora is not None:
            adapter = fresh_adapter(copy.deepcopy(model), config.lora)
            tuned, reference = peft_copy(model, adapter), None
        else:
            copies = copy.deepcopy if same_network else plain_copy
            tuned, reference = copies(model).requires_grad_(True), copies(model)
            reference.requires_grad_(False).eval()
        self.loop = DiffusersFDFO(tuned, reference, config.method, config.num_steps)
        weights = [weight for weight in tuned.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=config.lr)

    def sample(self, prompts, seeds):
        """Draw as one batch."""
        self.paths = self.loop.sample(prompts, seeds)

    def update(self, rewards, epoch):
        """Train; the last gradient norm."""
        torch.manual_seed(epoch)
        return self.loop.update(
            *self.paths,
            rewards,
            self.optimizer,
            self.config.num_minibatches,
            self.config.grad_clip,
        )


def fresh_adapter(model, options):
    """The same on both sides."""
    return Adapter(model, options, seed=0)


def measure(model, config, num_turns, same_network=False):
    """CPU seconds of sampling and training of both sides, medians of turns after a first one."""
    num_prompts = config.images_per_epoch // 2
    prompts = draw_prompts(PromptsConfig(), "train", num_prompts, (0,))
    rewards = torch.rand(2 * num_prompts, generator=torch.Generator().manual_seed(0))
    whole = dataclasses.replace(config, num_minibatches=1)
    norms = []
    for side in (Ours(model, whole), Twin(model, whole, same_network)):
        side.sample(prompts, range(num_prompts))
        norms.append(side.update(rewards, 0))
    if abs(norms[0] / norms[1] - 1) > SAME_NORM:
        raise ValueError(f"gradient norms: got {norms[0]} and {norms[1]}, expected the same")
    sides = {"ours": Ours(model, config), "twin": Twin(model, config, same_network)}
    spent = {name: [] for name in sides}
    for turn in range(num_turns + 1):
        for name, side in sides.items():
            began = time.process_time()
            side.sample(prompts, range(num_prompts))
            sampled = time.process_time()
            side.update(rewards, turn)
            spent[name].append((sampled - began, time.process_time() - sampled))
    return {name: np.median(rows[1:], axis=0) for name, rows in spent.items()}, norms


def main():
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lora", action="store_true", help="tune a LoRA, not all weights")
    parser.add_argument("--same-network", action="store_true", help="give the peer our blocks")
    parser.add_argument("--quick", action="store_true", help="under 30 s")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ModelStore.open(None).checkpoint("shapes-base.safetensors")
    images = 16 if options.quick else 64
    if options.lora and options.same_network:
        parser.error("--same-network: got --lora as well, expected one of them: PEFT has its own")
    lora = LoRAConfig(rank=8, alpha=16.0, target_modules=LAYERS) if options.lora else None
    config = TuneGeneratorConfig(
        method=FDFOConfig(), lora=lora, images_per_epoch=images, num_epochs=1000
    )
    num_turns = 2 if options.quick else 5
    seconds, norms = measure(model, config, num_turns, options.same_network)
    figures = {"images": images, "gradient_norms": norms}
    print(f"{images} pictures, {config.num_steps} steps, gradient norms {norms}")
    for name, (sampling, training) in seconds.items():
        rates = images / sampling, images / training, images / (sampling + training)
        keys = ("sampled_per_s", "trained_per_s", "per_s")
        figures |= {f"{name}_{key}": round(rate, 1) for key, rate in zip(keys, rates, strict=True)}
        print("{:>5}: {:.1f}/s sampled, {:.1f}/s trained on, {:.1f}/s both".format(name, *rates))
    for index, key in enumerate(("speedup_sampling", "speedup_training")):
        figures[key] = round(float(seconds["twin"][index] / seconds["ours"][index]), 3)
    figures["speedup"] = round(float(seconds["twin"].sum() / seconds["ours"].sum()), 3)
    print("{speedup_sampling} x, {speedup_training} x, {speedup} x both".format(**figures))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
