"""How does the cost grow? With batches, activations, processes and epochs for measuring, with operators for a collapse.

Part ``scale`` of ``python -m benchmarks``. Where sizes are compared, the time is that for each unit of work: it stays
the same where the cost is linear.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from children import process_context
from collapsing import PAIRS, collapses, linears, permutations
from measuring import Validation, cifar_resnet18
from questions import Bar, Case, Effort, Question, Variant
from torch import nn

from lightning_easier.zoo import CifarResNet

WITH, WITHOUT = "with the callback", "without"
SHARES = {WITHOUT: None, WITH: 1.0}
# Times of small work are less steady
LINEAR = Bar(time=1.25)


def questions(effort: Effort) -> Iterator[Question]:
    """Ask how what measuring adds grows, and how a collapse does."""
    make = effort.pick(cifar_resnet18, partial(CifarResNet, 20), partial(CifarResNet, 8))
    batches = effort.pick(12, 4, 2)
    sizes = effort.pick((8, 32, 128), (8, 64), (2, 4))
    bars = {f"batch {size}": LINEAR for size in sizes[1:]}
    name = "with the callback, for each image"
    yield _question("validation epoch: batch size", {name: partial(sized, make, sizes, batches)}, bars)
    counts = effort.pick((10, 100, 1000), (10, 100), (2, 6))
    bars = {f"{count} activations": LINEAR for count in counts[1:]}
    name = "MLP of width 64, batch 256, with the callback, for each activation"
    yield _question("validation epoch: activations", {name: partial(mlps, counts)}, bars)
    epochs = effort.pick(100, 20, 2)
    bars = {f"after {epochs} epochs": Bar(time=1.05)}
    yield _question("validation epoch: epochs before it", {"with the callback": partial(aged, make, epochs)}, bars)
    if effort.device == "cpu":
        crew = {
            f"{count} processes": partial(crews, make, count, batches) for count in effort.pick((1, 2, 4), (1, 2), (2,))
        }
        yield _question("validation epoch: processes (gloo, one thread each)", crew, {})
    chains = effort.pick((125, 250, 500, 1000), (50, 200), (4, 8))
    pairs = effort.pick((100, 200, 400), (25, 100), (4, 8))
    for name, build, counts in (("Linear 64→64", linears, chains), (PAIRS, permutations, pairs)):
        bars = {f"{count}": LINEAR for count in counts[1:]}
        yield _question(f"collapse: {name}", {"for each": partial(collapses, build, counts)}, bars)


def _question(name: str, variants: Mapping[str, Any], bars: Mapping[str, Bar]) -> Question:
    return Question(name, tuple(Case(case, make, bars, has_memory=False) for case, make in variants.items()))


def sized(make: Any, sizes: Sequence[int], batches: int, device: torch.device) -> dict[str, Variant]:
    """Return validation epochs, with the callback, of one model with so many images in each batch."""
    model = make()
    epochs = {size: Validation(model, [torch.randn(size, 3, 32, 32)] * batches, 1.0, device) for size in sizes}
    return {f"batch {size}": Variant(epoch.seconds, size) for size, epoch in epochs.items()}


def mlps(counts: Sequence[int], device: torch.device) -> dict[str, Variant]:
    """Return validation epochs, with the callback, of networks that have so many activations."""
    variants = {}
    for count in counts:
        layers = [layer for _ in range(count) for layer in (nn.Linear(64, 64), nn.ReLU())]
        epoch = Validation(nn.Sequential(*layers), [torch.randn(256, 64)] * 2, 1.0, device)
        variants[f"{count} activations"] = Variant(epoch.seconds, count)
    return variants


def aged(make: Any, epochs: int, device: torch.device) -> dict[str, Variant]:
    """Return validation epochs of a callback that is new, and of one that has seen some epochs."""
    model, batches = make(), [torch.randn(16, 3, 32, 32) for _ in range(2)]
    new, old = (Validation(model, batches, 1.0, device) for _ in range(2))
    for _ in range(epochs):
        old.seconds()
    return {"after one epoch": Variant(new.seconds), f"after {epochs} epochs": Variant(old.seconds)}


def crews(make: Any, processes: int, batches: int, device: torch.device) -> dict[str, Variant]:
    """Return validation epochs of several processes on the CPU, with the callback and without."""
    crew = Crew(make, processes, batches)
    return {name: Variant(partial(crew.seconds, name)) for name in SHARES}


class Crew:
    """Processes that validate one model together whenever they are told to.

    Args:
        make: Makes the model.
        processes: How many there are.
        batches: How many each has.
    """

    def __init__(self, make: Any, processes: int, batches: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ends: list[Connection] = []
        for rank in range(processes):
            here, there = process_context().Pipe()
            arguments = there, rank, processes, port, make, batches
            process_context().Process(target=_validate_when_told, args=arguments, daemon=True).start()
            there.close()
            self._ends.append(here)

    def seconds(self, name: str) -> float:
        """Return how long an epoch takes until the last of them is done."""
        for end in self._ends:
            end.send(name)
        return max(end.recv() for end in self._ends)


def _validate_when_told(told: Connection, rank: int, processes: int, port: int, make: Any, batches: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    model, data = make(), [torch.randn(16, 3, 32, 32) for _ in range(batches * processes)]
    together = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    epochs = {name: Validation(model, data, share, torch.device("cpu"), **together) for name, share in SHARES.items()}
    teller = os.getppid()
    while os.getppid() == teller:
        if told.poll(1.0):
            told.send(epochs[told.recv()].seconds())
