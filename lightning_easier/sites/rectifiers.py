"""What counts as a rectifier, and as a gate, in all their spellings: modules, functions, methods.

A rectifier has different slopes far to the left and far to the right: its neurons switch between linear pieces. A gate
(sigmoid, tanh, softmax, ...) bounds its output; it counts only where a user asks for it.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_easier.sites.tracing import chance_restored, input_of, read_forward, undone

RECTIFIERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
"""Module classes taken for rectifiers, their subclasses included; others are known by :func:`activation_kind`."""

GATES: Mapping[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softmax": nn.Softmax, "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh, "softsign": nn.Softsign,
}  # fmt: skip
"""Bounded activations by the name under which a user may ask for them."""

RECTIFIER = "rectifier"

_BOUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardsigmoid": F.hardsigmoid, "hardtanh": F.hardtanh,
    "softsign": F.softsign,
}  # fmt: skip


class FunctionalPReLU(nn.Module):
    """``F.prelu`` as a module without parameters: the slope stays where it is, and is passed with the input."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return ``max(0, x) + weight * min(0, x)``, of the shape of ``input``."""
        return F.prelu(input, weight)


@dataclass(frozen=True)
class _Spelling:
    """A function or method that computes what a module class computes."""

    cls: type[nn.Module]
    arguments: tuple[str, ...] = ()  # after the input
    fixed: tuple[tuple[str, Any], ...] = ()
    kind: str = RECTIFIER

    def counts(self, gates: Collection[str]) -> bool:
        return self.kind == RECTIFIER or self.kind in gates


_IN_PLACE = (("inplace", True),)
_RRELU = ("lower", "upper", "training")
_SOFTMAX = ("dim", "_stacklevel", "dtype")
_FUNCTIONS: dict[Any, _Spelling] = {
    F.relu: _Spelling(nn.ReLU, ("inplace",)),
    torch.relu: _Spelling(nn.ReLU),
    torch.relu_: _Spelling(nn.ReLU, (), _IN_PLACE),
    F.relu6: _Spelling(nn.ReLU6, ("inplace",)),
    F.leaky_relu: _Spelling(nn.LeakyReLU, ("negative_slope", "inplace")),
    F.leaky_relu_: _Spelling(nn.LeakyReLU, ("negative_slope",), _IN_PLACE),
    F.prelu: _Spelling(FunctionalPReLU, ("weight",)),
    torch.prelu: _Spelling(FunctionalPReLU, ("weight",)),
    F.rrelu: _Spelling(nn.RReLU, (*_RRELU, "inplace")),
    torch.rrelu: _Spelling(nn.RReLU, _RRELU),
    F.rrelu_: _Spelling(nn.RReLU, _RRELU, _IN_PLACE),
    F.elu: _Spelling(nn.ELU, ("alpha", "inplace")),
    F.elu_: _Spelling(nn.ELU, ("alpha",), _IN_PLACE),
    F.celu: _Spelling(nn.CELU, ("alpha", "inplace")),
    F.celu_: _Spelling(nn.CELU, ("alpha",), _IN_PLACE),
    torch.celu: _Spelling(nn.CELU, ("alpha",)),
    F.selu: _Spelling(nn.SELU, ("inplace",)),
    F.selu_: _Spelling(nn.SELU, (), _IN_PLACE),
    torch.selu: _Spelling(nn.SELU),
    F.gelu: _Spelling(nn.GELU, ("approximate",)),
    F.silu: _Spelling(nn.SiLU, ("inplace",)),
    F.mish: _Spelling(nn.Mish, ("inplace",)),
    F.hardswish: _Spelling(nn.Hardswish, ("inplace",)),
    F.softplus: _Spelling(nn.Softplus, ("beta", "threshold")),
    torch.sigmoid: _Spelling(nn.Sigmoid, kind="sigmoid"),
    F.sigmoid: _Spelling(nn.Sigmoid, kind="sigmoid"),
    torch.tanh: _Spelling(nn.Tanh, kind="tanh"),
    F.tanh: _Spelling(nn.Tanh, kind="tanh"),
    torch.softmax: _Spelling(nn.Softmax, ("dim", "dtype"), kind="softmax"),
    F.softmax: _Spelling(nn.Softmax, _SOFTMAX, kind="softmax"),
    F.hardsigmoid: _Spelling(nn.Hardsigmoid, ("inplace",), kind="hardsigmoid"),
    F.hardtanh: _Spelling(nn.Hardtanh, ("min_val", "max_val", "inplace"), kind="hardtanh"),
    F.softsign: _Spelling(nn.Softsign, kind="softsign"),
}
_METHODS: dict[str, _Spelling] = {
    "relu": _Spelling(nn.ReLU),
    "relu_": _Spelling(nn.ReLU, (), _IN_PLACE),
    "prelu": _Spelling(FunctionalPReLU, ("weight",)),
    "sigmoid": _Spelling(nn.Sigmoid, kind="sigmoid"),
    "tanh": _Spelling(nn.Tanh, kind="tanh"),
    "softmax": _Spelling(nn.Softmax, ("dim", "dtype"), kind="softmax"),
}
_IN_PLACE_GATES = ("sigmoid_", "tanh_")
_NAMES = {nn.LeakyReLU: "leaky_relu", FunctionalPReLU: "prelu"}  # others: the class's, in lower case


