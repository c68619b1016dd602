"""Channels that are constant whatever the input, or that nothing reads, leave at a collapse, or stay for a reason."""

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lightning_easier import collapse, isolate_activations, linearize
from lightning_easier.collapsing.algebra.slices import without_channels
from lightning_easier.collapsing.exact import trimming
from lightning_easier.collapsing.exact.capture import capture
from lightning_easier.collapsing.exact.channels import ChannelFlow
from lightning_easier.collapsing.exact.constant_branches import ConstantBranch, constant_branches
from lightning_easier.collapsing.exact.dead_channels import DeadChannels
from lightning_easier.measure.affines import AffineFit
from lightning_easier.support import timing
from lightning_easier.support.inference import relative_difference
from lightning_easier.zoo.cifar_resnet import CifarResNet
from tests import clocks
from tests.models import randomize_batch_norms

ASKED_FOR = os.environ.get("COLLAPSE_EXAMPLES")  # new ones, by `make prove`; the suite takes the same ones each time
SETTINGS = settings(
    max_examples=int(ASKED_FOR or 80),
    derandomize=ASKED_FOR is None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


# ---- random networks -----------------------------------------------------------------


class Net(nn.Module):
    """Carries out a list of steps on maps, and ends in a Linear: each step is a name, a layer perhaps, other values."""

    def __init__(self, steps, layers):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        values = [x]
        for kind, layer, others in self.steps:
            read = [values[place] for place in others]
            values.append(STEPS[kind](*(() if layer is None else (self.layers[layer],)), *read))
        return values[-1]


STEPS = {
    "call": lambda layer, x: layer(x),
    "relu": lambda x: F.relu(x),
    "relu_": lambda x: torch.relu_(x * 1.5),
    "gelu": lambda x: F.gelu(x),
    "shift": lambda x: 0.5 - 2 * x,
    "clamp": lambda x: x.clamp(-1, 1),
    "tanh": lambda x: x.tanh(),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: torch.sub(x, y, alpha=0.5),
    "iadd": lambda x, y: (x * 1.0).add_(y),
    "mul": lambda x, y: x * y,
    "cat": lambda x, y: torch.cat([x, y], dim=1),
    "cat_three": lambda x, y: torch.cat((x, y, x), 1),
    "gate": lambda layer, x: x * layer(x).sigmoid(),
    "pad": lambda x: F.pad(x, (1, 1)),
    "stride": lambda x: x[..., ::2],
    "resize": lambda x: F.interpolate(x, scale_factor=2.0),
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.contiguous().view(x.size(0), -1),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "affine": lambda scale, x: x * scale(x),
}


class Scale(nn.Module):
    """Holds a number for each channel."""

    def __init__(self, channels, axes):
        super().__init__()
        self.numbers = nn.Parameter(torch.randn(channels, *[1] * axes))

    def forward(self, x):
        return self.numbers


@st.composite
def networks(draw):
    """Draw a network in float64 with channels that are dead, and the shape of its input."""
    axes = draw(st.sampled_from([2, 1]))
    size = draw(st.sampled_from([7, 6]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = (2, draw(st.sampled_from([3, 1])), *[size, size + 1][:axes])
    layers, steps = [], []
    values = [torch.randn(shape)]

    def pick(*options):
        return draw(st.sampled_from(options))

    def step(kind, layer, *others):
        if layer is not None:
            layers.append(layer.eval())
        made = STEPS[kind](*(() if layer is None else (layer,)), *(values[place] for place in others))
        if made.numel() > 4000 or 0 in made.shape:
            return
        steps.append((kind, None if layer is None else len(layers) - 1, others))
        values.append(made)

    def operator(place, channels=None):
        x = values[place]
        kind = pick(*CONVOLUTIONS[axes - 1 :][:1] * 4, TRANSPOSED[axes - 1])
        inputs = x.shape[1]
        depthwise = channels is None and pick(False, False, True)
        groups = inputs if depthwise else pick(*[n for n in (1, 1, 2, 3) if inputs % n == 0])
        outputs = channels or groups * pick(*((1, 2) if depthwise else (2, 3, 4)))
        if outputs % groups:
            groups = 1
        taps, stride = pick(1, 3, 2), pick(1, 1, 2)
        options = {"stride": stride, "padding": pick(0, 1), "dilation": pick(1, 1, 2), "bias": pick(True, False)}
        if kind in CONVOLUTIONS and stride == 1 and pick(False, False, True):
            options["padding"] = "same"
        if kind in CONVOLUTIONS:
            options["padding_mode"] = pick("zeros", "zeros", "circular")
        return kind(inputs, outputs, taps, groups=groups, **options)

    def attempt(kind, layer, *others):
        try:
            step(kind, layer, *others)
        except (RuntimeError, ValueError):
            return

    for _ in range(draw(st.integers(2, 9))):
        last = len(values) - 1
        x = values[last]
        channels = x.shape[1]
        like = [place for place, value in enumerate(values) if value.shape == x.shape]
        wide = [place for place, value in enumerate(values) if value.shape[2:] == x.shape[2:]]
        kind = pick("operator", "operator", "norm", "act", "pool", "residual", "join", "cat", "gate", "other")
        if kind == "operator":
            attempt("call", operator(last), last)
        elif kind == "norm":
            norms = [(nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1](channels)] * 3
            norms += [(nn.InstanceNorm1d, nn.InstanceNorm2d)[axes - 1](channels, affine=pick(True, False))]
            attempt("call", pick(*norms, nn.GroupNorm(1, channels)), last)
        elif kind == "act":
            layer = pick(nn.ReLU(), nn.PReLU(channels), nn.PReLU(), nn.GELU(), nn.ReLU6(), nn.Sigmoid(), None)
            name = "call" if layer else pick("relu", "relu_", "gelu", "shift", "clamp", "tanh")
            attempt(name, layer, last)
        elif kind == "pool":
            maxima, averages = (nn.MaxPool1d, nn.MaxPool2d)[axes - 1], (nn.AvgPool1d, nn.AvgPool2d)[axes - 1]
            layer = pick(maxima(2), averages(2), maxima(3, 1, 1), averages(3, 2, 1),
                         averages(3, 1, 1, count_include_pad=False))  # fmt: skip
            attempt("call", layer, last)
        elif kind == "residual":
            convolution = CONVOLUTIONS[axes - 1]
            attempt("call", convolution(channels, 4, 3, padding=1, bias=pick(True, False)), last)
            attempt(pick("relu", "tanh"), None, len(values) - 1)
            attempt("call", convolution(values[-1].shape[1], channels, 3, padding=1), len(values) - 1)
            if values[-1].shape == x.shape:
                attempt(pick("add", "iadd"), None, len(values) - 1, last)
        elif kind == "join":
            attempt(pick("add", "sub", "mul"), None, last, pick(*like))
        elif kind == "cat":
            attempt(pick("cat", "cat", "cat_three"), None, last, pick(*wide))
        elif kind == "gate":
            average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1](1)
            layers.append(CONVOLUTIONS[axes - 1](channels, channels, 1))
            attempt("gate", nn.Sequential(average, layers[-1]), last)
        else:
            name = pick("pad", "stride", "resize", "affine")
            attempt(name, Scale(channels, axes) if name == "affine" else None, last)
    end = pick("flatten", "view", "mean", "tokens", "map")
    if end == "mean":
        step("call", (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1](1), len(values) - 1)
        step("flatten", None, len(values) - 1)
    elif end != "map":
        step(end, None, len(values) - 1)
    if end != "map":
        step("call", nn.Linear(values[-1].shape[-1], 5), len(values) - 1)
        step(pick("relu", "gelu"), None, len(values) - 1)
        step("call", nn.Linear(5, 3), len(values) - 1)
    model = randomize_batch_norms(Net(steps, layers)).double().eval()
    with torch.no_grad():
        for layer in layers:
            weight = layer.numbers if isinstance(layer, Scale) else getattr(layer, "weight", None)
            if weight is None:
                continue
            transposed = isinstance(layer, TRANSPOSED)
            outputs = weight.movedim(1, 0) if transposed and layer.groups == 1 else weight
            share = draw(st.sampled_from([0.5, 0.0, 0.3, 1.0]))
            rows = torch.rand(len(outputs)) < share
            outputs[rows] = 0
            bias = getattr(layer, "bias", None)
            if bias is not None and len(bias) == len(rows):
                bias[rows] = draw(st.sampled_from([0.0, 0.7, -0.7])) * torch.arange(1.0, len(rows) + 1)[rows].double()
            if weight.ndim > 1 and draw(st.booleans()):  # some that nobody reads
                weight[:, torch.rand(weight.shape[1]) < 0.4] = 0
    return model, shape


@SETTINGS
@given(networks(), st.sampled_from(["macs", "macs", "depth", "latency"]))
def test_random_networks_with_dead_channels_keep_their_function(case, objective):
    model, shape = case
    note(str(model) + "\n" + str(model.steps))
    state = copy.deepcopy(model.state_dict())
    result = collapse(model, torch.randn(shape, dtype=torch.float64), objective=objective)
    report = result.report
    note(str(report))
    note(str(result.model))
    assert not any("report it" in refusal.reason for refusal in report.refusals)
    assert report.after.macs <= report.before.macs or objective != "macs"
    assert all(each.after < each.before for each in report.trimmed)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for samples in (1, 5):
        x = torch.randn(samples, *shape[1:], dtype=torch.float64)
        with torch.no_grad():
            assert relative_difference(result.model(x), model(x)) <= 1e-9


# ---- rule by rule --------------------------------------------------------------------


def kill(layer, *channels, shift=0.0):
    """Make channels of an operator constant."""
    with torch.no_grad():
        places = (slice(None), list(channels)) if isinstance(layer, TRANSPOSED) else list(channels)
        layer.weight[places] = 0
        if layer.bias is not None:
            layer.bias[list(channels)] = shift * torch.arange(1.0, len(channels) + 1).to(layer.bias)
    return layer


def checked(model, *shape, objective="macs", dtype=torch.float64):
    """Collapse a model, and compare it at another number of samples; return the report and the result."""
    model = model.to(dtype).eval()
    result = collapse(model, torch.randn(shape, dtype=dtype), objective=objective)
    assert not any("report it" in refusal.reason for refusal in result.report.refusals)
    for samples in (shape[0], 1, 5):
        x = torch.randn(samples, *shape[1:], dtype=dtype)
        with torch.no_grad():
            difference = relative_difference(result.model(x), model(x))
        assert difference <= (1e-9 if dtype == torch.float64 else 2e-2)
    return result.report, result.model


def gone(report):
    return {each.operator: (each.before, each.after) for each in report.trimmed}


def reasons(report):
    return "; ".join(f"{'+'.join(each.operators)}: {each.reason}" for each in report.refusals)


def two(first, *between, second=None):
    return nn.Sequential(first, *between, second or nn.Conv2d(6, 3, 3, padding=1))


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU(),), (nn.GELU(), nn.Dropout(0.1)), (nn.PReLU(6),), (nn.PReLU(),), (nn.ReLU(inplace=True),),
        (nn.MaxPool2d(3, 1, padding=1),), (nn.AvgPool2d(3, 2, padding=1),), (nn.AdaptiveAvgPool2d(3),), (nn.Tanh(),),
        (nn.AdaptiveMaxPool2d(2),), (nn.Upsample(scale_factor=2),), (nn.InstanceNorm2d(6),), (nn.ZeroPad2d(1),),
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU6(), nn.MaxPool2d(2)), (nn.Hardtanh(),), (nn.SiLU(),),
    ],
    ids=str,
)  # fmt: skip
def test_channels_of_zeros_leave_through_what_treats_each_channel_alone(between):
    report, _ = checked(two(kill(nn.Conv2d(3, 6, 3), 1, 4), *between), 2, 3, 9, 8)
    assert gone(report) == {"0": (6, 4)}
    assert report.after.macs < report.before.macs
    assert "| 0 | 6 → 4 |" in str(report)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_they_leave_convolutions_of_every_kind(axes, transposed):
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if not transposed:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first, second = (kinds[axes - 1](*sizes, 3, stride=2, padding=1) for sizes in ((3, 6), (6, 4)))
    with torch.no_grad():
        (first.weight.movedim(1, 0) if transposed else first.weight)[:2] = 0
        first.bias[:2] = 0
    report, _ = checked(nn.Sequential(first, nn.ReLU(), second), 2, 3, *[5, 6, 7][:axes])
    assert gone(report) == {"0": (6, 4)}


