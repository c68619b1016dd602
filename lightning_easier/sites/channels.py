"""Which axis of a value holds its channels: of a value that a module is called with, and of any other.

A layer in the module that reads the value tells first: a Linear or a LayerNorm the last axis, a convolution the one
before its positions, wherever a transposition has moved it from. Where no layer tells, it is the axis that the layers
before and after it know.
"""

from typing import Any

from torch import nn

from lightning_easier.sites.dataflow import NORMS_AND_OPERATORS, Call, Flow, FlowNode, Kind
from lightning_easier.sites.feeding import function_name
from lightning_easier.sites.shapes import NORM_FUNCTIONS, POOL_FUNCTIONS, POOLS, Shapes

# Two, of vectors, up to those of maps with three axes of positions.
_NUMBERS_OF_AXES = range(2, 6)

Axes = dict[int, int]
"""Number of axes of a value -> the one that holds its channels, from 0 on; what is not known is left out."""


class Channels:
    """Finds the axes of channels in a flow.

    Args:
        flow: The flow.
        shapes: The shapes in it.
    """

    def __init__(self, flow: Flow, shapes: Shapes) -> None:
        self._flow = flow
        self._shapes = shapes

    def read_by(self, call: Call) -> Axes:
        """Return the axes of the first value that a module is called with."""
        around = self.of(call.inputs[0])
        found = {number: self._told_inside(call, number) for number in _NUMBERS_OF_AXES}
        return around | {number: axis for number, axis in found.items() if axis is not None}

    def of(self, node: FlowNode) -> Axes:
        """Return the axes of a value, as the layers around it tell."""
        axis = self._shapes.axis(node)
        if axis is None:
            return {}
        return {number: axis % number for number in _NUMBERS_OF_AXES if -number <= axis < number}

    def _told_inside(self, call: Call, number: int) -> int | None:
        """Return the axis that the first layer reads as channels that a value of some axes gets to in a module."""
        orders: dict[FlowNode, tuple[int, ...]] = {call.inputs[0]: tuple(range(number))}  # where each axis was before
        for node in self._flow.nodes[call.first : call.end]:
            value = next((parent for parent in node.inputs if parent in orders), None)
            if value is None:
                continue
            read = _axis_read(node, number)
            if read is not None:
                return orders[value][read]
            order = self._order_after(node, value, orders[value])
            if order is not None:
                orders[node] = order
        return None

    def _order_after(self, node: FlowNode, value: FlowNode, order: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the order of the axes after a step; None if it is not known."""
        if node.layout[0] in ("permute", "swap", "move") and len(node.inputs) == 1:
            return _moved(node.layout, order)
        keeps = value in self._shapes.kept.get(node, ())
        pools = isinstance(node.module, POOLS) or function_name(node) in POOL_FUNCTIONS
        return order if keeps or pools else None


def _axis_read(node: FlowNode, number: int) -> int | None:
    """Return the axis of a value of some axes that a step reads as channels; None if it does not tell."""
    module: Any = node.module
    name = function_name(node) or ""
    axis: int | None = None
    if isinstance(module, nn.modules.conv._ConvNd):
        axis = -1 - len(module.kernel_size)
    elif node.kind == Kind.OPERATOR and name.startswith("conv"):
        axis = -1 - int(name[-2])  # conv2d, conv_transpose2d
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        axis = -1 if len(module.normalized_shape) == 1 else None
    elif isinstance(module, NORMS_AND_OPERATORS) or node.kind == Kind.OPERATOR or name in NORM_FUNCTIONS:
        axis = node.layout[1] if node.layout[0] == "set" else None
    return axis if axis is not None and -number <= axis < number else None


def _moved(layout: tuple[Any, ...], order: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return an order of axes after they are moved; None if these are others than the value has."""
    kind, *axes = layout
    number, moved = len(order), list(order)
    if kind == "permute":
        (axes,) = axes
    if not all(isinstance(axis, int) and -number <= axis < number for axis in axes):
        return None
    if kind == "permute":
        return tuple(order[axis] for axis in axes) if len(axes) == number else None
    first, second = axes
    if kind == "swap":
        moved[first], moved[second] = moved[second], moved[first]
    else:
        axis = moved.pop(first)
        moved.insert(second % number, axis)
    return tuple(moved)
