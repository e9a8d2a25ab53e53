"""The statistics of calibration.

Facts pinned here:
- Conformal bounds by hand, and 90 % of new renders covered on synthetic data (0.9 +- 0.01), also
  where the noise grows with the prediction.
- Ranks with ties, rank correlations and the noise ceiling, by hand and against numpy.
"""

import numpy as np
import pytest

from flowloom.reward import calibration
from flowloom.reward.config import CalibrationConfig


def test_conformal_bounds_by_hand():
    # n = 19, alpha = 0.2: rank ceil(20 * 0.9) = 18, the second largest and the second smallest.
    residuals = np.arange(19) / 10 - 0.9
    assert calibration.conformal_bounds(residuals[::-1], 0.2) == pytest.approx((-0.8, 0.8))
    assert calibration.conformal_bounds(residuals[:9], 0.05) == (-1.0, 1.0)


def synthetic(rng, num_cells, num_renders=4):
    predicted_C = rng.normal(size=num_cells)
    truth_C = 0.45 + 0.15 * predicted_C + rng.normal(size=num_cells) * 0.05
    cell_of_R = np.repeat(np.arange(num_cells), num_renders)
    # Noise grows with the prediction.
    sd_R = 0.03 + 0.1 / (1 + np.exp(-3 * predicted_C[cell_of_R]))
    return predicted_C, cell_of_R, truth_C[cell_of_R] + rng.normal(size=len(cell_of_R)) * sd_R


def test_coverage_is_what_was_asked_for():
    config = CalibrationConfig(coverage=0.9, num_bins=4)
    rng = np.random.default_rng(0)
    fitted = calibration.fit(*synthetic(rng, 4_000), config)
    assert fitted["slope"] == pytest.approx(0.15, abs=0.01)
    assert fitted["intercept"] == pytest.approx(0.45, abs=0.01)
    predicted_C, cell_of_R, scores_R = synthetic(rng, 4_000)
    low_C, high_C = calibration.interval(fitted, predicted_C)
    inside_R = (scores_R >= low_C[cell_of_R]) & (scores_R <= high_C[cell_of_R])
    for part in (predicted_C < -0.5, np.abs(predicted_C) < 0.3, predicted_C > 0.5):
        assert inside_R[part[cell_of_R]].mean() == pytest.approx(0.9, abs=0.03)
    assert inside_R.mean() == pytest.approx(0.9, abs=0.01)
    width_C = high_C - low_C
    assert width_C[predicted_C > 1].mean() > 1.5 * width_C[predicted_C < -1].mean()


def test_a_constant_prediction_gives_the_mean():
    scores_R = np.linspace(0, 1, 50)
    fitted = calibration.fit(np.zeros(50), np.arange(50), scores_R, CalibrationConfig())
    assert fitted["slope"] == 0
    assert fitted["intercept"] == pytest.approx(0.5)
    low_C, high_C = calibration.interval(fitted, np.zeros(1))
    assert low_C[0] < 0.05
    assert high_C[0] > 0.95


def test_rank_correlations():
    assert calibration.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert calibration.spearman(x, x**3) == pytest.approx(1)
    assert calibration.spearman(x, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert calibration.spearman(x, np.ones(4)) == 0
    # Prompts in opposite order overall, workflows in equal order within each.
    y = np.array([11.0, 12.0, 1.0, 2.0])
    assert calibration.spearman(x, y) < 0
    assert calibration.within_spearman(x, y, ["a", "a", "b", "b"]) == pytest.approx(1)


def test_noise_ceiling_is_the_correlation_of_the_truth():
    rng = np.random.default_rng(1)
    truth_C = rng.normal(size=20_000) * 0.2
    cell_of_R = np.repeat(np.arange(20_000), 4)
    scores_R = truth_C[cell_of_R] + rng.normal(size=80_000) * 0.3
    means_C = np.bincount(cell_of_R, scores_R) / 4
    ceiling = calibration.noise_ceiling(cell_of_R, scores_R)
    assert ceiling == pytest.approx(np.corrcoef(truth_C, means_C)[0, 1], abs=0.01)
    # One render per cell says nothing about noise.
    assert calibration.noise_ceiling(np.arange(4), np.arange(4.0)) == 0
