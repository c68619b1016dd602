"""Watch what a forward reads from Python while it is traced, and refuse what it writes.

A recording holds the values that its forward read from attributes. Each of them becomes a *guard*: where one has
changed since, the recording no longer speaks for the forward. What can't be guarded is refused.
"""

import enum
import functools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Guard = tuple[nn.Module, str, str, Any]
"""A module, the name of an attribute, how it is compared, and what it was."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, enum.Enum)
_BY_IDENTITY = (
    FunctionType, BuiltinFunctionType, MethodType, ModuleType, functools.partial, type, Tensor, nn.Module,
)  # fmt: skip
_CONTAINERS = (list, tuple, set, dict)
_KEYED = ("_modules", "_parameters", "_buffers")
_ON_A_CLASS = (*_PLAIN, *_CONTAINERS, FunctionType, BuiltinFunctionType, type, property, staticmethod, classmethod)
_INTERNAL = frozenset(vars(nn.Module())) - {"training", *_KEYED} | {"forward"}
_OWN_FRAMES = (
    "torch.fx", "torch.nn.modules.module", "torch._", "torch.overrides", "contextlib", "lightning_easier.sites.tracing",
    "lightning_easier.sites.watching",
)  # fmt: skip
_OF_EVERY_MODULE = frozenset(dir(nn.Module()))
_MISSING = object()
_INDEXED = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class UntraceableError(Exception):
    """A forward that can't be recorded without losing something; the message is the reason."""


def is_user_frame(depth: int) -> bool:
    """Tell whether the code that many frames up is a forward's, rather than the tracer's or the module system's."""
    name = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return not name.startswith(_OWN_FRAMES)


def is_foreign_frame(depth: int) -> bool:
    """Tell whether the code that many frames up is neither torch's, nor Python's, nor ours."""
    package = sys._getframe(depth + 1).f_globals.get("__name__", "").partition(".")[0]
    return package not in ("torch", "lightning_easier") and package not in sys.stdlib_module_names


class Tracer(Protocol):
    """What is told of the calls of modules, and of what is read of them that ``vars`` do not hold."""

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what the reader of an attribute gets."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the caller of a module gets."""


class _Now:
    """Who listens to the hooks: nobody, most of the time.

    Attributes:
        watch: What is told of what is read and written.
        tracer: What is told of calls, and of what is read of parameters, buffers and children.
        cache: Of that tracer.
        of_tracer: The hooks that tell it.
        replaced: Name -> the method of all modules that a hook has taken the place of; none where there are no hooks.
        depth: How many contexts there are that keep the hooks.
    """

    watch: "Watch | None" = None
    tracer: Tracer | None = None
    cache: dict[str, Any] = {}  # noqa: RUF012
    of_tracer: tuple[Any, ...] = ()
    replaced: dict[str, Any] = {}  # noqa: RUF012
    depth = 0


_now = _Now()


def _getattribute(module: nn.Module, name: str) -> Any:
    watch = _now.watch
    if watch is None:
        return object.__getattribute__(module, name)
    try:
        value = object.__getattribute__(module, name)
    except AttributeError:  # a child, a parameter or a buffer, or nothing
        if is_user_frame(1):
            value = watch.kept_aside(module, name)
            if value is not _MISSING:
                return value
            watch.miss(module, name)
        raise
    return watch.read(module, name, value) if name != "__class__" and is_user_frame(1) else value


@contextmanager
def hooked() -> Iterator[None]:
    """Keep the hooks, once a trace needs them, for all others in this context.

    torch has hundreds of classes of modules, torchvision, timm and torchmetrics a thousand more: each time that a
    method of all of them changes, Python looks through them. Between traces the hooks tell nobody anything.
    """
    _now.depth += 1
    try:
        yield
    finally:
        _now.depth -= 1
        if not _now.depth:
            _take_hooks_away()


def _hook() -> None:
    """Have modules tell what is asked of them, if they do not yet."""
    if _now.replaced:
        return
    replaced: dict[str, Any] = {name: vars(nn.Module)[name] for name in ("__setattr__", "__getattr__", "__call__")}
    set_attribute, get_missing, call = replaced.values()

    def setattribute(module: nn.Module, name: str, value: Any) -> None:
        watch = _now.watch
        if watch is not None:
            constructing = sys._getframe(1).f_code.co_name == "__init__"  # a module that is made in the forward
            if not constructing and is_user_frame(1) and watch.write(module, name, value):
                return
        set_attribute(module, name, value)

    def getmissing(module: nn.Module, name: str) -> Any:
        value = get_missing(module, name)
        tracer = _now.tracer
        return value if tracer is None else tracer.getattr(name, value, _now.cache)

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = _now.tracer
        if tracer is None:
            return call(module, *args, **kwargs)
        return tracer.call_module(module, functools.partial(call, module), args, kwargs)

    _now.replaced, _now.of_tracer = replaced, (getmissing, called)
    hooks = (_getattribute, setattribute, getmissing, called)
    for name, hook in zip(("__getattribute__", *replaced), hooks, strict=True):
        setattr(nn.Module, name, hook)


