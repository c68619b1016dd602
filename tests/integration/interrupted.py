"""A run that is killed at any moment and started again, and what has to be equal then."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import Linearize, Method, PruningCallback
from tests.settings import callback as callback_of

BATCHES = 3
HOOKS = [
    "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown",
]  # fmt: skip


class ResumableLoader(DataLoader):
    """The same batches in every epoch; goes on in the middle of one."""

    seen = start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.seen, batch in enumerate(super().__iter__(), 1):
            if self.seen > start:
                yield batch

    def state_dict(self):
        return {"seen": self.seen % len(self)}

    def load_state_dict(self, state):
        self.start = state["seen"]


class Small(LightningModule):
    """Five rectifiers, one of them with a parameter; ``scores`` decide what is judged, one an epoch."""

    def __init__(self, scores: tuple[float, ...] = (0.9,)) -> None:
        super().__init__()
        self.save_hyperparameters()
        width = 6
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(
            *[nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.PReLU(), nn.Linear(width, width), nn.ReLU()],
            *[nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)],
        )
        self.scores = scores

    def forward(self, x):
        return self.layers(self.norm(x))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


class At(Callback):
    """Does something at one moment: a hook, an epoch, a batch where the hook has one."""

    def __init__(self, hook: str, epoch: int, batch: int | None, action: Any) -> None:
        self.done = False

        def act(trainer, pl_module, *arguments, **_):
            numbers = [argument for argument in arguments if isinstance(argument, int)]
            here = trainer.current_epoch == epoch and not trainer.sanity_checking
            if here and not self.done and (batch is None or numbers[:1] == [batch]):
                self.done = True
                action(trainer)

        setattr(self, hook, act)


class Killed(BaseException):
    """As sudden as it gets inside a process."""


def stop(trainer: Trainer) -> None:
    """Leave as SIGKILL would: what is on disk stays."""
    raise Killed


def kill(trainer: Any) -> None:
    """End this process here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    root: Path,
    *callbacks: Callback,
    scores: tuple[float, ...] = (0.9,),
    before: tuple[Callback, ...] = (),
    ckpt_path: str | Path | None = None,
    pruning: dict[str, Any] | None = None,
    epochs: int = 4,
    model: LightningModule | None = None,
    method: type[Method] = Linearize,
    kind: Callable[..., PruningCallback] = callback_of,
    weights_only: bool | None = None,
    **options: Any,
) -> tuple[Small, PruningCallback, Trainer]:
    """Train from the same seed; returns model, callback and Trainer, also of a run that was stopped."""
    seed_everything(3, verbose=False)
    data = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(data, (data.sum(1) > 0).long())
    model = Small(scores) if model is None else model
    settings = {"monitor": "score", "tolerance": 0.2, "dirpath": str(root / "rounds")}
    callback = kind(**(settings | {"method": method} | (pruning or {})))
    trainer = Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "default_root_dir": root,
            "callbacks": [*before, callback, *callbacks],
        }
        | options
    )
    with suppress(Killed):
        loaders = ResumableLoader(dataset, 4), DataLoader(dataset, 6)
        trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=weights_only)
    return model, callback, trainer


_WHOLE: dict[str, Any] = {}


def uninterrupted(factory: Any, name: str, train: Callable[[Path], Any]) -> Any:
    """Return the run that nothing interrupts; it is made once, and is what each of those that were is compared with.

    Args:
        factory: The fixture ``tmp_path_factory``.
        name: Tells it from all others.
        train: Runs in a folder.
    """
    if name not in _WHOLE:
        _WHOLE[name] = train(factory.mktemp("whole"))
    return _WHOLE[name]


def outcome(model: Small, callback: PruningCallback, trainer: Trainer) -> dict[str, Any]:
    """Return all that has to be the same, however often a run was interrupted."""
    return {
        "rounds": [asdict(this) for this in callback.rounds],
        "removed": callback.removed,
        "weights": dict(model.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "steps": trainer.global_step,
    }
