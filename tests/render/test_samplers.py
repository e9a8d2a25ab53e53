"""Pins: each sampler against an independent one on the same field (diffusers, or its steps written
out); the order at which it converges to an exact solution, or the marginal that its noise keeps;
rows of a batch do not touch each other; evaluations are counted; guidance, its rescaling, and
latents between two runs by hand.

The world: x0 ~ N(MEAN, VARIANCE) per value, where the denoised picture is known and a path from
noise z ends at MEAN + sqrt(VARIANCE) z.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteScheduler,
)

from flowloom.render import samplers
from flowloom.render.samplers import NOISY_SAMPLERS, SAMPLERS, sample
from flowloom.render.schedules import schedule

MEAN, VARIANCE = 0.3, 0.2
FLOAT32 = 3e-6
FLOAT64 = 1e-12
SCHEDULES = {
    "simple": schedule("simple", 10),
    "shifted beta": schedule("beta", 7, shift=3.0),
    "karras": schedule("karras", 12),
    "second pass": schedule("simple", 6, denoise=0.4),
}


def gaussian(x, t, rows=None):
    """E[x0 | x_t] of the world."""
    t = t[:, None, None, None]
    gain = (1 - t) * VARIANCE / ((1 - t) ** 2 * VARIANCE + t**2)
    return MEAN + gain * (x - (1 - t) * MEAN)


def marginal(t, z):
    """The state at t of the path of the probability flow that begins in noise z."""
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * VARIANCE + t**2) * z


def crooked(x, t, rows):
    """A field that is not linear, with something of the row in it."""
    return torch.tanh(1.3 * x + t[:, None, None, None] - 0.1 * rows[:, None, None, None])


def hashed_noise(shape=(3, 4, 4), dtype=torch.float32):
    def draw(row, step):
        generator = torch.Generator().manual_seed(1000 * row + step + 100)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return draw


def start(num_rows=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_rows, 3, 4, 4, generator=generator, dtype=dtype)


def drive(scheduler, x, times, noise=None):
    """Run a scheduler of diffusers on the velocity of `crooked`, with our times in place."""
    rows = torch.arange(len(x))
    # Heun's second evaluation of a step is a step of its own there.
    sigmas = [times[0], *times[1:-1], times[-1]]
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        sigmas = [times[0], *(t for t in times[1:-1] for _ in range(2)), times[-1]]
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1, dtype=torch.float32)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        scheduler.num_inference_steps = len(times) - 1
    for step, (timestep, t) in enumerate(zip(scheduler.timesteps, sigmas, strict=False)):
        v = (x - crooked(x, torch.full((len(x),), t), rows)) / t
        fresh = {} if noise is None else {"variance_noise": noise(step)}
        x = scheduler.step(v, timestep, x, **fresh).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_diffusers_gives_the_same_pictures(sampler, name, record_property):
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    oracle = {
        "euler": lambda: FlowMatchEulerDiscreteScheduler(),
        "heun": lambda: FlowMatchHeunDiscreteScheduler(),
        "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**options),
        "dpmpp_2m_sde": lambda: DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", **options
        ),
    }[sampler]()
    x, times, draw = start(), SCHEDULES[name], hashed_noise()
    ours, _ = sample(crooked, x, [times] * 2, sampler, draw)

    def noise(step):
        return torch.stack([draw(row, step) for row in range(2)])

    theirs = drive(oracle, x, times, noise if sampler in NOISY_SAMPLERS else None)
    difference = (ours - theirs).abs().max().item()
    record_property("max_difference", difference)
    assert difference < FLOAT32


def test_ancestral_step_written_out():
    """To t_down = t'^2 / t along the flow, then noise until the deviation is that of t'."""
    times, draw, rows = SCHEDULES["karras"], hashed_noise(dtype=torch.float64), torch.arange(2)
    x = start(dtype=torch.float64)
    ours, _ = sample(crooked, x, [times] * 2, "euler_ancestral", draw)
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        down = t_next * t_next / t
        x = x + (down - t) * (x - crooked(x, x.new_full((2,), t), rows)) / t
        # Odds of noise to data: added variances, data scaled to weight one.
        missing = (t_next / (1 - t_next)) ** 2 - (down / (1 - down)) ** 2
        z = torch.stack([draw(row, step) for row in range(2)])
        x = (1 - t_next) * (x / (1 - down) + math.sqrt(missing) * z)
    torch.testing.assert_close(ours, x, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    z = start(1, torch.float64)
    errors = []
    for n in (40, 80, 160):
        times = np.linspace(0.95, 0.05, n + 1).tolist()
        out, _ = sample(gaussian, marginal(0.95, z), [times], sampler)
        errors.append((out - marginal(0.05, z)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whole_run_ends_in_the_world(sampler):
    """Mean and variance of the pictures, from pure noise to t = 0."""
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(11))
    out, _ = sample(gaussian, x, [schedule("simple", 100)] * 8, sampler, hashed_noise((3, 64, 64)))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.005)
    # Euler steps are of first order: 0.01 of variance are missing at 100 of them.
    expected = VARIANCE - (0.007 if sampler.startswith("euler") else 0)
    assert out.var().item() == pytest.approx(expected, abs=0.008)


@pytest.mark.parametrize("sampler", NOISY_SAMPLERS)
@pytest.mark.parametrize("t", [0.8, 0.4, 0.1])
def test_fresh_noise_keeps_the_marginal(sampler, t):
    """Where the picture is certain, the state at t is N((1 - t) x0, t^2) after any few steps."""
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(11))
    out, _ = sample(
        lambda x, t, rows: torch.full_like(x, MEAN),
        x,
        [[1.0, 0.9, t]] * 4,
        sampler,
        hashed_noise((3, 64, 64)),
    )
    assert out.mean().item() == pytest.approx((1 - t) * MEAN, abs=0.015 * t)
    assert out.std().item() == pytest.approx(t, rel=0.015)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_to_0_is_the_denoised_picture(sampler):
    x = start()
    out, x0 = sample(crooked, x, [[1.0, 0.0]] * 2, sampler, hashed_noise())
    assert torch.equal(out, crooked(x, torch.ones(2), torch.arange(2)))
    assert torch.equal(out, x0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_of_other_lengths_leave_a_row_alone(sampler):
    times = [
        [1.0, 0.5, 0.0],
        [0.4],
        [1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
        [0.9, 0.7, 0.3],
        [],
        [0.4, 0.0],
        [1.0, 0.7, 0.1, 0.0],
        [0.8, 0.5, 0.4, 0.3],
    ]
    x, draw = start(len(times)), hashed_noise()
    given = x.clone()
    together = sample(crooked, x, times, sampler, draw)
    assert torch.equal(x, given)
    for row, ts in enumerate(times):
        alone = sample(
            lambda x, t, rows, row=row: crooked(x, t, rows + row),
            x[row : row + 1],
            [ts],
            sampler,
            lambda _, step, row=row: draw(row, step),
        )
        for ours, one in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], one, atol=FLOAT32, rtol=FLOAT32)
        if len(ts) < 2:
            assert torch.equal(together[0][row], x[row])
            assert torch.equal(together[1][row], x[row])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_handed_out_with_the_state(sampler):
    """The last denoised picture is that of the last step's first evaluation."""
    values = []

    def denoise(x, t, rows):
        values.append(crooked(x, t, rows))
        return values[-1]

    _, x0 = sample(denoise, start(1), [[1.0, 0.7, 0.3]], sampler, hashed_noise())
    assert torch.equal(x0, values[2 if sampler == "heun" else 1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_are_counted(sampler):
    asked = dict.fromkeys(range(4), 0)

    def denoise(x, t, rows):
        for row in rows.tolist():
            asked[row] += 1
        return x

    times = [schedule("simple", 5), [1.0, 0.6, 0.3], [], [0.2, 0.0]]
    sample(denoise, start(4), times, sampler, hashed_noise())
    assert list(asked.values()) == [samplers.num_evaluations(sampler, ts) for ts in times]
    assert list(asked.values()) == ([9, 4, 0, 1] if sampler == "heun" else [5, 2, 0, 1])


def test_fresh_noise_is_asked_by_row_and_step_and_only_where_there_is_some():
    calls = []

    def draw(row, step):
        calls.append((row, step))
        return torch.zeros(3, 4, 4)

    times = [[1.0, 0.5, 0.0], [1.0, 0.6, 0.3, 0.0], [0.5, 0.2]]
    for sampler in SAMPLERS:
        calls.clear()
        sample(crooked, start(3), times, sampler, draw)
        expected = {(0, 0), (1, 0), (1, 1), (2, 0)} if sampler in NOISY_SAMPLERS else set()
        assert set(calls) == expected
        assert len(calls) == len(expected)


def test_rows_come_as_one_object_while_they_run():
    seen = []

    def denoise(x, t, rows):
        seen.append(rows)
        return x

    sample(denoise, start(3), [[1.0, 0.5, 0.0], [1.0, 0.0], [1.0, 0.5, 0.2, 0.0]], "euler")
    assert [rows.tolist() for rows in seen] == [[2, 0, 1], [2, 0], [2]]
    seen.clear()
    sample(denoise, start(2), [[1.0, 0.5, 0.0]] * 2, "heun")
    assert all(rows is seen[0] for rows in seen)


def test_a_run_can_stop_and_go_on():
    """Left at t, stored as a latent, and taken up again without noise: one run."""
    x, times = start(dtype=torch.float64), schedule("simple", 8)
    whole, _ = sample(crooked, x, [times] * 2, "heun")
    half, _ = sample(crooked, x, [times[:4]] * 2, "heun")
    t_B = torch.full((2,), times[3], dtype=torch.float64)
    latent = samplers.leave(half, t_B)
    back = samplers.add_noise(latent, torch.zeros_like(latent), t_B)
    torch.testing.assert_close(back, half, atol=FLOAT64, rtol=FLOAT64)
    rest, _ = sample(crooked, back, [times[3:]] * 2, "heun")
    torch.testing.assert_close(rest, whole, atol=FLOAT64, rtol=FLOAT64)


def test_latents_by_hand():
    latent, noise = torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1)
    assert samplers.add_noise(latent, noise, torch.tensor([0.25])).item() == 2.5
    assert samplers.add_noise(latent, noise, torch.tensor([1.0])).item() == 1.0
    assert samplers.leave(latent, torch.tensor([0.25])).item() == 4.0
    assert samplers.leave(latent, torch.tensor([0.0])).item() == 3.0
    assert samplers.leave(latent, torch.tensor([1.0])).item() == 3.0


def test_guidance_by_hand():
    positive, negative = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0)
    guided = samplers.guide(positive, negative, torch.tensor([2.5, 1.0]))
    assert guided.flatten().tolist() == [6.0, 3.0]


