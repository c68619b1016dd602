"""Data sets that torchvision opens and downloads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_easier.zoo.datamodules.base import PhotosDataModule
from lightning_easier.zoo.datamodules.images import IMAGENET_MEAN, IMAGENET_STD, missing, vision


class DownloadedDataModule(PhotosDataModule):
    """A data set of torchvision.

    Args:
        root: Folder that the data set's own is in.
        image_size: Pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        download: Whether to download what is missing.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, which is divided by.

    Attributes:
        dataset: Name of the class in ``torchvision.datasets``.
        folder: Folder of the data set in ``root``.
        source: Where it comes from.
        num_classes: Number of classes.
    """

    dataset: ClassVar[str]
    folder: ClassVar[str]
    source: ClassVar[str]
    num_classes: ClassVar[int]

    def __init__(
        self,
        root: str,
        image_size: int,
        batch_size: int,
        num_workers: int,
        download: bool,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(root, image_size, batch_size, num_workers, mean, std)
        self.download = download
        self._is_downloaded = False

    def prepare_data(self) -> None:
        """Download the data set, if that is wanted; a Trainer asks for it as often as for ``setup``."""
        if self.download and not self._is_downloaded:
            datasets, _ = vision(self)
            getattr(datasets, self.dataset)(self.root, download=True)
            self._is_downloaded = True

    def opened(self, datasets: Any, transform: Any, **part: Any) -> Any:
        """Open a part of the data set.

        Args:
            datasets: ``torchvision.datasets``.
            transform: What is done to an image.
            **part: Says which part, as the class of torchvision takes it.

        Raises:
            FileNotFoundError: If it is missing or incomplete.
        """
        try:
            return getattr(datasets, self.dataset)(self.root, transform=transform, **part)
        except (RuntimeError, FileNotFoundError) as error:
            remedy = f"`download=True` (`--data.download true` on the command line) downloads it from {self.source} to "
            raise missing(self.dataset, Path(self.root) / self.folder, f"{remedy}there") from error
