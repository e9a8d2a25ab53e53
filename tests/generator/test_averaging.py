"""The running mean of tuned weights.

Facts pinned here:
- The mean after some epochs is the exponential one by hand, from the base on; the weights that are
  tuned are not touched by it.
- A mean that takes over another's state goes on as that one would.
- Inside `applied` the generator draws with the mean, after it with its own weights, to the bit,
  also when what is done inside fails.
- Without a horizon nothing is kept and nothing changes.
"""

import pytest
import torch

from flowloom.generator.averaging import WeightAverage
from flowloom.generator.velocity import ShapesFlow
from flowloom.shapes.model import ShapesConfig, ShapesModel

CONFIG = ShapesConfig(width=16, depth=1, text_depth=1, num_heads=2)


def generator():
    torch.manual_seed(0)
    return ShapesFlow(ShapesModel(CONFIG).requires_grad_(True))


def shift(flow, amount):
    with torch.no_grad():
        for weight in flow.parameters():
            weight += amount


def test_the_mean_by_hand():
    flow = generator()
    base = {name: value.clone() for name, value in flow.state_dict().items()}
    average = WeightAverage(flow, 4)
    for amount in (1.0, 2.0):
        shift(flow, amount)
        average.update(flow)
    # Weights are base + 1, then base + 3: 1/4 * 3 + 3/4 * (1/4 * 1).
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, base[name] + 0.9375)
        torch.testing.assert_close(flow.state_dict()[name], base[name] + 3)


def test_the_mean_goes_on_where_it_was():
    flow = generator()
    average = WeightAverage(flow, 4)
    shift(flow, 1.0)
    average.update(flow)
    other = WeightAverage(flow, 4)
    other.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    shift(flow, 2.0)
    for each in (average, other):
        each.update(flow)
    for name, value in average.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_applied_and_taken_back():
    flow = generator()
    average = WeightAverage(flow, 4)
    shift(flow, 0.1)
    average.update(flow)
    own = {name: value.clone() for name, value in flow.state_dict().items()}

    def look():
        with average.applied(flow):
            for name, value in average.state_dict().items():
                assert torch.equal(flow.state_dict()[name], value)
                assert not torch.equal(value, own[name])
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(flow.state_dict()[name], value) for name, value in own.items())


def test_without_a_horizon():
    flow = generator()
    average = WeightAverage(flow, None)
    shift(flow, 0.1)
    average.update(flow)
    before = flow.state_dict()["patch_in.weight"].clone()
    with average.applied(flow):
        assert torch.equal(flow.state_dict()["patch_in.weight"], before)
    assert average.state_dict() == {}
