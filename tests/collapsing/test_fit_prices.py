"""What chains and operators cost is found out once; what the user wrote is not told by its words."""

import pytest
import torch
from torch import nn

from lightning_easier.collapsing.fit import fit_prices
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.support.timing import LatencyTable

SHAPE = torch.Size((2, 6))


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_no_weights_are_copied_for_a_price_that_is_known(objective, monkeypatch):
    prices = ChainPrices(objective, LatencyTable())
    modules = {"chain": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "": nn.Linear(6, 4)}
    found = prices.of(modules, SHAPE, torch.ones(1))
    if objective == "macs":
        assert found == {"chain": 2 * 6 * (6 + 4), "": 2 * 6 * 4}
    copied, copy = [], fit_prices.deepcopy
    monkeypatch.setattr(fit_prices, "deepcopy", lambda module: copied.append(module) or copy(module))
    others = {"this": nn.Linear(6, 4), "that": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))}
    assert prices.of(others, SHAPE, torch.ones(1)) == {"this": found[""], "that": found["chain"]}
    assert not copied
    other = prices.of({"": nn.Linear(6, 4)}, torch.Size((3, 6)), torch.ones(1))[""]
    assert len(copied) == 1
    assert other != found[""]


def test_attention_does_not_say_which_axis_is_the_batch():
    prices, shape = ChainPrices("macs", LatencyTable()), torch.Size((2, 5, 6))
    layers = [nn.TransformerEncoderLayer(6, 1, 6, batch_first=is_first) for is_first in (True, False)]
    assert str(layers[0]) == str(layers[1])
    first, second = (prices.of({"": layer}, shape, torch.ones(1))[""] for layer in layers)
    assert first - second == 2 * 6 * (2 * 5**2 - 5 * 2**2)  # two products, of each word with each


def test_modules_of_the_user_are_counted_each_though_they_are_called_alike():
    class Repeated(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.linear, self.times = nn.Linear(6, 6), times

        def forward(self, x):
            for _ in range(self.times):
                x = self.linear(x)
            return x

    prices = ChainPrices("macs", LatencyTable())
    found = [prices.of({"": Repeated(times)}, SHAPE, torch.ones(1))[""] for times in (1, 2, 1)]
    assert found == [72, 144, 72]