def test_rescaled_guidance_has_the_deviation_of_the_positive_velocity():
    x, positive, negative = start(3), start(3).flip(0) * 0.5, start(3).flip(1)
    cfg_B, m_B = torch.tensor([4.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, 0.7])
    t_B = torch.tensor([0.9, 0.5, 0.2])
    guided = samplers.guide(positive, negative, cfg_B)
    rescaled = samplers.rescale_guidance(x, positive, guided, m_B)
    v, v_pos = ((x - x0) / t_B[:, None, None, None] for x0 in (rescaled, positive))
    assert v[0].std().item() == pytest.approx(v_pos[0].std().item(), rel=1e-5)
    torch.testing.assert_close(rescaled[1:], guided[1:], atol=FLOAT32, rtol=FLOAT32)
    half = samplers.rescale_guidance(x, positive, guided, torch.full((3,), 0.5))
    middle = (rescaled[0] + guided[0]) / 2
    torch.testing.assert_close(half[0], middle, atol=FLOAT32, rtol=FLOAT32)


def test_rescaling_survives_a_state_that_is_its_own_picture():
    x = start(1)
    assert torch.equal(samplers.rescale_guidance(x, x, x, torch.ones(1)), x)


def test_pictures_that_are_not_finite_are_named():
    def denoise(x, t, rows):
        return torch.where(rows[:, None, None, None] == 1, torch.nan, x)

    with pytest.raises(FloatingPointError, match=r"sampler heun: .* not finite in rows 1 of"):
        sample(denoise, start(3), [[1.0, 0.0], [1.0, 0.5, 0.0], [0.5, 0.0]], "heun")


@pytest.mark.parametrize(
    "times", [[0.5, 0.5, 0.0], [0.2, 0.5], [14.6, 1.0, 0.0], [1.0, -0.1], [float("nan"), 0.0]]
)
def test_times_that_do_not_fall_from_1_to_0_are_refused(times):
    with pytest.raises(ValueError, match=r"times of row 1: got .* expected a strict fall"):
        sample(crooked, start(), [[1.0, 0.0], times], "euler")


def test_unknown_sampler_is_named():
    with pytest.raises(ValueError, match=r"sampler_name: got 'lcm', expected one of euler, "):
        sample(crooked, start(), [[1.0, 0.0]] * 2, "lcm")
