"""What accuracy is left at which drift of the outputs? The basis of what ``compress`` allows by default.

A trained CIFAR ResNet is compressed without a bound and without tuning; after every operator that takes a chain's place
the share of the variance of its outputs that has changed is told beside its accuracy:

    python benchmarks/drifting.py --data.root <folder> --weights <file> --depth 20
"""

import argparse
import math
from typing import Any

import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, load
from torch import nn

from lightning_easier import compress
from lightning_easier.report import Table


def main() -> None:
    """Run the benchmark."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=2000, help="training images to fit to")
    options = parser.parse_args()
    test = Images(f"{options.root}/test")
    calibration = Images(f"{options.root}/train").calibration(options.images, seed=0)
    model = load(options.weights, options.depth)
    with torch.no_grad():
        dense = model(calibration[0])
    variance = (dense - dense.mean(0)).square().sum()
    rows: list[Any] = []

    def evaluate(candidate: nn.Module) -> float:
        with torch.no_grad():
            drift = float((candidate(calibration[0]) - dense).square().sum() / variance)
        rows.append((str(len(rows)), f"{drift:.3f}", f"{accuracy(candidate, test):.1f}"))
        print("|", " | ".join(rows[-1]), "|", flush=True)
        return 0.0

    compress(model, calibration, evaluate=evaluate, objective="macs", max_drift=math.inf)
    title = f"ResNet-{options.depth}, {options.images:,} training images to fit to, no tuning"
    print(Table(title, ("tried", "drift", "top-1 [%]"), rows).to_markdown())


if __name__ == "__main__":
    main()
