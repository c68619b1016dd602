"""Branches of additions that are the same whatever the input: what is left of a layer that was emptied.

An addition of such a branch adds a number for each channel, and nothing has to compute it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.exact.channels import ChannelFlow
from lightning_easier.collapsing.exact.nodes import changes_its_input, is_constant, is_shared, name_of, shape_of

_ADDITIONS = ("add", "add_", "iadd")


@dataclass(frozen=True, eq=False)
class ConstantBranch:
    """A branch that an addition adds to another value, the same whatever the input.

    Attributes:
        addition: The addition.
        value: The other value.
        constants: ``(channels,)``, in float64: what the branch adds.
        dim: The axis of the channels: 1 or -1.
        nodes: The nodes that nothing but the addition reads, the last of the branch first.
    """

    addition: fx.Node
    value: fx.Node
    constants: Tensor
    dim: int
    nodes: tuple[fx.Node, ...]

    def affine(self, device: torch.device) -> ChannelAffine:
        """Return what the addition computes of the other value, in float64 on a device: constants are on the CPU."""
        made = ChannelAffine(len(self.constants), self.dim, dtype=torch.float64, device=device)
        with torch.no_grad():
            assert made.bias is not None
            made.bias.copy_(self.constants)
        return made.eval()


def constant_branches(captured: fx.GraphModule, flow: ChannelFlow) -> Iterator[ConstantBranch]:
    """Yield the branches of a graph that are constant, in execution order; of each addition one at most.

    Args:
        captured: The graph.
        flow: Its channels.
    """
    for node in captured.graph.nodes:
        if name_of(node) not in _ADDITIONS or node.kwargs or len(node.args) != 2:
            continue
        if changes_its_input(captured, node) and is_shared(node.args[0]):
            continue
        for value, branch in (node.args, node.args[::-1]):
            channels = flow.channels.get(branch) if isinstance(branch, fx.Node) else None
            if channels is None or value is branch or not isinstance(value, fx.Node):
                continue
            shape = shape_of(node)
            if shape is None or shape_of(value) != shape or shape_of(branch) != shape:
                continue
            last = len(shape) - 1
            if channels.axis not in (1, last) or not bool(channels.constants.isfinite().all()):
                continue
            nodes = _read_by_nothing_else(branch, node, value)
            if not any(changes_its_input(captured, each) and is_shared(each.all_input_nodes[0]) for each in nodes):
                yield ConstantBranch(node, value, channels.constants, 1 if channels.axis == 1 else -1, nodes)
                break


def _read_by_nothing_else(branch: fx.Node, addition: fx.Node, value: fx.Node) -> tuple[fx.Node, ...]:
    """List the nodes that compute what an addition adds to a value, and nothing else, the last first."""
    found: dict[fx.Node, None] = {}
    queue = [branch]
    while queue:
        node = queue.pop(0)
        if node in found or node is value or node.op in ("placeholder", "output") or is_constant(node):
            continue
        if all(user in found or user is addition for user in node.users):
            found[node] = None
            queue += node.all_input_nodes
    return tuple(found)
