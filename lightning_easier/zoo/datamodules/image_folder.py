"""Any folder of images."""

from collections.abc import Sequence
from pathlib import Path

from lightning_easier.zoo.datamodules.base import ImageDataModule
from lightning_easier.zoo.datamodules.images import IMAGENET_MEAN, IMAGENET_STD, hold_out, normalized, vision


class ImageFolderDataModule(ImageDataModule):
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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.image_size, self.val_size, self.padding, self.seed = root, image_size, val_size, padding, seed
        self.train_folder, self.val_folder, self.test_folder = train_folder, val_folder, test_folder
        self.mean, self.std = list(mean), list(std)

    def setup(self, stage: str) -> None:
        """Open the folders."""
        datasets, v2 = vision(self)
        size, mean, std = self.image_size, self.mean, self.std
        augment = [v2.Resize(size), v2.RandomCrop(size, padding=self.padding), v2.RandomHorizontalFlip()]
        augmented = normalized(v2, augment, mean, std)
        plain = normalized(v2, [v2.Resize(size), v2.CenterCrop(size)], mean, std)
        root = Path(self.root)
        if not (root / self.train_folder).is_dir():
            raise FileNotFoundError(
                f"Expected argument `root` to hold a folder {self.train_folder!r} with a folder of images a class, but "
                f"{root / self.train_folder} is none"
            )
        train = datasets.ImageFolder(root / self.train_folder, augmented)
        if (root / self.val_folder).is_dir():
            self.train_set = train
            self.val_set = datasets.ImageFolder(root / self.val_folder, plain)
        else:
            held_out = datasets.ImageFolder(root / self.train_folder, plain)
            self.train_set, self.val_set = hold_out(train, held_out, self.val_size, self.seed)
        has_test = (root / self.test_folder).is_dir()
        self.test_set = datasets.ImageFolder(root / self.test_folder, plain) if has_test else self.val_set