def test_constants_go_into_the_bias_where_no_padding_lies_between():
    first, second = kill(nn.Conv2d(3, 6, 3), 1, 4, shift=0.7), nn.Conv2d(6, 3, 3, bias=False)
    report, model = checked(two(first, nn.GELU(), second=second), 2, 3, 9, 8)
    assert gone(report) == {"0": (6, 4)}
    assert model.get_submodule("2").bias is not None


@pytest.mark.parametrize("padding", [{"padding": 0}, {"padding": 2, "padding_mode": "circular"}, {"padding": "valid"}])
def test_a_padding_that_repeats_the_map_keeps_constants(padding):
    second = nn.Conv2d(6, 3, 3, **padding)
    report, _ = checked(two(kill(nn.Conv2d(3, 6, 3), 2, shift=0.7), nn.Tanh(), second=second), 2, 3, 9, 8)
    assert gone(report) == {"0": (6, 5)}


@pytest.mark.parametrize("padding", [1, "same"])
def test_one_constant_carries_the_others_where_zeros_are_padded(padding):
    second = nn.Conv2d(6, 3, 3, padding=padding)
    report, _ = checked(two(kill(nn.Conv2d(3, 6, 3), 1, 4, 5, shift=0.7), nn.ReLU(), second=second), 2, 3, 9, 8)
    assert gone(report) == {"0": (6, 4)}
    assert "dead" not in reasons(report)
    single = two(kill(nn.Conv2d(3, 6, 3), 1, shift=0.7), nn.ReLU(), second=second)
    report, _ = checked(single, 2, 3, 9, 8)
    assert not report.trimmed
    assert "0: 1 of its 6 channels are dead, but stay: `2` pads them with zeros" in reasons(report)


