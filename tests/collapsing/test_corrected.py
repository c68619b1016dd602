"""Targets that correct the errors of what was fitted before: their sums, where errors show, and what they are worth."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_easier.collapsing.algebra.corrected import CorrectedMoments
from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments, fits
from lightning_easier.collapsing.fit import correcting, replacing
from lightning_easier.collapsing.fit.correcting import beginnings_of, gather_alone, gather_corrected
from lightning_easier.collapsing.fit.drift import drift_of, outputs_of
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.collapsing.fit.replacing import replace_chains
from lightning_easier.sites.activations import isolate_activations
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.support.beginnings import Beginnings
from lightning_easier.support.inference import evaluation_mode
from lightning_easier.support.timing import LatencyTable

PLAIN = Geometry(6)
CONVOLUTION = Geometry(3, (3, 3), (2, 1), (1, 0))


def data(geometry, outputs):
    """Two batches: what goes in, what comes out, and a linear function of what goes in."""
    for size in (40, 33):
        if geometry.kernel:
            value = torch.randn(size, geometry.channels, 9, 7).double()
            kernel = torch.randn(outputs, geometry.channels, *geometry.kernel).double()
            made = F.conv2d(value, kernel, stride=geometry.stride, padding=geometry.padding)
        else:
            value = torch.randn(size, 5, geometry.channels).double()
            made = value @ torch.randn(geometry.channels, outputs).double()
        yield value, made + torch.randn_like(made), made


@pytest.mark.parametrize("geometry", [PLAIN, CONVOLUTION])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_mixed_sums_are_those_of_mixed_targets(geometry, size):
    corrected, batches = CorrectedMoments(geometry, 4, torch.device("cpu")), list(data(geometry, 4))
    errors = [size * (4 * torch.randn_like(made) + 0.3 * made) for _, _, made in batches]
    for (value, target, _), error in zip(batches, errors, strict=True):
        corrected.add(value, target, error, 10**6)
    mixed, share = corrected.mixed()
    assert 0 < share < 1
    expected = Moments.of(geometry, 4, torch.device("cpu"))
    for (value, target, _), error in zip(batches, errors, strict=True):
        expected.add(value, target + share * error, 10**6)
    for part in ("fitted", "held_out"):
        for name in ("gram", "cross", "squares"):
            torch.testing.assert_close(getattr(getattr(mixed, part), name), getattr(getattr(expected, part), name))
    assert (mixed.samples, int(mixed.left_out)) == (expected.samples, 0)


def test_what_inputs_explain_is_corrected_wholly_and_what_they_do_not_hardly():
    shares = {}
    for kind in ("linear", "noise", "none"):
        corrected = CorrectedMoments(PLAIN, 4, torch.device("cpu"))
        weight = torch.randn(6, 4).double()
        for value, target, _ in data(PLAIN, 4):
            error = {"linear": value @ weight, "noise": torch.randn_like(target), "none": torch.zeros_like(target)}
            corrected.add(value, target, error[kind], 10**6)
        _, shares[kind] = corrected.mixed()
    assert shares["linear"] > 0.9
    assert shares["noise"] < 0.5
    assert shares["none"] == 0.0


def test_a_correction_that_is_not_finite_leaves_its_samples_out():
    corrected = CorrectedMoments(PLAIN, 4, torch.device("cpu"))
    for value, target, made in data(PLAIN, 4):
        error = made.clone()
        error[3, 0, 0] = torch.nan
        corrected.add(value, target, error, 10**6)
    mixed, _ = corrected.mixed()
    assert int(mixed.left_out) == 2
    assert all(fit.explained > 0 for fit in fits(mixed))


class Block(nn.Module):
    """A residual block of two convolutions, as in ResNets; or with nothing after the sum that is a module."""

    def __init__(self, channels, has_activation=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels)
        self.conv2, self.bn2 = nn.Conv2d(2 * channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.inner = nn.ReLU()
        self.outer = nn.ReLU() if has_activation else nn.Identity()

    def forward(self, value):
        return self.outer(value + self.bn2(self.conv2(self.inner(self.bn1(self.conv1(value))))))


class Mixer(nn.Module):
    """Two MLP branches on a stream of tokens, before which it is normed."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))

    def forward(self, value):
        for norm, mlp in zip(self.norms, self.mlps, strict=False):
            value = value + mlp(norm(value))
        return self.norms[2](value)


def residual(*, has_activation=True):
    model = nn.Sequential(*[Block(3, has_activation) for _ in range(3)], nn.Flatten(), nn.LazyLinear(5)).double()
    model(torch.zeros(2, 3, 6, 5).double())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def changed(model, name):
    """The model with other weights in one module."""
    model = deepcopy(model)
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight += 0.1 * torch.randn_like(weight)
    return model


