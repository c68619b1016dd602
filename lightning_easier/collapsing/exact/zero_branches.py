"""Branches of additions that are zeros whatever the input: what a block leaves that was taken out of an addition.

What is added to zeros takes the place of the addition, and nothing has to compute what fed only the branch: the norm
before the block, the layer scale or the stochastic depth after it. Unlike a branch that is constant in each channel
(:mod:`~lightning_easier.collapsing.exact.constant_branches`) it need not be known which axis the channels are on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lightning_easier.collapsing.exact.nodes import (
    changes_its_input,
    is_constant,
    is_shared,
    is_written_through,
    name_of,
    shape_of,
)

_MAKES_ZEROS = ("zeros_like", "zeros", "new_zeros")
_SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub", "subtract")
_DIFFERENCES = ("sub", "sub_", "isub", "subtract")
_PRODUCTS = ("mul", "mul_", "imul", "multiply")
# Of zeros they make zeros, whatever their other arguments are
_KEEP_ZEROS = frozenset(
    [
        "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t",
        "swapaxes", "expand", "repeat", "roll", "flip", "select", "slice", "narrow", "getitem", "contiguous", "clone",
        "detach", "alias", "to", "_to_copy", "float", "double", "half", "bfloat16", "type_as", "neg", "relu", "relu_",
        "dropout", "dropout_", "feature_dropout", "stochastic_depth",
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ZeroBranch:
    """A branch of an addition or a difference that is zeros.

    Attributes:
        addition: The addition.
        value: What it is added to, or taken from.
        branch: The zeros.
        is_copied: Whether something writes into the sum, and would write into the value, which is read besides.
    """

    addition: fx.Node
    value: fx.Node
    branch: fx.Node
    is_copied: bool


def zero_branches(captured: fx.GraphModule) -> Iterator[ZeroBranch]:
    """Yield the branches of a graph that are zeros, in execution order; of each addition one at most.

    Args:
        captured: The graph, with the shapes met on the way. What is yielded may be taken out of it at once.
    """
    zeros: set[fx.Node] = set()
    for node in list(captured.graph.nodes):
        if _is_zeros(captured, node, zeros):
            zeros.add(node)
        elif (found := _of_sum(captured, node, zeros)) is not None:
            yield found


def _is_zeros(captured: fx.GraphModule, node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Tell whether a node is zeros, given those of the nodes before it that are."""
    if shape_of(node) is None or (len(node.users) > 1 and is_written_through(captured, node)):
        return False
    name, values = _name_of(node), [other for other in node.all_input_nodes if shape_of(other) is not None]
    if name in _MAKES_ZEROS:
        return "out" not in node.kwargs
    if not zeros.intersection(values):
        return False
    if name in _KEEP_ZEROS:
        return node.args[:1] == (values[0],) and values[0] in zeros
    if name in _SUMS:
        return len(node.args) == 2 and all(each in zeros for each in node.args)
    if name in _PRODUCTS:
        return all(_is_finite(captured, each) for each in node.args if each not in zeros)
    return False


def _of_sum(captured: fx.GraphModule, node: fx.Node, zeros: set[fx.Node]) -> ZeroBranch | None:
    """Return the branch of a node that is zeros, if it is a sum of zeros and something else of its shape and dtype."""
    if name_of(node) not in _SUMS or len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    first, second = node.args
    pairs = [(first, second)]
    if name_of(node) not in _DIFFERENCES and node.kwargs.get("alpha", 1) == 1:
        pairs.append((second, first))
    for value, branch in pairs:
        if branch not in zeros or not isinstance(value, fx.Node) or not isinstance(branch, fx.Node):
            continue
        if shape_of(value) != shape_of(node) or value.meta["tensor_meta"].dtype != node.meta["tensor_meta"].dtype:
            continue
        if value is not first and changes_its_input(captured, node) and is_shared(branch):
            continue  # something sees what is written into the zeros
        is_own = value is first and changes_its_input(captured, node)
        is_read = len(value.users) > 1 or value.op in ("placeholder", "get_attr") or is_shared(value)
        return ZeroBranch(node, value, branch, not is_own and is_read and is_written_through(captured, node))
    return None


def erase_unread(captured: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node that nothing reads, and all before it that nothing reads then.

    What writes into something that is read besides stays.
    """
    queue, gone = [node], set[fx.Node]()
    while queue:
        node = queue.pop(0)
        if node in gone or node.users or node.op in ("placeholder", "output", "get_attr"):  # constants go at the end
            continue
        if changes_its_input(captured, node) and any(is_shared(other) for other in node.all_input_nodes):
            continue
        queue += node.all_input_nodes
        captured.graph.erase_node(node)
        gone.add(node)


def _name_of(node: fx.Node) -> str:
    """Return what a node calls by name, functions of other packages too."""
    if node.op == "call_function" and not name_of(node):
        return str(getattr(node.target, "__name__", ""))
    return name_of(node)


def _is_finite(captured: fx.GraphModule, factor: Any) -> bool:
    """Tell whether a factor is finite; values that depend on the input are taken to be."""
    if isinstance(factor, int | float):
        return abs(factor) < float("inf")
    if not isinstance(factor, fx.Node) or not is_constant(factor):
        return isinstance(factor, fx.Node)
    while factor.op != "get_attr":
        (factor,) = factor.all_input_nodes
    owner, _, attribute = str(factor.target).rpartition(".")
    value = getattr(captured.get_submodule(owner), attribute)
    return isinstance(value, Tensor) and bool(value.isfinite().all())
