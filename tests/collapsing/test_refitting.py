"""Operators that are kept make up for the error of what was changed; where nothing was changed, they stay."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_easier.collapsing.algebra import corrected
from lightning_easier.collapsing.algebra.corrected import step_against
from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments
from lightning_easier.collapsing.fit import refitting
from lightning_easier.collapsing.fit.correcting import beginnings_of
from lightning_easier.collapsing.fit.drift import drift_of, outputs_of
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.kept import kept_operators
from lightning_easier.collapsing.fit.refitting import refit_kept
from lightning_easier.sites.activations import isolate_activations


def changed(model, *names):
    """The model with other weights in some operators: no channel is lost."""
    model = deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight *= 1.4
            weight += 0.05 * torch.randn_like(weight)
    return model


def randomized(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double().eval()


def states(model):
    return deepcopy(model.state_dict())


def is_as_before(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LAYERS = {
    "linear": lambda: (nn.Linear(7, 5), nn.Linear(5, 4)),
    "one axis": lambda: (nn.Conv1d(4, 3, 1), nn.Conv1d(3, 3, 3, stride=2, padding=1)),
    "two axes": lambda: (
        nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 3, (3, 2), stride=(2, 1), padding=(0, 1))
    ),
    "three axes": lambda: (
        nn.Conv3d(4, 3, 1, bias=False),
        nn.Conv3d(3, 3, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0), bias=False),
    ),
}  # fmt: skip
SHAPES = {1: (4, 11), 2: (4, 7, 6), 3: (4, 3, 5, 4)}


def values_for(first, count=64):
    shape = (3, 7) if isinstance(first, nn.Linear) else SHAPES[len(first.kernel_size)]
    return torch.randn(count, *shape).double()


@pytest.mark.parametrize(
    ("layers", "norm"),
    [
        ("linear", None), ("one axis", None), ("one axis", nn.BatchNorm1d), ("two axes", None),
        ("two axes", nn.BatchNorm2d), ("three axes", None), ("three axes", nn.BatchNorm3d),
    ],
)  # fmt: skip
def test_the_next_operator_makes_up_for_what_it_can_wholly(layers, norm):
    """Channels that an operator mixes up the next unmixes; without a bias, zeros that are padded are what they were."""
    first, second = LAYERS[layers]()
    model = randomized(nn.Sequential(first, second, *([] if norm is None else [norm(3)])))
    if first.bias is not None:
        nn.init.zeros_(first.bias)
    other = deepcopy(model)
    with torch.no_grad():
        mixing = torch.eye(len(first.weight)).double() + 0.3 * torch.rand(len(first.weight), len(first.weight)).double()
        other[0].weight.copy_(torch.einsum("ij,j...->i...", mixing, first.weight))
    batches, fresh = [(values_for(first),), (values_for(first, 32),)], values_for(first)
    with torch.no_grad():
        assert not torch.allclose(other(fresh), model(fresh), rtol=1e-2)
        assert refit_kept(other, beginnings_of(model, batches), batches).names == ["1"]
        torch.testing.assert_close(other(fresh), model(fresh), rtol=1e-8, atol=1e-8)


class Residual(nn.Module):
    """Blocks of two convolutions and norms beside their skips, one of them strided; then a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.inner = nn.ModuleList(nn.ReLU() for _ in range(2))
        self.outer = nn.ModuleList(nn.ReLU() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, value):
        value = self.stem(value)
        for i in range(2):
            inner = self.inner[i](self.norms[2 * i](self.first[i](value)))
            value = self.outer[i](value + self.norms[2 * i + 1](self.second[i](inner)))
        return self.head(value.mean((2, 3)))


def images(*sizes):
    """Images of a few patterns: values hang together, as in real ones."""
    patterns = torch.randn(5, 3 * 7 * 6, generator=torch.Generator().manual_seed(0))
    return [((torch.randn(size, 5) @ patterns).view(size, 3, 7, 6).double(),) for size in sizes]


