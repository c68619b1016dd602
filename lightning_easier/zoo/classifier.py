"""A LightningModule that trains any backbone to classify images."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_easier.support.arguments import check_choice
from lightning_easier.zoo.backbones import build_backbone


class ImageClassifier(LightningModule):
    """Train a backbone with cross-entropy and SGD or Adam; log ``train_loss``, ``val_loss``, ``val_acc``, ``test_acc``.

    Args:
        backbone: Name of the network, see :func:`~lightning_easier.zoo.build_backbone`.
        num_classes: Number of classes.
        backbone_args: Further arguments of the network.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        milestones: Epochs at which the learning rate is multiplied by ``gamma``.
        gamma: Factor of the learning rate at the milestones.
        weights: Name of pretrained weights of torchvision, as ``"IMAGENET1K_V1"``; none by default. They are no
            hyperparameter: a checkpoint has weights of its own, and loads without a download.
        optimizer: SGD, or Adam.

    Raises:
        ValueError: If there is no backbone of this name, it has no such weights, or the optimizer is another.

    Shape:
        Images ``(N, C, H, W)`` to logits ``(N, num_classes)``. Labels of training batches are ``(N,)``, or shares of
        the classes ``(N, num_classes)``, as of MixUp.
    """

    def __init__(
        self,
        backbone: str = "fused_resnet",
        num_classes: int = 10,
        backbone_args: dict[str, Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        weights: str | None = None,
        optimizer: Literal["sgd", "adam"] = "sgd",
    ) -> None:
        super().__init__()
        check_choice("optimizer", optimizer, ("sgd", "adam"))
        self.save_hyperparameters(ignore=["weights"])
        self.model = build_backbone(backbone, num_classes, **{"weights": weights, **(backbone_args or {})})
        self.optimizer = optimizer
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.milestones, self.gamma = list(milestones), gamma
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        output = self.model(images)
        # GoogLeNet and Inception return their auxiliary logits besides while they train.
        logits = output if isinstance(output, Tensor) else output.logits
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on a validation batch."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on a test batch."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute class probabilities."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        return self(images).softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD or Adam, and a step schedule where there are milestones."""
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        if not self.milestones:
            return optimizer
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
