"""Rules of what copies channels and positions: slices with steps, zeros beside a value."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_easier.collapsing.algebra import convolutions
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, axes_of, require

_NOT_A_MAP = "its value is not a batch of maps"


class Slice(Rule):
    """``x[:, :, ::2, ::2]`` is a convolution of one tap."""

    functions = ("getitem", "slice")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what leaves out more than every other position, say."""
        shape = axes_of(value)
        require(len(shape) in (3, 4, 5), _NOT_A_MAP)
        for part, size in zip(self._slices(call, value), shape, strict=True):
            ends = (None, torch.iinfo(torch.int64).max)
            whole = isinstance(part, slice) and part.start in (None, 0) and part.stop in ends and size > 0
            require(whole, "it picks a part of an axis")
        steps = self._steps(call, value)
        require(all(step == 1 for step in steps[:2]), "it picks samples or channels")
        require(all(step > 0 for step in steps[2:]), "it turns the positions round")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the convolution."""
        return call.link(value, _selection(call, value, stride=tuple(self._steps(call, value)[2:])), selects=True)

    def _slices(self, call: Call, value: fx.Node) -> list[Any]:
        rank = len(axes_of(value))
        key: Any = call.node.args[1] if call.function == "getitem" else [slice(None)] * rank
        if call.function == "slice":
            given = call.given("input dim start end step")
            key[given.get("dim", 0)] = slice(given.get("start"), given.get("end"), given.get("step"))
        key = key if isinstance(key, tuple | list) else (key,)
        return [*key, *[slice(None)] * (rank - len(key))]

    def _steps(self, call: Call, value: fx.Node) -> list[int]:
        return [1 if part.step is None else part.step for part in self._slices(call, value)]


class ZeroPadding(Rule):
    """Zeros beside the channels and around the map: a convolution of one tap, padded."""

    modules = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
    functions = ("pad", "constant_pad_nd")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse other values than zeros, and what is not as wide on both sides of the map."""
        require(len(axes_of(value)) in (3, 4, 5), _NOT_A_MAP)
        _, mode, number = self._given(call)
        require(mode == "constant" and number in (None, 0), "it pads with other values than zeros")
        samples, channels, *positions = self._sides(call, value)
        require(samples == (0, 0) and min(channels) >= 0, "it pads the samples, or crops the channels")
        even = all(low == high and low >= 0 for low, high in positions)
        require(even, "it pads the sides of the map unevenly, or crops them")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the convolution."""
        _, channels, *positions = self._sides(call, value)
        made = _selection(call, value, channels, padding=tuple(low for low, _ in positions))
        return call.link(value, made, selects=True)

    def _given(self, call: Call) -> tuple[Any, Any, Any]:
        """Return widths (last axis first), mode and value."""
        if call.module is not None:
            return call.module.padding, "constant", getattr(call.module, "value", 0)
        given = call.given("input pad mode value" if call.function == "pad" else "input pad value")
        return given["pad"], given.get("mode", "constant"), given.get("value")

    def _sides(self, call: Call, value: fx.Node) -> list[tuple[int, int]]:
        """Return the widths on both sides of each axis."""
        widths, sides = self._given(call)[0], [(0, 0)] * len(axes_of(value))
        for axis in range(len(widths) // 2):
            sides[-1 - axis] = (widths[2 * axis], widths[2 * axis + 1])
        return sides


def _selection(call: Call, value: fx.Node, beside: tuple[int, int] = (0, 0), **geometry: Any) -> nn.Module:
    """Make a convolution of one tap that copies channels, with channels of zeros beside them."""
    dtype, device = value.meta["tensor_meta"].dtype, call.device
    channels = axes_of(value)[1]
    taps = [1] * (len(axes_of(value)) - 2)
    if any(beside):
        weight = torch.eye(channels, dtype=dtype, device=device)
        weight = F.pad(weight, (0, 0, *beside)).view(-1, channels, *taps)
    else:
        weight = torch.ones(channels, 1, *taps, dtype=dtype, device=device)
        geometry["groups"] = channels
    made = convolutions.make_convolution(weight, None, dtype, **geometry)
    return made.eval().requires_grad_(False)


RULES: tuple[Rule, ...] = (Slice(), ZeroPadding())
