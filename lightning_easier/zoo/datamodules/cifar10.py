"""CIFAR-10."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_easier.zoo.datamodules.base import ImageDataModule
from lightning_easier.zoo.datamodules.images import hold_out, normalized, opened, vision
from lightning_easier.zoo.optional import needed


class CIFAR10DataModule(ImageDataModule):
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
        ValueError: If ``batch_size`` is not positive, or more images are to be held out than there are.
        FileNotFoundError: In ``setup``, if the data set is missing; it says where it goes.
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
        datasets, v2 = vision(self)
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        plain = normalized(v2, [], self.mean, self.std)
        train = self._open(datasets, True, normalized(v2, augment, self.mean, self.std))
        held_out = self._open(datasets, True, plain)
        self.train_set, self.val_set = hold_out(train, held_out, self.val_size, self.seed)
        self.test_set = self._open(datasets, False, plain)

    def _open(self, datasets: Any, train: bool, transform: Any) -> Any:
        source = "https://www.cs.toronto.edu/~kriz/cifar.html"
        opening = partial(datasets.CIFAR10, self.root, train=train, transform=transform)
        return opened(opening, "CIFAR-10", Path(self.root) / "cifar-10-batches-py", source)