def test_constants_that_are_padded_by_a_transposed_convolution_are_carried():
    second = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
    report, _ = checked(two(kill(nn.Conv2d(3, 6, 3), 0, 2, 3, 5, shift=0.7), nn.ReLU(), second=second), 2, 3, 5, 4)
    assert gone(report) == {"0": (6, 4)}


@pytest.mark.parametrize(
    ("between", "leaves"),
    [
        (nn.AvgPool2d(3, 1, padding=1), False), (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), True),
        (nn.AvgPool2d(2, ceil_mode=True), True), (nn.ZeroPad2d(1), False), (nn.MaxPool2d(3, 1, padding=1), True),
        (nn.MaxPool2d(2, 2, padding=1, dilation=3), False), (nn.InstanceNorm2d(6, affine=True), True),
        (nn.AvgPool2d(3, divisor_override=2), False),
    ],
    ids=str,
)  # fmt: skip
def test_a_constant_passes_what_makes_the_same_of_it_at_every_position(between, leaves):
    first = kill(nn.Conv2d(3, 6, 3), 1, shift=0.7)
    report, _ = checked(two(first, nn.Sigmoid(), between, second=nn.Conv2d(6, 3, 1)), 2, 3, 9, 8)
    assert gone(report) == ({"0": (6, 5)} if leaves else {})
    assert leaves or "`3` reads of them depends on the input" in reasons(report)


