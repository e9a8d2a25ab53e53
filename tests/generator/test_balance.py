"""Several rewards in units of their own differences.

Facts pinned here:
- Balanced rewards and scales over three batches by hand: running rms of the differences from a
  prompt's mean, the weights' shares, the size of the total.
- In one batch an easy and a hard term of equal weight pull alike; a term that never differs adds
  nothing.
- A balance that takes over another's state goes on as that one would.
"""

import numpy as np
import pytest
import torch

from flowloom.generator.balance import Balance

WEIGHTS = [1.0, 0.3]


def batches():
    rng = np.random.default_rng(0)
    for size in (1.0, 3.0, 0.5):
        terms_BJ = rng.normal(size=(6, 2)) * [size, 0.01 / size]
        yield terms_BJ @ WEIGHTS + 0.1, terms_BJ


def test_three_batches_by_hand():
    balance, rows = Balance(WEIGHTS, 4.0), []
    for total_B, terms_BJ in batches():
        found = balance(torch.from_numpy(total_B), torch.from_numpy(terms_BJ), 3)
        columns = np.column_stack([total_B, terms_BJ])
        apart = columns - np.repeat([columns[:3].mean(0), columns[3:].mean(0)], 3, axis=0)
        rows.append(np.square(apart).mean(0))
        # Weights of the mean over epochs: 3/4 to the power of their age, divided by their sum.
        ages = 0.75 ** np.arange(len(rows))[::-1]
        total, *scales = np.sqrt(ages @ rows / ages.sum())
        expected = total * (
            terms_BJ[:, 0] / 1.3 / scales[0] + terms_BJ[:, 1] * 0.3 / 1.3 / scales[1]
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        assert list(balance.scales(["a", "b"]).values()) == pytest.approx(scales)


def test_an_easy_and_a_hard_term_pull_alike():
    easy = torch.tensor([1.0, -1.0, 1.0, -1.0])
    hard = torch.tensor([-0.01, 0.01, 0.03, 0.01])
    total = 0.5 * easy + 0.5 * hard
    rewards = Balance([0.5, 0.5], 4.0)(total, torch.stack([easy, hard], 1), 2)
    differences = (rewards[0::2] - rewards[1::2]) / 2
    size = float(((total[0::2] - total[1::2]) / 2).square().mean().sqrt())
    expected = size * torch.tensor([0.5 * 1 - 0.5, 0.5 * 1 + 0.5])
    torch.testing.assert_close(differences, expected, rtol=1e-5, atol=1e-6)
    constant = Balance([0.5, 0.5], 4.0)(total, torch.stack([easy, torch.ones(4)], 1), 2)
    torch.testing.assert_close(constant, 0.5 * size * easy, rtol=1e-5, atol=1e-6)


def test_state_comes_back():
    first, other = Balance(WEIGHTS, 4.0), Balance(WEIGHTS, 4.0)
    batch, _, last = [tuple(map(torch.from_numpy, some)) for some in batches()]
    first(*batch, 3)
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(*last, 3), first(*last, 3))
    assert not torch.equal(other(*last, 3), Balance(WEIGHTS, 4.0)(*last, 3))
