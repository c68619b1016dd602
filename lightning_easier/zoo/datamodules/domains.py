"""PACS and VLCS: images of the same classes from several domains, which are pooled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import ConcatDataset, Subset

from lightning_easier.zoo.datamodules.base import PhotosDataModule, Splits
from lightning_easier.zoo.datamodules.images import check_classes, missing, shuffled

# Its script fetches both, as folders of this layout
_SOURCE = "https://github.com/facebookresearch/DomainBed"


class DomainsDataModule(PhotosDataModule):
    """Images in ``root/<dataset>/<domain>/<class>``, all domains pooled and split 80 / 10 / 10 at random.

    Training images are cropped to at least 80 % of their area, flipped, and their colours jittered by up to 0.4; others
    are resized.

    Args:
        root: Folder that the data set's own is in.
        image_size: Pixels a side.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.
        domains: Folders of the domains that are taken; all four by default.
        seed: Seed of the split.

    Attributes:
        dataset: Name of the data set and of its folder.
        num_classes: Number of classes.
        usual_domains: The domains that belong to it.

    Shape:
        Batches ``(N, 3, image_size, image_size)``, and labels ``(N,)``.

    Raises:
        ValueError: If ``batch_size`` is not positive, or there are no ``domains``; in ``setup``, if the domains have
            not the same classes, or fewer than ten images.
        FileNotFoundError: In ``setup``, if a domain is missing; it says what to download and where it goes.
        ModuleNotFoundError: In ``setup``, if torchvision is not installed.
    """

    dataset: ClassVar[str]
    num_classes: ClassVar[int]
    usual_domains: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 16,
        num_workers: int = 2,
        domains: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, image_size, batch_size, num_workers)
        self.domains, self.seed = list(self.usual_domains if domains is None else domains), seed
        if not self.domains:
            raise ValueError(
                f"Expected argument `domains` to be some of {list(self.usual_domains)}, but got {domains!r}; leave it "
                "out for all of them"
            )

    def augmentation(self, v2: Any) -> Sequence[Any]:
        """Crop, flip, and jitter the colours."""
        return [
            v2.RandomResizedCrop(self.image_size, scale=(0.8, 1.0)), v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
        ]  # fmt: skip

    def resizing(self, v2: Any) -> Sequence[Any]:
        """Resize both sides."""
        return [v2.Resize((self.image_size, self.image_size))]

    def transformed(self, datasets: Any, augmented: Any, plain: Any) -> Splits:
        """Open, pool and split the domains."""
        folder = Path(self.root) / self.dataset
        for domain in self.domains:
            if not (folder / domain).is_dir():
                remedy = (
                    f"download {self.dataset} from a clone of DomainBed ({_SOURCE}): `pip install gdown wilds`, then "
                    f"`python -m domainbed.scripts.download --data_dir {Path(self.root).absolute()}`, so that images "
                    f"are {folder}/<domain>/<class>/<image>"
                )
                raise missing(f"{self.dataset} with its domain {domain!r}", folder / domain, remedy)
        training, others = (
            [datasets.ImageFolder(folder / domain, transform) for domain in self.domains]
            for transform in (augmented, plain)
        )
        check_classes(f"the domains of {self.dataset}", others, "`domains` says which of them are taken")
        pooled: ConcatDataset[Any] = ConcatDataset(others)
        order, tenth = shuffled(len(pooled), self.seed), len(pooled) // 10
        if not tenth:
            raise ValueError(
                f"Expected {folder} to hold at least ten images in {self.domains}, of which a tenth are to validate "
                f"and a tenth to test with, but there are {len(pooled)}"
            )
        train: Subset[Any] = Subset(ConcatDataset(training), order[2 * tenth :])
        return train, Subset(pooled, order[:tenth]), Subset(pooled, order[tenth : 2 * tenth])


class PACSDataModule(DomainsDataModule):
    """PACS: 9,991 images of seven classes as art paintings, cartoons, photos and sketches, pooled.

    See :class:`DomainsDataModule`.

    Source: Li et al., "Deeper, broader and artier domain generalization" (arXiv 1710.03077).
    """

    dataset = "PACS"
    num_classes = 7
    usual_domains = ("art_painting", "cartoon", "photo", "sketch")


class VLCSDataModule(DomainsDataModule):
    """VLCS: 10,729 images of five classes from Caltech-101, LabelMe, SUN09 and VOC 2007, pooled.

    See :class:`DomainsDataModule`.

    Source: Fang et al., "Unbiased metric learning" (ICCV 2013).
    """

    dataset = "VLCS"
    num_classes = 5
    usual_domains = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
