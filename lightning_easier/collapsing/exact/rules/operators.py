"""Rules of products with matrices, of batch norms and of affines."""

from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.affine import AFFINES, ChannelAffine
from lightning_easier.collapsing.algebra.convolutions import with_tensors
from lightning_easier.collapsing.algebra.operators import BATCH_NORMS, as_affine, uses_batch_statistics
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.rules.rule import Call, Rule, axes_of, require
from lightning_easier.structure.stand_in import AffineStandIn


class OperatorModule(Rule):
    """A Linear or an affine is the operator itself."""

    modules = (nn.Linear, *AFFINES)

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Take the module."""
        return call.link(value, call.module)


class AffineOfAnActivation(Rule):
    """An affine that stands for an activation is one along the channels."""

    modules = (AffineStandIn,)

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse one along another axis."""
        rank = len(axes_of(value))
        require(call.module.dim % rank in (1, rank - 1), "it has a number for each place of an axis without channels")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the affine."""
        module, rank = call.module, len(axes_of(value))
        made = ChannelAffine(len(module.weight), -1 if module.dim % rank == rank - 1 else 1, device="meta")
        made = with_tensors(made, module.weight, module.bias, module.weight.dtype)
        return call.link(value, made.eval().requires_grad_(module.mark.trainable))


class MatrixProduct(Rule):
    """A product with a constant matrix is a Linear; ``torch.nn.functional.linear`` has it transposed already."""

    functions: ClassVar[tuple[str, ...]] = ("linear", "matmul", "mm")
    arguments: ClassVar[dict[str, str]] = {
        "linear": "input weight bias", "matmul": "input other", "mm": "input mat2",
    }  # fmt: skip

    def value(self, call: Call) -> Any:
        """Return the factor that comes first."""
        return self._operands(call)[0]

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse matrices that are computed, and batches of them."""
        _, weight, bias = self._operands(call)
        matrix = call.tensor(weight)
        require(matrix is not None and matrix.ndim == 2, "its weight is not a matrix")
        call.tensor(bias)

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the Linear."""
        matrix, bias = self._matrix(call)
        made = nn.Linear(1, 1, bias is not None, device="meta")
        made.out_features, made.in_features = matrix.shape
        made = with_tensors(made, matrix, bias, matrix.dtype)
        weight: Any = call.tensor(self._operands(call)[1])
        return call.link(value, made.eval().requires_grad_(weight.requires_grad))

    def _operands(self, call: Call) -> tuple[Any, Any, Any]:
        """Return the arguments for value, weight and bias."""
        names = self.arguments[call.function]
        given = call.given(names)
        value, weight, bias = [*(given.get(name) for name in names.split()), None][:3]
        return value, weight, bias

    def _matrix(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias as a Linear has them: outputs × inputs, and outputs."""
        _, weight, bias = self._operands(call)
        matrix: Any = call.tensor(weight)
        return matrix if call.function == "linear" else matrix.T, call.tensor(bias)


class MatrixProductAndSum(MatrixProduct):
    """``torch.addmm`` of constants, ``beta * input + alpha * mat1 @ mat2``, is a Linear."""

    functions = ("addmm",)
    arguments: ClassVar[dict[str, str]] = {"addmm": "input mat1 mat2"}

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse, besides, what is added if it is not a number for each output."""
        super().check(call, value)
        matrix, bias = super()._matrix(call)
        require(bias is not None and bias.shape == matrix.shape[:1], "what it adds is not a number for each output")

    def _operands(self, call: Call) -> tuple[Any, Any, Any]:
        bias, value, weight = super()._operands(call)
        return value, weight, bias

    def _matrix(self, call: Call) -> tuple[Tensor, Tensor | None]:
        matrix, bias = super()._matrix(call)
        assert bias is not None
        factors: dict[str, Any] = {**call.node.kwargs}
        # not rounded before the merge
        return matrix.double() * factors.get("alpha", 1), bias.double() * factors.get("beta", 1)


class BatchNormModule(Rule):
    """A batch norm in eval mode is an affine along the channels."""

    modules = BATCH_NORMS

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse one in training mode."""
        require(not uses_batch_statistics(call.module), "it normalises each batch by its own statistics")

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the affine."""
        return call.link(value, as_affine(deepcopy(call.module).double(), _channel_axis(value)))


class BatchNorm(Rule):
    """``torch.nn.functional.batch_norm``, or ``torch.batch_norm``, by constant statistics is an affine."""

    functions = ("batch_norm",)

    def value(self, call: Call) -> Any:
        """Return the input."""
        return self._arguments(call).get("input")

    def check(self, call: Call, value: fx.Node) -> None:
        """Refuse statistics of the batch, and what is computed."""
        given = self._arguments(call)
        evaluates = given.get("training", False) is False and given.get("running_mean") is not None
        require(evaluates, "it normalises each batch by its own statistics")
        for name in ("running_mean", "running_var", "weight", "bias"):
            call.tensor(given.get(name))

    def rewrite(self, call: Call, value: fx.Node) -> Link:
        """Make the affine."""
        given = self._arguments(call)
        mean: Any = call.tensor(given["running_mean"])
        weight, bias = call.tensor(given.get("weight")), call.tensor(given.get("bias"))
        made = nn.BatchNorm1d(len(mean), eps=given.get("eps", 1e-5), device="meta")
        made.running_mean, made.running_var = mean, call.tensor(given.get("running_var"))
        made.weight = nn.Parameter(torch.ones_like(mean) if weight is None else weight)
        made.bias = nn.Parameter(torch.zeros_like(mean) if bias is None else bias)
        return call.link(value, as_affine(made.eval().double(), _channel_axis(value)))

    def _arguments(self, call: Call) -> dict[str, Any]:
        target = call.node.target
        if isinstance(target, torch._ops.OpOverload) or target is torch.batch_norm:  # not torch.nn.functional's
            return call.given("input weight bias running_mean running_var training momentum eps cudnn_enabled")
        return call.given("input running_mean running_var weight bias training momentum eps")


def _channel_axis(value: fx.Node) -> int:
    return 1 if len(axes_of(value)) > 2 else -1


RULES: tuple[Rule, ...] = (
    OperatorModule(), AffineOfAnActivation(), MatrixProduct(), MatrixProductAndSum(), BatchNormModule(), BatchNorm(),
)  # fmt: skip
