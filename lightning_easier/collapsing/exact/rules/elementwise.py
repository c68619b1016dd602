"""Rules of what treats every number alone: arithmetic with constants, copies, conversions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.affine import ChannelAffine, ElementAffine
from lightning_easier.collapsing.algebra.convolutions import with_tensors
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import IN_PLACE, shape_of
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, axes_of, require

_SPELLINGS = {"multiply": "mul", "subtract": "sub", "truediv": "div", "divide": "div", "true_divide": "div"}
_KINDS = ("mul", "add", "sub", "div", "neg")


class _Operands(NamedTuple):
    """The operands of an arithmetic operation.

    Attributes:
        value: What goes through it.
        constant: A number, a parameter or a buffer.
        constant_first: Whether the constant is the first operand.
    """

    value: Any
    constant: Any
    constant_first: bool


class Arithmetic(Rule):
    """A product, sum, difference or quotient of a value and a constant is an affine."""

    functions = (*IN_PLACE, *(f"{name}{suffix}" for name in (*_KINDS, *_SPELLINGS) for suffix in ("", "_")))

    def value(self, call: Call) -> Any:
        """Return the operand that is no constant."""
        return self._operands(call).value

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what is broadcast, divides by the value, masks it, or varies along several axes but not all."""
        given: dict[str, Any] = {**call.node.kwargs}
        shape = axes_of(value)
        plain = given.get("alpha", 1) == 1 and not given.get("rounding_mode") and given.get("out") is None
        require(plain, "it scales, rounds or writes besides")
        require(shape == shape_of(call.node), "it broadcasts the value")
        _, given_constant, constant_first = self._operands(call)
        require(not (constant_first and self._kind(call) == "div"), "it divides by the value")
        if isinstance(given_constant, Tensor) and given_constant.ndim > 0:
            require(given_constant.dtype == value.meta["tensor_meta"].dtype, "its constant has another dtype")
        constant = self._constant(call, value)
        require(bool(constant.isfinite().all()), "its constant is not finite, as that of a mask")
        fits = constant.ndim == 0 or _along_channels(constant, shape) is not None or _is_for_each(constant, shape)
        require(fits, "its constant has neither a number for each channel nor one for each element")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the affine: along the channels if the constant says which axis they are, else along either."""
        constant, shape = self._constant(call, value), axes_of(value)
        along = _along_channels(constant, shape)
        if along is not None:
            axis, numbers = along
            return call.link(value, self._made(call, axis, numbers))

        def on(axis: int) -> nn.Module:
            for_each = constant.ndim > 0
            return self._made(call, axis, constant.reshape(shape[1:]) if for_each else constant.expand(shape[axis]))

        return call.link(value, on(1 if len(shape) > 2 else -1), operator_on=on)

    def _kind(self, call: Call) -> str:
        name = IN_PLACE.get(call.function, call.function).removesuffix("_")
        return _SPELLINGS.get(name, name)

    def _operands(self, call: Call) -> _Operands:
        given = call.node.kwargs
        arguments: list[Any] = [*call.node.args, *(given[key] for key in ("input", "other") if key in given)]
        if self._kind(call) == "neg":
            arguments.append(-1.0)
        constants = [call.constant(argument) for argument in arguments]
        require(len(arguments) == 2 and constants.count(None) == 1, "it is not of one value and one constant")
        first = constants[0] is not None
        return _Operands(arguments[1 if first else 0], constants[0 if first else 1], first)

    def _constant(self, call: Call, value: fx.Node) -> Tensor:
        """Return the constant as a tensor, without axes if it is one number."""
        constant = self._operands(call).constant
        if not isinstance(constant, Tensor):
            # Not in the dtype of the value: what is verified in float64 has it as it was written
            return torch.tensor(constant, dtype=torch.float64, device=call.device)
        one = constant.numel() == 1 and constant.ndim <= len(axes_of(value))
        return constant.detach().reshape(()) if one else constant.detach()

    def _made(self, call: Call, axis: int, numbers: Tensor) -> nn.Module:
        _, constant, constant_first = self._operands(call)
        numbers = numbers.double()  # a quotient is not to be rounded twice
        ones = torch.ones_like(numbers)
        scale, offset = {
            "mul": (numbers, None), "neg": (numbers, None), "div": (1 / numbers, None), "add": (ones, numbers),
            "sub": (-ones, numbers) if constant_first else (ones, -numbers),
        }[self._kind(call)]  # fmt: skip
        made: nn.Module
        if numbers.ndim == 1:
            made = ChannelAffine(len(numbers), axis, device="meta")
        else:
            made = ElementAffine(numbers.shape, axis, device="meta")
        trainable = isinstance(constant, Tensor) and constant.requires_grad
        return with_tensors(made, scale, offset, torch.float64).eval().requires_grad_(trainable)


class Copy(Rule):
    """A copy leaves every number as it is."""

    functions = ("contiguous", "clone")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what rounds, and values that have no channels."""
        dtypes = [node.meta["tensor_meta"].dtype for node in (call.node, value)]
        require(dtypes[0] == dtypes[1], "it converts the value to another dtype")
        require(len(axes_of(call.node)) > 1, "its value has no axis of channels")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Leave the channels where they are."""
        return call.link(value, moves={1: 1, -1: -1}, counts=False, unchanged=True)


class Conversion(Copy):
    """A conversion to the dtype of another value, which is the one it has, is a copy."""

    functions = ("to", "type_as")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse, besides, a dtype that is written out: a model in another would be converted."""
        require(isinstance(call.node.args[1], fx.Node), "its dtype is written out")
        super().check(call, value)


def _along_channels(constant: Tensor, shape: torch.Size) -> tuple[int, Tensor] | None:
    """Return the axis of the channels (1 or -1) along which alone a constant varies, and its numbers there."""
    rank = len(shape)
    sizes = [1] * (rank - constant.ndim) + list(constant.shape)
    varied = [axis for axis, size in enumerate(sizes) if size > 1]
    if len(sizes) != rank or len(varied) != 1 or varied[0] not in (1, rank - 1):
        return None
    return (-1 if varied[0] == rank - 1 else 1), constant.reshape(-1)


def _is_for_each(constant: Tensor, shape: torch.Size) -> bool:
    """Tell whether a constant has a number for each element of a sample."""
    return constant.ndim > 0 and tuple(constant.shape) in (tuple(shape[1:]), (1, *shape[1:]))


RULES: tuple[Rule, ...] = (Arithmetic(), Copy(), Conversion())
