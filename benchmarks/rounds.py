"""How much accuracy does a removal cost, with a short equal tuning after every few?

The rounds of a training run without its Trainer: some activations inside the blocks of a CIFAR ResNet go, each becomes
the identity (EASIER), or the affine that comes closest, or one fitted operator takes the place of its block's two
convolutions; then the network is tuned for some steps, and the rest are ranked again, by their entropy or by
their linearity (the share of variance that the stand-in explains). The dense network is tuned for as many steps in as
many rounds. ``cifar.py`` says how they are tuned, and what the images and weights are:

    python benchmarks/rounds.py --data.root <folder> --weights <file> --depth 56
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import mean

import rich
from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, drawn, load, tune
from torch import Tensor, nn

from lightning_easier import fit_chains, isolate_activations, linearize, measure_affines, measure_entropy
from lightning_easier.report import Table

Round = Callable[[nn.Module, Sequence[str], Sequence[Tensor], int], Sequence[str]]


def kept_dense(model: nn.Module, sites: Sequence[str], calibration: Sequence[Tensor], count: int) -> Sequence[str]:
    """Remove nothing."""
    return []


def to_identities(order: str) -> Round:
    """Have activations become identities."""

    def remove(model: nn.Module, sites: Sequence[str], calibration: Sequence[Tensor], count: int) -> Sequence[str]:
        if order == "entropy":
            values = measure_entropy(model, calibration)
        else:
            values = {site: -affine.explained for site, affine in measure_affines(model, calibration).items()}
        chosen = sorted(sites, key=values.__getitem__)[:count]
        linearize(model, chosen)
        return chosen

    return remove


def to_affines(order: str) -> Round:
    """Have activations become affines."""

    def remove(model: nn.Module, sites: Sequence[str], calibration: Sequence[Tensor], count: int) -> Sequence[str]:
        affines = measure_affines(model, calibration)
        explained = {site: -affine.explained for site, affine in affines.items()}
        values = measure_entropy(model, calibration) if order == "entropy" else explained
        chosen = sorted(sites, key=values.__getitem__)[:count]
        linearize(model, chosen, stand_in="affine", statistics=affines)
        return chosen

    return remove


def to_fitted(order: str) -> Round:
    """Have one operator take the place of a block's two, each fitted to what the last has left."""

    def remove(model: nn.Module, sites: Sequence[str], calibration: Sequence[Tensor], count: int) -> Sequence[str]:
        if order == "entropy":
            values = measure_entropy(model, calibration)
        else:
            fits = fit_chains(model, calibration, include=list(sites))
            values = {site: -fit.explained for site, fit in fits.items()}
        chosen = sorted((site for site in sites if site in values), key=values.__getitem__)[:count]
        for site in chosen:
            linearize(model, [site], stand_in="fitted", statistics=fit_chains(model, calibration, include=[site]))
        return chosen

    return remove


WAYS: dict[str, Callable[[str], Round]] = {"identity": to_identities, "affine": to_affines, "fitted": to_fitted}


def main() -> None:
    """Prune in rounds, and print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--before", type=float, default=1, help="epochs of the dense network first")
    parser.add_argument("--images", type=int, default=8192, help="training images after each round, each seen once")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--removed", type=int, default=4, help="activations a round")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.01, help="largest learning rate of a round")
    parser.add_argument("--distill", action="store_true", help="from the dense network")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    curves = [("dense", "", kept_dense)]
    curves += [(way, order, WAYS[way](order)) for way in options.ways for order in ("entropy", "linearity")]
    cells: dict[tuple[str, str], list[list[float]]] = {(way, order): [] for way, order, _ in curves}
    starts = []
    for seed in range(options.seeds):
        everything = drawn(train, len(train), seed)
        dense = tune(load(options.weights, options.depth), train, everything, options.before, seed)
        starts.append(accuracy(dense, test))
        calibration = train.calibration(1000, seed)
        for way, order, remove in curves:
            model = deepcopy(dense)
            sites = [name for name in isolate_activations(model) if name.endswith("relu1")]
            cells[way, order].append([])
            for place in range(options.rounds):
                gone = remove(model, sites, calibration, options.removed)
                sites = [site for site in sites if site not in gone]
                subset = drawn(train, options.images, 1000 * (seed + 1) + place)
                tune(model, train, subset, 1, place, rate=options.rate, teacher=dense if options.distill else None)
                cells[way, order][-1].append(accuracy(model, test))
            shown = ", ".join(f"{score:.1f}" for score in cells[way, order][-1])
            rich.print(f"seed {seed}: {way} {order}: {starts[-1]:.1f}, {shown}")
    rows = []
    for (way, order), runs in cells.items():
        rows.append((way, order, *(spread(scores) for scores in zip(*runs, strict=True))))
    title = (
        f"ResNet-{options.depth}, top-1 [%] after {options.images:,} images a round, "
        f"{'distilled, ' if options.distill else ''}{options.seeds} seeds, from {spread(starts)}"
    )
    counts = (str(options.removed * (place + 1)) for place in range(options.rounds))
    print(Table(title, ("removed activations become", "in the order of", *counts), rows).to_markdown())


def spread(values: Sequence[float]) -> str:
    """Write a mean, and how far the values lie apart."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
