"""What all data share: three data sets, opened once, and loaders over them."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_easier.support.arguments import check_integer
from lightning_easier.zoo.datamodules.images import IMAGENET_MEAN, IMAGENET_STD, normalized, vision

Splits = tuple[Dataset[Any], Dataset[Any], Dataset[Any]]
"""Training, validation and test images."""


class ImageDataModule(LightningDataModule):
    """Loaders over the data sets that a subclass opens.

    They are opened by the first ``setup``, all three: a Trainer calls it again for every fit, validation and test.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._is_open = False

    def splits(self) -> Splits:
        """Open and split the data."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Open training, validation and test images, if they are not open yet."""
        if not self._is_open:
            self.train_set, self.val_set, self.test_set = self.splits()
            self._is_open = True

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test batches, for predictions."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, collate: Any = None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )


class PhotosDataModule(ImageDataModule):
    """Photos that torchvision reads, as float32 tensors of a mean and standard deviation a channel.

    A subclass says how training images are augmented, how others are resized, and what is opened with either.

    Args:
        root: Folder that the data set is in.
        image_size: Pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, which is divided by.

    Raises:
        ValueError: If ``batch_size`` is not positive.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        batch_size: int,
        num_workers: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.image_size, self.mean, self.std = root, image_size, list(mean), list(std)

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Return the transforms of training images, of ``torchvision.transforms.v2``."""
        raise NotImplementedError

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Return the transforms of other images; those that have the size need none."""
        return []

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open and split the data.

        Args:
            datasets: ``torchvision.datasets``.
            augmented: Transform of training images.
            plain: Transform of others.
        """
        raise NotImplementedError

    def splits(self) -> Splits:
        """Open and split the data, each image normalized at last."""
        datasets, v2 = vision(self)
        augmented, plain = (
            normalized(v2, transforms, self.mean, self.std) for transforms in (self.augmentation(v2), self.resizing(v2))
        )
        return self.transformed(datasets, augmented, plain)
