"""Both methods where the exact answer is known: Gaussian data, and a mixture of Gaussians.

The policy is the exact velocity plus one bias per step (Gaussian) or a small network (mixture); the
truth is the gradient of E[R] through the sampler, 20 steps, D = 16.

Facts pinned here:
- The mixture's velocity is that of its density's score; one component is the Gaussian's.
- Isotropic data, linear reward, FDFO with 1,000 pairs: cosine with the true gradient >= 0.94 per
  step (measured 0.961-0.966), >= 0.97 summed over steps (0.991-0.996); its length is -2/D grad R
  within 15 % (measured 4-9 %), whatever the churn.
- Turning d or dR around turns the step around (<= -0.94), turning both changes nothing; nor does
  swapping the branches of a pair.
- Anisotropic data: FDFO follows 2 E[u u^T] grad R (>= 0.98, measured 0.999; length within 5 %), and
  the true gradient only roughly (0.8-0.95, measured 0.90 per step, 0.92 summed): the known bias.
- Flow-GRPO with the same 2,000 pictures: >= 0.75 per step (measured 0.84-0.85), >= 0.97 summed
  (0.990-0.996), also where data is anisotropic; its length is the policy gradient's within 15 %
  (measured 5 %), and turning the noise or the advantages turns it.
- Mixture with a network: from -2.23 the expected reward rises by 0.3 (measured 0.43-0.46), and with
  the wrong sign it falls by 0.3 (0.55-0.63).
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowloom.generator import flow_grpo
from flowloom.generator.config import FDFOConfig, FlowGRPOConfig
from flowloom.generator.fdfo import FDFO
from flowloom.generator.flow_grpo import FlowGRPO
from flowloom.generator.pairs import centred
from flowloom.generator.velocity import GaussianFlow, MixtureFlow

SHAPE, D, T = (1, 4, 4), 16, 20
TIMES = [1 - step / T for step in range(T)] + [0.0]
PAIRS = FDFOConfig(churn=0.0025, min_rms=1e-6, kl_coef=0.0)
GROUPS = FlowGRPOConfig(group_size=8)
ISOTROPIC = torch.full(SHAPE, 0.25)
ANISOTROPIC = torch.logspace(-1.5, 0.5, D).reshape(SHAPE)
SLOPE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


class BiasedFlow:
    """A Gaussian's exact velocity plus one bias per step: the smallest policy there is."""

    shape, device = SHAPE, torch.device("cpu")

    def __init__(self, variance):
        mean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
        self.exact = GaussianFlow(mean, variance)
        self.bias_TCHW = torch.zeros(T, *SHAPE, requires_grad=True)

    def velocity(self, x_BCHW, t_B, prompts):
        steps = ((1 - t_B) * T).round().long()
        return self.exact.velocity(x_BCHW, t_B, prompts) + self.bias_TCHW[steps]


def roll_out(method, policy, num_prompts, seed):
    """Paths, and the linear reward of their pictures."""
    seeds = range(seed * 10_000, seed * 10_000 + num_prompts)
    paths = method.roll_out(policy, [""] * num_prompts, seeds)
    return paths, (paths.images_BCHW * SLOPE).flatten(1).sum(1)


def step_of(method, policy, paths, advantages_B):
    """-dL/dbias over all units: a step of gradient descent, without its size."""
    units = method.units(advantages_B, np.random.default_rng(0))
    loss, _ = method.loss(policy, paths, advantages_B, units, len(units))
    return -torch.autograd.grad(loss, policy.bias_TCHW)[0]


def step_in(method, policy, num_prompts, seed):
    paths, rewards_B = roll_out(method, policy, num_prompts, seed)
    return step_of(method, policy, paths, method.advantages(rewards_B))


