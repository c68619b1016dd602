r"""The algebra of linear operators: neighbours and parallel branches become one, exactly or not at all.

Linear:
    :math:`W_2 (W_1 x + b_1) + b_2 = (W_2 W_1) x + (W_2 b_1 + b_2)`.

Channel affine (a batch norm in eval mode, a LayerScale):
    a diagonal Linear, or a depthwise convolution with one tap.

Element affine (learned positions):
    :math:`w_2 (w_1 x + b_1) + b_2 = (w_2 w_1) x + (w_2 b_1 + b_2)` element by element; with a channel affine the same,
    spread over the positions.

Convolutions, transposed convolutions:
    see :mod:`lightning_easier.collapsing.algebra.convolutions`.

Parallel branches of one input:
    sums add up weights and biases, concatenations put them side by side.

All sums are taken in float64 and rounded once, to the dtype of the operators. Every function takes operators without
data too (:func:`structure`), and then tells what the result would be.
"""

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_easier.collapsing.algebra import convolutions
from lightning_easier.collapsing.algebra.affine import AFFINES, ChannelAffine, ElementAffine
from lightning_easier.collapsing.algebra.convolutions import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    bias_or_zeros,
    has_bias,
    sum_biases,
    with_tensors,
)
from lightning_easier.collapsing.errors import CannotMergeError

