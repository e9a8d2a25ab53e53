"""The additive part of a member: logistic regression on facts, in one solve.

Facts pinned here:
- The weights are the minimum of the penalised cross entropy, as scipy finds it on the dense matrix;
  a render that counts twice weighs as much as two.
- A member without a network predicts the sum of its facts, by hand: rows and words once, files by
  share, a word that no train row had not at all.
- Files loaded through the same input share its weight.
- A new file's facts are the means of those it resembles.
- Scaling and adding two parts scales and adds their logits.
"""

import numpy as np
import pytest
import scipy.optimize
import torch

from flowloom.reward.additive import Additive, Facts, fit, inherited, sigmoid
from flowloom.reward.config import AdditiveConfig, NetworkConfig
from flowloom.reward.features import Features, fact_key, word_key
from flowloom.reward.network import Batch, Network

NUM_WORDS = 5
CONFIG = AdditiveConfig(row=0.5, word=0.25, file_word=1.0, file_row=4.0)
TOLERANCE = 1e-3


def flow(rows, files, shares):
    none = np.zeros(0, np.int64)
    return Features(
        rows_E=np.array(rows, np.int64),
        nodes_E=np.zeros(len(rows), np.int64),
        sources_L=none,
        targets_L=none,
        num_nodes=1,
        file_rows_F=np.array(files, np.int64),
        file_shares_F=np.array(shares, np.float32),
    )


FLOWS = [
    flow([1, 2, 2], [2], [1.0]),
    flow([1, 3], [3], [1.0]),
    flow([2, 3], [2, 3], [0.5, 0.5]),
    flow([2, 5, 1], [2, 5], [1.0, 1.0]),
]
IDS_PL = torch.tensor([[1, 2, 0], [3, 3, 4], [2, 4, 0]])


@pytest.fixture
def renders():
    rng = np.random.default_rng(0)
    return rng.integers(3, size=150), rng.integers(4, size=150), rng.random(150)


def known(prompt, number):
    """Facts of a render by key, written out."""
    words = sorted(set(IDS_PL[prompt].tolist()) - {0})
    one = FLOWS[number]
    facts = {word_key(word): 1.0 for word in words}
    facts |= dict.fromkeys(set(one.rows_E.tolist()), 1.0)
    for file, share in zip(one.file_rows_F.tolist(), one.file_shares_F.tolist(), strict=True):
        facts |= {fact_key(file, word_key(word)): share for word in (0, *words)}
        facts |= {fact_key(file, row): share for row in set(one.rows_E.tolist())}
    return facts


def test_facts_and_penalties_by_hand(renders):
    prompt_of_R, flow_of_R, _ = renders
    facts = Facts.of(IDS_PL, prompt_of_R, FLOWS, flow_of_R, CONFIG)
    for row, (prompt, number) in enumerate(zip(prompt_of_R, flow_of_R, strict=True)):
        found = facts.values_RC[row]
        keys = facts.keys_C[found.indices].tolist()
        assert dict(zip(keys, found.data, strict=True)) == known(prompt, number)
    penalties = dict(zip(facts.keys_C.tolist(), facts.penalties_C, strict=True))
    assert penalties[1] == 0.5
    assert penalties[word_key(2)] == 0.25
    assert penalties[fact_key(2, word_key(0))] == 1.0
    assert penalties[fact_key(3, 3)] == 4.0
    bare = Facts.of(
        IDS_PL, prompt_of_R, FLOWS, flow_of_R, AdditiveConfig(row=None, word=None, file_row=None)
    )
    assert (bare.keys_C >= fact_key(0, word_key(0))).all()


def test_weights_minimise_the_penalised_cross_entropy(renders):
    prompt_of_R, flow_of_R, scores_R = renders
    facts = Facts.of(IDS_PL, prompt_of_R, FLOWS, flow_of_R, CONFIG)
    count_R = np.random.default_rng(1).integers(3, size=150).astype(float)
    found = fit(facts, scores_R, count_R)
    x_RC = facts.values_RC.toarray()

    def objective(w_C):
        z_R = x_RC @ w_C + found.bias
        loss = (count_R * (np.logaddexp(0, z_R) - scores_R * z_R)).sum()
        slope_C = x_RC.T @ (count_R * (sigmoid(z_R) - scores_R)) + facts.penalties_C * w_C
        return loss + 0.5 * (facts.penalties_C * w_C**2).sum(), slope_C

    best = scipy.optimize.minimize(objective, np.zeros(x_RC.shape[1]), jac=True, tol=1e-10)
    np.testing.assert_allclose(found.weights_C, best.x, atol=TOLERANCE)
    assert np.abs(best.x).max() > 0.1
    mean = np.average(scores_R, weights=count_R)
    assert found.bias == pytest.approx(np.log(mean / (1 - mean)))
    twice = np.repeat(np.arange(150), count_R.astype(int))
    again = Facts.of(IDS_PL, prompt_of_R[twice], FLOWS, flow_of_R[twice], CONFIG)
    repeated = fit(again, scores_R[twice], np.ones(len(twice)))
    np.testing.assert_allclose(repeated.weights_C, found.weights_C, atol=TOLERANCE)


def test_a_member_adds_up_its_facts():
    rng = np.random.default_rng(2)
    everything = sorted(set().union(*(known(p, f) for p in range(3) for f in range(4))))
    # Some facts were never seen: they have no weight.
    keys = np.array([key for key in everything if key % 5], np.int64)
    additive = Additive(keys, rng.normal(size=len(keys)), 0.3)
    weight = dict(zip(keys.tolist(), additive.weights_C, strict=True))
    network = Network(NetworkConfig(width=16), NUM_WORDS, 6, len(keys)).eval()
    network.set_additive(additive)
    network.units = torch.tensor([-1.0, 3.0, 0.5, 2.0])
    prompts = [0, 1, 2, 1]
    found = network(IDS_PL, torch.tensor(prompts), Batch.of(FLOWS)).detach().numpy()
    for prompt, number, value in zip(prompts, range(4), found, strict=True):
        logit = 0.3 + sum(
            share * weight.get(key, 0.0) for key, share in known(prompt, number).items()
        )
        assert value == pytest.approx((-1 + 4 * sigmoid(np.array(logit)) - 0.5) / 2, abs=1e-5)


def test_parts_add_up():
    one = Additive(np.array([1, 4]), np.array([2.0, 1.0]), 0.5)
    other = Additive(np.array([4, 7]), np.array([3.0, -1.0]), 1.0)
    total = one.scaled(0.5).plus(other)
    assert total.keys_C.tolist() == [1, 4, 7]
    assert total.weights_C.tolist() == [1.0, 3.5, -1.0]
    assert total.bias == 1.25


def test_a_new_file_inherits_means():
    keys = [
        2,
        3,
        fact_key(2, 2),
        fact_key(2, word_key(1)),
        fact_key(3, 3),
        fact_key(3, word_key(1)),
    ]
    additive = Additive(np.array(keys, np.int64), np.array([1.0, 3, 2, 5, 4, 7]), 0.0)
    found = inherited(additive, {9: [2, 3]})
    weight = dict(zip(found.keys_C.tolist(), found.weights_C.tolist(), strict=True))
    assert weight[9] == 2.0
    assert weight[fact_key(9, word_key(1))] == 6.0
    assert weight[fact_key(9, 9)] == 3.0
    assert [weight[key] for key in keys] == [1.0, 3, 2, 5, 4, 7]
