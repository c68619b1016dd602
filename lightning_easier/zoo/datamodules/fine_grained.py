"""Flowers-102, DTD and FGVC-Aircraft, which torchvision opens and downloads, in their own splits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from lightning_easier.support.arguments import check_non_negative
from lightning_easier.zoo.datamodules.base import ImageDataModule
from lightning_easier.zoo.datamodules.images import IMAGENET_MEAN, IMAGENET_STD, normalized, opened, vision
from lightning_easier.zoo.datamodules.mixing import MixedBatches


class OfficialSplitsDataModule(ImageDataModule):
    """A data set of torchvision with training, validation and test images of its own.

    Args:
        root: Folder that the data set's own is in.
        image_size: Pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        download: Whether to download what is missing.
        mix_alpha: Training batches are mixed by MixUp or CutMix, with a share that is drawn from Beta(alpha, alpha);
            they are not with 0.

    Attributes:
        dataset: Name of the class in ``torchvision.datasets``.
        folder: Folder of the data set in ``root``.
        source: Where it comes from.
        num_classes: Number of classes.

    Shape:
        Batches ``(N, 3, image_size, image_size)``, and labels ``(N,)``; shares of the classes ``(N, num_classes)`` in
        training batches that are mixed.

    Raises:
        ValueError: If ``batch_size`` is not positive, or ``mix_alpha`` is negative.
        FileNotFoundError: In ``setup``, if the data set is missing; it says where it comes from and where it goes.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    dataset: ClassVar[str]
    folder: ClassVar[str]
    source: ClassVar[str]
    num_classes: ClassVar[int]

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 16,
        num_workers: int = 2,
        download: bool = False,
        mix_alpha: float = 0.0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_non_negative("mix_alpha", mix_alpha)
        self.root, self.image_size, self.download, self.mix_alpha = root, image_size, download, mix_alpha

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Return the transforms of training images, of ``torchvision.transforms.v2``."""
        raise NotImplementedError

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Return the transforms of other images."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download the data set, if that is wanted."""
        if self.download:
            datasets, _ = vision(self)
            getattr(datasets, self.dataset)(self.root, split="train", download=True)

    def setup(self, stage: str) -> None:
        """Open the three splits."""
        _, v2 = vision(self)
        plain = normalized(v2, self.resizing(v2), IMAGENET_MEAN, IMAGENET_STD)
        self.train_set = self._open("train", normalized(v2, self.augmentation(v2), IMAGENET_MEAN, IMAGENET_STD))
        self.val_set, self.test_set = self._open("val", plain), self._open("test", plain)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, mixed if that is wanted."""
        mixed = MixedBatches(self.num_classes, self.mix_alpha) if self.mix_alpha else None
        return self._loader(self.train_set, shuffle=True, collate=mixed)

    def _open(self, split: str, transform: Any) -> Any:
        datasets, _ = vision(self)
        opening = partial(getattr(datasets, self.dataset), self.root, split=split, transform=transform)
        return opened(opening, self.dataset, Path(self.root) / self.folder, self.source)


class Flowers102DataModule(OfficialSplitsDataModule):
    """Flowers-102: 1,020 training, 1,020 validation and 6,149 test images of 102 flowers.

    Training images are rotated by up to 30 degrees, cropped, and flipped, with a probability of 0.6 horizontally and of
    0.4 vertically. See :class:`OfficialSplitsDataModule`.

    Source: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008).
    """

    dataset = "Flowers102"
    folder = "flowers-102"
    source = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
    num_classes = 102

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Rotate, crop and flip."""
        return [
            v2.RandomRotation(30), v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(0.6),
            v2.RandomVerticalFlip(0.4),
        ]  # fmt: skip

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize to 8/7 of the size, and crop the middle: 256 and 224 pixels."""
        return [v2.Resize(round(self.image_size * 8 / 7)), v2.CenterCrop(self.image_size)]


class DTDDataModule(OfficialSplitsDataModule):
    """DTD: 1,880 training, validation and test images each of 47 textures, the first of its ten partitions.

    Training images are resized, cropped, and flipped both ways. See :class:`OfficialSplitsDataModule`.

    Source: Cimpoi et al., "Describing textures in the wild" (arXiv 1311.3618).
    """

    dataset = "DTD"
    folder = "dtd"
    source = "https://www.robots.ox.ac.uk/~vgg/data/dtd"
    num_classes = 47

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Resize to 9/8 of the size, 252 pixels, crop and flip."""
        return [
            v2.Resize(round(self.image_size * 9 / 8)), v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
        ]  # fmt: skip

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize to 9/8 of the size, and crop the middle."""
        return [v2.Resize(round(self.image_size * 9 / 8)), v2.CenterCrop(self.image_size)]


class FGVCAircraftDataModule(OfficialSplitsDataModule):
    """FGVC-Aircraft: 3,334 training, 3,333 validation and 3,333 test images of 100 variants of aircraft.

    Training images are resized, cropped, and flipped horizontally. See :class:`OfficialSplitsDataModule`.

    Source: Maji et al., "Fine-grained visual classification of aircraft" (arXiv 1306.5151).
    """

    dataset = "FGVCAircraft"
    folder = "fgvc-aircraft-2013b"
    source = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft"
    num_classes = 100

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Resize to 16/7 of the size, 512 pixels, crop and flip."""
        return [v2.Resize(round(self.image_size * 16 / 7)), v2.RandomCrop(self.image_size), v2.RandomHorizontalFlip()]

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize to 16/7 of the size, and crop the middle."""
        return [v2.Resize(round(self.image_size * 16 / 7)), v2.CenterCrop(self.image_size)]
