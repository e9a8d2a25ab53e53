"""Pins: every schedule against its closed form written again in numpy, and against the sigmas of
diffusers where it has the same one; the tail that `denoise` takes; KSamplerAdvanced's start and end
step; SplitSigmas; percent to sigma; what is refused."""

import numpy as np
import pytest
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from scipy import stats

from flowloom.render import schedules
from flowloom.render.schedules import schedule

CLOSED = 1e-12
FLOAT32 = 3e-7
STEPS = (1, 2, 3, 7, 20, 50)
SHIFTS = (1.0, 1.73, 3.0)


def shifted(t, s):
    """1 / t' - 1 = (1 / t - 1) / s: the odds of data fall by the shift."""
    return 1 / (1 + (1 / np.asarray(t, float) - 1) / s)


def table(s):
    return shifted(np.arange(1, 1001) / 1000, s)


def closed(name, n, s):
    """Each scheduler's definition over a whole table of sigmas, from low to high."""
    sigmas, i = table(s), np.arange(n)
    if name == "simple":
        times = sigmas[[-(1 + int(k * (len(sigmas) / n))) for k in i]]
    elif name == "normal":
        times = shifted(1 + (sigmas[0] - 1) * i / max(n - 1, 1), s)
    elif name == "sgm_uniform":
        times = shifted(1 + (sigmas[0] - 1) * i / n, s)
    elif name == "karras":
        low = shifted(0.05, s)
        times = (1 + i / max(n - 1, 1) * (low ** (1 / 7) - 1)) ** 7
    elif name == "exponential":
        times = shifted(0.05, s) ** (i / max(n - 1, 1))
    else:
        times = sigmas[np.rint(stats.beta.ppf(1 - i / n, 0.6, 0.6) * 999).astype(int)]
    return [*times, 0.0]


@pytest.mark.parametrize("name", schedules.SCHEDULERS)
def test_closed_form(name):
    for n in STEPS:
        for s in SHIFTS:
            assert schedule(name, n, shift=s) == pytest.approx(closed(name, n, s), abs=CLOSED)


@pytest.mark.parametrize("name", schedules.SCHEDULERS)
def test_first_is_noise_last_is_picture_and_times_fall(name):
    for n in (*STEPS, 999, 3000):
        times = schedule(name, n, shift=3.0)
        assert times[0] == 1.0
        assert times[-1] == 0.0
        assert (np.diff(times) < 0).all()
        assert len(times) <= n + 1
        assert len(times) == n + 1 or n > 500


def test_repeated_table_entries_are_asked_once():
    assert len(schedule("simple", 3000)) == 1001
    assert len(schedule("beta", 999)) < 900


@pytest.mark.parametrize(
    ("name", "options", "sigmas"),
    [
        ("simple", {}, lambda n: 1 - np.arange(n) / n),
        ("normal", {}, None),
        ("karras", {"use_karras_sigmas": True}, lambda n: np.linspace(1, 0.05, n)),
        ("exponential", {"use_exponential_sigmas": True}, lambda n: np.linspace(1, 0.05, n)),
    ],
)
def test_diffusers_has_the_same_sigmas(name, options, sigmas):
    for s in SHIFTS:
        oracle = FlowMatchEulerDiscreteScheduler(shift=s, **options)
        for n in (2, 10, 20):
            if sigmas is None:
                oracle.set_timesteps(n)
            else:
                oracle.set_timesteps(sigmas=sigmas(n).tolist())
            expected = oracle.sigmas.numpy()
            np.testing.assert_allclose(schedule(name, n, shift=s), expected, atol=FLOAT32)


def test_beta_of_diffusers_is_the_same_but_for_table_entries_and_the_last_point():
    """diffusers takes the quantiles of n points with both ends, and does not round to entries."""
    oracle = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    for n in (4, 10, 20):
        oracle.set_timesteps(sigmas=np.linspace(1, 0.001, n + 1).tolist())
        expected = [*oracle.sigmas[:n].tolist(), 0.0]
        assert schedule("beta", n) == pytest.approx(expected, abs=0.5e-3 + FLOAT32)


