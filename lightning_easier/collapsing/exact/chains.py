"""Find what is linear in a row: chains of linear steps in a captured graph, and forks whose branches are chains."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import (
    ALIASES,
    changes_its_input,
    constants_of,
    is_constant,
    name_of,
    shape_of,
)
from lightning_easier.collapsing.exact.reading import Reader
from lightning_easier.sites.dataflow import OPERATOR_FUNCTIONS, OPERATORS
from lightning_easier.structure.stand_in import IdentityStandIn
from lightning_easier.support.inference import has_hooks

_SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub", "subtract", "subtract_")
_CONCATENATIONS = ("cat", "concat", "concatenate")
_QUESTIONS_OF_ATTRIBUTES = ("dtype", "device", "requires_grad", "is_cuda")


@dataclass(frozen=True, eq=False)
class Fork:
    """Linear branches of one value whose results are added, or put side by side along the channels.

    Attributes:
        node: The node that joins them.
        value: The value that all read.
        name: For a report.
        branches: The steps of each, in the order in which they are joined; none for the value itself.
        how: ``"add"`` or ``"concatenate"``.
        factors: What each branch is multiplied by before it is joined.
        axis: The axis of a concatenation.
    """

    node: fx.Node
    value: fx.Node
    name: str
    branches: tuple[tuple["Element", ...], ...]
    how: str
    factors: tuple[float, ...]
    axis: int = 1
    counts: bool = True


Element: TypeAlias = Link | Fork
Chain: TypeAlias = tuple[Element, ...]


class Chains:
    """The linear steps of a captured graph, strung together.

    A value that something else reads besides ends a chain; so does a step that has to stay what it is.

    Args:
        captured: The graph, with the shapes met on the way; stand-ins and identities are gone.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self._uses = Uses(captured)
        self._reader = Reader(captured)
        self._place = {node: place for place, node in enumerate(captured.graph.nodes)}
        self._elements: dict[fx.Node, Element] = {}
        self._reshaped: set[fx.Node] = set()  # values whose first axis may not be the samples any more
        self._joined_in: dict[fx.Node, fx.Node] = {}  # a node inside a fork -> the node that joins its branches
        self._kept: dict[fx.Node, tuple[Element, str]] = {}  # what has to stay what it is, and why
        for node in captured.graph.nodes:
            element = self._reader.read(node) or self._fork(node)
            if element is None:
                continue
            reason = self._uses.why_separate(node)
            if isinstance(element, Link) and element.unchanged and self._is_written_into(node):
                reason = f"what `{node.name}` copies is written into"
            if reason is None:
                self._elements[node] = element
                if element.value in self._reshaped or (isinstance(element, Link) and not element.keeps_samples):
                    self._reshaped.add(node)
            else:
                self._kept[node] = element, reason

    def __iter__(self) -> Iterator[Chain]:
        """Yield the chains of two elements or more, in execution order."""
        return (chain for chain in self._found() if self._why_scattered(chain) is None)

    def scattered(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield the names of the operations in each chain that can't be executed in one place, and why not."""
        for chain in self._found():
            reason = self._why_scattered(chain)
            names = tuple(element.name for element in _elements_of(chain) if element.counts)
            if reason is not None and len(names) > 1:
                yield names, reason

    def _found(self) -> Iterator[Chain]:
        """Yield what is linear in a row, without the layouts at its ends."""
        chains: dict[fx.Node, list[Element]] = {}  # by the node that each ends with
        for node, element in self._elements.items():
            if node in self._joined_in:
                continue
            chain = chains.pop(element.value, []) if self.sole_reader(element.value) is node else []
            chain.append(element)
            chains[node] = chain
        for chain in sorted(chains.values(), key=lambda chain: self._place[chain[0].node]):
            while chain and isinstance(chain[0], Link) and not chain[0].counts:
                chain = chain[1:]
            while chain and isinstance(chain[-1], Link) and not chain[-1].counts:
                chain = chain[:-1]
            if chain and not (len(chain) == 1 and isinstance(chain[0], Link)):
                yield tuple(chain)

    def _why_scattered(self, chain: Chain) -> str | None:
        """Give the reason why a chain can't be executed where it begins, a size computed later; None if it can."""
        own = {element.node: element.name for element in _elements_of(chain)}
        begin = min(own, key=lambda node: self._place[node])
        for node, name in own.items():
            foreign = [other for other in node.all_input_nodes if other not in own and not is_constant(other)]
            for other in foreign:
                if self._place[other] > self._place[begin] and not self._can_move(other, set(own), self._place[begin]):
                    return f"`{name}` takes `{other.name}`, which is computed after `{own[begin]}`"
        return None

    def _can_move(self, node: fx.Node, chain: set[fx.Node], first: int) -> bool:
        """Tell whether a question about a value can be asked where a chain begins."""
        asked = next(iter(node.all_input_nodes), node)
        if name_of(node) == "getitem" and is_question(asked):
            return self._can_move(asked, chain, first)
        if not is_question(node) or asked in self._reshaped:
            return False
        return asked in chain or self._place[asked] < first

    def sole_reader(self, node: fx.Node) -> fx.Node | None:
        """Return the one node that reads a value, a whole fork counted as one; None if there are several."""
        readers = self.readers(node)
        return readers[0] if len(readers) == 1 else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """List what reads a value's numbers."""
        readers: dict[fx.Node, None] = {}
        for user in node.users:
            if node in self._reshaped or not is_question(user):
                while user in self._joined_in:
                    user = self._joined_in[user]
                readers[user] = None
        return list(readers)

    def element(self, node: Any) -> Element | None:
        """Return the linear step that a node is, unless it has to stay what it is."""
        return self._elements.get(node)

    def apart(self) -> Iterator[tuple[Link, Link, str]]:
        """Yield the operators that would be neighbours in a chain, and why they are not.

        An average is among them where only questions about the size of a value keep it from what it reads.
        """
        links = {
            node: element
            for node, element in (*self._elements.items(), *((node, kept) for node, (kept, _) in self._kept.items()))
            if isinstance(element, Link)
        }
        for second in sorted(links.values(), key=lambda link: self._place[link.node]):
            first = links.get(second.value)
            if first is None or not first.carries_weight:
                continue
            others = [reader for reader in self.readers(first.node) if reader is not second.node]
            only_asked = bool(others) and all(_asks_for_size(reader) for reader in others)
            if not (second.carries_weight or (second.averaging is not None and only_asked)):
                continue
            reasons = [self._kept[link.node][1] for link in (first, second) if link.node in self._kept]
            if not reasons and len(self.readers(first.node)) > 1:
                reasons = [self.why_several(first.node)]
            if reasons:
                yield first, second, reasons[0]

    def why_several(self, node: fx.Node) -> str:
        """Say of a value that several nodes read which they are."""
        readers = self.readers(node)
        return f"its value has {len(readers)} readers: {', '.join(describe_node(self._captured, r) for r in readers)}"

    def why_nothing_meets(self, node: Any) -> str | None:
        """Give the reason why no two linear steps meet at a value; None if they do."""
        if self.element(node) is None:
            kept = self._kept[node][1] if node in self._kept else None
            return kept or f"what comes before it is {describe_node(self._captured, node)}, not one linear operator"
        reader = self.sole_reader(node)
        if reader is None:
            return self.why_several(node)
        if self.element(reader) is None:
            kept = self._kept[reader][1] if reader in self._kept else None
            return kept or f"what comes after it is {describe_node(self._captured, reader)}, not a linear operator"
        return None

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Sort nodes by execution."""
        return sorted(nodes, key=lambda node: self._place[node])

    def is_after(self, node: fx.Node, other: fx.Node) -> bool:
        """Tell whether a node is executed later than another."""
        return self._place[node] > self._place[other]

    def questions(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """List the nodes that ask for what all linear steps leave as it is, of these values or for them, in order."""
        asked: set[fx.Node] = set()
        for node in nodes:
            if node not in self._reshaped:
                asked.update(user for user in node.users if is_question(user))
            for other in node.all_input_nodes:
                asked.update(
                    each
                    for each in (other, *other.all_input_nodes)
                    if is_question(each) and self._reshaped.isdisjoint(each.all_input_nodes)
                )
        answers = [
            user for node in asked for user in node.users if name_of(node) == "getattr" and name_of(user) == "getitem"
        ]
        return self.in_order({*asked, *answers})

    def _fork(self, node: fx.Node) -> Fork | None:
        name, shape = name_of(node), shape_of(node)
        values: Any
        axis: Any = 1
        factors: tuple[float, ...]
        if name in _SUMS and set(node.kwargs) <= {"input", "other", "alpha"}:
            given = {**node.kwargs}
            alpha: Any = given.pop("alpha", 1)
            values, how = [*node.args, *(given[key] for key in ("input", "other") if key in given)], "add"
            if isinstance(alpha, fx.Node):
                return None
            factors = (1.0, float(alpha if "add" in name else -alpha))
        elif name in _CONCATENATIONS:
            values, how = (node.args[0] if node.args else node.kwargs.get("tensors")), "concatenate"
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
            factors = (1.0,) * len(values) if isinstance(values, list | tuple) else ()
        else:
            return None
        if not shape or not node.meta["tensor_meta"].dtype.is_floating_point:  # a single number has no channels
            return None
        if not isinstance(values, list | tuple) or len(values) < 2 or "out" in node.kwargs:
            return None
        if not all(isinstance(value, fx.Node) and shape_of(value) is not None for value in values):
            return None
        if how == "add" and any(shape_of(value) != shape for value in values):  # it is broadcast
            return None
        rank = len(shape)
        if how == "concatenate" and (not isinstance(axis, int) or axis % rank not in (1, rank - 1)):
            return None
        axis = -1 if axis % rank == rank - 1 else 1
        branches = [((), value) if values.count(value) > 1 else self._branch(node, value) for value in values]
        sources = {source for _, source in branches}
        if len(sources) > 1:
            return None
        (source,) = sources
        if source.op == "get_attr" or self._is_written_into(source):
            return None
        inside = [each for steps, _ in branches for each in nodes_of(steps)]
        self._joined_in.update(dict.fromkeys(inside, node))
        return Fork(node, source, node.name, tuple(steps for steps, _ in branches), how, factors, axis)

    def _is_written_into(self, node: fx.Node) -> bool:
        """Tell whether a value may change after it was computed, under this or another name."""
        names, queue = {node}, [node]
        while queue:
            name = queue.pop()
            aliases = [user for user in name.users if name in user.meta.get(ALIASES, ())]
            for other in (*name.meta.get(ALIASES, ()), *aliases):
                if other not in names:
                    names.add(other)
                    queue.append(other)
        return any(
            self._place[user] > self._place[node] and changes_its_input(self._captured, user)
            for name in names
            for user in name.users
        )

    def _branch(self, join: fx.Node, value: fx.Node) -> tuple[Chain, fx.Node]:
        """Follow a branch back to a value that is read elsewhere too, or is not linear."""
        steps: list[Element] = []
        reader = join
        while (element := self._elements.get(value)) is not None and self.readers(value) == [reader]:
            steps.append(element)
            reader, value = value, element.value
        return tuple(reversed(steps)), value


def nodes_of(elements: Sequence[Element]) -> Iterator[fx.Node]:
    """Yield the nodes of a chain, those inside its forks included."""
    return (element.node for element in _elements_of(elements))


def _elements_of(elements: Sequence[Element]) -> Iterator[Element]:
    """Yield the elements of a chain, those inside its forks included."""
    for element in elements:
        if isinstance(element, Fork):
            for branch in element.branches:
                yield from _elements_of(branch)
        yield element


def input_shape(chain: Chain) -> tuple[int, ...]:
    """Return the shape of what a chain reads."""
    return tuple(shape_of(chain[0].value) or ())


def is_question(node: fx.Node) -> bool:
    """Tell whether a node asks a value for its number of samples, its dtype or its device only."""
    name = name_of(node)
    if name in ("size", "sym_size"):
        return node.args[1:] == (0,)
    if name != "getattr":
        return False
    if node.args[1] == "shape":
        return all(name_of(user) == "getitem" and user.args[1] == 0 for user in node.users)
    return node.args[1] in _QUESTIONS_OF_ATTRIBUTES


def _asks_for_size(node: fx.Node) -> bool:
    name = name_of(node)
    return name in ("size", "sym_size") or (name == "getattr" and str(node.args[1]) == "shape")


class Uses:
    """How often modules are called and tensors are read in a captured graph.

    Args:
        captured: The graph.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self._calls = Counter(str(node.target) for node in captured.graph.nodes if node.op == "call_module")
        self._readers: Counter[int] = Counter()
        for target in self._calls:
            self._readers.update(id(parameter) for parameter in captured.get_submodule(target).parameters())
        for node in captured.graph.nodes:  # a parameter may be read without its module being called
            if node.op == "get_attr":
                self._readers[id(self._tensor(node))] += max(len(node.users), 1)

    def why_separate(self, node: fx.Node) -> str | None:
        """Give the reason why a node has to stay what it is whatever it computes; None if there is none."""
        if node.op == "call_module":
            name = str(node.target)
            module = self._captured.get_submodule(name)
            if self._calls[name] > 1:
                return f"`{name}` is called {self._calls[name]} times"
            if "forward" in vars(module):
                return f"the forward of `{name}` was replaced on the instance"
            if has_hooks(module):
                return f"`{name}` has hooks, which would see something else"
            if any(self._readers[id(parameter)] > 1 for parameter in module.parameters()):
                return f"`{name}` shares its parameters with another reader"
        elif any(self._readers[id(self._tensor(constant))] > 1 for constant in constants_of(node)):
            return f"`{node.name}` shares its parameters with another reader"
        return None

    def _tensor(self, node: fx.Node) -> Any:
        owner, _, attribute = str(node.target).rpartition(".")
        return getattr(self._captured.get_submodule(owner), attribute)


def module_of(captured: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, None for anything else."""
    return captured.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_stand_in(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node calls a linearized activation."""
    return isinstance(module_of(captured, node), IdentityStandIn)


def describe_node(captured: fx.GraphModule, node: Any) -> str:
    """Name a node for a report."""
    if not isinstance(node, fx.Node):
        return "a constant"
    module = module_of(captured, node)
    if module is not None:
        return f"`{node.target}` ({type(module).__name__})"
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "output":
        return "the model's output"
    return f"`{getattr(node.target, '__name__', node.target)}`"


def depth(captured: fx.GraphModule) -> int:
    """Length of the longest chain of weight-carrying operators (convolutions, matrix products with weights).

    A part that was captured whole counts with all of its operators.
    """
    longest: dict[fx.Node, int] = {}
    for node in captured.graph.nodes:
        below = max((longest[parent] for parent in node.all_input_nodes), default=0)
        module = module_of(captured, node)
        if module is not None:
            below += sum(isinstance(part, OPERATORS) for part in module.modules())
        elif constants_of(node) and name_of(node) in _OPERATOR_NAMES:
            below += 1
        longest[node] = below
    return max(longest.values(), default=0)


_OPERATOR_NAMES = {function.__name__ for function in (*OPERATOR_FUNCTIONS, torch.bmm)}
