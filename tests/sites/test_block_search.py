"""Blocks and branches are found where nothing else is missed when they are gone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier import collapse
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.linearize import bypass
from tests.sites.residual_blocks import AddsFirst, Residual, ScaledResidual, check_removals, conv, names, rows
from tests.sites.test_dataflow import Net


class _Tuple(Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y


class _SecondInput(Residual):
    """The skip is the second value that it is given."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.f(x)


class _WritesInput(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x) + self.f(x)


class _Leaky(nn.Module):
    """A value from inside a block is read by its caller."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block, self.end = inner, Residual()

    def forward(self, x: Tensor) -> Tensor:
        value, inner = self.block(x)
        return self.end(value) + inner


class _UsesFirst(_Leaky):
    def forward(self, x: Tensor) -> Tensor:
        value, _ = self.block(x)
        return self.end(value)


def test_values_that_others_read() -> None:
    assert names(_Leaky(_Tuple())) == ["end"]
    model = _UsesFirst(_Tuple())
    assert rows(model) == [("block", "identity", None, 2), ("end", "identity", None, None)]
    check_removals(model, find_blocks(model), (torch.zeros(2, 4, 6, 6),), [torch.Size((2, 4, 6, 6))])


class _Around(nn.Module):
    """The value before a block is read again after it, or the value after it is overwritten."""

    def __init__(self, block: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.after, self.other = block, after or nn.Identity(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        return torch.cat([self.after(self.block(x)), x], 1)


def test_writing_in_place() -> None:
    assert names(nn.Sequential(conv(), _WritesInput())) == ["1"]  # nothing else reads what it overwrites
    assert names(_Around(_WritesInput())) == ["block.f"]  # the branch writes nothing
    assert names(_Around(Residual(), nn.ReLU(inplace=True))) == ["block.f"]  # an identity would let it write to x
    assert names(_Around(Residual(), nn.ReLU())) == ["block"]


def test_writing_in_place_after_two_blocks() -> None:
    """The one that is left lets it write to the input of both, once the other is gone."""
    assert names(_Around(nn.Sequential(Residual(), Residual()), nn.ReLU(inplace=True))) == ["block.0.f", "block.1"]


class _CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.once = Residual(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.block(self.block(x)))


def test_what_is_called_twice_is_left_out() -> None:
    assert names(_CalledTwice()) == ["once"]


class _TwoInputs(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.left, self.right = block, conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.left(x), self.right(x))


def test_two_inputs() -> None:
    """The identity passes the first value on, so that has to be the skip."""
    assert names(_TwoInputs(AddsFirst())) == ["block"]
    assert names(_TwoInputs(_SecondInput())) == []


class _Branches(nn.Module):
    """Additions of branches, one with a norm before and dropout after, made by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.first, self.gated, self.strided, self.other = conv(), conv(), conv(stride=2), conv()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.drop(self.first(self.norm(x)))
        x = x + x * self.gated(x)  # no addition takes what it computes
        x = self.pool(x) + self.strided(x)
        return x + x + 2 * self.other(F.relu(x))


def test_branches_of_the_model_itself() -> None:
    model = _Branches()
    assert rows(model) == [("first", "zeros", None, None), ("other", "zeros", None, None)]
    check_removals(model.eval(), find_blocks(model), (torch.zeros(2, 4, 6, 6),), [torch.Size((2, 4, 3, 3))])


class _Turned(nn.Module):
    """Mixes positions: the axes are exchanged before, and after."""

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.norm, self.mix, self.other = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.other(x)
        turned = self.norm(x).transpose(*self.before)
        return x + F.relu(self.mix(turned).transpose(*self.after))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1, 2), (1, 2), True),
        ((1, 2), (2, 1), True),
        ((-1, -2), (-2, -1), True),
        ((1, 2), (0, 1), False),
        ((1, 2), (0, 2), False),
    ],
)
def test_a_branch_of_exchanged_axes(before: tuple[int, int], after: tuple[int, int], expected: bool) -> None:
    """Without it the model computes what is left of the sum."""
    model, x = nn.Sequential(nn.Linear(6, 6), _Turned(before, after), nn.Linear(6, 6)), torch.randn(6, 6, 6)
    found = [block.name for block in find_blocks(nn.Sequential(model, nn.ReLU())) if block.leaves == "zeros"]
    assert found == (["0.1.other", "0.1.mix"] if expected else ["0.1.other"])
    if expected:
        bypass(model, ["1.mix"], "zeros")
        y = model[0](x)
        torch.testing.assert_close(model(x), model[2](y + model[1].other(y)))
        torch.testing.assert_close(collapse(model, x).model(x), model(x))