def drift(other, model, batches):
    return drift_of(outputs_of(other, batches), outputs_of(model, batches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beside_skips_what_stays_brings_the_outputs_nearer_also_on_other_data(dtype):
    model = randomized(Residual()).to(dtype)
    other = changed(model, "first.0", "second.0")
    batches, fresh = ([(value.to(dtype),) for (value,) in images(*sizes)] for sizes in ((64, 64, 33), (200,)))
    before = drift(other, model, fresh)
    refitted = refit_kept(other, beginnings_of(model, batches), batches)
    assert {"first.1", "second.1", "head"} <= {*refitted.names}
    assert not {"stem", "first.0", "second.0"} & {*refitted.names}
    assert drift(other, model, fresh) < before / 2
    assert all(value.dtype == dtype for value in other.parameters())


def test_what_shows_in_a_sum_corrects_the_error_of_the_skip():
    model = randomized(Residual())
    places = {place.name: place for place in kept_operators(model, model)}
    assert list(places) == ["stem", "first.0", "second.0", "first.1", "second.1", "head"]
    assert places["second.1"].shown == ("outer.1", "input", "norms.3")
    assert places["first.1"].shown == ("norms.2", "output", "norms.2")
    assert places["head"].shown == ("head", "output", None)


def test_training_goes_on_from_what_it_computes():
    model = randomized(Residual())
    (value,), *_ = batches = images(256)
    other = changed(model, "first.0")
    assert "first.1" in refit_kept(other, beginnings_of(model, batches), batches).names
    norm, seen = other.norms[2], []
    norm.register_forward_hook(lambda _, args, output: seen.append(output))
    at_rest = other(value)
    norm.train()
    other(value)
    torch.testing.assert_close(seen[1], seen[0], rtol=0.05, atol=0.05)
    assert at_rest.isfinite().all()


def test_a_model_that_was_not_changed_stays_bit_for_bit_and_what_comes_before_a_change_does():
    model, batches = randomized(Residual()), images(64, 64)
    same = deepcopy(model)
    assert refit_kept(same, beginnings_of(model, batches), batches) is None
    assert is_as_before(same, states(model))
    other = changed(model, "first.1")
    assert "second.1" in refit_kept(other, beginnings_of(model, batches), batches).names
    for name in ("stem", "first.0", "second.0", "norms.0", "norms.1"):
        assert is_as_before(other.get_submodule(name), states(model.get_submodule(name)))


def test_undone_every_tensor_is_as_it_was_to_the_bit():
    model, batches = randomized(Residual()), images(64, 64)
    other = changed(model, "first.0")
    before = states(other)
    refitted = refit_kept(other, beginnings_of(model, batches), batches)
    assert not is_as_before(other, before)
    refitted.undo()
    assert is_as_before(other, before)


def test_what_brings_the_outputs_no_nearer_is_undone(monkeypatch):
    model, batches = randomized(Residual()), images(64, 64)
    other = changed(model, "first.0")
    before = states(other)
    step_against = refitting.step_against

    def too_far(errors):
        step = step_against(errors)
        return step._replace(weight=-10 * step.weight)

    monkeypatch.setattr(refitting, "step_against", too_far)
    assert refit_kept(other, beginnings_of(model, batches), batches) is None
    assert is_as_before(other, before)


def test_when_the_time_is_over_what_was_refitted_by_then_stays_if_it_is_good():
    model, batches = randomized(Residual()), images(64, 64)
    other = changed(model, "second.1")
    assert refit_kept(other, beginnings_of(model, batches), batches, lambda: True) is None
    told, looks = [], iter([False, True])
    other = changed(model, "first.0", "second.0")
    before = drift(other, model, batches)
    found = refit_kept(other, beginnings_of(model, batches), batches, lambda: next(looks), lambda: told.append(1))
    assert len(told) == 1
    assert drift(other, model, batches) < before if found else drift(other, model, batches) == before


class Odd(nn.Module):
    """Operators that can't be changed by themselves, between two that can."""

    def __init__(self):
        super().__init__()
        self.begin = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding=2)
        self.reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(4, 4, 1)
        self.twice, self.one = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.one.weight
        self.masked = prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5)
        self.orthogonal = parametrizations.orthogonal(nn.Conv2d(4, 4, 1))
        self.hooked = nn.Conv2d(4, 4, 1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.end = nn.Conv2d(4, 4, 1)

    def forward(self, value):
        value = self.dilated(self.grouped(self.begin(value)))
        value = self.twice(self.twice(self.transposed(self.reflecting(value))))
        value = self.other(self.one(value))
        return self.end(self.hooked(self.orthogonal(self.masked(value))))


def test_operators_that_can_not_be_changed_by_themselves_are_left():
    model = Odd().double().eval()
    with torch.no_grad():
        model(torch.zeros(1, 4, 7, 6).double())  # the mask is applied without a history, which could not be copied
    assert [place.name for place in kept_operators(model, deepcopy(model))] == ["begin", "end"]
    batches = [(torch.randn(64, 4, 7, 6).double(),)]
    other = changed(model, "begin")
    before = states(other)
    assert refit_kept(other, beginnings_of(model, batches), batches).names == ["end"]
    assert [name for name, value in other.state_dict().items() if not torch.equal(value, before[name])] == [
        "end.weight", "end.bias"
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_norm_without_a_scale_stays_and_before_one_without_statistics_the_operator_does(options):
    layers = nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, **options)
    model, batches = randomized(nn.Sequential(*layers)), [(torch.randn(64, 4, 7, 6).double(),)]
    other = changed(model, "0")
    before = states(other)
    refitted = refit_kept(other, beginnings_of(model, batches), batches)
    if "affine" in options:
        assert refitted.names == ["1"]
        assert is_as_before(other[2], {name.removeprefix("2."): value for name, value in before.items()})
    else:
        assert refitted is None


def with_an_offset(*layers):
    """Two pointwise operators and what comes after; what the first computes is moved by a constant in the other."""
    model = randomized(nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1, bias=False), *layers))
    other = deepcopy(model)
    with torch.no_grad():
        other[0].bias += 2
    return model, other, [(torch.randn(256, 4, 7, 6).double() + 1,)]


