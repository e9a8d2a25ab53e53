"""FDFO as a method, on a tiny random checkpoint.

Facts pinned here:
- A prompt's pictures are a function of its seed, whatever batch they are drawn in.
- Permuting the branches of every noise leaves the update the same, for 2 branches and for 3.
- Losses of ten optimiser steps stay what they are (golden).
- Loss and logged values by hand, unit by unit: what moved too far either way counts as clipped.
- With `pull_frac` the late steps count in the penalty alone.
- With `keep_frac` the noises of the largest gaps are trained on; with `train_frac` that share; both
  are rounded up, and a gap is that of the row furthest from the mean, better or worse.
- Passes and parts of any size add up; a step is no longer than the clip of its gradient; the
  learning rate by hand.
- Guided velocities are as by hand; those of the base do not move with the weights, nor do kept
  texts outlive an optimiser step.
"""

import dataclasses

import numpy as np
import pytest
import torch

from flowloom.generator import tune
from flowloom.generator.adapters import Adapter
from flowloom.generator.config import FDFOConfig, PromptsConfig, TuneGeneratorConfig
from flowloom.generator.fdfo import FDFO
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Part, Share
from flowloom.generator.velocity import ShapesFlow, Untuned
from flowloom.processes import Processes
from flowloom.shapes import prompts as language
from tests.generator.test_flow_grpo import TinyFlow
from tests.generator.tiny import tiny_model

REL_GOLDEN = 1e-3
TIMES = [1.0, 0.7, 0.4, 0.0]
CONFIG = TuneGeneratorConfig(num_minibatches=2, warmup_steps=0)


def tuned_flow(guidance=None):
    return ShapesFlow(tiny_model().requires_grad_(True), guidance, base=tiny_model())


def part_of(method, flow, num_prompts=4):
    prompts = draw_prompts(PromptsConfig(), "train", num_prompts, (0, 0))
    return Part(range(num_prompts), method.roll_out(flow, prompts, range(num_prompts)))


def step(config, method, flow, optimizer, part, rewards_B, epoch=0):
    advantages_B = method.advantages(rewards_B)
    units_U2 = method.units(advantages_B, np.random.default_rng(epoch))
    share = Share(Processes(), len(part.prompts), method.num_branches)
    return tune.update(
        config, method, flow, optimizer, share, [part], advantages_B, units_U2, epoch
    )


def weights_of(flow):
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def test_pictures_do_not_depend_on_the_batch():
    method, flow = FDFO(FDFOConfig(), TIMES), tuned_flow(2.0)
    prompts = draw_prompts(PromptsConfig(), "train", 6, (0, 0))
    together = method.roll_out(flow, prompts, range(6))
    apart = method.roll_out(flow, prompts[2:], range(2, 6))
    assert torch.equal(together.images_BCHW[4:], apart.images_BCHW)
    assert together.prompts_B[4:] == apart.prompts_B


@pytest.mark.parametrize("num_branches", [2, 3])
def test_order_of_the_branches_does_not_matter(num_branches):
    order = torch.arange(4 * num_branches).view(4, -1).roll(1, 1).flatten()
    weights = []
    for permute in (False, True):
        method, flow = FDFO(FDFOConfig(num_branches=num_branches), TIMES), tuned_flow()
        part = part_of(method, flow)
        rewards_B = part.paths.images_BCHW.flatten(1).mean(1)
        if permute:
            paths, visited = part.paths, part.paths.visited
            visited = dataclasses.replace(
                visited,
                states_TBCHW=visited.states_TBCHW[:, order],
                velocities_TBCHW=visited.velocities_TBCHW[:, order],
                images_BCHW=visited.images_BCHW[order],
            )
            paths = dataclasses.replace(
                paths, visited=visited, d_BCHW=paths.d_BCHW[order], rms_B=paths.rms_B[order]
            )
            part, rewards_B = dataclasses.replace(part, paths=paths), rewards_B[order]
        # Plain SGD: Adam's first step would hide a wrong size and blow up rounding where a gradient
        # is 0.
        optimizer = torch.optim.SGD(flow.parameters())
        step(dataclasses.replace(CONFIG, lr=1.0), method, flow, optimizer, part, rewards_B)
        weights.append(weights_of(flow))
    assert float((weights[0] - weights_of(tuned_flow())).abs().max()) > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-6)


def test_losses(golden):
    config = dataclasses.replace(CONFIG, num_minibatches=5, lr=1e-3)
    rows = []
    for num_branches in (2, 4):
        flow = tuned_flow(guidance=2.0)
        method = FDFO(FDFOConfig(num_branches=num_branches), TIMES)
        optimizer = torch.optim.AdamW(flow.parameters())
        for epoch in range(2):
            part = part_of(method, flow)
            rewards_B = part.paths.images_BCHW.flatten(1).mean(1)
            rows.append(step(config, method, flow, optimizer, part, rewards_B, epoch))
    golden("fdfo.json", rows, rel=REL_GOLDEN)


