"""Follow the values through a model to find every activation call, and plan what would isolate them.

Each forward is looked at by itself (see :mod:`lightning_easier.sites.tracing`) and rewritten only where an activation
is a function, or a module that is called more than once. The model is not touched: a plan holds the edits.
"""

import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torchmetrics import Metric

from lightning_easier.sites.bytecode import code_of, names_used
from lightning_easier.sites.dataflow import (
    Call,
    Flow,
    FlowNode,
    Kind,
    Step,
    encoder_layer_steps,
    read_steps,
    separate_steps,
    sequential_steps,
)
from lightning_easier.sites.neighbourhood import Neighbourhood, neighbourhood
from lightning_easier.sites.recording import RecordedForward, Recording, Variant, forward_was_replaced, recorded_forward
from lightning_easier.sites.rectifiers import (
    GATES,
    RECTIFIER,
    RECTIFIERS,
    NotAModuleError,
    activation_kind,
    as_module,
    function_names,
    functions,
    is_activation,
    replacement,
)
from lightning_easier.sites.rewriting import (
    Edit,
    MakeModule,
    ReplaceModule,
    RewriteForward,
    RewriteGraph,
    Rewriting,
    copy_activation,
)
from lightning_easier.sites.tracing import Reading, trace_forward, variants
from lightning_easier.sites.watching import UntraceableError, hooked
from lightning_easier.support.inference import has_hooks

# Layers of torch that return a tuple of two, the first of them their value
_RETURN_TWO = (nn.MultiheadAttention, nn.RNNBase)
# The forwards of nn.Sequential, and of what has none (nn.ModuleList, nn.ModuleDict)
_CONTAINER_FORWARDS = (nn.Sequential.forward, nn.Module.forward)
# Those of torch's own layers with children that are looked into; others (attention, ...) are leaves
_TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)  # fmt: skip


# What instances of our own classes do, all alike: class, and whether its activation is one that is looked for -> steps
_steps_of_class: dict[tuple[type[nn.Module], bool], Sequence[Step]] = {}


@dataclass(frozen=True)
class ActivationSite:
    """One call of a rectifier, which has a module of its own.

    Attributes:
        name: Qualified name of the module, stable across processes and runs.
        module: The activation module.
        neuron_dim: The axis of its neurons: 1 after convolutions and batch norm, -1 after Linear and LayerNorm.
        neighbourhood: Which linear operators lie before and after it, and which would meet if it were linear.
    """

    name: str
    module: nn.Module
    neuron_dim: int
    neighbourhood: Neighbourhood

    def axis(self, given: Mapping[str, int]) -> int:
        """Return the axis of its neurons; the last name glob that matches counts, if one does."""
        return [self.neuron_dim, *(axis for glob, axis in given.items() if fnmatchcase(self.name, glob))][-1]


