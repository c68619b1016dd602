"""Activations are known by their class or their values; gates are among them only where they are asked for."""

import copy
import pickle
import random

import pytest
import timm.layers.activations as timm_activations
import timm.layers.activations_me as timm_memory_efficient
import torch
import torch.nn.functional as F
from torch import nn

from lightning_easier import isolate_activations, linearize, measure_entropy, restore
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.sites.rectifiers import GATES, RECTIFIERS, activation_kind


class Formula(nn.Module):
    """An activation of somebody's own, written out."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return F.relu(x)


class Noisy(nn.Module):
    def forward(self, x):
        return F.relu(x) if random.random() < 2 else x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return F.relu(x) + y


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.relu(x * self.scale)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        *((cls(), "rectifier") for cls in RECTIFIERS),
        *((cls(-1) if cls is nn.Softmax else cls(), name) for name, cls in GATES.items()),
        *((getattr(timm_activations, name)(), "rectifier")
          for name in ("Swish", "Mish", "HardSwish", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU")),
        *((getattr(timm_memory_efficient, name)(), "rectifier") for name in ("SwishMe", "MishMe", "HardMishMe")),
        *((getattr(timm_activations, name)(), name.lower()) for name in ("Sigmoid", "Tanh", "HardSigmoid")),
        (Formula(lambda x: x.clamp(min=0)), "rectifier"),
        (Formula(lambda x: x.clamp(0, 6)), "rectifier"),
        (Formula(lambda x: torch.where(x > 0, x, 0.1 * x)), "rectifier"),
        (Formula(lambda x: x**2), None),
        (Formula(lambda x: x * 1.0), None),
        (Formula(lambda x: 2 * F.relu(x)), None),  # the identity would be at another scale
        (Formula(lambda x: F.relu(x) ** 2), None),
        (Formula(lambda x: F.relu(x - x.mean())), None),  # not each number by itself
        (Formula(lambda x: x if x.sum() < 1e9 and x.numel() > 40 else F.relu(x)), None),
        (Formula(lambda x: F.relu(x) if torch.is_grad_enabled() else x), None),
        (Formula(lambda x: x[:, 0]), None),
        (Formula(lambda x: F.relu(F.relu(x) - 0.5)), None),  # two of them
        (Counting(), None),
        (Noisy(), None),
        (TwoInputs(), None),
        (Weighted(), None),
        (nn.Linear(2, 2), None),
        (nn.Dropout(), None),
        (nn.Identity(), None),
        (nn.LayerNorm(3), None),
    ],
    ids=str,
)  # fmt: skip
def test_an_activation_is_known_by_its_class_or_its_values(module, kind):
    before, states = dict(vars(module)), random.getstate()
    assert activation_kind(module) == kind
    assert vars(module) == before
    if not isinstance(module, Noisy):
        assert random.getstate() == states


def test_a_class_of_ones_own_is_one_site_whatever_it_calls_inside():
    model = nn.Sequential(nn.Linear(3, 4), timm_activations.GELU(), nn.Linear(4, 4), timm_activations.Mish())
    x = torch.randn(5, 3)
    expected = model(x)
    assert list(isolate_activations(model)) == ["1", "3"]
    assert torch.equal(model(x), expected)
    linearize(model, ["1", "3"])
    assert torch.allclose(model(x), model[2](model[0](x)))


class Parametric(nn.Module):
    """A slope used through a function, a method, and a module that is called three times."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.slope = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        self.act = nn.PReLU(4)

    def forward(self, x):
        x = F.prelu(self.fc(x), self.slope)
        x = (x - 0.5).prelu(weight=self.slope)
        x = self.act(self.act(x) - 0.5)
        return self.act(x + 0.1)


