"""What an operator or a step costs at a shape: seconds, multiply-accumulates, or one more in the depth."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.affine import AFFINES
from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, padding_of
from lightning_easier.collapsing.algebra.operators import channels, of_random_numbers
from lightning_easier.collapsing.exact.chains import Chain, Fork, input_shape
from lightning_easier.collapsing.exact.links import Link, structure_of
from lightning_easier.collapsing.exact.nodes import shape_of
from lightning_easier.support.costs import price_in_words
from lightning_easier.support.timing import LatencyTable

Objective = Literal["latency", "macs", "depth"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

Shape = tuple[int, ...]
Price = tuple[float, int]
"""The objective's figure, and the number of operations, which decides between equal figures."""

FREE: Price = (0.0, 0)
# A piece with this many times the multiply-accumulates is not even timed: no operator is that much more efficient.
_HOPELESS = 16


def total(*prices: Price) -> Price:
    """Add up prices."""
    return sum(price[0] for price in prices), sum(price[1] for price in prices)


def macs_at(operator: nn.Module, shape: Shape) -> int:
    """Count the multiply-accumulates of one call of a linear operator.

    Args:
        operator: The operator; it needs no data.
        shape: Of its input.
    """
    if isinstance(operator, AFFINES):
        return 0
    weight: Tensor = operator.weight  # type: ignore[assignment]
    if isinstance(operator, nn.Linear):
        return prod(shape[:-1]) * weight.numel()
    positions = output_shape(operator, shape) if isinstance(operator, CONVOLUTIONS) else shape
    return shape[0] * prod(positions[2:]) * weight.numel()


def output_shape(operator: Any, shape: Shape) -> Shape:
    """Return the shape of an operator's output.

    Args:
        operator: The operator; it needs no data.
        shape: Of its input.
    """
    if isinstance(operator, AFFINES):
        return shape
    if isinstance(operator, nn.Linear):
        return (*shape[:-1], operator.out_features)
    geometry = zip(
        shape[2:], operator.kernel_size, operator.stride, operator.dilation, padding_of(operator),
        operator.output_padding, strict=True,
    )  # fmt: skip
    if isinstance(operator, CONVOLUTIONS):
        positions = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, _ in geometry)
    else:
        positions = tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, d, p, o in geometry)
    return (shape[0], operator.out_channels, *positions)


def key_of(operator: nn.Module, shape: Shape, device: torch.device) -> Hashable:
    """Return what tells the latency of an operator: its structure, dtype, device, the shape of its input."""
    weight: Tensor = operator.weight  # type: ignore[assignment]
    geometry = tuple(
        (name, value)
        for name in (
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "output_padding",
            "padding_mode",
            "dim",
            "shape",
        )
        if (value := getattr(operator, name, None)) is not None
    )
    has_bias = operator.bias is not None
    threads = torch.get_num_threads()
    return type(operator).__name__, channels(operator), geometry, has_bias, weight.dtype, shape, str(device), threads


def call_of(operator: nn.Module, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """Return a call of an operator of the same structure, with some numbers."""
    weight: Tensor = operator.weight  # type: ignore[assignment]
    return partial(of_random_numbers(operator, device), torch.randn(shape, dtype=weight.dtype, device=device))


class Pricer:
    """Prices operators and steps for one objective.

    Args:
        objective: What is to be least.
        device: The device of the operators.
        table: Times that were measured already.
        alone: A step or a fork's join -> a module that computes it alone, to be timed.

    Attributes:
        objective: What is to be least.
        device: The device of the operators.
    """

    def __init__(
        self, objective: Objective, device: torch.device, table: LatencyTable, alone: Callable[[fx.Node], nn.Module]
    ) -> None:
        self.objective: Objective = objective
        self.device = device
        self._table = table
        self._alone = alone

    def time_elements(self, chain: Chain) -> None:
        """Time the elements of a chain as they stand, those that were not timed yet together."""
        if self.objective != "latency":
            return
        calls: dict[Hashable, Callable[[], Callable[[], Any]]] = {}
        for element in chain:
            if isinstance(element, Link) and element.carries_weight:
                own, at = structure_of(element, element.operator), input_shape((element,))
                calls[key_of(own, at, self.device)] = partial(call_of, own, at, self.device)
            elif element.counts:
                calls[self._key_of_node(element.node)] = partial(self._call_of_node, element.node)
        self._table.measure(calls, self.device)

    def time_operators(self, wanted: Iterable[tuple[nn.Module, Shape]]) -> None:
        """Time operators at the shapes of their inputs, those that were not timed yet together."""
        if self.objective != "latency":
            return
        self._table.measure(
            {
                key_of(operator, shape, self.device): partial(call_of, operator, shape, self.device)
                for operator, shape in wanted
            },
            self.device,
        )

    def price(self, operator: nn.Module, shape: Shape) -> Price:
        """Return the price of an operator at the shape of its input."""
        if self.objective == "latency":
            key = key_of(operator, shape, self.device)
            self._table.measure({key: partial(call_of, operator, shape, self.device)}, self.device)
            return self._table.seconds[key], 1
        if self.objective == "macs":
            return float(macs_at(operator, shape)), 1
        return float(not isinstance(operator, AFFINES)), 1

    def price_of_link(self, link: Link) -> Price:
        """Return the price of a step as it stands."""
        if not link.counts:
            return FREE
        if link.carries_weight:
            return self.price(structure_of(link, link.operator), input_shape((link,)))
        return self._price_of_node(link.node)

    def price_of_join(self, fork: Fork) -> Price:
        """Return the price of joining the branches of a fork."""
        return self._price_of_node(fork.node)

    def is_hopeless(self, operator: nn.Module, shape: Shape, instead_of: Iterable[tuple[nn.Module, Shape]]) -> bool:
        """Tell whether an operator takes so much more than those that it replaces that it need not be priced.

        Args:
            operator: The operator.
            shape: Of its input.
            instead_of: What it replaces, and the shape of the input of each.
        """
        if self.objective == "depth":
            return False
        macs = sum(macs_at(each, at) for each, at in instead_of)
        return macs_at(operator, shape) > _HOPELESS * max(macs, prod(shape))

    def compared(self, after: Price, before: Price) -> str:
        """Say in words what something would cost beside what it costs."""
        return f"{price_in_words(after[0], self.objective)} instead of {price_in_words(before[0], self.objective)}"

    def _price_of_node(self, node: fx.Node) -> Price:
        if self.objective == "latency":
            self._table.measure({self._key_of_node(node): partial(self._call_of_node, node)}, self.device)
            return self._table.seconds[self._key_of_node(node)], 1
        return 0.0, 1

    def _key_of_node(self, node: fx.Node) -> Hashable:
        return str(self._alone(node)), tuple(_tensors(node)), str(self.device), torch.get_num_threads()

    def _call_of_node(self, node: fx.Node) -> Callable[[], Any]:
        inputs = [torch.randn(shape, dtype=dtype, device=self.device) for shape, dtype in _tensors(node)]
        return partial(self._alone(node), *inputs)


def _tensors(node: fx.Node) -> list[tuple[Shape, torch.dtype]]:
    metas = [value.meta["tensor_meta"] for value in node.all_input_nodes if value.op != "get_attr" and shape_of(value)]
    return [(tuple(meta.shape), meta.dtype) for meta in metas]
