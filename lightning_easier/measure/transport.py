"""Sliced Wasserstein distance between two batches, such as what goes into a block and what comes out of it.

In one dimension optimal transport sorts: the cheapest way to move one batch onto another of the same size moves the
smallest value to the smallest. So both batches are projected onto random directions, and each projection is sorted.

Two things keep it cheap enough for the loss of every training step. All directions are searched without a graph; for
the largest slice only the one direction that was found is differentiated, so that a step keeps one direction and not
fifty. And neither batch is copied: the two share the directions, not a tensor.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_easier.support.arguments import check_choice, check_instance, check_integer
from lightning_easier.support.finite import finite_samples

Kind = Literal["max", "mean"]

_KINDS = ("max", "mean")


def _check_slicing(p: float, directions: int, kind: str) -> None:
    """Check how it is sliced."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"Expected argument `p` to be a number, but got {p!r}")
    if not 1 <= p < math.inf:
        raise ValueError(f"Expected argument `p` to be finite and at least 1 (below, it is no distance), but got {p}")
    check_integer("directions", directions, 1)
    check_choice("kind", kind, _KINDS)


def _check_batches(x: Tensor, y: Tensor) -> None:
    """Check that two batches can be compared, whatever their number of samples."""
    for name, value in (("x", x), ("y", y)):
        check_instance(name, value, Tensor)
        if not value.is_floating_point():
            raise TypeError(
                f"Expected argument `{name}` to be a floating point tensor, but got dtype {value.dtype}. "
                "Convert it with `.float()`"
            )
        if value.ndim < 1:
            raise ValueError(
                f"Expected argument `{name}` to have a batch axis, shape (N, *), but got a tensor without axes"
            )
    if x.shape != y.shape:
        raise ValueError(
            "Expected arguments `x` and `y` to have the same shape, "
            f"but got {tuple(x.shape)} and {tuple(y.shape)}. A block that changes the shape can't be compared"
        )
    if x.device != y.device:
        raise ValueError(
            f"Expected arguments `x` and `y` to be on the same device, but got {x.device} and {y.device}. "
            "Move one with `.to(...)`"
        )
    if math.prod(x.shape[1:]) == 0:
        raise ValueError(f"Expected arguments `x` and `y` to have features, but got shape {tuple(x.shape)}")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Leave the autocast of a step, which would project in half precision; some devices (meta) have none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _draw_directions(x: Tensor, dtype: torch.dtype, directions: int, generator: torch.Generator | None) -> Tensor:
    """Draw unit vectors, shape (directions, features), uniformly on the sphere and on the device of x."""
    device = x.device if generator is None else generator.device
    features = math.prod(x.shape[1:])
    drawn = torch.randn(directions, features, generator=generator, device=device, dtype=dtype)
    drawn = drawn.to(x.device, non_blocking=True)
    # In place: they may take as much memory as a batch. A direction that was drawn as zero stays zero, and is harmless.
    F.normalize(drawn, dim=1, out=drawn)
    return drawn