def test_each_use_of_a_trainable_slope_is_a_site_and_the_parameter_keeps_its_name():
    model, reference = Parametric().double(), Parametric().double()
    reference.load_state_dict(model.state_dict())
    names = list(dict(model.named_parameters()))
    sites = isolated_sites(model)
    assert [site.name for site in sites] == ["prelu", "prelu_1", "act_call", "act_call_1", "act_call_2"]
    assert {site.neuron_dim for site in sites} == {-1}
    x = torch.randn(7, 4, dtype=torch.float64)
    assert torch.equal(model(x), reference(x))
    model(x).sum().backward()
    reference(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert list(model.state_dict()) == list(reference.state_dict())
    assert list(dict(model.named_parameters())) == names
    assert list(measure_entropy(model, [x])) == [site.name for site in sites]

    linearize(model, ["prelu", "act_call_1"])
    z = model.fc(x) - 0.5
    z = F.prelu(F.prelu(z, model.slope), model.act.weight) - 0.5
    assert torch.allclose(model(x), F.prelu(z + 0.1, model.act.weight))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(restore(model)(x), reference(x))


class SharedWithOwnParameters(nn.Module):
    class Scaled(nn.PReLU):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.act = self.Scaled()

    def forward(self, x):
        return self.act(self.act(x) - 1)


def test_a_parametric_class_of_ones_own_that_is_called_twice_is_named():
    model = nn.Sequential(SharedWithOwnParameters())
    with pytest.warns(UserWarning, match="`0`: `act` has a parameter and is called several times; its calls count as"):
        assert list(isolate_activations(model)) == ["0.act"]


class Random(nn.Module):
    def __init__(self, training=None):
        super().__init__()
        self.fixed = training

    def forward(self, x):
        x = F.rrelu(x, 0.2, 0.4, training=self.training if self.fixed is None else self.fixed)
        return torch.rrelu(x - 0.5, 0.1, 0.3, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_randomized_rectifier_follows_the_mode(training):
    model, reference = nn.Sequential(Random()).train(training), Random().train(training)
    assert list(isolate_activations(model)) == ["0.rrelu", "0.rrelu_1"]
    x = torch.randn(50)
    torch.manual_seed(1)
    expected = reference(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_a_randomized_rectifier_that_does_not_follow_the_mode_is_named():
    model = nn.Sequential(Random(training=True))
    with pytest.warns(UserWarning, match="`0`: it calls `rrelu` with a `training` that is not the module's own mode"):
        assert list(isolate_activations(model)) == []


class Gated(nn.Module):
    """A gate in every spelling, rectifiers between."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.gate = nn.Linear(4, 4), nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        x = self.relu(self.fc(x))
        x = self.relu(x - 0.3) * self.gate(x)
        x = x * torch.sigmoid(x) + x.sigmoid() + F.hardsigmoid(x) + F.hardtanh(x, -2, 2) + F.softsign(x)
        x = F.softmax(x, dim=-1) + torch.softmax(x, 0) + x.softmax(dim=-1) + torch.tanh(x) + F.tanh(x) + x.tanh()
        return F.relu(x)


RECTIFIER_NAMES = ["relu", "relu_1", "relu_2"]
SIGMOID_NAMES = ["relu", "relu_1", "gate", "sigmoid", "sigmoid_1", "relu_2"]


@pytest.mark.parametrize(
    ("gates", "names"),
    [
        (False, RECTIFIER_NAMES),
        ("sigmoid", SIGMOID_NAMES),
        (["sigmoid"], SIGMOID_NAMES),
        (True, [*SIGMOID_NAMES[:-1], "hardsigmoid", "hardtanh", "softsign", "softmax", "softmax_1", "softmax_2", "tanh",
                "tanh_1", "tanh_2", "relu_2"]),
    ],
)  # fmt: skip
def test_gates_are_sites_only_where_they_are_asked_for(gates, names):
    model = Gated()
    reference = copy.deepcopy(model)
    assert list(isolate_activations(model, gates=gates)) == names
    assert list(isolate_activations(model)) == RECTIFIER_NAMES
    assert list(isolate_activations(model, gates=gates)) == names
    x = torch.randn(6, 4)
    assert torch.equal(model(x), reference(x))
    assert list(measure_entropy(model, [x], gates=gates)) == names


def test_gates_that_are_asked_for_later_leave_what_is_linear_as_it_is():
    model, reference = Gated(), Gated()
    reference.load_state_dict(model.state_dict())
    linearize(model, ["relu_1", "relu_2"])
    first = isolate_activations(model)["relu"]
    linearize(model, ["sigmoid_1"])
    assert list(isolate_activations(model, gates=["sigmoid"])) == ["relu", "gate", "sigmoid"]
    assert isolate_activations(model)["relu"] is first
    x = torch.randn(6, 4)
    y = torch.relu(model.fc(x))
    y = (y - 0.3) * torch.sigmoid(y)
    y = y * torch.sigmoid(y) + y + F.hardsigmoid(y) + F.hardtanh(y, -2, 2) + F.softsign(y)
    y = torch.softmax(y, -1) * 2 + torch.softmax(y, 0) + 3 * torch.tanh(y)
    assert torch.allclose(model(x), y, atol=1e-6)
    assert torch.allclose(pickle.loads(pickle.dumps(model))(x), y, atol=1e-6)
    assert torch.equal(restore(model)(x), reference(x))


class InPlaceGate(nn.Module):
    def forward(self, x):
        return (x + 0).sigmoid_() * F.softmax(x, 0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gate", "reason"), [("sigmoid", "no module of that works in place"), ("softmax", "a `dtype`")]
)
def test_a_gate_that_no_module_computes_is_named(gate, reason):
    with pytest.warns(UserWarning, match=f"`0`: it calls `{gate}.*{reason}"):
        assert isolate_activations(nn.Sequential(InPlaceGate()), gates=[gate]) == {}


def test_an_unknown_gate_is_named():
    with pytest.raises(ValueError, match=r"`gates` to be a bool or to hold names out of \['sigmoid'.*but got 'relu'"):
        isolate_activations(Gated(), gates=["sigmoid", "relu"])
    with pytest.raises(TypeError, match="`gates` to be a bool or names out of .* but got 3"):
        isolate_activations(Gated(), gates=3)
