"""FDFO's equations against closed forms.

Facts pinned here:
- Churn keeps a state on the path of its flow: (1 - s) x0 + s * unit noise, whatever gamma.
- At v = v_ref the loss gradient is (2 / (2 D)) dR d on both rows of a pair, and following it
  improves the worse picture.
- Two branches are exactly the pair: (R_i - R_j) / 2. With K > 2 a row is compared with the mean of
  the others; on Gaussian data (D = 16, linear reward, 20 steps) the step in v of 4 branches follows
  E[u u^T] grad R (cosine >= 0.97), closer to grad R than that of as many pictures in pairs.
- Permuting the branches permutes their signals and nothing else.
- A rollout is the start and the steps one after another, each with its own fresh noise; without
  times its steps are equal.
"""

import pytest
import torch
import torch.nn.functional as F

from flowloom.generator import pairs
from flowloom.generator.velocity import GaussianFlow

SHAPE = (1, 4, 4)
D = 16
T = 20


class BiasedFlow:
    """A flow plus one bias per step: the smallest policy there is."""

    def __init__(self, flow, num_steps):
        self.flow = flow
        self.bias_TCHW = torch.zeros(num_steps, *SHAPE, dtype=torch.float64, requires_grad=True)

    def velocity(self, x_BCHW, t_B, prompts):
        steps = ((1 - t_B) * len(self.bias_TCHW)).round().long()
        return self.flow.velocity(x_BCHW, t_B, prompts) + self.bias_TCHW[steps]


def fdfo_direction(policy, slope_CHW, num_noises, seed, num_branches):
    """-dL/dbias of one epoch, and the unit picture differences."""
    seeds = range(seed * 10_000, seed * 10_000 + num_noises)
    start, fresh = pairs.branch_noise(seeds, T, SHAPE, num_branches, torch.float64)
    paths = pairs.roll_out(policy, [""] * num_noises, start, fresh, 0.0025)
    rewards_B = (paths.images_BCHW * slope_CHW).flatten(1).sum(1)
    dR_B = pairs.centred(rewards_B, num_branches)
    d_BCHW, rms_B = pairs.normalised(paths.images_BCHW, num_branches, min_rms=1e-6)
    c_B = pairs.trust_clip(rms_B, D, trust=1.0)
    loss = 0
    for step, t in enumerate(paths.times_T):
        x_BCHW = paths.states_TBCHW[step]
        v = policy.velocity(x_BCHW, t.expand(len(x_BCHW)), [""] * len(x_BCHW))
        log_rho_B = pairs.log_ratio(v, paths.velocities_TBCHW[step], d_BCHW)
        loss = loss + pairs.surrogate(log_rho_B, dR_B, c_B).mean()
    (gradient,) = torch.autograd.grad(loss, policy.bias_TCHW)
    return -gradient, F.normalize(pairs.centred(paths.images_BCHW, num_branches).flatten(1), dim=1)


