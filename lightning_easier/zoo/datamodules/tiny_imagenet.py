"""Tiny-ImageNet-200."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_easier.zoo.datamodules.base import PhotosDataModule, Splits
from lightning_easier.zoo.datamodules.images import Listed, missing

_SOURCE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class TinyImageNetDataModule(PhotosDataModule):
    """Tiny-ImageNet-200 in its own splits, as it is distributed; its validation images are the test images, too.

    Training images are flipped and shifted by up to four pixels. (What is distributed for testing has no labels.)

    Args:
        root: Folder that ``tiny-imagenet-200`` is in, with ``train/<class>/images`` and ``val/val_annotations.txt``.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.

    Shape:
        Batches ``(N, 3, 64, 64)``, and labels ``(N,)``.

    Raises:
        ValueError: If ``batch_size`` is not positive.
        FileNotFoundError: In ``setup``, if the data set is missing; it says what to download and where it goes.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    num_classes: ClassVar[int] = 200

    def __init__(self, root: str = "data", batch_size: int = 128, num_workers: int = 2) -> None:
        super().__init__(root, 64, batch_size, num_workers)

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Shift and flip."""
        return [v2.RandomCrop(64, padding=4), v2.RandomHorizontalFlip()]

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open the folder of the training images, and the others by their annotations."""
        folder = Path(self.root) / "tiny-imagenet-200"
        annotations = folder / "val" / "val_annotations.txt"
        if not (folder / "train").is_dir() or not annotations.is_file():
            raise missing("Tiny-ImageNet-200", folder, f"download {_SOURCE} and unzip it in {self.root}")
        train = datasets.ImageFolder(folder / "train", augmented)
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
        samples = [(folder / "val" / "images" / name, train.class_to_idx[wnid]) for name, wnid, *_ in lines]
        val = Listed(samples, plain)
        return train, val, val
