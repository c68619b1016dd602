"""Masked weights leave a way from the input to the output if and only if gradients flow there."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.activations import isolated_sites, plan_isolation
from lightning_easier.sites.feeding import feeding_weights
from lightning_easier.sites.paths import Paths
from lightning_easier.structure.stand_in import AffineStandIn
from tests.random_graphs import graphs


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.add_module(name, layer)

    def forward(self, x):
        return self.compute(self, x)


def paths(model):
    return Paths(model, plan_isolation(model))


def only(model, **kept):
    """Return masks: in the weight of each module, what connects these pairs (output, input) of neurons."""
    masks = {}
    for name, pairs in kept.items():
        weight = dict(model.named_parameters())[f"{name}.weight"]
        masks[f"{name}.weight"] = torch.zeros(weight.shape, dtype=torch.bool)
        for pair in pairs:
            masks[f"{name}.weight"][pair] = True
    return masks


def emptied(model, *names):
    return only(model, **dict.fromkeys(names, ()))


def depends(model, masks, *inputs):
    """Tell whether each output depends on an input, by its gradients at positive weights, which cancel nothing."""
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if parameter.ndim > 1 else parameter.abs() + 0.1)
            if name in masks:
                parameter *= masks[name]
    inputs = [(value.double().abs() + 0.1).requires_grad_() for value in inputs]
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = []
    for output in outputs:
        gradients = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
        found.append(any(gradient is not None and bool(gradient.any()) for gradient in gradients))
    return all(found)


CASES = {
    "channels that do not meet": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        {"0": [(3, 0)], "2": [(1, 5)]}, False,
    ),
    "channels that meet": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        {"0": [(3, 0)], "2": [(1, 5), (7, 3)]}, True,
    ),
    "through batch norm, pooling and dropout": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 2, 1)),
        {"0": [(3, 0)], "4": [(1, 5)]}, False,
    ),
    "a norm that mixes channels": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1)), {"0": [(3, 0)], "2": [(1, 5)]}, True,
    ),
    "a softmax": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1), nn.Conv2d(8, 2, 1)), {"0": [(3, 0)], "2": [(1, 5)]}, True,
    ),
    "groups that do not meet": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4)), {"0": [(3, 0)], "2": [(1, 0)]},
        False,
    ),
    "groups that meet": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4)), {"0": [(3, 0)], "2": [(1, 1)]},
        True,
    ),
    "a transposed convolution": (
        nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 4, 2, groups=2)),
        {"0": [(0, 3)], "1": [(2, 1)]}, False,
    ),
    "a transposed convolution in groups": (
        nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 1, 1)),
        {"0": [(0, 3)], "1": [(3, 1)], "2": [(0, 3)]}, True,
    ),
    "a flatten": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Linear(24, 2)), {"0": [(1, 0)], "3": [(0, 12)]},
        False,
    ),
    "a flatten that meets": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Linear(24, 2)), {"0": [(1, 0)], "3": [(0, 11)]},
        True,
    ),
    "a flatten of channels that are last": (
        Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 4, 1), b=nn.Linear(24, 2)),
        {"a": [(1, 0)], "b": [(0, 6)]}, False,
    ),
    "a flatten of channels that are last and meet": (
        Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).reshape(2, -1)), a=nn.Conv2d(3, 4, 1), b=nn.Linear(24, 2)),
        {"a": [(1, 0)], "b": [(0, 5)]}, True,
    ),
    "tokens": (
        Net(lambda s, x: s.b(F.gelu(s.a(x).flatten(2).transpose(1, 2))), a=nn.Conv2d(3, 4, 1), b=nn.Linear(4, 2)),
        {"a": [(1, 0)], "b": [(0, 2)]}, False,
    ),
    "a concatenation": (
        Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1),
            c=nn.Conv2d(6, 2, 1)), {"a": [(1, 0)], "b": [(0, 1)], "c": [(1, 5), (0, 3)]}, False,
    ),
    "a concatenation that meets": (
        Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1),
            c=nn.Conv2d(6, 2, 1)), {"a": [(1, 0)], "b": [(0, 1)], "c": [(1, 4)]}, True,
    ),
    "a concatenation with one value twice": (
        Net(lambda s, x: s.c(torch.cat([y := s.a(x), s.b(x), y], 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1),
            c=nn.Conv2d(10, 2, 1)), {"a": [(1, 0)], "b": [], "c": [(1, 7)]}, True,
    ),
    "a concatenation of positions": (
        Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], -1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1),
            c=nn.Conv2d(4, 2, 1)), {"a": [(1, 0)], "b": [(2, 1)], "c": [(1, 0), (0, 3)]}, False,
    ),
    "an addition": (
        Net(lambda s, x: s.c(s.a(x) + s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 2, 1)),
        {"a": [(1, 0)], "b": [(0, 1)], "c": [(1, 2)]}, False,
    ),
    "a block that is emptied, with a way around": (
        Net(lambda s, x: x + s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1)), {"a": [], "b": []}, True,
    ),
    "a stem that is emptied before it": (
        Net(lambda s, x: (y := s.c(x)) + s.b(F.relu(s.a(y))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1),
            c=nn.Conv2d(3, 3, 1)), {"c": []}, False,
    ),
    "functions": (
        Net(lambda s, x: F.conv2d(F.conv2d(x, s.a.weight), s.b.weight, groups=2), a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 2, 1, groups=2)), {"a": [(1, 0)], "b": [(0, 0), (1, 0), (1, 1)]}, False,
    ),
    "matrices": (
        Net(lambda s, x: F.relu(x.mean((2, 3)) @ s.a.weight) @ s.b.weight.t(), a=nn.Linear(4, 3), b=nn.Linear(4, 2)),
        {"a": [(0, 1)], "b": [(1, 2)]}, False,
    ),
    "an output of several that is closed": (
        Net(lambda s, x: (s.a(x), s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1)), {"b": []}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_way_is_left_where_the_output_depends_on_the_input(case):
    model, kept, expected = CASES[case]
    masks = only(model, **kept)
    found = paths(model)
    assert found.is_known
    assert found.is_open({})
    assert found.is_open(masks) == expected == depends(model, masks, torch.randn(2, 3, 2, 3))
    isolated_sites(model)
    assert paths(model).is_open(masks) == expected


@st.composite
def networks(draw):
    """Draw a network in which nothing meets padding, so that what is told is exact."""
    layers, calls = {}, []
    shapes = [(2, 4, 5)]  # of each value, without the batch

    def add(shape, call, layer=None):
        number = len(calls)
        if layer is not None:
            layers[f"l{number}"] = layer
        calls.append(lambda s, values: call(getattr(s, f"l{number}", None), values))
        shapes.append(shape)

    for _ in range(draw(st.integers(1, 7))):
        place = draw(st.integers(0, len(shapes) - 1))
        channels, *size = shapes[place]
        alike = [index for index, (_, *other) in enumerate(shapes) if other == size]
        other = draw(st.sampled_from(alike))
        outputs = draw(st.integers(1, 4))
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        kinds = ["cat", "add", "norm", "relu"]
        kinds += ["conv", "transposed", "wide", "flat", "flat last", "last", "pool"] if size else ["linear"]
        match draw(st.sampled_from(kinds)):
            case "cat":
                add(
                    (channels + shapes[other][0], *size),
                    lambda _, v, i=place, j=other, dim=1 if size else -1: torch.cat([v[i], v[j]], dim),
                )
            case "add" if shapes[other] == shapes[place]:
                add(shapes[place], lambda _, v, i=place, j=other: v[i] + v[j])
            case "norm":
                layer = nn.BatchNorm2d(channels) if size else nn.BatchNorm1d(channels)
                add(shapes[place], lambda m, v, i=place: m(v[i]), layer)
            case "relu":
                add(shapes[place], lambda m, v, i=place: m(v[i]), nn.ReLU())
            case "conv":
                layer = nn.Conv2d(channels, outputs * groups, 1, groups=groups, bias=False)
                add((outputs * groups, *size), lambda m, v, i=place: m(v[i]), layer)
            case "transposed":
                layer = nn.ConvTranspose2d(channels, outputs * groups, 1, groups=groups, bias=False)
                add((outputs * groups, *size), lambda m, v, i=place: m(v[i]), layer)
            case "wide" if min(size) > 1:
                layer = nn.Conv2d(channels, outputs, 2, bias=False)
                add((outputs, size[0] - 1, size[1] - 1), lambda m, v, i=place: m(v[i]), layer)
            case "pool" if min(size) > 1:
                add((channels, size[0] // 2, size[1] // 2), lambda _, v, i=place: F.max_pool2d(v[i], 2))
            case "linear":
                add((outputs,), lambda m, v, i=place: m(v[i]), nn.Linear(channels, outputs, bias=False))
            case "flat":
                layer = nn.Linear(channels * size[0] * size[1], outputs, bias=False)
                add((outputs,), lambda m, v, i=place: m(v[i].flatten(1)), layer)
            case "flat last":
                layer = nn.Linear(channels * size[0] * size[1], outputs, bias=False)
                add((outputs,), lambda m, v, i=place: m(v[i].permute(0, 2, 3, 1).flatten(1)), layer)
            case "last":
                layer = nn.Linear(channels, outputs, bias=False)
                add((outputs, *size), lambda m, v, i=place: m(v[i].movedim(1, 3)).permute(0, 3, 1, 2), layer)

    def forward(self, x):
        values = [x]
        for call in calls:
            values.append(call(self, values))
        return values[-1]

    return Net(forward, **layers), draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.2, 0.35, 0.5, 0.7]))


def draw_masks(model, seed, share):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < share
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


@settings(max_examples=120, deadline=None)
@given(networks())
def test_a_way_is_open_if_and_only_if_gradients_flow(network):
    model, seed, share = network
    masks = draw_masks(model, seed, share)
    assert paths(model).is_open(masks) == depends(model, masks, torch.rand(2, 2, 4, 5))


def tensors(value):
    leaves = pytree.tree_leaves(vars(value) if dataclasses.is_dataclass(value) else value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@settings(max_examples=25, deadline=None)
@given(graphs(), st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3, unique=True))
def test_no_output_depends_on_the_input_where_no_way_is_left(graph, seeds):
    inputs = graph.inputs(graph.shape)
    for seed, share in zip(seeds, (0.05, 0.2, 0.5), strict=True):
        model = graph.made()
        masks = draw_masks(model, seed, share)
        found = paths(model)
        if found.is_open(masks) or not found.is_known:  # an optional argument may have been taken for its default
            continue
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
            tries = [tuple(value + shift for value in inputs) for shift in (0.0, 1.0)]  # some write into views
            first, second = (tensors(model(*values, **dict(graph.keywords))) for values in tries)
        assert any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_affine_in_the_place_of_an_activation_closes_the_channels_that_it_scales_to_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    masks = only(model, **{"2": [(0, 1), (1, 1)]})
    assert paths(model).is_open(masks)
    for trainable in (False, True):
        for scale, expected in (([1.0, 0, 1, 1], False), ([0.0, 1, 0, 0], True)):
            model[1] = AffineStandIn(
                nn.ReLU(), AffineFit(torch.tensor(scale).float(), torch.ones(4), 1, 0.0), trainable
            )
            found = paths(model)
            assert found.is_known
            assert found.is_open(masks) == expected
            assert found.is_open(only(model, **{"0": [(0, 1), (2, 1)]})) != expected
    model[1].weight.data = torch.zeros(4)  # a plan holds no values
    assert not found.is_open({})
    assert found.is_open({"1.weight": torch.tensor([True, False, False, False])})


def test_one_input_of_several_is_enough():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

        def forward(self, x, y):
            return self.c(torch.cat([self.a(x), self.b(y)], -1))

    model = Two()
    found = paths(model)
    assert found.is_open(emptied(model, "a"))
    assert found.is_open(emptied(model, "b"))
    assert not found.is_open(emptied(model, "a", "b"))
    assert not found.is_open(emptied(model, "a") | only(model, c=[(0, 3)]))


def test_an_output_that_never_depends_on_the_input_says_nothing():
    model = Net(
        lambda s, x: (s.b(s.a(x)), s.weight * 2),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
        weight=nn.Parameter(torch.ones(2)),
    )
    assert paths(model).is_open({})
    assert not paths(model).is_open(only(model, a=[(1, 0)], b=[(1, 0)]))


def untraceable(self, x):
    return self.b(self.a(x)) if x.sum() > 0 else x


def test_a_forward_that_can_not_be_traced_is_open_and_known_only_with_a_way_around():
    model = nn.Sequential(nn.Linear(3, 3), Net(untraceable, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), nn.Linear(3, 3))
    found = paths(model)
    assert not found.is_known
    assert found.is_open(emptied(model, "1.a", "1.b"))
    assert not found.is_open(emptied(model, "0"))
    assert not found.is_open(emptied(model, "2"))

    around = Net(lambda s, x: x + s.inner(x), inner=model)
    assert paths(around).is_known
    assert paths(around).is_open(emptied(around, "inner.0"))

    whole = Net(untraceable, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    assert not paths(whole).is_known
    assert paths(whole).is_open(emptied(whole, "a", "b"))


def test_networks_of_a_module_without_a_forward_are_all_to_stay_open():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    model = Module()
    assert paths(model).is_open({})
    assert not paths(model).is_open(emptied(model, "b"))


def test_a_weight_that_is_computed_is_told_by_its_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    parametrizations.weight_norm(model[0])
    assert not paths(model).is_open({"0.weight": torch.zeros(3, 3, dtype=torch.bool)})


def test_a_mask_of_nothing_is_an_error():
    found = paths(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="to hold names of parameters, but got '1.weight'"):
        found.is_open({"1.weight": torch.ones(4, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) for '0.weight', but got \(3, 4\)"):
        found.is_open({"0.weight": torch.ones(3, 4, dtype=torch.bool)})


_TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 11}


@pytest.mark.parametrize(
    ("build", "open_without", "closed_without"),
    [
        (lambda: torchvision.models.resnet18(), ["layer1.0.conv1", "layer4.1.conv2", "layer2.0.downsample.0"],
         ["conv1"]),
        (lambda: torchvision.models.mobilenet_v2(), ["features.3.conv.0.0"], ["features.2.conv.1.0", "features.18.0"]),
        (lambda: torchvision.models.swin_t(), ["features.1.0.mlp.0", "features.7.1.mlp.3"], ["features.0.0", "head"]),
        (lambda: torchvision.models.googlenet(init_weights=False), ["inception3a.branch1.conv"], ["conv2.conv"]),
        (lambda: timm.create_model("vit_tiny_patch16_224"), ["blocks.0.mlp.fc1"], ["patch_embed.proj", "head"]),
        (lambda: timm.create_model("resnetv2_50"), ["stages.0.blocks.1.conv1"], ["stem.conv", "head.fc"]),
        (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT)),
         ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense"],
         ["classifier"]),
    ],
)  # fmt: skip
def test_real_networks_are_open_where_a_way_around_is_left(build, open_without, closed_without):
    with torch.device("meta"):
        model = build()
    found = paths(model)
    assert found.is_known
    assert found.is_open({})
    for name in open_without:
        assert found.is_open(emptied(model, name))
    assert found.is_open(emptied(model, *open_without))
    for name in closed_without:
        assert not found.is_open(emptied(model, name))


def test_a_network_without_its_rectified_layers_is_closed():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    plan = plan_isolation(model)
    names = [weight.operator for weights in feeding_weights(model, plan).weights.values() for weight in weights]
    assert not Paths(model, plan).is_open(emptied(model, *names))
    # the stem gives to one channel, which the second stage does not read; the blocks before it are empty
    kept = only(model, conv1=[(5, 0)], **{"layer2.0.downsample.0": [(0, 4)], "layer2.0.conv1": [(0, 4)]})
    kept |= emptied(model, "layer1.0.conv2", "layer1.1.conv2")
    assert not Paths(model, plan).is_open(kept)
    assert Paths(model, plan).is_open(kept | only(model, **{"layer2.0.downsample.0": [(0, 5)]}))
    assert Paths(model, plan).is_open(kept | only(model, **{"layer1.0.conv1": [(3, 5)], "layer1.0.conv2": [(4, 3)]}))


WRITES = {
    "a part of zeros": lambda s, x: (y := x.new_zeros(x.shape), y.__setitem__(slice(None), s.a(x)), s.b(y))[2],
    "a view of zeros": lambda s, x: (y := x.new_zeros(x.shape), y.view(2, 3).add_(s.a(x)), s.b(y))[2],
    "a value that depends on nothing": lambda s, x: (y := s.c(x), y.copy_(s.a(x)), s.b(y))[2],
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_in_place_is_read_from_where_it_was_written(write):
    model = Net(WRITES[write], a=nn.Linear(3, 3), b=nn.Linear(3, 2), c=nn.Linear(3, 3, bias=False))
    assert paths(model).is_open(emptied(model, "c"))
    assert not paths(model).is_open(emptied(model, "c", "a"))
    assert not paths(model).is_open(emptied(model, "b"))


def test_an_activation_passes_on_the_neurons_that_it_is_said_to():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    paths = Paths(model, plan_isolation(model))
    second = torch.zeros(2, 4, dtype=torch.bool)
    second[:, 1] = True
    passes = torch.tensor([True, False, True, True])
    assert paths.is_open({}, {"1": passes})
    assert paths.is_open({"2.weight": second}, {"1": ~passes})
    assert not paths.is_open({"2.weight": second}, {"1": passes})
    assert not paths.is_open({}, {"3": torch.zeros(2, dtype=torch.bool)})
