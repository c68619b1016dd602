"""A module's forward, compiled from recordings, in the place of its class's own.

What is read from ``self.training`` is kept: both modes are recorded and the module's own flag chooses. So are optional
arguments: a forward is recorded with and without each. What it read from other attributes is guarded: where one has
changed since, the class's own forward runs.
"""

import inspect
import linecache
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

from torch import fx, nn

from lightning_easier.sites.watching import Guard, holds

Variant = tuple[bool, tuple[str, ...]]
"""What a recording is for: the training mode, and the optional arguments that are given (the rest at their default)."""


@dataclass(frozen=True)
class Recording:
    """A recorded forward.

    Attributes:
        graph: What it does.
        guards: The attributes that it read, with the values they had.
        reads_training: Whether it asked for the mode; if not, it does the same in the other.
    """

    graph: fx.Graph
    guards: list[Guard]
    reads_training: bool


class RecordedForward:
    """A module's forward, compiled from recordings; the module's mode and the arguments given choose among them.

    It lives in the module's ``__dict__`` as ``forward``. It can be deep-copied and pickled with the module: what is
    stored is source code and the names it needs.

    A call that no recording covers runs the class's own forward, as long as its activations are what they were.

    Args:
        module: The module it belongs to.
        recordings: By variant.
        steps: What the plainest recording does, for whoever asks later (a recording isn't traced again).
        activations: The classes of the activation modules that the recordings call, by name within the module.
        added: Names of those children that the recordings call and the class's own forward does not.
        gates: The gates that were given a module of their own, besides the rectifiers.
    """

    def __init__(
        self,
        module: nn.Module,
        recordings: Mapping[Variant, Recording],
        steps: tuple[Any, ...],
        activations: Mapping[str, type[nn.Module]],
        added: Iterable[str],
        gates: frozenset[str],
    ) -> None:
        self.module = module
        self.steps = steps
        self.activations = dict(activations)
        self.added = tuple(added)
        self.gates = gates
        self.iterates_children = False  # the class's own forward would call the added ones too
        self._guards: dict[Variant, list[Guard]] = {}
        self._sources: dict[Variant, tuple[str, dict[str, Any]]] = {}
        for variant, recording in recordings.items():
            self._guards[variant] = [
                guard for guard in recording.guards if guard[2] != "keys" or guard[0] is not module
            ]
            self.iterates_children |= len(self._guards[variant]) < len(recording.guards)
            code = recording.graph.python_code("self")
            self._sources[variant] = (code.src, dict(code.globals))
        self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the recording for the module's mode and these arguments."""
        given = self._given(args, kwargs) if self._defaults else ()
        variant = (self.module.training, given)
        function = self._functions.get(variant)
        if function is None:
            return self._call_original(f"the default of {list(given)}", args, kwargs)
        changed = [guard[1] for guard in self._guards[variant] if not holds(guard)]
        if changed:
            return self._call_original(f"its attributes {changed} as they were", args, kwargs)
        for value in args[: self._required]:
            if value is None:  # a recording takes what is required for a value
                return self._call_original("a value for each argument", args, kwargs)
        return function(self.module, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """The code of the class's own forward, whose place in the source torch.export asks for."""
        return type(self.module).forward.__code__

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Name the optional arguments that are not at their default."""
        # of one length: dynamo of torch 2.6 takes `strict=False` for true
        values = dict(zip(self._names[: len(args)], args, strict=False))
        values.update(kwargs)
        return tuple(
            name for name, default in self._defaults.items() if name in values and not _same(values[name], default)
        )

    def _call_original(self, wanted: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.iterates_children:
            raise RuntimeError(
                f"Expected {type(self.module).__name__}.forward to be called with {wanted}: it iterates over its "
                f"children, {list(self.added)} among them by now, and no recording covers this call."
            )
        for name, cls in self.activations.items():
            if type(self.module.get_submodule(name)) is not cls:
                raise RuntimeError(
                    f"Expected {type(self.module).__name__}.forward to be called with {wanted}: its activation "
                    f"`{name}` was replaced, and no recording covers this call. Restore the activation, or exclude "
                    f"it from pruning."
                )
        return type(self.module).forward(self.module, *args, **kwargs)

    def _compile(self) -> None:
        forward = inspect.signature(type(self.module).forward)
        parameters = list(forward.parameters.values())[1:]
        # inspect.signature, torch.export and keyword calls see the user's own signature
        self.__signature__ = forward.replace(parameters=parameters)
        self._names = [parameter.name for parameter in parameters]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._required = sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters)
        self._functions: dict[Variant, Callable[..., Any]] = {}
        for variant, (source, names) in self._sources.items():
            file = f"<{type(self.module).__name__}.forward recorded by lightning_easier, {hash(source):x}>"
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
            namespace = dict(names)
            exec(compile(source, file, "exec"), namespace)
            self._functions[variant] = namespace["forward"]

    def __getstate__(self) -> dict[str, Any]:
        plain = ("module", "steps", "activations", "added", "gates", "iterates_children", "_guards")
        state = {key: vars(self)[key] for key in plain}
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


def recorded_forward(module: nn.Module) -> RecordedForward | None:
    """Return the recorded forward of a module, or None where its class's own is in force."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, RecordedForward) else None


def forward_was_replaced(module: nn.Module) -> bool:
    """Tell whether an instance has a forward that is neither its class's own nor a recording.

    Lightning leaves the class's own on the instance when a strategy has redirected it for a step.
    """
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, RecordedForward):
        return False
    is_own = getattr(forward, "__self__", None) is module
    return not (is_own and getattr(forward, "__func__", None) is type(module).forward)


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and bool(value == default))


class _ModuleName(str):
    """A Python module by name, since modules can't be pickled."""

    __slots__ = ()
