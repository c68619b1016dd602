"""Handwritten digits that come with scikit-learn."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_easier.zoo.datamodules.base import ImageDataModule, Splits
from lightning_easier.zoo.optional import needed


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits that scikit-learn ships: 8×8 pixels, one channel, ten classes, no download.

    Split 60 / 20 / 20 into training, validation and test images, each class in proportion.

    Args:
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        seed: Seed of the split.

    Shape:
        Batches ``(N, 1, 8, 8)`` of values in [-1, 1], and labels ``(N,)``.

    Raises:
        ValueError: If ``batch_size`` is not positive.
        ModuleNotFoundError: In ``setup``, if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.seed = seed

    def splits(self) -> Splits:
        """Read and split the images."""
        data, selection = (
            needed(f"sklearn.{module}", type(self).__name__, "scikit-learn")
            for module in ("datasets", "model_selection")
        )
        parts = _read(data.load_digits, selection.train_test_split, self.seed)
        train_set, val_set, test_set = (TensorDataset(images.clone(), labels.clone()) for images, labels in parts)
        return train_set, val_set, test_set


@cache
def _read(load: Callable[[], Any], split: Callable[..., Any], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Read the images, and split them; the file is text, and each stage of a Trainer asks for them anew."""
    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    everything = list(range(len(labels)))
    train, rest = split(everything, test_size=0.4, random_state=seed, stratify=labels)
    val, test = split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
    return [(images[part], labels[part]) for part in (train, val, test)]
