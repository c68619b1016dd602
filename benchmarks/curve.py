"""EASIER's loop at a tenth of its epochs: ResNet-18 on images of CIFAR-10's size, made here, that can be learned.

Part ``curve`` of ``python -m benchmarks``, for a GPU: the network is in channels-last, what it computes in bfloat16,
and the images are on the device from the start. Rounds of 16 epochs, each with the whole schedule (SGD at 0.1, a tenth
of it after one half and three quarters, momentum 0.9, weight decay 1e-4, batch 128), one activation a round, to the
end. What is told after every round is the accuracy on images that were held out, and the time: it may be stopped at any
moment. These images are not CIFAR-10, so the accuracies are not those of the paper.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import SILENT, cifar_resnet18
from questions import Effort
from torch import Tensor, nn

from lightning_easier import EntropyPruningCallback, Files, Rounds
from lightning_easier.report import Table
from lightning_easier.zoo import CifarResNet

CLASSES = 10


@dataclass(frozen=True)
class Sizes:
    """Of a run: network, images to train on, held out and of a batch; epochs of a round, rounds after the first."""

    make: Callable[[], nn.Module]
    train: int
    held_out: int
    batch: int
    epochs: int
    rounds: int


def sizes(effort: Effort) -> Sizes:
    """Return what is asked for; a quick run has two rounds."""
    return effort.pick(
        Sizes(cifar_resnet18, 45_000, 5_000, 128, 16, 17),
        Sizes(cifar_resnet18, 4_500, 500, 128, 1, 2),
        Sizes(partial(CifarResNet, 8), 64, 32, 16, 1, 2),
    )


def learnable(count: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Make images ``(count, 3, 32, 32)`` in channels-last and their classes ``(count,)``, on a device.

    Each shows one of eight smooth patterns of its class, shifted, under noise that is stronger than the pattern.

    Args:
        count: How many.
        device: Where they are.
        seed: Of all but the patterns, which are always the same.
    """
    patterns = torch.randn(CLASSES, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    patterns = F.interpolate(patterns, (32, 32), mode="bicubic").to(device).unflatten(0, (CLASSES, 8))
    generator = torch.Generator(device).manual_seed(seed)
    labels, kinds, shifts = (
        torch.randint(high, (count,), generator=generator, device=device) for high in (CLASSES, 8, 32)
    )
    columns = (torch.arange(32, device=device) + shifts[:, None]) % 32
    images = []
    for part in torch.arange(count, device=device).split(5_000):  # not all at once in float32
        shown = patterns[labels[part], kinds[part]]
        shown = shown.gather(-1, columns[part][:, None, None].expand_as(shown))
        noise = torch.randn(shown.shape, generator=generator, device=device)
        images.append((0.5 * shown + noise).bfloat16().contiguous(memory_format=torch.channels_last))
    return torch.cat(images).contiguous(memory_format=torch.channels_last), labels


class Batches:
    """Batches of images that are on the device; a loader for a Trainer.

    Args:
        images: The images.
        labels: Their classes.
        size: Of a batch.
        shuffle: Whether they come in another order each time, and every second one mirrored.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, shuffle: bool) -> None:
        self._images, self._labels, self._size, self._shuffle = images, labels, size, shuffle

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self._images.device, len(self._images)
        order = torch.randperm(count, device=device) if self._shuffle else torch.arange(count, device=device)
        for number, places in enumerate(order[: len(self) * self._size].view(-1, self._size)):
            images = self._images[places]
            yield images.flip(-1) if self._shuffle and number % 2 else images, self._labels[places]


class _Learner(LightningModule):
    def __init__(self, model: nn.Module, epochs: int) -> None:
        super().__init__()
        self.model, self.epochs = model.to(memory_format=torch.channels_last), epochs

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images if torch.is_autocast_enabled(images.device.type) else images.float())
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        milestones = [max(1, self.epochs // 2), max(1, self.epochs * 3 // 4)]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)]


class _Told(Callback):
    """Tells the rounds that are over, and ends the run where another round would take too long.

    Args:
        pruning: The callback that prunes.
        tell: Is given a table whenever there is another round.
        title: Of the table.
        seconds: How long the run may take.
    """

    def __init__(
        self, pruning: EntropyPruningCallback, tell: Callable[[Table], None], title: str, seconds: float
    ) -> None:
        self._pruning, self._tell, self._title, self._seconds = pruning, tell, title, seconds
        self._began, self._ends = perf_counter(), list[float]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell all rounds so far, if there is one more."""
        scores = [this.score_after for this in self._pruning.rounds if this.score_after is not None]
        if len(scores) == len(self._ends):
            return
        self._ends.append(perf_counter() - self._began)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if not is_last and self._ends[-1] * (1 + 1 / len(self._ends)) > self._seconds:
            trainer.should_stop = True
            self._title += f"; ended since another round would have ended after {self._seconds:.0f} s"
        rows = [
            (str(number), f"{100 * score:.2f}", f"{end:.1f}")
            for number, (score, end) in enumerate(zip(scores, self._ends, strict=True))
        ]
        self._tell(Table(self._title, ("removed", "held-out top-1 [%]", "seconds since the start"), rows))


def run(effort: Effort, device: torch.device, tell: Callable[[Table], None], seconds: float = math.inf) -> None:
    """Train, remove, train, ...; tell a table after every round.

    Args:
        effort: How much is done.
        device: Where.
        tell: Is given the table.
        seconds: No round is begun that would end after so many.
    """
    size = sizes(effort)
    torch.manual_seed(0)
    loaders = (Batches(*learnable(count, device, seed), size.batch, shuffle) for count, seed, shuffle in (
        (size.train, 1, True), (size.held_out, 2, False)
    ))  # fmt: skip
    with TemporaryDirectory() as folder:
        pruning = EntropyPruningCallback(
            "val_acc", tolerance=1.0, files=Files(dirpath=folder),
            rounds=Rounds(epochs=size.epochs, restart="optimizer", max_removals=size.rounds),
        )  # fmt: skip
        precision: Any = "bf16-mixed" if device.type == "cuda" else "32-true"  # bfloat16 is slow on many CPUs
        title = f"EASIER, {size.train:,} made images, {size.epochs} epochs a round, {precision}"
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision=precision,
            max_epochs=size.epochs * (size.rounds + 1), callbacks=[pruning, _Told(pruning, tell, title, seconds)],
            num_sanity_val_steps=0, **SILENT,
        )  # fmt: skip
        trainer.fit(_Learner(size.make(), size.epochs), *loaders)