def true_gradient(policy, scale=0.0):
    """dE[R]/dbias through the sampler with noise of this scale.

    Every step is affine and the reward linear, so noise that is 0 gives it exactly.
    """
    x = torch.randn(2, *SHAPE)
    for index, (t, s) in enumerate(itertools.pairwise(TIMES)):
        sigma = flow_grpo.noise_level(t, s, scale) if index < T - 1 else 0.0
        v = policy.velocity(x, torch.full((2,), t), ["", ""])
        x, _ = flow_grpo.sde_step(x, v, t, s, sigma)
    reward = (x * SLOPE).flatten(1).sum(1).mean()
    return torch.autograd.grad(reward, policy.bias_TCHW)[0]


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def share(a, b):
    """How many times b the part of a along b is."""
    return float((a * b).sum() / b.square().sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fdfo_follows_the_true_gradient(seed):
    policy = BiasedFlow(ISOTROPIC)
    step, truth = step_in(FDFO(PAIRS, TIMES), policy, 1_000, seed), true_gradient(policy)
    assert cosine(step, truth) >= 0.94
    assert cosine(step.sum(0), truth.sum(0)) >= 0.97


@pytest.mark.parametrize("churn", [0.0025, 0.025])
def test_fdfo_step_has_its_length(churn):
    method = FDFO(dataclasses.replace(PAIRS, churn=churn), TIMES)
    step = step_in(method, BiasedFlow(ISOTROPIC), 1_000, seed=0)
    assert share(step.sum(0), SLOPE) == pytest.approx(-2 / D, rel=0.15)


def test_fdfo_signs():
    policy, method = BiasedFlow(ISOTROPIC), FDFO(PAIRS, TIMES)
    paths, rewards_B = roll_out(method, policy, 1_000, seed=0)
    turned = dataclasses.replace(paths, d_BCHW=-paths.d_BCHW)
    dR_B, truth = method.advantages(rewards_B), true_gradient(policy)
    step = step_of(method, policy, paths, dR_B)
    assert cosine(step_of(method, policy, turned, dR_B), truth) <= -0.94
    assert cosine(step_of(method, policy, paths, -dR_B), truth) <= -0.94
    torch.testing.assert_close(step_of(method, policy, turned, -dR_B), step)


def test_fdfo_does_not_know_the_order_of_a_pair():
    policy, method = BiasedFlow(ISOTROPIC), FDFO(PAIRS, TIMES)
    paths, rewards_B = roll_out(method, policy, 50, seed=0)

    def swapped(values, axis=0):
        return values.unflatten(axis, (-1, 2)).flip(axis + 1).flatten(axis, axis + 1)

    visited = dataclasses.replace(
        paths.visited,
        states_TBCHW=swapped(paths.visited.states_TBCHW, 1),
        velocities_TBCHW=swapped(paths.visited.velocities_TBCHW, 1),
        images_BCHW=swapped(paths.visited.images_BCHW),
    )
    other = dataclasses.replace(
        paths,
        images_BCHW=swapped(paths.images_BCHW),
        visited=visited,
        d_BCHW=swapped(paths.d_BCHW),
        rms_B=swapped(paths.rms_B),
    )
    step = step_of(method, policy, paths, method.advantages(rewards_B))
    same = step_of(method, policy, other, method.advantages(swapped(rewards_B)))
    assert float(step.abs().max()) > 1e-4
    torch.testing.assert_close(same, step, rtol=1e-4, atol=1e-7)


def test_fdfo_is_preconditioned_where_data_is_anisotropic():
    policy, method = BiasedFlow(ANISOTROPIC), FDFO(PAIRS, TIMES)
    step = step_in(method, policy, 4_000, seed=0)
    # The directions are those of other pairs than the step's own.
    others, _ = roll_out(method, policy, 4_000, seed=1)
    units_BD = F.normalize(centred(others.images_BCHW).flatten(1), dim=1)
    preconditioned = units_BD.T @ (units_BD @ SLOPE.flatten()) / len(units_BD)
    assert cosine(-step.sum(0), preconditioned) >= 0.98
    assert share(-step.sum(0).flatten(), preconditioned) == pytest.approx(2, rel=0.05)
    assert cosine(step, true_gradient(policy)) >= 0.8
    assert cosine(step.sum(0), true_gradient(policy).sum(0)) <= 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flow_grpo_follows_the_true_gradient(seed):
    policy = BiasedFlow(ISOTROPIC)
    step, truth = step_in(FlowGRPO(GROUPS, TIMES), policy, 250, seed), true_gradient(policy)
    assert cosine(step, truth) >= 0.75
    assert cosine(step.sum(0), truth.sum(0)) >= 0.97


def test_flow_grpo_is_not_preconditioned():
    policy = BiasedFlow(ANISOTROPIC)
    step = step_in(FlowGRPO(GROUPS, TIMES), policy, 250, seed=0)
    assert cosine(step.sum(0), true_gradient(policy).sum(0)) >= 0.97


def test_flow_grpo_step_has_its_length():
    """(G - 1) / G of the policy gradient, over D elements and the noisy steps."""
    policy, config = BiasedFlow(ISOTROPIC), dataclasses.replace(GROUPS, divide_by=None)
    step = step_in(FlowGRPO(config, TIMES), policy, 500, seed=0)
    truth = true_gradient(policy, config.noise_level)
    assert share(step[:-1], truth[:-1]) == pytest.approx(7 / 8 / (D * (T - 1)), rel=0.15)


def test_flow_grpo_signs():
    policy, method = BiasedFlow(ISOTROPIC), FlowGRPO(GROUPS, TIMES)
    paths, rewards_B = roll_out(method, policy, 250, seed=0)
    turned = dataclasses.replace(paths, noise_SBCHW=-paths.noise_SBCHW)
    advantages_B, truth = method.advantages(rewards_B), true_gradient(policy)
    assert cosine(step_of(method, policy, turned, advantages_B), truth) <= -0.75
    assert cosine(step_of(method, policy, paths, -advantages_B), truth) <= -0.75


POINT = (2, 1, 1)
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
VARIANCES = torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.4, 0.1]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
GOAL = torch.tensor([1.0, 1.5]).reshape(POINT)


