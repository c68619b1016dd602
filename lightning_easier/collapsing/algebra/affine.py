"""The smallest linear operators: a scale and an offset for each channel, or for each element."""

from collections.abc import Sequence
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


class ElementAffine(nn.Module):
    r"""Scale and offset each element: :math:`y_i = w_i x_i + b_i` for every place :math:`i` of a sample.

    What a sum with learned positions computes, and what several in a row become when they are merged.

    Args:
        shape: Of one sample.
        dim: The axis of the channels, of a batch: 1 for maps ``(N, C, *)``, -1 for vectors and tokens ``(N, *, C)``.
        bias: Whether there is an offset.
        device: Where its parameters are.
        dtype: Of its parameters.

    Example:
        >>> ElementAffine((3, 4, 4), dim=1)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, shape: Sequence[int], dim: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(self.shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype)) if bias else None

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.shape[0 if self.dim == 1 else -1]

    def forward(self, input: Tensor) -> Tensor:
        """Scale and offset; the shape stays."""
        return input * self.weight if self.bias is None else torch.addcmul(self.bias, input, self.weight)

    def extra_repr(self) -> str:
        """Name the shape and the axis of the channels."""
        return f"{self.shape}, dim={self.dim}, bias={self.bias is not None}"


AFFINES = (ChannelAffine, ElementAffine)
"""Operators that leave every element where it is."""