def test_a_norm_makes_up_for_an_offset_and_training_goes_on_from_there():
    model, other, ((value,),) = with_an_offset(nn.BatchNorm2d(3))
    refit_kept(other, beginnings_of(model, [(value,)]), [(value,)])
    torch.testing.assert_close(other(value), model(value), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(other.train()(value), model(value), rtol=0.05, atol=0.05)


def test_where_nothing_can_make_up_for_an_offset_the_weights_do_as_well_as_they_can():
    model, other, batches = with_an_offset()
    before = drift(other, model, batches)
    assert refit_kept(other, beginnings_of(model, batches), batches).names == ["1"]
    dense, now = (outputs_of(each, batches)[0] - outputs_of(other, batches)[0] for each in (model, other))
    patches = other[0](batches[0][0]).detach().movedim(1, -1).flatten(0, -2)
    left = dense.view(-1, 3, 42).movedim(1, -1).flatten(0, -2)
    assert not now.any()
    assert (patches.T @ left).norm() < 0.05 * patches.norm() * left.norm()  # no step of the weights takes more of it
    assert drift(other, model, batches) < before


def test_a_norm_that_shares_its_scale_stays():
    twin = nn.BatchNorm2d(3)
    model, other, batches = with_an_offset(nn.BatchNorm2d(3), nn.ReLU(), twin)
    for each in (model, other):
        each[4].weight = each[2].weight
    before = states(other)
    assert refit_kept(other, beginnings_of(model, batches), batches).names == ["1"]
    assert [name for name, value in other.state_dict().items() if not torch.equal(value, before[name])] == ["1.weight"]


def test_a_chain_before_a_norm_without_statistics_is_added_to_no_sum_that_is_known():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
            self.second, self.inner, self.outer = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ReLU()

        def forward(self, value):
            return self.outer(value + self.norm(self.second(self.inner(self.conv(value)))))

    model = Beside().eval()
    isolate_activations(model)
    (chain,) = FittableChains(model, ["inner"]).in_rows()
    assert chain.total is None


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_a_step_is_shortened_to_what_helps_on_what_is_held_out(noise):
    errors, weight = Moments.of(Geometry(6), 4, torch.device("cpu")), torch.randn(6, 4).double()
    for _ in range(2):
        value = torch.randn(24, 6).double()
        errors.add(value, 0.3 * value @ weight + noise * torch.randn(24, 4).double(), 10**6)
    step = step_against(errors)
    assert step.left == pytest.approx(errors.held_out.residual(step.weight) / float(errors.held_out.squares.sum()))
    assert step.left < 0.2 if noise == 0.1 else 0.5 < step.left <= 1


def test_a_step_leaves_the_weights_of_a_channel_that_is_nearly_always_zero(monkeypatch):
    """Two positions tell nothing of what it is worth; training that brings it to life would multiply with it."""
    torch.manual_seed(0)
    errors, weight = Moments.of(Geometry(6), 4, torch.device("cpu")), torch.randn(6, 4).double()
    for _ in range(2):
        value = torch.randn(200, 6).double()
        value[:, 5] = 0
        value[:100:10, 5] = 1e-4
        errors.add(value, value @ weight + 0.1 * torch.randn(200, 4).double(), 10**6)
    step = step_against(errors)
    torch.testing.assert_close(step.weight[:5], weight[:5], rtol=0, atol=0.05)
    assert step.weight[5].abs().max() < 0.1
    monkeypatch.setattr(corrected, "CALM", 0.0)
    assert step_against(errors).weight[5].abs().max() > 100
