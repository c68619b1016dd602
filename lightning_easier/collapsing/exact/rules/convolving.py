"""Rules of convolutions, transposed or not."""

from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_easier.collapsing.algebra import convolutions
from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, axes_of, require


class ConvolutionModule(Rule):
    """A convolution, transposed or not, is the operator itself."""

    modules = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what reads one sample without its axis, and paddings that are not zeros alike on both sides."""
        convolutions.padding_of(call.module)
        require(len(axes_of(value)) == len(call.module.kernel_size) + 2, "it reads one sample, without its axis")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Take the module."""
        return call.link(value, call.module)


class Convolution(Rule):
    """``torch.nn.functional.conv2d``, say, of constants is the operator that has them."""

    functions = tuple(f"conv{axes}d" for axes in range(1, len(CONVOLUTIONS) + 1))
    arguments = "input weight bias stride padding dilation groups"

    def value(self, call: Call) -> Any:
        """Return the input."""
        return call.given(self.arguments).get("input")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse what is computed, and paddings as a module refuses them."""
        weight, _, geometry = self._parts(call)
        require(weight.ndim == len(axes_of(value)), "it reads one sample, without its axis")
        computed = any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(geometry))
        require(not computed, "its geometry depends on the size of the input")
        self._check_padding(call)

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the operator."""
        trainable = self._parts(call)[0].requires_grad
        return call.link(value, self._made(call).eval().requires_grad_(trainable))

    def _parts(self, call: Call) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Return weight, bias, and the other arguments."""
        given = call.given(self.arguments)
        weight, bias = call.tensor(given.pop("weight", None)), call.tensor(given.pop("bias", None))
        if weight is None:
            raise CannotMergeError("it has no weight")
        given.pop("input", None)
        return weight, bias, given

    def _made(self, call: Call) -> nn.Module:
        weight, bias, geometry = self._parts(call)
        return convolutions.make_convolution(weight, bias, weight.dtype, **geometry)

    def _check_padding(self, call: Call) -> None:
        convolutions.padding_of(self._made(call))


class TransposedConvolution(Convolution):
    """``torch.nn.functional.conv_transpose2d``, say, of constants is the operator that has them."""

    functions = tuple(f"conv_transpose{axes}d" for axes in range(1, len(TRANSPOSED_CONVOLUTIONS) + 1))
    arguments = "input weight bias stride padding output_padding groups dilation"

    def _made(self, call: Call) -> nn.Module:
        weight, bias, geometry = self._parts(call)
        return convolutions.make_transposed_convolution(weight, bias, weight.dtype, **geometry)

    def _check_padding(self, call: Call) -> None:
        """Take any padding: that of a transposed convolution is a number for each axis."""


RULES: tuple[Rule, ...] = (ConvolutionModule(), Convolution(), TransposedConvolution())
