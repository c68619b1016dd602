"""How the benchmarks that use a Trainer train a network of ``cifar.py``."""

from typing import Any

import torch
import torch.nn.functional as F
from cifar import Images
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Learner(LightningModule):
    """Trains a network with SGD and a learning rate that falls to nothing in each round.

    Args:
        model: The network.
        train: The images; a batch holds their places.
        rate: The largest learning rate.
        steps: Of a round.
    """

    def __init__(self, model: nn.Module, train: Images, rate: float, steps: int) -> None:
        super().__init__()
        self.model, self.images, self.rate, self.steps = model, train, rate, steps
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, places: Tensor, batch_idx: int) -> Tensor:
        """Return the loss on augmented images."""
        images = self.images.batch(places, self.generator).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(self(images).float(), self.images.labels[places])

    def validation_step(self, places: Tensor, batch_idx: int) -> None:
        """Log the accuracy on images that are held out."""
        hits = self(self.images.batch(places)).argmax(1) == self.images.labels[places]
        self.log("val_acc", hits.float().mean(), batch_size=len(places))

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the schedule of a round."""
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=self.steps + 1, pct_start=0.1, cycle_momentum=False
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
