"""Flow-GRPO's equations against closed forms, and the method in the loop.

Facts pinned here:
- On a Gaussian flow, 500 noisy steps of any scale end at the data's mean (1e-9) and variance (2 %,
  measured 0.03-0.93 %), as steps without noise do; with the score term turned around they do not.
- log ratio = the difference of torch.distributions' log-probabilities, mean over D.
- At the first update every ratio is 1, and the gradient is REINFORCE's.
- The KL of a step = torch.distributions' = the paper's closed form.
- A better picture's noise becomes likelier, a worse one's less likely, until the clip.
- A picture is a function of weights, prompt and seed, whatever the batch; only the window is noisy.
- Units are every (picture, noisy step) once, or some steps of each picture.
- Losses of eight optimiser steps of the shared loop stay what they are (golden).
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowloom.generator import flow_grpo, tune
from flowloom.generator.config import FlowGRPOConfig, PromptsConfig, TuneGeneratorConfig
from flowloom.generator.flow_grpo import FlowGRPO
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Part, Share
from flowloom.generator.velocity import GaussianFlow, ShapesFlow
from flowloom.processes import Processes
from tests.generator.tiny import tiny_model

F64 = torch.float64
SHAPE = (1, 2, 3)
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]
CONFIG = FlowGRPOConfig(group_size=3)
ADVANTAGE_TOLERANCE = 1e-3
REL_GOLDEN = 1e-3


class TinyFlow:
    """The velocity of a Gaussian times one number, which is tuned."""

    shape, device = SHAPE, torch.device("cpu")

    def __init__(self, scale=1.0):
        self.exact = GaussianFlow(torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.5))
        self.scale = torch.tensor(scale, requires_grad=True)

    def velocity(self, x_BCHW, t_B, prompts):
        return self.scale * self.exact.velocity(x_BCHW, t_B, prompts)

    def base_velocity(self, x_BCHW, t_B, prompts):
        return self.exact.velocity(x_BCHW, t_B, prompts)


def moments(variance, scale, num_steps, sign=1):
    """Mean and variance of x0 per element, exactly: on a Gaussian flow every step is affine.

    Args:
        variance: Of the data; its mean is 2.
        scale: a of the noise level.
        num_steps: T.
        sign: -1 turns the score term around.
    """
    flow = GaussianFlow(torch.full(SHAPE, 2.0, dtype=F64), torch.full(SHAPE, variance, dtype=F64))
    ends = torch.stack([torch.zeros(SHAPE, dtype=F64), torch.ones(SHAPE, dtype=F64)])
    mean, square = 0.0, 1.0
    for index in range(num_steps):
        t, s = 1 - index / num_steps, 1 - (index + 1) / num_steps
        sigma = flow_grpo.noise_level(t, s, scale) if index < num_steps - 1 else 0.0
        v = flow.velocity(ends, torch.full((2,), t, dtype=F64), ["", ""])
        plain, _ = flow_grpo.sde_step(ends, v, t, s, 0.0)
        noisy, std = flow_grpo.sde_step(ends, v, t, s, sigma)
        x = plain + sign * (noisy - plain)
        offset, slope = float(x[0].mean()), float((x[1] - x[0]).mean())
        mean, square = slope * mean + offset, slope**2 * square + std**2
    return mean, square


@pytest.mark.parametrize("variance", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("scale", [0.0, 0.3, 0.7, 1.0])
def test_noise_keeps_the_marginals(variance, scale):
    mean, square = moments(variance, scale, 500)
    assert mean == pytest.approx(2.0, abs=1e-9)
    assert square == pytest.approx(variance, rel=0.02)


def test_score_term_of_the_wrong_sign_does_not():
    assert moments(0.5, 0.3, 500, sign=-1)[1] > 1.5
    assert moments(0.5, 0.3, 500, sign=0)[1] > 0.55


def test_noise_level_by_hand():
    assert flow_grpo.noise_level(0.8, 0.6, 0.7) == pytest.approx(1.4)
    assert flow_grpo.noise_level(1.0, 0.8, 0.7) == pytest.approx(1.4)


def random_step(t=0.6, s=0.45, scale=0.7):
    """One step taken at v_old, and what is needed to judge it at v."""
    generator = torch.Generator().manual_seed(3)
    x, v, v_old, noise = torch.randn(4, 5, *SHAPE, generator=generator, dtype=F64)
    v = v_old + 0.3 * v
    sigma = flow_grpo.noise_level(t, s, scale)
    mean, std = flow_grpo.sde_step(x, v_old, t, s, sigma)
    gain_B = torch.full((5,), flow_grpo.gain(t, s, sigma), dtype=F64)

    def policy(velocity):
        return Normal(*flow_grpo.sde_step(x, velocity, t, s, sigma))

    return v, v_old, noise, gain_B, policy, mean + std * noise


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.6, 0.45), (0.2, 0.1)])
def test_log_ratio_against_torch_distributions(t, s):
    v, v_old, noise, gain_B, policy, reached = random_step(t, s)
    expected = policy(v).log_prob(reached) - policy(v_old).log_prob(reached)
    got = flow_grpo.log_ratio(v, v_old, noise, gain_B)
    torch.testing.assert_close(got, expected.flatten(1).mean(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.6, 0.45), (0.2, 0.1)])
def test_kl_against_torch_distributions_and_the_paper(t, s):
    v, v_base, _, gain_B, policy, _ = random_step(t, s)
    got = flow_grpo.step_kl(v, v_base, gain_B)
    expected = kl_divergence(policy(v), policy(v_base)).flatten(1).mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    sigma = flow_grpo.noise_level(t, s, 0.7)
    factor = (t - s) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    paper = factor * (v - v_base).square().flatten(1).mean(1)
    torch.testing.assert_close(got, paper, rtol=1e-9, atol=0)


def test_first_update_is_reinforce():
    _, v_old, noise, gain_B, policy, reached = random_step()
    advantages = torch.tensor([1.5, -0.5, 0.2, -1.2, 0.0], dtype=F64)
    v = v_old.clone().requires_grad_(True)
    log_ratio_B = flow_grpo.log_ratio(v, v_old, noise, gain_B)
    assert torch.equal(log_ratio_B.exp(), torch.ones(5, dtype=F64))
    flow_grpo.clipped(log_ratio_B, advantages, clip=0.2).sum().backward()
    w = v_old.clone().requires_grad_(True)
    (-advantages * policy(w).log_prob(reached).flatten(1).mean(1)).sum().backward()
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-9, atol=1e-12)
    # A step down the loss makes better pictures' noise likelier and worse ones' less likely.
    after = flow_grpo.log_ratio(v_old - 0.01 * v.grad, v_old, noise, gain_B)
    assert torch.equal(after.sign(), advantages.sign())


def test_clip_by_hand():
    log_ratio_B = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5]).log()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    got = flow_grpo.clipped(log_ratio_B, advantages, clip=0.1)
    torch.testing.assert_close(got, torch.tensor([-1.0, -2.0, -2.2, 1.8, 2.0, 3.0]))


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0, 5.0, 9.0])
    none = flow_grpo.group_advantages(rewards, 2, None)
    assert none.tolist() == [-1, 1, 0, 0, -2, 2]
    group = flow_grpo.group_advantages(rewards, 2, "group")
    assert group.tolist() == pytest.approx([-1, 1, 0, 0, -1, 1], abs=ADVANTAGE_TOLERANCE)
    batch = flow_grpo.group_advantages(rewards, 2, "batch")
    assert batch.tolist() == pytest.approx((none / np.std(rewards.numpy())).tolist(), abs=1e-3)


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_rollout(window, shared):
    config = dataclasses.replace(CONFIG, window=window, shared_noise=shared)
    method, flow = FlowGRPO(config, TIMES), TinyFlow()
    together = method.roll_out(flow, ["a", "b", "c"], [4, 5, 6])
    alone = method.roll_out(flow, ["b"], [5])
    assert together.prompts_B == list("aaabbbccc")
    assert torch.equal(together.images_BCHW[3:6], alone.images_BCHW)
    for field in ("states_SBCHW", "noise_SBCHW", "times_SB", "gains_SB"):
        assert torch.equal(getattr(together, field)[:, 3:6], getattr(alone, field))
    # The steps that are kept lead from each state to the next, and from the last to the picture.
    x = together.states_SBCHW[0]
    for index, (t_B, noise) in enumerate(zip(together.times_SB, together.noise_SBCHW, strict=True)):
        torch.testing.assert_close(x, together.states_SBCHW[index])
        steps = []
        for row, t in enumerate(t_B.tolist()):
            s = t - 0.25
            sigma = flow_grpo.noise_level(t, s, config.noise_level)
            mean, std = flow_grpo.sde_step(
                x[row], together.velocities_SBCHW[index, row], t, s, sigma
            )
            steps.append(mean + std * noise[row])
        x = torch.stack(steps)
    ends = []
    for row, t in enumerate((together.times_SB[-1] - 0.25).tolist()):
        y = x[row : row + 1]
        while t > 0:
            y = y - 0.25 * flow.velocity(y, torch.tensor([t]), [""])
            t -= 0.25
        ends.append(y)
    torch.testing.assert_close(torch.cat(ends), together.images_BCHW)


def test_shared_noise_parts_at_the_window():
    config = dataclasses.replace(CONFIG, shared_noise=True)
    start, noise, _ = flow_grpo.group_noise([1, 2], 3, 2, SHAPE, shared=True)
    assert torch.equal(start[0], start[2])
    assert not torch.equal(start[0], start[3])
    assert not torch.equal(noise[0, 0], noise[0, 1])
    paths = FlowGRPO(config, TIMES).roll_out(TinyFlow(), ["a"], [0])
    assert torch.equal(paths.states_SBCHW[0, 0], paths.states_SBCHW[0, 1])
    assert not torch.equal(paths.images_BCHW[0], paths.images_BCHW[1])


def test_windows_begin_in_their_share_of_the_steps():
    firsts = flow_grpo.group_noise(range(60), 2, 1, SHAPE, last_first=2)[2]
    assert sorted(set(firsts.tolist())) == [0, 1, 2]
    assert torch.equal(firsts[::2], firsts[1::2])
    method = FlowGRPO(dataclasses.replace(CONFIG, window=1, window_frac=0.25), TIMES)
    times = method.roll_out(TinyFlow(), [""] * 40, range(40)).times_SB
    assert sorted(set(times.flatten().tolist())) == [0.75, 1.0]


@pytest.mark.parametrize("field", ["window", "num_train_steps"])
def test_more_noisy_steps_than_there_are(field):
    with pytest.raises(ValueError, match=rf"{field}: got 4, expected at most 3"):
        FlowGRPO(dataclasses.replace(CONFIG, **{field: 4}), TIMES)


def test_units():
    rewards, rng = torch.rand(6), np.random.default_rng(0)
    units = FlowGRPO(CONFIG, TIMES).units(rewards, rng)
    every = [[p, g, s] for p in range(2) for g in range(3) for s in range(3)]
    assert units.tolist() != every
    assert sorted(units.tolist()) == every
    some = FlowGRPO(dataclasses.replace(CONFIG, num_train_steps=2), TIMES).units(rewards, rng)
    assert len({tuple(unit) for unit in some.tolist()}) == 12
    assert np.bincount(some[:, 0] * 3 + some[:, 1]).tolist() == [2] * 6


def test_loss_by_hand_and_in_parts():
    config = dataclasses.replace(CONFIG, kl_coef=0.5, divide_by=None, clip=0.02)
    method, flow = FlowGRPO(config, TIMES), TinyFlow()
    paths = method.roll_out(flow, ["a", "b"], [0, 1])
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 2.0])
    units = method.units(rewards, np.random.default_rng(0))
    flow = TinyFlow(scale=1.1)
    advantages = method.advantages(rewards)
    whole, logged = method.loss(flow, paths, advantages, units, len(units))
    parts = [
        method.loss(flow, paths, advantages, part, len(units)) for part in (units[:7], units[7:])
    ]
    torch.testing.assert_close(whole, parts[0][0] + parts[1][0])
    for key, value in logged.items():
        torch.testing.assert_close(value, parts[0][1][key] + parts[1][1][key])
    expected = 0.0
    for p, g, s in units.tolist():
        row = 3 * p + g
        x, t = paths.states_SBCHW[s, row], float(paths.times_SB[s, row])
        sigma = flow_grpo.noise_level(t, t - 0.25, config.noise_level)
        v_old, noise = paths.velocities_SBCHW[s, row], paths.noise_SBCHW[s, row]
        old, new, base = (
            Normal(*flow_grpo.sde_step(x, v, t, t - 0.25, sigma))
            for v in (v_old, 1.1 * v_old, v_old)
        )
        reached = old.mean + old.stddev * noise
        rho = math.exp(float((new.log_prob(reached) - old.log_prob(reached)).mean()))
        advantage = float(rewards[row] - rewards[3 * p : 3 * p + 3].mean())
        clipped = min(max(rho, 0.98), 1.02)
        expected -= min(rho * advantage, clipped * advantage) / len(units)
        expected += 0.5 * float(kl_divergence(new, base).mean()) / len(units)
    assert whole.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("window", [None, 1])
def test_losses(golden, window):
    config = TuneGeneratorConfig(num_minibatches=4, warmup_steps=0, lr=1e-3)
    method = FlowGRPO(
        dataclasses.replace(CONFIG, window=window, kl_coef=0.1, divide_by="batch"), TIMES
    )
    flow = ShapesFlow(tiny_model().requires_grad_(True), 2.0, base=tiny_model())
    optimizer = torch.optim.AdamW(flow.parameters())
    prompts, rows = draw_prompts(PromptsConfig(), "train", 4, (0, 0)), []
    for epoch in range(2):
        part = Part(range(4), method.roll_out(flow, prompts, range(4)))
        advantages_B = method.advantages(part.paths.images_BCHW.flatten(1).mean(1))
        units_U3 = method.units(advantages_B, np.random.default_rng(epoch))
        share = Share(Processes(), 4, method.num_branches)
        rows.append(
            tune.update(
                config, method, flow, optimizer, share, [part], advantages_B, units_U3, epoch
            )
        )
    name = "flow_grpo.json" if window is None else "flow_grpo_window.json"
    golden(name, rows, rel=REL_GOLDEN)
