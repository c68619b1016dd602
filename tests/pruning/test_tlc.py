"""Tests of TLC's order and of the stand-in that is the activation on one side of zero."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_easier import (
    FitChains,
    Linearize,
    Order,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
    measure_error_likelihood,
)
from lightning_easier.callbacks.wiring import check_strategy_lets_parameters_change
from lightning_easier.measure.affines import AffineFit
from lightning_easier.pruning.methods import Measuring
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.structure.operations import from_plain
from tests.integration.interrupted import Small, run
from tests.pruning.test_methods import fits, inverted, proposed

MAPS = [torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]


def likelihood(means: list[float], deviations: list[float]) -> float:
    """Compute it from the error function, number by number."""
    each = [
        (0.0 if mean else 0.5) if deviation == 0 else 0.5 * math.erfc(abs(mean / deviation) / math.sqrt(2))
        for mean, deviation in zip(means, deviations, strict=True)
    ]
    return sum(each) / len(each)


def likelihood_after(norm: nn.Module) -> float:
    return likelihood(norm.bias.tolist(), norm.weight.tolist())


def likelihood_of(pre_activation: Tensor, dim: int = 1) -> float:
    values = pre_activation.detach().movedim(dim, 0).flatten(1)
    return likelihood(values.mean(1).tolist(), values.std(1, correction=0).tolist())


def drawn(model: nn.Module) -> nn.Module:
    """Give batch norms scales, shifts and statistics, some scales negative or zero."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1, 1)
                nn.init.uniform_(norm.bias, -2, 2)
    return model.double().eval()


class Scaled(nn.BatchNorm2d):
    """A batch norm of somebody else's class."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Net(nn.Module):
    """Activations after batch norms and after other things."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (3, 4, 4, 4, 4, 4))
        self.near, self.behind, self.own, self.plain = (
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
            Scaled(4),
            nn.BatchNorm2d(4),
        )
        self.drop, self.nothing = nn.Dropout(), nn.Identity()
        self.act = nn.ModuleDict(
            {name: nn.ReLU() for name in ("near", "behind", "own", "sum", "pooled", "none", "twice")}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act["near"](self.near(self.conv[0](x)))
        x = self.act["behind"](self.nothing(self.drop(self.behind(self.conv[1](x)))))
        x = self.act["own"](self.own(self.conv[2](x)))
        x = self.act["sum"](self.plain(self.conv[3](x)) + x)
        x = self.act["pooled"](F.avg_pool2d(self.plain(self.conv[4](x)), 2))
        return self.act["none"](self.conv[5](x))


def pre_activations(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Run a model and return what its activations read."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in isolate_activations(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in seen.items()}


def test_it_is_that_of_the_batch_norm_right_before_and_else_of_what_is_measured():
    model = drawn(Net())
    values = pre_activations(model, MAPS)
    expected = {
        **{f"act.{name}": likelihood_after(model.get_submodule(name)) for name in ("near", "behind", "own")},
        **{f"act.{name}": likelihood_of(values[f"act.{name}"]) for name in ("sum", "pooled", "none")},
    }
    assert measure_error_likelihood(model, MAPS) == pytest.approx(expected, rel=1e-9)
    assert list(measure_error_likelihood(model, MAPS)) == list(expected)
    assert proposed(model, MAPS, criterion="tlc").ranks == pytest.approx(expected, rel=1e-9)


def test_no_data_are_needed_where_every_activation_has_a_batch_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.GELU()
    )
    model = drawn(model).train()
    assert measure_error_likelihood(model) == pytest.approx(
        {"2": likelihood_after(model[1]), "5": likelihood_after(model[4])}, rel=1e-12
    )
    assert model.training
    bad = [torch.full_like(MAPS[0], float("nan"))]
    assert measure_error_likelihood(model, bad) == measure_error_likelihood(model)


def test_nothing_but_counts_is_measured_in_a_run_where_every_activation_has_a_batch_norm():
    def measured(model: nn.Module, **options) -> bool:
        worker = Linearize(order=Order("tlc"), **options).worker(Measuring())
        worker.start(model, isolated_sites(model))
        with torch.no_grad():
            model(MAPS[0])
        counts = worker.counts()
        worker.stop()
        return any("affine" in count for count in counts.values())

    def net(activation: nn.Module) -> nn.Module:
        return drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation))

    assert not measured(net(nn.ReLU()))
    assert not measured(net(nn.ReLU()), stand_in="on_off")
    assert measured(net(nn.GELU()), stand_in="on_off")
    assert measured(net(nn.ReLU()), stand_in="affine")
    assert measured(drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())))


