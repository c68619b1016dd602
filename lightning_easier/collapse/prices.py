"""What an operator costs at a shape: seconds, multiply-accumulates, or one more in the depth."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_easier.collapse.affine import ChannelAffine
from lightning_easier.collapse.convolutions import CONVOLUTIONS, padding_of
from lightning_easier.collapse.operators import channels, of_random_numbers
from lightning_easier.costs import time_interleaved

Objective = Literal["latency", "macs", "depth"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

Shape = tuple[int, ...]
Price = tuple[float, int]
"""The objective's figure, and the number of operations, which decides between equal figures."""

FREE: Price = (0.0, 0)
_SAMPLES = 7


def total(*prices: Price) -> Price:
    """Add up prices."""
    return sum(price[0] for price in prices), sum(price[1] for price in prices)


def count_macs(operator: nn.Module, shape: Shape) -> int:
    """Count the multiply-accumulates of one call of a linear operator.

    Args:
        operator: The operator; it needs no data.
        shape: Of its input.
    """
    if isinstance(operator, ChannelAffine):
        return 0
    weight: Tensor = operator.weight  # type: ignore[assignment]
    if isinstance(operator, nn.Linear):
        return prod(shape[:-1]) * weight.numel()
    positions = output_shape(operator, shape) if isinstance(operator, CONVOLUTIONS) else shape
    return shape[0] * prod(positions[2:]) * weight.numel()


def output_shape(operator: Any, shape: Shape) -> Shape:
    """Return the shape of an operator's output.

    Args:
        operator: The operator; it needs no data.
        shape: Of its input.
    """
    if isinstance(operator, ChannelAffine):
        return shape
    if isinstance(operator, nn.Linear):
        return (*shape[:-1], operator.out_features)
    geometry = zip(
        shape[2:], operator.kernel_size, operator.stride, operator.dilation, padding_of(operator),
        operator.output_padding, strict=True,
    )  # fmt: skip
    if isinstance(operator, CONVOLUTIONS):
        positions = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, _ in geometry)
    else:
        positions = tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, d, p, o in geometry)
    return (shape[0], operator.out_channels, *positions)


@dataclass
class LatencyTable:
    """Measured times of operators by structure, shape and device; pass one to several collapses to measure once.

    Attributes:
        seconds: The median time of a call, by what was called.
    """

    seconds: dict[Hashable, float] = field(default_factory=dict)

    def measure(self, calls: Mapping[Hashable, Callable[[], Callable[[], Any]]]) -> None:
        """Time what was not timed yet, interleaved.

        Args:
            calls: Key -> what makes the call to be timed.
        """
        missing = {key: make() for key, make in calls.items() if key not in self.seconds}
        for key, latency in time_interleaved(missing, samples=_SAMPLES, progress="Timing operators").items():
            self.seconds[key] = latency.median


def key_of(operator: nn.Module, shape: Shape, device: torch.device) -> Hashable:
    """Return what tells the latency of an operator: its structure, dtype, device, the shape of its input."""
    weight: Tensor = operator.weight  # type: ignore[assignment]
    geometry = tuple(
        (name, value)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "output_padding", "padding_mode", "dim")
        if (value := getattr(operator, name, None)) is not None
    )
    has_bias = operator.bias is not None
    threads = torch.get_num_threads()
    return type(operator).__name__, channels(operator), geometry, has_bias, weight.dtype, shape, str(device), threads


def call_of(operator: nn.Module, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """Return a call of an operator of the same structure, with some numbers."""
    weight: Tensor = operator.weight  # type: ignore[assignment]
    return partial(of_random_numbers(operator, device), torch.randn(shape, dtype=weight.dtype, device=device))