@dataclass
class IsolationPlan:
    """What was found in a model, and what isolates it.

    Attributes:
        flow: The flow of values through the model.
        found: Name -> module of each site, with its first call.
        inside: Name -> what it lies in, of the sites within a forward that can't be traced.
        edits: What to do, in order, so that each site has its module.
        left_alone: Name -> reason, of the modules that seem to call an activation and can't be rewritten.
    """

    flow: Flow = field(default_factory=Flow)
    found: dict[str, tuple[nn.Module, FlowNode]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[ActivationSite]:
        """The sites, in execution order."""
        calls = Counter(node.module for node in self.flow.nodes)
        return [
            ActivationSite(name, module, self.flow.neuron_axis(node), neighbourhood(node, calls, self.inside.get(name)))
            for name, (module, node) in self.found.items()
        ]

    @property
    def is_guessed(self) -> bool:
        """Whether there was a forward that could not be traced."""
        return bool(self.left_alone) or any(node.kind == Kind.UNKNOWN for node in self.flow.nodes)


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


class _Found(NamedTuple):
    """What was found out of one forward: what it does, what would isolate its activations, why some are left alone."""

    steps: Sequence[Step]
    edits: Sequence[Edit]
    added: dict[str, nn.Module] | None
    left_alone: str | None


def _is_alike(module: nn.Module) -> bool:
    """Tell whether a module is one of ours, whose forward is alike in every instance; what it holds is never called."""
    return getattr(type(module), "forward_is_alike", False)


class KnownForwards:
    """Remembers what forwards do from one look at a model to the next: what is still as it was is not traced again.

    A module is as it was if all the modules inside are the same objects in the same modes, under the same names.
    Nothing else of them may change between two looks.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[nn.Module, frozenset[str]], tuple[list[tuple[object, ...]], _Found]] = {}

    def recall(self, module: nn.Module, gates: frozenset[str]) -> _Found | None:
        """Return what was found out of a module's forward; None if it is new, or another by now."""
        parts, found = self._known.get((module, gates), (None, None))
        return found if parts == self._parts(module) else None

    def note(self, module: nn.Module, gates: frozenset[str], found: _Found) -> None:
        """Remember what was found out."""
        self._known[module, gates] = self._parts(module), found

    @staticmethod
    def _parts(module: nn.Module) -> list[tuple[object, ...]]:
        return [
            (name, part, part.training, vars(part).get("forward"))
            for name, part in module.named_modules(remove_duplicate=False)
        ]


_shared: ContextVar[KnownForwards | None] = ContextVar("_shared", default=None)


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Have the looks at a model in a block share what they find out; nothing may change the model between two."""
    before = _shared.set(KnownForwards())
    try:
        yield
    finally:
        _shared.reset(before)


class Discovery:
    """Follow the values through a model and note the sites, and the edits that would isolate them.

    Args:
        gates: The gates that count.
        known: What earlier looks at the same model have found out; those in :func:`looked_at_once` by default.
    """

    def __init__(self, gates: frozenset[str], known: KnownForwards | None = None) -> None:
        self._gates = gates
        self._known = known or _shared.get() or KnownForwards()
        self._reading = Reading()
        self._plan = IsolationPlan()
        self._flow = self._plan.flow
        self._names: dict[nn.Module, str] = {}  # of the modules met so far; the first name of each counts
        self._steps: dict[nn.Module, Sequence[Step]] = {}
        self._added: dict[nn.Module, dict[str, nn.Module]] = {}  # by the edits, once they are carried out
        self._inside: str | None = None  # the forward that can't be traced, if the walk is in one
        self._is_called = True  # whether a forward calls the module that the walk is in

    def plan(self, model: nn.Module) -> IsolationPlan:
        """Look through a model."""
        self._names[model] = ""
        with hooked():
            self._flow.add(Kind.OUTPUT, "", [self._run(model, "", _Inputs())])
        return self._plan

    def _run(self, module: nn.Module, name: str, inputs: _Inputs) -> FlowNode:
        """Let values flow through a module; return what comes out."""
        if _is_leaf(module):
            return self._flow.add_leaf(module, name, inputs.values)
        first_time = module not in self._steps
        if first_time:
            self._steps[module] = self._recall(module, name)
        steps = self._steps[module]
        if not steps:
            return self._run_untraceable(module, name, inputs.values)
        nodes: list[FlowNode] = []
        for step in steps:
            nodes.append(self._take(module, name, step, nodes, inputs))
        for unread in inputs.values:  # optional arguments, whose way is not followed
            self._flow.add(Kind.UNKNOWN, f"an optional argument of `{name}`", [unread])
        if first_time and not _is_alike(module):
            self._run_uncalled(module, name, steps)
        return nodes[-1]

    def _take(self, module: nn.Module, name: str, step: Step, nodes: Sequence[FlowNode], inputs: _Inputs) -> FlowNode:
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
        where = _join(name, step.name)
        return self._flow.add(step.kind, where, read, step.layout, item=step.item, scaled=step.scaled)

    def _gather(self, name: str, group: Sequence[int], nodes: Sequence[FlowNode]) -> FlowNode | None:
        """Return the value of one argument; a list of values counts as one."""
        if len(group) > 1:
            return self._flow.add(Kind.OTHER, _join(name, "list"), [nodes[number] for number in group])
        return nodes[group[0]] if group else None

    def _call(self, parent: nn.Module, parent_name: str, target: str, inputs: _Inputs) -> FlowNode:
        """Let values flow through a child; an activation is a site."""
        name = _join(parent_name, target)
        added = self._added.get(parent, {})
        child = added[target] if target in added else parent.get_submodule(target)
        kind = activation_kind(child)
        is_site = kind == RECTIFIER or kind in self._gates
        known_as = self._names.setdefault(child, name)
        if known_as != name:
            if any(has_hooks(part) for part in child.modules()) or not (is_site or self._can_be_doubled(child)):
                name = known_as
            else:  # one object under two names: each name gets its own, parameters stay shared
                child = copy_activation(child) if is_site else deepcopy(child)
                self._names[child] = name
                self._plan.edits.append(ReplaceModule(parent, target, child))
        if not is_site:
            # a gate that nobody asked for is not looked into, whatever it is made of
            if kind:
                return self._flow.add_leaf(child, name, inputs.values)
            return self._follow(child, name, inputs)
        node = self._flow.add(Kind.ACTIVATION, name, inputs.values[:1], module=child)
        self._plan.found.setdefault(name, (child, node))
        if self._inside is not None:
            self._plan.inside[name] = self._inside
        return node

    def _follow(self, module: nn.Module, name: str, inputs: _Inputs) -> FlowNode:
        """Let values flow through a module, and note that it was called."""
        call = Call(name, module, tuple(inputs.values), len(self._flow.nodes))
        if self._is_called:
            self._flow.calls.append(call)
        call.output = self._run(module, name, inputs)
        call.end = len(self._flow.nodes)
        call.returns = self._returned(module)
        return call.output

    def _returned(self, module: nn.Module) -> int | None:
        """Describe what a module returns that was looked into, see :class:`Call`."""
        if _is_leaf(module):
            return 2 if isinstance(module, _RETURN_TWO) else None
        steps = self._steps[module]
        if not steps or steps[-1].returns is not None or len(steps[-1].inputs) != 1:
            return steps[-1].returns if steps else None
        last = steps[steps[-1].inputs[0][0]]
        if last.kind != Kind.MODULE or last.name in self._added.get(module, {}):
            return None
        child = module.get_submodule(last.name)
        return self._returned(child) if _is_leaf(child) or child in self._steps else None

    def _run_untraceable(self, module: nn.Module, name: str, inputs: Sequence[FlowNode]) -> FlowNode:
        """Call the children in the order of their names: the best guess at an axis, and no more than a guess."""
        where = f"the forward of `{name or type(module).__name__}`, which can't be traced"
        outside, self._inside = self._inside, where
        node = self._flow.add(Kind.UNKNOWN, where, inputs)
        for target, child in module.named_children():
            if not isinstance(child, Metric):
                node = self._flow.add(Kind.UNKNOWN, where, [self._call(module, name, target, _Inputs([node]))])
        self._inside = outside
        return node

    def _run_uncalled(self, module: nn.Module, name: str, steps: Sequence[Step]) -> None:
        """Visit the children that this forward does not call, in this mode at least."""
        called = [step.name for step in steps if step.kind in (Kind.MODULE, Kind.CONSTANT)]
        outside, self._is_called = self._is_called, False
        for target, child in list(module.named_children()):
            if isinstance(child, Metric):
                continue
            if not any(other == target or other.startswith(f"{target}.") for other in called):
                where = f"what calls `{_join(name, target)}`, which its module's forward does not"
                self._call(module, name, target, _Inputs([self._flow.add(Kind.UNKNOWN, where)]))
        self._is_called = outside

    def _can_be_doubled(self, module: nn.Module) -> bool:
        """Tell whether a block calls activations, and another copy of it would leave no trace and compute the same."""
        if _is_leaf(module) or next(chain(module.parameters(), module.buffers()), None) is not None:
            return False
        if any(has_hooks(part) for part in module.modules()):
            return False
        plan = Discovery(self._gates).plan(module)
        return bool(plan.found) and not plan.is_guessed

    def _recall(self, module: nn.Module, name: str) -> Sequence[Step]:
        """Return what the forward of a module does, and plan its rewriting, as an earlier look did if there was one."""
        if _is_alike(module):
            key = type(module), _names_an_activation(module, self._gates)
            if key not in _steps_of_class:
                _steps_of_class[key] = self._steps_of(module, name)
            return _steps_of_class[key]
        found = self._known.recall(module, self._gates)
        if found is None:
            edits = len(self._plan.edits)
            steps = self._steps_of(module, name)
            added, left_alone = self._added.get(module), self._plan.left_alone.get(name)
            self._known.note(module, self._gates, _Found(steps, self._plan.edits[edits:], added, left_alone))
            return steps
        self._plan.edits += found.edits
        if found.added is not None:
            self._added[module] = found.added
        if found.left_alone is not None:
            self._plan.left_alone[name] = found.left_alone
        return found.steps

    def _steps_of(self, module: nn.Module, name: str) -> Sequence[Step]:
        """Return what the forward of a module does; plan its rewriting where that is needed."""
        if type(module).forward is nn.TransformerEncoderLayer.forward and _has_stock_feed_forward(module):
            return self._steps_of_encoder_layer(module, name)  # type: ignore[arg-type]
        recorded = recorded_forward(module)
        if recorded is not None and self._gates <= recorded.gates and _has_children(module, recorded.steps):
            return recorded.steps
        if isinstance(module, fx.GraphModule):
            return self._steps_of_graph(module, name)
        if type(module).forward is LightningModule.forward:  # its steps call what it holds
            return separate_steps([name for name, child in module.named_children() if not isinstance(child, Metric)])
        if type(module).forward in _CONTAINER_FORWARDS and not forward_was_replaced(module):
            return sequential_steps([target for target, child in module._modules.items() if child is not None])
        return self._read_steps(module, name)

    def _read_steps(self, module: nn.Module, name: str) -> Sequence[Step]:
        """Read the steps of a user's forward; plan its rewriting where that is needed."""
        # Most forwards call no activation but through children of their own: to look is enough.
        graph = None if _names_an_activation(module, self._gates) else self._reading.read(module)
        if graph is not None:
            look = Rewriting(module, graph, self._gates, module.training, self._can_be_doubled)
            if not look.targets:
                if look.unsupported:
                    self._plan.left_alone[name] = "; ".join(dict.fromkeys(look.unsupported))
                return read_steps(graph)
        rewritings: dict[Variant, Rewriting] = {}
        try:
            recordings, reasons = self._record(module, rewritings)
        except UntraceableError as error:
            graph = self._reading.read(module)
            found = any(rewriting.targets for rewriting in rewritings.values())
            if found or self._calls_one(graph) or self._seems_to_hide_sites(module):
                self._plan.left_alone[name] = str(error)
            return () if graph is None else read_steps(graph)
        plainest = next(iter(recordings))
        reasons += rewritings[plainest].unsupported
        if reasons:
            self._plan.left_alone[name] = "; ".join(dict.fromkeys(reasons))
        added = rewritings[plainest].added
        for variant in recordings:
            rewritings[variant].apply()
        steps = read_steps(recordings[plainest].graph)
        if added:
            self._added[module] = added
            edit = RewriteForward(module, _for_both_modes(recordings), steps, added, self._gates)
            self._plan.edits.append(edit)
        return steps

    def _record(
        self, module: nn.Module, rewritings: dict[Variant, Rewriting]
    ) -> tuple[dict[Variant, Recording], list[str]]:
        """Record a forward in every variant that may call an activation; say what is not reached.

        Args:
            module: The module.
            rewritings: Filled with what would change in each recording.

        Raises:
            UntraceableError: If the two modes, without optional arguments, can't both be recorded and rewritten alike.
        """
        recordings: dict[Variant, Recording] = {}
        reasons: list[str] = []
        plainest, *others = variants(module)
        for variant in (plainest, *others):
            training, given = variant
            twin = (False, given)
            if training and twin in recordings and not recordings[twin].reads_training:
                continue  # it does the same in both modes
            if given and not (rewritings[plainest].targets or _names_an_activation(module, self._gates)):
                continue
            try:
                recording = trace_forward(module, variant)
            except UntraceableError:
                if not given:
                    raise
                continue
            rewriting = rewritings[variant] = Rewriting(
                module, recording.graph, self._gates, training, self._can_be_doubled
            )
            if rewriting.description == rewritings[plainest].description:
                recordings[variant] = recording
            elif given:
                reasons.append(f"given {' and '.join(f'`{name}`' for name in given)} it calls other activations")
            else:
                unsupported = [*rewritings[plainest].unsupported, *rewriting.unsupported]
                raise UntraceableError(
                    (*unsupported, "it calls other activations in train mode than in eval mode, or elsewhere")[0]
                )
        return recordings, reasons

    def _calls_one(self, graph: fx.Graph | None) -> bool:
        return graph is not None and any(_counts(node, self._gates) for node in graph.nodes)

    def _steps_of_graph(self, module: fx.GraphModule, name: str) -> Sequence[Step]:
        """Rewrite a graph module's own graph, which is what it is copied, pickled and exported by."""
        graph = deepcopy(module.graph)
        rewriting = Rewriting(module, graph, self._gates, module.training, self._can_be_doubled)
        aten = [str(node.target) for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        known = function_names(self._gates)
        hidden = [target for target in aten if target.split(".")[1] in known]
        reasons = [*rewriting.unsupported, *(f"its graph calls `{target}`" for target in hidden[:1])]
        if reasons:
            self._plan.left_alone[name] = "; ".join(reasons)
        rewriting.apply()
        if rewriting.targets:
            self._added[module] = rewriting.added
            self._plan.edits.append(RewriteGraph(module, graph, rewriting.added))
        return read_steps(graph)

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

    def _seems_to_hide_sites(self, module: nn.Module) -> bool:
        """Tell whether a forward that can't be traced is likely to call an activation that no module stands for."""
        if _names_an_activation(module, self._gates):
            return True
        names = names_used(_own_code(module))
        return any(
            names[target] > 1 and (is_activation(child, self._gates) or self._can_be_doubled(child))
            for target, child in module.named_children()
        )


class Look(Discovery):
    """Follow the values through a model only, in either mode; what is planned besides is not fit to be carried out.

    Args:
        training: The mode that all modules are taken to be in. A forward that can't be traced in train mode is taken to
            do what it does in eval mode.
    """

    def __init__(self, training: bool) -> None:
        super().__init__(frozenset())
        self._readings = [Reading(training), Reading()] if training else [Reading()]

    @property
    def looked_into(self) -> dict[nn.Module, set[nn.Module]]:
        """The modules that others ask for attributes of their own, or for children, each with who asked."""
        modules = dict.fromkeys(module for reading in self._readings for module in reading.looked_into)
        return {
            module: set().union(*(reading.looked_into.get(module, set()) for reading in self._readings))
            for module in modules
        }

    def _recall(self, module: nn.Module, name: str) -> Sequence[Step]:
        return self._steps_of(module, name)

    def _read_steps(self, module: nn.Module, name: str) -> Sequence[Step]:
        graphs = (reading.read(module) for reading in self._readings)
        return next((read_steps(graph) for graph in graphs if graph is not None), ())


def _names_an_activation(module: nn.Module, gates: frozenset[str]) -> bool:
    """Tell whether a module's code names an activation that is not one of its children, or its attributes hold one."""
    known = functions(gates)
    values: list[Any] = []
    for value in vars(module).values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        values += [getattr(item, "func", item) for item in inner]
    if any(value is function for value in values for function in known):
        return True
    if any(isinstance(v, nn.Module) and v not in module._modules.values() and is_activation(v, gates) for v in values):
        return True
    names = set(names_used(_own_code(module))) - set(module._modules)
    return bool(names & (function_names(gates) | {cls.__name__ for cls in RECTIFIERS}))


def _own_code(module: nn.Module) -> list[types.CodeType]:
    """Return the code of a module's forward, and of the methods and the package's functions it names."""
    forward = vars(module).get("forward", type(module).forward)
    found: dict[types.CodeType, None] = {}
    queue = [] if isinstance(forward, RecordedForward) else code_of(forward)
    package = type(module).__module__.partition(".")[0]
    scope = vars(sys.modules.get(type(module).__module__, types.ModuleType("")))
    while queue:
        code = queue.pop()
        if code in found:
            continue
        found[code] = None
        for name in code.co_names:
            for function in (vars(module).get(name), getattr(type(module), name, None), scope.get(name)):
                if getattr(function, "__module__", "").partition(".")[0] == package and package != "torch":
                    queue += code_of(function)
    return list(found)


def _counts(node: fx.Node, gates: frozenset[str]) -> bool:
    try:
        return replacement(node, gates, training=False) is not None
    except NotAModuleError:
        return True


def _for_both_modes(recordings: Mapping[Variant, Recording]) -> dict[Variant, Recording]:
    """Let a recording that did not ask for the mode stand for the other one too."""
    both = dict(recordings)
    for (training, names), recording in recordings.items():
        if not recording.reads_training:
            both.setdefault((not training, names), recording)
    return both


def _has_children(module: nn.Module, steps: Iterable[Step]) -> bool:
    """Tell whether the children are still there that a recording calls."""
    names = {name for name, _ in module.named_modules()}
    return all(step.name in names for step in steps if step.kind == Kind.MODULE)


def _has_stock_feed_forward(module: nn.Module) -> bool:
    return getattr(type(module), "_ff_block", None) is nn.TransformerEncoderLayer._ff_block


def _join(name: str, target: str) -> str:
    return f"{name}.{target}" if name else target


def _is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is a layer that is not looked into: torch's own, but for containers and transformers."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if "forward" in vars(module):
        return False
    cls = type(module)
    if is_parametrized(module):
        cls = cls.__bases__[0]
    return cls.__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, *_TRANSFORMERS)
    )