class _TurnedTwice(_Turned):
    """What is added is not turned back; of sizes that are all the same it fits."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2))


def test_a_branch_whose_axes_stay_exchanged_is_none() -> None:
    assert names(nn.Sequential(nn.Linear(6, 6), _TurnedTwice((1, 2), (1, 2)))) == ["1"]


class _Unreadable(nn.Module):
    """Its forward asks for a value, so that nobody can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.branch = Residual(), conv()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum() * 0) + 1):
            x = self.block(x)
        return x + self.branch(x)


def test_blocks_inside_what_cannot_be_traced() -> None:
    """A block keeps its shape whoever calls it; what a branch is added to is not known."""
    assert names(nn.Sequential(conv(), _Unreadable())) == ["1.block"]


class Position(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(8))

    def forward(self):
        return self.values * 2


def test_a_module_that_is_called_with_nothing_is_no_block():
    net = Net(lambda m, x: m.block(1.0, x + m.position()), block=ScaledResidual(), position=Position())
    assert [block.name for block in find_blocks(net)] == ["block"]


def test_a_block_with_a_weight_that_is_read_outside_is_left_out():
    net = Net(lambda m, x: F.linear(m.block(1.0, x), m.block.f.weight), block=ScaledResidual())
    assert find_blocks(net) == []


class _Sets(Residual):
    """It leaves what it has computed where others may read it."""

    factor = 2.0

    def __init__(self):
        super().__init__(nn.Linear(8, 8))

    def forward(self, x):
        self.last = x + self.f(x)
        return self.last


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.block(x), ["block"]),
        (lambda m, x: m.block(x) * m.block.last, ["block.f"]),  # the branch in it may go still
        (lambda m, x: m.block(x * m.block.factor), ["block.f"]),
        (lambda m, x: m.block(x * m.block.f.in_features), []),
    ],
)
def test_what_another_forward_looks_into_is_left_out(forward, expected):
    """That may be an attribute that the block itself sets while it runs."""
    net = Net(forward, block=_Sets())
    assert names(net) == expected  # the attribute is not there yet
    net(torch.randn(3, 8))
    assert names(net) == expected
    for block in find_blocks(net):
        bypass(net, [block.name], block.leaves)
        net(torch.randn(3, 8))
    if not expected:
        bypass(net, ["block.f"], "zeros")
        with pytest.raises(AttributeError, match="in_features"):
            net(torch.randn(3, 8))


class _Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.f(x) * len(self.f)


@pytest.mark.parametrize(
    "factor",
    [
        lambda f: f[0].in_features,
        lambda f: f[0].weight.sum(),
        len,
        lambda f: sum(layer is None for layer in f),
        lambda f: len(f[:1]),
    ],
)
def test_what_another_forward_reads_of_the_children_of_a_branch_is_left_out(factor):
    """The block itself may read them, as it goes with them."""

    def forward(net, x):
        return net.block(x) * factor(net.block.f)

    net = Net(forward, block=_Stack())
    net(torch.randn(3, 8))
    assert names(net) == []
    assert names(Net(lambda m, x: m.block(x), block=_Stack())) == ["block"]
    both = nn.Sequential(nn.Linear(8, 8), *(Net(forward, block=_Stack()) for _ in range(2)))  # only one is traced
    assert names(both) == []


def test_each_of_several_that_are_alike_is_left_out_if_it_is_looked_into():
    """Of modules that are alike, the forward of the first only is looked at."""

    def forward(net, x):
        return net.block(x) * net.block.factor

    model = nn.Sequential(nn.Linear(8, 8), *(Net(forward, block=_Sets()) for _ in range(2)))
    assert names(model) == ["1.block.f", "2.block.f"]


class _Wrapped(ScaledResidual):
    """It reads its own attributes around its forward, as layers of `transformers` do."""

    def __call__(self, *args):
        return super().__call__(*args) if self.first is False else None


def test_what_a_module_asks_itself_around_its_forward_is_nobody_elses():
    assert names(Net(lambda m, x: m.block(1.0, x), block=_Wrapped())) == ["block"]


def test_the_layer_that_torchs_encoder_asks_stays():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    net = nn.Sequential(nn.Linear(5, 8), layers)
    names = [block.name for block in find_blocks(net) if block.inside is None]
    assert "1.layers.0" not in names
    assert {"1.layers.1", "1.layers.2"} <= {*names}
    bypass(net, ["1.layers.1", "1.layers.2"])
    net.eval()(torch.randn(2, 4, 5))
