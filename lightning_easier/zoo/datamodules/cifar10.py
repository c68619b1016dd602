"""CIFAR-10."""

from collections.abc import Sequence
from typing import Any

from lightning_easier.zoo.datamodules.base import Splits
from lightning_easier.zoo.datamodules.downloaded import DownloadedDataModule
from lightning_easier.zoo.datamodules.images import hold_out


class CIFAR10DataModule(DownloadedDataModule):
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
        ValueError: If ``batch_size`` is not positive; in ``setup``, if more images are to be held out than there are.
        FileNotFoundError: In ``setup``, if the data set is missing; it says where it goes.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    dataset = "CIFAR10"
    folder = "cifar-10-batches-py"
    source = "https://www.cs.toronto.edu/~kriz/cifar.html"
    num_classes = 10

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
        super().__init__(root, 32, batch_size, num_workers, download, mean, std)
        self.val_size, self.seed = val_size, seed

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Shift and flip."""
        return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open the data set, and hold out training images."""
        train, held_out = (self.opened(datasets, transform, train=True) for transform in (augmented, plain))
        return *hold_out(train, held_out, self.val_size, self.seed), self.opened(datasets, plain, train=False)