def _take_hooks_away() -> None:
    if _now.replaced:
        del nn.Module.__getattribute__
        for name, original in _now.replaced.items():
            setattr(nn.Module, name, original)
        _now.replaced, _now.of_tracer = {}, ()


@contextmanager
def heard_by(tracer: Tracer) -> Iterator[None]:
    """Have the hooks tell a tracer of ``torch.fx`` what its own patches of modules would tell it."""
    before = _now.tracer, _now.cache
    _now.tracer, _now.cache = tracer, {}
    _say_patched(False)  # another trace, inside the forward, has patches of its own
    try:
        yield
    finally:
        _now.tracer, _now.cache = before


@contextmanager
def in_the_place_of_patches() -> Iterator[None]:
    """Have ``torch.fx`` take the hooks for its own patches; where it does not, these go over the hooks."""
    _say_patched(True)
    try:
        yield
    finally:
        _say_patched(False)


def _say_patched(is_patched: bool) -> None:
    for hook in _now.of_tracer:
        setattr(hook, "__fx_already_patched", is_patched)  # in a class, Python would mangle the name


class Watch:
    """Note the attributes that are read in this context on any module, and refuse to write any.

    Args:
        root: The module that is traced.
        training: What ``training`` is to be for every module.

    Attributes:
        reads_training: Whether the mode was asked for.
    """

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.reads_training = False
        self._root = root
        self._training = training
        self._guards: dict[tuple[int, str], Guard] = {}
        self._containers: dict[int, tuple[str, Any, Any]] = {}

    def __enter__(self) -> "Watch":
        self._hooks = hooked()
        self._hooks.__enter__()
        _hook()
        self._outside, _now.watch = _now.watch, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _now.watch = self._outside
        self._hooks.__exit__(kind, error, traceback)

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Note a read; return what the reader gets."""
        if name[:2] == "__":
            return value
        if name == "training":
            self.reads_training = True
            if module is not self._root:
                self._note(module, name, "value", self._training)
            return self._training
        if name in _INTERNAL:
            return value
        if name in _KEYED:
            self._note(module, name, "keys", tuple(value))
        elif name in vars(module):
            self._note(module, name, *_snapshot(name, value))
            if isinstance(value, _CONTAINERS) and id(value) not in self._containers:
                self._containers[id(value)] = (name, value, copy(value))
        elif isinstance(value, _PLAIN) and isinstance(getattr(type(module), name, None), _PLAIN):
            self._note(module, name, "value", value)
        return value

    def miss(self, module: nn.Module, name: str) -> None:
        """Note that an attribute was asked for which is none of the module's own or its class's."""

    def write(self, module: nn.Module, name: str, value: Any) -> bool:
        """Refuse a write; true would say that it was taken care of."""
        raise UntraceableError(f"its forward changes `self.{name}`")

    def kept_aside(self, module: nn.Module, name: str) -> Any:
        """Return what the forward has written under a name that was not there before."""
        return _MISSING

    def _note(self, module: nn.Module, name: str, how: str, value: Any) -> None:
        self._guards.setdefault((id(module), name), (module, name, how, value))

    def guards(self) -> list[Guard]:
        """What was read."""
        return list(self._guards.values())

    def undo(self) -> list[str]:
        """Put back the contents of containers that were read; name those that had changed."""
        changed = []
        for name, container, before in self._containers.values():
            if not same_items(container, before):
                changed.append(name)
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        return changed


class LooseWatch(Watch):
    """For a look only: what is written is kept aside, and every attribute may be read.

    Attributes:
        asked: The modules that were asked for attributes, each with the names.
        looked_into: The modules other than the root that somebody else asked for what not every module has, or, of a
            container, for its children; each with who asked: modules whose methods did, or else the root.
        asks_for_more: Whether the forward may know more of a module than its class, its attributes that were asked for,
            and which children, parameters and buffers it has.
    """

    def __init__(self, root: nn.Module, training: bool = False) -> None:
        super().__init__(root, training)
        self._written: dict[tuple[int, str], Any] = {}
        self.asked: dict[nn.Module, set[str]] = {}
        self.looked_into: dict[nn.Module, set[nn.Module]] = {}
        self.asks_for_more = False

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Return what was written, or else what is there."""
        self.asks_for_more |= name[:2] == "__" or _tells_more(module, name)
        if name[:2] == "__":
            return value
        if name == "training":
            return self._training
        self.miss(module, name)
        if name in vars(module) and name not in _INTERNAL:
            _snapshot(name, value)  # what can't be watched is not touched either
        if isinstance(value, _CONTAINERS) and name not in _INTERNAL and name not in _KEYED:
            self._containers.setdefault(id(value), (name, value, copy(value)))
        return self._written.get((id(module), name), value)

    def miss(self, module: nn.Module, name: str) -> None:
        """Note what was asked for."""
        self.asked.setdefault(module, set()).add(name)
        is_own = name not in _OF_EVERY_MODULE or (name == "_modules" and isinstance(module, _INDEXED))
        if module is not self._root and is_own:
            asker = _asker(module, self._root)
            if asker is not module:
                self.looked_into.setdefault(module, set()).add(asker)

    def write(self, module: nn.Module, name: str, value: Any) -> bool:
        """Keep the value aside."""
        self._written[id(module), name] = value
        return True

    def kept_aside(self, module: nn.Module, name: str) -> Any:
        """Return what the forward has written under a name that was not there before."""
        return self._written.get((id(module), name), _MISSING)