LINEAR_OPERATORS: tuple[type[nn.Module], ...] = (nn.Linear, *AFFINES, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
"""Exact classes that :func:`compose` knows; subclasses may compute anything."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Exact classes that :func:`fold_batch_norm` and :func:`as_affine` are for."""


@torch.no_grad()
def compose(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return one operator that computes ``second(first(x))``; the arguments are not changed.

    Args:
        first: An operator of one of the classes :data:`LINEAR_OPERATORS`.
        second: The one that reads its output.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    _check_alike((first, second))
    if {type(first), type(second)} & {*AFFINES} and channel_axis(first) != channel_axis(second):
        raise CannotMergeError("the channel axis of one is not that of the other")
    if channel_axis(first) != channel_axis(second) or not _compatible(first, second):
        raise CannotMergeError(f"no merge of {type(first).__name__} and {type(second).__name__} is known")
    merged: nn.Module
    if isinstance(first, AFFINES) and isinstance(second, AFFINES):
        merged = _compose_affines(first, second)
    elif isinstance(first, ElementAffine) or isinstance(second, ElementAffine):
        raise CannotMergeError("one of them does something else at every position")
    elif channel_axis(first) == -1:
        merged = _compose_linear(first, second)
    else:
        merged = _compose_maps(first, second)
    return _finished(merged, (first, second))


def check(first: nn.Module, second: nn.Module) -> None:
    """Find out whether :func:`compose` can merge two operators, without doing it.

    Raises:
        CannotMergeError: With the reason, when it can't.
    """
    _check_alike((first, second))
    if type(first) in LINEAR_OPERATORS and type(second) in LINEAR_OPERATORS:
        first, second = structure(first), structure(second)
    compose(first, second)


@torch.no_grad()
def add(parts: Sequence[nn.Module]) -> nn.Module:
    """Return one operator that computes the sum of several of one input; the arguments are not changed.

    Args:
        parts: Operators with equal inputs and outputs.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    return _join(parts, _add_affines, _add_matrices, convolutions.add_convolutions)


@torch.no_grad()
def concatenate(parts: Sequence[nn.Module], axes: int = 2) -> nn.Module:
    """Return one operator that computes the outputs of several of one input side by side, along the channels.

    Args:
        parts: Operators with equal inputs.
        axes: The number of spatial axes, which affines alone don't tell.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    return _join(parts, None, _stack_matrices, convolutions.concatenate_convolutions, axes)


def _join(
    parts: Sequence[nn.Module],
    of_affines: Callable[[Sequence[Any]], nn.Module] | None,
    of_matrices: Callable[[Sequence[nn.Linear]], nn.Module],
    of_convolutions: Callable[[Sequence[Any]], nn.Module],
    axes: int = 2,
) -> nn.Module:
    _check_alike(parts)
    if len({channel_axis(part) for part in parts}) > 1:
        raise CannotMergeError("the parallel branches differ in the axis of their channels")
    if of_affines is not None and all(isinstance(part, AFFINES) for part in parts):
        return _finished(of_affines(parts), parts)
    if any(isinstance(part, ElementAffine) for part in parts):
        raise CannotMergeError("one of the parallel branches does something else at every position")
    if channel_axis(parts[0]) == -1:
        return _finished(of_matrices([_as_linear(part) for part in parts]), parts)
    axes = max((_axes(part) for part in parts if not isinstance(part, ChannelAffine)), default=axes)
    return _finished(of_convolutions([_as_ordinary(part, axes) for part in parts]), parts)


def _compose_affines(first: Any, second: Any) -> nn.Module:
    (w1, b1), (w2, b2) = _spread((first, second))
    offsets = [offset for offset in (None if b1 is None else w2 * b1, b2) if offset is not None]
    bias = reduce(torch.add, offsets) if offsets else None
    return _affine(w1 * w2, bias, first.dim, first.weight.dtype)


def _add_affines(parts: Sequence[Any]) -> nn.Module:
    spread = _spread(parts)
    weight = reduce(torch.add, [weight for weight, _ in spread])
    offsets = [bias for _, bias in spread if bias is not None]
    return _affine(weight, reduce(torch.add, offsets) if offsets else None, parts[0].dim, parts[0].weight.dtype)


def _spread(parts: Sequence[Any]) -> list[tuple[Tensor, Tensor | None]]:
    """Return scales and offsets of affines with one axis for the channels, in float64, to be broadcast."""
    rank = max(part.weight.ndim for part in parts)

    def spread(part: Any, vector: Tensor | None) -> Tensor | None:
        if vector is None or vector.ndim == rank or part.dim == -1:
            return None if vector is None else vector.double()
        return vector.double().view(-1, *[1] * (rank - 1))

    return [(spread(part, part.weight), spread(part, part.bias)) for part in parts]  # type: ignore[misc]


def _add_matrices(parts: Sequence[nn.Linear]) -> nn.Module:
    bias = None
    if any(part.bias is not None for part in parts):
        bias = reduce(torch.add, [bias_or_zeros(part, part.out_features) for part in parts])
    return _linear(reduce(torch.add, [part.weight.double() for part in parts]), bias, parts[0].weight.dtype)


def _stack_matrices(parts: Sequence[nn.Linear]) -> nn.Module:
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([bias_or_zeros(part, part.out_features) for part in parts])
    return _linear(torch.cat([part.weight.double() for part in parts]), bias, parts[0].weight.dtype)


def _compose_linear(first: Any, second: Any) -> nn.Module:
    """Merge on the last axis: matrices and diagonals."""
    if isinstance(first, ChannelAffine):
        weight = second.weight.double() * first.weight.double()
        bias = sum_biases(second.weight.double(), first.bias, second.bias)
    elif isinstance(second, ChannelAffine):
        weight = second.weight.double()[:, None] * first.weight.double()
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = second.weight.double() * bias_or_zeros(first, first.out_features)
            bias = bias + bias_or_zeros(second, second.channels)
    else:
        weight = second.weight.double() @ first.weight.double()
        bias = sum_biases(second.weight.double(), first.bias, second.bias)
    return _linear(weight, bias, first.weight.dtype)


def _compose_maps(first: Any, second: Any) -> nn.Module:
    """Merge on axis 1: convolutions of either kind, and affines as depthwise ones with one tap."""
    axes = _axes(second if isinstance(first, ChannelAffine) else first)
    scales = isinstance(first, ChannelAffine) or isinstance(second, ChannelAffine)
    first, second = (_as_convolution(operator, axes) for operator in (first, second))
    transposed = [isinstance(operator, TRANSPOSED_CONVOLUTIONS) for operator in (first, second)]
    if any(transposed) and not all(transposed):
        # with stride 1 either can be written as the other; a scaled transposed convolution stays one, with as much work
        ways = [_as_forward_pair, _as_transposed_pair]
        for way in reversed(ways) if scales else ways:
            try:
                return way(first, second)
            except CannotMergeError as error:
                reason = error
        raise reason
    if all(transposed):
        return convolutions.compose_transposed(first, second)
    return convolutions.compose_convolutions(first, second)


def _as_forward_pair(*pair: Any) -> nn.Module:
    forward = [convolutions.as_forward(each) if isinstance(each, TRANSPOSED_CONVOLUTIONS) else each for each in pair]
    return convolutions.compose_convolutions(*forward)


def _as_transposed_pair(*pair: Any) -> nn.Module:
    backward = [
        each if isinstance(each, TRANSPOSED_CONVOLUTIONS) else convolutions.as_transposed(each) for each in pair
    ]
    return convolutions.compose_transposed(*backward)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Tell whether a module is a batch norm in training mode, which normalises each batch by its own statistics."""
    return isinstance(module, BATCH_NORMS) and module.training


def fold_batch_norm(operator: nn.Module, batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """Return an operator that computes ``batch_norm(operator(x))`` in eval mode, by torch's own fusion.

    Args:
        operator: A Linear on vectors, a convolution or a transposed convolution; not changed.
        batch_norm: The batch norm that reads its output.

    Raises:
        CannotMergeError: With the reason, when there is no such operator.
    """
    if type(operator) not in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        raise CannotMergeError(f"a batch norm can't be folded into {type(operator).__name__}")
    _check_statistics(batch_norm)
    if isinstance(operator, nn.Linear):
        return _finished(fuse_linear_bn_eval(operator, _with_affine(batch_norm)), (operator, batch_norm))
    transposed = isinstance(operator, TRANSPOSED_CONVOLUTIONS)
    if transposed and operator.groups != 1:  # torch's fusion takes its second axis for all of the channels
        return compose(operator, as_affine(batch_norm, 1))
    return _finished(fuse_conv_bn_eval(operator, batch_norm, transposed), (operator, batch_norm))  # type: ignore[type-var]


@torch.no_grad()
def as_affine(batch_norm: nn.modules.batchnorm._BatchNorm, dim: int) -> ChannelAffine:
    """Write a batch norm in eval mode as a channel affine, in float64 until the last.

    Args:
        batch_norm: The batch norm.
        dim: The axis of its channels: 1, or -1 on vectors.

    Raises:
        CannotMergeError: If it has no running statistics.
    """
    _check_statistics(batch_norm)
    batch_norm = _with_affine(batch_norm)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    scale = batch_norm.weight.double() / (batch_norm.running_var.double() + batch_norm.eps).sqrt()
    offset = batch_norm.bias.double() - batch_norm.running_mean.double() * scale
    made = _affine(scale, offset, dim, batch_norm.weight.dtype)
    return made.train(batch_norm.training).requires_grad_(batch_norm.weight.requires_grad)


def _check_statistics(batch_norm: nn.modules.batchnorm._BatchNorm) -> None:
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise CannotMergeError(
            "this batch norm has no running statistics: it normalises each batch by its own, also in eval mode"
        )


def _with_affine(batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
    """Give a batch norm without weight and bias those that change nothing."""
    if batch_norm.affine:
        return batch_norm
    batch_norm = deepcopy(batch_norm)
    assert batch_norm.running_mean is not None
    batch_norm.weight = nn.Parameter(torch.ones_like(batch_norm.running_mean), requires_grad=False)
    batch_norm.bias = nn.Parameter(torch.zeros_like(batch_norm.running_mean), requires_grad=False)
    return batch_norm


def is_pointwise(operator: nn.Module) -> bool:
    """Tell whether an operator treats every position alone."""
    return isinstance(operator, nn.Linear | ChannelAffine) or convolutions.is_pointwise(operator)


@torch.no_grad()
def flattened(operator: nn.Module, shape: Sequence[int]) -> ChannelAffine:
    """Return the affine that computes on flattened samples what an affine computes on samples.

    Args:
        operator: A channel affine or an element affine.
        shape: Of one sample.
    """
    affine: Any = operator
    one = _affine(torch.ones(tuple(shape), device=affine.weight.device), None, affine.dim, affine.weight.dtype)
    whole: Any = _compose_affines(one, affine)
    bias = None if whole.bias is None else whole.bias.flatten()
    made: ChannelAffine = _affine(whole.weight.flatten(), bias, -1, affine.weight.dtype)
    _finished(made, (operator,))
    return made


@torch.no_grad()
def on_axis(operator: nn.Module, axis: int, axes: int) -> nn.Module:
    """Write a pointwise operator for another place of the channels.

    Args:
        operator: A pointwise operator.
        axis: Where its channels are to be: 1 (a convolution or affine) or -1 (a Linear or affine).
        axes: The number of spatial axes of the convolution.

    Raises:
        CannotMergeError: If the operator is not pointwise.
    """
    if not is_pointwise(operator):
        raise CannotMergeError(f"{type(operator).__name__} does not treat every position alone")
    if channel_axis(operator) == axis:
        if axis == -1 or isinstance(operator, ChannelAffine) or _axes(operator) == axes:
            return operator
        return on_axis(on_axis(operator, -1, axes), 1, axes)
    if isinstance(operator, ChannelAffine):
        made: nn.Module = _affine(operator.weight, operator.bias, axis, operator.weight.dtype)
    elif isinstance(operator, nn.Linear):
        weight = operator.weight.reshape(*operator.weight.shape, *[1] * axes)
        made = convolutions.make_convolution(weight, operator.bias, operator.weight.dtype)
    else:
        convolution: Any = _as_ordinary(operator, _axes(operator))
        weight = convolutions.regroup(convolution.weight, convolution.groups, 1).flatten(1)
        made = _linear(weight, convolution.bias, weight.dtype)
    return _finished(made, (operator,))


def structure(operator: nn.Module) -> nn.Module:
    """Return an operator of the same structure without data; a bias of zeros counts as none."""
    twin = _twin(operator, lambda tensor: torch.empty_like(tensor, device="meta"))
    if twin.bias is not None and not has_bias(operator):
        twin.bias = None
    return twin


def in_float64(operator: nn.Module) -> nn.Module:
    """Return an equal operator in float64; the argument is not changed."""
    return _twin(operator, lambda tensor: tensor.double())


def of_random_numbers(operator: nn.Module, device: torch.device) -> nn.Module:
    """Return an operator of the same structure with some data, to be timed."""
    return _twin(operator, lambda tensor: torch.empty_like(tensor, device=device).normal_(std=0.1))


@torch.no_grad()
def _twin(operator: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    twin = copy(operator)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(change(parameter), parameter.requires_grad)
        for name, parameter in operator._parameters.items()
    }
    return twin


def channel_axis(operator: nn.Module) -> int:
    """Return the axis of an operator's channels: 1 or -1."""
    if isinstance(operator, AFFINES):
        return operator.dim
    return -1 if isinstance(operator, nn.Linear) else 1


def channels(operator: Any) -> tuple[int, int]:
    """Return the number of channels an operator reads and writes."""
    if isinstance(operator, AFFINES):
        return operator.channels, operator.channels
    if isinstance(operator, nn.Linear):
        return operator.in_features, operator.out_features
    return operator.in_channels, operator.out_channels


def summary(operator: nn.Module) -> str:
    """Describe an operator in a few words."""
    before, after = channels(operator)
    if isinstance(operator, nn.Linear):
        return f"Linear {before}→{after}"
    if isinstance(operator, ChannelAffine):
        return f"ChannelAffine {before}"
    if isinstance(operator, ElementAffine):
        return f"ElementAffine {'×'.join(map(str, operator.shape))}"
    shape: Any = operator
    kernel = "×".join(map(str, shape.kernel_size))
    groups = f", {shape.groups} groups" if shape.groups > 1 else ""
    return f"{type(operator).__name__} {kernel} {before}→{after}{groups}"


def _check_alike(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        if type(part) not in LINEAR_OPERATORS:
            names = " and ".join(type(each).__name__ for each in parts)
            raise CannotMergeError(f"no merge of {names} is known")
    if len({part.training for part in parts}) > 1:
        raise CannotMergeError("one is in training mode and the other is not")
    weights: list[Any] = [part.weight for part in parts]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        raise CannotMergeError("their weights differ in dtype or device")


def _compatible(first: nn.Module, second: nn.Module) -> bool:
    if isinstance(first, AFFINES) or isinstance(second, AFFINES) or channel_axis(first) == -1:
        return True
    return _axes(first) == _axes(second)


def _axes(operator: nn.Module) -> int:
    return convolutions.number_of_axes(operator)


def _as_linear(operator: Any) -> nn.Linear:
    if isinstance(operator, nn.Linear):
        return operator
    return _linear(torch.diag(operator.weight), operator.bias, operator.weight.dtype)


def _as_convolution(operator: Any, axes: int) -> Any:
    if not isinstance(operator, ChannelAffine):
        return operator
    weight = operator.weight.view(-1, 1, *[1] * axes)
    return convolutions.make_convolution(weight, operator.bias, weight.dtype, groups=operator.channels)


def _as_ordinary(operator: Any, axes: int) -> Any:
    made = _as_convolution(operator, axes)
    return convolutions.as_forward(made) if isinstance(made, TRANSPOSED_CONVOLUTIONS) else made


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=dtype)
    return with_tensors(made, weight, bias, dtype)


def _affine(weight: Tensor, bias: Tensor | None, dim: int, dtype: torch.dtype) -> Any:
    if weight.ndim == 1:
        made: nn.Module = ChannelAffine(weight.shape[0], dim, bias is not None, device="meta", dtype=dtype)
    else:
        made = ElementAffine(weight.shape, dim, bias is not None, device="meta", dtype=dtype)
        bias = None if bias is None else bias.expand(weight.shape)
    return with_tensors(made, weight, bias, dtype)


def _finished(merged: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """Give a result the mode of its parts; it is trainable where one of them is."""
    merged.train(parts[0].training)
    return merged.requires_grad_(any(parameter.requires_grad for part in parts for parameter in part.parameters()))
