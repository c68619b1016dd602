"""Rules of averages over positions."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx, nn

from lightning_easier.collapsing.algebra import convolutions
from lightning_easier.collapsing.exact.links import Averaging, Link
from lightning_easier.collapsing.exact.nodes import bind, name_of, shape_of
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, as_tuple, axes_of, require

_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_POOLS_BY_NAME = {f"avg_pool{axes}d": kind for axes, kind in enumerate(_AVERAGE_POOLS, 1)}
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_POOLS_BY_NAME = tuple(f"adaptive_avg_pool{axes}d" for axes in range(1, len(_ADAPTIVE_POOLS) + 1))
_WITHOUT_SAMPLES = "it reads one sample, without its axis"


class AveragePool(Rule):
    """An average pooling is a depthwise convolution of equal numbers, unless it counts each window's own positions."""

    modules = _AVERAGE_POOLS
    functions = tuple(_POOLS_BY_NAME)

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what reads one sample without its axis."""
        require(len(axes_of(value)) == self._axes(self._pool(call)) + 2, _WITHOUT_SAMPLES)

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Say how it averages, and make the convolution if there is one for every size."""
        pool = self._pool(call)
        axes = self._axes(pool)
        padded, divisor = any(as_tuple(pool.padding, axes)), getattr(pool, "divisor_override", None)
        is_one = not pool.ceil_mode and (pool.count_include_pad or not padded)
        kernel = _as_convolution(pool, axes, divisor, call.device) if is_one else None
        averaging = Averaging(divisor is None and not (padded and pool.count_include_pad), kernel)
        operator = None if kernel is None else kernel(axes_of(value)[1])
        return call.link(value, operator, averaging=averaging, moves={1: 1})

    def _axes(self, pool: Any) -> int:
        return _AVERAGE_POOLS.index(type(pool)) + 1

    def _pool(self, call: Call) -> Any:
        if call.module is not None:
            return call.module
        given = call.given("input kernel_size stride padding ceil_mode count_include_pad divisor_override")
        given.pop("input")
        return _POOLS_BY_NAME[call.function](**given)


class AdaptivePool(Rule):
    """An average pooling to a given size averages evenly."""

    modules = _ADAPTIVE_POOLS
    functions = _ADAPTIVE_POOLS_BY_NAME

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what reads one sample without its axis."""
        if call.module is not None:
            axes = _ADAPTIVE_POOLS.index(type(call.module)) + 1
        else:
            axes = _ADAPTIVE_POOLS_BY_NAME.index(call.function) + 1
        require(len(axes_of(value)) == axes + 2, _WITHOUT_SAMPLES)

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Say that it averages evenly."""
        return call.link(value, averaging=Averaging(True), moves={1: 1})


class Mean(Rule):
    """A mean over axes other than that of the samples averages evenly."""

    functions = ("mean",)

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse means over everything or over the samples, and conversions."""
        given = call.given("input dim keepdim dtype")
        require(given.get("dtype") is None, "it converts the value")
        require(given.get("dim") is not None, "it averages over everything")
        dims = _dims_of(call, value)
        require(bool(dims) and 0 not in dims, "it averages over the samples")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Say where the channels are after it, if it leaves them."""
        dims, before = _dims_of(call, value), len(axes_of(value))
        after = before if call.given("input dim keepdim").get("keepdim", False) else before - len(dims)
        moves = {}
        if 1 not in dims and after in (2, before):
            moves[1] = 1 if after > 2 else -1
        if before - 1 not in dims:
            moves[-1] = -1
        return call.link(value, averaging=Averaging(True), moves=moves)


def _dims_of(call: Call, value: fx.Node) -> set[int]:
    rank = len(axes_of(value))
    return {dim % rank for dim in as_tuple(call.given("input dim")["dim"], 1)}


def _as_convolution(pool: Any, axes: int, divisor: int | None, device: torch.device) -> Callable[[int], nn.Module]:
    """Return what makes the depthwise convolution of so many channels that a pooling equals."""
    kernel, padding = as_tuple(pool.kernel_size, axes), as_tuple(pool.padding, axes)
    stride = as_tuple(kernel if pool.stride in (None, ()) else pool.stride, axes)

    def convolution(channels: int) -> nn.Module:
        share = 1 / (divisor or prod(kernel))
        weight = torch.full((channels, 1, *kernel), share, dtype=torch.float64, device=device)
        made = convolutions.make_convolution(
            weight, None, torch.float64, stride=stride, padding=padding, groups=channels
        )
        return made.eval().requires_grad_(False)

    return convolution


def is_averaged(captured: fx.GraphModule, value: fx.Node) -> bool:
    """Tell whether a value is an average over all positions, so that there is one at every size."""
    if value.op == "call_module":
        module = captured.get_submodule(str(value.target))
        size = getattr(module, "output_size", None) if type(module) in _ADAPTIVE_POOLS else None
    elif name_of(value) in _ADAPTIVE_POOLS_BY_NAME:
        size = bind(value, "input output_size").get("output_size")
    elif name_of(value) == "mean":
        rank, given = len(shape_of(value) or ()), bind(value, "input dim keepdim")
        dims = {dim % rank for dim in as_tuple(given.get("dim", ()), 1)} if given.get("keepdim") else set()
        return dims == set(range(2, rank))
    else:
        return False
    return size is not None and set(as_tuple(size, 1)) == {1}


RULES: tuple[Rule, ...] = (AveragePool(), AdaptivePool(), Mean())
