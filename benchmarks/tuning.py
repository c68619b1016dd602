"""How much accuracy is left per second saved, with equal tuning for every method?

A trained CIFAR ResNet is tuned for some epochs (its images may be others than those it was trained on), then made
shallower by each method, tuned for some epochs more, and collapsed. The dense network is tuned for as many in all.
``networks.py`` has a VGG and a ViT besides. The methods:

- ``identity``: EASIER. The activations of lowest entropy become identities.
- ``affine``: the activations inside the blocks, in the order of entropy, become the affines that come closest.
- ``fitted``: one convolution takes the place of a block's two, in the order of linearity.
- ``compress``: what changes the outputs least per second saved goes first, until the network is fast enough.
- ``magnitude``: half of the weights, the smallest of the whole network, are zero, by Lightning's ModelPruning.
- ``channels``: a third of the channels inside each block, those of least norm, are zero, by Lightning's ModelPruning.
- ``scratch``: a shallower network of about as many multiply-accumulates, trained from scratch for as many epochs.
- ``taylor``, ``fastnas``, ``blocks_kl``, ``blocks_cka``, ``practise``: see ``peers.py``. Each goes on until it is as
  fast as what ``compress`` has made, as measured, or as ``--speedup`` says if that is not among the methods.

``--finetune 300`` has ``compress`` end with so many steps without labels, on the images that it looks at anyway, and
``--finetune-peers`` the peers, too. ``--distill`` has all of them follow the logits of the dense network. ``cifar.py``
says how they are tuned, and what the images and weights are:

    python benchmarks/tuning.py --data.root <folder> --weights <file> --depth 56

Networks other than a ResNet are trained from scratch for ``--before`` epochs, and written to the file of the weights;
what is there is taken, with every seed:

    python benchmarks/tuning.py --data.root <folder> --network vgg --weights <new file> --before 4

``--keep`` writes each network that is done to a folder. The same command takes up there what was cut short, and a
command that differs in its methods alone adds rows to the table.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import rich
import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, drawn
from lightning.pytorch.callbacks import ModelPruning
from networks import NETWORKS, Network, add_arguments, chosen
from peers import PEERS, Speed
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_easier import (
    Finetuning,
    collapse,
    compress,
    fit_chains,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
)
from lightning_easier.measure.features import places_of_features
from lightning_easier.pruning.finetuning import finetune
from lightning_easier.report import Table
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.support.costs import count_macs
from lightning_easier.support.timing import Latency, measure_latency, speed_up

Made = TypeVar("Made")

METHODS = ("dense", "identity", "affine", "fitted", "compress", "magnitude", "channels", "scratch")
CALIBRATION = 1000  # images
MOMENTS = 6  # at which the networks of the table are timed


def shallower(
    model: nn.Module, method: str, calibration: Sequence[Tensor], example: Tensor, network: Network, options: Any
) -> nn.Module:
    """Return what a method makes of a copy of a model, to be tuned."""
    model = deepcopy(model).eval()
    sites = list(isolate_activations(model))
    inner = [name for name in sites if name.endswith(network.inner)]
    if method == "compress":
        target = {"target_speedup": options.speedup, "max_drift": math.inf}  # it is tuned afterwards
        include = inner if network.inner and not options.blocks else None
        return compress(
            model, calibration, example_inputs=example, include=include, finetune=options.finetune or None,
            narrow=options.width, **target,
        ).fitted  # fmt: skip
    if method == "magnitude":
        weights = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return zeroed(model, ModelPruning("l1_unstructured", weights, use_global_unstructured=True), 1 / 2)
    if method == "channels":
        weights = [(m, "weight") for name, m in model.named_modules() if name.endswith("conv1") and "." in name]
        pruning = ModelPruning("ln_structured", weights, use_global_unstructured=False, pruning_norm=2, pruning_dim=0)
        return zeroed(model, pruning, 1 / 3)
    if method == "fitted":
        for _ in range(options.removed):
            fits = fit_chains(model, calibration, include=inner)
            best = max(fits, key=lambda name: fits[name].explained)
            linearize(model, [best], stand_in="fitted", statistics=fits)
            inner.remove(best)
        return model
    entropies = measure_entropy(model, calibration)
    if method == "identity":
        return linearize(model, sorted(sites, key=entropies.__getitem__)[: options.removed])
    chosen = sorted(inner, key=entropies.__getitem__)[: options.removed]
    return linearize(model, chosen, stand_in="affine", statistics=measure_affines(model, calibration))


def following(model: nn.Module, dense: nn.Module, calibration: Sequence[Tensor], steps: int) -> nn.Module:
    """Train a model for some steps without labels to compute what the dense network does, as ``compress`` does at last.

    Args:
        model: The model; it is trained in place.
        dense: The network that it was made of.
        calibration: The images.
        steps: How many.
    """
    dense = deepcopy(dense).eval()
    names = places_of_features(find_blocks(dense), list(isolate_activations(dense)))
    finetune(model.eval(), dense, names, [(images,) for images in calibration], Finetuning(steps))
    return model


def zeroed(model: Any, pruning: ModelPruning, amount: float) -> nn.Module:
    """Have a callback of Lightning's prune a model once, outside of a run."""
    pruning.setup(None, model, "fit")  # type: ignore[arg-type]  # The trainer is not asked.
    pruning.apply_pruning(amount)
    return model


