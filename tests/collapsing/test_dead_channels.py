"""Channels that are constant whatever the input, or that nothing reads, leave at a collapse, or stay for a reason."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import collapse
from lightning_easier.support.inference import relative_difference
from tests.models import randomize_batch_norms

ASKED_FOR = os.environ.get("COLLAPSE_EXAMPLES")  # new ones, by `make prove`; the suite takes the same ones each time
SETTINGS = settings(
    max_examples=int(ASKED_FOR or 120),
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
    "view": lambda x: x.view(x.size(0), -1),
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
    try:
        result = collapse(model, torch.randn(shape, dtype=torch.float64), objective=objective)
    except ValueError as error:  # an output of zeros alone overflows nothing, but some are not finite
        assert "finite" in str(error)
        return
    report = result.report
    note(str(report))
    note(str(result.model))
    assert not any("report it" in refusal.reason for refusal in report.refusals)
    assert report.after.macs <= report.before.macs
    assert all(each.after < each.before for each in report.trimmed)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for samples in (1, 5):
        x = torch.randn(samples, *shape[1:], dtype=torch.float64)
        with torch.no_grad():
            assert relative_difference(result.model(x), model(x)) <= 1e-9
