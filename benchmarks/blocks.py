"""What does it cost to take whole blocks out, with the regularizer of LaCoOT and without, and how much time is saved?

A trained CIFAR ResNet is trained on, with each weight of the regularizer. Then its blocks are taken out one by one,
those first whose output is nearest to their input, and nothing is trained: the first table. Each network of so many
blocks less is then tuned for some epochs more, and so are, from the network that was trained without the regularizer:

- ``compress``: the chains inside the blocks whose replacement changes the outputs least per second saved, until it is
  as fast.
- ``easier``: identities in the place of as many activations inside the blocks, those of lowest entropy.

All are collapsed, and timed in turn with the network that was trained without the regularizer, batch norms folded in
both. ``cifar.py`` says what images and weights are. A run that was cut short does not train again what is done:

    python benchmarks/blocks.py --data.root <folder> --weights <file> --output <folder>
"""

import argparse
import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, drawn, load, tune
from learner import Learner
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_easier import (
    Files,
    OptimalTransportCallback,
    collapse,
    compress,
    isolate_activations,
    linearize,
    measure_entropy,
    restore_structure_on_load,
)
from lightning_easier.report import Table
from lightning_easier.support.timing import measure_latency, speed_up


def train(weight: float, options: Any, images: Images, folder: Path) -> None:
    """Train with a weight of the regularizer, and leave the checkpoint of each number of blocks in a folder."""
    seed_everything(options.seed, verbose=False)
    everything = drawn(images, len(images), options.seed)
    held_out, places = everything[: options.held_out], everything[options.held_out :][: options.images]
    steps = options.epochs * (len(places) // options.batch)
    learner = Learner(load(options.weights, options.depth), images, options.rate, steps)
    learner.train().to(memory_format=torch.channels_last)
    callback = OptimalTransportCallback(
        "val_acc", tolerance=1.0, weight=weight, directions=options.directions, files=Files(dirpath=str(folder))
    )  # every number is kept: which is good enough is told by the table
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", precision="bf16-mixed", logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = DataLoader(places, options.batch, shuffle=True, drop_last=True), DataLoader(held_out, 250)
    trainer.fit(learner, *loaders)
    (folder / "report.md").write_text(str(callback.report()))


def networks(weight: float, options: Any, images: Images) -> list[nn.Module]:
    """Return the networks that no block, one, two, ... were taken out of; what is there is not trained again."""
    folder = Path(options.output) / f"weight_{weight:g}"
    if not (folder / "report.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train(weight, options, images, folder)
    found = []
    for number in range(min(len([*folder.glob("round_*.ckpt")]), options.most + 1)):
        learner = restore_structure_on_load(Learner(load(options.weights, options.depth), images, options.rate, 1))
        learner.load_state_dict(torch.load(folder / f"round_{number}.ckpt", weights_only=True)["state_dict"])
        found.append(learner.model.eval())
    return found


def main() -> None:
    """Train, take out, tune, and print two tables."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", required=True, help="folder for the checkpoints")
    parser.add_argument("--regularizers", nargs="+", type=float, default=[0.0, 1.0], help="weights; 0 has to be there")
    parser.add_argument("--directions", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--images", type=int, default=48_000, help="training images of an epoch")
    parser.add_argument("--held_out", type=int, default=2_000, help="training images that distances are measured on")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.05, help="largest learning rate")
    parser.add_argument("--most", type=int, default=7, help="blocks taken out of the networks in the first table")
    parser.add_argument("--tuned", nargs="*", type=int, default=[2, 3], help="numbers of blocks that are tuned without")
    parser.add_argument("--tuning", type=float, default=1.0, help="epochs of that")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(depth=20)
    options = parser.parse_args()
    images, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    example, subset = test.batch(torch.arange(64)), drawn(images, options.images, options.seed)
    of_weight = {weight: networks(weight, options, images) for weight in options.regularizers}
    dense = of_weight[0.0][0]
    calls = {"dense": collapse(dense, example, objective="macs").model}
    scores: dict[str, tuple[str, ...]] = {"dense": ("0", f"{accuracy(dense, test):.2f}", "–")}
    for weight, found in of_weight.items():
        for number, network in enumerate(found):
            name = f"{weight:g}, {number} taken out"
            scores[name] = str(number), f"{accuracy(network, test):.2f}", "–"
            calls[name] = collapse(network, example, objective="macs").model
            print(name, *scores[name], flush=True)

    def tuned(name: str, number: int, network: nn.Module) -> None:
        before = accuracy(network, test)
        network = tune(network, images, subset, options.tuning, options.seed + 1, teacher=dense)
        scores[name] = str(number), f"{before:.2f}", f"{accuracy(network, test):.2f}"
        calls[name] = collapse(network, example, objective="macs").model
        print(name, *scores[name], flush=True)

    tuned("dense, tuned", 0, deepcopy(dense))
    calibration = images.calibration(1000, options.seed)
    for number in options.tuned:
        for weight, found in of_weight.items():
            if number < len(found):
                tuned(f"{weight:g}, {number} taken out, tuned", number, deepcopy(found[number]))
        three = {"as given": dense, "dense": calls["dense"], "it": calls[f"0, {number} taken out"]}
        reached = measure_latency(three, (example,))
        speedup = speed_up(reached["dense"], reached["it"]).median
        as_given = speed_up(reached["as given"], reached["dense"]).median
        inner = [name for name in isolate_activations(deepcopy(dense)) if name.endswith("relu1")]
        target = {"target_speedup": speedup * as_given, "max_drift": math.inf}
        made = compress(dense, calibration, example_inputs=example, include=inner, **target).fitted
        tuned(f"compress, {speedup:.2f}× wanted, tuned", number, made)
        easier = deepcopy(dense)
        isolate_activations(easier)
        entropies = measure_entropy(easier, calibration)
        linearize(easier, sorted(inner, key=entropies.__getitem__)[:number])
        tuned(f"easier, {number} linear, tuned", number, easier)
    rows = []
    latencies = {size: measure_latency(calls, (test.batch(torch.arange(size)),)) for size in (1, 64)}
    for name, row in scores.items():
        times = [speed_up(each["dense"], each[name]).quartiles for each in latencies.values()]
        rows.append((name, *row, *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for low, middle, high in times)))
    trained = f"{options.epochs} epochs of {options.images:,} images"
    title = f"ResNet-{options.depth}, {trained}, then {options.tuning:g} of tuning"
    columns = ("weight of the regularizer", "taken out", "top-1 [%]", "tuned", "faster, batch 1", "faster, batch 64")
    print(Table(title, columns, rows).to_markdown())


if __name__ == "__main__":
    main()