def true_direction(policy, slope_CHW, num_rows, seed):
    """Gradient of E[R] in the biases, through the deterministic sampler."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, *SHAPE, generator=generator, dtype=torch.float64)
    for step in range(T):
        t = x.new_full((num_rows,), 1 - step / T)
        x = x - policy.velocity(x, t, [""] * num_rows) / T
    reward = (x * slope_CHW).flatten(1).sum(1).mean()
    return torch.autograd.grad(reward, policy.bias_TCHW)[0]


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def world(variance):
    generator = torch.Generator().manual_seed(7)
    slope = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return BiasedFlow(GaussianFlow(mean, variance), T), slope


@pytest.mark.parametrize("churn", [0.0025, 0.03, 0.3])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.4, 0.35), (0.1, 0.0)])
def test_churn_keeps_the_state_on_its_path(churn, t, s):
    x0, noise, fresh = torch.randn(3, 1, *SHAPE, dtype=torch.float64)
    step = pairs.churn_step((1 - t) * x0 + t * noise, noise - x0, t, s, torch.zeros_like(x0), churn)
    kept = (step - (1 - s) * x0) / noise
    added = (
        pairs.churn_step((1 - t) * x0 + t * noise, noise - x0, t, s, fresh, churn) - step
    ) / fresh
    torch.testing.assert_close(kept**2 + added**2, torch.full_like(kept, s**2), atol=1e-12, rtol=0)


def test_churn_start_is_still_unit_noise():
    zero, one = torch.zeros(1), torch.ones(1)
    kept, added = pairs.churn_start(one, zero, 0.03), pairs.churn_start(zero, one, 0.03)
    assert float(kept) == pytest.approx(1 / 1.03)
    assert float(kept**2 + added**2) == pytest.approx(1, abs=1e-6)


def test_gradient_of_one_pair():
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    rewards = torch.tensor([0.9, 0.2], dtype=torch.float64)
    dR, (d, rms) = pairs.centred(rewards), pairs.normalised(images)
    dx = (images[0] - images[1]) / 2
    torch.testing.assert_close(dR, torch.tensor([0.35, -0.35], dtype=torch.float64))
    torch.testing.assert_close(d[0], dx / (dx.square().mean() + 1e-6))
    torch.testing.assert_close(d[1], -d[0])
    torch.testing.assert_close(rms, dx.square().mean().sqrt().expand(2))
    v_ref = torch.randn(2, *SHAPE, dtype=torch.float64)
    v = v_ref.clone().requires_grad_(True)
    c = pairs.trust_clip(rms, D, trust=1.0)
    pairs.surrogate(pairs.log_ratio(v, v_ref, d), dR, c).mean().backward()
    expected = 2 / (D * 2) * dR[:, None, None, None] * d
    torch.testing.assert_close(v.grad, expected, rtol=1e-9, atol=0)
    # Sampling adds -dt * v, so a step of -grad in v moves pictures along +grad.
    assert ((v.grad * (images[0] - images[1])).flatten(1).sum(1) > 0).all()


def test_log_ratio_is_the_difference_of_squares():
    v, v_ref, d = torch.randn(3, 5, *SHAPE, dtype=torch.float64)
    expected = (d.square() - (v - v_ref + d).square()).flatten(1).mean(1)
    torch.testing.assert_close(pairs.log_ratio(v, v_ref, d), expected, rtol=1e-9, atol=1e-12)


def test_surrogate_is_least_at_one_plus_c_times_sign():
    log_rho = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for dR, best in ((0.4, 1.2), (-0.4, 0.8)):
        losses = pairs.surrogate(log_rho, torch.full_like(log_rho, dR), torch.tensor(0.2))
        assert float(log_rho[losses.argmin()].exp()) == pytest.approx(best, abs=2e-4)


def test_trust_clip_matches_the_setting_it_was_scaled_from():
    assert float(pairs.trust_clip(torch.tensor(0.12), 768, trust=10.0)) == pytest.approx(
        3.0, rel=0.01
    )


def test_noise_of_a_pair_does_not_depend_on_the_batch():
    start, fresh = pairs.branch_noise([3, 4, 5], 2, SHAPE)
    alone, fresh_alone = pairs.branch_noise([4], 2, SHAPE)
    assert torch.equal(start[1], alone[0])
    assert torch.equal(fresh[:, 2:4], fresh_alone)
    assert not torch.equal(fresh[0, 2], fresh[0, 3])


def test_rollout_is_one_step_after_another():
    flow = GaussianFlow(torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.5))
    start, fresh = pairs.branch_noise([3, 4], 3, SHAPE, num_branches=3)
    paths = pairs.roll_out(flow, ["a", "b"], start, fresh, 0.1, [1.0, 0.8, 0.3, 0.0])
    for row in range(6):
        x = pairs.churn_start(start[row // 3], fresh[0, row], 0.1)
        for step, (t, s) in enumerate([(1.0, 0.8), (0.8, 0.3), (0.3, 0.0)]):
            torch.testing.assert_close(paths.states_TBCHW[step, row], x)
            v = flow.velocity(x[None], torch.tensor([t]), [""])[0]
            torch.testing.assert_close(paths.velocities_TBCHW[step, row], v)
            x = pairs.churn_step(x, v, t, s, fresh[min(step + 1, 2), row], 0.1)
        torch.testing.assert_close(paths.images_BCHW[row], x)
    assert paths.times_T.tolist() == pytest.approx([1.0, 0.8, 0.3])
    equal = pairs.roll_out(flow, ["a", "b"], start, fresh, 0.1)
    given = pairs.roll_out(flow, ["a", "b"], start, fresh, 0.1, [1.0, 2 / 3, 1 / 3, 0.0])
    torch.testing.assert_close(equal.images_BCHW, given.images_BCHW)
    torch.testing.assert_close(equal.times_T, given.times_T)


def test_close_pairs_fade_out():
    images = torch.stack([torch.zeros(SHAPE), torch.full(SHAPE, 1e-3)])
    near, _ = pairs.normalised(images, min_rms=0.05)
    far, _ = pairs.normalised(images * 200, min_rms=0.05)
    assert float(near.abs().max()) < 0.3
    assert float(far.abs().max()) == pytest.approx(0.1 / (0.1**2 + 0.05**2), rel=1e-4)


def test_two_branches_are_the_pair():
    values = torch.tensor([0.9, 0.2, 0.1, 0.4], dtype=torch.float64)
    expected = torch.tensor([0.35, -0.35, -0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(pairs.centred(values), expected)


def test_more_branches_leave_one_out():
    values = torch.randn(8, 3, dtype=torch.float64)
    centred = pairs.centred(values, 4)
    for row in range(8):
        others = [o for o in range(row // 4 * 4, row // 4 * 4 + 4) if o != row]
        expected = 3 / 4 * (values[row] - values[others].mean(0))
        torch.testing.assert_close(centred[row], expected)


@pytest.mark.parametrize("num_branches", [2, 3, 5])
def test_permuted_branches_permute_their_signals(num_branches):
    order = torch.arange(2 * num_branches).view(2, -1).roll(1, 1).flatten()
    images = torch.randn(2 * num_branches, *SHAPE, dtype=torch.float64)
    d, rms = pairs.normalised(images, num_branches)
    d_permuted, rms_permuted = pairs.normalised(images[order], num_branches)
    torch.testing.assert_close(d_permuted, d[order])
    torch.testing.assert_close(rms_permuted, rms[order])


def test_more_branches_point_closer_to_the_gradient():
    policy, slope = world(torch.full(SHAPE, 0.25, dtype=torch.float64))
    truth = true_direction(policy, slope, 500, 0).sum(0)
    cosines = {2: [], 4: []}
    for seed in range(4):
        for num_branches, found in cosines.items():
            step, units_BD = fdfo_direction(policy, slope, 64 // num_branches, seed, num_branches)
            found.append(cosine(step.sum(0), truth))
            if num_branches == 4:
                preconditioned = units_BD.T @ (units_BD @ slope.flatten())
                assert cosine(-step.sum(0), preconditioned) >= 0.97
    assert sum(cosines[4]) > sum(cosines[2]) + 0.1
