"""Facts: masked probabilities sum to 1 over legal tokens and are 0 elsewhere; guidance 0 and 1 are
the reference and the tuned policy to the last bit; masking before or after mixing is the same; the
floor drops a token only beyond w = 1; the inverse cumulative never picks an illegal token."""

import math

import pytest
import torch

from flowloom.designer import guidance

ATOL = 1e-6
LEGAL = torch.tensor([[True, True, False, True], [False, True, False, False]])
REFERENCE = torch.tensor([[0.0, 1.0, 5.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
TUNED = torch.tensor([[1.0, -1.0, 9.0, 2.0], [0.0, 0.0, 0.0, 0.0]])


def test_masked_log_softmax_by_hand():
    logprobs = guidance.masked_log_softmax(torch.tensor([[0.0, math.log(3.0), 7.0]]),
                                           torch.tensor([[True, True, False]]))  # fmt: skip
    assert logprobs[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75), -math.inf])


def test_a_forced_token_has_probability_one():
    logprobs = guidance.masked_log_softmax(REFERENCE, LEGAL)
    assert logprobs[1].tolist() == [-math.inf, 0.0, -math.inf, -math.inf]


def test_entropy_by_hand_and_its_gradient_is_finite():
    logits = torch.tensor([[0.0, math.log(3.0), 7.0]], requires_grad=True)
    legal = torch.tensor([[True, True, False]])
    entropy = guidance.masked_entropy(guidance.masked_log_softmax(logits, legal))
    want = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.item() == pytest.approx(want, abs=ATOL)
    entropy.sum().backward()
    # dH/dz_v = -p_v (log p_v + H)
    grads = [-p * (math.log(p) + want) for p in (0.25, 0.75)] + [0.0]
    assert logits.grad[0].tolist() == pytest.approx(grads, abs=ATOL)


def test_kl_by_hand_and_its_gradient():
    legal = torch.tensor([[True, True, False]])
    logits = torch.tensor([[0.0, math.log(3.0), 7.0]], requires_grad=True)
    reference = guidance.masked_log_softmax(torch.zeros(1, 3), legal)
    kl = guidance.masked_kl(guidance.masked_log_softmax(logits, legal), reference)
    want = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl.item() == pytest.approx(want, abs=ATOL)
    kl.sum().backward()
    # dKL/dz_v = p_v (log (p_v / r_v) - KL)
    grads = [p * (math.log(p / 0.5) - want) for p in (0.25, 0.75)] + [0.0]
    assert logits.grad[0].tolist() == pytest.approx(grads, abs=ATOL)
    assert guidance.masked_kl(reference, reference).item() == 0.0


def test_endpoints_are_exact():
    zero = guidance.guided_log_probs(REFERENCE, TUNED, LEGAL, 0.0)
    one = guidance.guided_log_probs(REFERENCE, TUNED, LEGAL, 1.0)
    assert torch.equal(zero, guidance.masked_log_softmax(REFERENCE, LEGAL))
    assert torch.equal(one, guidance.masked_log_softmax(TUNED, LEGAL))


@pytest.mark.parametrize("weight", [0.5, 1.5, 3.0])
def test_mixing_masked_or_raw_is_the_same(weight):
    mixed = guidance.guided_log_probs(REFERENCE, TUNED, LEGAL, weight, floor=0.0)
    l0, l1 = (guidance.masked_log_softmax(z, LEGAL) for z in (REFERENCE, TUNED))
    other = guidance.masked_log_softmax((l0 + weight * (l1 - l0)).nan_to_num(), LEGAL)
    assert torch.allclose(mixed.exp(), other.exp(), atol=ATOL)


def test_extrapolation_by_hand():
    # Two legal tokens; odds 1 under the reference, e under the tuned policy: e^w when guided.
    mixed = guidance.guided_log_probs(
        torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), 2.0
    )
    assert (mixed[0, 0] - mixed[0, 1]).item() == pytest.approx(2.0, abs=ATOL)


def test_floor_drops_what_the_tuned_policy_finds_implausible():
    tuned = torch.tensor([[0.0, math.log(0.02), math.log(0.5)]])
    legal = torch.ones(1, 3, dtype=torch.bool)
    for weight, kept in ((1.0, [True] * 3), (0.5, [True] * 3), (1.5, [True, False, True])):
        mixed = guidance.guided_log_probs(torch.zeros(1, 3), tuned, legal, weight, floor=0.1)
        assert (mixed[0] > -torch.inf).tolist() == kept


def test_temperature_and_nucleus_by_hand():
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    cold = guidance.sharpen(logprobs, 0.5)
    squares = torch.tensor([0.25, 0.09, 0.04])
    assert torch.allclose(cold[0].exp(), squares / squares.sum(), atol=ATOL)
    nucleus = guidance.sharpen(logprobs, top_p=0.6)
    assert nucleus[0].exp().tolist() == pytest.approx([0.625, 0.375, 0.0], abs=ATOL)
    assert guidance.sharpen(logprobs, top_p=0.01)[0].exp().tolist() == [1.0, 0.0, 0.0]


def test_sample_inverts_the_cumulative():
    logprobs = torch.tensor([[-math.inf, math.log(0.25), -math.inf, math.log(0.75)]]).expand(4, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-24])
    assert guidance.sample(logprobs, uniform).tolist() == [1, 1, 3, 3]
