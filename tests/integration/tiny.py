"""A LightningModule on real digits that trains in a moment, and one way to train it."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from lightning_easier import EntropyPruningCallback
from lightning_easier.zoo import DigitsDataModule
from tests.settings import callback


class Tiny(LightningModule):
    """Conv, batch norm and five rectifiers of three spellings; logs val_loss, val_acc and a scripted score.

    ``scores`` are the values of ``scripted``, one a validation epoch, so that a test decides what is judged.
    """

    def __init__(self, scores: tuple[float, ...] = (), activation: str = "ReLU") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv, self.bn, self.act1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.fc1, self.act2 = nn.Linear(8 * 36, 32), getattr(nn, activation)()
        self.fc2, self.fc3, self.act4 = nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU()
        self.fc4 = nn.Linear(32, 10)
        self.scores = list(scores)

    def forward(self, x):
        x = self.act1(self.bn(self.conv(x))).flatten(1)
        x = F.relu(self.fc2(self.act2(self.fc1(x))))
        return self.fc4(self.act4(self.fc3(x)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        hits = (logits.argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", hits, sync_dist=True)

    def on_validation_epoch_end(self):
        if self.scores and not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.log("scripted", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


NAMES = ["act1", "act2", "relu", "act4"]


def train(
    model: LightningModule,
    *callbacks: Callback,
    root: Any,
    epochs: int = 4,
    ckpt_path: str | None = None,
    data: Any = None,
    **options: Any,
) -> Trainer:
    """Fit a model on a few batches of digits, the same ones in every run."""
    seed_everything(7, verbose=False)
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_train_batches": 4,
        "limit_val_batches": 3,
        "num_sanity_val_steps": 1,
        "default_root_dir": root,
    }
    trainer = Trainer(callbacks=list(callbacks), **(settings | options))
    trainer.fit(model, data or DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
    return trainer


def pruning(**options: Any) -> EntropyPruningCallback:
    """Never takes a round back unless told so."""
    made: EntropyPruningCallback = callback(**({"monitor": "val_acc", "tolerance": 100.0} | options))
    return made


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(a: Any, b: Any) -> None:
    """Compare nested states bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
