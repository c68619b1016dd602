"""Write what was planned: into a captured graph, or into a graph of its own to try it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch import fx, nn

from lightning_easier.collapsing.algebra.affine import AFFINES
from lightning_easier.collapsing.algebra.operators import of_random_numbers
from lightning_easier.collapsing.exact.chains import Chain, Chains, Element, Fork, nodes_of
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import (
    ALIASES,
    NUMBER,
    bind,
    is_constant,
    is_written_through,
    name_of,
    shape_of,
)
from lightning_easier.collapsing.exact.plans import Kept, Made, Piece
from lightning_easier.collapsing.exact.recipes import Recipe

EQUALS = "equals"
"""Key in a node's ``meta``: the name of the node of the source that has the same value; None where there is none."""


def equal_in_source(node: fx.Node) -> str | None:
    """Return the name of the node of the source that has the value of a node, None where there is none."""
    name: str | None = node.meta.get(EQUALS, node.name)
    return name


class _Writing(ABC):
    """Writes pieces into a graph, one after the other."""

    _graph: fx.Graph

    def pieces(self, pieces: Sequence[Piece], value: fx.Node) -> fx.Node:
        """Write pieces after a value; returns the node of the last."""
        for piece in pieces:
            if isinstance(piece, Kept):
                value = self._kept(piece, value)
            elif isinstance(piece, Made):
                value = self._made(piece.recipe, value)
            else:
                ends = [self.pieces(branch, value) for branch in piece.branches]
                value = self._joined(piece.fork, ends)
        return value

    def _kept(self, piece: Kept, value: fx.Node) -> fx.Node:
        link = piece.link
        node = self._copy(link.node, {link.value: value})
        if piece.channels is not None:
            _tell_channels(link, node, piece.channels)
        return node

    def _joined(self, fork: Fork, ends: list[fx.Node]) -> fx.Node:
        node = self._copy(fork.node, dict.fromkeys(fork.node.all_input_nodes, ends[0]))
        following = iter(ends)
        node.args = tuple(_filled(argument, following) for argument in node.args)
        node.kwargs = {key: _filled(argument, following) for key, argument in node.kwargs.items()}
        return node

    @abstractmethod
    def _copy(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        """Copy a node with other inputs."""

    @abstractmethod
    def _made(self, recipe: Recipe, value: fx.Node) -> fx.Node:
        """Call a new operator."""


class Writer(_Writing):
    """Rewrites one captured graph.

    Args:
        captured: The graph.

    Attributes:
        made: Name -> the dtype that a new operator is to have; it is in float64 still.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self._graph = captured.graph
        self.made: dict[str, torch.dtype] = {}
        self._now: dict[fx.Node, fx.Node] = {}  # the end of a chain -> what has taken its place

    def bypass(self, node: fx.Node, value: Any) -> None:
        """Let a value take the place of what a node makes of it."""
        _replace(node, value)
        self._graph.erase_node(node)

    def copied(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Copy a value, before a node and with what is known of that, for what is written into; returns the copy."""
        with self._graph.inserting_before(node):
            copy = self._graph.call_method("clone", (value,))
        copy.meta = {"tensor_meta": node.meta["tensor_meta"], EQUALS: equal_in_source(node), ALIASES: []}
        return copy

    def put(self, name: str, operator: nn.Module, dtype: torch.dtype) -> None:
        """Put an operator, in float64, under a name."""
        self._captured.set_submodule(name, operator)
        self.made[name] = dtype

    def instead(self, node: fx.Node, value: fx.Node, operator: nn.Module, dtype: torch.dtype) -> fx.Node:
        """Let an operator, in float64, take the place of what a node calls; returns the node that calls it.

        Args:
            node: The node.
            value: What the operator reads.
            operator: The operator.
            dtype: That it is to have.
        """
        if node.op == "call_module":
            self.put(str(node.target), operator, dtype)
            if isinstance(operator, (*AFFINES, nn.PReLU)):  # which take nothing else, as what they replace may
                node.args, node.kwargs = (value,), {}
            return node
        name = next(name for n in count() if not hasattr(self._captured, name := f"{node.name}_{n}"))
        self.put(name, operator, dtype)
        with self._graph.inserting_before(node):
            called = self._graph.create_node("call_module", name, (value,))
        called.meta = {"tensor_meta": node.meta["tensor_meta"], EQUALS: equal_in_source(node), ALIASES: []}
        _replace(node, called)
        self._graph.erase_node(node)
        return called

    def replace(self, chain: Chain, pieces: Sequence[Piece], chains: Chains) -> None:
        """Write pieces in the place of a chain."""
        old = chains.in_order(dict.fromkeys(nodes_of(chain)))
        source = self._now.get(chain[0].value, chain[0].value)
        inside = set(old)
        for question in chains.questions(old):
            for node in question.all_input_nodes:
                if node in inside:
                    question.replace_input_with(node, source)
            if chains.is_after(question, old[0]):
                old[0].prepend(question)
        with self._graph.inserting_before(old[0]):
            end = self.pieces(pieces, source)
        end.meta[EQUALS] = equal_in_source(chain[-1].node)
        end.meta["tensor_meta"] = chain[-1].node.meta["tensor_meta"]
        _replace(chain[-1].node, end)
        self._now[chain[-1].node] = end
        for node in reversed(old):
            self._graph.erase_node(node)

    def finish(self) -> None:
        """Drop what is no longer called or read."""
        forgotten = set()
        for node in self._graph.nodes:
            if name_of(node) == "view":
                self._loosen(node)
        for node in reversed(list(self._graph.nodes)):
            if not node.users and is_constant(node):
                forgotten.update([str(node.target)] if node.op == "get_attr" else [])
                self._graph.erase_node(node)
        read = {str(node.target) for node in self._graph.nodes if node.op == "get_attr"}
        called = {str(node.target) for node in self._graph.nodes if node.op == "call_module"}
        for target in forgotten - read:
            owner, _, attribute = target.rpartition(".")
            if not any(f"{owner}.".startswith(f"{name}.") for name in called):
                delattr(self._captured.get_submodule(owner), attribute)
        self._graph.lint()
        self._captured.delete_all_unused_submodules()
        self._captured.recompile()

    def _loosen(self, view: fx.Node) -> None:
        """Let a view read what is not contiguous now: another operator may lay its output out in another order."""
        of_another_dtype = isinstance(bind(view, "input size").get("size"), torch.dtype | None)
        if of_another_dtype or is_written_through(self._captured, view):
            self._lay_out(view)
            return
        view.target = "reshape" if view.op == "call_method" else torch.ops.aten.reshape.default
        view.kwargs = {"shape" if key == "size" else key: value for key, value in view.kwargs.items()}

    def _lay_out(self, view: fx.Node) -> None:
        """Make contiguous what a view shares its memory with."""
        owner = view
        while owner.meta.get(ALIASES) and owner.meta.get(EQUALS) is None:
            owner = owner.meta[ALIASES][0]
        if owner.meta.get(EQUALS) is None:  # as it was in the source
            return
        with self._graph.inserting_after(owner):
            contiguous = self._graph.call_method("contiguous")
        contiguous.meta[EQUALS] = owner.meta[EQUALS]
        _replace(owner, contiguous)
        contiguous.args = (owner,)

    def _copy(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        instead = {**instead, **{self._now.get(then, then): now for then, now in instead.items()}}

        def change(other: fx.Node) -> fx.Node:
            if other in instead:
                return instead[other]
            # A constant may be named too late for its new place
            return self._copy(other, {}) if is_constant(other) else other

        copied = self._graph.node_copy(node, change)
        copied.meta = {key: value for key, value in node.meta.items() if key == "tensor_meta"}
        copied.meta[EQUALS] = None
        copied.meta[ALIASES] = copied.all_input_nodes if node.meta.get(ALIASES) else []
        return copied

    def _made(self, recipe: Recipe, value: fx.Node) -> fx.Node:
        called = [str(link.node.target) for link in _links(recipe.elements) if link.node.op == "call_module"]
        weighty = [str(link.node.target) for link in _links(recipe.elements) if link.carries_weight]
        name = next((name for name in called if name in weighty), called[0] if called else None)
        if name is None:
            name = next(name for n in count() if not hasattr(self._captured, name := f"merged_{n}"))
        self.put(name, recipe.build(), recipe.structure.weight.dtype)
        node = self._graph.create_node("call_module", name, (value,))
        node.meta[EQUALS] = None
        return node


class Draft(_Writing):
    """Writes into a graph of its own, whose operators have random numbers where they are new.

    Args:
        captured: The graph that the pieces come from.
        made: Name -> dtype of the operators in it that are in float64 still.
        device: Where new operators are.
    """

    def __init__(self, captured: fx.GraphModule, made: dict[str, torch.dtype], device: torch.device) -> None:
        self._captured = captured
        self._to_round = made
        self._device = device
        self._graph = fx.Graph()
        self._rooms: dict[str, Any] = {}

    def module(self, pieces: Sequence[Piece]) -> nn.Module:
        """Return a module that computes the pieces of a chain."""
        end = self.pieces(pieces, self._graph.placeholder("value"))
        return self._compiled(end)

    def part(self, nodes: Sequence[fx.Node]) -> tuple[nn.Module, list[fx.Node]]:
        """Return a module that computes several nodes, and the nodes whose values are its inputs.

        Args:
            nodes: The nodes, in execution order. It returns the values of those that something else reads.
        """
        inside = dict.fromkeys(nodes)
        for node in nodes:  # questions about dtypes, say, that have no number
            inside |= {
                other: None
                for other in node.all_input_nodes
                if not is_constant(other) and shape_of(other) is None and NUMBER not in other.meta
            }
        read = dict.fromkeys(other for node in inside for other in node.all_input_nodes if other not in inside)
        values = [node for node in read if not is_constant(node) and shape_of(node) is not None]
        places = {node: self._graph.placeholder(f"value_{number}") for number, node in enumerate(values)}
        order = {node: place for place, node in enumerate(nodes[0].graph.nodes)}
        for node in sorted(inside, key=order.__getitem__):
            places[node] = self._copy(node, places)
        ends = [places[node] for node in nodes if not node.users or any(user not in inside for user in node.users)]
        return self._compiled(tuple(ends)), values

    def alone(self, node: fx.Node) -> nn.Module:
        """Return a module that computes one node; its inputs are the values that the node reads."""
        values = [other for other in node.all_input_nodes if not is_constant(other) and shape_of(other) is not None]
        places = {other: self._graph.placeholder(f"value_{number}") for number, other in enumerate(values)}
        return self._compiled(self._copy(node, places))

    def _compiled(self, end: Any) -> nn.Module:
        self._graph.output(end)
        return fx.GraphModule(self._rooms, self._graph).eval()

    def _copy(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        def change(other: fx.Node) -> Any:
            if other in instead:
                return instead[other]
            if is_constant(other):
                return self._copy(other, {})
            return other.meta[NUMBER]  # a size

        copied = self._graph.node_copy(node, change)
        if node.op in ("call_module", "get_attr"):
            copied.target = self._room(node)
        return copied

    def _room(self, node: fx.Node) -> str:
        """Put what a node calls or reads beside the graph, under a name that does not depend on where it was."""
        target = str(node.target)
        if node.op == "call_module":
            found: Any = self._captured.get_submodule(target)
            if target in self._to_round:
                found = deepcopy(found).to(self._to_round[target])
        else:
            owner, _, attribute = target.rpartition(".")
            found = getattr(self._captured.get_submodule(owner), attribute)
        self._rooms[f"part_{len(self._rooms)}"] = found
        return f"part_{len(self._rooms) - 1}"

    def _made(self, recipe: Recipe, value: fx.Node) -> fx.Node:
        name = f"part_{len(self._rooms)}"
        self._rooms[name] = of_random_numbers(recipe.structure, self._device)
        return self._graph.create_node("call_module", name, (value,))


def _replace(node: fx.Node, value: fx.Node) -> None:
    """Let all that read a node, or share its memory, read another."""
    for user in node.users:
        user.meta[ALIASES] = [value if other is node else other for other in user.meta.get(ALIASES, ())]
    node.replace_all_uses_with(value)


def _links(elements: Sequence[Element]) -> Iterator[Link]:
    for element in elements:
        if isinstance(element, Fork):
            for branch in element.branches:
                yield from _links(branch)
        else:
            yield element


def _filled(argument: Any, values: Iterator[fx.Node]) -> Any:
    """Put values in the place of the nodes in an argument, in order."""
    if isinstance(argument, fx.Node):
        return next(values)
    if isinstance(argument, list | tuple):
        return type(argument)(_filled(each, values) for each in argument)
    return argument


def _tell_channels(link: Link, node: fx.Node, channels: int) -> None:
    """Let a reshape that names the number of channels name another."""
    if name_of(link.node) not in ("view", "reshape"):
        return
    rank = len(shape_of(link.node) or ())
    place = next(iter((link.moves or {}).values())) % rank
    sizes = node.args[1:]
    whole = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
    changed = list(sizes[0] if whole else sizes)  # type: ignore[arg-type]
    if changed[place] != -1:
        changed[place] = channels
    node.args = (node.args[0], changed) if whole else (node.args[0], *changed)