def _asker(module: nn.Module, root: nn.Module) -> nn.Module:
    """Return the module whose method reads an attribute of one: itself, around its forward for example, or another.

    A container's own methods stand for who calls them, by an index or in a loop.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    while frame.f_back is not None and _is_container_protocol(frame, module):
        frame = frame.f_back
    first = _first_argument(frame)
    return first if isinstance(first, nn.Module) else root


def _first_argument(frame: FrameType) -> Any:
    first = frame.f_code.co_varnames[:1]
    return frame.f_locals.get(first[0]) if first else None


def _is_container_protocol(frame: FrameType, module: nn.Module) -> bool:
    """Tell whether a frame is a method of torch's containers other than a forward, called on a module."""
    is_of_container = frame.f_globals.get("__name__") == nn.Sequential.__module__
    return is_of_container and frame.f_code.co_name != "forward" and _first_argument(frame) is module


def _tells_more(module: nn.Module, name: str) -> bool:
    """Tell whether an attribute opens others, as the method ``parameters`` does, or is kept in a place of its own."""
    if name in vars(module):
        return name not in ("training", "_modules") and (name in _INTERNAL or name in _KEYED)
    owner = next((cls for cls in type(module).__mro__ if name in vars(cls)), nn.Module)
    return owner is nn.Module or not isinstance(vars(owner)[name], _ON_A_CLASS)


def has_alike(first: nn.Module, second: nn.Module, name: str) -> bool:
    """Tell whether two modules have the same attribute under a name: an equal value, or the same object.

    Of a child, a parameter or a buffer it only matters whether there is one.
    """
    own, other = vars(first), vars(second)
    for kind in _KEYED:
        if (name in own[kind], own[kind].get(name) is None) != (name in other[kind], other[kind].get(name) is None):
            return False
    if name not in own or name not in other or name == "_modules":
        return (name in own) == (name in other)
    a, b = own[name], other[name]
    if not isinstance(a, _CONTAINERS):
        return _is_equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(_is_equal, _items(a), _items(b)))


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _is_equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))


def holds(guard: Guard) -> bool:
    """Tell whether an attribute still is what it was when a forward read it."""
    module, name, how, expected = guard
    own = vars(module)
    value: Any = own[name] if name in own else getattr(type(module), name, _MISSING)
    if how == "keys":
        return tuple(value) == expected
    if how == "value":
        return type(value) is type(expected) and bool(value == expected)
    if how == "items":
        return isinstance(value, _CONTAINERS) and same_items(value, expected)
    if how == "vars":
        return _plain_vars(value) == expected
    return value is expected


def _snapshot(name: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, _PLAIN):
        return "value", value
    if isinstance(value, _CONTAINERS):
        return "items", copy(value)
    if isinstance(value, _BY_IDENTITY):
        return "is", value
    if name in ("_trainer", "_fabric") or isinstance(value, random.Random) or not hasattr(value, "__dict__"):
        raise UntraceableError(f"it reads `self.{name}`, a {type(value).__name__} that can't be watched for changes")
    return "vars", _plain_vars(value)


def _plain_vars(value: Any) -> dict[str, Any]:
    return {key: item for key, item in getattr(value, "__dict__", {}).items() if isinstance(item, _PLAIN)}


def same_items(a: Any, b: Any) -> bool:
    """Compare containers item by item: plain ones by value, others (a tensor, a proxy) by identity."""
    if type(a) is not type(b) or len(a) != len(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, set):
        return {id(item) for item in a} == {id(item) for item in b}
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and bool(a == b))
