"""What a network computes on its way: which modules tell it, and how far it is from another's."""

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import isolate_activations
from lightning_easier.measure.features import (
    FeatureDistance,
    Features,
    common_features,
    distance,
    places_of_features,
)
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.zoo import CifarResNet


class Residual(nn.Module):
    """A block that holds its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.outer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.outer(self.act(self.inner(value)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), Residual(), Residual(), nn.Linear(4, 2)).double().eval()
    )


def test_blocks_and_what_is_outside_of_them_are_the_places() -> None:
    model = network()
    places = places_of_features(find_blocks(model), list(isolate_activations(model)))
    assert set(places) == {"1", "2", "3"}


def test_a_strided_block_tells_by_its_activations() -> None:
    model = CifarResNet(8).eval()
    places = places_of_features(find_blocks(model), list(isolate_activations(model)))
    assert "layer1.0" in places
    assert "layer2.0.relu2" in places
    assert "layer1.0.relu2" not in places


def test_the_distance_is_a_share_of_the_variance() -> None:
    wanted = {"a": torch.tensor([[0.0], [2.0]]), "b": torch.tensor([[5.0], [5.0]]), "only here": torch.ones(1)}
    found = {"a": torch.tensor([[1.0], [1.0]]), "b": torch.tensor([[5.0], [7.0]])}
    assert float(distance(found, wanted)) == pytest.approx((1.0 + 2.0) / 2)  # the second does not vary: as it is
    assert float(distance(wanted, wanted)) == 0


def test_values_are_those_of_the_moment_they_were_returned() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)).eval()
    x = torch.randn(5, 3)
    with Features(model, ["0"]) as features, torch.no_grad():
        model(x)
        assert torch.equal(features.values["0"], model[0](x))
    assert not features.values
    assert not model[0]._forward_hooks


def test_what_is_called_again_or_has_another_shape_or_is_another_activation_is_not_compared() -> None:
    dense, changed = network(), network()
    places = places_of_features(find_blocks(dense), list(isolate_activations(dense)))
    isolate_activations(changed)
    x = (torch.randn(6, 3, dtype=torch.float64),)
    assert common_features(changed, dense, places, x) == ["1", "2", "3"]
    changed.set_submodule("1", nn.Identity())  # linear: it returns what is before it
    changed.set_submodule("2", nn.Identity())  # a block that has gone: the next reads what it leaves
    assert common_features(changed, dense, places, x) == ["2", "3"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, value: Tensor) -> Tensor:
            return self.act(self.act(value) - 1)

    assert common_features(Twice(), Twice(), ["act"], (torch.randn(2, 3),)) == []


def test_of_many_features_some_are_compared_with_the_last_among_them() -> None:
    model = nn.Sequential(*[nn.ReLU() for _ in range(50)])
    names = [str(number) for number in range(50)]
    common = common_features(model, model, names, (torch.randn(2, 3),))
    assert len(common) == 16
    assert common[-1] == "49"
    assert len(set(common)) == 16


def test_the_gradient_is_that_of_the_changed_network_alone() -> None:
    dense, changed = network(), network()
    isolate_activations(dense)
    isolate_activations(changed)
    with torch.no_grad():
        changed[0].weight.mul_(1.1)
    x = torch.randn(8, 3, dtype=torch.float64)
    with FeatureDistance(changed, dense, ["1", "2", "3"]) as between:
        loss = between.of((x,))
        loss.backward()
    assert all(parameter.grad is None for parameter in dense.parameters())
    with torch.no_grad():
        parts = []
        before, now = x, x
        for place in range(5):
            before, now = dense[place](before), changed[place](now)
            if place:
                parts.append((before - now).square().mean() / before.var(correction=0))
    assert loss.item() == pytest.approx(float(torch.stack(parts).mean()), rel=1e-12)
    assert changed[0].weight.grad is not None
    assert changed[0].weight.grad.abs().sum() > 0
