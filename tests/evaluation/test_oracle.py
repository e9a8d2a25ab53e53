"""Facts pinned: the winner of the choosing half is scored on seeds it has not seen, so on pure
noise the oracle gains nothing; a better workflow wins; rounds spend seeds as told; share of the
gain and coverage by hand."""

import numpy as np
import pytest

from flowloom.evaluation.frame import Choice
from flowloom.evaluation.oracle import frequent_by_kind, race, race_for_all
from flowloom.evaluation.statistics import coverage, share_of_gain
from tests.render.tiny import flow

ROUNDS = ((2, 4), (4, 2), (8, 1))


class World:
    """Scores of candidates 0, 1, ... on every prompt: a mean by (prompt, candidate), and noise."""

    def __init__(self, means_PC, noise, num_seeds=16, seed=0):
        rng = np.random.default_rng(seed)
        self.scores = means_PC[..., None] + noise * rng.normal(size=(*means_PC.shape, num_seeds))
        self.asked = []

    def __call__(self, pairs, first, end):
        self.asked.append((len(pairs), first, end))
        return np.array([self.scores[p, c, first:end] for p, c in pairs])


def test_luck_does_not_count():
    world = World(np.zeros((400, 12)), 1.0)
    winners = race([range(12)] * 400, world, ROUNDS)
    pairs = list(enumerate(winners))
    chosen, scored = world(pairs, 0, 8).mean(), world(pairs, 8, 16).mean()
    # The mean over 400 prompts x 8 seeds has a standard error of .018.
    assert abs(scored) < 0.06
    assert chosen > 0.3
    fixed = race_for_all(range(12), 400, world, ((2, 3), (8, 1)))
    assert abs(world.scores[:, fixed, 8:].mean()) < 0.06


def test_the_better_one_wins():
    means = np.zeros((30, 12))
    best = np.arange(30) % 12
    means[np.arange(30), best] = 5.0
    means[:, 3] += 1.0
    world = World(means, 0.5)
    assert race([range(12)] * 30, world, ROUNDS) == best.tolist()
    assert race_for_all(range(12), 30, world, ((2, 3), (8, 1))) == 3


def test_rounds_spend_seeds_as_told():
    world = World(np.zeros((2, 6)), 1.0)
    race([range(6), range(3)], world, ROUNDS)
    # All with 2 seeds; 4 and 3 with 2 more; 2 each with 4 more: none of the scoring half.
    assert world.asked == [(9, 0, 2), (7, 2, 4), (4, 4, 8)]


def test_sums_carry_over_rounds():
    # Candidate 1 is behind in the last round alone, and ahead over all eight seeds.
    scores = np.zeros((1, 2, 8))
    scores[0, 1, :4] = 1.0
    scores[0, 0, 4:] = 0.9
    world = World(np.zeros((1, 2)), 0.0)
    world.scores = scores
    assert race([[0, 1]], world, ((4, 2), (8, 1))) == [1]


def test_workflows_of_a_kind_by_how_often_they_are_designed():
    flows = [flow(steps=steps) for steps in (4, 6, 8)]
    choices = [Choice(f, f.template_fingerprint(), 0.5, (0.0, 1.0), 20) for f in flows]
    a, b, c = choices
    kinds = ["two", "one", "two"]
    found = frequent_by_kind({"x": [a, c, b], "y": [b, c, b]}, kinds, 1)
    assert found == {"two": [b], "one": [c]}


def test_share_of_gain_by_hand():
    fixed, oracle = np.array([0.2, 0.4]), np.array([0.6, 0.6])
    # Gains .4 and .2; the policy has .3 and -.1 of them: .2 / .6.
    found = share_of_gain(np.array([0.5, 0.3]), fixed, oracle, num_resamples=200)
    assert found.mean == pytest.approx(1 / 3)
    # Resamples: both prompts, the first alone .75, the second alone -.5.
    assert (found.low, found.high) == pytest.approx((-0.5, 0.75))
    assert share_of_gain(fixed, fixed, oracle, num_resamples=50).mean == 0.0
    assert share_of_gain(oracle, fixed, oracle, num_resamples=50).low == 1.0
    with pytest.raises(ValueError, match="expected > 0"):
        share_of_gain(fixed, oracle, fixed)


def test_coverage_by_hand():
    scores = np.array([[0.1, 0.5, 0.9], [0.2, 0.3, 0.4]])
    # Within [.1, .5]: two of three, ends included; within [.25, .35]: one of three.
    assert coverage(scores, np.array([0.1, 0.25]), np.array([0.5, 0.35])) == pytest.approx(0.5)