def test_a_batch_norm_without_scale_and_shift_tells_nothing():
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()))
    assert measure_error_likelihood(model) == {"2": 0.5}


def test_a_scale_of_zero_leaves_no_doubt_unless_the_shift_is_zero_too():
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
        model[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    assert measure_error_likelihood(model)["2"] == pytest.approx(likelihood([0, 1, -1, 2], [0, 0, 0, 2]), rel=1e-12)


def test_channels_of_tokens_are_measured_on_their_axis_and_a_given_axis_counts():
    torch.manual_seed(0)
    tokens = [torch.randn(5, 6, 3).double() for _ in range(2)]
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU()).double()
    values = pre_activations(model, tokens)["1"]
    assert measure_error_likelihood(model, tokens)["1"] == pytest.approx(likelihood_of(values, -1), rel=1e-9)
    normed = drawn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    values = pre_activations(normed, MAPS)["2"]
    given = measure_error_likelihood(normed, MAPS, neuron_dim={"*": -1})
    assert given["2"] == pytest.approx(likelihood_of(values, -1), rel=1e-9)


def test_what_is_called_twice_is_measured():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.block = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(self.norm(self.fc(x))))

    model, vectors = drawn(Twice()), [torch.randn(20, 3).double()]
    values = pre_activations(model, vectors)
    expected = {name: likelihood_of(value) for name, value in values.items()}
    assert measure_error_likelihood(model, vectors) == pytest.approx(expected, rel=1e-9)


