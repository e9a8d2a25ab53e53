"""Pins: schedules by hand; Euler and Heun against the closed form of a linear velocity; rows of a
batch with different schedules do not touch each other; guidance is linear."""

import math

import pytest
import torch

from flowloom.render import sampling

TOLERANCE = 1e-5


def linear(x, t, rows):
    """v = a x: a step multiplies by 1 + a dt (Euler) or 1 + a dt + (a dt)^2 / 2 (Heun)."""
    return 0.7 * x


def test_simple_schedule_is_uniform():
    assert sampling.simple_schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_shift_moves_times_toward_noise():
    assert sampling.simple_schedule(2, shift=3.0) == [1.0, 0.75, 0.0]


def test_karras_schedule_by_hand():
    times = sampling.karras_schedule(3)
    middle = ((1 + 0.05 ** (1 / 7)) / 2) ** 7
    assert times == pytest.approx([1.0, middle, 0.05, 0.0], abs=TOLERANCE)
    assert sampling.karras_schedule(1) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "denoise", "expected"), [(2, 0.5, [0.5, 0.25, 0.0]), (3, 0.0, [])]
)
def test_denoise_is_the_tail_of_a_longer_schedule(steps, denoise, expected):
    assert sampling.schedule("simple", steps, denoise) == expected


def test_unknown_scheduler_is_named():
    with pytest.raises(ValueError, match=r"scheduler: got 'beta', expected one of simple, karras"):
        sampling.schedule("beta", 4)


def test_euler_closed_form():
    x = torch.randn(2, 3, 4, 4)
    out = sampling.sample(linear, x, [[1.0, 0.6, 0.3, 0.0]] * 2, "euler")
    factor = math.prod(1 + 0.7 * dt for dt in (-0.4, -0.3, -0.3))
    torch.testing.assert_close(out, x * factor, atol=TOLERANCE, rtol=TOLERANCE)


def test_heun_closed_form_with_an_euler_end():
    x = torch.randn(2, 3, 4, 4)
    out = sampling.sample(linear, x, [[1.0, 0.6, 0.3, 0.0]] * 2, "heun")
    heun = math.prod(1 + 0.7 * dt + (0.7 * dt) ** 2 / 2 for dt in (-0.4, -0.3))
    torch.testing.assert_close(out, x * heun * (1 - 0.7 * 0.3), atol=TOLERANCE, rtol=TOLERANCE)


def test_heun_is_second_order():
    """v = 2 t has the solution x(0) = x(1) - 1; Heun is exact where t' > 0, Euler is not."""
    x = torch.zeros(1, 1, 1, 1)

    def velocity(x, t, rows):
        return 2 * t[:, None, None, None].expand_as(x)

    heun = sampling.sample(velocity, x, [[1.0, 0.5, 0.001, 0.0]], "heun")
    euler = sampling.sample(velocity, x, [[1.0, 0.5, 0.001, 0.0]], "euler")
    assert heun.item() == pytest.approx(-1.0, abs=1e-4)
    assert euler.item() == pytest.approx(-0.5 * 2 - 0.499 * 1 - 0.001 * 0.002, abs=1e-4)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_rows_with_other_schedules_leave_a_row_alone(sampler):
    x = torch.randn(3, 3, 4, 4)
    times = [[1.0, 0.5, 0.0], [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], [0.4, 0.0]]

    def velocity(x, t, rows):
        return x * t[:, None, None, None] + rows[:, None, None, None]

    together = sampling.sample(velocity, x, times, sampler)
    for row in range(3):
        alone = sampling.sample(
            lambda x, t, rows, row=row: velocity(x, t, rows + row),
            x[row : row + 1],
            [times[row]],
            sampler,
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("sampler", "expected"), [("euler", 5), ("heun", 9)])
def test_evaluations_are_counted(sampler, expected):
    calls = []

    def velocity(x, t, rows):
        calls.append(len(rows))
        return x

    sampling.sample(velocity, torch.ones(1, 1, 2, 2), [sampling.simple_schedule(5)], sampler)
    assert sum(calls) == expected == sampling.num_evaluations(sampler, 5)


def test_guidance_and_noise_by_hand():
    positive, negative = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)
    assert sampling.guide(positive, negative, torch.tensor([2.5])).item() == 6.0
    assert sampling.add_noise(positive, negative, torch.tensor([0.25])).item() == 2.5


def test_a_picture_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="not finite"):
        sampling.sample(lambda x, t, rows: x / 0, torch.ones(1, 1, 1, 1), [[1.0, 0.0]], "euler")
