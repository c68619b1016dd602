"""Why may a network be slower with some of its ReLUs linear? Where a padding moves, a convolution computes more.

torchvision's ResNet-18 for CIFAR, a random third of its ReLUs linear, as in part ``runtimes`` of ``python -m
benchmarks``: once with the paddings moved, as ``linearize`` does by default, and once with them left; collapsed, too.
Multiply-accumulates and the time of a forward in eager, against the original. A row of the original against itself
tells the noise:

    OMP_NUM_THREADS=1 python benchmarks/paddings.py --batch 64
"""

import argparse
from copy import deepcopy

import torch
from collapsing import a_third_linear
from measuring import cifar_resnet18

from lightning_easier import collapse
from lightning_easier.report import Table
from lightning_easier.support.costs import count_macs
from lightning_easier.support.timing import measure_latency, speed_up


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=25, help="timings of each, in turn")
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32)
    original = cifar_resnet18().eval()
    models = {"the original": original, "the original again": deepcopy(original)}
    linear = {
        "paddings moved": a_third_linear(deepcopy(original)).eval(),
        "paddings left": a_third_linear(deepcopy(original), shift_padding=False).eval(),
    }
    models |= {f"a third linear, {name}": model for name, model in linear.items()}
    models |= {f"the same, collapsed, {name}": collapse(model, x[:2], objective="macs").model
               for name, model in linear.items()}  # fmt: skip
    with torch.no_grad():
        latencies = measure_latency(models, (x,), samples=options.samples)
    macs = {name: count_macs(model, (x[:1],)) for name, model in models.items()}
    rows = []
    for name in models:
        low, median, high = speed_up(latencies[name], latencies["the original"]).quartiles
        rows.append((name, f"{macs[name] / macs['the original']:.3f}", f"{median:.2f}× ({low:.2f}–{high:.2f})"))
    title = f"ResNet-18 for CIFAR, batch {options.batch}, eager"
    print(Table(title, ("network", "multiply-accumulates", "time"), rows).to_markdown())


if __name__ == "__main__":
    main()
