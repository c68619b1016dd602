"""Look at one module's forward at a time, its children as leaves.

Tracing one forward is far sturdier than tracing a network: whatever the children do stays out of sight.

A traced forward is a recording (see :mod:`lightning_easier.sites.recording`). What a recording would lose is refused
here instead, with the reason: control flow that depends on the data, on its type or on chance, state that the forward
changes, constants made on the fly, a changed autograd or autocast mode.
"""

import inspect
import operator
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import wraps
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from lightning_easier.sites.bytecode import ExecutedCode, why_unfaithful
from lightning_easier.sites.recording import Recording, Variant, forward_was_replaced
from lightning_easier.sites.watching import (
    LooseWatch,
    UntraceableError,
    Watch,
    has_alike,
    heard_by,
    in_the_place_of_patches,
    is_foreign_frame,
    same_items,
)

_MAX_OPTIONAL_ARGUMENTS = 3  # recordings double with each
_MOST_KINDS = 16  # of one class that a forward is compared with, so that many that differ don't take their square


class InPlaceProxy(fx.Proxy):
    """A proxy on which ``x += y`` and ``x[i] = y`` stay in place.

    torch.fx would record ``x = x + y``, unseen by other names of x, and refuse the second.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if is_foreign_frame(1):
            raise UntraceableError(f"it sets the attribute `{name}` of a value")
        super().__setattr__(name, value)

    def __getattr__(self, k: str) -> Attribute:
        return _InPlaceAttribute(self, k)


class _InPlaceAttribute(Attribute, InPlaceProxy):
    """An attribute of a value that may be another view of it: ``x.mT``."""


class RecordingProxy(InPlaceProxy):
    """A proxy that notices when it is asked for its type."""

    @property
    def __class__(self) -> type:
        if is_foreign_frame(1):
            self.tracer.asks_for_type = True  # type: ignore[attr-defined]
        return RecordingProxy

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("A proxy keeps its class")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    operation = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand", "ior", "ixor", "ipow", "imatmul"):
    setattr(InPlaceProxy, f"__{_name}__", _in_place(_name))


def _set_item(self: fx.Proxy, key: Any, value: Any) -> None:
    self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


setattr(InPlaceProxy, "__setitem__", _set_item)  # noqa: B010  # as above


class _ForwardTracer(fx.Tracer):
    """Record one forward, every child a leaf."""

    # A buffer is read when the forward runs, like a parameter.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.asks_for_type = False
        self.refusals: list[str] = []  # a forward may swallow an exception

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return RecordingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self._modes = modes()
        # A child under several names is read as another object under each, to tell which name a call goes by.
        names = Counter(root._modules.values())
        self._aliases = {name: copy(child) for name, child in root._modules.items() if names[child] > 1}
        with in_the_place_of_patches():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        return self._heard(function), arguments

    def _heard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def heard(*args: Any) -> Any:
            with heard_by(self):
                return function(*args)

        return heard

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        self._check_modes()
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            self._refuse(f"it makes a {type(a).__name__}, which a recording would make a dict")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refusals.append("its control flow depends on a value")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except Exception:
            self.refusals.append("it iterates over a value")
            raise

    def _refuse(self, reason: str) -> None:
        raise UntraceableError(reason)

    def _check_modes(self) -> None:
        if modes() != self._modes:
            self._refuse("it changes the autograd or autocast mode inside its forward")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if attr in self._aliases and self.root._modules[attr] is attr_val:
            return self._aliases[attr]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        if mod is self.root:
            self._refuse("it calls itself")
        alias = next((name for name, child in self._aliases.items() if child is mod), None)
        return super().path_of_module(mod) if alias is None else alias


class _Reader(_ForwardTracer):
    """Record a forward to look at only: with its required arguments (or its first), in whatever mode."""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names = [p.name for p in named if p.default is p.empty] or [p.name for p in named[:1]]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(module: nn.Module, *values: Any) -> Any:
            return root_fn(module, **dict(zip(names, values, strict=True)))

        return self._heard(call), [self.root, *proxies]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(dict(a) if isinstance(a, dict) else a)

    def _check_modes(self) -> None:
        pass


def modes() -> tuple[int, ...]:
    """Return what is set of autograd and autocast, and how many contexts of autocast are entered.

    One that turns off what is off already, or that is of another device, shows only there.
    """
    devices = ("cpu", "cuda")
    entered = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        entered,
    )


def variants(module: nn.Module) -> list[Variant]:
    """List the ways to call a module's forward that are worth recording, the plainest one in eval mode first.

    Raises:
        UntraceableError: If the forward takes a variable number of arguments.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise UntraceableError("its forward takes a variable number of arguments")
    # An argument with the default None is a tensor when given; of any other default, other values can't be foreseen.
    optional = [parameter.name for parameter in parameters if parameter.default is None][:_MAX_OPTIONAL_ARGUMENTS]
    given = [names for size in range(len(optional) + 1) for names in combinations(optional, size)]
    return [(training, names) for names in given for training in (False, True)]