def test_shares_of_what_is_trained_on():
    rewards_B = torch.tensor([0.0, 0.1, 0.0, 0.9, 0.5, 0.0, 0.2, 0.2])
    method = FDFO(FDFOConfig(keep_frac=0.5, train_frac=0.5), TIMES)
    units_U2 = method.units(method.advantages(rewards_B), np.random.default_rng(0))
    assert units_U2.shape == (3, 2)
    assert set(units_U2[:, 0].tolist()) <= {1, 2}
    whole = FDFO(FDFOConfig(), TIMES).units(method.advantages(rewards_B), np.random.default_rng(0))
    assert sorted(map(tuple, whole.tolist())) == [(p, t) for p in range(4) for t in range(3)]
    # Half of three noises are two; two fifths of their six units are three.
    method = FDFO(FDFOConfig(keep_frac=0.5, train_frac=0.4), TIMES)
    odd_U2 = method.units(method.advantages(rewards_B[:6]), np.random.default_rng(0))
    assert odd_U2.shape == (3, 2)
    assert set(odd_U2[:, 0].tolist()) == {1, 2}


def test_a_gap_is_that_of_the_row_furthest_from_the_mean():
    method = FDFO(FDFOConfig(num_branches=4, keep_frac=0.3), TIMES)
    # The largest of the nearest rows, of the best rows, and of all.
    advantages_P4 = [[-0.2, -0.2, 0.2, 0.2], [0.45, -0.45, 0, 0], [-0.5, 0.1, 0.2, 0.2]]
    units_U2 = method.units(torch.tensor(advantages_P4).flatten(), np.random.default_rng(0))
    assert set(units_U2[:, 0].tolist()) == {2}


@pytest.mark.parametrize(("num_branches", "pull_frac"), [(2, 1.0), (3, 1.0), (2, 2 / 3)])
def test_loss_by_hand(num_branches, pull_frac):
    config = FDFOConfig(
        num_branches=num_branches, pull_frac=pull_frac, kl_coef=0.7, trust=0.02, churn=0.3
    )
    method, K = FDFO(config, TIMES), num_branches
    paths = method.roll_out(TinyFlow(), ["a", "b", "c"], range(3))
    advantages_B = method.advantages(paths.images_BCHW.flatten(1).sum(1))
    units_U2 = np.array([[2, 0], [0, 1], [1, 2], [2, 1], [1, 0]])
    loss, logged = method.loss(TinyFlow(scale=1.02), paths, advantages_B, units_U2, 6)
    sums = dict.fromkeys(("surrogate", "drift", "clipped", "pair_rms", "pair_gap"), 0.0)
    sides = set()
    for noise, step in units_U2.tolist():
        images_KCHW = paths.images_BCHW[noise * K : noise * K + K]
        for row, image in enumerate(images_KCHW, noise * K):
            dx, dR = image - images_KCHW.mean(0), float(advantages_B[row])
            d, rms = dx / (dx.square().mean() + config.min_rms**2), float(dx.square().mean().sqrt())
            c = config.trust / ((rms + 1e-6) * dx.numel() ** 0.5)
            v = paths.visited.velocities_TBCHW[step, row]
            rho = float((d.square().mean() - (0.02 * v + d).square().mean()).exp())
            if pull_frac == 1 or step < 2:
                sums["surrogate"] += -dR * rho + abs(dR) / (2 * c) * (rho - 1) ** 2
            # The tuned number is 1.02, the base's is 1.
            sums["drift"] += float((0.02 * v).square().mean())
            sums["clipped"] += abs(rho - 1) > c
            sums["pair_rms"] += rms
            sums["pair_gap"] += 2 * abs(dR)
            sides.add((rho - 1 > c) - (rho - 1 < -c))
    assert sides == {-1, 0, 1}
    means = {f"train/{key}": value / (6 * K) for key, value in sums.items()}
    assert {key: float(value) for key, value in logged.items()} == pytest.approx(means, rel=1e-4)
    total = means["train/surrogate"] + 0.7 * means["train/drift"]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


def test_gradient_that_is_not_finite_names_the_step():
    method, flow = FDFO(FDFOConfig(), TIMES), tuned_flow()
    part = part_of(method, flow)
    rewards_B = torch.rand(8)
    rewards_B[0] = torch.inf
    with pytest.raises(FloatingPointError, match="epoch 7, step 0"):
        step(CONFIG, method, flow, torch.optim.AdamW(flow.parameters()), part, rewards_B, 7)


