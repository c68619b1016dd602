"""Find every activation call of a model and give each a module of its own.

A *site* is a call of a rectifier, not a module: torchvision's ResNet-18 has 9 ReLU modules and 17 calls. Each forward
is looked at by itself (see :mod:`lightning_easier.tracing`) and rewritten only where a rectifier is a function, or a
module that is called more than once. Everything is planned first, without touching the model, then carried out.
"""

import operator
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchmetrics import Metric

from lightning_easier.tracing import (
    RecordedForward,
    Recording,
    UntraceableError,
    Variant,
    input_of,
    recorded_forward,
    trace_forward,
    variants,
)

RECTIFIERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
"""Module classes taken for rectifiers, their subclasses included. Bounded gates (sigmoid, tanh, ...) are not."""

# function -> (class of the module that computes the same, names of the arguments behind the input)
_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    F.relu6: (nn.ReLU6, ("inplace",)),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.celu: (nn.CELU, ("alpha", "inplace")),
    torch.celu: (nn.CELU, ("alpha",)),
    F.selu: (nn.SELU, ("inplace",)),
    torch.selu: (nn.SELU, ()),
    F.gelu: (nn.GELU, ("approximate",)),
    F.silu: (nn.SiLU, ("inplace",)),
    F.mish: (nn.Mish, ("inplace",)),
    F.hardswish: (nn.Hardswish, ("inplace",)),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
}
_IN_PLACE_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    torch.relu_: (nn.ReLU, ()),
    F.leaky_relu_: (nn.LeakyReLU, ("negative_slope",)),
    F.elu_: (nn.ELU, ("alpha",)),
    F.celu_: (nn.CELU, ("alpha",)),
    F.selu_: (nn.SELU, ()),
}
_METHODS: dict[str, tuple[type[nn.Module], bool]] = {"relu": (nn.ReLU, False), "relu_": (nn.ReLU, True)}
# Rectifiers that can't be given a module without moving a parameter or a random stream; named when met.
_UNSUPPORTED_FUNCTIONS: tuple[Any, ...] = (F.prelu, torch.prelu, F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_)
_FUNCTION_NAMES = {fn.__name__ for fn in (*_FUNCTIONS, *_IN_PLACE_FUNCTIONS, *_UNSUPPORTED_FUNCTIONS)} | set(_METHODS)

_CHANNEL_AXIS: dict[Literal[1, -1], tuple[type[nn.Module], ...]] = {
    1: (
        nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm,
    ),
    -1: (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase),
}  # fmt: skip
_CHANNEL_AXIS_OF_FUNCTION: dict[Any, Literal[1, -1]] = {
    torch.conv1d: 1, torch.conv2d: 1, torch.conv3d: 1, F.batch_norm: 1, F.group_norm: 1, F.instance_norm: 1,
    F.linear: -1, F.layer_norm: -1, torch.matmul: -1, operator.matmul: -1, torch.bmm: -1, torch.einsum: -1,
    F.embedding: -1,
    F.scaled_dot_product_attention: -1,
}  # fmt: skip


# The forwards of nn.Sequential, and of what has none (nn.ModuleList, nn.ModuleDict)
_CONTAINER_FORWARDS = (nn.Sequential.forward, nn.Module.forward)


@dataclass(frozen=True)
class ActivationSite:
    """One call of a rectifier, which has a module of its own.

    Attributes:
        name: Qualified name of the module, stable across processes and runs.
        module: The activation module.
        neuron_dim: The axis of its neurons: 1 behind convolutions and batch norm, -1 behind Linear and LayerNorm.
    """

    name: str
    module: nn.Module
    neuron_dim: int