def trace_forward(module: nn.Module, variant: Variant) -> Recording:
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
    if forward_was_replaced(module):
        raise UntraceableError("its forward was replaced on the instance")
    for name, default in defaults.items():
        if not isinstance(default, bool | int | float | str | None) or default != default:
            raise UntraceableError(f"the default of its argument `{name}` is {default!r}")
    recording = _trace(module, training, defaults)
    # torch.fx numbers the placeholders of arguments that have a concrete value
    placeholders = [node for node in recording.graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, parameters, strict=True):
        node.target = parameter.name
    return recording


def read_forward(module: nn.Module) -> fx.Graph | None:
    """Look at a forward that may be too intricate to record faithfully, optional arguments at their defaults.

    Returns:
        What it does in the module's own mode, on one way through its control flow, not fit to be run; None if it can't
        be traced at all.
    """
    return None if forward_was_replaced(module) else _read(module, LooseWatch(module))


def _read(module: nn.Module, watch: LooseWatch) -> fx.Graph | None:
    try:
        with undone(module), chance_restored(), watch:
            return _Reader().trace(module)
    except Exception:  # whatever a user's forward raises on a proxy
        return None
    finally:
        watch.undo()


class Reading:
    """Look at forwards as :func:`read_forward` does, and of those that are alike at the first only.

    Two forwards are alike if their modules are of one class, modules of the same classes are in the same places inside,
    and all that the first asked for while it was traced is the same in the second. Globals and modules have to stay as
    they are: it is good for one look at a model.

    Args:
        training: The mode that all modules are taken to be in.

    Attributes:
        looked_into: The modules that others ask for attributes of their own, or children, each with who asked.
    """

    def __init__(self, training: bool = False) -> None:
        self.looked_into: dict[nn.Module, set[nn.Module]] = {}
        self._training = training
        self._graphs: dict[nn.Module, fx.Graph | None] = {}
        self._known: dict[type[nn.Module], deque[tuple[nn.Module, dict[str, set[str]]]]] = {}
        # of those that others may be alike to: what it looks into, and who asks
        self._parts: dict[nn.Module, list[tuple[str, str]]] = {}

    def read(self, module: nn.Module) -> fx.Graph | None:
        """Return what a module's forward does; None if it can't be traced. The graph may be that of another module."""
        if forward_was_replaced(module):
            return None
        if module not in self._graphs:
            known = self._known.setdefault(type(module), deque(maxlen=_MOST_KINDS))
            alike = next((other for other, asked in known if _is_alike(other, module, asked)), None)
            self._graphs[module] = self._graphs[alike] if alike is not None else self._trace(module)
            if alike is not None:
                for part, asker in self._parts[alike]:
                    self._note(module.get_submodule(part), module.get_submodule(asker))
        return self._graphs[module]

    def _note(self, part: nn.Module, asker: nn.Module) -> None:
        self.looked_into.setdefault(part, set()).add(asker)

    def _trace(self, module: nn.Module) -> fx.Graph | None:
        watch = LooseWatch(module, self._training)
        graph = _read(module, watch)
        pairs = [(part, asker) for part, askers in watch.looked_into.items() for asker in askers]
        for part, asker in pairs:
            self._note(part, asker)
        names = {part: name for name, part in module.named_modules()}
        if not watch.asks_for_more and watch.asked.keys() <= names.keys():
            asked = {names[part]: attributes for part, attributes in watch.asked.items()}
            self._known[type(module)].appendleft((module, asked))
            self._parts[module] = [(names[part], names.get(asker, "")) for part, asker in pairs]
        return graph


