"""The networks that ``tuning.py`` and ``shipped.py`` compare on.

The weights of a ResNet are given. The others are trained from scratch, once, and kept in a file:

- ``vgg``: VGG-16 with batch norms, of a quarter of the width, a mean over the image and one linear layer at its end.
- ``vit``: torchvision's VisionTransformer, six layers of width 96 with three heads, 16 tokens of 8×8 pixels, which a
  stem of three convolutions reads (Xiao et al., arXiv 2106.14881): without one, a few epochs are not enough.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cifar
import torch
from cifar import Images, load_weights, tune
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vgg
from torchvision.models.vision_transformer import ConvStemConfig

from lightning_easier.zoo import CifarResNet


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained.

    Attributes:
        name: For titles.
        build: Makes one, its weights drawn at random.
        rate_from_scratch: The largest learning rate when it is trained from scratch.
        rate: The same when it is tuned.
        optimizer: Of both, as ``cifar.tune`` takes it.
        dtype: Of the autocast of both.
        is_given: Whether its weights are given.
        inner: What the names of the activations inside its blocks end with; of all activations if it is empty.
        unsuited: Methods of ``tuning.py`` that do not take it.
    """

    name: str
    build: Callable[[], nn.Module]
    rate_from_scratch: float = 0.1
    rate: float = 0.01
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = cifar.sgd
    dtype: torch.dtype = cifar.PRECISION
    is_given: bool = False
    inner: str = ""
    unsuited: tuple[str, ...] = ()

    def load(self, path: str) -> nn.Module:
        """Load weights into a new one, in eval mode."""
        return load_weights(self.build(), path)

    def trained(self, path: str, images: Images, subset: Tensor, epochs: float, seed: int) -> nn.Module:
        """Return the dense network that a comparison starts from, in eval mode.

        Weights that are given are loaded and tuned. Others are trained from scratch and written where there is no file,
        and taken as they are where there is one.

        Args:
            path: File of the weights.
            images: What ``subset`` has places in.
            subset: The images an epoch goes over.
            epochs: Of the tuning, or of the training from scratch.
            seed: Of the order and the augmentation, and of the weights.
        """
        if self.is_given:
            return self.tune(self.load(path), images, subset, epochs, seed)
        if Path(path).exists():
            return self.load(path)
        torch.manual_seed(seed)
        model = self.tune(self.build(), images, subset, epochs, seed, rate=self.rate_from_scratch)
        torch.save({"state_dict": model.state_dict()}, path)
        return model

    def tune(self, model: nn.Module, *arguments: Any, rate: float | None = None, **options: Any) -> nn.Module:
        """Train as ``cifar.tune`` does, with what suits this network."""
        rate = self.rate if rate is None else rate
        return tune(model, *arguments, rate=rate, optimizer=self.optimizer, dtype=self.dtype, **options)


def vgg16(width: float = 1 / 4, classes: int = 10) -> nn.Module:
    """Return VGG-16 with batch norms (Simonyan and Zisserman, arXiv 1409.1556) for small images.

    Args:
        width: Channels are multiplied by it.
        classes: Number of classes.
    """
    layers = [each if isinstance(each, str) else int(width * each) for each in vgg.cfgs["D"]]
    features = vgg.make_layers(layers, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(int(width * 512), classes))


def vit(layers: int = 6, width: int = 96, heads: int = 3, classes: int = 10) -> nn.Module:
    """Return torchvision's VisionTransformer for images of 32×32 pixels, with 16 tokens and a stem of convolutions."""
    stem = [ConvStemConfig(out_channels=channels, kernel_size=3, stride=2) for channels in (32, 64, width)]
    model = VisionTransformer(32, 8, layers, heads, width, 4 * width, num_classes=classes, conv_stem_configs=stem)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision begins with zeros, for fine-tuning
    return model


NETWORKS: dict[str, Callable[[int], Network]] = {
    "resnet": lambda depth: Network(f"ResNet-{depth}", partial(CifarResNet, depth), is_given=True, inner="relu1"),
    "vgg": lambda _: Network(
        "VGG-16-BN of a quarter of the width", vgg16,
        unsuited=("channels", "scratch", "blocks_kl", "blocks_cka", "practise"),  # it has no blocks
    ),
    "vit": lambda _: Network(
        "ViT of six layers", vit, rate_from_scratch=1e-3, rate=3e-4, optimizer=cifar.adamw,
        dtype=torch.float32,  # twice as fast as bfloat16 at such a width
        unsuited=("magnitude", "channels", "scratch", "fastnas"),  # attention reads weights without calling modules
    ),
}  # fmt: skip
"""Name -> what makes the network, given the depth of a ResNet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what tells the network and the images."""
    cifar.add_arguments(parser)
    parser.add_argument(
        "--network",
        default="resnet",
        choices=NETWORKS,
        help="the weights of a resnet are given; others are trained from scratch for --before epochs where there is no "
        "file --weights, and written to it, and taken from it where there is one",
    )


def chosen(options: Any) -> Network:
    """Return the network that the arguments tell."""
    return NETWORKS[options.network](options.depth)
