"""How well the identity represents whole blocks: summed up while a model runs, by hooks, in the pass that counts."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable_blocks import FittableBlock, fittable_block
from lightning_easier.measure.block_pairs import BlockPairs
from lightning_easier.sites.blocks import Block
from lightning_easier.support.finite import finite_samples, zeroed
from lightning_easier.support.hooks import HookOfOneModel, input_of
from lightning_easier.support.inference import device_of
from lightning_easier.support.processes import gather_from_processes


@dataclass
class _Sums:
    """Sums over the positions of what a block has computed, in float64.

    Attributes:
        numbers: Of positions, of samples, of those left out, and the sum of squared differences from the input; none
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

    def add(self, value: Tensor, output: Tensor, axis: int) -> None:
        """Add a call: what goes in and comes out, ``(N, *)`` of one shape, whose channels are on an axis.

        Squares are taken of differences from the mean of the call, and put back around zero in float64: a mean far from
        zero would use up the digits.
        """
        if output.dtype in (torch.float16, torch.bfloat16):
            value, output = value.float(), output.float()
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

    def unexplained(self) -> float | None:
        """Return the share of the variance that the identity does not explain; None if nothing was summed up.

        It is above 1 where the mean of each channel would explain more.
        """
        if not len(self.numbers) or not self.numbers[0]:
            return None
        variance = float((self.squares - self.totals.square() / self.numbers[0]).sum())
        error = float(self.numbers[3])
        if variance <= 0:
            return 0.0 if error == 0 else math.inf
        return error / variance if math.isfinite(error) and math.isfinite(variance) else math.inf


@dataclass
class _Seen:
    """What the hooks have seen of one block."""

    block: Block
    sums: _Sums
    place: FittableBlock | str | None = None  # why it is none; None before the first call
    shape: torch.Size | None = None


class BlockProbe:
    """Own the hooks that sum up how far what blocks compute is from what goes into them.

    Args:
        model: The model.
        blocks: Its blocks that leave the identity.
        sites: Names of the activations in the model.

    Attributes:
        reasons: Block -> why it can't be taken out, once that is known.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], sites: Sequence[str]) -> None:
        self.reasons: dict[str, str] = {}
        self._model = model
        self._sites = tuple(sites)
        device = device_of(model)
        self._seen = {block.name: _Seen(block, _Sums.none(device)) for block in blocks}
        self._pairs = BlockPairs(blocks, self._add)
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
        self._pairs.attach()  # after it: what is told of is a place by then

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

    def _add(self, name: str, value: Tensor, output: Tensor) -> None:
        """Add a call of a block."""
        seen = self._seen[name]
        if not isinstance(seen.place, FittableBlock) or not value.numel():
            return
        seen.shape = seen.shape or value.shape
        seen.sums.add(value.detach(), output.detach(), 1 if seen.place.geometry.kernel else -1)

    def reduce(self) -> None:
        """Sum up over all processes, each of which has to call this once; who got no batch knows no channels."""
        tensors = [each for seen in self._seen.values() for each in vars(seen.sums).values()]
        gathered = gather_from_processes(tensors)
        for place, seen in enumerate(self._seen.values()):
            of_all = [process[3 * place : 3 * place + 3] for process in gathered]
            there = [sums for sums in of_all if len(sums[0])]
            if there:
                seen.sums = _Sums(*(torch.stack(column).sum(0) for column in zip(*there, strict=True)))

    def leave_out_all_but(self, names: Collection[str]) -> None:
        """Forget the blocks that are not among some names."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        self.reasons = {name: reason for name, reason in self.reasons.items() if name in names}

    def measured(self) -> Iterator[tuple[FittableBlock, float, torch.Size]]:
        """Yield the blocks that were called: each with the share that the identity does not explain, and the shape."""
        for seen in self._seen.values():
            share = seen.sums.unexplained()
            if isinstance(seen.place, FittableBlock) and seen.shape is not None and share is not None:
                yield seen.place, share, seen.shape

    @property
    def left_out(self) -> tuple[int, int]:
        """How many samples were left out, since they are not finite, and how many there were; of the worst block."""
        counts = (
            (int(seen.sums.numbers[2]), int(seen.sums.numbers[1]))
            for seen in self._seen.values()
            if len(seen.sums.numbers)
        )
        return max(counts, default=(0, 0))

    def price(self, place: FittableBlock, shape: torch.Size, prices: ChainPrices) -> float:
        """Return what a block costs, its batch norms folded, which is what is saved where it is taken out."""
        return prices.of({"": place.timed(self._model)}, shape, place.like(self._model))[""]
