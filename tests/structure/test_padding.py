"""A padding moves to the operator before where that makes their merge exact, and comes back with the activation."""

import copy
import pickle
from itertools import permutations

import pytest
import torch
from torch import nn

from lightning_easier import collapse, fit_chains, isolate_activations, linearize, restore
from lightning_easier.structure.linearize import bypass, restructure_as_marked, stand_ins
from tests.models import randomize_batch_norms
from tests.sites.test_dataflow import Net

DTYPE = torch.float64


def make(*options):
    """Convolutions with a batch norm and a rectifier after each but the last; channels 2, 3, 4, ..."""
    torch.manual_seed(0)
    modules = []
    for number, kwargs in enumerate(options):
        channels = 2 + number
        modules += [nn.Conv2d(channels, channels + 1, **kwargs), nn.BatchNorm2d(channels + 1), nn.ReLU()]
    return randomize_batch_norms(nn.Sequential(*modules[:-2])).to(DTYPE).eval()


def paddings(model):
    return [module.padding for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]


SECOND = {"kernel_size": 3, "padding": (1, 2), "dilation": (1, 2)}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 1)])
def test_a_moved_padding_makes_the_merge_exact(stride, kernel):
    first = {"kernel_size": kernel, "stride": stride, "padding": (0, kernel[1] // 2)}
    x = torch.randn(2, 2, 11, 14, dtype=DTYPE)
    refused = collapse(linearize(make(first, SECOND), ["2"], shift_padding=False), x, objective="depth").report
    assert "sees zeros where the first" in refused.refusals[-1].reason

    model = make(first, SECOND)
    shape = model(x).shape
    linearize(model, ["2"], shift_padding=True)
    assert paddings(model) == [(stride * 1, kernel[1] // 2 + stride * 2), (0, 0)]
    assert model(x).shape == shape
    result = collapse(model, x, objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("0", "3")]
    assert result.report.relative_difference < 1e-12
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert paddings(restore(twin)) == [(0, kernel[1] // 2), (1, 2)]
    assert paddings(model)[1] == (0, 0)
    restored = restore(model)
    assert paddings(restored) == [(0, kernel[1] // 2), (1, 2)]
    assert torch.equal(restored(x), make(first, SECOND)(x))


CHAIN = [{"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 1}, {"kernel_size": 3, "padding": "same"},
         {"kernel_size": 3, "padding": 2}]  # fmt: skip


@pytest.mark.parametrize("order", list(permutations(["2", "5", "8"])))
def test_in_a_chain_the_padding_moves_on_to_the_head_in_whatever_order(order):
    model = make(*CHAIN)
    for name in order:
        linearize(model, [name], shift_padding=True)
    assert paddings(model) == [(1 + 2 * (0 + 1 + 2),) * 2, (0, 0), (0, 0), (0, 0)]
    x = torch.randn(1, 2, 9, 12, dtype=DTYPE)
    result = collapse(model, x, objective="depth")
    assert [merge.operators for merge in result.report.merges][-1] == ("0", "3", "6", "9")
    assert result.report.relative_difference < 1e-12

    loaded = make(*CHAIN)
    loaded.load_state_dict(dict(model.state_dict()), strict=False)
    assert restructure_as_marked(loaded, model.state_dict())[0].keys() == {"2", "5", "8"}
    loaded.load_state_dict(model.state_dict())
    assert paddings(loaded) == paddings(model)
    assert torch.equal(loaded(x), model(x))

    restore(model, ["5"])  # two chains of two
    assert paddings(model) == [(1 + 2 * 0,) * 2, (0, 0), (1 + 2,) * 2, (0, 0)]
    assert paddings(restore(model)) == paddings(make(*CHAIN))
    with pytest.raises(ValueError, match="to carry the mark.*shifts_padding=False.*shifts_padding=True"):
        linearize(make(*CHAIN), list(order), shift_padding=False).load_state_dict(loaded.state_dict())


class Held(nn.Module):
    """A network inside of a module, as LightningModules hold one."""

    def __init__(self, model):
        super().__init__()
        self.model = nn.ModuleList([model])

    def forward(self, x):
        return self.model[0](x)


@pytest.mark.parametrize("stand_in", ["identity", "fitted"])
def test_a_part_that_holds_all_that_was_changed_is_a_model_of_its_own(stand_in):
    x = torch.randn(4, 2, 9, 12, dtype=DTYPE)
    outer = Held(make(*CHAIN))
    statistics = fit_chains(outer, [x], include=["model.0.5"]) if stand_in == "fitted" else None
    linearize(outer, ["model.0.5"], stand_in=stand_in, statistics=statistics)
    expected, inner = outer(x), outer.model[0]
    result = collapse(inner, x, objective="depth")
    assert (result.model(x) - expected).norm() < 1e-12 * expected.norm()
    assert len(paddings(result.model)) == len(CHAIN) - 1
    assert torch.equal(outer(x), expected)
    restore(inner)
    assert torch.equal(outer(x), Held(make(*CHAIN))(x))


def test_a_part_that_lacks_some_of_it_is_refused_and_stays():
    model = make(*CHAIN)
    outer = nn.Sequential(model[:6], model[6:])
    linearize(outer, ["0.5"])
    x = torch.randn(4, 2, 9, 12, dtype=DTYPE)
    expected = outer(x)
    with pytest.raises(ValueError, match="whole model.*'5' became linear.*Pass the model that they are in"):
        restore(outer[0])
    assert torch.equal(outer(x), expected)
    restore(outer)
    assert paddings(outer) == paddings(make(*CHAIN))


def test_a_part_whose_padding_went_on_beyond_it_is_refused_and_stays():
    model = make(*CHAIN)
    outer = nn.Sequential(*model[:3], model[3:])
    linearize(outer, ["2", "3.5"])  # names go on in a slice
    before = paddings(outer)
    with pytest.raises(ValueError, match="whole model.*others now.*Pass the model that it is in"):
        restore(outer[3])
    assert paddings(outer) == before
    assert paddings(restore(outer)) == paddings(make(*CHAIN))


def test_an_operator_whose_padding_was_moved_is_not_taken_out_alone():
    model = linearize(make(*CHAIN), ["2"])
    before = paddings(model)
    with pytest.raises(ValueError, match="'2' became linear \\['3'\\] were changed, too. Restore '2' first"):
        bypass(model, ["3"])
    assert paddings(model) == before
    assert paddings(restore(model)) == paddings(make(*CHAIN))


def conv(kernel=3, padding=1, **options):
    return nn.Conv2d(2, 2, kernel, padding=padding, **options)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(conv(), nn.ReLU(), conv(padding_mode="reflect")),
        nn.Sequential(conv(padding_mode="circular"), nn.ReLU(), conv()),
        nn.Sequential(conv(), nn.ReLU(), conv(kernel=2, padding="same")),
        nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), conv()),
        nn.Sequential(conv(), nn.ReLU(), nn.ConvTranspose2d(2, 2, 3, padding=1)),
        nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
        Net(lambda s, x: s.b(s.act(s.a(x) + x)), a=conv(), act=nn.ReLU(), b=conv()),
        Net(lambda s, x: s.b(s.act(y := s.a(x))) + y, a=conv(), act=nn.ReLU(), b=conv()),
        Net(lambda s, x: s.a(s.act(s.a(x))), a=conv(), act=nn.ReLU()),
    ],
)
def test_where_no_merge_would_follow_the_paddings_stay(model):
    before = paddings(model)
    (name,) = isolate_activations(model)
    linearize(model, [name], shift_padding=True)
    assert paddings(model) == before
    assert stand_ins(model)[name].shift is None


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_numbers_of_axes(dimensions):
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    layers = [convolution(2, 3, 3, padding=1), nn.ReLU(), convolution(3, 2, 3, padding=1, groups=1)]
    model = linearize(nn.Sequential(*layers).to(DTYPE), ["1"], shift_padding=True)
    result = collapse(model, torch.randn(2, 2, *(5, 7, 6)[:dimensions], dtype=DTYPE), objective="depth")
    assert len(result.report.merges) == 1
    assert paddings(result.model) == [(2,) * dimensions]
