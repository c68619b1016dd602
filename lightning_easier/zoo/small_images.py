"""Two of torchvision's networks as the EASIER paper takes them for small images: they make maps smaller less early."""

from typing import Any

from torch import nn

from lightning_easier.zoo.optional import needed

# Expansion, channels, blocks and stride of each stage of MobileNetV2; torchvision has a stride of 2 for the second
_STAGES = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]


def resnet18_small_stem(num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a ResNet-18 that begins with a 3×3 convolution of stride 1 in the place of 7×7 and 2; max pooling stays.

    Args:
        num_classes: Number of classes.
        **kwargs: Further arguments of torchvision's ``resnet18``.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """
    model: nn.Module = needed("torchvision.models", "ResNet-18").resnet18(num_classes=num_classes, **kwargs)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    model.conv1 = stem
    return model


def mobilenet_v2_small_strides(num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a MobileNetV2 whose stem and whose stage of 24 channels have a stride of 1 in the place of 2.

    Args:
        num_classes: Number of classes.
        **kwargs: Further arguments of torchvision's ``mobilenet_v2``.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """
    build = needed("torchvision.models", "MobileNetV2").mobilenet_v2
    model: nn.Module = build(num_classes=num_classes, inverted_residual_setting=_STAGES, **kwargs)
    stem = model.get_submodule("features.0.0")
    assert isinstance(stem, nn.Conv2d)
    stem.stride = (1, 1)
    return model