@dataclass(frozen=True)
class Row:
    """What has become of one method with one seed.

    Attributes:
        untuned: Top-1 before the last epochs, in per cent.
        top1: Top-1 after them.
        shipped: The network, collapsed.
        seconds: What the method itself took.
    """

    untuned: float
    top1: float
    shipped: nn.Module
    seconds: float


def kept(folder: Path | None, name: str, make: Callable[[], Made]) -> Made:
    """Return what a file of a folder holds, or make it and write it there."""
    file = None if folder is None else folder / f"{name}.pt"
    if file is not None and file.exists():
        there: Made = torch.load(file, weights_only=False)  # this program wrote it
        return there
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made, file)
    return made


def finished(model: nn.Module, example: Tensor) -> nn.Module:
    """Return what is shipped: collapsed exactly."""
    for module in model.modules():
        if prune.is_pruned(module) and not list(module.children()):
            prune.remove(module, "weight")
    return collapse(model, example).model


class Comparison:
    """All methods with one seed.

    Args:
        network: The network.
        train: Images to train on.
        test: Images to test on.
        seed: Of the images that are taken, their order and their augmentation.
        options: Those of the command.
    """

    def __init__(self, network: Network, train: Images, test: Images, seed: int, options: Any) -> None:
        self._network, self._train, self._test, self._seed, self._options = network, train, test, seed, options
        self._subset = drawn(train, options.images, seed)
        self._example = test.batch(torch.arange(options.size))
        self._dense = kept(options.keep, f"before-{seed}", self._trained)
        self._teacher = self._dense if options.distill else None
        self._speed = Speed(
            collapse(self._dense, self._example, objective="macs").model, self._example, options.speedup
        )

    def row(self, method: str) -> Row:
        """Return what becomes of a method."""
        make = functools.partial(self._from_scratch if method == "scratch" else self._tuned, method)
        row = kept(self._options.keep, f"{method}-{self._seed}", make)
        if method == "compress":
            self._speed.wanted = self._speed.of(row.shipped)
        rich.print(f"seed {self._seed}: {method}: {row.untuned:.2f} → {row.top1:.2f} ({row.seconds:.0f} s to make)")
        return row

    def _trained(self) -> nn.Module:
        return self._network.trained(self._options.weights, self._train, self._subset, self._options.before, self._seed)

    def _tuned(self, method: str) -> Row:
        began = time.perf_counter()
        model = self._made(method)
        seconds = time.perf_counter() - began
        untuned = accuracy(model, self._test)
        self._network.tune(
            model, self._train, self._subset, self._options.after, self._seed + 1000, teacher=self._teacher
        )
        return self._row(untuned, model, seconds)

    def _from_scratch(self, method: str) -> Row:
        torch.manual_seed(self._seed)
        model = NETWORKS[self._options.network](self._options.scratch).build()
        epochs, rate = self._options.before + self._options.after, self._network.rate_from_scratch
        self._network.tune(model, self._train, self._subset, epochs, self._seed, rate=rate, teacher=self._teacher)
        return self._row(math.nan, model, math.nan)  # there is nothing before its tuning

    def _row(self, untuned: float, model: nn.Module, seconds: float) -> Row:
        return Row(untuned, accuracy(model, self._test), finished(model, self._example), seconds)

    def _made(self, method: str) -> nn.Module:
        if method == "dense":
            return deepcopy(self._dense)
        calibration = self._train.calibration(CALIBRATION, self._seed)
        if method in PEERS:
            labels = self._train.labels[drawn(self._train, CALIBRATION, self._seed)].split(len(calibration[0]))
            made = PEERS[method](deepcopy(self._dense).eval(), calibration, labels, self._speed)
            steps = self._options.finetune if self._options.finetune_peers else 0
            return following(made, self._dense, calibration, steps) if steps else made
        return shallower(self._dense, method, calibration, self._example, self._network, self._options)


