"""How well what may take the place of a whole block represents it: summed up while a model runs, by hooks.

That is nothing, so that its input is left, or zeros where it is a branch; or one operator, which is fitted to the same
calls. What a branch computes is compared with the sum that it is added to, as what a block computes has its skip in it.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.collapsing.algebra.least_squares import NOT_FINITE, Fit, Moments, Sums, fits
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, priced
from lightning_easier.collapsing.fit.fittable_blocks import FittableBlock, axis_of_channels, fittable_block
from lightning_easier.collapsing.fit.fitting import positions_wanted
from lightning_easier.measure.block_pairs import BlockPairs
from lightning_easier.report import BlockWay
from lightning_easier.sites.blocks import Block
from lightning_easier.sites.sums import Watched, sums_of
from lightning_easier.support.finite import finite_samples, zeroed
from lightning_easier.support.hooks import HookOfOneModel, first_tensor, input_of
from lightning_easier.support.inference import device_of
from lightning_easier.support.processes import gather_from_processes, sum_over_processes
from lightning_easier.support.progress import over

# Of the sums of all blocks together, to which operators are fitted.
_MOST_BYTES = 2**31
# A share of the variance that is as bad as an infinite one, with which nothing can be reckoned.
_AS_BAD_AS_ANY = 1e30


@dataclass
class _Sums:
    """Sums over the positions of what a block has computed, in float64.

    Attributes:
        numbers: Of positions, of samples, of those left out, and the sum of squared differences from what is left; none
            before the first call, like the others.
        totals: Sum for each channel, shape ``(C,)``.
        squares: Sum of squares for each channel, shape ``(C,)``.
    """

    numbers: Tensor
    totals: Tensor
    squares: Tensor

    @classmethod
    def none(cls, device: torch.device) -> "_Sums":
        """Return sums over nothing."""
        return cls(*torch.zeros(3, 0, dtype=torch.float64, device=device))

    def add(self, value: Tensor, output: Tensor, axis: int | None) -> None:
        """Add a call: what is left and what comes out, ``(N, *)`` of one shape, whose channels are on an axis.

        Where it is not known which, all values are taken as positions of one channel.

        Squares are taken of differences from the mean of the call, and put back around zero in float64: a mean far from
        zero would use up the digits.
        """
        if output.dtype in (torch.float16, torch.bfloat16):
            value, output = value.float(), output.float()
        if axis is None:
            value, output, axis = value.reshape(len(value), -1, 1), output.reshape(len(output), -1, 1), -1
        kept = finite_samples(value, output)
        output = zeroed(output, kept).movedim(axis, -1)
        missed = zeroed(value, kept).movedim(axis, -1) - output
        others = tuple(range(output.ndim - 1))
        positions = output.numel() // (output.shape[-1] * len(kept)) * kept.sum().double()
        centre = output.mean(others)
        apart = zeroed(output - centre, kept)
        around = apart.sum(others, dtype=torch.float64)
        squares, centre = apart.square().sum(others, dtype=torch.float64), centre.double()
        error = missed.square().sum(dtype=torch.float64)
        numbers = torch.stack([positions, torch.full_like(error, len(kept)), (~kept).sum().double(), error])
        both = (self.numbers, numbers), (self.totals, around + positions * centre), (
            self.squares, squares + 2 * centre * around + positions * centre.square(),
        )  # fmt: skip
        self.numbers, self.totals, self.squares = (new if not len(old) else old + new for old, new in both)

    def takes(self, value: Tensor, axis: int | None) -> bool:
        """Tell whether a value has as many channels as those before it."""
        return not len(self.totals) or len(self.totals) == (1 if axis is None else value.shape[axis])

    @property
    def is_empty(self) -> bool:
        """Whether nothing was summed up."""
        return not len(self.numbers) or not self.numbers[0]

    @property
    def _values(self) -> float:
        """How many values were summed up; the axis of the channels of a branch may be another than that of its sum."""
        return float(self.numbers[0]) * len(self.totals)

    def variance(self) -> float:
        """Return the variance of a value around the mean of its channel."""
        return float((self.squares - self.totals.square() / self.numbers[0]).sum()) / self._values

    def error(self) -> float:
        """Return the squared difference of a value from what is left."""
        return float(self.numbers[3]) / self._values


def _share(error: float, variance: float) -> float:
    """Return which share of a variance is not explained.

    It is above 1 where the mean of each channel would explain more.
    """
    if variance <= 0:
        return 0.0 if error == 0 else math.inf
    return error / variance if math.isfinite(error) and math.isfinite(variance) else math.inf


@dataclass
class _Seen:
    """What the hooks have seen of one block.

    Attributes:
        block: The block.
        sums: Over what it computes.
        place: How the model calls it; why it can't be replaced; None before the first call.
        shape: Of its input.
        moments: What operators are fitted to; None where that would take too much memory, and before the first call.
        total: Where the sum that a branch is added to is seen; None for a block with a skip of its own.
        total_sums: Over that.
    """

    block: Block
    sums: _Sums
    place: FittableBlock | str | None = None
    shape: torch.Size | None = None
    moments: Moments | None = None
    total: Watched | None = None
    total_sums: _Sums | None = None

    def all_sums(self) -> list[_Sums]:
        """Return its sums, that of the sum among them."""
        return [self.sums] if self.total_sums is None else [self.sums, self.total_sums]


@dataclass(frozen=True)
class BlockChoices:
    """What may take the place of a block.

    Attributes:
        place: The block.
        fits: What may; ``explained`` is the share of the variance of what comes out, of a branch that of the sum which
            it is added to.
        left: Which share of that is not explained where nothing computes the block any more.
        shape: Of its input.
    """

    place: FittableBlock
    fits: list[Fit]
    left: float
    shape: torch.Size

    def unexplained(self, fit: Fit) -> float:
        """Return which share of the variance an operator does not explain, or nothing in its place."""
        return self.left if fit.kind == self.place.leaves else 1.0 - fit.explained


class BlockProbe:
    """Own the hooks that sum up how far what blocks compute is from what may take their places.

    Args:
        model: The model.
        blocks: Its blocks, and its branches of additions.
        sites: Names of the activations in the model.
        batches: How many batches there will be on this process and the others together, which bounds how many positions
            of each operators are fitted to.

    Attributes:
        reasons: Block -> why nothing takes its place, once that is known.
        notes: Block -> what there is to say of it besides.
        ways: Block -> what may take its place and saves something, once that was priced.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], sites: Sequence[str], batches: int = 1) -> None:
        self.reasons: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.ways: dict[str, list[BlockWay]] = {}
        self._model = model
        self._sites = tuple(sites)
        self._batches = max(batches, 1)
        self._bytes = 0
        device = device_of(model)
        self._seen = {block.name: _Seen(block, _Sums.none(device)) for block in blocks}
        for name, found in sums_of(model, [block for block in blocks if block.leaves == "zeros"]).items():
            if isinstance(found, str):
                self._seen[name].place = self.reasons[name] = found
            else:
                self._seen[name].total, self._seen[name].total_sums = found, _Sums.none(device)
        # operators read what goes in, also of a branch, which leaves zeros
        self._pairs = BlockPairs([replace(block, leaves="identity") for block in blocks], self._add)
        self._handles: list[RemovableHandle] = []

    @property
    def paused(self) -> bool:
        """Whether what runs now is left out."""
        return self._pairs.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._pairs.paused = paused

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if self._handles:
            return
        for seen in self._seen.values():

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def note(module: nn.Module, args: Any, kwargs: Any, output: Any, seen: _Seen = seen) -> None:
                self._note(seen, args, kwargs, output)

            hook = HookOfOneModel(note)
            self._handles.append(seen.block.module.register_forward_hook(hook, with_kwargs=True))
            if seen.total is not None:
                self._handles.append(self._watch(seen, seen.total))
        self._pairs.attach()  # after it: what is told of is a place by then

    def _watch(self, seen: _Seen, total: Watched) -> RemovableHandle:
        """Register the hook that sees the sum that a branch is added to."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._add_total(seen, first_tensor(args, kwargs))

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def returned(module: nn.Module, args: Any, output: Any) -> None:
            self._add_total(seen, output)

        if total.side == "input":
            return total.module.register_forward_pre_hook(HookOfOneModel(read), with_kwargs=True)
        return total.module.register_forward_hook(HookOfOneModel(returned))

    def detach(self) -> None:
        """Remove the hooks; the sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pairs.detach()

    def _note(self, seen: _Seen, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """Find out how the model calls a block."""
        value = input_of(args, kwargs)
        if self.paused or seen.place is not None or (isinstance(value, Tensor) and not value.numel()):
            return  # a batch without samples tells nothing
        seen.place = fittable_block(self._model, seen.block, [(args, kwargs, output)], self._sites)
        if isinstance(seen.place, str):
            self.reasons[seen.block.name] = seen.place
            return
        if seen.place.why_nothing_is_fitted is not None:
            self.notes[seen.block.name] = seen.place.why_nothing_is_fitted
            return
        geometry = seen.place.geometry
        needed = 2 * 8 * geometry.unknowns * (geometry.unknowns + geometry.channels)
        if self._bytes + needed > _MOST_BYTES:
            self.notes[seen.block.name] = (
                f"no operator was fitted: its sums would take {needed / 2**30:.1f} GiB more; `compress` takes one at a "
                f"time"
            )
            return
        self._bytes += needed
        seen.moments = Moments.of(geometry, geometry.channels, value.device)

    def _add(self, name: str, value: Tensor, output: Tensor) -> None:
        """Add a call of a block."""
        seen = self._seen[name]
        if not isinstance(seen.place, FittableBlock) or not value.numel():
            return
        value, output = value.detach(), output.detach()
        seen.shape = seen.shape or value.shape
        left = value if seen.block.leaves == "identity" else torch.zeros_like(output)
        if not self._sum_up(seen, seen.sums, left, output, axis_of_channels(seen.block.axes, output)):
            return
        if seen.moments is not None:
            seen.moments.add(value, output, -(-positions_wanted(seen.place) // self._batches))

    def _add_total(self, seen: _Seen, value: Any) -> None:
        """Add a sum that a branch was added to."""
        if self.paused or not isinstance(seen.place, FittableBlock) or not isinstance(value, Tensor):
            return
        if value.numel():
            assert seen.total_sums is not None
            value = value.detach()
            axis = axis_of_channels(seen.block.axes_of_sum, value)
            self._sum_up(seen, seen.total_sums, value, value, axis)

    def _sum_up(self, seen: _Seen, sums: _Sums, left: Tensor, value: Tensor, axis: int | None) -> bool:
        """Add a call to sums; return whether it has as many channels as those before it, else nothing is told."""
        if sums.takes(value, axis):
            sums.add(left, value, axis)
            return True
        seen.moments = None
        seen.place = self.reasons[seen.block.name] = (
            f"its calls have other numbers of channels: {len(sums.totals)}, and then a value of {tuple(value.shape)}"
        )
        return False

    def reduce(self) -> None:
        """Sum up over all processes, each of which has to call this once; who got no batch knows no channels."""
        sums = [each for seen in self._seen.values() for each in seen.all_sums()]
        gathered = gather_from_processes([each for part in sums for each in vars(part).values()])
        for place, mine in enumerate(sums):
            of_all = [process[3 * place : 3 * place + 3] for process in gathered]
            there = [parts for parts in of_all if len(parts[0])]
            if there:
                mine.numbers, mine.totals, mine.squares = (
                    torch.stack(column).sum(0) for column in zip(*there, strict=True)
                )
        self._reduce_moments()

    def _reduce_moments(self) -> None:
        """Sum up what operators are fitted to; a process that got no batch adds nothing to it."""
        device = device_of(self._model)
        sizes = torch.zeros(len(self._seen), 5, dtype=torch.int64, device=device)
        for row, seen in zip(sizes, self._seen.values(), strict=True):
            if seen.moments is not None:
                outputs = seen.moments.fitted.cross.shape[1]
                numbers = 1, seen.moments.geometry.unknowns, outputs, seen.moments.samples, int(seen.moments.left_out)
                row += torch.tensor(numbers, device=device)
        (totals,) = sum_over_processes([sizes])
        for (count, unknowns, outputs, samples, left_out), seen in zip(
            totals.tolist(), self._seen.values(), strict=True
        ):
            if not count:
                continue
            mine = seen.moments
            none = [Sums.zeros(unknowns // count, outputs // count, device) for _ in range(2)] if mine is None else []
            both = none if mine is None else [mine.fitted, mine.held_out]
            # one block at a time: there may be no room for all of them twice
            summed = sum_over_processes([each for part in both for each in vars(part).values()])
            if mine is not None:
                mine.fitted, mine.held_out = Sums(*summed[:3]), Sums(*summed[3:])
                mine.samples, mine.left_out = samples, torch.tensor(left_out)

    def leave_out_all_but(self, names: Collection[str]) -> None:
        """Forget the blocks that are not among some names."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        self.reasons = {name: reason for name, reason in self.reasons.items() if name in names}

    @property
    def blocks(self) -> list[Block]:
        """The blocks that are looked at."""
        return [seen.block for seen in self._seen.values()]

    def measured(self) -> Iterator[tuple[FittableBlock, float, torch.Size]]:
        """Yield the blocks that were called: each with the share that what it leaves does not explain, and the shape.

        It is the share of the variance of what the block computes; of a branch, of the sum that it is added to.
        """
        for seen in self._seen.values():
            if not isinstance(seen.place, FittableBlock) or seen.shape is None or seen.sums.is_empty:
                continue
            whole = seen.sums if seen.total_sums is None else seen.total_sums
            if not whole.is_empty:
                yield seen.place, _share(seen.sums.error(), whole.variance()), seen.shape

    def choices(self) -> Iterator[BlockChoices]:
        """Fit operators to the blocks that were called; yields what may take the place of each."""
        for place, left, shape in over([*self.measured()], "Fitting blocks"):
            seen = self._seen[place.name]
            whole = seen.sums if seen.total_sums is None else seen.total_sums
            found = [self._nothing(place, left)]
            for fit in self._fitted(seen):
                missed = _share((1.0 - fit.explained) * seen.sums.variance(), whole.variance())
                if math.isfinite(missed):
                    found.append(replace(fit, explained=1.0 - missed))
            yield BlockChoices(place, found, left, shape)

    @staticmethod
    def _nothing(place: FittableBlock, left: float) -> Fit:
        none = torch.zeros(0, dtype=torch.float64)
        return Fit(place.leaves, nn.Identity(), 1.0 - min(left, _AS_BAD_AS_ANY), none, none)

    def _fitted(self, seen: _Seen) -> list[Fit]:
        """Fit operators to one block; note why there are none."""
        if seen.moments is None:
            return []
        reason = seen.moments.why_no_fit()
        found = [] if reason is not None else list(fits(seen.moments))
        if not found:
            self.notes[seen.block.name] = f"no operator was fitted: {reason or NOT_FINITE}"
        return found

    @property
    def left_out(self) -> tuple[int, int]:
        """How many samples were left out, since they are not finite, and how many there were; of the worst block."""
        counts = (
            (int(seen.sums.numbers[2]), int(seen.sums.numbers[1]))
            for seen in self._seen.values()
            if len(seen.sums.numbers)
        )
        return max(counts, default=(0, 0))

    def priced(self, choices: BlockChoices, prices: ChainPrices) -> list[PricedFit]:
        """Tell what each that may take the place of a block would save; the batch norms in the block are folded."""
        return priced(self._model, choices.place, choices.fits, choices.shape, prices)
