"""What a rule is: for which calls it is, why one of them is no linear step, and which link another equals."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import (
    bind,
    call_alone,
    changes_its_input,
    is_shared,
    is_view,
    name_of,
    shape_of,
)


def require(holds: bool, reason: str) -> None:
    """Raise a :class:`CannotMergeError` with a reason unless a condition holds."""
    if not holds:
        raise CannotMergeError(reason)


@dataclass(frozen=True, eq=False)
class Call:
    """One call in a captured graph.

    Attributes:
        captured: The graph, with the shapes met on the way.
        node: The node that calls.
    """

    captured: fx.GraphModule
    node: fx.Node

    @property
    def module(self) -> Any:
        """The module that is called, None for a function, a method or an operator."""
        return self.captured.get_submodule(str(self.node.target)) if self.node.op == "call_module" else None

    @property
    def function(self) -> str:
        """The name of the function, method or operator that is called, "" for a module."""
        return name_of(self.node)

    @property
    def name(self) -> str:
        """What a report calls it: the path of a module, or the name of the node."""
        return self.node.name if self.module is None else str(self.node.target)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        parameter = next(self.captured.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def given(self, names: str) -> dict[str, Any]:
        """Name the arguments; those that are not given are left out."""
        return bind(self.node, names)

    def first(self) -> Any:
        """Return the only argument of a module, the first of a function."""
        arguments = self.node.args
        if self.module is not None:
            arguments = (*arguments, *self.node.kwargs.values())
            require(len(arguments) == 1, "it is given more than one value")  # an output_size, say
        return arguments[0] if arguments else None

    def tensor(self, argument: Any) -> Tensor | None:
        """Return a parameter or a buffer, or a view of one; None where None was given.

        Raises:
            CannotMergeError: For what is computed.
        """
        found = None if argument is None else self.constant(argument)
        require(argument is None or isinstance(found, Tensor), "its weight or bias is computed")
        return found

    def constant(self, argument: Any) -> Any:
        """Return a number, a parameter or a buffer, or a view of one; None for anything else."""
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return float(argument)
        if not isinstance(argument, fx.Node):
            return None
        if argument.op == "get_attr":
            owner, _, attribute = str(argument.target).rpartition(".")
            found = getattr(self.captured.get_submodule(owner), attribute)
            return found if isinstance(found, Tensor) and found.is_floating_point() else None
        if is_view(argument):
            whole = self.constant(argument.args[0])
            if isinstance(whole, Tensor):
                return call_alone(argument, whole)
        return None

    def link(self, value: fx.Node, operator: nn.Module | None = None, **said: Any) -> Link:
        """Return the link that the call is.

        Args:
            value: The node that it reads.
            operator: The operator that it equals, if it is one.
            **said: The other attributes of the :class:`Link`.
        """
        return Link(self.node, value, self.name, operator, **said)


class Rule(ABC):
    """One kind of call, and the linear step that it is.

    Attributes:
        modules: The classes of the modules whose calls it reads; a subclass may compute anything.
        functions: The names of the functions, methods and ATen operators whose calls it reads.
    """

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    functions: ClassVar[tuple[str, ...]] = ()

    def read(self, call: Call) -> Link:
        """Return the linear step that a call is.

        Args:
            call: A call of one of ``modules`` or ``functions``.

        Raises:
            CannotMergeError: With the reason, when it is none.
        """
        value = self.value(call)
        require(bool(shape_of(value)), "it reads no tensor that has axes")
        for node in (value, call.node):
            require(node.meta["tensor_meta"].dtype.is_floating_point, "its numbers are not floating point")
        require(
            not (changes_its_input(call.captured, call.node) and is_shared(value)),
            "it writes into a value that something else sees",
        )
        self.check(call, value)
        return self.rewrite(call, value)

    def value(self, call: Call) -> Any:
        """Return the node whose value goes through the call.

        Raises:
            CannotMergeError: With the reason, when it is not one value.
        """
        return call.first()

    def check(self, call: Call, value: fx.Node) -> None:  # noqa: B027 - some apply always
        """Look for what makes a call another than the link that it would be rewritten to.

        Raises:
            CannotMergeError: With the reason.
        """

    @abstractmethod
    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Return the link that a call equals, which was checked."""


def axes_of(node: fx.Node) -> torch.Size:
    """Return the shape of a node's value, which has axes."""
    shape = shape_of(node)
    assert shape is not None
    return shape


def as_tuple(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number for each axis."""
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) if len(value) != 1 else tuple(value) * axes
