"""Every family of torchvision's classification networks, a third of its activations linear, collapsed."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from lightning_easier import collapse, isolate_activations, linearize
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.support.inference import relative_difference
from lightning_easier.support.timing import LatencyTable
from tests.models import narrow, randomize_batch_norms

# Name -> the sizes of an image that is collapsed at, and of another
FAMILIES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "alexnet": ((64, 80), (72, 64)),
    "convnext_tiny": ((32, 64), (64, 32)),
    "densenet121": ((32, 64), (64, 32)),
    "efficientnet_b0": ((32, 64), (64, 32)),
    "googlenet": ((32, 64), (64, 32)),
    "inception_v3": ((75, 96), (96, 75)),
    "maxvit_t": ((64, 64), (64, 64)),
    "mnasnet0_5": ((32, 64), (64, 32)),
    "mobilenet_v2": ((32, 64), (64, 32)),
    "mobilenet_v3_small": ((32, 64), (64, 32)),
    "regnet_x_400mf": ((32, 64), (64, 32)),
    "resnet18": ((32, 64), (64, 32)),
    "shufflenet_v2_x0_5": ((32, 64), (64, 32)),
    "squeezenet1_1": ((32, 64), (64, 32)),
    "swin_t": ((32, 64), (64, 32)),
    "vgg11_bn": ((32, 64), (64, 32)),
    "vit_b_32": ((64, 64), (64, 64)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
# How many times narrower than their own: width takes more time than it shows, but for the rounding of long sums, which
# the others show.
NARROWER = {"alexnet": 4, "inception_v3": 4, "vgg11_bn": 4}
INVERTED = [
    (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 48, 1), (6, 5, 1, 48, 56, 2),
    (6, 3, 1, 56, 80, 1),
]  # fmt: skip
# Those whose widths are arguments; that of a ViT and a MaxVit takes images of 224×224 only. Blocks that only repeat the
# one before them are left out where there are many: blocks that change sizes and blocks that do not are there.
NARROW: dict[str, Callable[..., nn.Module]] = {
    "convnext_tiny": lambda **options: ConvNeXt(
        [CNBlockConfig(*block) for block in ((24, 48, 2), (48, 96, 2), (96, 192, 3), (192, None, 2))], **options
    ),
    "densenet121": lambda **options: DenseNet(16, (3, 4, 5, 3), 32, **options),
    "efficientnet_b0": lambda **options: EfficientNet([MBConvConfig(*block) for block in INVERTED], 0.2, **options),
    "maxvit_t": lambda **options: MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, 0.2, **options),
    "mobilenet_v2": lambda **options: MobileNetV2(
        inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 2], [6, 80, 2, 1]], **options
    ),
    "regnet_x_400mf": lambda **options: RegNet(
        BlockParams([1, 2, 3, 3], [32, 64, 160, 400], [16, 16, 16, 16], [1.0] * 4, [2] * 4), **options
    ),
    "swin_t": lambda **options: SwinTransformer([4, 4], 24, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7], **options),
    "vit_b_32": lambda **options: VisionTransformer(64, 32, 12, 4, 64, 256, **options),
}
# Most merge by MACs as by latency, whose clock counts work here, and some by depth, too: one run shows both
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    **dict.fromkeys(("alexnet", "resnet18", "swin_t", "vgg11_bn", "vit_b_32"), ("latency",)),
    **dict.fromkeys(("convnext_tiny", "densenet121", "maxvit_t", "squeezenet1_1"), ("latency", "macs", "depth")),
}


def test_no_family_is_left_out():
    def family(name: str) -> str:
        return torchvision.models.get_model_builder(name).__module__

    assert {family(name) for name in FAMILIES} == {
        family(name) for name in torchvision.models.list_models(module=torchvision.models)
    }


@pytest.fixture(scope="module")
def latencies() -> LatencyTable:
    return LatencyTable()


def a_third_linear(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in NARROW:
        model = NARROW[name](num_classes=10)
    elif name in NARROWER:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, num_classes=10, **OPTIONS.get(name, {}))
        narrow(model, NARROWER[name])
    else:
        model = torchvision.models.get_model(name, num_classes=10, **OPTIONS.get(name, {}))
    model.eval()
    randomize_batch_norms(model)
    for parameter_name, parameter in model.named_parameters():
        if "layer_scale" in parameter_name or "heads.head" in parameter_name:  # they begin as (almost) nothing
            nn.init.normal_(parameter)
    names = list(isolate_activations(model))
    return linearize(model, random.Random(name).sample(names, max(len(names) // 3, 1)), shift_padding=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_its_function_under_every_objective(name, latencies):
    model = a_third_linear(name)
    state = copy.deepcopy(model.state_dict())
    size, other_size = FAMILIES[name]
    x, other = torch.randn(1, 3, *size), torch.randn(1 if size == other_size else 2, 3, *other_size)
    with torch.no_grad():
        expected = model(other)
    for objective in OBJECTIVES.get(name, ("latency", "depth")):
        result = collapse(model, x, objective=objective, latencies=latencies)
        report = result.report
        assert report.relative_difference <= 1e-4
        assert report.relative_difference_float64 <= 1e-9
        with torch.no_grad():
            assert relative_difference(result.model(other), expected) <= 1e-4
        assert report.after.depth <= report.before.depth
        assert report.after.macs <= report.before.macs or objective == "depth"
        assert report.merges or report.refusals
        assert not any("please report it" in refusal.reason for refusal in report.refusals)
        assert all(merge.price_after <= merge.price_before for merge in report.merges)
        assert not {n for merge in report.merges for n in merge.operators} & {r.operators for r in report.refusals}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
