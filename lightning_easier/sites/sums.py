"""Where the sum can be seen that a branch is added to: no module returns it, but some module reads it."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import nn

from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.blocks import Block
from lightning_easier.sites.dataflow import Flow, FlowNode, Kind
from lightning_easier.sites.discovery import Look
from lightning_easier.sites.feeding import Constants
from lightning_easier.support.inference import evaluation_mode


class Watched(NamedTuple):
    """Where a value is seen.

    Attributes:
        module: A module that is called once in a forward.
        side: Whether it is what the module is called with first, or what it returns.
    """

    module: nn.Module
    side: Literal["input", "output"]


def sums_of(model: nn.Module, branches: Iterable[Block]) -> dict[str, Watched | str]:
    """Find where the sums are seen that branches are added to.

    Args:
        model: Any module; it is looked at as in eval mode, and not touched.
        branches: Branches of it, as :func:`~lightning_easier.sites.blocks.find_blocks` finds them.

    Returns:
        Name of each branch -> where its sum is seen; or why that is not known.
    """
    branches = list(branches)
    if not branches:
        return {}
    inner = unwrap(model)
    with evaluation_mode(inner):
        flow = Look(training=False).plan(inner).flow
    sums = Sums(flow)
    return {branch.name: sums.of_branch(branch) for branch in branches}


class Sums:
    """Where sums are seen in one flow of values."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._place = {node: index for index, node in enumerate(flow.nodes)}
        self._constants = Constants(flow.nodes)
        self._calls = Counter(call.module for call in flow.calls)
        self._nodes = Counter(node.module for node in flow.nodes if node.module is not None)

    def after(self, node: FlowNode) -> Watched | None:
        """Return where the sum is seen that a value is added to as it is; None where that is not known."""
        total = self._addition(node, 0)
        return None if total is None else self._seen(total)

    def of_branch(self, branch: Block) -> Watched | str:
        """Return where the sum of one branch is seen, or why that is not known."""
        call = next((call for call in self._flow.calls if call.module is branch.module), None)
        total = None if call is None else self._addition(call.output, call.end)
        if total is None:
            return "it is scaled, its axes are exchanged, or something else is done to it, before it is added"
        return self._seen(total) or "nothing tells what it is worth: no module alone reads the sum that it is added to"

    def _addition(self, node: FlowNode | None, end: int) -> FlowNode | None:
        """Return the addition that reads a value as it is, and nothing else made from a number of a node on does."""
        while node is not None:
            after = [
                reader
                for reader in node.readers
                if reader not in self._constants
                and self._place[reader] >= end
                and not (reader.item not in (None, 0) and not reader.readers)
            ]
            if len(after) != 1:
                return None
            value, (node,) = node, after
            end = 0
            if node.kind == Kind.ADD:
                return None if _scales(node, value) else node
            if node.kind != Kind.IDENTITY and not (node.kind == Kind.OTHER and node.item == 0):
                return None
        return None

    def _seen(self, total: FlowNode) -> Watched | None:
        """Return a module that is called with a value, or returns it, once in a forward."""
        for call in self._flow.calls:
            if self._calls[call.module] == 1 and call.inputs and call.inputs[0] is total:
                return Watched(call.module, "input")
        for node in total.readers:
            if node.module is not None and self._nodes[node.module] == 1 and node.inputs[0] is total:
                return Watched(node.module, "input")
        for call in self._flow.calls:
            if self._calls[call.module] == 1 and call.output is total and call.returns is None:
                return Watched(call.module, "output")
        return None


def _scales(addition: FlowNode, value: FlowNode) -> bool:
    """Tell whether an addition multiplies a value by ``alpha``, as ``torch.add(x, value, alpha=0.1)`` does."""
    return addition.scaled is not None and addition.inputs[addition.scaled] is value