def _sorted_differences(x: Tensor, y: Tensor, directions: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the sorted projections of x less those of y, shape (samples, directions).

    Those of samples that are not kept are the largest of both, and differ by zero.
    """
    projected, other = F.linear(x, directions), F.linear(y, directions)
    if kept is None:
        return projected.sort(dim=0).values - other.sort(dim=0).values
    last = torch.finfo(projected.dtype).max
    projected, other = (torch.where(kept[:, None], each, last) for each in (projected, other))
    differences = projected.sort(dim=0).values - other.sort(dim=0).values
    places = torch.arange(len(kept), device=kept.device)[:, None]
    return torch.where(places < kept.sum(), differences, 0.0)


def _slice_differences(
    x: Tensor, y: Tensor, directions: Tensor, p: float, kind: str, kept: Tensor | None = None
) -> Tensor:
    """Return the sorted differences of the slices that count, shape (samples, slices): of all, or of the largest."""
    if kind == "max":
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(_sorted_differences(x, y, directions, kept), ord=p, dim=0)
            # An index that stays a tensor: no value is read back to the host.
            directions = directions.index_select(0, lengths.argmax().reshape(1))
    return _sorted_differences(x, y, directions, kept)


def _kept_samples(x: Tensor, y: Tensor) -> Tensor:
    """Tell of each sample of two batches whether it counts, shape (samples,), without reading a value back to the host.

    One that is not finite in both does not, and one that is left alone is no distribution. Where none is finite, all
    count: a distance that is not finite tells of it.
    """
    kept = finite_samples(x, y)
    number = kept.sum()
    return (kept | (number == 0)) & (number != 1)


def _sliced_wasserstein_update(
    x: Tensor,
    y: Tensor,
    p: float,
    directions: int,
    kind: str,
    generator: torch.Generator | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, int | Tensor]:
    """Compute the distance of one batch times its samples, a scalar in float32 or float64, and count the samples."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    length = len(x)
    samples = length if kept is None else kept.sum()
    with _without_autocast(x.device.type):
        drawn = _draw_directions(x, dtype, directions, generator)
        flat_x, flat_y = (value.reshape(length, -1).to(dtype) for value in (x, y))
        differences = _slice_differences(flat_x, flat_y, drawn, p, kind, kept)
        # The root of the mean power over samples and slices is a norm. Where it is zero, so is its gradient in torch:
        # a distance can't be smaller, so zero is a subgradient there. A root of a mean would give 0 · inf.
        numbers = samples * (differences.numel() // length)
        if isinstance(numbers, Tensor):
            numbers = numbers.clamp(min=1).to(dtype)
        distance = torch.linalg.vector_norm(differences, ord=p) / numbers ** (1 / p)
    return distance * samples, samples


def _sliced_wasserstein_compute(total: Tensor, samples: Tensor | int) -> Tensor:
    """Compute the mean distance from the sums over batches."""
    return total / samples


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 2.0,
    directions: int = 50,
    kind: Kind = "max",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the sliced Wasserstein distance between two batches, to be measured or to be added to a loss.

    Each sample is flattened whole and projected on K unit vectors, drawn uniformly. With x_k(n) the n-th smallest of
    the projections of ``x`` on the k-th, the distance of a slice is

    W_k = (1/N · Σ_n |x_k(n) − y_k(n)|^p)^(1/p)

    and that of the batches max_k W_k, or (1/K · Σ_k W_k^p)^(1/p).

    It is differentiable in both batches. Where the largest slice is sought, the gradient is that of the slice found.
    Where the distance is zero, as of a block that is the identity, the gradient is zero. Two batches of the same
    samples in another order have no distance, either.

    The directions, projections and all that follows are in float32, within autocast and for half precision, too, and
    in float64 if ``x`` or ``y`` is. Values that are not finite make the distance NaN or infinite: it is for the caller
    to notice, because looking would wait for the device.

    Args:
        x: The first batch, shape ``(N, *)`` with at least two samples.
        y: The second one, of the same shape, in any order of the samples.
        p: Order of the distance, at least 1.
        directions: How many directions are drawn.
        kind: Whether the largest slice counts (max-sliced), or the mean over all of them (sliced).
        generator: Draws the directions, on its own device: one of the CPU draws the same for a model on any device,
            at the price of drawing and moving ``directions`` times the size of a sample. Where all processes have the
            same kind of device, one on each device with the same seed draws the same, too. By default the global one
            of the device of ``x`` draws.

    Returns:
        A scalar on the device of ``x``, not negative.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor, ``p`` not a number, or ``directions`` not an
            integer.
        ValueError: If the shapes or devices differ, there is no batch axis, there are no features, there are fewer than
            two samples, ``p`` is below 1 or not finite, ``directions`` is below 1, or ``kind`` is unknown.

    Source: LaCoOT, arXiv 2406.08933, the distance between the input and the output of a block; max-sliced by
    Deshpande et al., arXiv 1904.05877.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> y = torch.tensor([[7.0], [2.0], [3.0]])
        >>> sliced_wasserstein(x, y)
        tensor(2.)
    """
    _check_slicing(p, directions, kind)
    _check_batches(x, y)
    if len(x) < 2:
        raise ValueError(
            "Expected arguments `x` and `y` to have at least two samples, but got shape "
            f"{tuple(x.shape)}: fewer are no distribution. "
            "Leave such a batch out, or pass `drop_last=True` to its loader"
        )
    return _sliced_wasserstein_compute(*_sliced_wasserstein_update(x, y, p, directions, kind, generator))


class SlicedWasserstein(Metric):
    r"""Mean sliced Wasserstein distance between two batches, over all pairs of batches and all processes together.

    The mean is weighted by samples. The distance of two batches depends on their size, so the result depends on how a
    data set is cut into batches. Batches of fewer than two samples are no distribution: they are left out, and counted
    in ``left_out``. So are samples that are not finite in both, unless none of a batch is: then the distance is not
    finite.

    The directions of each update are drawn anew, from ``seed`` and the number of the update since the last reset: every
    process draws the same, and so does every epoch of the same data. Devices of another kind draw others.

    Args:
        p: Order of the distance, at least 1.
        directions: How many directions are drawn in each update.
        kind: Whether the largest slice counts (``"max"``), or the mean over all of them (``"mean"``).
        seed: Seed of the directions.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Attributes:
        left_out: How many batches were left out, an int64 scalar; those of this process until they are synchronised.

    Raises:
        TypeError: If ``p`` is not a number, ``directions`` or ``seed`` not an integer.
        ValueError: If ``p`` is below 1 or not finite, ``directions`` is below 1, ``seed`` below 0, or ``kind`` unknown.

    Source: LaCoOT, arXiv 2406.08933.

    Note:
        It measures: what :meth:`forward` returns has no gradient. A loss takes :func:`sliced_wasserstein`.

    Example:
        >>> import torch
        >>> metric = SlicedWasserstein()
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> metric.update(x, x + 2)
        >>> metric.update(x[:2], x[:2])
        >>> metric.update(x[:1], x[:1] + 7)
        >>> metric.compute(), metric.left_out
        (tensor(1.2000), tensor(1))
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    samples: Tensor
    left_out: Tensor

    def __init__(
        self, *, p: float = 2.0, directions: int = 50, kind: Kind = "max", seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        _check_slicing(p, directions, kind)
        check_integer("seed", seed, 0)
        self.p = p
        self.directions = directions
        self.kind = kind
        self.seed = seed
        self._number: int | None = None
        self._dtype = torch.get_default_dtype()  # an earlier torchmetrics has none
        # float32: not every device has float64
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        for name in ("samples", "left_out"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the distance of two batches, unless they have fewer than two samples.

        Args:
            x: The first batch, shape ``(N, *)``.
            y: The second one, of the same shape.

        Raises:
            TypeError: If ``x`` or ``y`` is not a floating point tensor.
            ValueError: If the shapes or devices differ, there is no batch axis, or there are no features.
        """
        _check_batches(x, y)
        if len(x) < 2:
            self.left_out = self.left_out + 1
            return
        with torch.no_grad():
            kept = _kept_samples(x, y)
            total, _ = _sliced_wasserstein_update(
                x, y, self.p, self.directions, self.kind, self._generator(x.device), kept
            )
        # Out of place: a state made under inference_mode must not be written to outside of it.
        self.total = self.total + total.to(self.device, torch.float32)
        self.samples = self.samples + kept.sum().to(self.samples)
        self.left_out = self.left_out + (~kept.any()).to(self.left_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the distance of two batches, and return it; NaN if they are left out."""
        self._number = self.update_count  # torchmetrics resets before it updates: that would draw the first again
        try:
            distance: Tensor = super().forward(x, y)
        finally:
            self._number = None
        return distance

    def compute(self) -> Tensor:
        """Compute the mean distance, a scalar; NaN if all batches were left out.

        Raises:
            RuntimeError: If there was no update on any process: nothing observed is not a distance of zero.
        """
        if (self.samples + self.left_out).item() == 0:
            raise RuntimeError(
                "SlicedWasserstein has seen no batches. Call `update` first; in a hook, check that the block is called "
                "(a compiled model ignores hooks that are added later)."
            )
        return _sliced_wasserstein_compute(self.total, self.samples).to(self._dtype)

    def set_dtype(self, dst_type: str | torch.dtype) -> "SlicedWasserstein":
        """Set the dtype of the result; the sums stay as they are."""
        self._dtype = torch.empty(0).type(dst_type).dtype
        return self

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return what draws the directions of this update: on the device, where it takes least time."""
        number = self.update_count - 1 if self._number is None else self._number
        # Neighbouring seeds, and updates, share nothing; a CPU's generator takes 32 bits.
        seed = Random(f"{self.seed}, {number}").getrandbits(32)
        return torch.Generator(device).manual_seed(seed)
