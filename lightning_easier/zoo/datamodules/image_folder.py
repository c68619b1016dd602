"""Any folder of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_easier.zoo.datamodules.base import PhotosDataModule, Splits
from lightning_easier.zoo.datamodules.images import IMAGENET_MEAN, IMAGENET_STD, check_classes, hold_out, missing


class ImageFolderDataModule(PhotosDataModule):
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
        ValueError: If ``batch_size`` is not positive; in ``setup``, if more images are to be held out than there are,
            or the folders have not the same classes.
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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(root, image_size, batch_size, num_workers, mean, std)
        self.val_size, self.padding, self.seed = val_size, padding, seed
        self.train_folder, self.val_folder, self.test_folder = train_folder, val_folder, test_folder

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Resize, shift and flip."""
        size = self.image_size
        return [v2.Resize(size), v2.RandomCrop(size, padding=self.padding), v2.RandomHorizontalFlip()]

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize, and crop the middle."""
        return [v2.Resize(self.image_size), v2.CenterCrop(self.image_size)]

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open the folders, and hold out training images where there is none for validation."""
        training, validation, testing = (
            Path(self.root) / folder for folder in (self.train_folder, self.val_folder, self.test_folder)
        )
        if not training.is_dir():
            remedy = f"images go to {training}/<class>/<image>; `train_folder` says where else they are in `root`"
            raise missing(f"a folder {self.train_folder!r} with a folder of images a class", training, remedy)
        train = datasets.ImageFolder(training, augmented)
        val, test = (
            datasets.ImageFolder(folder, plain) if folder.is_dir() else None for folder in (validation, testing)
        )
        there = [images for images in (train, val, test) if images is not None]
        check_classes(
            f"the folders in {self.root}", there, "`train_folder`, `val_folder` and `test_folder` say which are taken"
        )
        if val is None:
            train, val = hold_out(train, datasets.ImageFolder(training, plain), self.val_size, self.seed)
        return train, val, val if test is None else test
