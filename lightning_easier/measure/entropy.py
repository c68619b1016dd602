"""Entropy of an activation: how often its neurons switch between their linear pieces.

Two counts per neuron are sufficient: how often its pre-activation was positive (ON) and how often negative (OFF).
They add over batches and over processes, so the entropy of a whole data set is exact however it was cut up; the
logarithm is taken once, at the end.
"""

from collections.abc import Callable, Iterable
from math import log, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_easier.support.caches import values_in_caches

# How many values are counted at a time where the device has its own memory: what is worth a kernel. A float32 holds
# every integer up to 2**24, so a sum of that many signs is exact.
_PART_ELSEWHERE = 2**21
# Rows that are shorter are first added to each other, since a sum along an axis costs something for each row.
_SHORT_ROW, _FEW_SAMPLES = 64, 4


class _Counts(NamedTuple):
    """What was counted of one batch.

    Attributes:
        difference: ON − OFF of each neuron, int64 of shape ``(C,)``.
        non_zero: ON + OFF of each, the same; a number where it is that of all neurons.
        sums: The sum of each sample's values, floating point of shape ``(N,)``.
    """

    difference: Tensor
    non_zero: Tensor | int
    sums: Tensor

    def on_and_off(self) -> tuple[Tensor, Tensor]:
        """Return ON and OFF of each neuron."""
        return (self.non_zero + self.difference) >> 1, (self.non_zero - self.difference) >> 1


def _activation_entropy_update(pre_activation: Tensor, neuron_dim: int) -> tuple[Tensor, Tensor]:
    """Count ON and OFF states per neuron.

    Returns:
        Two int64 tensors of shape ``(neurons,)``.
    """
    return _counted(pre_activation, neuron_dim).on_and_off()


def _counted(pre_activation: Tensor, neuron_dim: int) -> _Counts:
    """Count states per neuron; on a GPU without reading a value back to the host."""
    if not pre_activation.is_floating_point():
        raise TypeError(
            f"Expected argument `pre_activation` to be a floating point tensor, but got dtype {pre_activation.dtype}"
        )
    if pre_activation.ndim < 2 or not -pre_activation.ndim <= neuron_dim < pre_activation.ndim:
        raise ValueError(
            f"Expected argument `pre_activation` to have a batch axis and the neuron axis {neuron_dim}, "
            f"but got shape {tuple(pre_activation.shape)}"
        )
    values = pre_activation.detach()  # without a tangent, too: signs are written to memory that is there
    if neuron_dim != 1:
        values = values.movedim(neuron_dim, 1)  # the samples are the first axis now, wherever they were
    return _counted_in_cache(values) if type(values) is Tensor and values.is_cpu else _counted_on_device(values)


def _counted_in_cache(values: Tensor) -> _Counts:
    """Count values ``(N, C, *)`` on a CPU: each is fetched from memory once, and used four times while it is near."""
    difference, zeros, sums = _count(values, _Room(values))
    of_each = values.numel() // max(values.shape[1], 1)
    return _Counts(difference.long(), of_each if zeros is None else of_each - zeros.long(), sums)


class _Laid(NamedTuple):
    """Memory that is laid out as the values of a part are.

    Attributes:
        signs: Room for the signs, in the shape of the part.
        flat: The same as one axis, in the order in which they lie.
        wide: Room for values of a dtype in which sums overflow early, in a wider one.
        sums_over: Axes that signs are summed over: all but the neurons', or that of the samples first.
    """

    signs: Tensor
    flat: Tensor
    wide: Tensor | None
    sums_over: list[int]


