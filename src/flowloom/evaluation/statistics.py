"""Pure statistics of the comparison: paired bootstrap, choice by halves, rank correlation.

Shapes: P prompts, S seeds, W workflows, N resamples.
"""

from __future__ import annotations

import dataclasses
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    """The mean over prompts."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Number of prompts."""


def paired_interval(
    ours_PS: np.ndarray,
    theirs_PS: np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(ours - theirs), resampling prompts: seeds of one prompt are not independent.

    Row p and column s of both hold the same prompt and the same noise.

    Args:
        ours_PS: Scores of one policy.
        theirs_PS: Scores of the other.
        level: Confidence of the two-sided interval.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling; the result is a function of it and of the scores.

    Raises:
        ValueError: On different shapes, no prompt, or a score that is not finite.
    """
    ours_PS, theirs_PS = np.asarray(ours_PS, float), np.asarray(theirs_PS, float)
    if ours_PS.shape != theirs_PS.shape or ours_PS.ndim != 2 or not ours_PS.size:
        raise ValueError(
            f"paired_interval: got shapes {ours_PS.shape} and {theirs_PS.shape}, "
            "expected the same (prompts, seeds), not empty"
        )
    differences_P = (ours_PS - theirs_PS).mean(axis=1)
    return bootstrap_mean(differences_P, level=level, num_resamples=num_resamples, seed=seed)


def bootstrap_mean(
    values_P: np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """BCa interval of a mean (Efron 1987, "Better bootstrap confidence intervals", eq. 6.6-6.7).

    z0 is the normal quantile of the share of resampled means below the observed one (ties count
    half), a the jackknife acceleration; the ends are the resampled means' quantiles at
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z = -+z_(1+level)/2. One value, or equal values, give
    a point.

    Raises:
        ValueError: On no value or one that is not finite.
    """
    values_P = np.asarray(values_P, float)
    if values_P.ndim != 1 or not values_P.size or not np.isfinite(values_P).all():
        raise ValueError("bootstrap_mean: expected a list of finite values, not empty")
    mean = float(values_P.mean())
    deviations_P = values_P - mean
    if not np.abs(deviations_P).max() > 1e-12:
        return Interval(mean=mean, low=mean, high=mean, n=len(values_P))

    rng = np.random.default_rng(seed)
    means_N = np.empty(num_resamples)
    # In blocks: 10,000 x 300 indices at once would be 24 MB.
    for start in range(0, num_resamples, 1000):
        rows = min(1000, num_resamples - start)
        picks = rng.integers(len(values_P), size=(rows, len(values_P)))
        means_N[start : start + rows] = values_P[picks].mean(axis=1)

    below = float(np.mean(means_N < mean) + 0.5 * np.mean(means_N == mean))
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / num_resamples), 1 - 0.5 / num_resamples))
    # The jackknife's deviations are (value - mean) / (n - 1): the factor cancels below.
    acceleration = (deviations_P**3).sum() / (6 * (deviations_P**2).sum() ** 1.5)
    tail = (1 - level) / 2
    ends = []
    for z in (_NORMAL.inv_cdf(tail), _NORMAL.inv_cdf(1 - tail)):
        shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
        ends.append(float(np.quantile(means_N, _NORMAL.cdf(shifted))))
    return Interval(mean=mean, low=ends[0], high=ends[1], n=len(values_P))


def standard_error(scores_PS: np.ndarray) -> float:
    """Standard error of the mean score, prompts being the independent units; 0 for one prompt."""
    means_P = np.asarray(scores_PS, float).mean(axis=1)
    if len(means_P) < 2:
        return 0.0
    return float(means_P.std(ddof=1) / np.sqrt(len(means_P)))


def coverage(scores_PS: np.ndarray, low_P: np.ndarray, high_P: np.ndarray) -> float:
    """Share of single renders whose score lies in the interval of their prompt, ends included."""
    scores_PS = np.asarray(scores_PS, float)
    inside_PS = (scores_PS >= np.asarray(low_P)[:, None]) & (
        scores_PS <= np.asarray(high_P)[:, None]
    )
    return float(inside_PS.mean())


def share_of_gain(
    policy_P: np.ndarray,
    fixed_P: np.ndarray,
    oracle_P: np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Share of the oracle's gain over the best fixed workflow that a policy has.

    mean(policy - fixed) / mean(oracle - fixed), with a percentile interval that resamples prompts;
    0 is the fixed workflow, 1 the oracle. The ends are infinite where a resample has no gain.

    Raises:
        ValueError: The oracle gains nothing.
    """
    ours_P = np.asarray(policy_P, float) - np.asarray(fixed_P, float)
    gains_P = np.asarray(oracle_P, float) - np.asarray(fixed_P, float)
    if not gains_P.mean() > 0:
        raise ValueError(
            f"share_of_gain: got an oracle's gain of {gains_P.mean():.4f}, expected > 0"
        )
    rng = np.random.default_rng(seed)
    picks_NP = rng.integers(len(gains_P), size=(num_resamples, len(gains_P)))
    gain_N = gains_P[picks_NP].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share_N = np.where(gain_N > 0, ours_P[picks_NP].mean(axis=1) / gain_N, np.inf)
    # Between infinite values there is nothing to interpolate.
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(share_N, ends, method="inverted_cdf")
    mean = float(ours_P.mean() / gains_P.mean())
    return Interval(mean=mean, low=float(low), high=float(high), n=len(gains_P))


def choose_by_halves(scores_WS: np.ndarray) -> float:
    """Score of the best of W workflows, chosen on one half of the seeds and scored on the other.

    Both ways round, averaged. Choosing and scoring on the same renders would count luck: with pure
    noise this has the mean of one workflow, not the expected maximum (WORLD.md, section 3).

    Args:
        scores_WS: Scores of W workflows on one prompt (or a set of them) over S >= 2 seeds.

    Raises:
        ValueError: On fewer than 2 seeds.
    """
    scores_WS = np.asarray(scores_WS, float)
    if scores_WS.ndim != 2 or scores_WS.shape[1] < 2:
        raise ValueError(
            f"choose_by_halves: got shape {scores_WS.shape}, expected (workflows, >= 2)"
        )
    even_W, odd_W = scores_WS[:, 0::2].mean(axis=1), scores_WS[:, 1::2].mean(axis=1)
    return float((odd_W[even_W.argmax()] + even_W[odd_W.argmax()]) / 2)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where either side is constant."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]
