"""Images to classify, as LightningDataModules: digits, folders of one's own, and the data sets of the EASIER paper."""

from lightning_easier.zoo.datamodules.cifar10 import CIFAR10DataModule
from lightning_easier.zoo.datamodules.digits import DigitsDataModule
from lightning_easier.zoo.datamodules.domains import PACSDataModule, VLCSDataModule
from lightning_easier.zoo.datamodules.fine_grained import DTDDataModule, FGVCAircraftDataModule, Flowers102DataModule
from lightning_easier.zoo.datamodules.image_folder import ImageFolderDataModule
from lightning_easier.zoo.datamodules.tiny_imagenet import TinyImageNetDataModule

__all__ = [
    "CIFAR10DataModule",
    "DTDDataModule",
    "DigitsDataModule",
    "FGVCAircraftDataModule",
    "Flowers102DataModule",
    "ImageFolderDataModule",
    "PACSDataModule",
    "TinyImageNetDataModule",
    "VLCSDataModule",
]