def test_they_leave_a_linear_after_a_flatten():
    model = nn.Sequential(
        kill(nn.Conv2d(3, 6, 3), 0, 3, shift=0.7), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        kill(nn.Linear(54, 8), 1, 2), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    report, collapsed = checked(model, 2, 3, 8, 8)
    assert gone(report) == {"0": (6, 4), "4": (8, 6)}
    assert collapsed.get_submodule("4").in_features == 36


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = kill(nn.Linear(6, 12), 0, 5, 7, shift=0.7)
        self.down = nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_hidden_neurons_of_a_transformer_leave():
    report, _ = checked(nn.Sequential(Mlp(), Mlp()), 2, 5, 6)
    assert gone(report) == {"0.up": (12, 9), "1.up": (12, 9)}


class Dense(nn.Module):
    """Concatenates, and norms what is concatenated."""

    def __init__(self):
        super().__init__()
        self.first = kill(nn.Conv2d(3, 4, 3, padding=1), 1)
        self.second = kill(nn.Conv2d(4, 5, 3, padding=1), 0, 4)
        self.norm = nn.BatchNorm2d(9)
        self.third = nn.Conv2d(9, 3, 1)

    def forward(self, x):
        x = self.first(x)
        return {"out": self.third(F.relu(self.norm(torch.cat([x, self.second(F.relu(x))], 1)))), "sum": (x.mean(), 1)}


def test_they_leave_concatenations_and_the_norms_of_them():
    model = randomize_batch_norms(Dense()).double().eval()
    with torch.no_grad():
        model.norm.weight[3] = 0  # whatever comes in
    result = collapse(model, torch.randn(2, 3, 6, 7, dtype=torch.float64), objective="macs")
    assert gone(result.report) == {"second": (5, 3)}  # the others are in the mean, too
    x = torch.randn(3, 3, 6, 7, dtype=torch.float64)
    assert relative_difference(result.model(x), model(x)) <= 1e-9
    assert "first: 2 of its 4 channels are dead, but stay: `mean` reads them" in reasons(result.report)


def test_a_batch_norm_without_a_scale_makes_a_channel_dead_whatever_comes_in():
    norm = randomize_batch_norms(nn.BatchNorm2d(6))
    with torch.no_grad():
        norm.weight[:2] = 0
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), norm, nn.ReLU(), nn.Conv2d(6, 2, 1))
    report, _ = checked(model, 2, 3, 6, 7)
    assert gone(report) == {"0": (6, 4)}


def test_an_affine_stand_in_without_a_scale_makes_a_channel_dead():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    fit = AffineFit(torch.tensor([0.0, 1, 2, 0, 3, 1]), torch.arange(6.0), 1, 0.0)
    linearize(model, ["1"], stand_in="affine", statistics={"1": fit})
    report, _ = checked(model, 2, 3, 6, 7)
    assert gone(report) == {"0": (6, 4)}


class Skip(nn.Module):
    def __init__(self, *dead):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.third = nn.Conv2d(6, 2, 3, padding=1)
        for name in dead:
            kill(getattr(self, name), 1, 2)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(F.relu(x))
        return self.third(F.relu(x))


def test_what_is_added_leaves_together():
    report, _ = checked(Skip("first", "second"), 2, 3, 6, 7)
    assert gone(report) == {"first": (6, 4), "second": (6, 4)}
    report, _ = checked(Skip("second"), 2, 3, 6, 7)
    assert not report.trimmed
    assert "second: 2 of its 6 channels are dead, but stay: what `second` reads of them depends on" in reasons(report)
    assert "first" not in reasons(report)


