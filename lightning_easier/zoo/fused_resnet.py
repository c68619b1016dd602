"""A small residual network whose inner rectifiers are worth removing."""

from collections.abc import Sequence

from torch import Tensor, nn


class _FusedBlock(nn.Module):
    """A 3×3 convolution that expands, a 1×1 that projects, and a shortcut where the shape stays.

    Without the rectifier between them the two merge exactly into one narrow 3×3 convolution: the 1×1 pads nothing.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, hidden, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.project(self.relu(self.bn1(self.expand(x)))))
        return x + out if self.has_shortcut else out


class FusedResNet(nn.Module):
    """A stem, residual blocks of fused inverted bottlenecks, and a classifier.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: Channels of each stage; each but the first halves the resolution.
        blocks: Blocks a stage.
        expansion: Hidden channels of a block by its input channels.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Source: The block is the fused MBConv of EfficientNetV2 (arXiv 2104.00298, figure 2), without squeeze-and-excite.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32),
        blocks: int = 3,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.Sequential()
        channels = widths[0]
        for number, width in enumerate(widths):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if number > 0 and block == 0 else 1
                stage.append(_FusedBlock(channels, width, stride, expansion))
                channels = width
            self.stages.append(stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x = self.stages(self.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits
