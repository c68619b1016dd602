"""Follow the values through a model to find every activation call, and plan what would isolate them.

Each forward is looked at by itself (see :mod:`lightning_easier.tracing`) and rewritten only where an activation is a
function, or a module that is called more than once. The model is not touched: a plan holds the edits.
"""

import dis
import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

import torch
from torch import nn
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
from lightning_easier.recording import Recording, Variant, recorded_forward
from lightning_easier.rectifiers import GATES, as_module, function_names, functions, is_activation
from lightning_easier.rewriting import MakeModule, ReplaceModule, RewriteForward, Rewriting, copy_activation
from lightning_easier.tracing import UntraceableError, read_forward, trace_forward, variants

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


@dataclass
class Plan:
    """What was found in a model, and what isolates it.

    Attributes:
        flow: The flow of values through the model.
        found: Name -> module of each site, with its first call.
        edits: What to do, in order, so that each site has its module.
        left_alone: Name -> reason, of the modules that seem to call an activation and can't be rewritten.
    """

    flow: Flow = field(default_factory=Flow)
    found: dict[str, tuple[nn.Module, FlowNode]] = field(default_factory=dict)
    edits: list[Callable[[], None]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[ActivationSite]:
        """The sites, in execution order."""
        calls = Counter(node.module for node in self.flow.nodes)
        return [
            ActivationSite(name, module, self.flow.neuron_axis(node), neighbourhood(node, calls))
            for name, (module, node) in self.found.items()
        ]


class _Inputs:
    """The arguments of a call; None for one that is not a value."""

    def __init__(
        self, positional: Sequence[FlowNode | None] = (), named: Mapping[str, FlowNode | None] = MappingProxyType({})
    ) -> None:
        self._positional = list(positional)
        self._named = dict(named)

    @property
    def values(self) -> list[FlowNode]:
        return [node for node in (*self._positional, *self._named.values()) if node is not None]

    def take(self, name: str) -> FlowNode | None:
        """Take the argument for a parameter; what nobody takes is the rest."""
        if name in self._named:
            return self._named.pop(name)
        return self._positional.pop(0) if self._positional else None

    @property
    def rest(self) -> list[FlowNode]:
        return self.values


class Discovery:
    """Follow the values through a model and note the sites, and the edits that would isolate them."""

    def __init__(self, gates: frozenset[str]) -> None:
        self._gates = gates
        self._plan = Plan()
        self._flow = self._plan.flow
        self._names: dict[nn.Module, str] = {}  # of the modules met so far; the first name of each counts
        self._steps: dict[nn.Module, Sequence[Step]] = {}
        self._added: dict[nn.Module, dict[str, nn.Module]] = {}  # by the edits, once they are carried out

    def plan(self, model: nn.Module) -> Plan:
        """Look through a model."""
        self._names[model] = ""
        self._flow.add(Kind.OUTPUT, "", [self._run(model, "", _Inputs())])
        return self._plan

    def _run(self, module: nn.Module, name: str, inputs: "_Inputs") -> FlowNode:
        """Let values flow through a module; return what comes out."""
        if _is_leaf(module):
            return self._flow.add_leaf(module, name, inputs.values)
        first_time = module not in self._steps
        if first_time:
            self._steps[module] = self._steps_of(module, name)
        steps = self._steps[module]
        if not steps:
            return self._run_untraceable(module, name, inputs.values)
        nodes: list[FlowNode] = []
        for step in steps:
            nodes.append(self._take(module, name, step, nodes, inputs))
        for unread in inputs.rest:  # optional arguments, whose way is not followed
            self._flow.add(Kind.UNKNOWN, f"an optional argument of `{name}`", [unread])
        if first_time:
            self._run_uncalled(module, name, steps)
        return nodes[-1]

    def _take(self, module: nn.Module, name: str, step: Step, nodes: Sequence[FlowNode], inputs: "_Inputs") -> FlowNode:
        if step.kind == Kind.INPUT:
            kind = Kind.UNKNOWN if name else Kind.INPUT
            return inputs.take(step.name) or self._flow.add(kind, f"the argument `{step.name}` of `{name}`")
        if step.kind == Kind.MODULE:
            positional = [self._gather(name, group, nodes) for group in step.inputs]
            named = {key: self._gather(name, group, nodes) for key, group in step.keywords}
            return self._call(module, name, step.name, _Inputs(positional, named))
        read = [nodes[number] for group in step.inputs for number in group]
        if step.kind == Kind.OUTPUT:
            return read[0] if len(read) == 1 else self._flow.add(Kind.OTHER, _join(name, "outputs"), read)
        return self._flow.add(step.kind, _join(name, step.name), read, step.layout)

    def _gather(self, name: str, group: Sequence[int], nodes: Sequence[FlowNode]) -> FlowNode | None:
        """Return the value of one argument; a list of values counts as one."""
        if len(group) > 1:
            return self._flow.add(Kind.OTHER, _join(name, "list"), [nodes[number] for number in group])
        return nodes[group[0]] if group else None

    def _call(self, parent: nn.Module, parent_name: str, target: str, inputs: "_Inputs") -> FlowNode:
        """Let values flow through a child; an activation is a site."""
        name = _join(parent_name, target)
        added = self._added.get(parent, {})
        child = added[target] if target in added else parent.get_submodule(target)
        is_site = is_activation(child, self._gates)
        known_as = self._names.setdefault(child, name)
        if known_as != name:
            if is_site or (_is_bare(child) and self._calls_activations(child)):
                # one object under two names: each name gets its own, parameters stay shared
                child = copy_activation(child) if is_site else deepcopy(child)
                self._names[child] = name
                self._plan.edits.append(ReplaceModule(parent, target, child))
            else:
                name = known_as
        if not is_site:
            return self._run(child, name, inputs)
        node = self._flow.add(Kind.ACTIVATION, name, inputs.values[:1], module=child)
        self._plan.found.setdefault(name, (child, node))
        return node

    def _run_untraceable(self, module: nn.Module, name: str, inputs: Sequence[FlowNode]) -> FlowNode:
        """Call the children in the order of their names: the best guess at an axis, and no more than a guess."""
        reason = f"the forward of `{name or type(module).__name__}`, which can't be traced"
        node = self._flow.add(Kind.UNKNOWN, reason, inputs)
        for target, child in module.named_children():
            if not isinstance(child, Metric | torch.jit.ScriptModule):
                node = self._flow.add(Kind.UNKNOWN, reason, [self._call(module, name, target, _Inputs([node]))])
        return node

    def _run_uncalled(self, module: nn.Module, name: str, steps: Sequence[Step]) -> None:
        """Visit the children that this forward does not call, in this mode at least."""
        called = [step.name for step in steps if step.kind in (Kind.MODULE, Kind.CONSTANT)]
        for target, child in list(module.named_children()):
            if isinstance(child, Metric | torch.jit.ScriptModule):
                continue
            if not any(other == target or other.startswith(f"{target}.") for other in called):
                where = f"what calls `{_join(name, target)}`, which its module's forward does not"
                self._call(module, name, target, _Inputs([self._flow.add(Kind.UNKNOWN, where)]))

    def _calls_activations(self, module: nn.Module) -> bool:
        return bool(Discovery(self._gates).plan(module).found)

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
            self._plan.edits.append(RewriteForward(module, recordings, steps, first.added, self._gates))
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
        self._plan.edits.append(MakeModule(layer, "activation", activation))
        return encoder_layer_steps(layer, has_module=True)

    def _rewriting(self, module: nn.Module, recording: Recording, variant: Variant) -> "Rewriting":
        return Rewriting(module, recording.graph, self._gates, variant[0], self._is_bare_and_calls_activations)

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


def _join(name: str, target: str) -> str:
    return f"{name}.{target}" if name else target


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
