"""What changes in a model so that every call of an activation has its own module: found first, carried out later."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lightning_easier.dataflow import Kind, Step
from lightning_easier.recording import RecordedForward, Recording, Variant, recorded_forward
from lightning_easier.rectifiers import FunctionalPReLU, NotAModuleError, is_activation, replacement
from lightning_easier.tracing import input_of


class Rewriting:
    """What would change in one recorded forward so that every call of an activation has its own module.

    Attributes:
        targets: For each call that changes, the name of its module.
        added: The modules by that name; those of an earlier rewriting, which had fewer gates to look for, stay.
        unsupported: Why some calls can't have their own.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        gates: frozenset[str],
        training: bool,
        hides_activations: Callable[[nn.Module], bool],
    ) -> None:
        self.targets: dict[fx.Node, str] = {}
        self.added: dict[str, nn.Module] = {}
        self.unsupported: list[str] = []
        self._module = module
        self._arguments: dict[fx.Node, tuple[Any, ...]] = {}
        recorded = recorded_forward(module)
        self._earlier = {} if recorded is None else {name: module.get_submodule(name) for name in recorded.added}
        calls: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        for node in graph.nodes:
            if node.op == "call_module":
                self._look_at_child(node, calls[str(node.target)], gates, hides_activations)
                continue
            try:
                found = replacement(node, gates, training)
            except NotAModuleError as error:
                self.unsupported.append(str(error))
                continue
            if found is not None:
                self._add(node, found.name, found.module, found.arguments)

    def _look_at_child(
        self,
        node: fx.Node,
        calls: Sequence[fx.Node],
        gates: frozenset[str],
        hides_activations: Callable[[nn.Module], bool],
    ) -> None:
        if len(calls) == 1:
            return
        target = str(node.target)
        child = self._module.get_submodule(target)
        name = target.replace(".", "_")
        if not is_activation(child, gates):
            if node is not calls[0] and hides_activations(child):
                self._add(node, name, deepcopy(child), node.args, dict(node.kwargs))
        elif type(child).forward is nn.PReLU.forward:
            # the parameter keeps its name: `child` goes on to hold it, and is no longer called
            self._add(node, f"{name}_call", FunctionalPReLU(), (input_of(node), _Attribute(f"{target}.weight")))
        elif next(child.parameters(), None) is not None:
            self.unsupported.append(f"`{target}` has a parameter and is called several times; its calls count as one")
        elif node is not calls[0]:
            self._add(node, name, copy_activation(child), (input_of(node),))

    @property
    def description(self) -> list[tuple[str, str]]:
        """The added activations; a mode's graph has to agree with the other's."""
        return [(name, repr(activation)) for name, activation in self.added.items()]

    def apply(self) -> None:
        """Put the calls of the modules in the place of those found."""
        replaced: dict[fx.Node, fx.Node] = {}

        def current(argument: Any) -> Any:
            return replaced.get(argument, argument)

        for node, target in self.targets.items():
            graph = node.graph
            arguments, keywords = self._arguments[node]
            with graph.inserting_before(node):
                arguments = tuple(graph.get_attr(a) if isinstance(a, _Attribute) else a for a in arguments)
                call = graph.call_module(
                    target, fx.node.map_arg(arguments, current), fx.node.map_arg(keywords, current)
                )
            replaced[node] = call
            node.replace_all_uses_with(call)
            graph.erase_node(node)

    def _add(
        self,
        node: fx.Node,
        base: str,
        activation: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any] | None = None,
    ) -> None:
        taken = {*self.added, *dir(self._module)} - (self._earlier.keys() - self.added.keys())
        name = next(name for name in _numbered(base) if name not in taken)
        if name in self._earlier:
            activation = self._earlier[name]
        else:
            activation.train(self._module.training)
        self.added[name] = activation
        self.targets[node] = name
        self._arguments[node] = (arguments, keywords or {})


class _Attribute(str):
    """A parameter by its name, to be read before a call."""

    __slots__ = ()


@dataclass(frozen=True)
class ReplaceModule:
    """An edit: another module under an existing name."""

    parent: nn.Module
    target: str
    child: nn.Module

    def __call__(self) -> None:
        """Carry it out."""
        self.parent.set_submodule(self.target, self.child)


@dataclass(frozen=True)
class MakeModule:
    """An edit: a module in the place of a function among the attributes."""

    parent: nn.Module
    target: str
    child: nn.Module

    def __call__(self) -> None:
        """Carry it out."""
        del self.parent.__dict__[self.target]
        self.parent.add_module(self.target, self.child)


@dataclass(frozen=True)
class RewriteForward:
    """An edit: activations of its own and a recorded forward for one module."""

    module: nn.Module
    recordings: dict[Variant, Recording]
    steps: tuple[Step, ...]
    added: dict[str, nn.Module]
    gates: frozenset[str]

    def __call__(self) -> None:
        """Carry it out."""
        earlier = recorded_forward(self.module)
        for name, activation in self.added.items():
            if earlier is None or name not in earlier.added:
                self.module.add_module(name, activation)
        called = {step.name: self.module.get_submodule(step.name) for step in self.steps if step.kind == Kind.MODULE}
        activations = {target: type(child) for target, child in called.items() if is_activation(child, self.gates)} | (
            {} if earlier is None else earlier.activations
        )
        forward = RecordedForward(self.module, self.recordings, self.steps, activations, self.added, self.gates)
        self.module.__dict__["forward"] = forward


def _numbered(base: str) -> Iterator[str]:
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1


def copy_activation(activation: nn.Module) -> nn.Module:
    """Copy an activation module without its hooks; parameters are shared, not copied."""
    twin = copy(activation)
    for name, value in vars(activation).items():
        if isinstance(value, dict):
            twin.__dict__[name] = type(value)() if name.endswith("hooks") else copy(value)
    return twin
