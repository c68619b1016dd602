"""How much accuracy is left per second saved, with equal tuning for every method?

A trained CIFAR ResNet is tuned for some epochs (its images may be others than those it was trained on), then made
shallower by each method, tuned for some epochs more, and collapsed. The dense network is tuned for as many in all. The
methods:

- ``identity``: EASIER. The activations of lowest entropy become identities.
- ``affine``: the activations inside the blocks, in the order of entropy, become the affines that come closest.
- ``fitted``: one convolution takes the place of a block's two, in the order of linearity.
- ``compress``: what changes the outputs least per second saved goes first, until the network is fast enough.
- ``magnitude``: half of the weights, the smallest of the whole network, are zero (what Lightning's ModelPruning does).
- ``scratch``: a shallower network of about as many multiply-accumulates, trained from scratch for as many epochs.

Tuning is SGD with momentum and a cosine schedule, under bfloat16 autocast; ``--distill`` has all of them follow the
logits of the dense network. The images come as folders, ``<root>/train/<class>`` and ``<root>/test/<class>``; the
weights as a file with a ``state_dict`` whose keys may begin with ``module.``:

    python benchmarks/tuning.py --data.root <folder> --weights <file> --depth 56
"""

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import mean
from typing import Any

import rich
import torch
import torch.nn.functional as F
from removing import load
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_easier import (
    collapse,
    compress,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
    measure_fits,
)
from lightning_easier.costs import Latency, count_macs, measure_latency, speed_up
from lightning_easier.report import Table
from lightning_easier.zoo import CifarResNet

