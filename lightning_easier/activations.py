"""Find every activation call of a model and give each a module of its own.

A *site* is a call of an activation, not a module: torchvision's ResNet-18 has 9 ReLU modules and 17 calls. Each forward
is looked at by itself (see :mod:`lightning_easier.tracing`) and rewritten only where an activation is a function, or a
module that is called more than once. Everything is planned first, without touching the model, then carried out.
"""

import dis
import inspect
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torchmetrics import Metric

from lightning_easier.dataflow import (
    Flow,
    FlowNode,
    Kind,
    Step,
    encoder_layer_steps,
    permutes,
    read_steps,
    sequential_steps,
)
from lightning_easier.neighbourhood import Neighbourhood, neighbourhood
from lightning_easier.rectifiers import (
    GATES,
    FunctionalPReLU,
    NotAModuleError,
    as_gates,
    as_module,
    function_names,
    functions,
    is_activation,
    replacement,
)
from lightning_easier.tracing import (
    RecordedForward,
    Recording,
    UntraceableError,
    Variant,
    input_of,
    read_forward,
    recorded_forward,
    trace_forward,
    variants,
)

# The forwards of nn.Sequential, and of what has none (nn.ModuleList, nn.ModuleDict)
_CONTAINER_FORWARDS = (nn.Sequential.forward, nn.Module.forward)
# Those of torch's own layers with children that are looked into; others (attention, ...) are leaves
_TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)  # fmt: skip


@dataclass(frozen=True)
class ActivationSite:
    """One call of a rectifier, which has a module of its own.

    Attributes:
        name: Qualified name of the module, stable across processes and runs.
        module: The activation module.
        neuron_dim: The axis of its neurons: 1 behind convolutions and batch norm, -1 behind Linear and LayerNorm.
        neighbourhood: Which linear operators lie before and behind it, and which would meet if it were linear.
    """

    name: str
    module: nn.Module
    neuron_dim: int
    neighbourhood: Neighbourhood


def isolate_activations(model: nn.Module, *, gates: bool | Iterable[str] = False) -> dict[str, nn.Module]:
    """Give every call of a rectifier a submodule of its own, in place.

    A rectifier may be a module, a module that is called several times, or a function (``F.relu``, ``torch.relu``,
    ``x.relu_()``, ``F.gelu``, ...). Parameter names, classes and the function computed do not change. A second call
    changes nothing.

    Args:
        model: Any module; a compiled or DistributedDataParallel-wrapped one is unwrapped.
        gates: Whether activations that bound their output count too: all of them, or those named (``"sigmoid"``,
            ``"tanh"``, ``"softmax"``, ``"hardsigmoid"``, ``"hardtanh"``, ``"softsign"``).

    Returns:
        Qualified name -> activation module, in execution order. Names are stable across processes.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.
        ValueError: If ``gates`` names something else.

    Warns:
        UserWarning: Once, with the names of the modules that seem to call a rectifier and can't be rewritten.

    Example:
        >>> import torch.nn as nn, torch.nn.functional as F
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return F.relu(self.fc2(F.relu(self.fc1(x))))
        >>> isolate_activations(Net())
        {'relu': ReLU(), 'relu_1': ReLU()}
    """
    return {site.name: site.module for site in isolated_sites(model, gates)}


def isolated_sites(model: nn.Module, gates: bool | Iterable[str] = False) -> list[ActivationSite]:
    """Isolate the activations of a model in place and describe each; see :func:`isolate_activations`."""
    plan = _plan(model, gates)
    for edit in plan.edits:
        edit()
    if plan.left_alone:
        listing = "; ".join(f"`{name or type(model).__name__}`: {reason}" for name, reason in plan.left_alone.items())
        warnings.warn(
            f"Activations called inside the following modules were left alone, since their forward can't be "
            f"rewritten faithfully: {listing}. Call each activation through an nn.Module of its own there to have it "
            f"measured and pruned.",
            UserWarning,
            stacklevel=2,
        )
    return plan.sites


def planned_sites(model: nn.Module, gates: bool | Iterable[str] = False) -> list[ActivationSite]:
    """Describe the sites that :func:`isolated_sites` would find; the model is not touched."""
    return _plan(model, gates).sites