def main() -> None:
    """Tune, measure and print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--before", type=float, default=2, help="epochs of the dense network first")
    parser.add_argument("--after", type=float, default=1, help="epochs after that")
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch goes over")
    parser.add_argument("--removed", type=int, default=12, help="activations that identity, affine and fitted remove")
    parser.add_argument("--speedup", type=float, default=1.6, help="of compress, and of peers without it")
    parser.add_argument("--size", type=int, default=64, help="batch size that speed is asked for at")
    parser.add_argument("--blocks", action="store_true", help="compress may replace whole blocks of a ResNet, too")
    parser.add_argument("--no-width", dest="width", action="store_false", help="compress may not take inner channels")
    parser.add_argument("--finetune", type=int, default=0, help="steps without labels that compress ends with")
    parser.add_argument("--finetune-peers", action="store_true", help="the peers end with as many, on the same images")
    parser.add_argument("--scratch.depth", dest="scratch", type=int, default=32, help="of the network from scratch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *PEERS), help="by default all but the peers")
    parser.add_argument("--distill", action="store_true", help="from the dense network, while tuning after")
    parser.add_argument("--keep", type=Path, help="folder of what is done; what is there is taken from it")
    parser.add_argument("--json", type=Path, help="file for what the table says; `tradeoff.py` draws it")
    options = parser.parse_args()
    network = chosen(options)
    if options.methods is None:
        options.methods = [method for method in METHODS if method not in network.unsuited]
    if unsuited := set(options.methods) & set(network.unsuited):
        parser.error(f"--methods {' '.join(sorted(unsuited))} can't be made of a {network.name}; leave them out")
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    rows: dict[str, list[Row]] = {method: [] for method in options.methods}
    for seed in range(options.seeds):
        comparison = Comparison(network, train, test, seed, options)
        for method in options.methods:
            rows[method].append(comparison.row(method))
    lines = timed(rows, network, test, options)
    name = title(network, options)
    print(as_table(lines, name).to_markdown())
    if options.json is not None:
        found = {"title": name, "speedup": options.speedup, "lines": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Line:
    """What the table says of a method, over all seeds.

    Attributes:
        method: Its name.
        untuned: Top-1 before the last epochs, in per cent, of each seed.
        top1: Top-1 after them, of each seed.
        macs: Multiply-accumulates of one image; those of the last seed's network, as all that follows.
        faster: Batch size -> quartiles of how many times faster it is than the dense network, batch norms folded.
        than_given: Batch size -> quartiles of how many times faster it is than the network as given.
        seconds: What the method itself took, of each seed.
    """

    method: str
    untuned: list[float]
    top1: list[float]
    macs: int
    faster: dict[int, tuple[float, float, float]]
    than_given: dict[int, tuple[float, float, float]]
    seconds: list[float]


def timed(rows: dict[str, list[Row]], network: Network, test: Images, options: Any) -> list[Line]:
    """Time the last seed's networks interleaved."""
    shipped = {method: each[-1].shipped for method, each in rows.items()}
    given = network.load(options.weights)
    latencies: dict[int, dict[str, Latency]] = {}
    for size in (1, 64):
        values = test.batch(torch.arange(size))
        calls: dict[str, Callable[..., Any]] = {**shipped, "as given": given, "folded": collapse(given, values).model}
        latencies[size] = at_several_moments(calls, values)
    return [
        Line(
            method,
            [row.untuned for row in each],
            [row.top1 for row in each],
            count_macs(shipped[method], (test.batch(torch.arange(1)),)),
            {size: speed_up(times["folded"], times[method]).quartiles for size, times in latencies.items()},
            {size: speed_up(times["as given"], times[method]).quartiles for size, times in latencies.items()},
            [row.seconds for row in each],
        )
        for method, each in rows.items()
    ]


def at_several_moments(calls: dict[str, Callable[..., Any]], values: Tensor) -> dict[str, Latency]:
    """Time networks in turn, a few rounds at a time: of one moment, other work on the machine would decide."""
    found = [measure_latency(calls, (values,)) for _ in range(MOMENTS)]
    return {name: Latency.of([sample for each in found for sample in each[name].samples]) for name in calls}


def title(network: Network, options: Any) -> str:
    """Say what was done."""
    precision = str(network.dtype).removeprefix("torch.")
    return (
        f"{network.name}, {options.before:g} + {options.after:g} epochs of {options.images:,} images, "
        f"{'distilled, ' if options.distill else ''}{options.seeds} seeds, {precision}, "
        f"{torch.get_num_threads()} threads; faster than the dense network with its batch norms folded (quartiles), "
        f"and than as given"
    )


def as_table(lines: Sequence[Line], name: str) -> Table:
    """Return the table of what was measured."""
    columns = (
        "method",
        "before tuning",
        "top-1 [%]",
        "MMACs",
        "faster, batch 1",
        "faster, batch 64",
        "as given, batch 64",
        "made in [s]",
    )
    rows = []
    for line in lines:
        spread = f" ({min(line.top1):.2f}–{max(line.top1):.2f})" if len(line.top1) > 1 else ""
        untuned = "–" if line.method == "scratch" else f"{mean(line.untuned):.2f}"
        rows.append(
            (
                line.method,
                untuned,
                f"{mean(line.top1):.2f}{spread}",
                f"{line.macs / 1e6:.1f}",
                *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for low, middle, high in line.faster.values()),
                f"{line.than_given[64][1]:.2f}",
                "–" if line.method in ("dense", "scratch") else f"{mean(line.seconds):.0f}",
            )
        )
    return Table(name, columns, rows)


if __name__ == "__main__":
    main()