_STOCK: tuple[type[nn.Module], ...] = (*RECTIFIERS, *GATES.values(), FunctionalPReLU)
_STOCK_FORWARDS = {cls.forward for cls in _STOCK}


class NotAModuleError(Exception):
    """A call of an activation that no module of its own can take over; the message is the reason."""


@dataclass(frozen=True)
class Replacement:
    """The module that computes what a functional call computes.

    Attributes:
        name: A name for it: that of the function.
        module: The module.
        arguments: What to call it with: the input, and whatever else of the graph it needs.
    """

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]


def as_gates(gates: bool | Iterable[str]) -> frozenset[str]:
    """Check and normalise the argument ``gates``: all of them, none, or those named.

    Raises:
        TypeError: If it is neither a bool nor iterable.
        ValueError: If a name is not one of :data:`GATES`.
    """
    if isinstance(gates, bool):
        return frozenset(GATES if gates else ())
    if not isinstance(gates, Iterable):
        raise TypeError(f"Expected argument `gates` to be a bool or names out of {list(GATES)}, but got {gates!r}")
    names = [gates] if isinstance(gates, str) else list(gates)
    for name in names:
        if name not in GATES:
            raise ValueError(
                f"Expected argument `gates` to be a bool or to hold names out of {list(GATES)}, but got {name!r}"
            )
    return frozenset(names)


def replacement(node: fx.Node, gates: Collection[str], training: bool) -> Replacement | None:
    """Return the module that can take the place of a functional call; None if it calls no activation that counts.

    Args:
        node: Any node of a recorded forward.
        gates: The gates that count.
        training: The mode that the forward was recorded in.

    Raises:
        NotAModuleError: If it calls one in a way that no module computes.
    """
    in_place = str(getattr(node.target, "__name__", node.target))
    if in_place in _IN_PLACE_GATES and in_place.rstrip("_") in gates:
        raise NotAModuleError(f"it calls `{in_place}`, and no module of that works in place")
    spelling = _spelling(node)
    if spelling is None or not spelling.counts(gates):
        return None
    name = _NAMES.get(spelling.cls, spelling.cls.__name__.lower())
    values = dict(zip(spelling.arguments, node.args[1:], strict=False)) | dict(node.kwargs)
    values.pop("input", None)
    values.pop("_stacklevel", None)
    if spelling.cls is FunctionalPReLU:
        return Replacement("prelu", FunctionalPReLU(), (input_of(node), values["weight"]))
    if any(isinstance(value, fx.Node) for value in values.values()):
        raise NotAModuleError(f"it computes an argument of `{name}`")
    if spelling.cls is nn.RReLU and values.pop("training", False) != training:
        raise NotAModuleError("it calls `rrelu` with a `training` that is not the module's own mode")
    if values.pop("dtype", None) is not None:
        raise NotAModuleError(f"it calls `{name}` with a `dtype`")
    return Replacement(name, spelling.cls(**values, **dict(spelling.fixed)), (input_of(node),))


def _spelling(node: fx.Node) -> _Spelling | None:
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function":
        return next((spelling for function, spelling in _FUNCTIONS.items() if node.target is function), None)
    return None


def as_module(function: Any, gates: Collection[str] = ()) -> nn.Module | None:
    """Return a module for a function that computes an activation that counts; None for anything else."""
    known = next((spelling for fn, spelling in _FUNCTIONS.items() if fn is function), None)
    return known.cls(**dict(known.fixed)) if known is not None and known.counts(gates) else None


