"""Which way of pruning empties layers, at which accuracy, and how much time is saved once the channels are gone?

A trained CIFAR ResNet is pruned inside its blocks, in rounds of equally many epochs for every method; the dense network
is trained for as many. With ``--distill`` the pruned ones follow the logits of what they were before their first round,
too. The methods:

- ``nepenthe``, ``egp``, ``magnitude``, ``uniform``: :class:`~lightning_easier.EntropyGuidedPruningCallback`.
- ``tlc``: one activation a round, by batch norm's shift and scale, becomes a scale of 1 or 0 for each channel.
- ``easier``: one activation a round, that of lowest entropy, becomes the identity.

Of each, every round is scored on the test images, and the last that lies within a point of the dense network is
collapsed and timed: in turn with the dense network, batch norms folded in both. ``cifar.py`` says what images and
weights are. A run that was cut short goes on with the methods that are not done:

    python benchmarks/emptying.py --data.root <folder> --weights <file> --depth 20 --output <folder>
"""

import argparse
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from cifar import Images, accuracy, add_arguments, drawn, load
from learner import Learner
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easier import (
    Distillation,
    EntropyGuidedPruningCallback,
    EntropyPruningCallback,
    Files,
    Linearize,
    Order,
    PruningCallback,
    Rounds,
    collapse,
    measure_entropy,
    restore_structure_on_load,
)
from lightning_easier.report import Table
from lightning_easier.structure.linearize import stand_ins

METHODS = ("dense", "nepenthe", "egp", "magnitude", "uniform", "tlc", "easier")
INNER = "*.relu1"


def callback_of(method: str, options: Any, folder: str) -> PruningCallback:
    """Return what prunes by a method; the dense network is trained in rounds that remove nothing."""
    common: dict[str, Any] = {
        "monitor": "val_acc",
        "tolerance": 1.0,  # every round is kept: which is good enough is told by the table
        "include": [INNER],
        "rounds": Rounds(epochs=options.epochs, restart="optimizer"),
        "distillation": Distillation(weight=0.7) if options.distill else None,
        "files": Files(dirpath=folder),
    }
    if method == "tlc":
        return EntropyPruningCallback(method=Linearize(stand_in="on_off", order=Order(criterion="tlc")), **common)
    if method == "easier":
        return EntropyPruningCallback(**common)
    return EntropyGuidedPruningCallback(amount=options.amount, variant=method, **common)


@dataclass
class Scored:
    """A model after a round, and what is left of it.

    Attributes:
        number: Of the round.
        model: The network.
        accuracy: On the test images, in per cent.
        emptied: How many activations inside the blocks are linear, or do not switch.
        sparsity: Share of zeros among the weights of the convolutions.
    """

    number: int
    model: nn.Module
    accuracy: float
    emptied: int
    sparsity: float


def scored(number: int, model: nn.Module, test: Images, held_out: list[Tensor]) -> Scored:
    """Score a model after a round."""
    entropies = {name: value for name, value in measure_entropy(model, held_out).items() if name.endswith("relu1")}
    emptied = len(stand_ins(model)) + sum(value == 0 for value in entropies.values())
    weights = [value for value in model.parameters() if value.ndim == 4]
    zeros = sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)
    return Scored(number, model, accuracy(model, test), emptied, zeros)


def train(method: str, options: Any, images: Images, folder: Path) -> None:
    """Train by a method, and leave the checkpoint of each round in a folder."""
    seed_everything(options.seed, verbose=False)
    everything = drawn(images, len(images), options.seed)
    held_out, places = everything[: options.held_out], everything[options.held_out :][: options.images]
    steps = options.epochs * (len(places) // options.batch)
    if method == "dense":  # one long schedule
        steps *= options.rounds + 1
    learner = Learner(load(options.weights, options.depth), images, options.rate, steps)
    learner.train().to(memory_format=torch.channels_last)
    callbacks: list[Any] = [] if method == "dense" else [callback_of(method, options, str(folder))]
    trainer = Trainer(
        max_epochs=options.epochs * (options.rounds + 1), accelerator="cpu", precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    loaders = DataLoader(places, options.batch, shuffle=True, drop_last=True), DataLoader(held_out, 500)
    trainer.fit(learner, *loaders)
    if method == "dense":
        trainer.save_checkpoint(folder / "round_0.ckpt")
    (folder / "report.md").write_text(str(callbacks[0].report()) if callbacks else "dense")


def rounds_of(method: str, options: Any, images: Images, test: Images) -> Iterator[Scored]:
    """Yield the model of each round; a method whose rounds are there is not trained again."""
    folder = Path(options.output) / method
    if not (folder / "report.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train(method, options, images, folder)
    held_out = drawn(images, len(images), options.seed)[: options.held_out]
    batches = [images.batch(each) for each in held_out.split(500)]
    for number in range(len([*folder.glob("round_*.ckpt")])):
        learner = restore_structure_on_load(Learner(load(options.weights, options.depth), images, options.rate, 1))
        learner.load_state_dict(torch.load(folder / f"round_{number}.ckpt", weights_only=True)["state_dict"])
        network = nn.Sequential(OrderedDict(model=learner.model.eval()))  # what is in it goes by the names of the run
        yield scored(number, network, test, batches)


def main() -> None:
    """Prune by every method, and print two tables."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", required=True, help="folder for the checkpoints of all rounds")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=6, help="after the dense one")
    parser.add_argument("--epochs", type=int, default=1, help="of a round")
    parser.add_argument("--distill", action="store_true", help="from the network after round 0, in all later rounds")
    parser.add_argument("--images", type=int, default=20_000, help="training images of an epoch")
    parser.add_argument("--held_out", type=int, default=2_000, help="training images that entropy is measured on")
    parser.add_argument("--amount", type=float, default=0.5, help="share of the weights that a round prunes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.02, help="largest learning rate of a round")
    parser.add_argument("--within", type=float, default=1.0, help="points below the dense network")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(depth=20)
    options = parser.parse_args()
    train, test = (Images(f"{options.root}/{split}") for split in ("train", "test"))
    by_round, chosen = [], []
    dense = next(rounds_of("dense", options, train, test))
    print(f"dense: {dense.accuracy:.1f}", flush=True)
    for method in options.methods:
        found = [dense] if method == "dense" else list(rounds_of(method, options, train, test))
        for each in found:
            row = method, str(each.number), f"{each.accuracy:.1f}", str(each.emptied), f"{each.sparsity:.1%}"
            by_round.append(row)
            print(*row, flush=True)
        good = [each for each in found if each.accuracy >= dense.accuracy - options.within]
        if good:
            chosen.append((method, good[-1]))
    rows = []
    for method, each in chosen:
        for batch in (64, 1):
            report = collapse(each.model, test.batch(torch.arange(batch))).report
            rows.append((
                method, str(each.number), f"{each.accuracy:.1f}", str(each.emptied), f"{each.sparsity:.1%}", str(batch),
                f"{report.after.macs or 0:,}", str(report.speedup),
            ))  # fmt: skip
            print(*rows[-1], flush=True)
    title = f"ResNet-{options.depth}, {options.rounds} rounds of {options.epochs} × {options.images:,} images"
    columns = ("method", "round", "top-1 [%]", "emptied", "zeros")
    print(Table(title, columns, by_round).to_markdown())
    print(Table(f"The last within {options.within:g}", (*columns, "batch", "MACs", "speedup"), rows).to_markdown())


if __name__ == "__main__":
    main()
