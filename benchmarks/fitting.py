"""What a fit of an operator to two convolutions costs, by their channels: a table for docs/collapse.md.

Run: ``python benchmarks/fitting.py [channels ...]``; 64, 128, 256 and 512 by default. Each is measured in a process of
its own, since the peak of the memory of one hides that of the next. Part ``fitting`` of ``python -m benchmarks`` asks
what such fits take, and what ``compress`` does.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import rich
import torch
import torchvision
from questions import Bar, Case, Effort, Question, Variant, elapsed
from torch import nn

from lightning_easier import compress
from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments, fits
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.report import Table
from lightning_easier.zoo import CifarResNet

CHANNELS = (64, 128, 256, 512)
BATCHES, IMAGES, SIZE = 4, 50, 14

# Minutes on two cores
COMPRESS = {"compress": Bar(seconds=300.0)}


def questions(effort: Effort) -> Iterator[Question]:
    """Ask what fits take, and what ``compress`` takes on random images."""
    cases = [Case(f"{channels} channels", partial(_fits, channels), is_slow=channels > 256)
             for channels in effort.pick(CHANNELS, (64, 128), (4,))]  # fmt: skip
    yield Question("fit to conv 3×3, ReLU, conv 3×3", tuple(cases))
    images = effort.pick(1000, 64, 16)
    networks: list[tuple[str, Callable[[], nn.Module], int]] = effort.pick(
        [
            ("ResNet-56", partial(CifarResNet, 56), 32),
            ("MobileNetV2", torchvision.models.mobilenet_v2, 224),
            ("ViT-S/16", _vit_small, 224),
        ],
        [("ResNet-8", partial(CifarResNet, 8), 32)],
        [("three convolutions", tiny, 8)],
    )
    objective: Objective = effort.pick("latency", "latency", "macs")  # timings take seconds, however small it is
    compressed = {
        f"{name}, {images:,} images of 3×{size}×{size}": partial(compressions, make, images, size, objective=objective)
        for name, make, size in networks
    }
    cases = [Case(name, make, COMPRESS, is_slow=True, needs=_needs(name)) for name, make in compressed.items()]
    yield Question("compress, random weights and images", tuple(cases))


def _needs(name: str) -> tuple[str, ...]:
    return ("timm",) if name.startswith("ViT-S") else ()


def tiny() -> nn.Module:
    """Return three convolutions and a classifier, for images of any size."""
    pairs = [(nn.Conv2d(channels, 4, size), nn.ReLU()) for channels, size in ((3, 3), (4, 1), (4, 1))]
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))  # fmt: skip


def _vit_small() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_small_patch16_224")
    return model


def _fits(channels: int, device: torch.device) -> dict[str, Variant]:
    batches, geometry = batches_of(channels)
    there = [(value.to(device), target.to(device)) for value, target in batches]

    def fit() -> None:
        list(fits(summed(there, geometry)))

    return {"fit": Variant(elapsed(torch.no_grad()(fit), device))}


def compressions(
    make: Callable[[], nn.Module], images: int, size: int, device: torch.device, objective: Objective = "latency"
) -> dict[str, Variant]:
    """Return ``compress`` of a network that knows nothing, on images that show nothing."""
    batch = min(images, 50)
    model = make().to(device).eval()
    batches = [torch.randn(batch, 3, size, size, device=device) for _ in range(images // batch)]
    return {
        "compress": Variant(
            elapsed(lambda: compress(model, batches, objective=objective, example_inputs=batches[0][:8]), device)
        )
    }


@torch.no_grad()
def batches_of(channels: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Geometry]:
    """Return what goes into two convolutions and what comes out, and the geometry of the one that takes their place."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )
    values = [torch.randn(IMAGES, channels, SIZE, SIZE).relu() for _ in range(BATCHES)]
    return [(value, chain(value)) for value in values], Geometry(channels, (3, 3), (1, 1), (1, 1))


@torch.no_grad()
def summed(batches: Sequence[tuple[torch.Tensor, torch.Tensor]], geometry: Geometry) -> Moments:
    """Return the sums of batches, of what goes in and what comes out, over all of their positions."""
    _, first = batches[0]
    moments = Moments.of(geometry, first.shape[1], first.device)
    for value, target in batches:
        moments.add(value, target, IMAGES * SIZE**2)
    return moments


@torch.no_grad()
def measure(channels: int) -> tuple[str, ...]:
    """Fit to a 3×3 convolution, a ReLU and another 3×3 convolution, on all positions of four batches of maps."""
    batches, geometry = batches_of(channels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    moments = summed(batches, geometry)
    middle = time.perf_counter()
    best = max(fit.explained for fit in fits(moments))
    end = time.perf_counter()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    positions = moments.fitted.positions + moments.held_out.positions
    return (str(channels), f"{geometry.unknowns:,}", f"{positions:,.0f}", f"{middle - start:.1f}",
            f"{end - middle:.1f}", f"{grown:,.0f}", f"{best:.3f}")  # fmt: skip


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("channels", nargs="*", type=int, help="of the convolutions; 64, 128, 256 and 512 by default")
    rows = []
    for channels in parser.parse_args().channels or CHANNELS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, channels).result())
    columns = (
        "channels",
        "unknowns",
        "positions",
        "sums [s]",
        "solving [s]",
        "peak memory grows by [MiB]",
        "explained",
    )
    rich.print(Table("Fits to conv 3×3, ReLU, conv 3×3", columns, rows))


if __name__ == "__main__":
    main()
