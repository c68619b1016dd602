"""How much accuracy does a removal cost, without any training after it?

The activations inside the blocks of a CIFAR ResNet (the only ones whose removal merges anything) go one after the
other: each becomes the identity (EASIER), or the affine that comes closest, or one fitted operator takes the place of
its block's two convolutions. They go in the order of their entropy, of their linearity (the share of variance that the
affine, or the fitted operator, explains), or of the drift of the model's outputs if one alone goes, which is what
``compress`` goes by. ``cifar.py`` says what the images and the weights are:

    python benchmarks/removing.py --data.root <folder> --weights <file> --depth 56
"""

import argparse
import math
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, load
from torch import Tensor, nn

from lightning_easier import collapse, compress, linearize, measure_affines, measure_entropy
from lightning_easier.report import Table

COUNTS = (1, 2, 4, 8, 12, 16)


@torch.no_grad()
def by_drift_of(
    make: Callable[[Sequence[str]], nn.Module],
    model: nn.Module,
    images: Tensor,
    sites: Sequence[str],
) -> list[str]:
    """Order activations by how much the outputs change if one alone goes."""
    expected = model(images)
    changed = {site: float((make([site])(images) - expected).square().sum()) for site in sites}
    return sorted(sites, key=changed.__getitem__)


def main() -> None:
    """Measure and print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=1000, help="training images to fit and to measure on")
    parser.add_argument("--ways", nargs="+", default=["identity", "affine", "fitted"], help="rows of the table")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of training images")
    options = parser.parse_args()
    test = Images(f"{options.root}/test")
    calibration = Images(f"{options.root}/train").calibration(options.images, options.seed)
    model = load(options.weights, options.depth)
    inner = [name for name, module in model.named_modules() if name.endswith("relu1")]

    entropies, affines = measure_entropy(model, calibration), measure_affines(model, calibration)
    sites = inner if "fitted" in options.ways else inner[:1]
    found = compress(model, calibration, objective="macs", include=sites, max_drift=math.inf).report
    by_entropy = sorted(inner, key=entropies.__getitem__)
    of_affine = sorted(inner, key=lambda name: affines[name].explained, reverse=True)
    of_operator = [trial.sites[0] for trial in sorted(found.trials, key=lambda trial: trial.explained, reverse=True)]
    by_drift = [trial.sites[0] for trial in found.trials]

    def as_identity(sites: Sequence[str]) -> nn.Module:
        return linearize(deepcopy(model), sites).eval()

    def as_affine(sites: Sequence[str]) -> nn.Module:
        return linearize(deepcopy(model), sites, stand_in="affine", statistics=affines).eval()

    def as_fitted(sites: Sequence[str]) -> nn.Module:
        options = {"mode": "fit", "sites": sites, "calibration": calibration, "objective": "macs"}
        return collapse(model, calibration[0][:64], **options).model

    ways: list[tuple[str, Callable[[Sequence[str]], nn.Module], str, list[str]]] = [
        ("identity", as_identity, "entropy", by_entropy),
        ("identity", as_identity, "linearity", of_affine),
        ("affine", as_affine, "entropy", by_entropy),
        ("affine", as_affine, "linearity", of_affine),
        ("affine", as_affine, "drift", by_drift_of(as_affine, model, calibration[0], inner)),
        ("fitted", as_fitted, "entropy", by_entropy),
        ("fitted", as_fitted, "linearity", of_operator),
        ("fitted", as_fitted, "drift", by_drift),
    ]
    ways = [way for way in ways if way[0] in options.ways]
    dense = accuracy(model, test)
    rows = []
    counts = sorted({min(count, len(inner)) for count in COUNTS})
    for way, make, order, sites in ways:
        cells = [f"{accuracy(make(sites[:count]), test):.1f}" for count in counts]
        rows.append((way, order, f"{dense:.1f}", *cells))
    title = f"ResNet-{options.depth}, top-1 [%] on {len(test):,} test images, no training after removals"
    columns = ("removed activations become", "in the order of", "0", *map(str, counts))
    print(Table(title, columns, rows).to_markdown())


if __name__ == "__main__":
    main()
