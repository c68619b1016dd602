"""What does a training round cost with masks, with the transport regulariser, with distillation?

Part ``rounds`` of ``python -m benchmarks``. Each sample is a run of two epochs, the second of which is timed: masks are
in force there, and the dense network has become the teacher. The first has one step: nobody times it. What happens
between the epochs is not in the time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import SILENT, cifar_resnet18, now
from questions import Bar, Case, Effort, Question, Variant
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easier import (
    Distillation,
    EntropyPruningCallback,
    Files,
    OptimalTransportCallback,
    PruningCallback,
    Rounds,
    Sparsify,
)
from lightning_easier.zoo import CifarResNet

BARS = {"masks": Bar(time=1.05), "transport": Bar(time=1.15), "distillation": Bar(time=1.4)}


def questions(effort: Effort) -> Iterator[Question]:
    """Ask what each adds to an epoch of training."""
    name, make, blocks = effort.pick(
        ("ResNet-18", cifar_resnet18, [f"model.layer{stage}.1" for stage in (1, 2, 3, 4)]),
        ("CifarResNet-20", partial(CifarResNet, 20), [f"model.layer{stage}.2" for stage in (1, 2, 3)]),
        ("CifarResNet-14", partial(CifarResNet, 14), [f"model.layer{stage}.1" for stage in (1, 2, 3)]),
    )
    batch, steps = effort.pick(128, 64, 4), effort.pick(6, 4, 2)
    case = Case(
        f"{name}, {steps} steps of {batch}×3×32×32", partial(runs, make, blocks, batch, steps), BARS,
        is_slow=effort.name == "dry", has_memory=False,
    )  # fmt: skip
    yield Question("training epoch", (case,))


def runs(make: Callable[[], nn.Module], blocks: list[str], batch: int, steps: int, device: torch.device) -> Any:
    """Return runs without a callback and with each."""
    rounds = {"monitor": "val_acc", "tolerance": 1.0, "rounds": Rounds(max_removals=1)}
    late = Rounds(epochs=0, max_removals=1)  # one block goes after the training, which nobody times
    callbacks: dict[str, Callable[[Files], list[Callback]]] = {
        "plain": lambda files: [],
        "masks": lambda files: [PruningCallback(Sparsify(0.5), files=files, **rounds)],  # type: ignore[arg-type]
        "transport": lambda files: [
            OptimalTransportCallback("val_acc", weight=5.0, blocks=blocks, rounds=late, files=files)
        ],
        "distillation": lambda files: [EntropyPruningCallback(distillation=Distillation(), files=files, **rounds)],  # type: ignore[arg-type]
    }
    data = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(steps)]
    return {name: Variant(partial(second_epoch, make, callback, data, device)) for name, callback in callbacks.items()}


def second_epoch(
    make: Callable[[], nn.Module],
    callbacks: Callable[[Files], list[Callback]],
    data: list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> float:
    """Train for an epoch of one step and a whole one, and return how long that takes, without its validation."""
    torch.manual_seed(0)
    before, after = _Epochs(), _Epochs()
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=2, num_sanity_val_steps=0,
            callbacks=[before, *callbacks(Files(dirpath=folder)), after], reload_dataloaders_every_n_epochs=1, **SILENT,
        )  # fmt: skip
        trainer.fit(_Learner(make(), data))
    return after.ends[1] - before.starts[1]


class _Epochs(Callback):
    """Notes when the first batch of each training epoch starts, and when its last ends."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time of the first."""
        if batch_idx == 0:
            self.starts.append(now())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time of the last."""
        if batch_idx == trainer.num_training_batches - 1:
            self.ends.append(now())


class _Learner(LightningModule):
    def __init__(self, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model, self._data = model, data

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._batches(1 if self.current_epoch == 0 else len(self._data))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._batches(1)

    def _batches(self, count: int) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self._data[:count], batch_size=None)  # type: ignore[arg-type]  # a list has all it needs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