def replace_activation(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of an activation.

    torch's transformer layer has a fused path for inference that computes the activation by itself; it is told.
    """
    model.set_submodule(name, module)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 1 if isinstance(module, nn.ReLU) else 2 if isinstance(module, nn.GELU) else 0


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile``, DataParallel and DistributedDataParallel wrappers.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule, whose forward is no longer Python.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "Expected argument `model` to be a Python nn.Module, but got a ScriptModule, whose forward can't be "
            "rewritten. Pass the module it was scripted from."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    return model


def match_names(names: Sequence[str], include: Iterable[str] | None, exclude: Iterable[str] | None) -> list[str]:
    """Select names by shell-style globs: those that match any of ``include`` (all by default) and none of ``exclude``.

    Raises:
        ValueError: If a glob matches nothing.
    """
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs or ():
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"Expected argument `{argument}` to hold globs that match activations, but {glob!r} matches none "
                    f"of {list(names)}"
                )
    return [
        name
        for name in names
        if (include is None or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude or ())
    ]


@dataclass
class _Plan:
    flow: Flow = field(default_factory=Flow)
    found: dict[str, tuple[nn.Module, FlowNode]] = field(default_factory=dict)
    edits: list[Callable[[], None]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[ActivationSite]:
        calls = Counter(node.module for node in self.flow.nodes)
        return [
            ActivationSite(name, module, self.flow.neuron_axis(node), neighbourhood(node, calls[module]))
            for name, (module, node) in self.found.items()
        ]


def _plan(model: nn.Module, gates: bool | Iterable[str]) -> _Plan:
    return _Planner(as_gates(gates)).plan(unwrap(model))


class _Planner:
    """Follow the values through a model and note the sites, and the edits that would isolate them."""

    def __init__(self, gates: frozenset[str]) -> None:
        self._gates = gates
        self._plan = _Plan()
        self._flow = self._plan.flow
        self._names: dict[nn.Module, str] = {}  # of the modules met so far; the first name of each counts
        self._steps: dict[nn.Module, Sequence[Step]] = {}
        self._added: dict[nn.Module, dict[str, nn.Module]] = {}  # by the edits, once they are carried out

    def plan(self, model: nn.Module) -> _Plan:
        self._names[model] = ""
        self._flow.add(Kind.OUTPUT, "", [self._run(model, "", ())])
        return self._plan

    def _run(
        self,
        module: nn.Module,
        name: str,
        inputs: Sequence[FlowNode],
        keywords: Mapping[str, FlowNode] = MappingProxyType({}),
    ) -> FlowNode:
        """Let values flow through a module; return what comes out."""
        everything = (*inputs, *keywords.values())
        if _is_leaf(module):
            return self._flow.add_leaf(module, name, everything)
        first_time = module not in self._steps
        if first_time:
            self._steps[module] = self._steps_of(module, name)
        steps = self._steps[module]
        if not steps:
            return self._run_untraceable(module, name, everything)
        values: list[FlowNode] = []
        arguments = iter(inputs)
        for step in steps:
            values.append(self._take(module, name, step, values, arguments, keywords))
        if first_time:
            self._run_uncalled(module, name, steps)
        return values[-1]

    def _take(
        self,
        module: nn.Module,
        name: str,
        step: Step,
        values: Sequence[FlowNode],
        arguments: Iterator[FlowNode],
        keywords: Mapping[str, FlowNode],
    ) -> FlowNode:
        inputs = [values[number] for number in step.inputs]
        if step.kind == Kind.INPUT:
            given = keywords.get(step.name) or next(arguments, None)
            return given or self._flow.add(Kind.INPUT, _join(name, step.name))
        if step.kind == Kind.MODULE:
            named = {key: values[number] for key, number in step.keywords}
            positional = [node for node in inputs if node not in named.values()]
            return self._call(module, name, step.name, positional, named)
        if step.kind == Kind.OUTPUT and len(inputs) == 1:
            return inputs[0]
        return self._flow.add(step.kind, _join(name, step.name), inputs, step.layout)

    def _call(
        self,
        parent: nn.Module,
        parent_name: str,
        target: str,
        inputs: Sequence[FlowNode],
        keywords: Mapping[str, FlowNode] = MappingProxyType({}),
    ) -> FlowNode:
        """Let values flow through a child; an activation is a site."""
        name = _join(parent_name, target)
        added = self._added.get(parent, {})
        child = added[target] if target in added else parent.get_submodule(target)
        is_site = is_activation(child, self._gates)
        known_as = self._names.setdefault(child, name)
        if known_as != name:
            if is_site or (_is_bare(child) and self._calls_activations(child)):
                # one object under two names: each name gets its own, parameters stay shared
                child = _copy_activation(child) if is_site else deepcopy(child)
                self._names[child] = name
                self._plan.edits.append(_Replace(parent, target, child))
            else:
                name = known_as
        if not is_site:
            return self._run(child, name, inputs, keywords)
        node = self._flow.add(Kind.ACTIVATION, name, (*inputs, *keywords.values())[:1], module=child)
        self._plan.found.setdefault(name, (child, node))
        return node

    def _run_untraceable(self, module: nn.Module, name: str, inputs: Sequence[FlowNode]) -> FlowNode:
        """Call the children in the order of their names: the best guess at an axis, and no more than a guess."""
        reason = f"the forward of `{name or type(module).__name__}`, which can't be traced"
        node = self._flow.add(Kind.UNKNOWN, reason, inputs)
        for target, child in module.named_children():
            if not isinstance(child, Metric | torch.jit.ScriptModule):
                node = self._flow.add(Kind.UNKNOWN, reason, [self._call(module, name, target, [node])])
        return node

    def _run_uncalled(self, module: nn.Module, name: str, steps: Sequence[Step]) -> None:
        """Visit the children that this forward does not call, in this mode at least."""
        called = [step.name for step in steps if step.kind in (Kind.MODULE, Kind.CONSTANT)]
        for target, child in list(module.named_children()):
            if isinstance(child, Metric | torch.jit.ScriptModule):
                continue
            if not any(other == target or other.startswith(f"{target}.") for other in called):
                where = f"what calls `{_join(name, target)}`, which its module's forward does not"
                self._call(module, name, target, [self._flow.add(Kind.UNKNOWN, where)])

    def _calls_activations(self, module: nn.Module) -> bool:
        return bool(_Planner(self._gates).plan(module).found)

    def _steps_of(self, module: nn.Module, name: str) -> Sequence[Step]:
        """Return what the forward of a module does; plan its rewriting where that is needed."""
        if isinstance(module, nn.TransformerEncoderLayer):
            return self._steps_of_encoder_layer(module, name)
        recorded = recorded_forward(module)
        if recorded is not None and self._gates <= recorded.gates:
            return recorded.steps
        if type(module).forward in _CONTAINER_FORWARDS and "forward" not in vars(module):
            return sequential_steps([target for target, child in module._modules.items() if child is not None])
        try:
            plainest, *others = variants(module)
            recording = trace_forward(module, plainest)
            first = self._rewriting(module, recording, plainest)
            recordings = {plainest: recording}
            rewritings = [first]
            for variant in others if first.targets else ():
                recorded_too = _trace_optional(module, variant)
                if recorded_too is None:
                    continue
                rewriting = self._rewriting(module, recorded_too, variant)
                if rewriting.description == first.description:
                    recordings[variant] = recorded_too
                    rewritings.append(rewriting)
                elif not variant[1]:
                    reasons = [*first.unsupported, *rewriting.unsupported]
                    reasons.append("it calls other activations in train mode than in eval mode")
                    raise UntraceableError(reasons[0])
        except UntraceableError as error:
            if self._seems_to_hide_sites(module):
                self._plan.left_alone[name] = str(error)
            graph = read_forward(module)
            return () if graph is None else read_steps(graph)
        if first.unsupported:
            self._plan.left_alone[name] = first.unsupported[0]
        for rewriting in rewritings:
            rewriting.apply()
        steps = read_steps(recording.graph)
        if first.targets:
            self._added[module] = first.added
            self._plan.edits.append(_Rewrite(module, recordings, steps, first.added, self._gates))
        return steps

    def _steps_of_encoder_layer(self, layer: nn.TransformerEncoderLayer, name: str) -> Sequence[Step]:
        function = vars(layer).get("activation")
        if function is None:
            return encoder_layer_steps(layer, has_module=True)
        activation = as_module(function, self._gates)
        if activation is None:
            if function not in functions(GATES):
                self._plan.left_alone[name] = "its activation is a function that is not one of torch's"
            return encoder_layer_steps(layer, has_module=False)
        activation.training = layer.training
        self._added[layer] = {"activation": activation}
        self._plan.edits.append(_MakeModule(layer, "activation", activation))
        return encoder_layer_steps(layer, has_module=True)

    def _rewriting(self, module: nn.Module, recording: Recording, variant: Variant) -> "_Rewriting":
        return _Rewriting(module, recording.graph, self._gates, variant[0], self._is_bare_and_calls_activations)

    def _is_bare_and_calls_activations(self, module: nn.Module) -> bool:
        return not _is_leaf(module) and _is_bare(module) and self._calls_activations(module)

    def _seems_to_hide_sites(self, module: nn.Module) -> bool:
        """Tell whether a forward that can't be traced is likely to call an activation that no module stands for."""
        known = functions(self._gates)
        if any(value is function for value in vars(module).values() for function in known):
            return True
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        names = _names_in(code) if isinstance(code, types.CodeType) else Counter()
        if (set(names) & function_names(self._gates)) - set(module._modules):
            return True
        return any(names[target] > 1 and is_activation(child, self._gates) for target, child in module.named_children())


def _trace_optional(module: nn.Module, variant: Variant) -> Recording | None:
    """Record a variant; one with optional arguments may be impossible, one in the other mode must not."""
    try:
        return trace_forward(module, variant)
    except UntraceableError:
        if not variant[1]:
            raise
        return None


class _Rewriting:
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
            self._add(node, name, _copy_activation(child), (input_of(node),))

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
class _Replace:
    """An edit: another module under an existing name."""

    parent: nn.Module
    target: str
    child: nn.Module

    def __call__(self) -> None:
        self.parent.set_submodule(self.target, self.child)


@dataclass(frozen=True)
class _MakeModule:
    """An edit: a module in the place of a function among the attributes."""

    parent: nn.Module
    target: str
    child: nn.Module

    def __call__(self) -> None:
        del self.parent.__dict__[self.target]
        self.parent.add_module(self.target, self.child)


@dataclass(frozen=True)
class _Rewrite:
    """An edit: activations of its own and a recorded forward for one module."""

    module: nn.Module
    recordings: dict[Variant, Recording]
    steps: tuple[Step, ...]
    added: dict[str, nn.Module]
    gates: frozenset[str]

    def __call__(self) -> None:
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


def _join(name: str, target: str) -> str:
    return f"{name}.{target}" if name else target


def _numbered(base: str) -> Iterator[str]:
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1


def _copy_activation(activation: nn.Module) -> nn.Module:
    """Copy an activation module without its hooks; parameters are shared, not copied."""
    twin = copy(activation)
    for name, value in vars(activation).items():
        if isinstance(value, dict):
            twin.__dict__[name] = type(value)() if name.endswith("hooks") else copy(value)
    return twin


def _is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is a layer that is not looked into: torch's own, but for containers and transformers."""
    if permutes(module):
        return True
    cls = type(module)
    if is_parametrized(module):
        cls = cls.__bases__[0]
    return cls.__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, *_TRANSFORMERS)
    )


def _is_bare(module: nn.Module) -> bool:
    """Tell whether a module could be doubled without a trace in the state dict."""
    return next(chain(module.parameters(), module.buffers()), None) is None


def _names_in(code: types.CodeType, weight: int = 1) -> Counter[str]:
    """Count the names that a function uses; those inside a loop count twice."""
    instructions = list(dis.get_instructions(code))
    loops = [
        range(instruction.argval, instruction.offset)
        for instruction in instructions
        if "JUMP" in instruction.opname and instruction.argval < instruction.offset
    ]
    names: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] += 2 if any(instruction.offset in loop for loop in loops) else weight
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant, 2)
    return names