def test_by_hand():
    assert schedule("simple", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule("simple", 3) == [1.0, 0.667, 0.334, 0.0]
    assert schedule("simple", 2, shift=3.0) == [1.0, 0.75, 0.0]
    assert schedule("normal", 2) == [1.0, 0.001, 0.0]
    assert schedule("sgm_uniform", 2) == pytest.approx([1.0, 0.5005, 0.0])
    middle = ((1 + 0.05 ** (1 / 7)) / 2) ** 7
    assert schedule("karras", 3) == pytest.approx([1.0, middle, 0.05, 0.0])
    assert schedule("exponential", 3) == pytest.approx([1.0, 0.05**0.5, 0.05, 0.0])
    assert schedule("beta", 2) == pytest.approx([1.0, 0.501, 0.0], abs=1.001e-3)


@pytest.mark.parametrize("name", schedules.SCHEDULERS)
@pytest.mark.parametrize(("n", "denoise", "total"), [(5, 0.5, 10), (7, 0.3, 23), (2, 0.99, 2)])
def test_denoise_is_the_tail_of_a_longer_schedule(name, n, denoise, total):
    tail = schedule(name, n, denoise=denoise, shift=1.73)
    assert tail == schedule(name, total, shift=1.73)[-(n + 1) :]
    assert len(tail) == n + 1


def test_denoise_starts_near_its_own_time_and_0_runs_nothing():
    assert schedule("simple", 2, denoise=0.5) == [0.5, 0.25, 0.0]
    assert schedule("karras", 3, denoise=0.0) == []


def test_explicit_ranges():
    ramp = np.linspace(0.9**0.5, 0.1**0.5, 4) ** 2
    assert schedules.karras(4, 0.1, 0.9, rho=2.0) == pytest.approx([*ramp, 0.0], abs=CLOSED)
    geometric = np.geomspace(0.9, 0.1, 4)
    assert schedules.exponential(4, 0.1, 0.9) == pytest.approx([*geometric, 0.0], abs=CLOSED)
    assert schedules.karras(3, 0.1, 0.9)[0] == 0.9


def test_no_noise_above_1_and_no_zero_twice():
    assert schedules.karras(5, 0.03, 14.6) == schedules.karras(5, 0.03, 1.0)
    assert schedules.exponential(5, 0.03, 14.6) == schedules.exponential(5, 0.03)
    assert len(schedules.karras(5, 0.0)) == 5


def test_flat_beta_is_uniform():
    uniform = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedules.beta(4, 1.0, 1.0) == pytest.approx(uniform, abs=1.001e-3)
    assert schedules.beta(4, 2.0, 0.5)[1] > schedules.beta(4, 0.5, 2.0)[1] + 0.5


def test_split_parts_share_their_border():
    times = schedule("simple", 4)
    assert schedules.split(times, 1) == ([1.0, 0.75], [0.75, 0.5, 0.25, 0.0])
    assert schedules.split(times, 0) == ([1.0], times)
    assert schedules.split(times, 9) == (times, [])


@pytest.mark.parametrize(
    ("start", "end", "keep_noise", "expected"),
    [
        (0, 10000, False, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (0, 2, True, [1.0, 0.75, 0.5]),
        (0, 2, False, [1.0, 0.75, 0.0]),
        (2, 10000, True, [0.5, 0.25, 0.0]),
        (1, 3, True, [0.75, 0.5, 0.25]),
        (2, 2, True, []),
        (3, 2, False, []),
        (4, 10000, False, []),
    ],
)
def test_start_and_end_step(start, end, keep_noise, expected):
    times = schedule("simple", 4)
    assert schedules.part(times, start, end, keep_noise=keep_noise) == expected
    assert times == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_percent_to_sigma():
    assert [schedules.percent_to_sigma(p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert schedules.percent_to_sigma(0.5, shift=3.0) == pytest.approx(0.75)
    assert schedules.percent_to_sigma(1.5) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule("ddim_uniform", 4), r"scheduler: got 'ddim_uniform', expected one of"),
        (lambda: schedule("simple", 0), "steps: got 0, expected at least 1"),
        (lambda: schedule("simple", 0, denoise=0.5), "steps: got 0"),
        (lambda: schedule("normal", 4, shift=0.0), "shift: got 0.0, expected a number > 0"),
        (lambda: schedules.karras(4, 0.5, 0.1), "sigma_min: got 0.5, expected 0 <= sigma_min"),
        (lambda: schedules.karras(4, 0.1, 0.5, rho=0.0), "rho: got 0.0"),
        (lambda: schedules.exponential(4, 0.0), "sigma_min: got 0"),
        (lambda: schedules.exponential(4, float("nan")), "sigma_min: got nan"),
        (lambda: schedules.beta(4, alpha=0.0), "alpha: got 0.0, expected a number > 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
