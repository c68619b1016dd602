"""Models whose norms are kept in float32, and all else in bfloat16: what takes the place of their blocks."""

import pytest
import torch
from torch import nn

from lightning_easier import FitChains, compress, load_pruned
from lightning_easier.collapsing.fit.block_fits import BlockProbe
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.linearize import bypass, replace_block, restore
from lightning_easier.structure.stand_in import OperatorStandIn
from tests.integration.interrupted import Small, run


class Norm(nn.Module):
    """A norm that computes in float32, and returns the dtype that it reads."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.weight.float()).to(x.dtype)


class Gated(nn.Module):
    """x + f(x), its norm first."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.up = Norm(width), nn.Linear(width, 2 * width)
        self.gate, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.sin(self.up(y)) * self.gate(y))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.Sequential(Gated(), Gated()), nn.Linear(6, 2)
        self.bfloat16()
        for block in self.blocks:
            block.norm.float()

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Trained(Small):
    def __init__(self):
        super().__init__()
        self.norm, self.layers = nn.Identity(), Net()
        with torch.no_grad():  # much of which an identity does not explain
            for block in self.layers.blocks:
                block.down.weight *= 8

    def forward(self, x):
        tokens = x[:, None] * torch.linspace(-2, 2, 16)[:, None] + x.roll(1, 1)[:, None]  # enough to fit to
        return self.layers(tokens.to(self.layers.stem.weight.dtype)).float().mean(1)


def test_an_operator_gets_the_dtype_of_the_values_in_training_and_when_it_is_loaded(tmp_path):
    pruning = {"blocks": True, "criterion": "linearity"}
    model, callback, _ = run(tmp_path, model=Trained(), method=FitChains, epochs=3, pruning=pruning)
    made = [module for module in model.modules() if isinstance(module, OperatorStandIn)]
    assert made
    assert {each.dtype for stand_in in made for each in stand_in.parameters()} == {torch.bfloat16}
    loaded = load_pruned(Trained(), callback.last_good).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)


def test_compress_puts_operators_of_the_dtype_of_the_values_in_their_places():
    batches = [torch.randn(32, 4).bfloat16() for _ in range(3)]
    result = compress(Net().eval(), batches, objective="macs", max_drift=0.9)
    assert result.report.trials
    assert result.model(batches[0]).dtype == torch.bfloat16
    assert not any("does not run" in reason for reason in result.report.reasons.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_block_and_its_operator_follow_any_cast_of_the_model(dtype):
    model = Net().eval()
    bypass(model, ["blocks.0"])
    replace_block(model, "blocks.1", nn.Linear(6, 6).bfloat16())
    assert model.blocks[1].operator.weight.dtype == torch.bfloat16
    model.to(dtype)
    assert model(torch.randn(3, 4, dtype=dtype)).dtype == dtype
    restore(model)
    assert {each.dtype for each in model.parameters()} == {dtype}


def test_an_operator_of_a_dtype_that_the_model_has_no_more_gets_that_of_the_block():
    model = Net().eval().double()
    replace_block(model, "blocks.1", nn.Linear(6, 6).bfloat16())
    assert model(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64


def test_a_place_tells_the_dtype_of_its_values_also_where_no_parameter_of_it_has_that():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.tanh(self.linear(x.float())).to(x.dtype)

    model = nn.Sequential(nn.Linear(4, 6).bfloat16(), Wide()).eval()
    ((place,), _) = fittable_blocks(model, find_blocks(model), [], [torch.randn(3, 4).bfloat16()])
    assert place.like(model).dtype == torch.bfloat16
    model.double()
    assert place.like(model).dtype == torch.float64


def test_a_block_that_changes_the_dtype_stays_and_says_why():
    class Widens(Gated):
        def forward(self, x):
            return super().forward(x).float()

    model = nn.Sequential(nn.Linear(4, 6), Widens()).bfloat16().eval()
    found = fittable_blocks(model, find_blocks(model), [], [torch.randn(3, 4).bfloat16()])
    assert found == ([], {"1": "it makes torch.float32 of torch.bfloat16"})


def test_under_autocast_an_operator_has_the_dtype_of_the_parameters():
    model = nn.Sequential(nn.Linear(4, 6), Gated(), nn.Linear(6, 2)).eval()
    probe = BlockProbe(model, find_blocks(model), [])
    probe.attach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(8, 4))
    probe.detach()
    ((place, _, _),) = probe.measured()
    assert place.like(model).dtype == torch.float32
