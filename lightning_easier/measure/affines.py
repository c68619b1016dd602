r"""The affine that comes closest to an activation: per channel :math:`y = a z + b` by least squares.

With :math:`z` the pre-activation and :math:`\varphi` the activation,

.. math:: a = \frac{\operatorname{cov}(\varphi(z), z)}{\operatorname{var}(z)}, \qquad b = E[\varphi(z)] - a\,E[z].

Six numbers per channel are sufficient: how many values, the means of both, and the sums of squares and products around
them. They are merged over batches and processes by Chan's formula, which loses no digits to a mean far from zero.

A sample of which a value of :math:`z` or :math:`\varphi(z)` is not finite is left out: it would make every sum so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

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


class AffineStatistics(Metric):
    """Sums for the affine that comes closest to an activation, over all batches and processes together.

    Samples whose values are not all finite are left out and counted in ``left_out``.

    Args:
        neuron_dim: The axis of the channels: 1 behind convolutions and batch norm, -1 behind Linear and LayerNorm.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> statistics = AffineStatistics()
        >>> z = torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
        >>> statistics.update(z, z.relu())
        >>> fit = statistics.fit()
        >>> fit.scale, fit.offset
        (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    sums: Tensor
    left_out: Tensor

    def __init__(self, neuron_dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.neuron_dim = neuron_dim
        self.add_state("sums", torch.zeros(_NUMBERS, 0), dist_reduce_fx=_merged_over_processes)
        self.add_state("left_out", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pre_activation: Tensor, activation: Tensor) -> None:
        """Add one batch.

        Args:
            pre_activation: Shape ``(N, C, *)``, or ``(N, *, C)`` with ``neuron_dim=-1``.
            activation: What the activation makes of it, of the same shape.
        """
        if not pre_activation.numel():
            return
        now, left_out = _sums(pre_activation.detach(), activation.detach(), self.neuron_dim)
        now = now.to(self.sums.device)
        self.left_out = self.left_out + left_out.to(self.left_out.device)
        # Out of place: a state made under inference_mode must not be written to outside of it.
        self.sums = now if self.sums.shape[1] == 0 else _merged(self.sums.to(now), now)

    def compute(self) -> Tensor:
        """Compute the six numbers of each channel, shape ``(6, C)``.

        Raises:
            RuntimeError: If there was no update on any process.
        """
        if self.sums.shape[1] == 0:
            raise RuntimeError("AffineStatistics has seen no pre-activation. Call `update` first.")
        return self.sums

    def fit(self) -> AffineFit:
        """Compute scale and offset of each channel, and the share of variance that they explain.

        Raises:
            RuntimeError: If there was no update on any process, or no sample was finite.
        """
        count, z, y, zz, zy, yy = self.compute().cpu().double()
        if not count.any():
            raise RuntimeError(
                "AffineStatistics has seen no sample whose values are all finite. Look for NaN in the data, and in the "
                "weights."
            )
        varies = zz > torch.finfo(torch.float32).eps ** 2 * z.square().clamp(min=torch.finfo(torch.float64).tiny)
        scale = torch.where(varies, zy / zz, 0.0)
        variance = float(yy.sum())
        explained = float((scale * zy).sum()) / variance if variance > 0 else 1.0
        return AffineFit(scale, y - scale * z, self.neuron_dim, explained)

    def add(self, sums: Tensor) -> None:
        """Add the numbers of another part of the data, shape ``(6, C)``."""
        sums = sums.to(_wide(self.sums.device)).to(self.sums.device)
        self.sums = sums if self.sums.shape[1] == 0 else _merged(self.sums.to(sums), sums)

    def merged(self) -> Tensor:
        """Return the numbers over all processes, each of which has to call this; shape ``(6, C)`` on the CPU."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self.sums.cpu()

    def set_dtype(self, dst_type: str | torch.dtype) -> "AffineStatistics":
        """Keep the sums as precise as they are."""
        return self

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A process that got no batch does not know the number of channels yet; it learns it from the others.
        group = process_group or self.process_group
        sizes = dist_sync_fn(torch.tensor([self.sums.shape[1]], device=self.device), group=group)
        missing = int(torch.cat(list(sizes)).max()) - self.sums.shape[1]
        self.sums = torch.cat([self.sums, self.sums.new_zeros(_NUMBERS, missing)], 1).to(_wide(self.sums.device))
        super()._sync_dist(dist_sync_fn, process_group=process_group)


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


def _merged_over_processes(stacked: Tensor) -> Tensor:
    merged = stacked[0]
    for other in stacked[1:]:
        merged = _merged(merged, other)
    return merged