def images(*sizes):
    return [(torch.randn(size, 3, 6, 5).double(),) for size in sizes]


def added(monkeypatch):
    """What is added to the sums, of each batch."""
    seen = []

    class Recorded(CorrectedMoments):
        def add(self, value, target, error, positions):
            seen.append((value, target, error))
            super().add(value, target, error, positions)

    monkeypatch.setattr(correcting, "CorrectedMoments", Recorded)
    return seen


def at(model, name, batch):
    """What a module is called with first, and what it returns."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(*batch)
    handle.remove()
    return seen[0]


def test_the_error_of_a_chain_shows_in_the_sum_with_its_skip_before_the_norm(monkeypatch):
    model, batches, seen = residual(), images(4, 7), added(monkeypatch)
    isolate_activations(model)
    other = changed(model, "0.conv2")
    (chain,) = FittableChains(other, ["1.inner"]).in_rows()
    assert chain.shown == ("1.outer", "input", "1.bn2")
    gather_corrected(other, beginnings_of(model, batches), chain, batches, batches[0])
    assert len(seen) == 2
    norm = other.get_submodule("1.bn2")
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1)
    for batch, (value, target, error) in zip(batches, seen, strict=True):
        torch.testing.assert_close(value, at(other, "1.conv1", batch)[0])
        torch.testing.assert_close(target, at(other, "1.conv2", batch)[1])
        missing = at(model, "1.outer", batch)[0] - at(other, "1.outer", batch)[0]
        torch.testing.assert_close(error * scale, missing, rtol=1e-4, atol=1e-4)


def test_of_a_chain_without_a_sum_and_of_a_block_it_shows_in_what_they_return(monkeypatch):
    seen = added(monkeypatch)
    plain = (
        nn.Sequential(*[nn.Linear(5, 5), nn.ReLU()] * 1, nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    )
    values = [(torch.randn(30, 5).double(),)]
    isolate_activations(plain)
    other = changed(plain, "0")
    (chain,) = FittableChains(other, ["3"]).in_rows()
    gather_corrected(other, beginnings_of(plain, values), chain, values, values[0])
    torch.testing.assert_close(seen[0][1] + seen[0][2], at(plain, "4", values[0])[1], rtol=1e-4, atol=1e-4)

    seen.clear()
    model, batches = residual(), images(5)
    sites = list(isolate_activations(model))
    other = changed(model, "0.conv1")
    blocks, _ = fittable_blocks(other, find_blocks(other), sites, batches[0])
    block = next(block for block in blocks if block.name == "1")
    gather_corrected(other, beginnings_of(model, batches), block, batches, batches[0])
    torch.testing.assert_close(seen[0][0], at(other, "1", batches[0])[0])
    torch.testing.assert_close(seen[0][1] + seen[0][2], at(model, "1", batches[0])[1], rtol=1e-4, atol=1e-4)


def test_in_a_transformer_it_shows_before_the_next_norm():
    model = Mixer().double().eval()
    isolate_activations(model)
    shown = [chain.shown for chain in FittableChains(model, list(isolate_activations(model))).in_rows()]
    assert shown == [("norms.1", "input", None), ("norms.2", "input", None)]


def test_a_model_that_was_not_changed_needs_no_correction():
    model, batches = residual(), images(16, 16)
    isolate_activations(model)
    (chain,) = FittableChains(model, ["1.inner"]).in_rows()
    assert gather_corrected(model, beginnings_of(deepcopy(model), batches), chain, batches, batches[0]) is None
    corrected = gather_alone(model, beginnings_of(deepcopy(model), batches), chain, batches, batches[0])
    plain = gather_alone(model, None, chain, batches, batches[0])
    for part in ("fitted", "held_out"):
        for name in ("gram", "cross", "squares"):
            one, other = (getattr(getattr(each.moments, part), name) for each in (corrected, plain))
            assert torch.equal(one, other)
    assert corrected.shape == plain.shape


@pytest.mark.parametrize(("objective", "last"), [("depth", "2"), ("macs", "2.0")], ids=["one operator", "a pair"])
def test_a_chain_that_ends_in_what_was_fitted_is_not_compared_with_what_was_there(objective, last):
    layers = [layer for _ in range(3) for layer in (nn.Linear(5, 5), nn.ReLU())]
    model, values = nn.Sequential(*layers).double().eval(), [(torch.randn(60, 5).double(),)]
    isolate_activations(model)
    other = deepcopy(model)
    replace_chains(other, ["3"], values, values[0], ChainPrices(objective, LatencyTable()), 0.02)
    (chain,) = FittableChains(other, ["1"]).in_rows()
    assert chain.operators == ("0", last)
    assert not torch.allclose(at(other, "2", values[0])[1], at(model, "2", values[0])[1], atol=0.1)
    assert gather_corrected(other, beginnings_of(model, values), chain, values, values[0]) is None
    alone, plain = (
        gather_alone(other, dense, chain, values, values[0]) for dense in (beginnings_of(model, values), None)
    )
    assert torch.equal(alone.moments.fitted.cross, plain.moments.fitted.cross)


def test_what_the_model_as_given_does_before_a_place_is_not_done_again(monkeypatch):
    model, batches, seen = residual(), images(4, 7), added(monkeypatch)
    isolate_activations(model)
    other = changed(model, "0.conv2")
    (chain,) = FittableChains(other, ["1.inner"]).in_rows()
    dense, ran = beginnings_of(model, batches), []
    for name in ("0", "0.conv1", "1.conv1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    gather_corrected(other, dense, chain, batches, batches[0])
    assert "0.conv1" not in ran
    assert ran.count("0") == len(batches), "it is called, and returns what it has returned"
    again, ran[:] = [deepcopy(each) for each in seen], []
    seen.clear()
    gather_corrected(other, Beginnings(model, batches, 0), chain, batches, batches[0])
    assert ran.count("0.conv1") == ran.count("1.conv1") > 0
    for one, two in zip(seen, again, strict=True):
        assert all(map(torch.equal, one, two))


def test_a_batch_of_which_nothing_is_known_is_run_whole(monkeypatch):
    model, batches, seen = residual(), images(4, 7), added(monkeypatch)
    isolate_activations(model)
    other = changed(model, "0.conv2")
    (chain,) = FittableChains(other, ["1.inner"]).in_rows()
    gather_corrected(other, beginnings_of(model, batches[1:]), chain, batches, batches[0])
    expected = [deepcopy(each) for each in seen]
    seen.clear()
    gather_corrected(other, beginnings_of(model, batches), chain, batches, batches[0])
    for one, two in zip(seen, expected, strict=True):
        assert all(map(torch.equal, one, two))


def test_hooks_and_modes_are_as_they_were():
    model, batches = residual(), images(8)
    isolate_activations(model)
    other = changed(model, "0.conv2").train()
    (chain,) = FittableChains(other.eval(), ["1.inner"]).in_rows()
    other.train()
    gather_corrected(other, beginnings_of(model, batches), chain, batches, batches[0], ["0.conv1"])
    assert other.training
    assert not model.training
    for each in (model, other):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())


def test_errors_that_are_corrected_leave_the_outputs_nearer(monkeypatch):
    """As in images, values hang together: what comes in after an error tells of the error."""
    torch.manual_seed(3)
    patterns = torch.randn(4, 90).double()

    def drawn(*sizes):
        return [((torch.randn(size, 4).double() @ patterns).view(size, 3, 6, 5),) for size in sizes]

    model, batches, fresh = residual(), drawn(64, 64, 64, 64), drawn(256)
    sites = [site for site in isolate_activations(model) if site.endswith("inner")]
    drifts = {}
    monkeypatch.setattr(replacing, "refit_kept", lambda *_, **options: None)
    for way in ("corrected", "plain"):
        if way == "plain":
            monkeypatch.setattr(correcting, "gather_corrected", lambda *_: None)
        fitted = deepcopy(model)
        replace_chains(fitted, sites, batches, batches[0], ChainPrices("macs", LatencyTable()), 0.02)
        drifts[way] = drift_of(outputs_of(fitted, fresh), outputs_of(model, fresh))
    assert drifts["corrected"] < 0.9 * drifts["plain"]


class Skipped(nn.Module):
    """An activation in place in front of a skip, behind a chain that is fitted before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.second(self.act(x)) + x)


class OwnStatistics(nn.Module):
    """A batch norm that stays in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.second(self.first(self.norm(x)))


@pytest.mark.parametrize("make", [Skipped, OwnStatistics])
def test_errors_are_the_same_whatever_of_the_dense_network_is_kept(make):
    torch.manual_seed(0)
    dense = make().eval()
    if isinstance(dense, OwnStatistics):
        dense.norm.train()
    batches = [(torch.randn(64, 3, 5, 5) + 1,) for _ in range(2)]
    changed = deepcopy(dense)
    with torch.no_grad():
        changed.first[0].weight *= 0.5
    state = deepcopy(dense.state_dict())
    place = FittableChains(changed, ["second.1"]).around(["second.1"])
    with evaluation_mode(dense):
        nothing_kept = Beginnings(dense, batches, 0)
    sums = [
        gather_corrected(changed, before, place, batches, batches[0]).moments.fitted
        for before in (beginnings_of(dense, batches), nothing_kept)
    ]
    for name in ("gram", "cross", "squares"):
        torch.testing.assert_close(*(getattr(each, name) for each in sums))
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