def isolate_activations(model: nn.Module) -> dict[str, nn.Module]:
    """Give every call of a rectifier a submodule of its own, in place.

    A rectifier may be a module, a module that is called several times, or a function (``F.relu``, ``torch.relu``,
    ``x.relu_()``, ``F.gelu``, ...). Parameter names, classes and the function computed do not change. A second call
    changes nothing.

    Args:
        model: Any module; a compiled or DistributedDataParallel-wrapped one is unwrapped.

    Returns:
        Qualified name -> activation module, in execution order. Names are stable across processes.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.

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
    return {site.name: site.module for site in isolated_sites(model)}


def isolated_sites(model: nn.Module) -> list[ActivationSite]:
    """Isolate the activations of a model in place and describe each; see :func:`isolate_activations`."""
    plan = _plan(unwrap(model))
    for edit in plan.edits:
        edit()
    if plan.left_alone:
        listing = "; ".join(f"`{name or type(model).__name__}`: {reason}" for name, reason in plan.left_alone.items())
        warnings.warn(
            f"Rectifiers called inside the following modules were left alone, since their forward can't be "
            f"rewritten faithfully: {listing}. Call each rectifier through an nn.Module of its own there to have it "
            f"measured and pruned.",
            UserWarning,
            stacklevel=2,
        )
    return plan.sites


def planned_sites(model: nn.Module) -> list[ActivationSite]:
    """Describe the sites that :func:`isolated_sites` would find; the model is not touched."""
    return _plan(unwrap(model)).sites


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


# What a forward does, in order, as far as it matters here.
@dataclass(frozen=True)
class _ModuleCall:
    target: str  # relative to the module whose forward it is


@dataclass(frozen=True)
class _ChannelAxis:
    axis: Literal[1, -1]


_Call = _ModuleCall | _ChannelAxis


@dataclass
class _Plan:
    sites: list[ActivationSite] = field(default_factory=list)
    edits: list[Callable[[], None]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)


def _plan(model: nn.Module) -> _Plan:
    return _Planner().plan(model)


class _Planner:
    """Walk the modules in execution order and note the sites, and the edits that would isolate them."""

    def __init__(self) -> None:
        self._plan = _Plan()
        self._visited: set[nn.Module] = set()
        self._axis: Literal[1, -1] = 1

    def plan(self, model: nn.Module) -> _Plan:
        self._walk(model, "")
        return self._plan

    def _walk(self, module: nn.Module, name: str) -> None:
        self._visited.add(module)
        self._note_axis(module)
        if _permutes(module) or (not module._modules and type(module).__module__.startswith("torch.nn.")):
            return  # a norm, or a built-in layer; its rectifier, if it is one, was the caller's site
        if isinstance(module, nn.TransformerEncoderLayer):
            self._plan.left_alone[name] = "in eval mode it takes a fused path that does not call its activation"
            return
        added: dict[str, nn.Module] = {}
        seen: set[str] = set()
        for call in self._calls(module, name, added):
            if isinstance(call, _ChannelAxis):
                self._axis = call.axis
            elif call.target not in seen:
                seen.add(call.target)
                self._visit(module, name, call.target, added)
        for target, _ in list(module.named_children()):  # those that something else than this forward calls
            if target not in seen and not any(other.startswith(f"{target}.") for other in seen):
                self._visit(module, name, target, added)

    def _visit(self, parent: nn.Module, parent_name: str, target: str, added: dict[str, nn.Module]) -> None:
        """Note a site, or walk into a child; ``added`` holds the activations that an edit is going to add."""
        name = f"{parent_name}.{target}" if parent_name else target
        child = added[target] if target in added else parent.get_submodule(target)
        if not isinstance(child, RECTIFIERS):
            if child not in self._visited and not isinstance(child, Metric | torch.jit.ScriptModule):
                self._walk(child, name)
            return
        if child in self._visited:  # one object under two names: each name gets its own, parameters stay shared
            child = _copy_activation(child)
            self._plan.edits.append(_Replace(parent, target, child))
        self._visited.add(child)
        self._plan.sites.append(ActivationSite(name, child, self._axis))

    def _note_axis(self, module: nn.Module) -> None:
        for axis, classes in _CHANNEL_AXIS.items():
            if isinstance(module, classes) and not _permutes(module):
                self._axis = axis

    def _calls(self, module: nn.Module, name: str, added: dict[str, nn.Module]) -> Sequence[_Call]:
        """Return what the forward of a module calls, in order; plan its rewriting where that is needed."""
        recorded = recorded_forward(module)
        if recorded is not None:
            return recorded.calls
        if type(module).forward in _CONTAINER_FORWARDS:
            return [_ModuleCall(target) for target in module._modules if module._modules[target] is not None]
        try:
            plainest, *others = variants(module)
            recording = trace_forward(module, plainest)
            first = _Rewriting(module, recording.graph)
            recordings = {plainest: recording}
            rewritings = [first]
            for variant in others if first.added else ():
                recorded_too = _trace_optional(module, variant)
                if recorded_too is None:
                    continue
                rewriting = _Rewriting(module, recorded_too.graph)
                if rewriting.description == first.description:
                    recordings[variant] = recorded_too
                    rewritings.append(rewriting)
                elif not variant[1]:
                    raise UntraceableError("it calls other activations in train mode than in eval mode")
        except UntraceableError as error:
            if _seems_to_call_a_rectifier(module):
                self._plan.left_alone[name] = str(error)
            return []
        if first.unsupported:
            self._plan.left_alone[name] = first.unsupported[0]
        for rewriting in rewritings:
            rewriting.apply()
        calls = tuple(_read_calls(recording.graph))
        if first.added:
            added.update(first.added)
            self._plan.edits.append(_Rewrite(module, recordings, calls, first.added))
        return calls


def _trace_optional(module: nn.Module, variant: Variant) -> Recording | None:
    """Record a variant; one with optional arguments may be impossible, one in the other mode must not."""
    try:
        return trace_forward(module, variant)
    except UntraceableError:
        if not variant[1]:
            raise
        return None


class _Rewriting:
    """What would change in one recorded forward so that every rectifier call has its own module."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.added: dict[str, nn.Module] = {}
        self.unsupported: list[str] = []
        self._targets: dict[fx.Node, str] = {}
        called: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                activation = module.get_submodule(node.target)
                if not isinstance(activation, RECTIFIERS):
                    continue
                called[node.target] = called.get(node.target, 0) + 1
                if called[node.target] == 1:
                    continue
                if _has_own_parameters(activation):
                    self.unsupported.append(
                        f"`{node.target}` has a parameter and is called several times; its calls count as one"
                    )
                    continue
                self._add(module, node, str(node.target).replace(".", "_"), _copy_activation(activation))
            elif _is_function(node, _UNSUPPORTED_FUNCTIONS):
                self.unsupported.append(f"the function `{node.target.__name__}` has no module form")
            else:
                self._add_function(module, node)

    @property
    def description(self) -> list[tuple[str, str]]:
        """The added activations; a mode's graph has to agree with the other's."""
        return [(name, repr(activation)) for name, activation in self.added.items()]

    def apply(self) -> None:
        for node, target in self._targets.items():
            with node.graph.inserting_before(node):  # the input is read now: it may have been replaced itself
                call = node.graph.call_module(target, (input_of(node),))
            node.replace_all_uses_with(call)
            node.graph.erase_node(node)

    def _add(self, module: nn.Module, node: fx.Node, base: str, activation: nn.Module) -> None:
        taken = (*self.added, *dir(module))
        name = next(name for name in _numbered(base) if name not in taken)
        activation.training = module.training
        self.added[name] = activation
        self._targets[node] = name

    def _add_function(self, module: nn.Module, node: fx.Node) -> None:
        signature = _rectifier_signature(node)
        if signature is None:
            return
        cls, names, options = signature
        values = dict(zip(("input", *names), node.args, strict=False)) | dict(node.kwargs)
        del values["input"]
        if any(isinstance(value, fx.Node) for value in values.values()):
            raise UntraceableError(f"it computes an argument of `{node.target}`")
        base = cls.__name__.lower() if cls is not nn.LeakyReLU else "leaky_relu"
        self._add(module, node, base, cls(**values, **options))


