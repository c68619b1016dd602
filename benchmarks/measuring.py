"""What does measuring cost? A validation epoch with the callback, against the same epoch of the same Trainer without.

Run it with ``make bench``. The epochs are timed interleaved, from before the first callback's ``on_validation_start``
to after the last one's ``on_validation_end``: what the callback adds there (hooks, counting, reducing the counts,
logging) is in the time. Medians are shown, and the quartiles of the ratio of neighbouring epochs. The peak memory is
that of all values that operators allocate at a time, those of the hooks among them, without parameters and batches.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import rich
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easier import EntropyPruningCallback, Measuring
from lightning_easier.report import Table
from lightning_easier.support.costs import measure_activation_memory
from lightning_easier.support.timing import Latency, speed_up


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that 32×32 images call for."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


CASES = {
    "ResNet-18, 128×3×32×32": (cifar_resnet18, (128, 3, 32, 32)),
    "Swin-T, 8×3×224×224": (torchvision.models.swin_t, (8, 3, 224, 224)),
}
SHARES = {"plain": None, "all": 1.0, "sample=0.1": 0.1}


class Classifier(LightningModule):
    """What a user validates: a model and a score."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log a score."""
        self.log("val_acc", (self.model(batch).argmax(1) == 0).float().mean())


class Clock(Callback):
    """Take the time when a validation starts or ends, when the device has done all that it was given."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time; the clock in front of the other callbacks is the one that counts."""
        self.started = self._now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time; the clock after the other callbacks is the one that counts."""
        self.ended = self._now()

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return perf_counter()


class Validation:
    """A Trainer that validates one model on some batches, as often as it is asked to."""

    def __init__(self, model: nn.Module, batches: list[Tensor], share: float | None, accelerator: str) -> None:
        before, after = Clock(), Clock()
        pruning = (
            [] if share is None else [EntropyPruningCallback(monitor="val_acc", measuring=Measuring(sample=share))]
        )
        silent: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        self._clocks = before, after
        self._trainer = Trainer(accelerator=accelerator, devices=1, callbacks=[before, *pruning, after], **silent)
        self._module = Classifier(model)
        self._batches = batches

    def seconds(self) -> float:
        """Return how long an epoch takes."""
        self._trainer.validate(self._module, DataLoader(self._batches, batch_size=None), verbose=False)
        before, after = self._clocks
        return after.ended - before.started

    def peak_memory(self) -> int:
        """Return the most bytes that values take at a time in an epoch."""
        return measure_activation_memory(_Run(self), self._batches)


class _Run(nn.Module):
    """An epoch as a module that is called with its batches."""

    def __init__(self, validation: Validation) -> None:
        super().__init__()
        self._validation = validation
        self.module = validation._module

    def forward(self, *batches: Tensor) -> None:
        self._validation.seconds()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=7, help="epochs of each that are timed")
    parser.add_argument("--batches", type=int, default=12, help="batches an epoch")
    parser.add_argument("--accelerator", default="cpu", help="the Trainer's")
    options = parser.parse_args()
    rows = []
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        model = make()
        batches = [torch.randn(shape) for _ in range(options.batches)]
        epochs = {which: Validation(model, batches, share, options.accelerator) for which, share in SHARES.items()}
        memory = {which: epoch.peak_memory() for which, epoch in epochs.items()}
        taken: dict[str, list[float]] = {which: [] for which in epochs}
        for _ in range(options.samples):
            for which, epoch in epochs.items():
                taken[which].append(epoch.seconds())
        plain = _latency(taken["plain"])
        for which, seconds in taken.items():
            timed = _latency(seconds)
            third, middle, first = (1 / ratio for ratio in speed_up(plain, timed).quartiles)
            rows.append(
                (
                    name if which == "plain" else "",
                    which,
                    f"{timed.median * 1e3:.0f}",
                    f"{middle:.3f}× ({first:.3f}–{third:.3f})",
                    f"{memory[which] / memory['plain']:.4f}×",
                )
            )
    columns = ("network, batch", "counted", "epoch [ms]", "time (quartiles)", "peak memory of values")
    rich.print(Table("Cost of measuring", columns, rows))


def _latency(seconds: list[float]) -> Latency:
    return Latency(median(seconds), 0.0, tuple(seconds))


if __name__ == "__main__":
    main()
