r"""The affine that comes closest to an activation: per channel :math:`y = a z + b` by least squares.

With :math:`z` the pre-activation and :math:`\varphi` the activation,

.. math:: a = \frac{\operatorname{cov}(\varphi(z), z)}{\operatorname{var}(z)}, \qquad b = E[\varphi(z)] - a\,E[z].

Six numbers per channel are sufficient: how many values, the means of both, and the sums of squares and products around
them. They are merged over batches and processes by Chan's formula, which loses no digits to a mean far from zero.

A sample of which a value of :math:`z` or :math:`\varphi(z)` is not finite is left out: it would make every sum so.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_easier.support.finite import finite_samples, is_finite, zeroed

_NUMBERS = 6  # count, E[z], E[y], Σ(z − E z)², Σ(z − E z)(y − E y), Σ(y − E y)²


class AffineFit(NamedTuple):
    """An affine for each channel, and how well it represents the activation.

    Attributes:
        scale: Shape ``(C,)``, float64.
        offset: Shape ``(C,)``, float64.
        dim: The axis of the channels.
        explained: Share of the variance of the activation that it explains, over all channels together.
    """

    scale: Tensor
    offset: Tensor
    dim: int
    explained: float

    def is_finite_in(self, dtype: torch.dtype) -> bool:
        """Tell whether all its numbers are finite in a dtype, which may hold less than their own."""
        return is_finite(self.scale.to(dtype), self.offset.to(dtype))

    def to_plain(self) -> dict[str, Any]:
        """Return tensors and numbers by name: what a checkpoint may hold."""
        return self._replace(scale=self.scale.cpu(), offset=self.offset.cpu())._asdict()


class AffineStatistics:
    """Sums for the affine that comes closest to an activation, over batches.

    Samples whose values are not all finite are left out and counted.

    Args:
        neuron_dim: The axis of the channels: 1 after convolutions and batch norm, -1 after Linear and LayerNorm.

    Attributes:
        sums: The six numbers of each channel, shape ``(6, C)``; ``(6, 0)`` before the first update.
        left_out: How many samples were left out, an int64 scalar.

    Example:
        >>> import torch
        >>> statistics = AffineStatistics()
        >>> z = torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
        >>> statistics.update(z, z.relu())
        >>> fit = affine_of(statistics.sums, statistics.neuron_dim)
        >>> fit.scale, fit.offset
        (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    def __init__(self, neuron_dim: int = 1) -> None:
        self.neuron_dim = neuron_dim
        self.sums = torch.zeros(_NUMBERS, 0, dtype=torch.float64)
        self.left_out = torch.zeros((), dtype=torch.int64)

    def reset(self) -> None:
        """Forget the sums."""
        self.sums = self.sums.new_zeros(_NUMBERS, 0)
        self.left_out = torch.zeros_like(self.left_out)

    def to(self, device: torch.device) -> "AffineStatistics":
        """Move the sums to a device, as precise as that can hold them."""
        self.sums, self.left_out = self.sums.to(_wide(device)).to(device), self.left_out.to(device)
        return self

    def update(self, pre_activation: Tensor, activation: Tensor) -> None:
        """Add one batch.

        Args:
            pre_activation: Shape ``(N, C, *)``, or ``(N, *, C)`` with ``neuron_dim=-1``.
            activation: What the activation makes of it, of the same shape.
        """
        if not pre_activation.numel():
            return
        now, left_out = _sums(pre_activation.detach(), activation.detach(), self.neuron_dim)
        # Out of place: a state made under inference_mode must not be written to outside of it.
        self.left_out = self.left_out + left_out.to(self.left_out.device)
        self.add(now)

    def add(self, sums: Tensor) -> None:
        """Add the numbers of another part of the data, shape ``(6, C)``."""
        device = self.sums.device
        self.sums = merged([self.sums, sums.to(_wide(device)).to(device)])


def affine_of(sums: Tensor, neuron_dim: int) -> AffineFit:
    """Compute scale and offset of each channel, and the share of variance that they explain.

    Args:
        sums: The six numbers of each channel, shape ``(6, C)``.
        neuron_dim: The axis of the channels.

    Raises:
        RuntimeError: If nothing was summed up, or no sample was finite.
    """
    if sums.shape[1] == 0:
        raise RuntimeError("AffineStatistics has seen no pre-activation. Call `update` first.")
    count, z, y, zz, zy, yy = sums.cpu().double()
    if not count.any():
        raise RuntimeError(
            "AffineStatistics has seen no sample whose values are all finite. Look for NaN in the data, and in the "
            "weights."
        )
    varies = zz > torch.finfo(torch.float32).eps ** 2 * z.square().clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(varies, zy / zz, 0.0)
    variance = float(yy.sum())
    explained = float((scale * zy).sum()) / variance if variance > 0 else 1.0
    return AffineFit(scale, y - scale * z, neuron_dim, explained)


def merged(parts: Iterable[Tensor]) -> Tensor:
    """Merge the numbers of parts of the data, one after the other.

    Args:
        parts: Shape ``(6, C)`` each; ``(6, 0)`` where nothing was seen.
    """
    first, *others = parts
    for other in others:
        if first.shape[1] and other.shape[1]:
            first = _merged(first, other)
        elif other.shape[1]:
            first = other
    return first


def _wide(device: torch.device) -> torch.dtype:
    """Return the most precise dtype that a device has."""
    return torch.float32 if device.type in ("mps", "xla") else torch.float64


def _sums(z: Tensor, y: Tensor, neuron_dim: int) -> tuple[Tensor, Tensor]:
    """Return the six numbers of one batch, per channel, in float64 where the device has it; how many are left out."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    z, y = (value.to(wide).movedim(neuron_dim, 0) for value in (z, y))
    # Samples are left out by a weight of zero: how many are left is not known on the host. Where all are kept, weights
    # and shares are ones, which no result depends on.
    samples = finite_samples(z.movedim(1, 0), y.movedim(1, 0))
    z, y = (zeroed(value.movedim(1, 0), samples).movedim(0, 1).flatten(1) for value in (z, y))
    kept = samples.repeat_interleave(z.shape[1] // len(samples))
    weight, count = kept.to(wide), kept.sum().to(wide)
    share = torch.full_like(count, z.shape[1]) / count.clamp(min=1)  # a number by a tensor would be rounded twice
    means = [value.mean(1, keepdim=True) * share for value in (z, y)]
    dz, dy = (torch.addcmul(value, mean, weight, value=-1) for value, mean in zip((z, y), means, strict=True))
    count = count.expand(len(z))
    numbers = count, means[0][:, 0], means[1][:, 0], (dz * dz).sum(1), (dz * dy).sum(1), (dy * dy).sum(1)
    return torch.stack(numbers).to(_wide(z.device)), (~samples).sum()


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Merge the numbers of two parts of the data (Chan et al., 1979)."""
    count = a[0] + b[0]
    share = b[0] / count.clamp(min=1)
    z, y = b[1] - a[1], b[2] - a[2]
    weight = a[0] * share
    return torch.stack(
        [count, a[1] + share * z, a[2] + share * y, a[3] + b[3] + weight * z * z, a[4] + b[4] + weight * z * y,
         a[5] + b[5] + weight * y * y]
    )  # fmt: skip
