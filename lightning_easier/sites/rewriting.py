"""What changes in a model so that every call of an activation has its own module: found first, carried out later."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lightning_easier.sites.dataflow import Kind, Step
from lightning_easier.sites.recording import RecordedForward, Recording, Variant, recorded_forward
from lightning_easier.sites.rectifiers import FunctionalPReLU, NotAModuleError, is_activation, replacement
from lightning_easier.sites.tracing import input_of, read_forward
from lightning_easier.support.inference import has_hooks


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
        if any(has_hooks(part) for part in child.modules()):
            if is_activation(child, gates):
                self.unsupported.append(f"`{target}` has hooks and is called several times; its calls count as one")
            return
        if not is_activation(child, gates):
            if node is not calls[0] and hides_activations(child):
                self._add(node, name, deepcopy(child), node.args, dict(node.kwargs))
        elif _is_prelu(child):
            # the parameter keeps its name: `child` goes on to hold it, and is no longer called
            self._add(node, f"{name}_call", FunctionalPReLU(), (input_of(node), _Attribute(f"{target}.weight")))
        elif next(child.parameters(), None) is not None:
            self.unsupported.append(f"`{target}` has a parameter and is called several times; its calls count as one")
        elif node is not calls[0]:
            self._add(node, name, copy_activation(child), (input_of(node),))

    @property
    def description(self) -> list[tuple[str, str, str]]:
        """The added activations, each with what it reads; one variant's have to agree with another's."""
        return [(name, repr(self.added[name]), self._reads(node)) for node, name in self.targets.items()]

    def _reads(self, node: fx.Node) -> str:
        """Name the children that a call's input comes from, through functions."""
        found: set[str] = set()
        seen: set[fx.Node] = set()
        queue = [value for value in self._arguments[node][0] if isinstance(value, fx.Node)]
        while queue:
            value = queue.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.targets or value.op == "call_module":
                found.add(self.targets.get(value, str(value.target)))
            else:
                queue += value.all_input_nodes
        return ", ".join(sorted(found))

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


def _is_prelu(module: nn.Module) -> bool:
    """Tell whether a module calls ``F.prelu`` with its input and its weight, and nothing else (timm's does)."""
    if not isinstance(module, nn.PReLU):
        return False
    graph = None if type(module).forward is nn.PReLU.forward else read_forward(module)
    if graph is None:
        return type(module).forward is nn.PReLU.forward
    return [(node.op, node.target) for node in graph.nodes if node.op != "placeholder"] == [
        ("get_attr", "weight"), ("call_function", F.prelu), ("output", "output"),
    ]  # fmt: skip


class _Attribute(str):
    """A parameter by its name, to be read before a call."""

    __slots__ = ()


class Edit:
    """A change of a model that can be taken back."""

    def __call__(self) -> None:
        """Carry it out."""
        raise NotImplementedError

    def undo(self) -> None:
        """Take it back, whatever part of it was carried out."""
        raise NotImplementedError


class ReplaceModule(Edit):
    """Another module under an existing name."""

    def __init__(self, parent: nn.Module, target: str, child: nn.Module) -> None:
        self._parent, self._target, self._child = parent, target, child
        self._before = parent.get_submodule(target)

    def __call__(self) -> None:
        """Carry it out."""
        self._parent.set_submodule(self._target, self._child)

    def undo(self) -> None:
        """Take it back."""
        owner, _, name = self._target.rpartition(".")
        self._parent.get_submodule(owner)._modules[name] = self._before


class MakeModule(Edit):
    """A module in the place of a function among the attributes."""

    def __init__(self, parent: nn.Module, target: str, child: nn.Module) -> None:
        self._parent, self._target, self._child = parent, target, child
        self._before = vars(parent)[target]

    def __call__(self) -> None:
        """Carry it out."""
        del self._parent.__dict__[self._target]
        self._parent.add_module(self._target, self._child)

    def undo(self) -> None:
        """Take it back."""
        self._parent._modules.pop(self._target, None)
        self._parent.__dict__[self._target] = self._before


class _AddModules(Edit):
    def __init__(self, module: nn.Module, added: Mapping[str, nn.Module]) -> None:
        self._module = module
        self._added = {name: child for name, child in added.items() if name not in module._modules}

    def __call__(self) -> None:
        """Carry it out."""
        for name, child in self._added.items():
            self._module.add_module(name, child)

    def undo(self) -> None:
        """Take it back."""
        for name in self._added:
            self._module._modules.pop(name, None)


class RewriteGraph(_AddModules):
    """Activations of its own and another graph for an fx.GraphModule."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, added: Mapping[str, nn.Module]) -> None:
        super().__init__(module, added)
        self._graph, self._before = graph, module.graph

    def __call__(self) -> None:
        """Carry it out."""
        super().__call__()
        self._module.graph = self._graph  # type: ignore[assignment]  # compiles the new forward

    def undo(self) -> None:
        """Take it back."""
        self._module.graph = self._before  # type: ignore[assignment]
        super().undo()


class RewriteForward(_AddModules):
    """Activations of its own and a recorded forward for one module."""

    def __init__(
        self,
        module: nn.Module,
        recordings: Mapping[Variant, Recording],
        steps: tuple[Step, ...],
        added: Mapping[str, nn.Module],
        gates: frozenset[str],
    ) -> None:
        super().__init__(module, added)
        self._recordings, self._steps, self._names, self._gates = recordings, steps, tuple(added), gates
        self._before = recorded_forward(module)

    def __call__(self) -> None:
        """Carry it out."""
        super().__call__()
        module = self._module
        called = {step.name: module.get_submodule(step.name) for step in self._steps if step.kind == Kind.MODULE}
        activations = {target: type(child) for target, child in called.items() if is_activation(child, self._gates)}
        activations |= {} if self._before is None else self._before.activations
        forward = RecordedForward(module, self._recordings, self._steps, activations, self._names, self._gates)
        module.__dict__["forward"] = forward

    def undo(self) -> None:
        """Take it back."""
        self._module.__dict__.pop("forward", None)
        if self._before is not None:
            self._module.__dict__["forward"] = self._before
        super().undo()


def carry_out(edits: Sequence[Edit]) -> None:
    """Carry out all edits, or none: where one fails, those before it are taken back."""
    for number, edit in enumerate(edits):
        try:
            edit()
        except BaseException:
            for done in reversed(edits[: number + 1]):
                done.undo()
            raise


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
