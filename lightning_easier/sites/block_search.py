"""The search for what can be taken out whole, in the flow of values of one mode.

A *block* is found by the way back from its output to its input that keeps the shape and has an addition of its own on
it; a *branch* by the way on from its output to an addition, the other side of which is what it was computed from. Two
axes may be exchanged before a branch, as an MLP does that mixes tokens, if they are exchanged again after it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from torch import nn

from lightning_easier.sites.channels import Axes, Channels
from lightning_easier.sites.dataflow import Call, FlowNode, Kind
from lightning_easier.sites.discovery import Look
from lightning_easier.sites.feeding import Constants, function_name, written
from lightning_easier.sites.shapes import POOLS, Shapes, submodule, tuple_length

Leaves = Literal["identity", "zeros"]
"""What takes the place of a module: its input, or zeros of that shape."""

Turn = frozenset[int]
"""Two axes that are exchanged, as they are named."""


class BlockSearch:
    """The search for blocks in one mode.

    Args:
        model: The model, unwrapped, in eval mode.
        training: Whether it is looked at as in train mode.
    """

    def __init__(self, model: nn.Module, *, training: bool) -> None:
        self._model = model
        look = Look(training)
        self._flow = look.plan(model).flow
        self._looked_into = look.looked_into
        self._place = {node: index for index, node in enumerate(self._flow.nodes)}
        self._constants = Constants(self._flow.nodes)
        self._shapes = Shapes(model, self._flow, self._constants)
        self._kept = self._shapes.kept
        self._channels = Channels(self._flow, self._shapes)
        self._sums: dict[Call, FlowNode] = {}  # of the branches that were found
        self._before: dict[FlowNode, FlowNode] = {}  # output of a block -> its input
        self._times = Counter(call.module for call in self._flow.calls)

    def found(self) -> list[tuple[Call, Leaves]]:
        """Return the calls of blocks, and what takes the place of each, in execution order."""
        calls = self._flow.calls
        skips = {call: additions for call in calls if (additions := self._additions(call))}
        self._before = {call.output: call.inputs[0] for call in skips if call.output is not None}
        own = {call: self._own(call, additions, skips) for call, additions in skips.items()}
        branches = {call: end for call in calls if call not in skips and (end := self._end(call)) is not None}
        found: list[tuple[Call, Leaves]] = []
        for call in calls:
            if not self._can_go(call):
                continue
            if own.get(call) and self._computes(call):
                found.append((call, "identity"))
            elif call in branches and not self._is_all_of_another(call, own, branches):
                found.append((call, "zeros"))
                self._sums[call] = branches[call]
        return found

    def axes(self, call: Call) -> Axes:
        """Return which axis holds the channels of what a block is called with."""
        return self._channels.read_by(call)

    def axes_of_sum(self, call: Call) -> Axes:
        """Return which axis holds the channels of the sum that a branch is added to; nothing of a block."""
        return self._channels.of(self._sums[call]) if call in self._sums else {}

    def _computes(self, call: Call) -> bool:
        """Tell whether a module does more than scale and norm: mixes neurons or positions, or what is not known."""
        return any(
            node.kind in (Kind.OPERATOR, Kind.UNKNOWN)
            or isinstance(node.module, POOLS)
            or any(parameter.ndim > 1 for parameter in (node.module.parameters() if node.module is not None else ()))
            for node in self._flow.nodes[call.first : call.end]
        )

    def _additions(self, call: Call) -> set[FlowNode]:
        """Return the additions on the ways that the input of a call takes unchanged in shape to its output."""
        if not call.inputs or call.output is None:
            return set()
        leads: dict[FlowNode, bool] = {call.inputs[0]: True}
        return {
            node for node in self._way_back(call.output, call.first, leads) if node.kind == Kind.ADD and leads[node]
        }

    def _way_back(self, start: FlowNode, first: int, leads: dict[FlowNode, bool]) -> list[FlowNode]:
        """List the nodes from which a way back leads on, and note of each whether it leads to where that is known."""
        order: list[FlowNode] = []
        stack = [start]
        while stack:
            node = stack[-1]
            if node in leads:
                stack.pop()
                continue
            parents = self._kept.get(node, ()) if self._place[node] >= first else ()
            missing = [parent for parent in parents if parent not in leads]
            if missing:
                stack += missing
                continue
            leads[node] = any(leads[parent] for parent in parents)
            order.append(node)
            stack.pop()
        return order

    def _own(self, call: Call, additions: set[FlowNode], skips: Iterable[Call]) -> set[FlowNode]:
        """Return the additions that a module makes itself, or somewhere inside that is no block."""
        inner = [other for other in skips if other is not call and call.first <= other.first and other.end <= call.end]
        inner = [other for other in inner if other.name.startswith(f"{call.name}.")]
        return {node for node in additions if not any(other.first <= self._place[node] < other.end for other in inner)}

    def _can_go(self, call: Call) -> bool:
        """Tell whether nothing else than its value is missed when a module is gone."""
        output = call.output
        length = tuple_length(call)
        if output is None or not call.inputs or length == 0:
            return False
        if self._times[call.module] > 1 or call.module is self._model:
            return False
        if submodule(self._model, call.name) is not call.module or self._is_looked_into(call):
            return False
        source = call.inputs[0]
        elsewhere = any(self._place[reader] >= call.end for reader in self._readers(source))
        for node in self._flow.nodes[call.first : call.end]:
            if node is not output and any(self._place[reader] >= call.end for reader in self._readers(node)):
                return False
            if elsewhere and source in self._overwritten(node):
                return False
        after = [reader for reader in self._readers(output) if self._place[reader] >= call.end]
        takes_first = all(node in self._shapes.unpacked and (node.item == 0 or not node.readers) for node in after)
        if length is not None and not takes_first:
            return False
        # an identity would let it write to the input
        return not elsewhere or not any(output in self._overwritten(node) for node in self._flow.nodes[call.end :])

    def _is_looked_into(self, call: Call) -> bool:
        """Tell whether something outside of a module reads a weight, a child or an attribute of it, or of a part of it.

        That may be one that it sets itself.
        """
        inside = {*call.module.modules()}
        if any(part in inside and not askers <= inside for part, askers in self._looked_into.items()):
            return True
        around = (*self._flow.nodes[: call.first], *self._flow.nodes[call.end :])
        if any(node.kind == Kind.CONSTANT and node.name.startswith(f"{call.name}.") for node in around):
            return True
        owner, _, place = call.name.rpartition("layers.")  # torch's encoder asks the first of its layers
        return place == "0" and isinstance(submodule(self._model, owner.removesuffix(".")), nn.TransformerEncoder)

    def _readers(self, node: FlowNode) -> list[FlowNode]:
        """Return what reads the numbers of a value; a new tensor of its shape does not."""
        return [reader for reader in node.readers if reader not in self._constants]

    def _overwritten(self, node: FlowNode) -> list[FlowNode]:
        """Return the nodes whose values a step overwrites, or would if the blocks before it were gone."""
        found = written(node)
        if getattr(node.module, "inplace", False):
            found = list(node.inputs[:1])
        while found:
            last = found[-1]
            before = last.inputs[0] if last.kind == Kind.IDENTITY and last.inputs else self._before.get(last)
            if before is None:
                break
            found.append(before)
        return found

    def _end(self, call: Call) -> FlowNode | None:
        """Return the addition of what a module computes to what it was computed from; None if it is no branch."""
        node = call.output
        if not call.inputs or node is None or node in self._constants:
            return None
        for turn, sources in self._origins(call.inputs[0]):
            end = None if node in sources else self._addition(node, call.end, sources, turn)
            if end is not None:
                return end
        return None

    def _origins(self, node: FlowNode) -> Iterable[tuple[Turn | None, set[FlowNode]]]:
        """Yield what a value was before, in the same shape, and what it was before two of its axes were exchanged."""
        sources = self._sources(node)
        yield None, sources
        first = min(sources, key=self._place.__getitem__)
        turn = _turn(first)
        if turn is not None:
            yield turn, self._sources(first.inputs[0])

    def _addition(self, node: FlowNode, end: int, sources: set[FlowNode], turn: Turn | None) -> FlowNode | None:
        """Return the addition that a value goes on to, the other side of which was one of the sources.

        Args:
            node: The value.
            end: The place from which on it is read.
            sources: What it was computed from.
            turn: Which axes were exchanged before; they have to be exchanged again on the way.
        """
        for reader in self._way_on(node, end, turn):
            if _turn(reader) is not None:
                turn = None
            elif turn is None and reader.kind == Kind.ADD and sources & self._others(reader, node, sources):
                return reader
            node = reader
        return None

    def _way_on(self, node: FlowNode, end: int, turn: Turn | None) -> Iterable[FlowNode]:
        """Yield what reads a value as long as that is one step, which keeps its shape, or exchanges two axes once."""
        while True:
            readers = [
                reader
                for reader in self._readers(node)
                if self._place[reader] >= end
                and not (reader in self._shapes.unpacked and reader.item != 0 and not reader.readers)
            ]
            if len(readers) != 1:
                return
            if turn is not None and _turn(readers[0]) == turn:
                turn = None
            elif node not in self._kept.get(readers[0], ()):
                return
            node = readers[0]
            if function_name(node) == "outputs" or not _keeps_zeros(node):
                return
            yield node
            end = 0

    def _sources(self, node: FlowNode) -> set[FlowNode]:
        """Return a value, and what it was before it was normed, in the same shape."""
        found = {node}
        while node.kind != Kind.ADD and len(self._kept.get(node, ())) == 1:
            node = self._kept[node][0]
            found.add(node)
        return found

    def _others(self, addition: FlowNode, node: FlowNode, sources: set[FlowNode]) -> set[FlowNode]:
        """Return what the other side of an addition was, in the same shape, back to the sources of a branch."""
        first = min(self._place[source] for source in sources)
        found = {parent for parent in self._kept[addition] if parent is not node}
        queue = list(found)
        while queue:
            parents = {parent for parent in self._kept.get(queue.pop(), ()) if self._place[parent] >= first} - found
            found |= parents
            queue += parents
        return found

    def _is_all_of_another(self, call: Call, own: dict[Call, set[FlowNode]], branches: dict[Call, FlowNode]) -> bool:
        """Tell whether a module that holds a branch, and computes nothing else, can be taken out in its place."""
        for other, additions in own.items():
            if additions == {branches[call]} and _is_within(call, other) and self._can_go(other):
                return True
        return any(
            other is not call and end is branches[call] and _is_within(call, other) and self._can_go(other)
            for other, end in branches.items()
        )


def _turn(node: FlowNode) -> Turn | None:
    """Return the two axes that a step exchanges; None if it does something else."""
    return frozenset(node.layout[1:]) if node.layout[0] == "swap" and len(node.inputs) == 1 else None


def _is_within(inner: Call, outer: Call) -> bool:
    return inner is not outer and inner.name.startswith(f"{outer.name}.")


def _keeps_zeros(node: FlowNode) -> bool:
    """Tell whether a step makes constants of zeros: everything that passes one value on, but for what needs others."""
    return node.kind != Kind.OUTPUT and not isinstance(node.module, (nn.Softmax, nn.LogSoftmax, nn.Softmin))
