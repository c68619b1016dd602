import copy
import inspect
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_easier import isolate_activations, linearize, measure_entropy
from lightning_easier.activations import isolated_sites, match_names, planned_sites, unwrap
from tests.models import Functional, OptionalArgument, Residual


class RectifierCalls(TorchFunctionMode):
    """Counts rectifier calls while a model runs, without knowing anything of modules."""

    names = frozenset(
        {"relu", "relu_", "relu6", "gelu", "silu", "silu_", "hardswish", "hardswish_", "leaky_relu", "mish"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.inside = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        outermost = self.inside == 0 and getattr(func, "__name__", "") in self.names
        self.count += outermost
        self.inside += outermost
        try:
            with self if outermost else torch._C.DisableTorchFunctionSubclass():  # see what F.relu6 calls, uncounted
                return func(*args, **(kwargs or {}))
        finally:
            self.inside -= outermost


def calls_of(model: nn.Module, *inputs: Tensor) -> int:
    with RectifierCalls() as calls, torch.no_grad():
        model(*inputs)
    return calls.count


@pytest.mark.parametrize(
    "name",
    ["alexnet", "vgg11_bn", "resnet18", "resnet50", "densenet121", "squeezenet1_1", "mobilenet_v3_small",
     "shufflenet_v2_x0_5", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_32"],
)  # fmt: skip
def test_every_rectifier_call_of_real_networks_is_a_site(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    images = torch.randn(1, 3, 224, 224) if name == "vit_b_32" else torch.randn(1, 3, 96, 96)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    calls = calls_of(model, images)
    with torch.no_grad():
        expected = model(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sites = isolate_activations(model)
        assert torch.equal(model(images), expected)
    assert len(sites) == calls
    assert list(model.state_dict()) == keys
    assert set(classes) <= {type(module) for module in model.modules()}
    again = isolate_activations(model)
    assert list(again) == list(sites)
    assert all(again[site] is sites[site] for site in sites)
    assert [site.name for site in planned_sites(torchvision.models.get_model(name, num_classes=10))] == list(sites)


def test_torchvision_resnet18_has_17_readable_names_in_execution_order():
    names = list(isolate_activations(torchvision.models.resnet18()))
    assert len(names) == 17
    assert names[:5] == ["relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu", "layer1.1.relu_1"]
    assert names[-1] == "layer4.1.relu_1"


def test_functional_spellings_become_modules_with_their_arguments():
    model = Functional()
    sites = isolate_activations(model)
    assert {name: repr(module) for name, module in sites.items()} == {
        "relu": "ReLU(inplace=True)",
        "relu_1": "ReLU()",
        "gelu": "GELU(approximate='tanh')",
        "leaky_relu": "LeakyReLU(negative_slope=0.3)",
        "relu_2": "ReLU()",
        "relu_3": "ReLU(inplace=True)",
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("isolated_in_training", [True, False])
def test_a_forward_that_reads_the_mode_still_does(training, isolated_in_training):
    model = Functional().double()
    reference = copy.deepcopy(model).train(training)
    isolate_activations(model.train(isolated_in_training))
    model.train(training)
    x = torch.randn(7, 6, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = reference(x)
        torch.manual_seed(seed)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [Functional, Residual, OptionalArgument])
def test_an_isolated_model_is_copied_pickled_cast_and_compiled_as_before(make):
    model = make().eval()
    x = torch.randn(2, 4, 5, 7) if make is Residual else torch.randn(2, model.fc.in_features)
    isolate_activations(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = [twin, pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert all(torch.equal(other(x), expected) for other in (*loaded, exported, compiled))
    assert all(list(isolate_activations(other)) == list(isolate_activations(model)) for other in loaded)
    for parameter in model.parameters():  # the copies are independent
        parameter.data.zero_()
    assert all(torch.equal(other(x), expected) for other in loaded)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.half()(x.half()).dtype == torch.float16


def test_keeps_the_signature_and_both_ways_of_an_optional_argument():
    model = OptionalArgument()
    reference = copy.deepcopy(model)
    isolate_activations(model)
    x, shortcut = torch.randn(3, 4), torch.randn(3, 4)
    assert inspect.signature(model.forward) == inspect.signature(reference.forward)
    for args, kwargs in (((x,), {}), ((x, shortcut), {}), ((x,), {"shortcut": shortcut}), ((x,), {"scale": 2.0})):
        assert torch.equal(model(*args, **kwargs), reference(*args, **kwargs))


def test_arguments_that_no_recording_covers_fail_loudly_once_the_activation_is_linear():
    model = OptionalArgument()
    linearize(model, ["relu"])
    x = torch.randn(3, 4)
    assert torch.equal(model(x, torch.ones(3, 4)), model.fc(x) + 1)
    with pytest.raises(RuntimeError, match=r"the default of \['scale'\].*`relu` was replaced"):
        model(x, scale=2.0)


def test_one_module_under_two_names_becomes_two_sites_with_shared_parameters():
    shared = nn.PReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    keys = list(model.state_dict())
    sites = isolate_activations(model)
    assert list(sites) == ["1", "3"]
    assert sites["1"] is not sites["3"]
    assert sites["1"].weight is sites["3"].weight
    assert list(model.state_dict()) == keys


class WithBlock(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return F.relu(x)


class Branching(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class Remembering(nn.Module):
    def forward(self, x):
        self.last = x
        return F.relu(x)


class MakesConstant(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.ones(3))


class Variadic(nn.Module):
    def forward(self, *inputs):
        return F.relu(inputs[0])


class ParametricTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(self.act(x) - 1)


class Filling(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x
        return F.relu(x)


class Drawing(nn.Module):
    def forward(self, x):
        random.random()
        return F.relu(x)


class AskingForGradients(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.is_grad_enabled() else F.relu(x) * 2


class AskingForType(nn.Module):
    def forward(self, x):
        return F.relu(x) if isinstance(x, Tensor) else F.relu(x[0])


class Overridden(nn.Module):
    def __init__(self):
        super().__init__()
        self.forward = lambda x: F.relu(x) * 3

    def forward(self, x):
        return F.relu(x)


class FusedInEval(nn.Module):
    """Stands for itself: see test_what_a_recording_would_lose."""

    def __new__(cls):
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=nn.ReLU(), batch_first=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithBlock, "changes the autograd or autocast mode"),
        (Branching, "control flow"),
        (Remembering, r"changes `self\.last`"),
        (Filling, r"changes `self\.cache`"),
        (Drawing, "draws random numbers in Python"),
        (AskingForGradients, "asks whether gradients are enabled"),
        (AskingForType, "asks for the type of a value"),
        (Overridden, "was replaced on the instance"),
        (FusedInEval, "fused path"),
        (MakesConstant, "makes constant tensors"),
        (Variadic, "variable number of arguments"),
        (ParametricTwice, "has a parameter and is called several times"),
    ],
)
def test_what_a_recording_would_lose_is_left_alone_and_named(make, reason):
    model = nn.Sequential(make(), nn.ReLU())
    reference = copy.deepcopy(model)
    contents = copy.copy(vars(model[0]).get("cache"))
    attributes = set(vars(model[0]))
    with pytest.warns(UserWarning, match=f"`0`: .*{reason}.*of its own"):
        sites = isolate_activations(model)
    assert list(sites) == (["0.act", "1"] if make is ParametricTwice else ["1"])
    assert set(vars(model[0])) == attributes
    assert vars(model[0]).get("cache") == contents
    x = torch.randn(2, 4 if make is FusedInEval else 3, requires_grad=True)
    if make is FusedInEval:
        x = x.unsqueeze(1)
    assert torch.equal(model(x), reference(x))


class Scaled(nn.Module):
    """Reads plain attributes, works in place on a tensor with two names, and passes a child its input by keyword."""

    def __init__(self):
        super().__init__()
        self.alpha, self.unread = 2.0, 0
        self.act = nn.ReLU()

    def forward(self, x):
        y = x * self.alpha
        skip = y
        y += 1
        return self.act(input=F.relu(y) - 0.5) + self.act(input=skip)


def test_attributes_that_a_forward_reads_and_in_place_operators_keep_their_effect():
    model, reference = Scaled(), Scaled()
    assert list(isolate_activations(model)) == ["relu", "act", "act_1"]
    x = torch.randn(50)
    assert torch.equal(model(x), reference(x))
    model.alpha = reference.alpha = -3.0
    model.unread = 1
    assert torch.equal(model(x), reference(x))
    linearize(model, ["act_1"])
    with pytest.raises(RuntimeError, match=r"its attributes \['alpha'\] as they were: its activation `act_1`"):
        model(x)
    model.alpha = 2.0
    assert torch.equal(model(x), torch.relu(torch.relu(x * 2 + 1) - 0.5) + (x * 2 + 1))


class OwnForward(nn.Sequential):
    def forward(self, x):
        return F.gelu(super().forward(x))


def test_a_sequential_with_a_forward_of_its_own_is_looked_at():
    assert list(isolate_activations(OwnForward(nn.Linear(2, 2), nn.ReLU()))) == ["1", "gelu"]


class MatrixProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 3, 1), torchvision.models.convnext.LayerNorm2d(3), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return F.gelu(x.flatten(2).transpose(1, 2) @ self.weight)


def test_the_neuron_axis_behind_matrix_products_and_norms_that_permute():
    assert [(site.name, site.neuron_dim) for site in isolated_sites(MatrixProduct())] == [("act", 1), ("gelu", -1)]


class Convolutional(nn.Module):
    """A convolution map, then tokens, then channels last, each with a rectifier behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.act1 = nn.Conv2d(2, 3, 1), nn.ReLU()
        self.fc1, self.act2 = nn.Linear(3, 5), nn.GELU()
        self.norm, self.act3 = nn.BatchNorm1d(7), nn.ReLU()

    def forward(self, x):
        x = self.act1(self.conv(x)).flatten(2).transpose(1, 2)
        return self.act3(self.norm(self.act2(self.fc1(x))))


def test_the_neuron_axis_is_that_of_the_layer_before():
    sites = isolated_sites(Convolutional())
    assert [(site.name, site.neuron_dim) for site in sites] == [("act1", 1), ("act2", -1), ("act3", 1)]
    entropies = measure_entropy(Convolutional(), [torch.randn(2, 2, 7, 1)])
    assert list(entropies) == ["act1", "act2", "act3"]


def test_bad_models_are_refused_or_unwrapped():
    with pytest.raises(TypeError, match="but got list"):
        isolate_activations([nn.ReLU()])
    with pytest.raises(TypeError, match="ScriptModule"):
        isolate_activations(torch.jit.script(nn.Sequential(nn.ReLU())))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert unwrap(torch.compile(model)) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert isolate_activations(torch.compile(model)) == {"1": model[1]}


def test_planning_touches_nothing():
    model = Residual()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert [site.name for site in planned_sites(model)] == ["relu", "relu_1"]
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert list(dict(model.named_modules())) == ["", "conv1", "bn1", "conv2", "relu"]


def test_globs_select_names_and_one_that_matches_nothing_is_an_error():
    names = ["a.relu", "a.relu_1", "b.relu"]
    assert match_names(names, None, None) == names
    assert match_names(names, ["a.*"], ["*_1"]) == ["a.relu"]
    for argument in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=f"`{argument}` to hold globs that match activations, but 'c.*' matches none"
        ):
            match_names(names, **{"include": None, "exclude": None, argument: ["c.*"]})
