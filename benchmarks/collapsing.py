"""What a collapse saves, what it costs, and that it is never slower: tables for docs/collapse.md.

Run: ``python benchmarks/collapsing.py [pairs] [networks] [scale] [cropping]``; all by default. Part ``collapsing`` of
``python -m benchmarks`` asks what a collapse itself takes, in seconds and memory.
"""

import argparse
import copy
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torchvision
from questions import Bar, Case, Effort, Question, Variant, elapsed
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_easier import collapse, isolate_activations, linearize
from lightning_easier.report import Table
from lightning_easier.support.inference import relative_difference
from lightning_easier.support.timing import LatencyTable, measure_latency, speed_up
from lightning_easier.zoo import CifarResNet

NETWORKS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip
PAIRS = "pairs of pointwise operator and permutation"
COLLAPSED = ("resnet18", "resnet50", "resnet152", "vgg16", "swin_t", "vit_b_16")


def questions(effort: Effort) -> Iterator[Question]:
    """Ask what a collapse without pricing by latency takes, a third of the activations linear."""
    names = effort.pick(COLLAPSED, ("resnet50",), ())
    networks: list[tuple[str, Callable[[], nn.Module], int]] = [(name, partial(network, name), 224) for name in names]
    networks += effort.pick(
        [], [("swin_t, two stages", two_stages, 224)], [("CifarResNet-8", partial(CifarResNet, 8), 16)]
    )
    cases = [
        Case(f"{name}, 1×3×{size}×{size}", partial(_collapse_of, make, size), _BARS.get(name, {}))
        for name, make, size in networks
    ]
    for title, build, count in (
        ("Linear 64→64", linears, effort.pick(1000, 100, 6)),
        (PAIRS, permutations, effort.pick(400, 50, 6)),
    ):
        cases.append(Case(f"{count} {title}", partial(collapses, build, (count,))))
    yield Question("collapse, objective macs", tuple(cases))


_BARS = {"resnet50": {"collapse": Bar(seconds=5.0)}}


def _collapse_of(make: Callable[[], nn.Module], size: int, device: torch.device) -> dict[str, Variant]:
    x = torch.randn(1, 3, size, size, device=device)
    model = a_third_linear(make()).to(device).eval()
    return {"collapse": Variant(elapsed(lambda: collapse(model, x, objective="macs"), device))}


Build = Callable[[int], tuple[nn.Module, torch.Tensor]]


def collapses(build: Build, counts: Sequence[int], device: torch.device) -> dict[str, Variant]:
    """Return collapses of networks of so many operators."""
    variants = {}
    for count in counts:
        model, x = (each.to(device) for each in build(count))
        variants[f"{count}"] = Variant(elapsed(partial(collapse, model, x, objective="macs"), device), count)
    return variants


def linears(count: int) -> tuple[nn.Module, torch.Tensor]:
    """Return operators in a row, and an input."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(count))), torch.randn(8, 64)


class _Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.axes)


def permutations(count: int) -> tuple[nn.Module, torch.Tensor]:
    """Return convolutions and Linears with a permutation after each, two layers a pair, and an input."""
    kinds: tuple[list[nn.Module], ...] = tuple(
        [nn.Conv2d(8, 8, 1), _Permute(0, 2, 3, 1)] if place % 2 == 0 else [nn.Linear(8, 8), _Permute(0, 3, 1, 2)]
        for place in range(count)
    )
    return nn.Sequential(*(layer for pair in kinds for layer in pair)), torch.randn(2, 8, 4, 4)


def network(name: str) -> nn.Module:
    """Build a network with random weights, batch-norm statistics and layer scales."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, **options).eval()
    if isinstance(model, torchvision.models.VisionTransformer):  # its head begins as zeros
        nn.init.normal_(model.heads.head.weight, std=0.02)
    for parameter_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "running_mean" in parameter_name:
            tensor.data.normal_(std=0.3)
        elif "running_var" in parameter_name:
            tensor.data.uniform_(0.5, 1.5)
        elif "layer_scale" in parameter_name:
            tensor.data.normal_()
    return model


def two_stages() -> nn.Module:
    """Build the first two stages of a Swin-T, 4 of its 12 blocks, with random weights."""
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer([4, 4], 96, [2, 2], [3, 6], [7, 7]).eval()