class Join(nn.Module):
    """Joins what two convolutions make, with constants in both."""

    def __init__(self, join, last):
        super().__init__()
        self.first = kill(nn.Conv2d(3, 6, 3), 1, 2, 4, shift=0.7)
        self.second = kill(nn.Conv2d(3, 6, 3), 1, 2, shift=-0.3)
        self.join, self.last = join, last

    def forward(self, x):
        return self.last(F.relu(self.join(self.first(x), self.second(x))))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: x + y, lambda x, y: torch.sub(x, y, alpha=0.5), lambda x, y: torch.add(y, x, alpha=-2),
        lambda x, y: x * y, lambda x, y: torch.maximum(x, y), lambda x, y: x.clone().sub_(y),
        lambda x, y: (2 - x) + y / 3,
    ],
)  # fmt: skip
def test_constants_are_added_and_multiplied(join):
    report, _ = checked(Join(join, nn.Conv2d(6, 2, 1)), 2, 3, 6, 7)
    assert gone(report) == {"first": (6, 4), "second": (6, 4)}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_channel_that_is_read_twice_is_carried_in_both_places(groups):
    model = Join(lambda x, y: torch.cat([x, x], 1), nn.Conv2d(12, 4, 3, padding=1, groups=groups))
    report, _ = checked(model, 2, 3, 6, 7)
    assert gone(report)["first"] == (6, 4)


class Gated(nn.Module):
    """Squeezes and excites."""

    def __init__(self):
        super().__init__()
        self.first = kill(nn.Conv2d(3, 6, 3), 1, 2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.last(F.relu(x * self.excite(F.relu(self.squeeze(self.average(x)))).sigmoid()))


def test_the_gates_of_dead_channels_leave_with_them():
    report, _ = checked(Gated(), 2, 3, 6, 7)
    assert gone(report) == {"first": (6, 4), "excite": (6, 4)}


def inverted(norm_shift=0.0):
    expand, depthwise, project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 2, 1)
    kill(expand, 0, 1, shift=norm_shift)
    return nn.Sequential(expand, nn.ReLU6(), depthwise, nn.ReLU6(), project)


def test_they_leave_depthwise_convolutions():
    report, model = checked(inverted(), 2, 3, 6, 7)  # the bias of the depthwise one goes into the last
    assert gone(report) == {"0": (6, 4), "2": (6, 4)}
    assert model.get_submodule("2").groups == 4
    report, _ = checked(inverted(0.7), 2, 3, 6, 7)
    assert not report.trimmed
    assert "`2` pads them with zeros, and they are constant, but not zero" in reasons(report)


def test_a_kernel_of_zeros_in_a_depthwise_convolution_takes_its_input_with_it():
    model = inverted()
    model[0].reset_parameters()
    kill(model[2], 3, shift=0.7)
    report, _ = checked(model, 2, 3, 6, 7)
    assert gone(report) == {"0": (6, 5), "2": (6, 5)}


@pytest.mark.parametrize(
    ("dead", "left"), [((0, 4), 6), ((0, 1, 2, 3), 4), ((0, 1), 8), ((0, 1, 4), 6), ((0, 1, 2, 3, 4, 5, 6, 7), 1)]
)
def test_groups_keep_equally_many_channels_or_leave_altogether(dead, left):
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    with torch.no_grad():
        grouped.weight[:, :, 0, 0] = 0.5
    if dead == (0, 1, 2, 3):
        kill(grouped, 0, 1, 2, 3)
    model = nn.Sequential(kill(nn.Conv2d(3, 8, 1), *dead), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(8, 2, 1))
    report, collapsed = checked(model, 2, 3, 6, 7)
    assert gone(report).get("0", (8, 8)) == (8, left)
    if dead == (0, 1, 2, 3):
        assert collapsed.get_submodule("2").groups == 1
    if dead == (0, 1):
        assert "the groups of `2` would not have equally many" in reasons(report)


def test_channels_that_nothing_reads_leave_whatever_they_are():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        model[4].weight[:, :2] = 0
        model[2].weight[2:, 3] = 0  # only what leaves reads it
    report, _ = checked(model, 2, 3, 7, 8)
    assert gone(report) == {"0": (6, 5), "2": (5, 3)}


def test_a_layer_of_which_all_is_dead_keeps_a_channel():
    model = nn.Sequential(kill(nn.Conv2d(3, 6, 3), *range(6), shift=-1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    report, _ = checked(model, 2, 3, 7, 8)
    assert gone(report) == {"0": (6, 1)}


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.LayerNorm([6, 5, 6]), nn.Softmax(1), nn.LocalResponseNorm(2)])
def test_what_mixes_channels_keeps_them(norm):
    report, _ = checked(two(kill(nn.Conv2d(3, 6, 3), 1), norm), 2, 3, 7, 8)
    assert not report.trimmed
    assert "0: 1 of its 6 channels are dead, but stay: `1`" in reasons(report)


