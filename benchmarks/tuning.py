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

``--distill`` has all of them follow the logits of the dense network. ``cifar.py`` says how they are tuned, and what the
images and weights are:

    python benchmarks/tuning.py --data.root <folder> --weights <file> --depth 56

Networks other than a ResNet are trained from scratch for ``--before`` epochs, and written to the file of the weights;
what is there is taken, with every seed:

    python benchmarks/tuning.py --data.root <folder> --network vgg --weights <new file> --before 4
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import mean
from typing import Any

import rich
import torch
from cifar import Images, accuracy, drawn
from lightning.pytorch.callbacks import ModelPruning
from networks import NETWORKS, Network, add_arguments, chosen
from peers import PEERS, Speed
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_easier import (
    collapse,
    compress,
    fit_chains,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
)
from lightning_easier.report import Table
from lightning_easier.support.costs import count_macs
from lightning_easier.support.timing import Latency, measure_latency, speed_up

METHODS = ("dense", "identity", "affine", "fitted", "compress", "magnitude", "channels", "scratch")
CALIBRATION = 1000  # images


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
            model, calibration, example_inputs=example, include=include, finetune=options.finetune or None, **target
        ).fitted
    if method == "magnitude":
        weights = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return zeroed(model, ModelPruning("l1_unstructured", weights, use_global_unstructured=True), 1 / 2)
    if method == "channels":
        weights = [(m, "weight") for name, m in model.named_modules() if name.endswith("conv1") and "." in name]
        pruning = ModelPruning(
            "ln_structured", weights, use_global_unstructured=False, pruning_norm=2, pruning_dim=0
        )  # fmt: skip
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


def zeroed(model: Any, pruning: ModelPruning, amount: float) -> nn.Module:
    """Have a callback of Lightning's prune a model once, outside of a run."""
    pruning.setup(None, model, "fit")  # type: ignore[arg-type]  # The trainer is not asked.
    pruning.apply_pruning(amount)
    return model


def finished(model: nn.Module, example: Tensor) -> nn.Module:
    """Return what is shipped: collapsed exactly."""
    for module in model.modules():
        if prune.is_pruned(module) and not list(module.children()):
            prune.remove(module, "weight")
    return collapse(model, example).model


def main() -> None:
    """Tune, measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--before", type=float, default=2, help="epochs of the dense network first")
    parser.add_argument("--after", type=float, default=1, help="epochs after that")
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch goes over")
    parser.add_argument("--removed", type=int, default=12, help="activations that identity, affine and fitted remove")
    parser.add_argument("--speedup", type=float, default=1.6, help="of compress, and of peers without it")
    parser.add_argument("--blocks", action="store_true", help="compress may replace whole blocks of a ResNet, too")
    parser.add_argument("--finetune", type=int, default=0, help="steps without labels that compress ends with")
    parser.add_argument("--scratch.depth", dest="scratch", type=int, default=32, help="of the network from scratch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *PEERS), help="by default all but the peers")
    parser.add_argument("--distill", action="store_true", help="from the dense network, while tuning after")
    options = parser.parse_args()
    network = chosen(options)
    if options.methods is None:
        options.methods = [method for method in METHODS if method not in network.unsuited]
    if unsuited := set(options.methods) & set(network.unsuited):
        parser.error(f"--methods {' '.join(sorted(unsuited))} can't be made of a {network.name}; leave them out")
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    example = test.batch(torch.arange(64))
    scores: dict[str, list[float]] = {method: [] for method in options.methods}
    untuned: dict[str, list[float]] = {method: [] for method in options.methods}
    shipped: dict[str, nn.Module] = {}
    for seed in range(options.seeds):
        subset, calibration = drawn(train, options.images, seed), train.calibration(CALIBRATION, seed)
        labels = train.labels[drawn(train, CALIBRATION, seed)].split(len(calibration[0]))
        dense = network.trained(options.weights, train, subset, options.before, seed)
        teacher = dense if options.distill else None
        speed = Speed(collapse(dense, example, objective="macs").model, example, options.speedup)
        for method in options.methods:
            began = time.perf_counter()
            if method == "scratch":
                torch.manual_seed(seed)
                model = NETWORKS[options.network](options.scratch).build()
                left = math.nan  # There is nothing before its tuning.
                epochs = options.before + options.after
                network.tune(model, train, subset, epochs, seed, rate=network.rate_from_scratch, teacher=teacher)
            elif method == "dense":
                model = deepcopy(dense)
            elif method in PEERS:
                model = PEERS[method](deepcopy(dense).eval(), calibration, labels, speed)
            else:
                model = shallower(dense, method, calibration, example, network, options)
            if method == "compress":
                speed.wanted = speed.of(model)
            made = time.perf_counter() - began
            if method != "scratch":
                left = accuracy(model, test)
                network.tune(model, train, subset, options.after, seed + 1000, teacher=teacher)
            untuned[method].append(left)
            scores[method].append(accuracy(model, test))
            shipped[method] = finished(model, example)
            rich.print(f"seed {seed}: {method}: {left:.2f} → {scores[method][-1]:.2f} ({made:.0f} s to make)")
    print_table(scores, untuned, shipped, network, test, options)


def print_table(
    scores: dict[str, list[float]],
    untuned: dict[str, list[float]],
    shipped: dict[str, nn.Module],
    network: Network,
    test: Images,
    options: Any,
) -> None:
    """Time the last seed's networks interleaved, and print."""
    given = network.load(options.weights)
    latencies: dict[int, dict[str, Latency]] = {}
    for size in (1, 64):
        values = test.batch(torch.arange(size))
        calls: dict[str, Callable[..., Any]] = {**shipped, "as given": given, "folded": collapse(given, values).model}
        latencies[size] = measure_latency(calls, (values,), samples=25)
    rows = []
    for method, values in scores.items():
        faster = [speed_up(times["folded"], times[method]).quartiles for times in latencies.values()]
        whole = speed_up(latencies[64]["as given"], latencies[64][method]).median
        spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
        macs = count_macs(shipped[method], (test.batch(torch.arange(1)),)) / 1e6
        left = "–" if method == "scratch" else f"{mean(untuned[method]):.2f}"
        rows.append(
            (method, left, f"{mean(values):.2f}{spread}", f"{macs:.1f}",
             *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for low, middle, high in faster), f"{whole:.2f}")
        )  # fmt: skip
    columns = (
        "method",
        "before tuning",
        "top-1 [%]",
        "MMACs",
        "faster, batch 1",
        "faster, batch 64",
        "as given, batch 64",
    )
    precision = str(network.dtype).removeprefix("torch.")
    title = (
        f"{network.name}, {options.before:g} + {options.after:g} epochs of {options.images:,} images, "
        f"{'distilled, ' if options.distill else ''}{options.seeds} seeds, {precision}, "
        f"{torch.get_num_threads()} threads; faster than the dense network with its batch norms folded (quartiles), "
        f"and than as given"
    )
    print(Table(title, columns, rows).to_markdown())


if __name__ == "__main__":
    main()