class Rare(nn.Module):
    """The first activation hardly switches, and lies near zero; the second switches often in a channel far from it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(1), nn.BatchNorm1d(1)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.acts[0](self.norms[0](x[:, :1])) + self.acts[1](self.norms[1](x[:, 1:]))


def test_it_is_another_order_than_that_of_entropy():
    model = Rare().double().eval()
    with torch.no_grad():
        model.norms[0].bias.fill_(0.5)
        model.norms[1].bias.fill_(2.0)
    skewed = torch.tensor([[0.0, -3.0]] * 5 + [[0.0, 3.0]] * 5, dtype=torch.float64)
    by_entropy, by_likelihood = measure_entropy(model, [skewed]), measure_error_likelihood(model)
    assert by_entropy == {"acts.0": 0.0, "acts.1": 1.0}
    assert by_likelihood["acts.1"] < by_likelihood["acts.0"]
    for options, first in (({}, "acts.0"), ({"criterion": "tlc"}, "acts.1")):
        ranks = proposed(model, [skewed], **options).ranks
        assert Linearize().select(ranks, 1) == [first]


def made(model: nn.Module, batches: list[Tensor], name: str, **options) -> AffineFit:
    """Return the affine that is proposed for an activation."""
    return AffineFit(**proposed(model, batches, stand_in="on_off", **options).operations[name]["affines"][name])


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(4, 0.3)], ids=lambda it: type(it).__name__
)
def test_the_stand_in_is_the_activation_where_channels_do_not_switch(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 3)).double().eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([90.0, -90.0, -90.0, 90.0]))
    expected = model(MAPS[0])
    linearize(model, ["1"], stand_in="affine", statistics={"1": made(model, MAPS, "1")}, shift_padding=False)
    torch.testing.assert_close(model(MAPS[0]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criterion", ["entropy", "linearity", "tlc"])
def test_a_channel_is_on_where_it_is_more_often_on_or_its_mean_is(criterion):
    model = nn.Sequential(nn.Identity(), nn.ReLU()).double()
    z = torch.tensor([[-1.0, 1.0, 0.0, -1.0]] * 3 + [[9.0, -9.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    affine = made(model, [z], "1", criterion=criterion)
    expected = [1.0, 0.0, 0.0, 0.0] if criterion == "tlc" else [0.0, 1.0, 0.0, 0.0]
    assert affine.scale.tolist() == expected
    assert affine.offset.tolist() == [0.0] * 4


def test_the_shift_of_a_batch_norm_tells_which_channels_are_on():
    model = drawn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        model[1].running_mean.copy_(50 * model[1].weight.sign() * model[1].bias.sign())  # the data say the contrary
        model[1].running_mean[3] = 0
    assert made(model, MAPS, "2", criterion="tlc").scale.tolist() == (model[1].bias > 0).double().tolist()
    assert made(model, MAPS, "2").scale.tolist()[:3] == (model[1].bias <= 0).double().tolist()[:3]


def test_where_an_activation_is_not_linear_on_a_side_the_closest_affine_is_taken():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1), nn.ELU()).double()
    nn.init.uniform_(model[2].bias, -1, 1)
    closest = measure_affines(model, MAPS)
    assert torch.equal(made(model, MAPS, "1").scale, closest["1"].scale)
    elu, values = made(model, MAPS, "3"), pre_activations(model, MAPS)["3"]
    on = (values > 0).sum((0, 2, 3)) > (values < 0).sum((0, 2, 3))
    assert 0 < on.sum() < 4
    assert torch.equal(elu.scale, torch.where(on, 1.0, closest["3"].scale))
    assert torch.equal(elu.offset, torch.where(on, 0.0, closest["3"].offset))


def test_the_affine_is_trained_where_that_is_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    operations = proposed(model, [torch.randn(9, 3).double()], stand_in="on_off", trainable=True).operations
    change = from_plain(operations["1"]).apply(model)
    assert change.joined == ["1"]
    assert {"1.weight", "1.bias"} <= {name for name, _ in model.named_parameters()}


def test_a_rank_is_the_likelihood_per_multiply_accumulate_saved():
    layers = []
    for width, wide in ((6, 48), (6, 24)):
        layers += [nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, width), nn.Tanh()]
    model, vectors = drawn(nn.Sequential(*layers)), [torch.randn(16, 6).double()]
    for options in ({}, {"mergeable_only": True}):
        ranks = proposed(model, vectors, criterion="tlc", gain="macs", **options).ranks
        assert ranks == pytest.approx(
            {
                "2": likelihood_after(model[1]) / ((2 * 6 * 48 - 36) * 16),
                "7": likelihood_after(model[6]) / ((2 * 6 * 24 - 36) * 16),
            }
        )


def test_that_of_a_chain_is_the_sum_over_its_activations():
    model = inverted()
    maps = [torch.randn(16, 12, 9, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    each = measure_error_likelihood(model)
    found = proposed(model, maps, most=2, fit=True, criterion="tlc")
    assert {"2", "11"} <= fits(found).keys()
    assert found.ranks["2"] == pytest.approx(each["2"] + each["5"], rel=1e-9)
    assert found.ranks["5"] == pytest.approx(each["5"], rel=1e-9)
    assert FitChains(order=Order("tlc"), stand_in="on_off").needs_moments


def test_what_is_not_finite_has_no_rank_and_is_never_put_into_a_model():
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()))
    vectors = [torch.randn(8, 3).double()]
    with torch.no_grad():
        model[1].weight.fill_(math.inf)
    assert list(proposed(model[:3], vectors).ranks) == ["1"]
    assert list(proposed(model[:3], vectors, stand_in="on_off").ranks) == []
    with torch.no_grad():
        model[1].weight.fill_(0.5)
        model[3].weight[0] = math.nan
    with pytest.warns(
        UserWarning, match=r"\['4'\] have no likelihood: scales or shifts of the batch norms before them"
    ):
        assert list(measure_error_likelihood(model, vectors)) == ["1"]
    assert list(proposed(model, vectors, criterion="tlc", stand_in="on_off").ranks) == ["1"]


def test_a_batch_norm_that_is_not_finite_any_more_after_the_measurement_gives_no_rank():
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    worker = Linearize(order=Order("tlc")).worker(Measuring())
    worker.start(model, isolated_sites(model))
    with torch.no_grad():
        model(torch.randn(8, 3).double())
    worker.finish()
    assert list(worker.propose(model, ["2"]).ranks) == ["2"]
    nn.init.constant_(model[1].weight, math.nan)
    assert worker.propose(model, ["2"]).ranks == {}


def test_sums_that_overflow_are_told_and_have_no_rank():
    model = nn.Sequential(nn.Identity(), nn.ReLU()).double()
    with pytest.warns(UserWarning, match=r"\['1'\] have no mean and deviation: sums over their values overflow"):
        ranks = proposed(model, [torch.tensor([[1e200], [-1e200]], dtype=torch.float64)], criterion="tlc").ranks
    assert ranks == {}


def test_bad_input_is_named_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"`batches` to be given, since no batch norm lies right before \['1'\], .*got None"
    ):
        measure_error_likelihood(model)
    with pytest.raises(ValueError, match=r"`model` to call at least one rectifier, but none was found in Linear"):
        measure_error_likelihood(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`neuron_dim` to hold globs that match activations, but 'x' matches none"):
        measure_error_likelihood(model[2:], neuron_dim={"x": 1})
    with pytest.raises(ValueError, match=r"`model` to have weights"):
        measure_error_likelihood(nn.Sequential(nn.BatchNorm1d(2, device="meta"), nn.ReLU()))
    with pytest.raises(ValueError, match=r"`criterion` to be one of .*'tlc'.*but got 'TLC'"):
        Order("TLC")
    with pytest.raises(ValueError, match=r"`stand_in` to be one of .*'on_off'.*but got 'on-off'"):
        Linearize(stand_in="on-off")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Linearize(order=Order("tlc")), r"can't read batch norms for Order\(criterion='tlc'\) .*another criterion"),
        (Linearize(stand_in="on_off"), "can't read slopes for stand_in='on_off' .*Pass stand_in='affine'"),
        (Linearize(stand_in="on_off", trainable=True), "can't train affines .*Pass trainable=False"),
    ],
    ids=["tlc", "on_off", "trained"],
)
def test_parameters_that_are_read_must_not_be_sharded(method, message):
    trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy_lets_parameters_change(trainer, method.needs_whole_parameters)


class Normed(Small):
    """Batch norms before the first two of five rectifiers."""

    def __init__(self, scores: tuple[float, ...] = (0.9,)) -> None:
        super().__init__(scores)
        torch.manual_seed(0)
        widths, layers = [4, 6, 6, 6, 6, 6], []
        for place, (before, after) in enumerate(pairwise(widths)):
            norm = nn.BatchNorm1d(after) if place < 2 else nn.Identity()
            if place < 2:
                nn.init.uniform_(norm.bias, -2, 2)
            layers += [nn.Linear(before, after), norm, nn.PReLU() if place == 3 else nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(6, 2))


def test_a_run_removes_in_that_order_and_puts_it_in_place(tmp_path):
    model, callback, _ = run(tmp_path, model=Normed(), pruning={"criterion": "tlc", "stand_in": "on_off"}, epochs=4)
    assert len(callback.removed) == 3
    for name in callback.removed:
        stand_in = model.get_submodule(name)
        slopes = {0.0 if isinstance(stand_in.activation, nn.ReLU) else stand_in.activation.weight.item(), 1.0}
        assert {round(value, 6) for value in stand_in.weight.tolist()} <= {round(value, 6) for value in slopes}
        assert stand_in.bias.tolist() == [0.0] * 6
