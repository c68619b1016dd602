"""What a captured graph holds for, checked at every call: tensors in the places of tensors, and sizes.

What ``torch.export`` recorded holds for the sizes for which its questions would be answered alike. It keeps these
questions; later versions of torch make a function of them, which can't be pickled. :class:`SizeGuards` can.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

_SIZE = re.compile(r"(\w+)\.size\(\)\[(\d+)\]")
_INPUT = re.compile(r"\w+(?=\.(?:size\(\)|ndim))")


class SizeGuards(nn.Module):
    """Refuses inputs of sizes for which a captured graph does not hold.

    Args:
        inputs: The names of the inputs.
        conditions: Expressions over them that have to hold.
    """

    _is_impure = True  # torch.fx is not to drop the call, whose value nobody reads

    def __init__(self, inputs: Sequence[str], conditions: Sequence[str]) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.conditions = tuple(conditions)
        self._check = self._compiled()

    def add(self, conditions: Sequence[str]) -> None:
        """Add conditions."""
        self.conditions += tuple(conditions)
        self._check = self._compiled()

    def axes_that_fail(self, *inputs: Any) -> set[tuple[int, int]]:
        """List what the conditions are about that don't hold for a call's inputs.

        Returns:
            Places of inputs, each with an axis.
        """
        values = {_variable(place): value for place, value in enumerate(inputs)}
        failing = [condition for condition in self.conditions if not eval(self._code(condition), _room(), values)]
        named = [each for condition in failing for each in _SIZE.findall(condition)]
        return {(self.inputs.index(name), int(axis)) for name, axis in named}

    def forward(self, *inputs: Any) -> None:
        """Check the sizes of a call's inputs.

        Raises:
            AssertionError: Names the condition that does not hold.
        """
        self._check(*inputs)

    def extra_repr(self) -> str:
        """List the conditions."""
        return ", ".join(self.conditions)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_check"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._check = self._compiled()

    def _compiled(self) -> Any:
        """Write the conditions as one function, which torch.compile and torch.export can read."""
        lines = [f"def check({', '.join(map(_variable, range(len(self.inputs))))}):"]
        for condition in self.conditions:
            reason = f"What was recorded of the model holds where {condition}; collapse it at this size"
            lines.append(f"    torch._assert({self._code(condition)}, {reason!r})")
        room = _room()
        exec("\n".join([*lines, "    return None"]), room)
        return room["check"]

    def _code(self, condition: str) -> str:
        """Write a condition with variables that no function in it is called as: an input may be called ``max``."""
        return _INPUT.sub(lambda found: _variable(self.inputs.index(found[0])), condition)


def _variable(place: int) -> str:
    return f"input_{place}"


def is_tensor(value: Any) -> Any:
    """Tell whether a value is a tensor; unlike ``isinstance``, a graph can record the question."""
    if issubclass(type(value), fx.Proxy):
        return value.tracer.create_proxy("call_function", is_tensor, (value,), {})
    return issubclass(type(value), Tensor)


def _room() -> dict[str, Any]:
    """Return the names that conditions are written with."""
    return {**SYMPY_INTERP, "torch": torch}


def read_guards(inputs: Mapping[str, Any]) -> SizeGuards:
    """Read for which sizes what ``torch.export`` recorded holds.

    Args:
        inputs: What it recorded of each input (name -> fake tensor), whose free sizes are symbols.

    Raises:
        ValueError: If a condition can't be said in the sizes of the inputs.
    """
    sizes: dict[sympy.Symbol, sympy.Symbol] = {}  # what is asked of a call in the place of a symbol
    conditions = [f"{name}.ndim == {x.ndim}" for name, x in inputs.items()]
    for name, x in inputs.items():
        for axis, size in enumerate(map(_expression, x.shape)):
            if size.is_Symbol:
                sizes.setdefault(size, sympy.Symbol(f"{name}.size()[{axis}]", integer=True, positive=True))
    for name, x in inputs.items():
        for axis, size in enumerate(map(_expression, x.shape)):
            asked = f"{name}.size()[{axis}]"
            said = _in_sizes(size, sizes)
            if said != asked:
                conditions.append(f"{asked} == {said}")
    for environment in {id(x.fake_mode.shape_env): x.fake_mode.shape_env for x in inputs.values()}.values():
        for condition in _conditions(environment):
            if condition.free_symbols:
                conditions.append(_in_sizes(condition, sizes))
        for symbol, size in sizes.items():
            conditions += _bounds(environment, symbol, str(size))
    return SizeGuards(list(inputs), list(dict.fromkeys(conditions)))


def _conditions(environment: ShapeEnv) -> list[sympy.Basic]:
    """List what has to hold of the symbols of an export, those that were found equal to others replaced."""
    asserted = environment.deferred_runtime_asserts.get(None, [])  # torch 2.6 keeps some of the inputs' sizes there
    asked = [guard.expr for guard in environment.guards] + [each.expr for each in asserted]
    conditions = [environment.simplify(each) for each in asked]
    # Of what is known only when it runs, the graph itself asserts what it needs
    return [each for each in conditions if not any(map(environment.is_unbacked_symint, each.free_symbols))]


def _bounds(environment: ShapeEnv, symbol: sympy.Symbol, size: str) -> list[str]:
    """List the bounds of a size that no condition may name, since all that was asked beyond them was clear."""
    within = environment.var_to_range.get(symbol)
    if within is None:
        return []
    lower = [f"{size} >= {within.lower}"] if isinstance(within.lower, sympy.Integer) and within.lower > 2 else []
    return [*lower, *([f"{size} <= {within.upper}"] if isinstance(within.upper, sympy.Integer) else [])]


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _in_sizes(expression: sympy.Basic, sizes: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    """Write an expression as Python, in sizes of the inputs."""
    unknown = expression.free_symbols - sizes.keys()
    if unknown:
        raise ValueError(f"torch.export asks for {expression}, where {unknown} is no size of an input")
    return str(_Printer().doprint(expression.xreplace(sizes)))


class _Printer(PythonPrinter):
    """Writes what torch 2.6 writes wrongly: ``~`` of a bool is never false, and 15 digits are another number."""

    def _print_Not(self, expr: Any) -> str:  # noqa: N802  # sympy calls it so
        return f"not ({self._print(expr.args[0])})"

    def _print_Float(self, expr: Any) -> str:  # noqa: N802
        return repr(float(expr))