@dataclass(frozen=True)
class _Replace:
    """An edit: another module under an existing name."""

    parent: nn.Module
    target: str
    child: nn.Module

    def __call__(self) -> None:
        self.parent.set_submodule(self.target, self.child)


@dataclass(frozen=True)
class _Rewrite:
    """An edit: activations of its own and a recorded forward for one module."""

    module: nn.Module
    recordings: dict[Variant, Recording]
    calls: tuple[_Call, ...]
    added: dict[str, nn.Module]

    def __call__(self) -> None:
        for name, activation in self.added.items():
            self.module.add_module(name, activation)
        targets = (call.target for call in self.calls if isinstance(call, _ModuleCall))
        called = {target: self.module.get_submodule(target) for target in targets}
        activations = {target: type(child) for target, child in called.items() if isinstance(child, RECTIFIERS)}
        forward = RecordedForward(self.module, self.recordings, self.calls, activations)
        self.module.__dict__["forward"] = forward


def _is_function(node: fx.Node, functions: Iterable[Any]) -> bool:
    return node.op == "call_function" and any(node.target is function for function in functions)


def _rectifier_signature(node: fx.Node) -> tuple[type[nn.Module], tuple[str, ...], dict[str, bool]] | None:
    """Class, names of the arguments behind the input, and fixed options of a functional rectifier call."""
    if node.op == "call_method" and node.target in _METHODS:
        cls, inplace = _METHODS[str(node.target)]
        return cls, (), {"inplace": inplace}
    for table, options in ((_FUNCTIONS, {}), (_IN_PLACE_FUNCTIONS, {"inplace": True})):
        for function in table:
            if _is_function(node, (function,)):
                return *table[function], options
    return None


def _read_calls(graph: fx.Graph) -> Sequence[_Call]:
    calls: list[_Call] = []
    for node in graph.nodes:
        if node.op == "call_module":
            calls.append(_ModuleCall(str(node.target)))
        elif node.op == "call_method" and node.target in ("matmul", "bmm"):
            calls.append(_ChannelAxis(-1))
        elif node.op == "call_function":
            calls += [_ChannelAxis(axis) for function, axis in _CHANNEL_AXIS_OF_FUNCTION.items()
                      if node.target is function]  # fmt: skip
    return calls


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


def _permutes(module: nn.Module) -> bool:
    """Tell a LayerNorm that works on channels in axis 1 (torchvision's and timm's LayerNorm2d) from a plain one."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward


def _has_own_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _seems_to_call_a_rectifier(module: nn.Module) -> bool:
    """Tell whether a forward that can't be traced is likely to call a functional rectifier."""
    functions = [vars(module).get(name) for name in vars(module)]
    if any(value is function for value in functions for function in (*_FUNCTIONS, *_IN_PLACE_FUNCTIONS)):
        return True
    code = getattr(type(module).forward, "__code__", None)
    names = _names_in(code) if isinstance(code, types.CodeType) else set()
    return bool((names & _FUNCTION_NAMES) - set(module._modules))


def _names_in(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names_in(constant) for constant in inner))
