"""MixUp and CutMix of training batches."""

from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from lightning_easier.support.arguments import check_integer
from lightning_easier.zoo.optional import needed


class MixedBatches:
    """Collate samples to a batch, and mix each of its images with another, by MixUp or CutMix, one of them at random.

    Args:
        num_classes: Number of classes.
        alpha: The share of an image is drawn from Beta(alpha, alpha).

    Shape:
        Images ``(C, H, W)`` with labels to images ``(N, C, H, W)`` and shares of the classes ``(N, num_classes)``.

    Source: Zhang et al., "mixup" (arXiv 1710.09412), Yun et al., "CutMix" (arXiv 1905.04899).
    """

    def __init__(self, num_classes: int, alpha: float) -> None:
        check_integer("num_classes", num_classes, 2)
        v2 = needed("torchvision.transforms.v2", "Mixing images")
        self.mix = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind in (v2.MixUp, v2.CutMix)])

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """Make a batch."""
        images, labels = default_collate(samples)
        mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed
