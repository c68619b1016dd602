"""Chains with fewer inner channels: chosen by what the others can't make up for, exact where nothing is lost."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import collapse, isolate_activations
from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments
from lightning_easier.collapsing.algebra.narrowing import narrowed
from lightning_easier.collapsing.fit.correcting import beginnings_of, gather_alone
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.fitting import fit_to
from lightning_easier.collapsing.fit.narrowing import NarrowableChain, narrowable
from lightning_easier.collapsing.fit.norms import NormsBefore
from lightning_easier.collapsing.fit.placing import put, replace
from lightning_easier.support.costs import count_macs
from lightning_easier.support.timing import LatencyTable
from tests.collapsing.test_collapse_fit import randomized

KINDS = ["3/4 of the channels", "1/2 of the channels", "1/4 of the channels"]


def place_in(model: nn.Module, *sites: str) -> NarrowableChain | None:
    isolate_activations(model)
    return narrowable(model, FittableChains(model, sites).around(sites))


def fits_in(model: nn.Module, batches: list[Tensor], *sites: str, dense: nn.Module | None = None):
    """What may take the place of a chain, as it is priced."""
    place = place_in(model, *sites)
    data = [(batch,) for batch in batches]
    before = None if dense is None else beginnings_of(dense, data)
    gathered = gather_alone(model, before, place, data, data[0])
    return fit_to(model, place, gathered, ChainPrices("macs", LatencyTable()))


class Linears(nn.Sequential):
    def __init__(self, width: int = 12) -> None:
        super().__init__(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))
        self.site, self.shape = ("1",), (400, 5)


class Tokens(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.shape = (40, 10, 5)


class Convolutions(nn.Sequential):
    """Operators of one kind with a norm between, and another after them where one is asked for."""

    def __init__(self, axes: int, act: nn.Module, bias: bool, norm_after: bool, **options) -> None:
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        after = [norm(3)] if norm_after else []
        first = convolution(2, 12, 3, padding=1, bias=bias)
        super().__init__(first, norm(12), act, nn.Dropout(), convolution(12, 3, 3, bias=bias, **options), *after)
        self.site, self.shape = ("2",), (24 if axes > 1 else 200, 2, *((9,), (9, 7), (5, 6, 4))[axes - 1])


class Inverted(nn.Sequential):
    """The body of an inverted residual: the depthwise convolution between keeps the same channels."""

    def __init__(self) -> None:
        depthwise = nn.Conv2d(12, 12, 3, 2, padding=1, groups=12, bias=False)
        super().__init__(
            nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(), depthwise, nn.BatchNorm2d(12), nn.SiLU(),
            nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.site, self.shape = ("2", "5"), (32, 3, 9, 7)


NETWORKS = {
    "linears": Linears,
    "tokens": Tokens,
    "1d, stride": lambda: Convolutions(1, nn.ReLU(), True, False, stride=2, padding=1),
    "2d, dilation, norm": lambda: Convolutions(2, nn.SiLU(), False, True, dilation=2, padding=2),
    "2d, same padding, no norm": lambda: Convolutions(2, nn.ReLU(), False, False, padding="same"),
    "2d, uneven stride, slopes": lambda: Convolutions(2, nn.PReLU(12), True, True, stride=(2, 1), padding=(0, 1)),
    "3d, one slope": lambda: Convolutions(3, nn.PReLU(), False, True, padding=1),
    "inverted residual": Inverted,
}


def alike(model: nn.Module) -> None:
    """Make the second half of the channels, in an order of their own, the same as the first."""
    order = torch.tensor([3, 9, 1, 7, 0, 5])
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and len(value) == 12:
                others = torch.tensor([each for each in range(12) if each not in order])
                value.data[others] = value.data[order]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_channels_that_others_make_up_for_go_and_the_function_stays(name):
    torch.manual_seed(0)
    model = randomized(NETWORKS[name]()).double()
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    alike(model)
    batches = [torch.randn(model.shape).double() for _ in range(2)]
    wanted, dense = model(batches[0]), deepcopy(model)
    found = fits_in(model, batches, *model.site)
    assert [choice.fit.kind for choice in found] == KINDS
    _, half, quarter = found
    assert 1 - half.fit.explained < 1e-9
    assert quarter.fit.explained < 0.9999
    before = count_macs(dense, (batches[0],))
    assert half.price_before == before
    assert half.price_after == before / 2
    old = replace(model, half, (batches[0],))
    assert len(model[0].weight) == 6
    for module in model:
        if hasattr(module, "in_channels"):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    torch.testing.assert_close(model(batches[0]), wanted, rtol=1e-6, atol=1e-6)
    assert [module.training for module in model.modules()] == [False] * len([*model.modules()])
    result = collapse(model, (batches[0],), objective="macs").model
    torch.testing.assert_close(result(batches[0]), wanted, rtol=1e-6, atol=1e-6)
    assert count_macs(result, (batches[0],)) == before / 2
    put(model, old)
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_channels_that_are_dead_go_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    model[0].weight[[0, 2]], model[0].bias[[0, 2]] = 0.0, -1.0  # never above zero
    model[0].weight[5], model[0].bias[5] = 0.0, 2.0  # constant: a matter of the bias
    model[2].weight[:, 6] = 0.0  # not read
    batches = [torch.randn(500, 5).double()]
    wanted = model(batches[0])
    half = fits_in(model, batches, "1")[1]
    assert half.fit.channels.tolist() == [1, 3, 4, 7]
    replace(model, half, batches)
    torch.testing.assert_close(model(batches[0]), wanted, rtol=1e-6, atol=1e-6)


def test_a_share_that_is_all_channels_or_as_many_as_another_is_no_step():
    found = fits_in(Linears(2).eval(), [torch.randn(100, 5)], "1")
    assert [(choice.fit.kind, choice.fit.channels.shape) for choice in found] == [("1/2 of the channels", (1,))]


@torch.no_grad()
def test_where_the_offset_goes():
    """Into the bias of an operator that has one, into the norm after one that has none, into a new bias elsewhere."""
    for bias, norm_after in ((True, True), (False, True), (False, False)):
        torch.manual_seed(0)
        model = randomized(Convolutions(2, nn.ReLU(), bias, norm_after, padding=0)).double()
        batches = [torch.randn(model.shape).double()]
        choice = fits_in(model, batches, "2")[2]
        layers = [*model]
        whole = nn.Sequential(*layers[:5])(batches[0])
        weight, offset = choice.fit.weight, choice.fit.bias
        inner = nn.Sequential(*layers[:3])(batches[0])[:, choice.fit.channels]
        fitted = nn.functional.conv2d(inner, weight, offset)
        assert (fitted - whole).square().sum() < 0.9 * (whole - whole.mean((0, 2, 3), True)).square().sum()
        wanted = model[5](fitted) if norm_after else fitted
        replace(model, choice, batches)
        assert (model[4].bias is None) == (norm_after and not bias)
        torch.testing.assert_close(model(batches[0]), wanted)
        if norm_after:  # training begins with the same function
            now = nn.Sequential(*[*model][:5])(batches[0])
            torch.testing.assert_close(model[5].running_mean, now.mean((0, 2, 3)), rtol=0.05, atol=0.05)
            torch.testing.assert_close(model[5].running_var, now.var((0, 2, 3)), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("geometry", [Geometry(16), Geometry(8, (3, 3), (2, 1), (1, 0), dilation=(1, 2))])
@torch.no_grad()
def test_the_choice_is_better_than_by_magnitude_and_by_chance(geometry):
    """Channels that go together: what one of them lacks another has."""
    torch.manual_seed(0)
    width, axes = geometry.channels, len(geometry.kernel)
    mixing = torch.randn(width, width // 2).double() @ torch.randn(width // 2, width).double()
    mixing += 0.3 * torch.randn(width, width).double()
    x = torch.randn(24 if axes else 2000, *[9] * axes, width).double() @ mixing
    weight = torch.randn(5, width, *geometry.kernel).double()
    if axes:
        x = x.movedim(-1, 1)
        target = nn.functional.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation)
    else:
        target = x @ weight.T
    moments = Moments.of(geometry, 5, torch.device("cpu"))
    moments.add(x, target, 10**6)
    half = width // 2
    (found,) = narrowed(moments, [half], torch.ones(5).double())

    def explained(channels: Tensor) -> float:
        """Of the best solution on some channels."""
        taps = geometry.taps
        columns = (channels[:, None] * taps + torch.arange(taps)).flatten()
        columns = torch.cat([columns, torch.tensor([width * taps])])
        sums = moments.fitted.part(columns)
        return moments.held_out.part(columns).explained(torch.linalg.solve(sums.gram, sums.cross))

    by_magnitude = weight.movedim(1, 0).flatten(1).square().sum(1).topk(half).indices
    by_chance = [torch.randperm(width)[:half] for _ in range(20)]
    assert found.explained == pytest.approx(explained(found.channels), abs=1e-3)  # of a small ridge
    assert found.explained > explained(by_magnitude)
    chances = torch.tensor([explained(channels) for channels in by_chance])
    assert 1 - found.explained < 0.5 * (1 - chances.mean())


@torch.no_grad()
def test_of_two_alike_one_stays_where_several_go_at_a_time():
    torch.manual_seed(0)
    x = torch.randn(3000, 64).double()
    x = torch.cat([x, x], 1)
    moments = Moments.of(Geometry(128), 4, torch.device("cpu"))
    moments.add(x, x @ torch.randn(128, 4).double(), 10**6)
    (found,) = narrowed(moments, [64], torch.ones(4).double())
    assert sorted(channel % 64 for channel in found.channels.tolist()) == list(range(64))
    assert found.explained > 1 - 1e-9


@torch.no_grad()
def test_an_output_that_the_norm_after_it_scales_down_counts_less():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)).double().eval()
    model[2].weight[0, 2:], model[2].weight[1, :2] = 0.0, 0.0
    kept = []
    for scale in ([1.0, 1e-3], [1e-3, 1.0]):
        model[3].weight.copy_(torch.tensor(scale))
        kept.append(fits_in(model, [torch.randn(64, 2, 9).double()], "1")[1].fit.channels.tolist())
    assert kept == [[0, 1], [2, 3]]


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        return self.second(hidden) + hidden


def test_what_something_else_reads_is_in_no_chain():
    model = TwoReaders().eval()
    isolate_activations(model)
    assert FittableChains(model, ["act"]).in_rows() == []


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3)],
        [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)],
        [nn.Conv2d(4, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 3)],
    ],
)
def test_what_can_not_be_narrowed_is_left_out(layers):
    model = nn.Sequential(*layers).eval()
    (site,) = isolate_activations(model)
    assert narrowable(model, FittableChains(model, [site]).around([site])) is None


def test_two_activations_in_a_row_are_narrowed_one_by_one():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    assert place_in(model, "1", "3") is None
    assert place_in(model, "1").operators == ("0", "2")
    assert place_in(model, "3").operators == ("2", "4")


@torch.no_grad()
def test_the_targets_correct_what_was_changed_before():
    torch.manual_seed(0)
    dense = randomized(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3))).double()
    isolate_activations(dense)
    model = deepcopy(dense)
    model[0].bias += 0.5
    batches = [torch.randn(600, 5).double() for _ in range(2)]
    errors = []
    for reference in (None, dense):
        other = deepcopy(model)
        replace(other, fits_in(other, batches, "2", dense=reference)[0], (batches[0],))
        errors.append((other(batches[0]) - dense(batches[0])).square().mean())
    assert errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_a_norm_that_lost_channels_is_matched_by_those_that_are_left():
    torch.manual_seed(0)
    dense = randomized(Convolutions(2, nn.ReLU(), True, True, padding=1)).double()
    model = deepcopy(dense)
    batches = [torch.randn(model.shape).double()]
    choice = fits_in(model, batches, "2")[1]
    replace(model, choice, batches)
    model[0].weight *= 0.5
    inner, other = deepcopy(model), deepcopy(model)
    norms = NormsBefore(dense, [(batches[0],)])
    norms.match(inner, {"1": choice.fit.channels})
    norms.match(other)  # not known which are left: that one stays
    wanted = dense[1](dense[0](batches[0]))[:, choice.fit.channels]
    now = inner[1](inner[0](batches[0]))
    torch.testing.assert_close(now.std((0, 2, 3)), wanted.std((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, model[1].state_dict()[key]) for key, value in other[1].state_dict().items())
    assert not torch.equal(other[5].weight, model[5].weight)