def functions(gates: Collection[str] = ()) -> list[Any]:
    """List the functions that compute an activation that counts."""
    return [function for function, spelling in _FUNCTIONS.items() if spelling.counts(gates)]


def function_names(gates: Collection[str] = ()) -> set[str]:
    """Name the functions and methods that compute an activation that counts."""
    methods = {name for name, spelling in _METHODS.items() if spelling.counts(gates)}
    return methods | {function.__name__ for function in functions(gates)}


def is_activation(module: nn.Module, gates: Collection[str] = ()) -> bool:
    """Tell whether a module is an activation that counts: a rectifier, or one of the gates asked for."""
    kind = activation_kind(module)
    return kind == RECTIFIER or kind in gates


def activation_kind(module: nn.Module) -> str | None:
    """Say what a module is: ``"rectifier"``, the name of a gate, or None for anything else.

    torch's classes are known by name. A class of somebody else's that has neither parameters nor buffers nor children
    (timm's ``QuickGELU``, ``HardMish``, ...) is known by its values: it is called on a few numbers in both modes. One
    that changes anything, draws random numbers, calls several rectifiers, or does not work on each number by itself is
    not taken for one.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    stock = type(module).forward in _STOCK_FORWARDS or isinstance(module, nn.PReLU)
    if stock and isinstance(module, (*RECTIFIERS, FunctionalPReLU)):
        return RECTIFIER
    for name, cls in GATES.items():
        if stock and isinstance(module, cls):
            return name
    ours = getattr(type(module), "forward_is_alike", False)  # what takes the place of an activation is none
    if ours or type(module).__module__.startswith("torch.") or not _could_be_an_activation(module):
        return None
    with torch.device("cpu"):  # whatever the default is by now
        far = torch.tensor([30.0, 40.0, 60.0], dtype=torch.float32)
        points = torch.cat([-far.flip(0), torch.linspace(-6, 6, 49, dtype=torch.float32), far])
    values = _values(module, points)
    if values is None or _rectifiers_called(module) > 1:
        return None
    return _kind_of(points, values)


def _rectifiers_called(module: nn.Module) -> int:
    graph = read_forward(module)
    spellings = [] if graph is None else [_spelling(node) for node in graph.nodes]
    return sum(spelling is not None and spelling.kind == RECTIFIER for spelling in spellings)


def _could_be_an_activation(module: nn.Module) -> bool:
    """Tell whether a module could be an activation: one input, and nothing of its own."""
    if module._modules or module._parameters or module._buffers or "forward" in vars(module):
        return False
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
    return len(needed) == 1 and needed[0].kind is needed[0].POSITIONAL_OR_KEYWORD


def _values(module: nn.Module, points: Tensor) -> Tensor | None:
    """Return a module's values at some points, or None if it does more than work on each number by itself."""
    batches = [points, points.flip(0).reshape(1, -1, 1, 1), *points.chunk(2)]
    try:
        with undone(module) as changed, chance_restored() as drawn:
            results = []
            for mode in (False, True):  # of training and of gradients
                module.__dict__["training"] = mode
                with torch.set_grad_enabled(mode), torch.device("cpu"):
                    results += [type(module).forward(module, batch.clone()) for batch in batches]
    except Exception:  # it is somebody else's code, and not made for this
        return None
    shapes = [batch.shape for batch in batches] * 2
    if changed or any(drawn) or not all(isinstance(result, Tensor) for result in results):
        return None
    if [result.shape for result in results] != shapes or not results[0].isfinite().all():
        return None
    values: Tensor = results[0]
    others = [results[1].flatten().flip(0), torch.cat(results[2:4])]
    others += [results[4], results[5].flatten().flip(0), torch.cat(results[6:8])]
    return values if all(torch.allclose(other, values, atol=1e-6) for other in others) else None


def _kind_of(points: Tensor, values: Tensor) -> str | None:
    slopes = values.diff() / points.diff()
    left, right = slopes[:2], slopes[-2:]
    straight = bool((left[0] - left[1]).abs() < 1e-3 and (right[0] - right[1]).abs() < 1e-3)
    if straight and (right[0] - 1).abs() < 0.1 and -1e-3 < left[0] < right[0] - 1e-3:
        return RECTIFIER
    if torch.allclose(values, F.relu6(points), atol=1e-5):
        return RECTIFIER
    return next((name for name, gate in _BOUNDED.items() if torch.allclose(values, gate(points), atol=1e-5)), None)