class _Room:
    """Memory for the signs of one part after the other: the system would hand out new pages for each, and fill them.

    Args:
        values: What will be counted, in parts.

    Attributes:
        length: How many values a part has at most: so many that they and their signs stay in the caches.
    """

    def __init__(self, values: Tensor) -> None:
        dtype = values.dtype if values.dtype == torch.float64 else torch.float32
        self.length = values_in_caches()
        length = min(values.numel(), self.length)
        self._signs = values.new_empty(length, dtype=dtype)
        self._wide = None if values.dtype == dtype else values.new_empty(length, dtype=dtype)
        self._last: _Laid | None = None

    def laid_out_like(self, part: Tensor) -> _Laid:
        """Return memory for a part, until the next part comes."""
        if self._last is None or self._last.signs.shape != part.shape:  # most parts are alike
            self._last = self._laid_out_like(part)
        return self._last

    def _laid_out_like(self, part: Tensor) -> _Laid:
        strides, step = [0] * part.ndim, 1
        for axis in sorted(range(part.ndim), key=part.stride):  # one beside the other, whatever gaps the values have
            strides[axis] = step
            step = step * part.shape[axis]  # not in place: while torch.jit traces, it is a tensor
        signs = self._signs.as_strided(part.shape, strides)
        short = part.ndim > 2 and strides[-1] == 1 and step < _SHORT_ROW * part.shape[0] * part.shape[1]
        return _Laid(
            signs,
            self._signs[:step],
            None if self._wide is None else self._wide.as_strided(part.shape, strides),
            [0] if short and part.shape[0] >= _FEW_SAMPLES else [axis for axis in range(part.ndim) if axis != 1],
        )


