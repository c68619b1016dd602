"""What a fit of an operator to two convolutions costs, by their channels: a table for docs/collapse.md.

Run: ``python benchmarks/fitting.py [channels ...]``; 64, 128, 256 and 512 by default. Each is measured in a process of
its own, since the peak of the memory of one hides that of the next.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import rich
import torch
from torch import nn

from lightning_easier.collapsing.algebra.least_squares import Geometry, Moments, fits
from lightning_easier.report import Table

CHANNELS = (64, 128, 256, 512)
BATCHES, IMAGES, SIZE = 4, 50, 14


@torch.no_grad()
def measure(channels: int) -> tuple[str, ...]:
    """Fit to a 3×3 convolution, a ReLU and another 3×3 convolution, on all positions of four batches of maps."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )
    values = [torch.randn(IMAGES, channels, SIZE, SIZE).relu() for _ in range(BATCHES)]
    batches = [(value, chain(value)) for value in values]
    geometry = Geometry(channels, (3, 3), (1, 1), (1, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    moments = Moments.of(geometry, channels, torch.device("cpu"))
    for value, target in batches:
        moments.add(value, target, IMAGES * SIZE**2)
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
