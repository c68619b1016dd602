r"""Closed-form least squares: the linear operator that comes closest to what a chain of operators computes.

With :math:`U` the patches of the chain's input, one row a position and a last column of ones, and :math:`T` its output,

.. math:: \min_W \|U W - T\|^2, \qquad (U^\top U + \Lambda) W = U^\top T.

The sums :math:`U^\top U`, :math:`U^\top T` and those of :math:`T^2` are all that is needed of the data: they add up
over batches and processes, and every operator below is fitted from the same ones. A part of the samples is held out;
their sums tell the residual, and choose the ridge :math:`\Lambda`, without a second look at the data.

Samples that are not finite are left out by a weight of zero: how many are left is not known on the host while the sums
are taken.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.convolutions import make_convolution, with_tensors
from lightning_easier.support.finite import finite_samples, is_finite, zeroed

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges that are tried, as a share of the mean square of each column."""
# Where to look next after what is known to be too small a ridge. What a ridge leaves falls, then grows: four solutions
# find the least of seven, where a walk from one end may take all.
_FIBONACCI = ((3, 5), (2, 3), (1, 2))
CALM = 1e-3
"""What keeps the weights of small columns from being large, as a share of the mean square of all columns."""
AS_GOOD = 0.01
"""It is taken where it halves the largest weight and leaves so little more: a channel that hardly varies gets a weight
of hundreds else, for nothing, and training after it diverges."""
HELD_OUT = 4
"""Every so-many-th position is held out."""
NOT_FINITE = "what was fitted is not finite"
"""Why there may be no fit, though the sums are finite."""
_FEWEST_POSITIONS = 2
# Of inputs that are smaller, products of two underflow in float32.
_SMALLEST_INPUT = 1e-17
_VALUES_AT_A_TIME = 2**24
_ROUNDS_OF_SEPARATION = 8
# A share of the variance.
_WORTH_ANOTHER_ROUND = 1e-5
# Of conjugate gradients: what may be left of the square of what was wrong, and how many steps at most; what is left of
# the square of the right side when only rounding is.
_RELATIVE_ACCURACY, _MOST_STEPS, _NOISE = 1e-4, 50, 1e-24
_SHARES_OF_RANK = (0.5, 0.25, 0.125)
# Columns of a product that are computed at a time.
_PANEL = 512
# Pivots of a scaled matrix below this are rounding noise.
_SINGULAR = 1e-7


