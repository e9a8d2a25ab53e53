"""The gates of a member: the product of two logistic regressions on facts, in one solve.

Facts pinned here:
- At the weights found, the slope of the penalised cross entropy is 0, as autograd sees it on the
  dense matrix, and no weights nearby are better; a render that counts twice weighs as much as two.
- Scores that are a product of two gates are told from those that are not: the fit finds them.
- A member without a network predicts the product of its gates, by hand: rows and words once, files
  by share, a word that no train row had not at all; its share of the network moves one gate only.
- The logit of both gates is that of the product of their chances, also where these are 0 or 1.
- A new file's facts are the means of those it resembles.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowloom.reward.config import GatesConfig, NetworkConfig
from flowloom.reward.features import Features, fact_key, word_key
from flowloom.reward.gates import Facts, Gates, fit, inherited, of_words, sigmoid
from flowloom.reward.member import logit_of_both
from flowloom.reward.network import Batch, Network

NUM_WORDS = 5
CONFIG = GatesConfig(row=0.5, word=0.25, file_word=1.0, extra_word=2.0, file_row=4.0)
EXTRA = 5
BARE = GatesConfig(row=None, word=None, extra_word=None, file_row=None)
SORTS = [field.name for field in dataclasses.fields(GatesConfig)]
TOLERANCE, SLOPE = 5e-3, 0.02


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
        file_is_base_F=np.array(files) != EXTRA,
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
    assert penalties[fact_key(EXTRA, word_key(0))] == 2.0
    assert penalties[fact_key(3, 3)] == 4.0
    bare = Facts.of(IDS_PL, prompt_of_R, FLOWS, flow_of_R, BARE)
    assert set((bare.keys_C - word_key(0)) // fact_key(0, 0) - 1) == {2, 3}


def loss_of(facts, scores_R, count_R, weights_C, biases):
    """The objective, written out with torch in float64."""
    x_RC, suits = (
        torch.from_numpy(facts.values_RC.toarray()),
        torch.from_numpy(of_words(facts.keys_C)),
    )
    suits_R = x_RC[:, suits] @ weights_C[suits] + biases[0]
    works_R = x_RC[:, ~suits] @ weights_C[~suits] + biases[1]
    chance_R = suits_R.sigmoid() * works_R.sigmoid()
    target_R, count_R = torch.from_numpy(scores_R), torch.from_numpy(count_R)
    ridge = (torch.from_numpy(facts.penalties_C) * weights_C**2).sum() / 2
    return F.binary_cross_entropy(chance_R, target_R, count_R, reduction="sum") + ridge


def test_weights_minimise_the_penalised_cross_entropy(renders):
    prompt_of_R, flow_of_R, scores_R = renders
    facts = Facts.of(IDS_PL, prompt_of_R, FLOWS, flow_of_R, CONFIG)
    count_R = np.random.default_rng(1).integers(3, size=150).astype(float)
    found = fit(facts, scores_R, count_R)
    weights_C = torch.from_numpy(found.weights_C).requires_grad_(True)
    biases = torch.tensor([found.suits, found.works], dtype=torch.float64, requires_grad=True)
    loss = loss_of(facts, scores_R, count_R, weights_C, biases)
    loss.backward()
    for slope in (weights_C.grad, biases.grad):
        assert slope is not None
        assert slope.abs().max() < SLOPE
    assert weights_C.abs().max() > 0.1
    steps = np.random.default_rng(2).normal(size=(20, len(found.weights_C)))
    for step in torch.from_numpy(steps):
        moved = loss_of(facts, scores_R, count_R, weights_C + 0.1 * step, biases)
        assert moved > loss
    twice = np.repeat(np.arange(150), count_R.astype(int))
    again = Facts.of(IDS_PL, prompt_of_R[twice], FLOWS, flow_of_R[twice], CONFIG)
    repeated = fit(again, scores_R[twice], np.ones(len(twice)))
    np.testing.assert_allclose(repeated.weights_C, found.weights_C, atol=TOLERANCE)


def test_the_fit_finds_a_product_of_gates():
    rng = np.random.default_rng(3)
    prompt_of_R, flow_of_R = rng.integers(3, size=3000), rng.integers(4, size=3000)
    config = GatesConfig(**dict.fromkeys(SORTS, 0.01))
    facts = Facts.of(IDS_PL, prompt_of_R, FLOWS, flow_of_R, config)
    suits_C = of_words(facts.keys_C)
    truth_C = rng.normal(size=len(suits_C))
    halves = [suits_C, ~suits_C]
    gates = [facts.values_RC @ np.where(half_C, truth_C, 0) for half_C in halves]
    chance_R = sigmoid(gates[0] + 1) * sigmoid(gates[1] + 1)
    found = fit(facts, chance_R, np.ones(len(chance_R)))
    again = [
        facts.values_RC @ np.where(half_C, found.weights_C, 0) for half_C in (suits_C, ~suits_C)
    ]
    predicted_R = sigmoid(again[0] + found.suits) * sigmoid(again[1] + found.works)
    np.testing.assert_allclose(predicted_R, chance_R, atol=0.01)
    assert chance_R.std() > 0.1


def test_a_member_multiplies_its_gates():
    rng = np.random.default_rng(2)
    everything = sorted(set().union(*(known(p, f) for p in range(3) for f in range(4))))
    # Some facts were never seen: they have no weight.
    keys = np.array([key for key in everything if key % 5], np.int64)
    gates = Gates(keys, rng.normal(size=len(keys)), 0.3, -0.2)
    weight = dict(zip(keys.tolist(), gates.weights_C, strict=True))
    network = Network(NetworkConfig(width=16), NUM_WORDS, 6, len(keys)).eval()
    network.set_gates(gates)
    network.units = torch.tensor([-1.0, 3.0, 0.5, 2.0])
    prompts = [0, 1, 2, 1]
    for share, deep in ((0.0, 5.0), (0.25, 5.0)):
        network.share = torch.tensor(share)
        torch.nn.init.constant_(network.out.bias, deep)
        found = network(IDS_PL, torch.tensor(prompts), Batch.of(FLOWS)).detach().numpy()
        for prompt, number, value in zip(prompts, range(4), found, strict=True):
            suits, works = 0.3, -0.2
            for key, amount in known(prompt, number).items():
                part = amount * weight.get(key, 0.0)
                suits, works = (suits + part, works) if of_words(key) else (suits, works + part)
            works = (1 - share) * works + share * deep
            chance = sigmoid(np.array(suits)) * sigmoid(np.array(works))
            assert value == pytest.approx((-1 + 4 * chance - 0.5) / 2, abs=1e-5)
    assert network.gates.suits == pytest.approx(0.3)
    np.testing.assert_allclose(network.gates.weights_C, gates.weights_C, rtol=1e-6)


def test_the_logit_of_both_gates():
    suits_B = torch.tensor([0.5, -3.0, 40.0, -200.0, 40.0], dtype=torch.float64)
    works_B = torch.tensor([1.0, 2.0, 0.3, 50.0, 45.0], dtype=torch.float64)
    found = logit_of_both(suits_B, works_B)
    chance_B = suits_B[:3].sigmoid() * works_B[:3].sigmoid()
    torch.testing.assert_close(found[:3], torch.logit(chance_B), rtol=1e-9, atol=0)
    # A closed gate is all that counts; two open ones are as open as the less open one, nearly.
    assert found[3].item() == pytest.approx(-200)
    assert found[4].item() == pytest.approx(40 - np.log1p(np.exp(-5)))


def test_a_new_file_inherits_means():
    keys = [
        2,
        3,
        fact_key(2, 2),
        fact_key(2, word_key(1)),
        fact_key(3, 3),
        fact_key(3, word_key(1)),
    ]
    gates = Gates(np.array(keys, np.int64), np.array([1.0, 3, 2, 5, 4, 7]), 0.5, 0.7)
    found = inherited(gates, {9: [2, 3]})
    assert (found.suits, found.works) == (0.5, 0.7)
    weight = dict(zip(found.keys_C.tolist(), found.weights_C.tolist(), strict=True))
    assert weight[9] == 2.0
    assert weight[fact_key(9, word_key(1))] == 6.0
    assert weight[fact_key(9, 9)] == 3.0
    assert [weight[key] for key in keys] == [1.0, 3, 2, 5, 4, 7]
