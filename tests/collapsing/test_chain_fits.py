"""Tests of fitted operators that move into the modules of their chains."""

import copy

import pytest
import torch
from torch import nn

from lightning_easier import (
    collapse,
    compress,
    fit_chains,
    isolate_activations,
    linearize,
    load_pruned,
    restore,
    restore_structure_on_load,
)
from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments
from lightning_easier.collapsing.fit import chain_fits, fittable
from lightning_easier.collapsing.fit.fit_prices import PricedFit
from lightning_easier.collapsing.fit.fittable import FittableChain, FittableChains
from lightning_easier.collapsing.fit.fitting import gather
from lightning_easier.collapsing.fit.placing import as_chain_fit, replace
from lightning_easier.structure.linearize import read_marks, stand_ins
from lightning_easier.zoo import CifarResNet
from tests.collapsing.test_collapse_fit import Block, Bottleneck, Mlp, Reads, almost_linear, randomized


def trained_mode_statistics(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """Give batch norms the statistics of the data, as training does."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat(batches))
    return model.eval()


class Bare(nn.Sequential):
    """Neither a bias nor a batch norm that could take an offset."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 24, bias=False), nn.ReLU(), nn.Linear(24, 5))


class Plain(nn.Sequential):
    """Three convolutions in a row, of other shapes than what is fitted."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))


CASES = {
    "block": (Block, "relu", (16, 6, 9, 7)),
    "strided block": (lambda: Block(stride=2), "relu", (16, 6, 10, 8)),
    "1d": (lambda: Block(1), "relu", (16, 6, 17)),
    "bottleneck": (Bottleneck, "act1", (16, 12, 9, 7)),
    "mlp on vectors": (Mlp, "1", (64, 8)),
    "mlp on tokens": (Mlp, "1", (16, 5, 8)),
    "without a place for the offset": (Bare, "1", (64, 8)),
    "another shape": (Plain, "1", (16, 3, 10, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_a_fitting_collapse_computes_and_comes_back(name):
    torch.manual_seed(0)
    make, site, shape = CASES[name]
    model = randomized(make()).double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    fits = fit_chains(model, batches)
    expected = collapse(model, batches[0], mode="fit", sites=[site], calibration=batches, objective="depth", slack=0.0)
    assert expected.report.fitted[0].kind == fits[site].kind
    assert fits[site].explained == pytest.approx(expected.report.fitted[0].explained)
    before = model(batches[0])
    linearize(model, [site], stand_in="fitted", statistics=fits)
    torch.testing.assert_close(model(batches[0]), expected.model(batches[0]))
    for key, parameter in model.named_parameters():  # those that are left are the same objects
        assert parameter is parameters[key]
    exact = collapse(model, batches[0], objective="depth")
    torch.testing.assert_close(exact.model(batches[0]), expected.model(batches[0]))
    restore(model)
    assert {**dict(model.named_parameters())} == parameters
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(batches[0]), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_brings_the_structure_or_fails_loudly(name, tmp_path):
    torch.manual_seed(0)
    make, site, shape = CASES[name]
    model = randomized(make())
    batches = [torch.randn(shape) for _ in range(4)]
    linearize(model, [site], stand_in="fitted", statistics=fit_chains(model, batches))
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    fresh = make().eval()
    with pytest.raises(RuntimeError, match="Unexpected key|Missing key|size mismatch"):
        fresh.load_state_dict(model.state_dict())
    fresh = load_pruned(make(), tmp_path / "pruned.pt").eval()
    assert torch.equal(fresh(batches[0]), model(batches[0]))
    assert read_marks(fresh.state_dict()) == read_marks(model.state_dict())
    inner = load_pruned(nn.ModuleDict({"model": make()}), _prefixed(tmp_path, model)).eval()
    assert torch.equal(inner["model"](batches[0]), model(batches[0]))


def _prefixed(folder, model):
    torch.save({f"model.{key}": value for key, value in model.state_dict().items()}, folder / "prefixed.pt")
    return folder / "prefixed.pt"


def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = randomized(Block())
    batches = [torch.randn(16, 6, 9, 7) for _ in range(4)]
    linearize(model, ["relu"], stand_in="fitted", statistics=fit_chains(model, batches))
    torch.save({**model.state_dict(), "other": torch.zeros(1)}, tmp_path / "pruned.pt")
    fresh = randomized(Block())
    state = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match="unexpected other"):
        load_pruned(fresh, tmp_path / "pruned.pt")
    assert not stand_ins(fresh)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    assert fresh.state_dict().keys() == state.keys()


NORMS = {
    "that makes up for it": {},
    "without a scale": {"affine": False},
    "without statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_new_modules_and_those_that_are_there_become_one_function_in_both_modes(norm, bias):
    torch.manual_seed(0)
    model = randomized(Block())
    model.conv1, model.bn2 = nn.Conv2d(6, 6, 3, 1, 1, bias=bias), nn.BatchNorm2d(6, **NORMS[norm])
    batches = [torch.randn(16, 6, 9, 7, dtype=torch.float64) for _ in range(4)]
    model = trained_mode_statistics(model.double(), batches)
    isolate_activations(model)
    with chain_fits.ChainProbe(model, ["relu"], 4) as probe, torch.no_grad():
        for batch in batches:
            model(batch)
    ((chain, fits, _),) = probe.fitted()
    for fit in fits:
        moved_in = as_chain_fit(model, chain, fit)
        if moved_in is None:  # of another kind than the first of the chain
            continue
        new, same = copy.deepcopy(model), copy.deepcopy(model)
        replace(new, PricedFit(chain, fit, 0.0, 0.0, 0.0), batches[:1])
        linearize(same, ["relu"], stand_in="fitted", statistics={"relu": moved_in})
        for training in (False, True):
            torch.testing.assert_close(new.train(training)(batches[0]), same.train(training)(batches[0]))


def test_training_begins_with_the_function_that_was_fitted():
    torch.manual_seed(0)
    model = randomized(CifarResNet(8))
    batches = [torch.randn(64, 3, 16, 16) for _ in range(4)]
    trained_mode_statistics(model, batches)
    sites = [name for name in isolate_activations(model) if name.endswith("relu1")]
    for site in sites:
        linearize(model, [site], stand_in="fitted", statistics=fit_chains(model, batches, include=site))
    with torch.no_grad():
        expected, trained = model(batches[0]), copy.deepcopy(model).train()(batches[0])
    assert float((trained - expected).norm() / expected.norm()) < 0.1


def test_fits_build_on_fits_and_are_taken_back_in_the_opposite_order():
    torch.manual_seed(0)
    model = Plain().eval().double()
    batches = [torch.randn(16, 3, 10, 8, dtype=torch.float64) for _ in range(4)]
    dense, state = model(batches[0]), copy.deepcopy(model.state_dict())
    for site in ("3", "1"):
        linearize(model, [site], stand_in="fitted", statistics=fit_chains(model, batches))
    assert collapse(model, batches[0], objective="depth").report.after.depth == 1
    both = model(batches[0])
    # weights go where they belong though the state dict names the later one first
    fresh = Plain().double().eval()
    restore_structure_on_load(fresh).load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches[0]), both)
    with pytest.raises(ValueError, match="`names` to hold '1' besides '3'"):
        restore(model, ["3"])
    assert torch.equal(model(batches[0]), both)
    restore(model, ["1"])
    assert list(stand_ins(model)) == ["3"]
    restore(model)
    assert torch.equal(model(batches[0]), dense)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    linearize(model, ["1"], stand_in="fitted", statistics=fit_chains(model, batches))
    linearize(model, ["3"], stand_in="fitted", statistics=fit_chains(model, batches))  # the host hosts again
    assert torch.equal(restore(model)(batches[0]), dense)


def test_what_was_trained_since_stays_when_something_else_becomes_linear():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double().eval()
    batches = [torch.randn(16, 6, 9, 7, dtype=torch.float64) for _ in range(4)]
    linearize(model, ["0.relu"], stand_in="fitted", statistics=fit_chains(model, batches))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    expected = model(batches[0])
    linearize(model, ["1.relu"])
    restore(model, ["1.relu"])
    assert torch.equal(model(batches[0]), expected)


def test_two_fits_that_share_an_operator_are_refused_together():
    torch.manual_seed(0)
    model = Plain().eval()
    fits = fit_chains(model, [torch.randn(16, 3, 10, 8) for _ in range(4)])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"that of '3' needs \['2'\]"):
        linearize(model, ["1", "3"], stand_in="fitted", statistics=fits)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    linearize(model, ["1"], stand_in="fitted", statistics=fits)
    with pytest.raises(ValueError, match="Linearize one of the two, and fit again"):
        linearize(model, ["3"], stand_in="fitted", statistics=fits)
    with pytest.raises(ValueError, match="`statistics` to hold the operator of '3', as `fit_chains"):
        linearize(model, ["3"], stand_in="fitted")


def test_an_almost_linear_chain_is_found_whatever_its_channels_mean():
    torch.manual_seed(0)
    model = almost_linear(randomized(Mlp())).double()
    batches = [torch.randn(64, 8, dtype=torch.float64) + 100 for _ in range(4)]
    expected = model(batches[0])
    fits = fit_chains(model, batches)
    assert fits["1"].explained > 1 - 1e-9
    linearize(model, ["1"], stand_in="fitted", statistics=fits)
    torch.testing.assert_close(model(batches[0]), expected, rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="`batches` to be an iterable of batches, but got a tensor"):
        fit_chains(Mlp(), torch.randn(4, 8))
    with pytest.raises(ValueError, match="at least one batch"):
        fit_chains(Mlp(), [])
    with pytest.raises(ValueError, match="`include`"):
        fit_chains(Mlp(), [torch.randn(4, 8)], include="x")


def test_a_padding_that_moves_and_a_fit_leave_each_other_alone():
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 10, 8) for _ in range(4)]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 1, 1)
    ).eval()  # fmt: skip
    fit_first = linearize(copy.deepcopy(model), ["1"], stand_in="fitted", statistics=fit_chains(model, batches))
    linearize(fit_first, ["3"], shift_padding=True)
    assert fit_first(batches[0]).shape == model(batches[0]).shape
    assert torch.equal(restore(fit_first)(batches[0]), model(batches[0]))
    shift_first = linearize(copy.deepcopy(model), ["3"], shift_padding=True)
    assert fit_chains(shift_first, batches) == {}


def test_single_vectors_are_held_out_batch_by_batch():
    torch.manual_seed(0)
    model = Mlp().eval()
    vectors = torch.randn(400, 8)
    one_by_one = fit_chains(model, vectors.split(1))["1"].explained
    assert one_by_one == pytest.approx(fit_chains(model, vectors.split(50))["1"].explained, abs=0.1)
    assert fit_chains(model, [vectors[:1]]) == {}
    assert fit_chains(model, [vectors[:2]]) == {}


def test_fits_to_values_whose_sums_overflow_are_not_made():
    batches = [1e30 * torch.randn(32, 8) for _ in range(4)]
    model = Mlp().eval()
    assert fit_chains(model, batches) == {}
    probe = chain_fits.ChainProbe(model, ["1"], 4)
    with probe, torch.no_grad():
        for batch in batches:
            model(batch)
    assert list(probe.fitted()) == []
    assert "so large that sums over them overflow" in probe.reasons["1"]


def test_a_fit_too_large_for_the_dtype_of_the_model_does_not_move_in():
    torch.manual_seed(0)
    model = Mlp().eval()
    for operator in (model[0], model[3]):
        operator.weight.data *= 1e4
    batches = [torch.randn(64, 8) for _ in range(4)]
    (fit,) = fit_chains(model, batches).values()
    with pytest.raises(
        ValueError, match="`statistics` to hold finite numbers in the dtype of the model, torch.float16"
    ):
        linearize(model.half(), ["1"], stand_in="fitted", statistics={"1": fit})
    assert isinstance(model[1], nn.GELU)


def test_sums_are_as_precise_under_autocast():
    value, target = torch.randn(64, 8) + 3, torch.randn(64, 8)
    moments, exact = (Moments.of(Geometry(8), 8, torch.device("cpu")) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        moments.add(value, target, 1000)
    exact.add(value, target, 1000)
    assert torch.equal(moments.fitted.gram, exact.fitted.gram)


def test_what_was_absorbed_keeps_its_dtype_and_a_fit_is_not_shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 8).bfloat16(), Mlp()).eval()
    values = torch.randn(64, 8)
    fits = fit_chains(model[1], [values, values + 1])
    of_whole = {f"1.{name}": fit for name, fit in fits.items()}
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    for each in (first, second):
        linearize(each, ["1.1"], stand_in="fitted", statistics=of_whole)
    with torch.no_grad():
        first[1][0].weight.zero_()
    assert second[1][0].weight.abs().sum() > 0
    assert restore(second)[1][3].weight.dtype == torch.float32
    assert torch.equal(second[1](values), model[1](values))


def test_operators_in_whose_place_none_is_follow_the_model_and_nothing_else():
    torch.manual_seed(0)
    channels = [nn.Conv2d(8, 8, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2).bfloat16()]
    model = nn.Sequential(*channels, *head).eval()
    fits = fit_chains(model[:3], [torch.randn(64, 8, 6, 6)])
    assert fits["1"].form.host is None
    linearize(model, ["1"], stand_in="fitted", statistics=fits)
    assert restore(model)[0].weight.dtype == torch.float32
    beside = nn.Sequential(*model[:5], nn.Linear(8, 2).double())  # which tells nothing of a cast
    linearize(beside, ["1"], stand_in="fitted", statistics=fits)
    assert restore(beside.double())[0].weight.dtype == torch.float64
    alone = model[:3].float()
    linearize(alone, ["1"], stand_in="fitted", statistics=fits)
    assert restore(alone.double())[0].weight.dtype == torch.float64


def test_names_with_slashes_and_operators_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a/b": nn.Linear(8, 32), "c/d": nn.Linear(32, 8)})
            self.act = nn.ReLU()

        def forward(self, x):
            return self.parts["c/d"](input=self.act(self.parts["a/b"](input=x)))

    torch.manual_seed(0)
    model = ByKeyword().eval()
    batches = [torch.randn(64, 8) for _ in range(4)]
    linearize(model, ["act"], stand_in="fitted", statistics=fit_chains(model, batches))
    assert model.parts["a/b"].weight.shape == (8, 8)
    fresh = restore_structure_on_load(ByKeyword()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches[0]), model(batches[0]))
    assert compress(ByKeyword().eval(), batches, objective="macs").report.trials


def test_chains_whose_sums_do_not_fit_into_memory_are_named(monkeypatch):
    monkeypatch.setattr(chain_fits, "_MOST_BYTES", 2 * 8 * 9**2)
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(), nn.LayerNorm(8), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    isolate_activations(model)
    probe = chain_fits.ChainProbe(model, ["0.1", "3"], 1)
    assert len(probe.chains) == 1
    (reason,) = probe.reasons.values()
    assert "GiB more; `compress` takes one at a time" in reason


def test_an_operator_may_change_its_shape_while_an_old_graph_is_alive():
    torch.manual_seed(0)
    model = Mlp()
    kept = model(torch.randn(4, 8)).sum()
    kept.backward(retain_graph=True)
    linearize(model, ["1"], stand_in="fitted", statistics=fit_chains(model, [torch.randn(64, 8)]))
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad.shape == model[0].weight.shape == (8, 8)
    restore(model)
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad.shape == model[0].weight.shape
    assert kept.isfinite()


def test_a_forward_may_read_plain_attributes_of_what_is_gone():
    torch.manual_seed(0)
    model = Reads().eval()
    linearize(model, ["act"], stand_in="fitted", statistics=fit_chains(model, [torch.randn(256, 4)]))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), model.first(x) / 4)
    assert copy.deepcopy(model).second.out_features == 4


def inverted(channels: int, outputs: int, stride: int = 1, groups: int | None = None) -> nn.Sequential:
    groups = channels if groups is None else groups
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(channels, outputs, 1)
    ).eval()


def expanded(channels: int, outputs: int, stride: int = 1) -> nn.Sequential:
    depthwise = nn.Conv2d(outputs, outputs, 3, stride, padding=1, groups=outputs)
    return nn.Sequential(nn.Conv2d(channels, outputs, 1), nn.ReLU(), depthwise).eval()


def chain_of(model: nn.Sequential) -> FittableChain:
    return FittableChains(model, ["1"]).around(["1"])


@pytest.mark.parametrize(
    ("model", "unknowns"),
    [
        (inverted(512, 128), 512 + 1),
        (inverted(512, 4), 512 * 9 + 1),  # three times the weights of the chain
        (inverted(384, 64), 384 + 1),  # eight times, all but a little
        (inverted(512, 128, stride=2), 512 + 1),  # both have the positions of the result
        (expanded(256, 512), 256 + 1),
        (expanded(256, 512, stride=2), 256 * 9 + 1),  # the first has four times as many
        (inverted(512, 128, groups=1), 512 * 9 + 1),
        (inverted(160, 128), 160 * 9 + 1),
    ],
    ids=["in vain", "may pay", "nearly eight times", "stride", "expansion", "expansion and stride", "dense", "small"],
)
def test_sums_for_an_operator_that_would_never_pay_are_over_one_tap(model, unknowns):
    """Those over all nine taps of 960 channels took minutes, for a convolution with nine times the weights."""
    assert chain_of(model).geometry.unknowns == unknowns


def test_where_depth_counts_weights_do_not():
    chains = FittableChains(inverted(512, 128), ["1"], by_depth=True)
    assert chains.around(["1"]).geometry.kernel == (3, 3)


def test_the_body_of_a_bottleneck_keeps_its_kernel():
    model = nn.Sequential(
        nn.Conv2d(512, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 512, 1)
    ).eval()
    assert FittableChains(model, ["1", "3"]).around(["1", "3"]).geometry.kernel == (3, 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_operator_is_the_same_whatever_is_summed_up_besides(stride, monkeypatch):
    torch.manual_seed(0)
    model = inverted(12, 12, stride).double()
    batches = [torch.randn(40, 12, 9, 7).double() for _ in range(2)]

    def found():
        ((place, gathered),) = gather(model, [chain_of(model)], [(x,) for x in batches], (batches[0],))
        return {fit.kind: fit.operator for fit in place.fits(model, gathered.moments)}

    whole = found()
    monkeypatch.setattr(fittable, "_MOST_IN_VAIN", 0)
    monkeypatch.setattr(fittable, "_NEVER_PAYS", 0)
    alone = found()
    assert {"convolution", "separable", "pointwise"} <= {*whole}
    assert "separable" not in alone
    assert alone["convolution"].kernel_size == (1, 1)
    x = torch.randn(3, 12, 9, 7).double()
    torch.testing.assert_close(alone["convolution"](x), whole["pointwise"](x), rtol=1e-6, atol=1e-6)