def test_fewer_units_than_minibatches_are_refused():
    method, flow = FDFO(FDFOConfig(), TIMES), tuned_flow()
    config, part = dataclasses.replace(CONFIG, num_minibatches=13), part_of(method, flow)
    with pytest.raises(ValueError, match=r"^num_minibatches: got 13, expected at most the 12"):
        step(config, method, flow, torch.optim.AdamW(flow.parameters()), part, torch.rand(8))


def test_passes_and_parts_add_up():
    weights, means = [], []
    for units_per_pass, num_parts in ((None, 1), (2, 1), (None, 2)):
        config = dataclasses.replace(CONFIG, units_per_pass=units_per_pass, lr=1.0)
        method, flow = FDFO(FDFOConfig(), TIMES), tuned_flow()
        prompts, size = draw_prompts(PromptsConfig(), "train", 4, (0, 0)), 4 // num_parts
        parts = [
            Part(
                range(k, k + size), method.roll_out(flow, prompts[k : k + size], range(k, k + size))
            )
            for k in range(0, 4, size)
        ]
        rewards_B = torch.cat([part.paths.images_BCHW for part in parts]).flatten(1).mean(1)
        advantages_B = method.advantages(rewards_B)
        units_U2 = method.units(advantages_B, np.random.default_rng(0))
        optimizer, share = torch.optim.SGD(flow.parameters()), Share(Processes(), 4, 2)
        means.append(
            tune.update(config, method, flow, optimizer, share, parts, advantages_B, units_U2, 0)
        )
        weights.append(weights_of(flow))
    for k in (1, 2):
        torch.testing.assert_close(weights[0], weights[k], rtol=0, atol=2e-6)
        assert means[k] == pytest.approx(means[0], rel=1e-4, abs=1e-6)


def test_a_step_is_no_longer_than_the_clip():
    config = dataclasses.replace(
        CONFIG, num_minibatches=1, lr=1.0, lr_schedule="constant", grad_clip=0.01
    )
    method, flow = FDFO(FDFOConfig(), TIMES), tuned_flow()
    part, before = part_of(method, flow), weights_of(flow)
    rewards_B = 100 * part.paths.images_BCHW.flatten(1).mean(1)
    logged = step(config, method, flow, torch.optim.SGD(flow.parameters()), part, rewards_B)
    assert logged["train/grad_norm"] > 0.1
    assert float((weights_of(flow) - before).norm()) == pytest.approx(0.01, rel=1e-2)


def test_learning_rate_by_hand():
    config = TuneGeneratorConfig(num_epochs=2, num_minibatches=2, warmup_steps=1)
    assert [tune.rate(config, step) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    config = dataclasses.replace(config, lr_schedule="constant", warmup_steps=3)
    assert [tune.rate(config, step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def states():
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([0.9, 0.5, 0.2])
    return x, t, ["a red circle", "two stars", "a red circle"]


def test_guided_velocity_by_hand():
    model, (x, t, prompts) = tiny_model(), states()
    cond = model.encode_text([language.tokenize(text) for text in prompts])
    empty = model.encode_text([language.tokenize("")] * 3)
    v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
    torch.testing.assert_close(ShapesFlow(model).velocity(x, t, prompts), v)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            guided = ShapesFlow(model, 2.5).velocity(x, t, prompts)
        torch.testing.assert_close(guided, v_empty + 2.5 * (v - v_empty), rtol=1e-4, atol=1e-5)


def test_kept_texts_are_each_prompts_own():
    x, t, prompts = states()
    flow, others = ShapesFlow(tiny_model()), [prompts[1], "a star", prompts[0]]
    with torch.no_grad():
        flow.velocity(x, t, prompts)
        kept = flow.velocity(x, t, others)
        fresh = ShapesFlow(tiny_model()).velocity(x, t, others)
    torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_base_stays_and_kept_texts_do_not(lora):
    model, (x, t, prompts) = tiny_model().requires_grad_(True), states()
    adapter = Adapter(model, lora, 0) if lora else None
    flow = ShapesFlow(model, base=None if lora else tiny_model(), adapter=adapter)
    with torch.inference_mode():
        before = flow.velocity(x, t, prompts)
    torch.testing.assert_close(flow.base_velocity(x, t, prompts), before, rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        flow.velocity(x, t, prompts).sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = flow.velocity(x, t, prompts)
    fresh = flow.velocity(x, t, prompts)
    assert float((after - before).abs().max()) > 1e-2
    torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-5)
    for kept in (flow.base_velocity(x, t, prompts), Untuned(flow).velocity(x, t, prompts)):
        torch.testing.assert_close(kept, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_branches": 1}, "num_branches"),
        ({"churn": 0.0}, "churn"),
        ({"keep_frac": 0.0}, "keep_frac"),
        ({"pull_frac": 1.1}, "pull_frac"),
        ({"kl_coef": -1.0}, "kl_coef"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        FDFOConfig(**change)