METHODS = ("dense", "identity", "affine", "fitted", "compress", "magnitude", "scratch")
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Images:
    """All images of a folder, in memory.

    Args:
        folder: With a folder of images for each class.
    """

    def __init__(self, folder: str) -> None:
        files = datasets.ImageFolder(folder, v2.PILToTensor())
        self.labels = torch.tensor(files.targets)
        self.pixels = torch.stack([files[place][0] for place in tqdm(range(len(files)), desc=folder, leave=False)])

    def batch(self, places: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return normalized images; shifted by up to four pixels and flipped if there is a generator."""
        images = self.pixels[places]
        if generator is not None:
            count, size = len(images), images.shape[-1]
            images = F.pad(images, (4, 4, 4, 4))
            down, right = torch.randint(0, 9, (2, count, 1), generator=generator)
            rows, columns = (start + torch.arange(size) for start in (down, right))
            images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            images = images.movedim(-1, 1)
            flipped = torch.rand(count, generator=generator) < 0.5
            images[flipped] = images[flipped].flip(-1)
        return (images.float() / 255 - MEAN) / STD


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return top-1 accuracy in per cent, in float32."""
    places = torch.arange(len(images.labels)).split(500)
    return (
        100
        * sum(int((model(images.batch(p)).argmax(1) == images.labels[p]).sum()) for p in places)
        / len(images.labels)
    )


def tune(
    model: nn.Module, images: Images, epochs: float, rate: float, seed: int, teacher: nn.Module | None, options: Any
) -> nn.Module:
    """Train a model in place; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    count = min(options.images, len(images.labels))
    subset = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(options.subset))[:count]
    steps = int(epochs * (count // options.batch))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    batches = iter(())
    for _ in tqdm(range(steps), leave=False, mininterval=10):
        places = next(batches, None)
        if places is None or len(places) < options.batch:
            batches = iter(subset[torch.randperm(count, generator=generator)].split(options.batch))
            places = next(batches)
        values = images.batch(places, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(values).float()
            loss = F.cross_entropy(logits, images.labels[places])
            if teacher is not None:
                with torch.no_grad():
                    wanted = (teacher(values).float() / 4).log_softmax(1)
                divergence = F.kl_div((logits / 4).log_softmax(1), wanted, log_target=True, reduction="batchmean")
                loss = 0.3 * loss + 0.7 * 16 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def shallower(model: nn.Module, method: str, calibration: Sequence[Tensor], example: Tensor, options: Any) -> nn.Module:
    """Return what a method makes of a copy of a model, to be tuned."""
    model = deepcopy(model).eval()
    sites = list(isolate_activations(model))
    inner = [name for name in sites if name.endswith("relu1")]
    if method == "compress":
        return compress(
            model, calibration, target_speedup=options.speedup, example_inputs=example, include=inner
        ).fitted  # fmt: skip
    if method == "magnitude":
        weights = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.5)
        return model
    if method == "fitted":
        for _ in range(options.removed):
            fits = measure_fits(model, calibration, include=inner)
            best = max(fits, key=lambda name: fits[name].explained)
            linearize(model, [best], stand_in="fitted", statistics=fits)
            inner.remove(best)
        return model
    entropies = measure_entropy(model, calibration)
    if method == "identity":
        return linearize(model, sorted(sites, key=entropies.__getitem__)[: options.removed])
    chosen = sorted(inner, key=entropies.__getitem__)[: options.removed]
    return linearize(model, chosen, stand_in="affine", statistics=measure_affines(model, calibration))


def finished(model: nn.Module, method: str, example: Tensor) -> nn.Module:
    """Return what is shipped: collapsed exactly."""
    if method == "magnitude":
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                prune.remove(module, "weight")
    return collapse(model, example).model


def main() -> None:
    """Tune, measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", required=True, help="folder of the images")
    parser.add_argument("--weights", required=True, help="file of the weights")
    parser.add_argument("--depth", type=int, default=56, help="of the ResNet")
    parser.add_argument("--before", type=float, default=2, help="epochs of the dense network first")
    parser.add_argument("--after", type=float, default=1, help="epochs after that")
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch goes over")
    parser.add_argument("--removed", type=int, default=12, help="activations that identity, affine and fitted remove")
    parser.add_argument("--speedup", type=float, default=1.6, help="of compress, against the network as given")
    parser.add_argument("--scratch.depth", dest="scratch", type=int, default=32, help="of the network from scratch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--distill", action="store_true", help="from the dense network, while tuning after")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.01, help="largest learning rate")
    options = parser.parse_args()
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    example = test.batch(torch.arange(64))
    scores: dict[str, list[float]] = {method: [] for method in options.methods}
    untuned: dict[str, list[float]] = {method: [] for method in options.methods}
    shipped: dict[str, nn.Module] = {}
    for seed in range(options.seeds):
        options.subset = seed
        given = load(options.weights, options.depth)
        dense = tune(deepcopy(given), train, options.before, options.rate, seed, None, options)
        places = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))[:1000]
        calibration = [train.batch(part) for part in places.split(250)]
        teacher = dense if options.distill else None
        for method in options.methods:
            began = time.perf_counter()
            if method == "dense":
                model = deepcopy(dense)
            elif method == "scratch":
                torch.manual_seed(seed)
                model = tune(CifarResNet(options.scratch), train, options.before, 0.1, seed, None, options)
            else:
                model = shallower(dense, method, calibration, example, options)
            untuned[method].append(accuracy(model, test))
            made = time.perf_counter() - began
            tune(model, train, options.after, options.rate, seed + 1000, teacher, options)
            scores[method].append(accuracy(model, test))
            shipped[method] = finished(model, method, example)
            rich.print(
                f"seed {seed}: {method}: {untuned[method][-1]:.2f} → {scores[method][-1]:.2f} ({made:.0f} s to make)"
            )
    print_table(scores, untuned, shipped, load(options.weights, options.depth), test, options)


def print_table(
    scores: dict[str, list[float]],
    untuned: dict[str, list[float]],
    shipped: dict[str, nn.Module],
    given: nn.Module,
    test: Images,
    options: Any,
) -> None:
    """Time the last seed's networks interleaved, and print."""
    latencies: dict[int, dict[str, Latency]] = {}
    for size in (1, 64):
        values = test.batch(torch.arange(size))
        calls: dict[str, Callable[..., Any]] = {**shipped, "as given": given, "folded": collapse(given, values).model}
        latencies[size] = measure_latency(calls, (values,), samples=25)
    rows = []
    for method, values in scores.items():
        faster = [speed_up(times["folded"], times[method]) for times in latencies.values()]
        whole = speed_up(latencies[64]["as given"], latencies[64][method])[1]
        spread = f" ± {max(values) - min(values):.2f}" if len(values) > 1 else ""
        macs = count_macs(shipped[method], (test.batch(torch.arange(1)),)) / 1e6
        rows.append(
            (method, f"{mean(untuned[method]):.2f}", f"{mean(values):.2f}{spread}", f"{macs:.1f}",
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
    title = (
        f"ResNet-{options.depth}, {options.before:g} + {options.after:g} epochs of {options.images:,} images, "
        f"{'distilled, ' if options.distill else ''}{options.seeds} seeds, {torch.get_num_threads()} threads; faster "
        f"than the dense network with its batch norms folded (quartiles), and than as given"
    )
    print(Table(title, columns, rows).to_markdown())


if __name__ == "__main__":
    main()
