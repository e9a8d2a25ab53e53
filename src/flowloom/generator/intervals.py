"""Intervals over prompts: percentile bootstrap of means and of ratios of means.

Prompts are the independent units; what is compared is resampled together (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 8 and 13).

Shapes: P prompts, N resamples.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its confidence interval; all NaN where nothing was left to count."""

    mean: float
    """The figure."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Prompts counted."""


_NOTHING = Interval(mean=np.nan, low=np.nan, high=np.nan, n=0)


def standard_error(values_P: np.ndarray) -> float:
    """Of the mean over prompts, NaNs left out; 0 for fewer than two."""
    values_P = values_P[~np.isnan(values_P)]
    return float(values_P.std(ddof=1) / np.sqrt(len(values_P))) if len(values_P) > 1 else 0.0


def mean_interval(values_P: np.ndarray) -> Interval:
    """Of a mean over prompts; NaNs are left out."""
    return ratio_interval(values_P, np.ones(len(values_P)))


def ratio_interval(
    ours_P: np.ndarray,
    theirs_P: np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Of mean(ours) / mean(theirs), prompts resampled in pairs.

    Args:
        ours_P: One value per prompt; a prompt where either value is NaN is left out.
        theirs_P: The same of the other side, not negative. Where their mean is 0 the ratio is
            infinite, and 1 where ours is 0 too.
        level: Confidence of the two-sided interval.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
    """
    ours_P, theirs_P = np.asarray(ours_P, float), np.asarray(theirs_P, float)
    kept_P = ~(np.isnan(ours_P) | np.isnan(theirs_P))
    ours_P, theirs_P = ours_P[kept_P], theirs_P[kept_P]
    if not len(ours_P):
        return _NOTHING
    picks_NP = np.random.default_rng(seed).integers(len(ours_P), size=(num_resamples, len(ours_P)))
    ratio_N = _ratio(ours_P[picks_NP].mean(1), theirs_P[picks_NP].mean(1))
    # Between infinite values there is nothing to interpolate.
    low, high = np.quantile(ratio_N, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    mean = float(_ratio(ours_P.mean(keepdims=True), theirs_P.mean(keepdims=True))[0])
    return Interval(mean=mean, low=float(low), high=float(high), n=len(ours_P))


def _ratio(ours_N: np.ndarray, theirs_N: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((ours_N == 0) & (theirs_N == 0), 1.0, ours_N / theirs_N)
