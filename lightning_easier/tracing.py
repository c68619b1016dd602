"""Look at one module's forward at a time, its children as leaves, and give it another forward where that is needed.

Tracing one forward is far sturdier than tracing a network: whatever the children do stays out of sight. What is read
is the order of calls; what is written, only where asked for, is an instance attribute ``forward`` compiled from the
traced graph, so the module keeps its class, its parameters and its place in the tree.

A traced forward is a recording. What a recording would lose is refused here instead, with the reason: control flow
that depends on the data, attributes assigned in the forward, constants made on the fly, a changed autograd or autocast
mode. What is read from ``self.training`` is kept: both modes are recorded and the module's own flag chooses. So are
optional arguments: a forward is recorded with and without each.
"""

import inspect
import linecache
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import combinations
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import fx, nn

_MAX_OPTIONAL_ARGUMENTS = 3  # recordings double with each


class UntraceableError(Exception):
    """A forward that can't be recorded without losing something; the message is the reason."""


class _ForwardTracer(fx.Tracer):
    """Record one forward, every child a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self._modes = _modes()
        return super().trace(root, concrete_args)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise UntraceableError("it changes the autograd or autocast mode inside its forward")
        return super().create_node(kind, *args, **kwargs)


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
    )


Variant = tuple[bool, tuple[str, ...]]
"""What a recording is for: the training mode, and the optional arguments that are given (the rest at their default)."""


def variants(module: nn.Module) -> list[Variant]:
    """List the ways to call a module's forward that are worth recording, the plainest one first.

    Raises:
        UntraceableError: If the forward takes a variable number of arguments.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise UntraceableError("its forward takes a variable number of arguments")
    # An argument with the default None is a tensor when given; of any other default, other values can't be foreseen.
    optional = [parameter.name for parameter in parameters if parameter.default is None][:_MAX_OPTIONAL_ARGUMENTS]
    given = [names for size in range(len(optional) + 1) for names in combinations(optional, size)]
    return [(training, names) for names in given for training in (module.training, not module.training)]


def trace_forward(module: nn.Module, variant: Variant) -> fx.Graph:
    """Record ``type(module).forward`` with all children as leaves; the module is as before afterwards.

    Args:
        module: The module whose forward is looked at.
        variant: The training mode and the optional arguments to record it for, one of :func:`variants`.

    Raises:
        UntraceableError: With the reason, when a recording would not be faithful.
    """
    training, given = variant
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in given}
    before = dict(vars(module)), {name: dict(getattr(module, name)) for name in ("_parameters", "_buffers", "_modules")}
    try:
        module.__dict__["training"] = training
        graph = _ForwardTracer().trace(module, concrete_args=defaults or None)
    except UntraceableError:
        raise
    except Exception as error:  # whatever a user's forward raises on a proxy is the reason
        raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        module.__dict__["training"] = before[0]["training"]
        changed = _undo_changes(module, *before)
    if changed:
        raise UntraceableError(f"its forward assigns `self.{changed[0]}` or makes constant tensors")
    # torch.fx numbers the placeholders of arguments that have a concrete value
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, parameters, strict=True):
        node.target = parameter.name
    return graph


def _undo_changes(module: nn.Module, attributes: dict[str, Any], tables: dict[str, dict[str, Any]]) -> list[str]:
    """Put back what a forward (or the tracer) has set on the module, and name it."""
    changed = []
    for name, value in tables.items():
        table = getattr(module, name)
        if list(table) != list(value) or any(table[key] is not value[key] for key in value):
            changed += [key for key in table if key not in value or table[key] is not value[key]] or [name]
            table.clear()
            table.update(value)
    for key in [k for k in vars(module) if k not in attributes]:
        changed.append(key)
        del module.__dict__[key]
    for key, value in attributes.items():
        if vars(module).get(key) is not value and key != "training":
            changed.append(key)
            module.__dict__[key] = value
    return changed


class RecordedForward:
    """A module's forward, compiled from recordings; the module's mode and the arguments given choose among them.

    It lives in the module's ``__dict__`` as ``forward``. It can be deep-copied and pickled with the module: what is
    stored is source code and the names it needs.

    A call that no recording covers runs the class's own forward, as long as its activations are what they were.

    Args:
        module: The module it belongs to.
        graphs: The recorded graph by variant.
        calls: What the module calls, in order, for whoever asks later (a recording isn't traced again).
        activations: The classes of the activation modules that the recordings call, by name within the module.
    """

    def __init__(
        self,
        module: nn.Module,
        graphs: Mapping[Variant, fx.Graph],
        calls: tuple[Any, ...],
        activations: Mapping[str, type[nn.Module]],
    ) -> None:
        self.module = module
        self.calls = calls
        self.activations = dict(activations)
        self._sources: dict[Variant, tuple[str, dict[str, Any]]] = {}
        for variant, graph in graphs.items():
            code = graph.python_code("self")
            self._sources[variant] = (code.src, dict(code.globals))
        self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the recording for the module's mode and these arguments."""
        given = self._given(args, kwargs) if self._defaults else ()
        function = self._functions.get((self.module.training, given))
        if function is None:
            return self._call_original(given, args, kwargs)
        return function(self.module, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """The code of the class's own forward, whose place in the source torch.export asks for."""
        return type(self.module).forward.__code__

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        values = dict(zip(self._names, args, strict=False))
        values.update(kwargs)
        return tuple(
            name for name, default in self._defaults.items() if name in values and not _same(values[name], default)
        )

    def _call_original(self, given: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name, cls in self.activations.items():
            if type(self.module.get_submodule(name)) is not cls:
                raise RuntimeError(
                    f"Expected {type(self.module).__name__}.forward to be called with the default of {list(given)}, "
                    f"since its activation `{name}` was replaced and no recording covers these arguments. Restore the "
                    f"activation, or exclude it from pruning."
                )
        return type(self.module).forward(self.module, *args, **kwargs)

    def _compile(self) -> None:
        forward = inspect.signature(type(self.module).forward)
        parameters = list(forward.parameters.values())[1:]
        # inspect.signature, torch.export and keyword calls see the user's own signature
        self.__signature__ = forward.replace(parameters=parameters)
        self._names = [parameter.name for parameter in parameters]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._functions: dict[Variant, Callable[..., Any]] = {}
        for variant, (source, names) in self._sources.items():
            file = f"<{type(self.module).__name__}.forward recorded by lightning_easier, {hash(source):x}>"
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
            namespace = dict(names)
            exec(compile(source, file, "exec"), namespace)
            self._functions[variant] = namespace["forward"]

    def __getstate__(self) -> dict[str, Any]:
        state = {key: vars(self)[key] for key in ("module", "calls", "activations")}
        state["_sources"] = {
            variant: (
                source,
                {key: _ModuleName(v.__name__) if isinstance(v, ModuleType) else v for key, v in names.items()},
            )
            for variant, (source, names) in self._sources.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._sources = {
            variant: (source, {k: import_module(v) if isinstance(v, _ModuleName) else v for k, v in names.items()})
            for variant, (source, names) in self._sources.items()
        }
        self._compile()


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and bool(value == default))


class _ModuleName(str):
    """A Python module by name, since modules can't be pickled."""

    __slots__ = ()


def recorded_forward(module: nn.Module) -> RecordedForward | None:
    """Return the recorded forward of a module, or None where its class's own is in force."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, RecordedForward) else None
