"""Ready-made models and data for LightningCLI configs, the demo and the benchmarks."""

from lightning_easier.zoo.backbones import build_backbone
from lightning_easier.zoo.cifar_resnet import CifarResNet
from lightning_easier.zoo.classifier import ImageClassifier
from lightning_easier.zoo.datamodules import CIFAR10DataModule, DigitsDataModule, ImageFolderDataModule
from lightning_easier.zoo.fused_resnet import FusedResNet

__all__ = [
    "CIFAR10DataModule",
    "CifarResNet",
    "DigitsDataModule",
    "FusedResNet",
    "ImageClassifier",
    "ImageFolderDataModule",
    "build_backbone",
]