def _count(values: Tensor, room: _Room) -> tuple[Tensor, Tensor | None, Tensor]:
    """Count values ``(N, C, *)``, in parts where they are too many, which are cut along their order in memory.

    Returns:
        ON − OFF of each neuron; how often each was neither, or None if none was; the sum of each sample.
    """
    if values.numel() <= room.length:
        return _count_part(values, room)
    axis = max((axis for axis, length in enumerate(values.shape) if length > 1), key=values.stride)
    parts = values.split(max(1, room.length * values.shape[axis] // values.numel()), axis)
    differences, some_zeros, sums = zip(*(_count(part, room) for part in parts), strict=True)
    zeros = None
    if any(each is not None for each in some_zeros):
        pairs = zip(some_zeros, differences, strict=True)
        zeros = _put_together([torch.zeros_like(of) if each is None else each for each, of in pairs], axis == 1)
    return _put_together(differences, axis == 1), zeros, _put_together(sums, axis == 0)


def _put_together(parts: Iterable[Tensor], side_by_side: bool) -> Tensor:
    """Join numbers of parts that lie side by side on an axis; add up others, in float64, in which counts are exact."""
    return torch.cat(list(parts)) if side_by_side else torch.stack(list(parts)).sum(0, dtype=torch.float64)


def _count_part(values: Tensor, room: _Room) -> tuple[Tensor, Tensor | None, Tensor]:
    """Count what fits into the cache; return what :func:`_count` does."""
    laid = room.laid_out_like(values)
    if laid.wide is not None:
        values = laid.wide.copy_(values)
    sums = values.sum(list(range(1, values.ndim)))  # first of all: of what is read from memory it writes least
    torch.sign(values, out=laid.signs)
    all_have_one = torch.dot(laid.flat, laid.flat).item() == len(laid.flat)
    difference = _by_neuron(laid)
    if all_have_one:
        return difference, None, sums
    laid.signs.abs_()
    return difference, len(laid.flat) // max(values.shape[1], 1) - _by_neuron(laid), sums


def _by_neuron(laid: _Laid) -> Tensor:
    """Sum up signs ``(n, C, *)`` of each neuron."""
    sums = laid.signs.sum(laid.sums_over)
    return sums if sums.ndim == 1 else sums.flatten(1).sum(1)


def _counted_on_device(values: Tensor) -> _Counts:
    """Count values ``(N, C, *)`` without reading one back to the host, in parts so that signs need little memory."""
    step = max(1, _PART_ELSEWHERE * len(values) // max(values.numel(), 1))
    counts = [_difference_and_non_zero(part) for part in values.split(step)]
    difference, non_zero = counts[0]
    for more in counts[1:]:
        difference, non_zero = difference + more[0], non_zero + more[1]
    return _Counts(difference, non_zero, values.sum(tuple(range(1, values.ndim)), dtype=_wide(values)))


def _difference_and_non_zero(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ON − OFF and ON + OFF per neuron, of values of shape (outer, neurons, *inner)."""
    # The inner sums run in float32, which is the fast path on every device and exact below 2**24 terms.
    signs = values.sign()
    inner = tuple(range(2, signs.ndim))
    partial = torch.float32 if prod(signs.shape[2:]) < 2**24 else torch.int64
    if inner:
        difference = signs.sum(inner, dtype=partial)
        non_zero = signs.abs_().sum(inner, dtype=partial)
    else:
        difference, non_zero = signs, signs.abs()
    return difference.sum(0, dtype=torch.int64), non_zero.sum(0, dtype=torch.int64)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32  # a sum in half overflows early


def _check_neurons(counts: Tensor, known: Tensor, pre_activation: Tensor, neuron_dim: int) -> None:
    """Refuse an activation that has another number of neurons than before."""
    if counts.shape != known.shape:
        raise ValueError(
            f"Expected argument `pre_activation` to have {len(known)} neurons on axis {neuron_dim}, but got shape "
            f"{tuple(pre_activation.shape)}"
        )


class StateCounts:
    """Count how often the neurons of one activation are ON and OFF, over batches.

    What :class:`ActivationEntropy` counts, without what a metric of torchmetrics has besides, which takes longer than
    the counts of a small batch.

    Args:
        neuron_dim: The axis of the neurons: 1 after convolutions and batch norm, -1 after Linear and LayerNorm.

    Example:
        >>> import torch
        >>> counts = StateCounts()
        >>> _ = counts.update(torch.tensor([[1.0, 2.0], [-1.0, 3.0], [0.0, -4.0]]))
        >>> counts.on, counts.off
        (tensor([1, 2]), tensor([1, 1]))
    """

    def __init__(self, neuron_dim: int = 1) -> None:
        self.neuron_dim = neuron_dim
        self.reset(torch.device("cpu"))

    @property
    def on(self) -> Tensor:
        """How often each neuron was ON, int64 of shape ``(C,)``; ``(0,)`` before the first update."""
        return (self._non_zero + self._difference + self._of_each) >> 1

    @property
    def off(self) -> Tensor:
        """How often each was OFF."""
        return (self._non_zero - self._difference + self._of_each) >> 1

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self._difference.device

    def reset(self, device: torch.device | None = None) -> None:
        """Forget the counts."""
        self._difference = torch.zeros(0, dtype=torch.int64, device=device or self.device)
        self._non_zero = self._difference
        self._of_each = 0  # besides, how often every neuron was ON or OFF

    def to(self, device: torch.device) -> "StateCounts":
        """Move the counts to a device."""
        self._difference, self._non_zero = self._difference.to(device), self._non_zero.to(device)
        return self

    def update(self, pre_activation: Tensor) -> Tensor:
        """Count the ON and OFF states of one batch.

        Args:
            pre_activation: The input of the activation, shape ``(N, C, *)``, or ``(N, *, C)`` with ``neuron_dim=-1``.

        Returns:
            The sum of the values of each sample, which is not finite where one of them is not, shape ``(N,)``.

        Raises:
            TypeError: If ``pre_activation`` is not a floating point tensor.
            ValueError: If it has no axis ``neuron_dim``, or another number of neurons than before.
        """
        counted = _counted(pre_activation, self.neuron_dim)
        if self._difference.shape[0]:
            _check_neurons(counted.difference, self._difference, pre_activation, self.neuron_dim)
        self._add(counted.difference, counted.non_zero)
        return counted.sums

    def add(self, on: Tensor, off: Tensor) -> None:
        """Add counts, int64 of shape ``(C,)`` each."""
        self._add(on - off, on + off)

    def _add(self, difference: Tensor, non_zero: Tensor | int) -> None:
        if not self._difference.shape[0]:
            self._difference = self._non_zero = torch.zeros_like(difference, device=self.device)
        # Out of place: counts made under inference_mode must not be written to outside of it.
        self._difference = self._difference + difference.to(self.device)
        if isinstance(non_zero, Tensor):
            self._non_zero = self._non_zero + non_zero.to(self.device)
        else:
            self._of_each += non_zero


def entropy_of_counts(on: Tensor, off: Tensor) -> Tensor:
    """Compute the entropy of neurons in bits from their counts, in float64 on the CPU (not every device has it)."""
    on, off = on.cpu().double(), off.cpu().double()
    # clamp: a neuron that was never ON or OFF has p = 0, hence no entropy
    p = on / (on + off).clamp(min=1.0)
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / log(2)


def activation_entropy(pre_activation: Tensor, neuron_dim: int = 1) -> Tensor:
    """Compute the entropy of every neuron of one activation from its pre-activations.

    With p the share of ON (z > 0) among ON and OFF (z < 0), over all axes but the neuron's,

    H = -p log2 p - (1 - p) log2(1 - p), with 0 log2 0 = 0.

    Exact zeros and NaN have no sign and are left out, value by value; infinities have one.

    Args:
        pre_activation: The input of the activation, shape ``(N, C, *)``, or ``(N, *, C)`` with ``neuron_dim=-1``.
        neuron_dim: The axis of the neurons (channels).

    Returns:
        Entropy in bits, shape ``(C,)``, values in [0, 1].

    Raises:
        TypeError: If ``pre_activation`` is not a floating point tensor.
        ValueError: If ``pre_activation`` has no batch axis or no axis ``neuron_dim``.

    Source: EASIER, arXiv 2404.18949, the entropy of a rectified layer.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [1.0, 0.0], [-4.0, 5.0]])
        >>> activation_entropy(z)
        tensor([1., 0.])
    """
    entropy = entropy_of_counts(*_activation_entropy_update(pre_activation, neuron_dim))
    return entropy.to(device=pre_activation.device, dtype=torch.get_default_dtype())


class ActivationEntropy(Metric):
    r"""Entropy of every neuron of one activation over all batches and processes together.

    The states are integer counts reduced by a sum: the result does not depend on how the data set was cut into batches
    or spread over processes, a process without a single batch included.

    Args:
        num_neurons: How many neurons the activation has. Taken from the first batch when not given.
        neuron_dim: The axis of the neurons: 1 after convolutions and batch norm, -1 after Linear and LayerNorm.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_neurons`` is not positive.

    Source: EASIER, arXiv 2404.18949.

    Note:
        The published reference averages the entropies of mini-batches and counts exact zeros as ON. The paper's formula
        is over the data set with zeros discarded; so is this metric. On one batch without zeros the two agree.

    Example:
        >>> import torch
        >>> metric = ActivationEntropy()
        >>> metric.update(torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))
        >>> metric.update(torch.tensor([[-1.0, 4.0]]))
        >>> metric.compute()
        tensor([0.9183, 0.0000])
        >>> metric.layer()
        tensor(0.4591)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # `forward` would add counts of unlike size otherwise

    on: Tensor
    off: Tensor
    updates: Tensor

    def __init__(self, num_neurons: int | None = None, neuron_dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_neurons is not None and num_neurons < 1:
            raise ValueError(f"Expected argument `num_neurons` to be a positive integer, but got {num_neurons}")
        self.num_neurons = num_neurons
        self.neuron_dim = neuron_dim
        self._dtype = torch.get_default_dtype()  # an earlier torchmetrics has none
        for name in ("on", "off"):
            self.add_state(name, torch.zeros(num_neurons or 0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pre_activation: Tensor) -> None:
        """Count the ON and OFF states of one batch.

        Args:
            pre_activation: The input of the activation, shape ``(N, C, *)``, or ``(N, *, C)`` with ``neuron_dim=-1``.

        Raises:
            TypeError: If ``pre_activation`` is not a floating point tensor.
            ValueError: If it has no axis ``neuron_dim``, or another number of neurons than before.
        """
        on, off = _activation_entropy_update(pre_activation, self.neuron_dim)
        if self.on.numel() == 0 and self.num_neurons is None:
            self._resize(on.numel())
        _check_neurons(on, self.on, pre_activation, self.neuron_dim)
        self.add(on, off)

    def add(self, on: Tensor, off: Tensor) -> None:
        """Add counts.

        Args:
            on: How often each neuron was ON, int64 of shape ``(C,)``.
            off: How often each was OFF.
        """
        if self.on.numel() == 0:
            self._resize(on.numel())
        # Out of place: a state made under inference_mode must not be written to outside of it.
        self.on = self.on + on.to(self.device)
        self.off = self.off + off.to(self.device)
        self.updates = self.updates + 1

    def compute(self) -> Tensor:
        """Compute the entropy of each neuron in bits, shape ``(C,)``.

        Raises:
            RuntimeError: If there was no update on any process: nothing observed is not an entropy of zero.
        """
        return self.bits().to(device=self.device, dtype=self._dtype)

    def layer(self) -> Tensor:
        """Compute the entropy of the activation: the mean over its neurons, in bits, a scalar."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self.bits().mean().to(device=self.device, dtype=self._dtype)

    def set_dtype(self, dst_type: str | torch.dtype) -> "ActivationEntropy":
        """Set the dtype of the result; the counts stay integers."""
        self._dtype = torch.empty(0).type(dst_type).dtype
        return self

    def bits(self) -> Tensor:
        """Compute the entropy of each neuron from the counts as they are, in float64 on the CPU, unsynchronised."""
        if self.updates.item() == 0:
            raise RuntimeError(
                "ActivationEntropy has seen no pre-activation. Call `update` first; in a hook, check that the "
                "activation is called (a compiled model ignores hooks that are added later)."
            )
        return entropy_of_counts(self.on, self.off)

    def _resize(self, num_neurons: int) -> None:
        """Make room for counts whose number the first batch has told."""
        self.on, self.off = (
            torch.cat([count, count.new_zeros(num_neurons - count.numel())]) for count in (self.on, self.off)
        )

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A process that got no batch does not know the number of neurons yet; it learns it from the others.
        group = process_group or self.process_group
        sizes = dist_sync_fn(torch.tensor([self.on.numel()], device=self.device), group=group)
        self._resize(int(torch.cat(list(sizes)).max()))
        super()._sync_dist(dist_sync_fn, process_group=process_group)


class Sampler:
    """Draw a share of the samples of a batch, pseudo-randomly, by the number of the batch.

    Args:
        share: In (0, 1].
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._drawn: tuple[Any, Tensor] = (None, torch.empty(0))  # all activations of a model see the same batch

    def __call__(self, values: Tensor, number: int, neuron_dim: int) -> Tensor:
        """Return some samples.

        Args:
            values: Shape ``(N, *)``.
            number: Of the batch, from 0.
            neuron_dim: The axis of the neurons; where that is the first, there are no samples to draw.
        """
        if values.ndim < 2 or neuron_dim in (0, -values.ndim):
            return values
        key = values.shape[0], number, values.device
        if self._drawn[0] != key:
            self._drawn = key, self._draw(values.shape[0], number).to(values.device, non_blocking=True)
        return values.index_select(0, self._drawn[1])

    def _draw(self, samples: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        wanted = samples * self._share
        # a share of one sample is one sample now and then; of the first batch, so that something is seen
        count = int(wanted + torch.rand((), generator=generator).item())
        order = torch.randperm(samples, generator=generator)
        return order[: max(count, int(number == 0))].sort().values
