"""Ready-made models and data for LightningCLI configs, the demo and the benchmarks."""

from lightning_easier.zoo.backbones import build_backbone
from lightning_easier.zoo.cifar_resnet import CifarResNet
from lightning_easier.zoo.classifier import ImageClassifier
from lightning_easier.zoo.datamodules import (
    CIFAR10DataModule,
    DigitsDataModule,
    DTDDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    ImageFolderDataModule,
    PACSDataModule,
    TinyImageNetDataModule,
    VLCSDataModule,
)
from lightning_easier.zoo.fused_resnet import FusedResNet

__all__ = [
    "CIFAR10DataModule",
    "CifarResNet",
    "DTDDataModule",
    "DigitsDataModule",
    "FGVCAircraftDataModule",
    "Flowers102DataModule",
    "FusedResNet",
    "ImageClassifier",
    "ImageFolderDataModule",
    "PACSDataModule",
    "TinyImageNetDataModule",
    "VLCSDataModule",
    "build_backbone",
]
