"""The closed-form part of a member: which file suits which word.

Facts pinned here:
- The weights are those of ridge regression, as numpy solves it on the dense matrix.
- Files loaded through the same input share its weight; loading one twice counts once.
- A network with a fitted wide part adds exactly the sum of its weights, by hand.
"""

import numpy as np
import pytest
import torch

from flowloom.reward.config import NetworkConfig
from flowloom.reward.features import Features
from flowloom.reward.network import Batch, Network
from flowloom.reward.wide import fit_wide

NUM_ROWS, NUM_WORDS = 6, 5
TOLERANCE = 1e-4


def flow(files, shares):
    none = np.zeros(0, np.int64)
    return Features(
        rows_E=np.array([1], np.int64),
        nodes_E=np.array([0]),
        sources_L=none,
        targets_L=none,
        num_nodes=1,
        file_rows_F=np.array(files, np.int64),
        file_shares_F=np.array(shares, np.float32),
    )


FLOWS = [flow([2], [1.0]), flow([3], [1.0]), flow([2, 3], [0.5, 0.5]), flow([2, 5], [1.0, 1.0])]
IDS_PL = torch.tensor([[1, 2, 0], [3, 3, 4], [2, 4, 0]])


def dense(prompt_of_R, flow_of_R):
    """One row per render: shares at (file row, word), word 0 being in every prompt."""
    x = np.zeros((len(prompt_of_R), NUM_ROWS, NUM_WORDS))
    for row, (prompt, number) in enumerate(zip(prompt_of_R, flow_of_R, strict=True)):
        features = FLOWS[number]
        for file, share in zip(features.file_rows_F, features.file_shares_F, strict=True):
            x[row, file, list({0, *IDS_PL[prompt].tolist()})] = share
    return x.reshape(len(prompt_of_R), -1)


@pytest.mark.parametrize("penalty", [0.5, 8.0])
def test_weights_are_those_of_ridge_regression(penalty):
    rng = np.random.default_rng(0)
    prompt_of_R, flow_of_R = rng.integers(3, size=200), rng.integers(4, size=200)
    y = rng.normal(size=200)
    found = fit_wide(
        IDS_PL, prompt_of_R, FLOWS, flow_of_R, torch.tensor(y), (NUM_ROWS, NUM_WORDS), penalty
    )
    x = dense(prompt_of_R, flow_of_R)
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    np.testing.assert_allclose(found.numpy().ravel(), expected, atol=TOLERANCE)
    assert np.abs(expected).max() > 0.05
    assert not found[[0, 1, 4]].any()


def test_network_adds_its_wide_weights():
    torch.manual_seed(0)
    network = Network(NetworkConfig(width=16), NUM_WORDS, NUM_ROWS).eval()
    prompt_of_B, batch = torch.tensor([0, 1, 2, 1]), Batch.of(FLOWS)
    # The head starts at zero, and so does the wide part.
    assert not network(IDS_PL, prompt_of_B, batch).any()
    network.wide.copy_(torch.randn(NUM_ROWS, NUM_WORDS))
    expected = dense(prompt_of_B.tolist(), range(4)) @ network.wide.double().numpy().ravel()
    found = network(IDS_PL, prompt_of_B, batch)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=TOLERANCE)