def a_third_linear(model: nn.Module, shift_padding: bool = True) -> nn.Module:
    """Make a random third of a network's activations linear, in place."""
    activations = list(isolate_activations(model))
    chosen = random.Random(0).sample(activations, len(activations) // 3)
    return linearize(model, chosen, shift_padding=shift_padding)


def ratio(before: nn.Module, after: nn.Module, x: torch.Tensor) -> str:
    """Time two models interleaved: how many times faster the second is, median and quartiles."""
    latency = measure_latency({"before": before, "after": after}, (x,), samples=25)
    first, median, third = speed_up(latency["before"], latency["after"]).quartiles
    return f"{median:.2f}× ({first:.2f}–{third:.2f})"


def pairs() -> Iterator[Table]:
    """Blocks of MobileNetV2, and the MLPs of Swin-T and ViT, without their activations."""
    rows = []
    mobilenet = network("mobilenet_v2")
    for index, size in ((3, 56), (5, 28), (9, 14), (12, 14), (15, 7)):
        block = mobilenet.features[index]
        channels = block.conv[0][0].in_channels
        for batch in (1, 8):
            x = torch.randn(batch, channels, size, size)
            rows.append((f"MobileNetV2 features.{index}", str(tuple(x.shape)), *_without_activations(block, x)))
    for name, block, shape in (
        ("Swin-T features.1.0.mlp", network("swin_t").features[1][0].mlp, (1, 56, 56, 96)),
        ("Swin-T features.5.0.mlp", network("swin_t").features[5][0].mlp, (1, 14, 14, 384)),
        ("ViT-B/32 encoder layer 0 mlp", network("vit_b_32").encoder.layers[0].mlp, (1, 50, 768)),
    ):
        for batch in (1, 8):
            x = torch.randn(batch, *shape[1:])
            rows.append((name, str(tuple(x.shape)), *_without_activations(block, x)))
    columns = ("block, no activations left", "input", "becomes", "faster than with them", "than uncollapsed")
    yield Table("Blocks", columns, rows)


def _without_activations(block: nn.Module, x: torch.Tensor) -> tuple[str, str, str]:
    with_activations = collapse(block, x).model  # batch norms folded, too
    linear = linearize(copy.deepcopy(block), list(isolate_activations(copy.deepcopy(block))), shift_padding=True)
    result = collapse(linear, x)
    into = ", ".join(merge.into for merge in result.report.merges) or "-"
    return into, ratio(with_activations, result.model, x), ratio(linear, result.model, x)


def networks() -> Iterator[Table]:
    """Every family of torchvision, a random third of the activations linear, collapsed for latency."""
    rows = []
    for name in NETWORKS:
        model = a_third_linear(network(name))
        x = torch.randn(2, 3, 224, 224)
        start = time.perf_counter()
        result = collapse(model, x)
        seconds = time.perf_counter() - start
        report = result.report
        rows.append((
            name, str(len(report.merges)), f"{report.before.depth} → {report.after.depth}",
            f"{report.before.macs / 1e6:,.0f} → {report.after.macs / 1e6:,.0f}", ratio(model, result.model, x),
            f"{report.relative_difference:.0e}", f"{report.relative_difference_float64:.0e}", f"{seconds:.0f}",
        ))  # fmt: skip
        print("|", " | ".join(rows[-1]), "|", flush=True)
    columns = ("network", "merges", "depth", "MMACs", "faster", "difference", "in float64", "collapse [s]")
    yield Table("A third of the activations linear, objective latency, batch 2 at 224×224", columns, rows)


def scale() -> Iterator[Table]:
    """Time and memory of a collapse against the number of operators."""
    rows = []
    cases: list[tuple[str, nn.Module, torch.Tensor]] = [
        (f"{count} Linear 64→64", nn.Sequential(*(nn.Linear(64, 64) for _ in range(count))), torch.randn(8, 64))
        for count in (125, 250, 500, 1000)
    ]
    for name in ("resnet18", "resnet50", "resnet152"):
        model = a_third_linear(network(name))
        cases.append((name, model, torch.randn(1, 3, 224, 224)))
    for name, model, x in cases:
        for objective in ("macs", "depth", "latency"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.perf_counter()
            report = collapse(model, x, objective=objective, latencies=LatencyTable()).report
            seconds = time.perf_counter() - start
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            rows.append((name, objective, f"{report.before.depth} → {report.after.depth}", f"{seconds:.1f}",
                         f"{grown:.0f}"))  # fmt: skip
            print("|", " | ".join(rows[-1]), "|", flush=True)
    yield Table("Scale", ("model", "objective", "depth", "seconds", "peak memory grows by [MiB]"), rows)


def cropping() -> Iterator[Table]:
    """What cropping a merged kernel to 3×3 and adding the second bias twice does, against an exact merge."""
    rows = []
    x = torch.randn(4, 3, 64, 64)
    model = network("resnet18")
    for batch_norm in model.modules():
        if isinstance(batch_norm, nn.BatchNorm2d):
            batch_norm.bias.data.normal_(std=0.3)
    blocks = ["layer1.0", "layer1.1", "layer2.1"]
    isolate_activations(model)
    linearize(model, [f"{block}.relu" for block in blocks], shift_padding=True)
    exact = collapse(model, x, objective="depth")
    cropped = copy.deepcopy(model)
    for name in blocks:
        block = cropped.get_submodule(name)
        pair = nn.Sequential(block.conv1, block.bn1, block.conv2, block.bn2)
        merged = collapse(pair, torch.randn(1, block.conv1.in_channels, 16, 16), objective="depth").model.get_submodule(
            "0"
        )
        second = fuse_conv_bn_eval(block.conv2, block.bn2)
        small = nn.Conv2d(merged.in_channels, merged.out_channels, 3, padding=1)
        small.weight.data.copy_(merged.weight[:, :, 1:-1, 1:-1])
        small.bias.data.copy_(merged.bias + second.bias)
        block.conv1, block.bn1, block.conv2, block.bn2 = small, nn.Identity(), nn.Identity(), nn.Identity()
    with torch.no_grad():
        expected = model(x)
        for name, other in (("cropped to 3×3, second bias twice", cropped), ("collapse", exact.model)):
            rows.append((name, f"{relative_difference(other(x), expected):.1e}", ratio(model, other, x)))
    columns = ("ResNet-18, three blocks linear", "relative difference", "faster")
    yield Table("Cropping", columns, rows)
    swin = network("swin_t")
    linearize(swin, list(isolate_activations(swin))[:4])
    images = torch.randn(1, 3, 224, 224)
    result = collapse(swin, images)
    row = ("collapse", f"{result.report.relative_difference:.1e}", ratio(swin, result.model, images))
    yield Table("Swin-T", ("Swin-T, four MLPs linear", "relative difference", "faster"), [row])


if __name__ == "__main__":
    parts = {"pairs": pairs, "networks": networks, "scale": scale, "cropping": cropping}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(parts)}; all by default")
    chosen = parser.parse_args().parts
    if not set(chosen) <= set(parts):
        parser.error(f"expected some of {', '.join(parts)}, but got {chosen}")
    for part in chosen or parts:
        for table in parts[part]():
            print(table.to_markdown(), end="\n\n", flush=True)