class Twice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = kill(nn.Conv2d(6, 6, 3, padding=1), 1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        if how == "tied":
            self.second.weight = self.first.weight
        if how == "hooks":
            self.first.register_forward_hook(lambda module, args, output: output + 1)
        self.act = nn.ReLU()
        if how == "watched":
            self.act.register_forward_hook(lambda module, args, output: output + 1)
        if how == "forward":
            self.first.forward = self.first.forward

    def forward(self, x):
        x = self.act(self.first(x))
        if self.how == "twice":
            x = F.relu(self.first(x))
        if self.how == "size":
            x = x / x.size(1)
        if self.how == "written":
            y = x
            x += 1.0
            return self.second(x) + y
        if self.how == "rolled":
            x = x.roll(1, 1)
        if self.how == "split":
            x = torch.cat(x.chunk(2, 1)[::-1], 1)
        return self.second(x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("twice", "`first` is called 2 times"), ("tied", "`first` shares its parameters"), ("hooks", ""),
        ("forward", ""), ("size", "`size` reads them"), ("written", "something writes into a value of theirs"),
        ("watched", "`act` (ReLU) has hooks"), ("rolled", "`roll` reads them"),
        ("split", "`chunk.default` reads them"),
    ],
)  # fmt: skip
def test_they_stay_where_something_else_would_change(how, reason):
    report, _ = checked(Twice(how), 2, 6, 7, 8)
    assert not report.trimmed
    assert reason in reasons(report)


def test_weights_that_are_not_numbers_are_not_zero():
    model = two(kill(nn.Conv2d(3, 6, 3), 1, 2), nn.ReLU(), second=kill(nn.Conv2d(6, 3, 3, padding=1), 0)).eval()
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = torch.nan
        model[2].weight[0, 2] = torch.nan  # what it reads is zero, but the product is not
    flow = ChannelFlow(capture(model, (torch.randn(2, 3, 7, 8),)))
    first, _, second = flow.channels.values()
    assert first.constants.isnan().tolist() == [True, True, False, True, True, True]
    assert second.constants.isnan().all()
    dead = DeadChannels(flow)
    assert not dead.leaves.any()
    assert "weights of `2` are not finite" in str(list(dead.refusals()))


