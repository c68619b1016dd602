"""Flowers-102, DTD and FGVC-Aircraft, which torchvision opens and downloads, in their own splits."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from lightning_easier.support.arguments import check_non_negative
from lightning_easier.zoo.datamodules.base import Splits
from lightning_easier.zoo.datamodules.downloaded import DownloadedDataModule
from lightning_easier.zoo.datamodules.mixing import MixedBatches


class OfficialSplitsDataModule(DownloadedDataModule):
    """A data set of torchvision with training, validation and test images of its own.

    Validation and test images are resized, and the middle is cropped.

    Args:
        root: Folder that the data set's own is in.
        image_size: Pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        download: Whether to download what is missing.
        mix_alpha: Training batches are mixed by MixUp or CutMix, with a share that is drawn from Beta(alpha, alpha);
            they are not with 0.

    Attributes:
        resized_to: Images are resized to so many times ``image_size`` before they are cropped.

    Shape:
        Batches ``(N, 3, image_size, image_size)``, and labels ``(N,)``; shares of the classes ``(N, num_classes)`` in
        training batches that are mixed.

    Raises:
        ValueError: If ``batch_size`` is not positive, or ``mix_alpha`` is negative.
        FileNotFoundError: In ``setup``, if the data set is missing; it says where it comes from and where it goes.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    resized_to: ClassVar[float]

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 16,
        num_workers: int = 2,
        download: bool = False,
        mix_alpha: float = 0.0,
    ) -> None:
        super().__init__(root, image_size, batch_size, num_workers, download)
        check_non_negative("mix_alpha", mix_alpha)
        self.mix_alpha = mix_alpha

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize, and crop the middle."""
        return [self.resize(v2), v2.CenterCrop(self.image_size)]

    def resize(self, v2: Any) -> Any:
        """Return what makes the shorter side ``resized_to`` times ``image_size``."""
        return v2.Resize(round(self.image_size * self.resized_to))

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open the three splits."""
        train = self.opened(datasets, augmented, split="train")
        val, test = (self.opened(datasets, plain, split=split) for split in ("val", "test"))
        return train, val, test

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, mixed if that is wanted."""
        mixed = MixedBatches(self.num_classes, self.mix_alpha) if self.mix_alpha else None
        return self._loader(self.train_set, shuffle=True, collate=mixed)


class Flowers102DataModule(OfficialSplitsDataModule):
    """Flowers-102: 1,020 training, 1,020 validation and 6,149 test images of 102 flowers.

    Training images are rotated by up to 30 degrees, cropped, and flipped, with a probability of 0.6 horizontally and of
    0.4 vertically; others are resized to 8/7 of the size, 256 pixels. See :class:`OfficialSplitsDataModule`.

    Source: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008).
    """

    dataset = "Flowers102"
    folder = "flowers-102"
    source = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
    num_classes = 102
    resized_to = 8 / 7

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Rotate, crop and flip."""
        return [
            v2.RandomRotation(30), v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(0.6),
            v2.RandomVerticalFlip(0.4),
        ]  # fmt: skip


class DTDDataModule(OfficialSplitsDataModule):
    """DTD: 1,880 training, validation and test images each of 47 textures, the first of its ten partitions.

    All images are resized to 9/8 of the size, 252 pixels; training images are cropped at random, and flipped both ways.
    See :class:`OfficialSplitsDataModule`.

    Source: Cimpoi et al., "Describing textures in the wild" (arXiv 1311.3618).
    """

    dataset = "DTD"
    folder = "dtd"
    source = "https://www.robots.ox.ac.uk/~vgg/data/dtd"
    num_classes = 47
    resized_to = 9 / 8

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Resize, crop and flip."""
        return [
            self.resize(v2), v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
        ]  # fmt: skip


class FGVCAircraftDataModule(OfficialSplitsDataModule):
    """FGVC-Aircraft: 3,334 training, 3,333 validation and 3,333 test images of 100 variants of aircraft.

    All images are resized to 16/7 of the size, 512 pixels; training images are cropped at random, and flipped
    horizontally. See :class:`OfficialSplitsDataModule`.

    Source: Maji et al., "Fine-grained visual classification of aircraft" (arXiv 1306.5151).
    """

    dataset = "FGVCAircraft"
    folder = "fgvc-aircraft-2013b"
    source = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft"
    num_classes = 100
    resized_to = 16 / 7

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Resize, crop and flip."""
        return [self.resize(v2), v2.RandomCrop(self.image_size), v2.RandomHorizontalFlip()]
