"""Images on disk: torchvision's classes for them, the last transforms, splits, and what is said of missing ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from lightning_easier.zoo.optional import needed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def vision(what: object) -> tuple[Any, Any]:
    """Import ``torchvision.datasets`` and ``torchvision.transforms.v2``.

    Args:
        what: What needs them.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """
    name = type(what).__name__
    return needed("torchvision.datasets", name), needed("torchvision.transforms.v2", name)


def normalized(v2: Any, transforms: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> Any:
    """Compose transforms, and at last make images float32 tensors of that mean and standard deviation a channel."""
    return v2.Compose([*transforms, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def hold_out(train: Any, held_out: Any, val_size: int, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Split one data set, opened with two transforms, into training and validation images.

    Raises:
        ValueError: If none or all of the images would be held out.
    """
    if not 0 < val_size < len(train):
        raise ValueError(
            f"Expected argument `val_size` to be between 1 and {len(train) - 1}, the training images less one, but got "
            f"{val_size}"
        )
    order = shuffled(len(train), seed)
    return Subset(train, order[val_size:]), Subset(held_out, order[:val_size])


def shuffled(count: int, seed: int) -> list[int]:
    """Return so many indices in an order that the seed tells."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def missing(what: str, folder: Path, remedy: str) -> FileNotFoundError:
    """Return the error for data that are not where they should be.

    Args:
        what: The data set.
        folder: Where it should be.
        remedy: What to download, and where it goes.
    """
    return FileNotFoundError(
        f"Expected argument `root` to hold {what}, but {folder} is missing or incomplete: {remedy}"
    )


def check_classes(what: str, folders: Sequence[Any], remedy: str) -> None:
    """Require folders of images to have the same classes: a label is the place of its class among those of its folder.

    Args:
        what: What they are.
        folders: Of ``torchvision.datasets.ImageFolder``.
        remedy: What to do about it.

    Raises:
        ValueError: If one has other classes than the first.
    """
    first = folders[0]
    for images in folders[1:]:
        if images.classes != first.classes:
            raise ValueError(
                f"Expected {what} to have the same classes, but those in {first.root} are {first.classes}, and in "
                f"{images.root} {images.classes}; {remedy}"
            )


class Listed(Dataset[Any]):
    """Images that are listed with their labels.

    Args:
        samples: File and label of each.
        transform: What is done to an image.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Callable[[Any], Any]) -> None:
        self.samples = list(samples)
        self.transform = transform
        self._load = needed("torchvision.datasets.folder", "Reading images").default_loader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(self._load(path)), label
