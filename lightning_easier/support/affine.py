"""A scale and an offset for each channel: the smallest operator, which every wing may put somewhere."""

from typing import Any

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    r"""Scale and offset each channel: :math:`y_c = w_c x_c + b_c`.

    What a batch norm computes in eval mode, and a LayerScale; what two of them become when they are merged.

    Args:
        channels: Number of channels.
        dim: The axis of the channels: 1 for maps ``(N, C, *)``, -1 for vectors and tokens ``(N, *, C)``.
        bias: Whether there is an offset.
        device: Where its parameters are.
        dtype: Of its parameters.

    Example:
        >>> ChannelAffine(3, dim=1)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, channels: int, dim: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Scale and offset; the shape stays."""
        shape = (-1,) if self.dim == -1 else (-1, *[1] * (input.ndim - 2))
        weight = self.weight.view(shape)
        return input * weight if self.bias is None else torch.addcmul(self.bias.view(shape), input, weight)

    def extra_repr(self) -> str:
        """Name the channels and their axis."""
        return f"{self.channels}, dim={self.dim}, bias={self.bias is not None}"