def mixture():
    return MixtureFlow(MEANS.reshape(3, *POINT), VARIANCES.reshape(3, *POINT), WEIGHTS)


def test_velocity_of_a_mixture_is_that_of_its_score():
    """E[eps | x_t] = -t score and x_t = (1 - t) x0 + t eps, so v = -(x + t score) / (1 - t)."""
    x_BD, t_B = torch.randn(64, 2, requires_grad=True), torch.rand(64) * 0.9 + 0.05
    keep = (1 - t_B)[:, None, None]
    spread = (keep**2 * VARIANCES + t_B[:, None, None] ** 2).sqrt()
    components = Independent(Normal(keep * MEANS, spread), 1)
    density = MixtureSameFamily(Categorical(WEIGHTS.expand(64, 3)), components)
    score = torch.autograd.grad(density.log_prob(x_BD).sum(), x_BD)[0]
    expected = -(x_BD + t_B[:, None] * score) / (1 - t_B)[:, None]
    got = mixture().velocity(x_BD.detach().reshape(-1, *POINT), t_B, [""] * 64)
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_mixture_of_one_is_the_gaussian():
    x, t = torch.randn(8, *SHAPE), torch.rand(8) * 0.9 + 0.1
    mean = torch.randn(SHAPE)
    one = MixtureFlow(mean[None], ANISOTROPIC[None], torch.ones(1))
    expected = GaussianFlow(mean, ANISOTROPIC).velocity(x, t, [""] * 8)
    torch.testing.assert_close(one.velocity(x, t, [""] * 8), expected)


class NetworkFlow:
    """The mixture's exact velocity plus a small network of x and t that starts at 0."""

    shape, device = POINT, torch.device("cpu")

    def __init__(self):
        self.exact = mixture()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.network[2].weight)
        nn.init.zeros_(self.network[2].bias)

    def velocity(self, x_BCHW, t_B, prompts):
        inputs = torch.cat([x_BCHW.flatten(1), t_B[:, None]], 1)
        return self.exact.velocity(x_BCHW, t_B, prompts) + self.network(inputs).reshape(
            x_BCHW.shape
        )


def closeness(images_BCHW):
    return -(images_BCHW - GOAL).flatten(1).norm(dim=1)


@torch.no_grad()
def expected_reward(policy):
    x = torch.randn(512, *POINT, generator=torch.Generator().manual_seed(1))
    for t, s in itertools.pairwise(TIMES):
        x = x - (t - s) * policy.velocity(x, torch.full((512,), t), [""] * 512)
    return float(closeness(x).mean())


def tuned(method, num_prompts, sign, num_epochs=8, num_updates=2):
    """The expected reward after tuning the network."""
    policy = NetworkFlow()
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=3e-3)
    for epoch in range(num_epochs):
        seeds = range(epoch * num_prompts, (epoch + 1) * num_prompts)
        paths = method.roll_out(policy, [""] * num_prompts, seeds)
        advantages_B = sign * method.advantages(closeness(paths.images_BCHW))
        units = method.units(advantages_B, np.random.default_rng(epoch))
        for part in np.array_split(units, num_updates):
            loss, _ = method.loss(policy, paths, advantages_B, part, len(part))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return expected_reward(policy)


@pytest.mark.parametrize(
    ("method", "num_prompts"),
    [
        (FDFO(FDFOConfig(churn=0.025, kl_coef=0.0, trust=0.3), TIMES), 64),
        (FlowGRPO(dataclasses.replace(GROUPS, clip=0.2), TIMES), 16),
    ],
    ids=["fdfo", "flow_grpo"],
)
def test_a_network_on_a_mixture_is_tuned(method, num_prompts):
    base = expected_reward(NetworkFlow())
    assert tuned(method, num_prompts, 1) >= base + 0.3
    assert tuned(method, num_prompts, -1) <= base - 0.3
