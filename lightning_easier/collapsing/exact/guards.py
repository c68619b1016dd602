"""What a captured graph holds for, checked at every call: tensors in the places of tensors, and sizes.

What ``torch.export`` recorded holds for the sizes for which its questions would be answered alike. It says which those
are in a function of its own, which can't be pickled; :class:`SizeGuards` says the same and can.
"""

import re
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

_SAYS = "Guard failed: "  # what the messages of torch.export's own checks begin with
_SIZE = re.compile(r"(\w+)\.size\(\)\[(\d+)\]")


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
        values = dict(zip(self.inputs, inputs, strict=True))
        failing = [condition for condition in self.conditions if not eval(condition, _room(), values)]
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
        lines = [f"def check({', '.join(self.inputs)}):"]
        for condition in self.conditions:
            reason = f"What was recorded of the model holds where {condition}; collapse it at this size"
            lines.append(f"    torch._assert({condition}, {reason!r})")
        room = _room()
        exec("\n".join([*lines, "    return None"]), room)
        return room["check"]


def is_tensor(value: Any) -> Any:
    """Tell whether a value is a tensor; unlike ``isinstance``, a graph can record the question."""
    if issubclass(type(value), fx.Proxy):
        return value.tracer.create_proxy("call_function", is_tensor, (value,), {})
    return issubclass(type(value), Tensor)


def _room() -> dict[str, Any]:
    """Return the names that conditions are written with."""
    return {**SYMPY_INTERP, "torch": torch}


def read_guards(exported: nn.Module, inputs: Sequence[str]) -> SizeGuards:
    """Read the conditions from the module that ``torch.export`` makes of them.

    Args:
        exported: The module that checks.
        inputs: The names of what it is called with.

    Raises:
        ValueError: If they are not where this torch has been seen to put them.
    """
    code = _code_of(exported.forward)
    said = [constant for each in code for constant in each.co_consts if isinstance(constant, str)]
    conditions = [text.removeprefix(_SAYS) for text in said if text.startswith(_SAYS)]
    if not conditions and any("_assert" in each.co_names for each in code):
        raise ValueError("this torch.export does not say for which sizes its graph holds")
    return SizeGuards(inputs, conditions)


def _code_of(function: Any) -> list[CodeType]:
    """List the code of a function and of those that it closes over."""
    found = []
    queue = [function]
    while queue:
        each = queue.pop()
        if hasattr(each, "__code__"):
            found.append(each.__code__)
            queue += [cell.cell_contents for cell in each.__closure__ or ()]
    return found
