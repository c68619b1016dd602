"""The residual networks of He et al. for CIFAR-10."""

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3×3 convolutions around a shortcut without parameters ("option A")."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.missing_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Take every second pixel and pad the channels with zeros, where the shape changes."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing_channels:
            before = self.missing_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.missing_channels - before))
        return x


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56 or -110 for small images: three stages of 16, 32 and 64 channels.

    The names of its parameters are those of the widely used checkpoints of these networks.

    Args:
        depth: ``6n + 2`` for ``n`` blocks a stage.
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Raises:
        ValueError: If ``depth`` is not of the form ``6n + 2``.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Source: He et al., "Deep residual learning for image recognition", section 4.2 (arXiv 1512.03385).
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"Expected argument `depth` to be 6n + 2 (20, 32, 44, 56, 110), but got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(in_channels, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))
