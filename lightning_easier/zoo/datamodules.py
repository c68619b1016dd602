"""Images to classify: handwritten digits that come with scikit-learn, CIFAR-10, any folder of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_easier.zoo.optional import needed


class _ImageDataModule(LightningDataModule):
    """Loaders over the data sets that a subclass sets in ``setup``."""

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}")
        self.batch_size = batch_size
        self.num_workers = num_workers

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

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class DigitsDataModule(_ImageDataModule):
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

    def setup(self, stage: str) -> None:
        """Read and split the images."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The digits need scikit-learn: `pip install scikit-learn`", name="sklearn"
            ) from error
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target)
        everything = list(range(len(labels)))
        train, rest = train_test_split(everything, test_size=0.4, random_state=self.seed, stratify=labels)
        val, test = train_test_split(rest, test_size=0.5, random_state=self.seed, stratify=labels[rest])
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in (train, val, test)
        )


class CIFAR10DataModule(_ImageDataModule):
    """CIFAR-10, with random flips and shifts in training, as in the EASIER paper.

    Args:
        root: Folder of the data set, as torchvision's ``CIFAR10`` expects it.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        val_size: How many training images are held out for validation.
        download: Whether to download what is missing.
        seed: Seed of the split.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, which is divided by.

    Shape:
        Batches ``(N, 3, 32, 32)``, and labels ``(N,)``.

    Raises:
        ValueError: If ``batch_size`` is not positive.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 2,
        val_size: int = 5000,
        download: bool = False,
        seed: int = 0,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.val_size, self.download, self.seed = root, val_size, download, seed
        self.mean, self.std = list(mean), list(std)

    def prepare_data(self) -> None:
        """Download the data set, if that is wanted."""
        if self.download:
            datasets = needed("torchvision.datasets", type(self).__name__)
            for train in (True, False):
                datasets.CIFAR10(self.root, train=train, download=True)

    def setup(self, stage: str) -> None:
        """Open and split the data set."""
        datasets, v2 = _torchvision(self)
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        plain = _to_tensor(self.mean, self.std)
        train = datasets.CIFAR10(self.root, train=True, transform=v2.Compose([*augment, plain]))
        held_out = datasets.CIFAR10(self.root, train=True, transform=plain)
        self.train_set, self.val_set = _hold_out(train, held_out, self.val_size, self.seed)
        self.test_set = datasets.CIFAR10(self.root, train=False, transform=plain)


class ImageFolderDataModule(_ImageDataModule):
    """Any data set of images laid out as ``root/<split>/<class>/<image>``.

    Args:
        root: Folder of the data set.
        image_size: Images are resized and cropped to this many pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        train_folder: Folder of the training images in ``root``.
        val_folder: Folder of the validation images; where there is none, ``val_size`` training images are held out.
        test_folder: Folder of the test images; the validation images where there is none.
        val_size: How many training images are held out if there is no ``val_folder``.
        padding: Training images are shifted by up to so many pixels; they are flipped as well.
        seed: Seed of the split.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, which is divided by.

    Shape:
        Batches ``(N, 3, image_size, image_size)``, and labels ``(N,)``.

    Raises:
        ValueError: If ``batch_size`` is not positive, or more images are to be held out than there are.
        FileNotFoundError: In ``setup``, if there is no training folder.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 2,
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str = "test",
        val_size: int = 5000,
        padding: int = 4,
        seed: int = 0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.image_size, self.val_size, self.padding, self.seed = root, image_size, val_size, padding, seed
        self.train_folder, self.val_folder, self.test_folder = train_folder, val_folder, test_folder
        self.mean, self.std = list(mean), list(std)

    def setup(self, stage: str) -> None:
        """Open the folders."""
        datasets, v2 = _torchvision(self)
        size = self.image_size
        augment = [v2.Resize(size), v2.RandomCrop(size, padding=self.padding), v2.RandomHorizontalFlip()]
        plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), _to_tensor(self.mean, self.std)])
        root = Path(self.root)
        if not (root / self.train_folder).is_dir():
            raise FileNotFoundError(
                f"Expected argument `root` to hold a folder {self.train_folder!r} with a folder of images a class, but "
                f"{root / self.train_folder} is none"
            )
        train = datasets.ImageFolder(root / self.train_folder, v2.Compose([*augment, _to_tensor(self.mean, self.std)]))
        if (root / self.val_folder).is_dir():
            self.train_set = train
            self.val_set = datasets.ImageFolder(root / self.val_folder, plain)
        else:
            held_out = datasets.ImageFolder(root / self.train_folder, plain)
            self.train_set, self.val_set = _hold_out(train, held_out, self.val_size, self.seed)
        has_test = (root / self.test_folder).is_dir()
        self.test_set = datasets.ImageFolder(root / self.test_folder, plain) if has_test else self.val_set


def _torchvision(data: LightningDataModule) -> tuple[Any, Any]:
    what = type(data).__name__
    return needed("torchvision.datasets", what), needed("torchvision.transforms.v2", what)


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> Any:
    v2 = needed("torchvision.transforms.v2", "Normalizing images")
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _hold_out(train: Any, held_out: Any, val_size: int, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Split one data set, opened with two transforms, into training and validation images."""
    if not 0 < val_size < len(train):
        raise ValueError(
            f"Expected argument `val_size` to be between 1 and {len(train) - 1}, the training images less one, but got "
            f"{val_size}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(train, order[val_size:]), Subset(held_out, order[:val_size])