@dataclass(frozen=True)
class Geometry:
    """Which values of the input an output position of a fitted operator reads.

    Attributes:
        channels: Of the input.
        kernel: Taps per spatial axis; none for vectors and tokens, whose channels are the last axis.
        stride: Per spatial axis.
        padding: Zeros on both sides, per spatial axis; negative where the border of the map is not read.
        is_flat: Whether all values of a sample are taken as positions of one channel, since it is not known which axis
            holds the channels. Nothing is fitted then.
        dilation: How far taps lie apart, per spatial axis; none where all do by one.
    """

    channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    is_flat: bool = False
    dilation: tuple[int, ...] = ()

    @classmethod
    def flat(cls) -> "Geometry":
        """Return that of values whose channels are on an axis that is not known."""
        return cls(1, is_flat=True)

    @property
    def apart(self) -> tuple[int, ...]:
        """How far taps lie apart, per spatial axis."""
        return self.dilation or (1,) * len(self.kernel)

    @property
    def taps(self) -> int:
        """Values of each channel that an output position reads."""
        return prod(self.kernel)

    @property
    def unknowns(self) -> int:
        """Columns of the patches, that of ones among them."""
        return self.channels * self.taps + 1

    @property
    def centre(self) -> int | None:
        """Which tap is in the middle; None for an even kernel."""
        if any(size % 2 == 0 for size in self.kernel):
            return None
        place = 0
        for size in self.kernel:
            place = place * size + size // 2
        return place

    @property
    def one_tap(self) -> "Geometry | None":
        """What reads the middle tap only; None where there is none, or it would read less."""
        padding = tuple(p - d * (k // 2) for p, d, k in zip(self.padding, self.apart, self.kernel, strict=True))
        if self.centre is None or any(each < 0 for each in padding):
            return None
        return Geometry(self.channels, (1,) * len(self.kernel), self.stride, padding)

    def patches(self, value: Tensor) -> Tensor:
        """Return a view of what every output position reads, shape ``(N, *positions, C, *kernel)``; ``(N, *, C)``."""
        if not self.kernel:
            return value
        sides = [side for padding in reversed(self.padding) for side in (padding, padding)]
        value = F.pad(value, sides)
        for axis, (size, step, apart) in enumerate(zip(self.kernel, self.stride, self.apart, strict=True), 2):
            value = value.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        return value.movedim(1, 1 + len(self.kernel))


@dataclass
class Sums:
    r"""Sums over positions, in float64: all that least squares needs of the data.

    Attributes:
        gram: :math:`U^\top U`, shape ``(K, K)``.
        cross: :math:`U^\top T`, shape ``(K, O)``.
        squares: Sums of :math:`T^2`, shape ``(O,)``.
    """

    gram: Tensor
    cross: Tensor
    squares: Tensor

    @classmethod
    def zeros(cls, unknowns: int, outputs: int, device: torch.device) -> "Sums":
        """Return sums over nothing."""
        shapes = (unknowns, unknowns), (unknowns, outputs), (outputs,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def positions(self) -> float:
        """How many positions were summed over."""
        return float(self.gram[-1, -1])

    def add(self, patches: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add positions: patches ``(P, K − 1)``, targets ``(P, O)``; both are overwritten.

        Each has a weight ``(P,)`` of one, or of zero, and zeros for values, if it is left out.

        The products are taken of differences from a centre, in the precision of the values, and put back around it in
        float64: a mean far from zero would use up the digits.
        """
        count = weight.sum()
        u, around_u = _centred(patches, weight, count)
        t, around_t = _centred(target, weight, count)
        u, around_u, t, around_t, count = (each.to(self.gram) for each in (u, around_u, t, around_t, count))
        _add_product(self.gram[:-1, :-1], patches, patches, count, (u, around_u), (u, around_u))
        _add_product(self.cross[:-1], patches, target, count, (u, around_u), (t, around_t))
        for row in (self.gram[-1, :-1], self.gram[:-1, -1]):
            row += around_u + count * u
        self.gram[-1, -1] += count
        self.cross[-1] += around_t + count * t
        self.squares += target.square().sum(0).to(self.gram) + 2 * t * around_t + count * t.square()

    def residual(self, weight: Tensor) -> float:
        """Return the sum of squared differences that a solution ``(K, O)`` leaves."""
        explained = 2 * (weight * self.cross).sum() - (weight * (self.gram @ weight)).sum()
        return float((self.squares.sum() - explained).clamp(min=0))

    def variance(self) -> float:
        """Return the sum of squared differences of the targets from their means."""
        return float((self.squares - self.cross[-1].square() / self.gram[-1, -1].clamp(min=1)).sum().clamp(min=0))

    def explained(self, weight: Tensor) -> float:
        """Return the share of the variance of the targets that a solution explains; 1 where there is none."""
        variance = self.variance()
        return 1 - self.residual(weight) / variance if variance > 0 else 1.0

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel of what a solution ``(K, O)`` computes, shape ``(O,)`` each."""
        count = self.gram[-1, -1].clamp(min=1)
        mean = self.gram[-1] @ weight / count
        return mean, ((weight * (self.gram @ weight)).sum(0) / count - mean.square()).clamp(min=0)

    def part(self, columns: Tensor) -> "Sums":
        """Return the sums for some columns of the patches."""
        return Sums(self.gram[columns[:, None], columns], self.cross[columns], self.squares)

    def without_offset(self) -> "Sums":
        """Return the sums of which a solution has no offset, and all else is as well as it can be without."""
        gram, cross = self.gram.clone(), self.cross.clone()
        gram[-1, :-1] = gram[:-1, -1] = 0
        cross[-1] = 0
        return Sums(gram, cross, self.squares)

    def through(self, kernels: Tensor) -> "Sums":
        """Return the sums for what a depthwise convolution ``(C, taps)`` makes of the patches, and a column of ones."""
        channels, taps = kernels.shape
        # one side at a time: a product of matrices for each channel, no copy of the sums
        half = torch.bmm(kernels[:, None], self.gram[:-1].view(channels, taps, -1))[:, 0]
        inner = (half[:, :-1].view(channels, channels, taps) * kernels).sum(2)
        gram = torch.cat([inner, half[:, -1:]], 1)
        gram = torch.cat([gram, torch.cat([half[:, -1], self.gram[-1, -1:]])[None]])
        cross = torch.bmm(kernels[:, None], self.cross[:-1].view(channels, taps, -1))[:, 0]
        return Sums(gram, torch.cat([cross, self.cross[-1:]]), self.squares)


def _centred(values: Tensor, weight: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Move values ``(P, K)`` to around zero in place; return what was taken off, and the sums of what is left.

    Where no value is left out, the share is one, which no result depends on.
    """
    share = torch.full_like(count, len(values)) / count.clamp(min=1)  # a number by a tensor would be rounded twice
    centre = values.mean(0) * share
    values.addcmul_(weight[:, None], centre, value=-1)
    return centre, values.sum(0)


def _add_product(
    sums: Tensor,
    left: Tensor,
    right: Tensor,
    count: Tensor,
    off_left: tuple[Tensor, Tensor],
    off_right: tuple[Tensor, Tensor],
) -> None:
    """Add ``(left + l).T @ (right + r)``, in the precision of the sums; ``off_…`` are as :func:`_centred` returns them.

    It goes by panels, each put back around the centres while it is in the cache. A product with itself is symmetric:
    only the panels from the diagonal on are computed.
    """
    (centre_left, around_left), (centre_right, around_right) = off_left, off_right
    shift = around_right + count * centre_right
    for start in range(0, left.shape[1], _PANEL):
        rows, begin = slice(start, start + _PANEL), start if left is right else 0
        panel = (left[:, rows].T @ right[:, begin:]).to(sums)
        outer = torch.stack([centre_left[rows], around_left[rows]], 1)
        panel.addmm_(outer, torch.stack([shift[begin:], centre_right[begin:]]))
        sums[rows, begin:] += panel
        if left is right:
            sums[start + _PANEL :, rows] += panel[:, _PANEL:].T


@dataclass
class Moments:
    """The sums of one chain: over the positions that are fitted, and over those held out.

    Attributes:
        geometry: What an output position reads.
        fitted: Sums over most positions.
        held_out: Sums over the others.
        samples: How many samples there were.
        left_out: How many of them were not finite, an int64 scalar.
    """

    geometry: Geometry
    fitted: Sums
    held_out: Sums
    samples: int = 0
    left_out: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    _batches: int = field(default=0, repr=False)

    @classmethod
    def of(cls, geometry: Geometry, outputs: int, device: torch.device) -> "Moments":
        """Return moments of nothing; they are kept where there is float64."""
        device = torch.device("cpu") if device.type in ("mps", "xla") else device
        outputs = 1 if geometry.is_flat else outputs
        fitted, held_out = (Sums.zeros(geometry.unknowns, outputs, device) for _ in range(2))
        return cls(geometry, fitted, held_out, left_out=torch.zeros((), dtype=torch.int64, device=device))

    @property
    def positions(self) -> float:
        """How many positions were summed over."""
        return self.fitted.positions + self.held_out.positions

    @torch.no_grad()
    def add(self, value: Tensor, target: Tensor, positions: int) -> None:
        """Add one batch.

        Args:
            value: What goes into the chain, ``(N, C, *)``, or ``(N, *, C)`` for vectors and tokens.
            target: What comes out of it.
            positions: How many positions are used at most; they are drawn pseudo-randomly, by the number of the batch.
        """
        if not target.numel():
            return
        if self.geometry.is_flat:
            value, target = (each.reshape(len(each), -1, 1) for each in (value, target))
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        kept = finite_samples(value, target)
        value, target = zeroed(value, kept), zeroed(target, kept)
        self.samples += len(kept)
        self.left_out += (~kept).sum().to(self.left_out.device)
        number, self._batches = self._batches, self._batches + 1
        with torch.autocast(value.device.type, enabled=False):  # that of a step would take the products in half
            axis = -1 - len(self.geometry.kernel)  # of the channels
            patches = self.geometry.patches(_channels_last(value.to(wide), axis)).movedim(axis, -1)
            target = (target.movedim(1, -1) if self.geometry.kernel else target).to(wide)
            axes = target.ndim - 1
            for places, held_out in _places(target.shape[:axes], positions, self.geometry.unknowns, number):
                # a copy that blocks would have the host wait for a GPU, in every hook
                where = tuple(place.to(value.device, non_blocking=value.is_cuda) for place in places)
                rows = patches[where].movedim(-1, 1).reshape(len(where[0]), -1)
                (self.held_out if held_out else self.fitted).add(rows, target[where], kept[where[0]].to(wide))
                del rows  # not beside those that come next

    def why_no_fit(self) -> str | None:
        """Return why nothing can be fitted; None if something can."""
        if min(self.fitted.positions, self.held_out.positions) < _FEWEST_POSITIONS:
            reason = "there are too few positions in the data to fit to, and to hold some out"
            left_out = int(self.left_out)
            return f"{reason}: {left_out} of {self.samples} samples are not finite" if left_out else reason
        parts = (tensor for sums in (self.fitted, self.held_out) for tensor in (sums.gram, sums.cross, sums.squares))
        if not is_finite(*parts):
            return "its values are so large that sums over them overflow"
        largest = self.fitted.gram.diagonal()[:-1].max() / self.fitted.positions
        if largest < _SMALLEST_INPUT**2:
            return (
                f"its inputs are zero, or so small (below {_SMALLEST_INPUT:g}) that their products are lost; scale them"
            )
        return None


def _channels_last(value: Tensor, axis: int) -> Tensor:
    """Return the same values, those of all channels of a position beside each other in memory: rows are copied fast."""
    return value.movedim(axis, -1).contiguous().movedim(-1, axis)


def _places(
    shape: Sequence[int], positions: int, unknowns: int, number: int
) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Draw positions, and yield as many at a time as fit into memory, and whether those are held out."""
    total = prod(shape)
    generator = torch.Generator().manual_seed(number)
    # whole samples are held out: neighbouring positions are too much alike
    held_out_samples = torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // HELD_OUT)]
    order = torch.randperm(total, generator=generator)[:positions] if total > positions else torch.arange(total)
    is_held_out = torch.isin(order // max(total // shape[0], 1), held_out_samples)
    if shape[0] == 1:  # nothing else to hold out
        is_held_out = (torch.arange(len(order)) + number + 1) % HELD_OUT == 0
    for held_out in (False, True):
        for part in order[is_held_out == held_out].sort().values.split(max(1, _VALUES_AT_A_TIME // unknowns)):
            if len(part):
                yield torch.unravel_index(part, tuple(shape)), held_out


@dataclass(frozen=True)
class Fit:
    """An operator that was fitted, and how well it represents the chain.

    Attributes:
        kind: ``"convolution"``, ``"pointwise"``, ``"separable"``, ``"linear"``, ``"low-rank"`` or ``"affine"``.
        operator: The operator, in float64.
        explained: Share of the variance of the chain's output that it explains on positions held out.
        mean: Of each channel of its output, shape ``(O,)``, float64.
        variance: Of each channel of its output, shape ``(O,)``, float64.
    """

    kind: str
    operator: nn.Module
    explained: float
    mean: Tensor
    variance: Tensor


def fits(moments: Moments) -> Iterator[Fit]:
    """Fit every kind of operator that suits a chain, the one with most freedom first; none that is not finite.

    Args:
        moments: The sums over its input and output.
    """
    for fit in _all_fits(moments):
        if is_finite(*fit.operator.parameters(), fit.mean, fit.variance):
            yield fit


def _all_fits(moments: Moments) -> Iterator[Fit]:
    geometry = moments.geometry
    if geometry.is_flat:
        return
    dense = best_solution(moments)
    yield _fit("convolution" if geometry.kernel else "linear", moments, dense, _dense(geometry, dense))
    if geometry.taps > 1:
        yield _separable(moments, dense)
    one_tap = geometry.one_tap
    if one_tap is None:
        return
    columns = _columns_of_centre(geometry)
    part = Moments(one_tap, moments.fitted.part(columns), moments.held_out.part(columns))
    if geometry.taps > 1:
        dense = best_solution(part)
        yield _fit("pointwise", part, dense, _dense(one_tap, dense))
    yield from _low_rank(part, dense)
    if geometry.channels == dense.shape[1]:
        yield _affine(part)


def _fit(kind: str, moments: Moments, weight: Tensor, operator: nn.Module) -> Fit:
    return Fit(kind, operator.eval(), moments.held_out.explained(weight), *moments.fitted.statistics(weight))


def best_solution(moments: Moments) -> Tensor:
    """Solve the normal equations with the ridge that leaves the least residual on what is held out."""
    normal = _Normal(moments.fitted)
    found: dict[int, tuple[float, Tensor | None]] = {}

    def residual(place: int) -> float:
        if place not in found:
            weight = normal.solved(RIDGES[place])
            found[place] = (math.inf if weight is None else moments.held_out.residual(weight)), weight
        return found[place][0]

    before = -1
    for near, far in _FIBONACCI:
        # where both are singular, so is all that is less
        if math.inf == residual(before + near) or residual(before + near) > residual(before + far):
            before += near
    least, weight = found[before + 1]
    assert weight is not None  # the largest ridge makes any sums regular
    calm = normal.solved(RIDGES[before + 1], CALM)
    if calm is None or 2 * calm[:-1].abs().max() > weight[:-1].abs().max():  # no weight is large
        return weight
    return calm if moments.held_out.residual(calm) <= (1 + AS_GOOD) * least else weight


class _Normal:
    """Normal equations, scaled once for all ridges: columns of very different size would use up the digits.

    Args:
        sums: What they are made of.
    """

    def __init__(self, sums: Sums) -> None:
        squares = sums.gram.diagonal()
        scale = squares.clamp(min=0).sqrt()
        self._scale = torch.where(scale > 0, scale, 1.0)
        self._matrix = sums.gram / self._scale
        self._matrix /= self._scale[:, None]
        self._matrix.diagonal().add_(squares <= 0)  # a channel that is always zero
        self._right = sums.cross / self._scale[:, None]
        squares = squares[:-1].clamp(min=0)
        self._smallness = torch.where(squares > 0, squares.mean() / squares, 0.0)
        self._added: Tensor | float = 0.0

    def solved(self, ridge: float, floor: float = 0.0) -> Tensor | None:
        """Return the weights, shape ``(K, O)``; None if the sums are singular.

        Args:
            ridge: As a share of the mean square of each column.
            floor: What is added to that, as a share of the mean square of all columns: it is the same for each, and
                keeps the weights of small columns from being large.
        """
        added = ridge + floor * self._smallness
        self._matrix.diagonal()[:-1] += added - self._added  # the bias is free
        self._added = added
        factor, failed = torch.linalg.cholesky_ex(self._matrix)
        if failed or float(factor.diagonal().min()) < _SINGULAR:
            return None
        return torch.cholesky_solve(self._right, factor).div_(self._scale[:, None])


def _dense(geometry: Geometry, weight: Tensor) -> nn.Module:
    return _operator(geometry, weight[:-1].T.reshape(-1, geometry.channels, *geometry.kernel), weight[-1])


def _operator(
    geometry: Geometry, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...] | None = None, groups: int = 1
) -> nn.Module:
    """Make a convolution, or a Linear for vectors and tokens."""
    if geometry.kernel:
        return make_convolution(
            weight, bias, weight.dtype, stride=geometry.stride, dilation=geometry.apart, groups=groups,
            padding=geometry.padding if padding is None else padding,
        )  # fmt: skip
    made = nn.Linear(1, 1, bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    return with_tensors(made, weight, bias, weight.dtype)


def _columns_of_centre(geometry: Geometry) -> Tensor:
    """Return the columns of the middle tap of each channel, and that of ones."""
    assert geometry.centre is not None
    centres = torch.arange(geometry.channels) * geometry.taps + geometry.centre
    return torch.cat([centres, torch.tensor([geometry.unknowns - 1])])


def _low_rank(moments: Moments, weight: Tensor) -> Iterator[Fit]:
    """Yield products of two matrices with less work than one: of the best of their rank, by the data's own norm."""
    geometry, sums, outputs = moments.geometry, moments.fitted, weight.shape[1]
    mean = sums.gram[-1] / sums.gram[-1, -1]
    centred = sums.gram[:-1, :-1] - sums.gram[-1, -1] * mean[:-1, None] * mean[:-1]
    _, directions = torch.linalg.eigh(weight[:-1].T @ centred @ weight[:-1])
    offset = weight[-1] + mean[:-1] @ weight[:-1]  # of the outputs, whatever the rank
    break_even = geometry.channels * outputs / (geometry.channels + outputs)
    ranks = {int(break_even * share) for share in _SHARES_OF_RANK}
    for rank in sorted(ranks - {0}, reverse=True):
        after = directions[:, -rank:]
        before = weight[:-1] @ after
        bias = offset - mean[:-1] @ before @ after.T
        taps = geometry.kernel
        first = _operator(geometry, before.T.reshape(rank, geometry.channels, *taps), None)
        second = _operator(_after(geometry, rank), after.reshape(outputs, rank, *taps), bias)
        whole = torch.cat([before @ after.T, bias[None]])
        yield _fit("low-rank", moments, whole, nn.Sequential(first, second))


def _after(geometry: Geometry, channels: int) -> Geometry:
    """Return the geometry of a product with a matrix, after an operator that has done the rest."""
    axes = len(geometry.kernel)
    return Geometry(channels, (1,) * axes, (1,) * axes, (0,) * axes)


def _affine(moments: Moments) -> Fit:
    """Scale and offset each channel: a = cov(x, t) / var(x), b = E[t] − a·E[x]."""
    geometry, sums = moments.geometry, moments.fitted
    count = sums.gram[-1, -1]
    x, t = sums.gram[-1, :-1], sums.cross[-1]
    variance = sums.gram.diagonal()[:-1] - x.square() / count
    covariance = sums.cross[:-1].diagonal() - x * t / count
    scale = torch.where(variance > _SINGULAR * sums.gram.diagonal()[:-1], covariance / variance, 0.0)
    offset = (t - scale * x) / count
    whole = torch.cat([scale.diag(), offset[None]])
    moves_only = set(geometry.stride) <= {1} and set(geometry.padding) <= {0}
    operator: nn.Module
    if moves_only:
        made = ChannelAffine(geometry.channels, 1 if geometry.kernel else -1, device="meta")
        operator = with_tensors(made, scale, offset, scale.dtype)
    else:
        operator = _operator(geometry, scale.view(-1, 1, *geometry.kernel), offset, groups=geometry.channels)
    return _fit("affine", moments, whole, operator)


def _separable(moments: Moments, dense: Tensor) -> Fit:
    """Fit a depthwise convolution and a pointwise one after it, each in closed form given the other, in turn."""
    geometry, sums = moments.geometry, moments.fitted
    channels, taps, outputs = geometry.channels, geometry.taps, dense.shape[1]
    # the kernel of each channel that is nearest to those of the dense convolution
    apart = dense[:-1].view(channels, taps, outputs)
    kernels = torch.linalg.eigh(apart @ apart.mT).eigenvectors[:, :, -1]
    left_over = math.inf
    for _ in range(_ROUNDS_OF_SEPARATION):
        through = sums.through(kernels)
        pointwise = regular_solution(through)
        before, left_over = left_over, through.residual(pointwise)
        if before - left_over < _WORTH_ANOTHER_ROUND * sums.variance():
            break
        kernels = _kernels_given(sums, pointwise, kernels)
    between = _after(geometry, channels)
    part = Moments(between, sums.through(kernels), moments.held_out.through(kernels))
    pointwise = best_solution(part)
    first = _operator(geometry, kernels.reshape(channels, 1, *geometry.kernel), None, groups=channels)
    return _fit("separable", part, pointwise, nn.Sequential(first, _dense(between, pointwise)))


def _kernels_given(sums: Sums, pointwise: Tensor, kernels: Tensor) -> Tensor:
    channels, taps = kernels.shape
    matrix, bias = pointwise[:-1], pointwise[-1]
    wanted = sums.cross[:-1] - sums.gram[:-1, -1:] * bias
    right = (wanted.view(channels, taps, -1) * matrix[:, None]).sum(2).reshape(-1)
    gram = sums.gram[:-1, :-1].clone()
    by_channel = gram.unflatten(0, (channels, taps)).unflatten(2, (channels, taps))
    by_channel *= (matrix @ matrix.T)[:, None, :, None]
    return _improved(gram, right, kernels.reshape(-1)).view(channels, taps)


def _improved(gram: Tensor, right: Tensor, solution: Tensor) -> Tensor:
    """Improve a solution of ``gram @ x = right`` by conjugate gradients.

    From the last round's it takes a few products with the matrix, where a factorization costs hundreds of them; and
    what is singular stays as it was.
    """
    squares = gram.diagonal()
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    left = right - gram @ solution
    direction = step = inverse * left
    size = left @ step
    enough = _RELATIVE_ACCURACY * size
    for _ in range(_MOST_STEPS):
        if size <= enough or size <= _NOISE * (right @ (inverse * right)):
            break
        ahead = gram @ direction
        length = size / (direction @ ahead)
        solution = solution + length * direction
        left = left - length * ahead
        step = inverse * left
        before, size = size, left @ step
        direction = step + size / before * direction
    return solution


def solutions(sums: Sums, ridges: Iterable[float], floor: float = 0.0) -> Iterator[tuple[float, Tensor]]:
    """Yield ridges, and the solutions ``(K, O)`` with them, but for those with which the sums are singular.

    Args:
        sums: The sums.
        ridges: Each as a share of the mean square of each column.
        floor: What is added to each, as a share of the mean square of all columns.
    """
    normal = _Normal(sums)
    for ridge in ridges:
        weight = normal.solved(ridge, floor)
        if weight is not None:
            yield ridge, weight


def regular_solution(sums: Sums) -> Tensor:
    """Solve with as little ridge as the sums need."""
    _, weight = next(solutions(sums, RIDGES[1:]))  # the largest ridge makes any sums regular
    return weight
