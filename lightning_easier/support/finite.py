"""Leave samples out of sums where their values are not finite, without reading a value back to the host."""

from math import isfinite

import torch
from torch import Tensor


def finite_samples(*values: Tensor) -> Tensor:
    """Tell of each sample whether its values are finite: NaN, an infinity or an overflow makes their sum so.

    A sum reads each value once and writes one number a sample, where ``isfinite`` writes as much as it reads.

    Args:
        *values: Shape ``(N, *)`` each, floating point.

    Returns:
        A bool tensor of shape ``(N,)``, on their device.
    """
    kept = [_sums(value.detach()).isfinite() for value in values]
    return kept[0] if len(kept) == 1 else torch.stack(kept).all(0)


def is_surely_finite(sums: Tensor) -> bool:
    """Tell whether all sums are finite as far as that is known at once: on a GPU a look would wait for the device."""
    return sums.is_cpu and isfinite(sums.sum())


def _sums(value: Tensor) -> Tensor:
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32  # a sum in half overflows early
    return value.sum(tuple(range(1, value.ndim)), dtype=wide) if value.ndim > 1 else value


def zeroed(value: Tensor, kept: Tensor) -> Tensor:
    """Return values ``(N, *)`` with zeros in the place of the samples that are not kept ``(N,)``."""
    if kept.device.type == "cpu" and bool(kept.all()):  # elsewhere a look would wait for the device
        return value
    return torch.where(kept.view(-1, *[1] * (value.ndim - 1)), value, 0.0)


def is_finite(*tensors: Tensor) -> bool:
    """Tell whether all values of some tensors are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
