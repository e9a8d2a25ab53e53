"""Facts pinned: BCa agrees with scipy's; a skewed case by hand; halves do not reward luck."""

import numpy as np
import pytest

from flowloom.evaluation.statistics import (
    bootstrap_mean,
    choose_by_halves,
    paired_interval,
    spearman,
    standard_error,
)


def test_interval_agrees_with_scipy_bca():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).lognormal(sigma=1.2, size=20)
    ours = bootstrap_mean(values, num_resamples=40_000, seed=3)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    # Monte Carlo error of a 2.5 % quantile from 40,000 draws is about 0.3 % of the width.
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.01 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.01 * width)
    assert ours.mean == pytest.approx(values.mean())
    # The correction is at work: the interval of a skewed sample reaches further up than down.
    assert ours.high - ours.mean > 1.1 * (ours.mean - ours.low)


def test_coverage_of_a_known_mean():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        interval = bootstrap_mean(rng.normal(0.3, 1, 40), num_resamples=500, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 180 <= hits <= 198


def test_paired_interval_uses_prompts_not_renders():
    ours = np.array([[1.0, 0.0], [0.5, 0.5], [0.9, 0.7]])
    theirs = np.array([[0.0, 0.0], [0.25, 0.25], [0.5, 0.5]])
    interval = paired_interval(ours, theirs, seed=1)
    # Differences by prompt: .5, .25, .3.
    assert interval.mean == pytest.approx(0.35)
    assert interval.n == 3
    assert 0.25 <= interval.low < interval.mean < interval.high <= 0.5
    swapped = paired_interval(theirs, ours, seed=1)
    assert swapped.mean == pytest.approx(-interval.mean)
    assert swapped.low == pytest.approx(-interval.high, abs=0.02)


def test_same_seed_same_interval():
    values = np.random.default_rng(0).normal(size=25)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_equal_values_give_a_point():
    interval = bootstrap_mean(np.full(7, 0.1) * 3)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (np.ones((2, 2)), np.ones((2, 3))),
        (np.ones((0, 2)), np.ones((0, 2))),
        (np.array([[np.nan]]), np.ones((1, 1))),
    ],
)
def test_bad_scores_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="expected"):
        paired_interval(ours, theirs)


def test_choose_by_halves_by_hand():
    # Even seeds (0, 2) favour workflow 0, odd seeds (1, 3) workflow 1.
    scores = np.array([[0.9, 0.1, 0.7, 0.3], [0.2, 0.6, 0.2, 0.8]])
    # Chosen on even: workflow 0, odd mean .2; chosen on odd: workflow 1, even mean .2.
    assert choose_by_halves(scores) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="expected"):
        choose_by_halves(scores[:, :1])


def test_choose_by_halves_does_not_count_luck():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2000, 8, 4))
    chosen = np.mean([choose_by_halves(prompt) for prompt in noise])
    assert abs(chosen) < 0.05
    assert noise.mean(axis=2).max(axis=1).mean() > 0.6


def test_spearman_agrees_with_scipy_with_ties():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    first = rng.integers(0, 6, 50).astype(float)
    second = first + rng.normal(0, 2, 50)
    expected = scipy_stats.spearmanr(first, second).statistic
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12)
    assert spearman(first, np.ones(50)) == 0.0


def test_standard_error_by_hand():
    # Prompt means 0, 1, 2: standard deviation 1, three prompts.
    scores = np.array([[0.0, 0.0], [0.5, 1.5], [2.0, 2.0]])
    assert standard_error(scores) == pytest.approx(1 / np.sqrt(3))
    assert standard_error(scores[:1]) == 0.0