def _is_alike(first: nn.Module, second: nn.Module, asked: Mapping[str, Collection[str]]) -> bool:
    """Tell whether two modules of one class look alike to a forward that asks for these attributes of its parts."""
    ours, theirs = (dict(module.named_modules(remove_duplicate=False)) for module in (first, second))
    if ours.keys() != theirs.keys():
        return False
    if not all(has_alike(ours[name], theirs[name], each) for name, attributes in asked.items() for each in attributes):
        return False
    return _layout(ours.values()) == _layout(theirs.values())


def _layout(parts: Iterable[nn.Module]) -> list[tuple[object, ...]]:
    """Describe what each part holds: under which names, of which classes, and where the same as elsewhere."""
    places: dict[object, int] = {}
    described: list[tuple[object, ...]] = []
    for part in parts:
        held: tuple[Mapping[str, Any], ...] = (part._modules, part._parameters, part._buffers)
        described.append((type(part), *(
            (kind, name, type(value), places.setdefault(value, len(places)))
            for kind, values in enumerate(held) for name, value in values.items()
        )))  # fmt: skip
    return described


def is_readable(module: nn.Module) -> bool:
    """Tell whether the data flow through a module's forward can be followed."""
    return type(module).forward is not nn.Module.forward and read_forward(module) is not None


@contextmanager
def undone(module: nn.Module) -> Iterator[list[str]]:
    """Put back what happens to a module's attributes inside this context; afterwards the list names what changed."""
    state = _State(module)
    changed: list[str] = []
    try:
        yield changed
    finally:
        changed += state.undo()


def _trace(module: nn.Module, training: bool, defaults: dict[str, Any]) -> Recording:
    """Trace a forward and put back whatever it has changed."""
    packages = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    watch, code = Watch(module, training), ExecutedCode(packages)
    tracer = _ForwardTracer()
    try:
        with undone(module) as changed, chance_restored() as drawn, watch, code:
            graph = tracer.trace(module, concrete_args=defaults or None)
    except UntraceableError:
        raise
    except Exception as error:  # whatever a user's forward raises on a proxy is the reason
        raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]) from error
    finally:
        changed += watch.undo()
    if changed:
        raise UntraceableError(f"its forward changes `self.{changed[0]}` or makes constant tensors")
    if any(drawn):
        raise UntraceableError("its forward draws random numbers in Python")
    if tracer.asks_for_type:
        raise UntraceableError("its forward asks for the type of a value (`isinstance`)")
    for reason in (*tracer.refusals, why_unfaithful(code, type(module).forward)):
        if reason is not None:
            raise UntraceableError(reason)
    _check_constants(graph, code)
    return Recording(graph, watch.guards(), watch.reads_training)


def _check_constants(graph: fx.Graph, code: ExecutedCode) -> None:
    """Refuse dtypes and devices that were read from a tensor: the module may be moved or cast.

    A dtype that the code names (``torch.float32``) is meant.
    """
    named = {name for executed in code.codes for name in executed.co_names}
    for node in graph.nodes:
        for value in pytree.tree_leaves((node.args, node.kwargs)):
            meant = isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in named
            if isinstance(value, torch.dtype | torch.device) and not meant:
                raise UntraceableError(f"it reads the dtype or device of a parameter ({value})")


class _State:
    """What hangs on a module: its attributes, and what is in those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._contents = {k: copy(v) for k, v in vars(module).items() if isinstance(v, dict | list | set)}

    def undo(self) -> list[str]:
        """Put everything back, and name what had been changed (the mode aside)."""
        changed = []
        current = vars(self._module)
        for key in [key for key in current if key not in self._attributes]:
            changed.append(key)
            del current[key]
        for key, value in self._attributes.items():
            if current.get(key) is not value:
                current[key] = value
                changed += [key] if key != "training" else []
        for key, content in self._contents.items():
            container = self._attributes[key]
            if not same_items(container, content):
                changed += [str(item) for item in container if item not in content] if key == "_modules" else [key]
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        return changed


@contextmanager
def chance_restored() -> Iterator[list[bool]]:
    """Put the global random generators back; afterwards the list says whether anything was drawn from them."""
    before = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numbers = None if numpy is None else numpy.random.get_state()
    drawn: list[bool] = []
    try:
        yield drawn
    finally:
        drawn.append(random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1]))
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if numpy is not None and numbers is not None:
            after = numpy.random.get_state()
            drawn[0] |= after[2:] != numbers[2:] or bool((after[1] != numbers[1]).any())
            numpy.random.set_state(numbers)


def input_of(node: fx.Node) -> Any:
    """Return the input of a call with one, however it was passed."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()))