def test_a_zero_with_a_sign_is_zero():
    model = two(kill(nn.Conv2d(3, 6, 3), 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = -0.0, -0.0
    report, _ = checked(model, 2, 3, 7, 8)
    assert gone(report) == {"0": (6, 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_stays(dtype):
    report, model = checked(two(kill(nn.Conv2d(3, 6, 3), 1, 4, shift=0.7), nn.ReLU()), 2, 3, 9, 8, dtype=dtype)
    assert gone(report) == {"0": (6, 5)}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_maps_that_are_laid_out_channels_last_are_taken():
    model = two(kill(nn.Conv2d(3, 6, 3), 1, 4), nn.ReLU()).double().eval().to(memory_format=torch.channels_last)
    x = torch.randn(3, 3, 9, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    result = collapse(model, x[:2], objective="macs")
    assert gone(result.report) == {"0": (6, 4)}
    assert relative_difference(result.model(x), model(x)) <= 1e-9


class Asking(nn.Module):
    """Asks for sizes as torch.fx can't follow, and names the number of channels."""

    def __init__(self):
        super().__init__()
        self.first = kill(nn.Conv2d(3, 6, 3), 1, 4, shift=0.7)
        self.slopes = nn.PReLU(6)
        self.second = nn.Linear(120, 3)

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("other images")
        x = self.slopes(self.first(x)).relu_()
        return self.second(x.view(len(x), 120))


def test_they_leave_what_torch_export_captures():
    report, _ = checked(Asking(), 2, 3, 6, 7)
    assert gone(report) == {"first": (6, 4)}


class Functional(nn.Module):
    """Calls functions of parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.matrix = nn.Parameter(torch.randn(4, 6))
        with torch.no_grad():
            self.weight[:2], self.scale[4] = 0, 0

    def forward(self, x):
        x = torch.relu_(F.conv2d(x, self.weight, padding=1) * self.scale + 0.5)
        x = F.max_pool2d(x, 2).mean((2, 3))
        return F.linear(x.view(x.size(0), 6), self.matrix)


def test_they_leave_functions_of_parameters():
    report, model = checked(Functional(), 2, 3, 6, 7)
    assert gone(report) == {"conv2d": (6, 3)}
    assert "weight" not in dict(model.named_parameters())


class Sloped(nn.Module):
    def __init__(self, slopes):
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(slopes))
        self.first, self.second = kill(nn.Conv2d(3, 6, 3), 1, 4, shift=-0.7), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.second(F.prelu(self.first(x), self.slopes))


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("slopes", [1, 6])
def test_the_slopes_of_dead_channels_leave_with_them(slopes, isolated):
    model = Sloped(slopes)
    if isolated:  # a module is called with the slopes
        isolate_activations(model)
    report, _ = checked(model, 2, 3, 6, 7)
    assert gone(report) == {"first": (6, 4)}


# ---- as a step of a collapse ---------------------------------------------------------


def test_a_part_that_becomes_no_faster_stays(monkeypatch):
    monkeypatch.setattr(clocks, "_SECONDS_A_MAC", 0.0)
    model = two(kill(nn.Conv2d(3, 6, 3), 1, 4, shift=0.7), nn.ReLU())
    report, _ = checked(model, 2, 3, 9, 8, objective="latency", dtype=torch.float32)
    assert not report.trimmed
    assert "0: 2 of its 6 channels are dead, but stay: does not pay" in reasons(report)
    monkeypatch.undo()
    report, _ = checked(model, 2, 3, 9, 8, objective="latency", dtype=torch.float32)
    assert gone(report) == {"0": (6, 5)}


def test_a_step_that_goes_wrong_is_left_out_and_the_others_are_made(monkeypatch):
    def wrong(operator, selection):
        made = without_channels(operator, selection)
        if made.out_channels == 5:
            made.weight.data[0] += 1
        return made

    monkeypatch.setattr(trimming, "without_channels", wrong)
    model = nn.Sequential(
        kill(nn.Conv2d(3, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(),
        kill(nn.Conv2d(6, 8, 3), 1, 2), randomize_batch_norms(nn.BatchNorm2d(8)), nn.GELU(), nn.Conv2d(8, 2, 1),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="went wrong"):
        result = collapse(model, x, objective="macs")
    assert relative_difference(result.model(x), model(x)) <= 1e-9
    assert "0: 1 of its 6 channels are dead, but stay: left out" in reasons(result.report)
    assert gone(result.report) == {"5": (8, 6)}
    assert result.report.fused == ["6"]


def test_a_step_that_fails_is_left_out(monkeypatch):
    def failing(operator, selection):
        raise IndexError("out of range")

    monkeypatch.setattr(trimming, "without_channels", failing)
    model = two(kill(nn.Conv2d(3, 6, 3), 1), nn.ReLU()).eval()
    for objective in ("macs", "latency"):
        with pytest.warns(UserWarning, match="went wrong"):
            result = collapse(model, torch.randn(2, 3, 9, 9), objective=objective)
        assert "stay: left out, since it failed (IndexError: out of range)" in reasons(result.report)


def test_parts_are_timed_one_by_one(monkeypatch):
    """Of two in a row one alone may pay."""
    compared = []

    def compare(self, key, before, after, *others):
        compared.append(after)
        return timing.Speedup((2.0,) * 7 if len(compared) % 2 else (0.5,) * 7)

    monkeypatch.setattr(timing.LatencyTable, "compare", compare)
    model = nn.Sequential(
        kill(nn.Conv2d(3, 6, 3), 1), nn.ReLU(), kill(nn.Conv2d(6, 8, 3), 0), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    report, _ = checked(model, 2, 3, 9, 8, objective="latency")
    assert len(report.trimmed) == 1


def test_what_is_masked_is_zero_for_good_in_the_result():
    model = two(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU()).double().eval()
    prune.ln_structured(model[0], "weight", 1 / 2, 2, 0)
    prune.random_unstructured(model[2], "weight", 0.5)
    x = torch.randn(3, 3, 7, 8, dtype=torch.float64)
    result = collapse(model, x[:2], objective="macs")
    assert gone(result.report) == {"0": (6, 3)}
    assert relative_difference(result.model(x), model(x)) <= 1e-9
    assert {name for name, _ in model.named_parameters()} == {"0.weight_orig", "2.weight_orig", "2.bias"}
    assert not any(module._forward_pre_hooks for module in result.model.modules())


@pytest.mark.parametrize("norms", [True, False])
def test_a_third_of_the_inner_channels_of_a_resnet(norms):
    """What ModelPruning leaves: the shifts of the batch norms make constants; in a block one carries the others."""
    model = randomize_batch_norms(CifarResNet(20)).eval()
    for name, module in model.named_modules():
        if name.endswith("conv1") and "." in name:
            prune.ln_structured(module, "weight", 1 / 3, 2, 0)
            prune.remove(module, "weight")
            norm = model.get_submodule(name.replace("conv1", "bn1"))
            if norms:
                with torch.no_grad():
                    norm.bias[module.weight.flatten(1).eq(0).all(1)] = norm.running_mean.new_tensor(0)
                    norm.running_mean[module.weight.flatten(1).eq(0).all(1)] = 0
    report, _ = checked(model, 1, 3, 16, 16, dtype=torch.float32)
    assert report.after.macs < 0.75 * report.dense.macs
    left = {name: after for name, (_, after) in gone(report).items()}
    assert len(left) == 9
    assert left["layer3.0.conv1"] == 43 if norms else left["layer3.0.conv1"] == 44


class Residual(nn.Module):
    """A branch beside a value, whose first layer is empty; ``shift`` is what its batch norm makes of that."""

    def __init__(self, shift, pad=0, inplace=False, first=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = first or nn.Identity()
        self.empty, self.norm, self.act = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)
        self.last = nn.Conv2d(8, 4, 1 + 2 * pad, padding=pad)
        self.head = nn.Conv2d(4, 2, 3)
        with torch.no_grad():
            self.empty.weight.zero_()
            self.norm.bias.copy_(torch.as_tensor(shift).expand(8))

    def forward(self, x):
        x = self.stem(x).tanh()
        return self.head((x + self.last(self.act(self.norm(self.empty(self.first(x)))))).relu())


def collapsed(model, objective):
    model = model.double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a step that went wrong and was left out
        report = collapse(model, torch.randn(2, 3, 9, 8, dtype=torch.float64), objective=objective)
    data = torch.randn(3, 3, 11, 10, dtype=torch.float64)
    torch.testing.assert_close(report.model(data), model(data), rtol=1e-9, atol=1e-9)
    return report.report, report.model


@pytest.mark.parametrize("objective", ["macs", "depth", "latency"])
@pytest.mark.parametrize(("shift", "pad"), [(-1.0, 0), (-1.0, 1), (torch.linspace(-1, 2, 8), 0)])
def test_a_branch_that_is_constant_is_a_number_for_each_channel(objective, shift, pad):
    torch.manual_seed(0)
    report, result = collapsed(Residual(shift, pad), objective)
    assert [(each.operator, each.after) for each in report.trimmed] == [("empty", 0), ("last", 0)]
    assert report.after.macs < report.before.macs
    assert sum(isinstance(module, nn.Conv2d) for module in result.modules()) == 2
    assert not any(module.training for module in result.modules())  # else nothing merges with what is left


def test_the_numbers_of_a_constant_branch_are_made_where_the_model_is():
    captured = capture(Residual(-1.0).eval(), (torch.randn(2, 3, 9, 8),))
    (branch,) = constant_branches(captured, ChannelFlow(captured))
    assert branch.constants.device.type == "cpu"  # of a model on a GPU, too
    made = branch.affine(torch.device("meta"))
    assert [(value.device.type, value.dtype) for value in made.parameters()] == [("meta", torch.float64)] * 2


def test_a_constant_branch_that_has_no_operator_may_go_wrong(monkeypatch):
    def fail(*_):
        raise IndexError("tuple index out of range")

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            x = self.first(x)
            return self.last((x + self.norm(torch.zeros_like(x))).tanh())

    monkeypatch.setattr(ConstantBranch, "affine", fail)
    model, x = Normed().eval(), torch.randn(3, 5)
    with pytest.warns(UserWarning, match="1 of the steps .* were left out"):
        result = collapse(model, x, objective="macs")
    (refusal,) = (each for each in result.report.refusals if "left out" in each.reason)
    assert refusal.operators == ("add",)
    torch.testing.assert_close(result.model(x), model(x))


def test_a_branch_of_zeros_leaves_nothing():
    torch.manual_seed(0)
    model = Residual(-1.0)
    nn.init.zeros_(model.last.bias)
    report, result = collapsed(model, "macs")
    assert {each.operator: each.after for each in report.trimmed} == {"empty": 0, "last": 0}
    assert [node.name for node in result.graph.nodes if "add" in node.name] == []


def test_a_branch_that_differs_at_the_borders_stays_with_one_channel():
    torch.manual_seed(0)
    report, _ = collapsed(Residual(torch.linspace(1, 2, 8), pad=1), "macs")
    assert [(each.operator, each.before, each.after) for each in report.trimmed] == [("empty", 8, 1)]


def test_a_branch_that_writes_into_the_value_it_is_added_to_stays():
    torch.manual_seed(0)
    report, _ = collapsed(Residual(-1.0, first=nn.ReLU(inplace=True)), "macs")
    assert ("last", 0) not in [(each.operator, each.after) for each in report.trimmed]


def test_a_branch_inside_a_constant_branch_goes_with_it():
    class Nested(Residual):
        def forward(self, x):
            x = self.stem(x).tanh()
            inner = self.act(self.norm(self.empty(x)))
            return self.head((x + self.last(inner + inner.abs())).relu())

    torch.manual_seed(0)
    report, result = collapsed(Nested(0.5), "macs")
    assert sum(isinstance(module, nn.Conv2d) for module in result.modules()) == 2
    assert {each.operator: each.after for each in report.trimmed} == {"empty": 0, "last": 0}


class Branches(nn.Module):
    """A branch in a container of its own, all of which goes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.branch = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))]
        )
        nn.init.zeros_(self.branch[0][0].weight)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.branch[0](x)).relu())


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_a_branch_whose_batch_norms_were_folded_goes_with_its_container(objective):
    torch.manual_seed(0)
    report, _ = collapsed(Branches(), objective)
    assert {each.operator: each.after for each in report.trimmed} == {"branch.0.0": 0, "branch.0.3": 0}


def test_a_branch_of_which_some_channels_are_constant_stays():
    torch.manual_seed(0)
    model = Residual(-1.0)
    nn.init.normal_(model.empty.weight)
    nn.init.zeros_(model.last.weight[:2])
    report, _ = collapsed(model, "macs")
    assert ("last", 0) not in [(each.operator, each.after) for each in report.trimmed]
