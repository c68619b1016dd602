"""What does measuring cost? A validation epoch with the callback, against the same epoch of the same Trainer without.

Part ``measuring`` of ``python -m benchmarks``, which ``python benchmarks/measuring.py`` is short for. An epoch is timed
from before the first callback's ``on_validation_start`` to after the last one's ``on_validation_end``: what the
callback adds there (hooks, counting, reducing the counts, logging) is in the time.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from questions import Bar, Case, Effort, Question, Variant
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easier import EntropyPruningCallback, Measuring
from lightning_easier.zoo import CifarResNet

SHARES = {"plain": None, "all": 1.0, "sample=0.1": 0.1}
BARS = {"all": Bar(time=1.05, memory=1.01), "sample=0.1": Bar(time=1.02, memory=1.01)}
SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that 32×32 images call for."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def questions(effort: Effort) -> Iterator[Question]:
    """Ask what the callback adds to a validation epoch, counting every sample, or every tenth."""
    small = ("ResNet-18", cifar_resnet18, (effort.pick(128, 32, 4), 3, 32, 32))
    large = [(name, torchvision.models.get_model_builder(kind), (8, 3, 224, 224))
             for name, kind in (("ResNet-50", "resnet50"), ("Swin-T", "swin_t"))]  # fmt: skip
    networks = effort.pick([small, *large], [small], [("CifarResNet-8", partial(CifarResNet, 8), (4, 3, 32, 32))])
    batches = effort.pick(12, 3, 2)
    cases = [
        Case(f"{name}, {'×'.join(map(str, shape))}", partial(validations, make, shape, batches), BARS)
        for name, make, shape in networks
    ]
    yield Question("validation epoch", tuple(cases))


def validations(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    batches: int,
    device: torch.device,
    shares: Mapping[str, float | None] = SHARES,
) -> dict[str, Variant]:
    """Return epochs of one model with each share of the samples counted, by what that is called."""
    model = make()
    data = [torch.randn(*shape) for _ in range(batches)]
    epochs = {name: Validation(model, data, share, device) for name, share in shares.items()}
    return {name: Variant(epoch.seconds) for name, epoch in epochs.items()}


class Classifier(LightningModule):
    """What a user validates: a model and a score."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log a score."""
        self.log("val_acc", (self.model(batch).argmax(1) == 0).float().mean(), sync_dist=True)


class Clock(Callback):
    """Take the time when a validation starts or ends, when the device has done all that it was given."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time; the clock in front of the other callbacks is the one that counts."""
        self.started = now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time; the clock after the other callbacks is the one that counts."""
        self.ended = now()


def now() -> float:
    """Return the time when the device has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


class Validation:
    """A Trainer that validates one model on some batches, as often as it is asked to.

    Args:
        model: The model.
        batches: What it is given.
        share: Of the samples, how many are counted; None without the callback.
        device: Where.
        **options: Of the Trainer.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Tensor], share: float | None, device: torch.device, **options: Any
    ) -> None:
        before, after = Clock(), Clock()
        pruning = (
            [] if share is None else [EntropyPruningCallback(monitor="val_acc", measuring=Measuring(sample=share))]
        )
        options = {"devices": 1, **SILENT, **options}
        self._clocks = before, after
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        self._trainer = Trainer(accelerator=accelerator, callbacks=[before, *pruning, after], **options)
        self._module = Classifier(model)
        self._batches = list(batches)

    def seconds(self) -> float:
        """Return how long an epoch takes."""
        self._trainer.validate(self._module, DataLoader(self._batches, batch_size=None), verbose=False)
        before, after = self._clocks
        return after.ended - before.started


if __name__ == "__main__":
    from command import main

    sys.exit(main(["measuring", *sys.argv[1:]]))
