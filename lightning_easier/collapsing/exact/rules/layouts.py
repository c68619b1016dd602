"""Rules of what computes nothing, but puts the channels elsewhere."""

import torch
from torch import fx, nn

from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import call_alone, is_number_of_samples
from lightning_easier.collapsing.exact.rules.poolings import is_averaged
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, axes_of, require


class Permutation(Rule):
    """A permutation of axes moves the channels."""

    functions = ("permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what moves the samples."""
        require(self._axes(call, value)[0] == 0, "it moves the axis of the samples")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Say where the channels are after it."""
        axes, rank, moves = self._axes(call, value), len(axes_of(value)), {}
        for axis in (1, -1):
            place = axes.index(axis % rank)
            if place in (1, rank - 1):
                moves[axis] = -1 if place == rank - 1 else 1
        return call.link(value, moves=moves, counts=False)

    def _axes(self, call: Call, value: fx.Node) -> list[int]:
        """Return for each axis after it which it was before."""
        distinct = torch.empty(tuple(range(2, 2 + len(axes_of(value)))), device="meta")
        return [size - 2 for size in call_alone(call.node, distinct).shape]


class Reshape(Rule):
    """A reshape leaves the channels where they are, or makes a vector of a map of one position."""

    modules = (nn.Flatten,)
    functions = ("flatten", "view", "reshape")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what mixes channels with positions, reads other bytes, or has no channels."""
        require(min(len(axes_of(value)), len(axes_of(call.node))) > 1, "its value has no axis of channels")
        require(not set(call.node.kwargs) - {"start_dim", "end_dim"}, "its value is given by name")
        # its bytes are read as something else
        dtypes = [node.meta["tensor_meta"].dtype for node in (call.node, value)]
        require(dtypes[0] == dtypes[1], "it reads the value as another dtype")
        becomes_vectors = self._keeps_samples(call, value) and len(axes_of(call.node)) == 2
        require(becomes_vectors or bool(self._moves(call, value)), "it mixes channels with positions")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Say where the channels are after it."""
        keeps = self._keeps_samples(call, value)
        return call.link(value, moves=self._moves(call, value), counts=False, keeps_samples=keeps)

    def _moves(self, call: Call, value: fx.Node) -> dict[int, int]:
        before, after = axes_of(value), axes_of(call.node)
        moves = {}
        if self._keeps_samples(call, value) and before[:2] == after[:2] and len(before) > 2:
            moves[1] = 1 if len(after) > 2 else -1
        if before[-1] == after[-1]:
            moves[-1] = -1
        return moves

    def _keeps_samples(self, call: Call, value: fx.Node) -> bool:
        """Tell whether the first axis holds the samples after it, whatever their size."""
        if call.module is not None:
            return bool(call.module.start_dim == 1)
        if call.function == "flatten":
            return call.given("input start_dim end_dim").get("start_dim", 0) == 1
        arguments = call.node.args
        sizes = arguments[1] if isinstance(arguments[1], list | tuple) else arguments[1:]
        if isinstance(sizes[0], fx.Node):
            return is_number_of_samples(sizes[0])
        # view(-1, C) of maps that have one position at every size
        return [*sizes] == [-1, axes_of(value)[1]] and is_averaged(call.captured, value)


RULES: tuple[Rule, ...] = (Permutation(), Reshape())
