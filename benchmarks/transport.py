"""What does the transport distance cost as a regulariser? A training step with it, against the same step without.

The network is torchvision's ResNet-18 with the stem that 32×32 images call for; the distances are those between the
input and the output of the second block of each stage, as in LaCoOT. Steps of one model are timed interleaved, from the
forward to the optimizer's step; every other round in the opposite order. Medians are shown, and the quartiles of the
ratio of neighbouring steps. On a machine with much other work ``--cpu-time`` counts what the processor worked for this
process, where the device is the CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

import rich
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_easier import sliced_wasserstein
from lightning_easier.report import Table
from lightning_easier.support.timing import Latency, speed_up

BLOCKS = ("layer1.1", "layer2.1", "layer3.1", "layer4.1")
WEIGHT = 5.0


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that 32×32 images call for."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Training:
    """Steps of one model on one batch, with the distances of its blocks in the loss or without.

    Args:
        batch: Samples of the batch.
        device: Where it is trained.
        clock: Returns seconds.
    """

    def __init__(self, batch: int, device: torch.device, clock: Callable[[], float]) -> None:
        torch.manual_seed(0)
        self._device = device
        self._clock = clock
        self._model = cifar_resnet18().to(device).train()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9)
        self._images = torch.randn(batch, 3, 32, 32, device=device)
        self._labels = torch.randint(10, (batch,), device=device)

    def seconds(self, distance: Callable[[Tensor, Tensor], Tensor] | None) -> float:
        """Train one step, and return how long it took."""
        distances: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            distances.append(distance(args[0], output))

        blocks = () if distance is None else BLOCKS
        handles = [self._model.get_submodule(name).register_forward_hook(hook) for name in blocks]
        started = self._now()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._model(self._images), self._labels)
        if distances:
            loss = loss + WEIGHT * torch.stack(distances).mean()
        loss.backward()
        self._optimizer.step()
        ended = self._now()
        for handle in handles:
            handle.remove()
        return ended - started

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return self._clock()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=9, help="steps of each that are timed")
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--directions", type=int, default=50, help="directions a distance")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--cpu-time", action="store_true", help="count the time of this process alone")
    options = parser.parse_args()
    cases: dict[str, Any] = {"none": None}
    for kind in ("max", "mean"):
        cases[kind] = partial(sliced_wasserstein, directions=options.directions, kind=kind)
    training = Training(options.batch, options.device, process_time if options.cpu_time else perf_counter)
    for distance in cases.values():  # warm-up
        training.seconds(distance)
    taken: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(options.samples):
        for case in list(cases)[:: 1 if number % 2 else -1]:
            taken[case].append(training.seconds(cases[case]))
    plain = _latency(taken["none"])
    rows = []
    for case, seconds in taken.items():
        timed = _latency(seconds)
        third, middle, first = (1 / ratio for ratio in speed_up(plain, timed).quartiles)
        rows.append((case, f"{timed.median * 1e3:.0f}", f"{middle:.3f}× ({first:.3f}–{third:.3f})"))
    columns = ("distance", "step [ms]", "time (quartiles)")
    rich.print(Table(f"A training step of ResNet-18, {options.batch}×3×32×32", columns, rows))


def _latency(seconds: list[float]) -> Latency:
    return Latency(median(seconds), 0.0, tuple(seconds))


if __name__ == "__main__":
    main()
