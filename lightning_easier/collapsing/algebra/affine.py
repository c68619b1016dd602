"""The smallest linear operators: a scale and an offset for each channel, or for each element."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.support.affine import ChannelAffine


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


__all__ = ["AFFINES", "ChannelAffine", "ElementAffine"]

AFFINES = (ChannelAffine, ElementAffine)
"""Operators that leave every element where it is."""
