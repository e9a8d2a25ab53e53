"""FDFO: how true its direction is where the answer is known, and what it costs on a shapes model.

    python -m benchmarks.fdfo [--quick] [--json]

Direction: cosine of FDFO's step with the true gradient of a linear reward through the sampler, in
per-step biases on the exact velocity of a Gaussian, for several churns and for a negated signal.
Cost: pictures per CPU second of one epoch (sampling, scoring, training) on a random shapes model,
with and without guidance, on one thread. `image_ratio` is null until there is a peer.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F

from flowloom.generator import fdfo, pairs
from flowloom.generator.config import PromptsConfig, TuneGeneratorConfig
from flowloom.generator.velocity import GaussianFlow, ShapesFlow
from flowloom.score.rubric import get_rubric
from flowloom.shapes.model import ShapesModel

SHAPE, NUM_STEPS = (1, 4, 4), 20


class BiasedFlow:
    """A Gaussian's exact velocity plus one bias per step."""

    def __init__(self, variance):
        self.flow = GaussianFlow(torch.zeros(SHAPE).double(), torch.full(SHAPE, variance).double())
        self.bias_TCHW = torch.zeros(NUM_STEPS, *SHAPE, dtype=torch.float64, requires_grad=True)

    def velocity(self, x_BCHW, t_B, prompts):
        """The exact velocity, and the bias of the step that t belongs to."""
        steps = ((1 - t_B) * NUM_STEPS).round().long()
        return self.flow.velocity(x_BCHW, t_B, prompts) + self.bias_TCHW[steps]


def direction(num_pairs, churn, seed, sign=1.0):
    """Cosines with the true gradient: per step, and summed over steps."""
    flow, prompts = BiasedFlow(0.25), [""] * num_pairs
    slope = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    seeds = range(seed * num_pairs, (seed + 1) * num_pairs)
    noise = pairs.pair_noise(seeds, NUM_STEPS, SHAPE, torch.float64)
    paths = pairs.roll_out(flow, prompts, *noise, churn)
    rewards = (paths.images_BCHW * slope).flatten(1).sum(1)
    dR, d, rms = pairs.finite_difference(rewards, paths.images_BCHW, min_rms=1e-6)
    c = pairs.trust_clip(rms, 16, trust=1.0)
    loss = 0
    for step, t in enumerate(paths.times_T):
        v = flow.velocity(paths.states_TBCHW[step], t.expand(2 * num_pairs), prompts * 2)
        ratio = pairs.log_ratio(v, paths.velocities_TBCHW[step], sign * d)
        loss = loss + pairs.surrogate(ratio, dR, c).mean()
    step = -torch.autograd.grad(loss, flow.bias_TCHW)[0]
    x = noise[0]
    for index in range(NUM_STEPS):
        t = x.new_full((num_pairs,), 1 - index / NUM_STEPS)
        x = x - flow.velocity(x, t, prompts) / NUM_STEPS
    truth = torch.autograd.grad((x * slope).sum(), flow.bias_TCHW)[0]
    flat = [(step, truth), (step.sum(0), truth.sum(0))]
    return [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in flat]


def cost(guidance, num_pairs):
    """Pictures per CPU second: sampled and scored, and trained on, on a random model."""
    torch.manual_seed(0)
    model = ShapesModel()
    torch.nn.init.normal_(model.patch_out.weight, std=0.1)
    config = TuneGeneratorConfig(guidance=guidance, pairs_per_epoch=num_pairs)
    flow, base = ShapesFlow(model, guidance), ShapesFlow(copy.deepcopy(model), guidance)
    optimizer = torch.optim.AdamW(model.parameters())
    prompts = fdfo.draw_prompts(PromptsConfig(), "train", num_pairs, (0,))
    doubled = [prompt for prompt in prompts for _ in range(2)]
    times = []
    for epoch in range(2):
        began = time.process_time()
        noise = pairs.pair_noise(range(num_pairs), config.num_steps, fdfo.SHAPE)
        paths = pairs.roll_out(flow, prompts, *noise, config.churn)
        rewards = fdfo.score(get_rubric("shapes"), doubled, paths.images_BCHW)
        sampled = time.process_time()
        units = fdfo.choose_units(config, rewards, epoch)
        fdfo.update(config, flow, base, optimizer, doubled, paths, rewards, units, epoch)
        times = [sampled - began, time.process_time() - sampled]
    return [len(doubled) / seconds for seconds in times]


def main():
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_pairs = 250 if options.quick else 4000
    figures = {"image_ratio": None, "interval": None}
    for name, churn, sign in (("0.0025", 0.0025, 1.0), ("0.1", 0.1, 1.0), ("wrong", 0.0025, -1.0)):
        per_step, summed = direction(num_pairs, churn, 0, sign)
        figures |= {f"cosine_{name}": round(per_step, 4), f"cosine_summed_{name}": round(summed, 4)}
        print(f"churn {name:>6}: cosine per step {per_step:.3f}, summed over steps {summed:.3f}")
    for name, guidance in (("unguided", None), ("guided", 2.5)):
        sampled, trained = cost(guidance, 8 if options.quick else 32)
        figures |= {f"sampled_per_s_{name}": round(sampled, 1)}
        figures |= {f"trained_per_s_{name}": round(trained, 1)}
        print(f"{name:>8}: {sampled:.0f} pictures/s sampled and scored, {trained:.0f}/s trained on")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
