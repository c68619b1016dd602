r"""The algebra of linear operators: two neighbours become one, exactly or not at all.

Linear:
    :math:`W_2 (W_1 x + b_1) + b_2 = (W_2 W_1) x + (W_2 b_1 + b_2)`.

Convolution, with strides :math:`s`, dilations :math:`d` and paddings :math:`p`:
    tap :math:`t_1` of the first kernel and tap :math:`t_2` of the second meet at offset
    :math:`t_1 d_1 + t_2 d_2 s_1`, so the merged kernel is a transposed convolution of the second kernel with the first,
    the merged stride :math:`s_1 s_2` and the merged padding :math:`p_1 + s_1 p_2`.

Borders:
    the second convolution pads *its* input with zeros, where the first would have computed something. The merged
    operator is equal only along axes with :math:`p_2 = 0`, or where the first would have computed zero there: a 1-tap
    kernel with no bias. Anything else is refused.

All sums are taken in float64 and rounded once, to the dtype of the operators.
"""

from collections.abc import Callable
from copy import deepcopy
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_easier.padding import numeric_padding

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: torch.conv_transpose1d,
    nn.Conv2d: torch.conv_transpose2d,
    nn.Conv3d: torch.conv_transpose3d,
}
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR_OPERATORS: tuple[type[nn.Module], ...] = (nn.Linear, *_TRANSPOSED)
"""Exact classes that :func:`compose` knows; subclasses may compute anything."""


class CannotMergeError(Exception):
    """Two operators that don't become one exactly; the message is the reason."""


@torch.no_grad()
def compose(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return one operator that computes ``second(first(x))``; the arguments are not changed.

    Args:
        first: An operator of one of the classes :data:`LINEAR_OPERATORS`.
        second: The one that reads its output.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    check(first, second)
    merge: Callable[[Any, Any], nn.Module] = compose_linear if isinstance(first, nn.Linear) else compose_convolutions
    merged = merge(first, second)
    merged.train(first.training)
    trainable = any(parameter.requires_grad for op in (first, second) for parameter in op.parameters())
    return merged.requires_grad_(trainable)


def check(first: nn.Module, second: nn.Module) -> None:
    """Find out whether :func:`compose` can merge two operators, without doing it.

    Raises:
        CannotMergeError: With the reason, when it can't.
    """
    same = type(first) is type(second)
    if not same or type(first) not in LINEAR_OPERATORS:
        raise CannotMergeError(f"no merge of {type(first).__name__} and {type(second).__name__} is known")
    if first.training != second.training:
        raise CannotMergeError("one is in training mode and the other is not")
    weights: tuple[Tensor, Tensor] = (first.weight, second.weight)  # type: ignore[assignment]
    if weights[0].dtype != weights[1].dtype or weights[0].device != weights[1].device:
        raise CannotMergeError("their weights differ in dtype or device")
    if isinstance(first, Convolution) and isinstance(second, Convolution):
        _padding(first)
        _check_borders(first, second, _padding(second))


def fold_batch_norm(operator: nn.Module, batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """Return an operator that computes ``batch_norm(operator(x))`` in eval mode, by torch's own fusion.

    Args:
        operator: A Linear on vectors, a convolution or a transposed convolution; not changed.
        batch_norm: The batch norm that reads its output.

    Raises:
        CannotMergeError: With the reason, when there is no such operator.
    """
    if type(operator) not in (nn.Linear, *_TRANSPOSED, *_TRANSPOSED_CONVOLUTIONS):
        raise CannotMergeError(f"a batch norm can't be folded into {type(operator).__name__}")
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise CannotMergeError(
            "this batch norm has no running statistics: it normalises each batch by its own, also in eval mode"
        )
    if isinstance(operator, nn.Linear):
        return fuse_linear_bn_eval(operator, _affine(batch_norm))
    transposed = isinstance(operator, _TRANSPOSED_CONVOLUTIONS)
    if transposed and operator.groups != 1:
        raise CannotMergeError("the transposed convolution before it is grouped")
    return fuse_conv_bn_eval(operator, batch_norm, transposed)  # type: ignore[type-var]


def _affine(batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
    """Give a batch norm without weight and bias those that change nothing; torch's fusion with a Linear needs them."""
    if batch_norm.affine:
        return batch_norm
    batch_norm = deepcopy(batch_norm)
    assert batch_norm.running_mean is not None
    batch_norm.weight = nn.Parameter(torch.ones_like(batch_norm.running_mean), requires_grad=False)
    batch_norm.bias = nn.Parameter(torch.zeros_like(batch_norm.running_mean), requires_grad=False)
    return batch_norm


def compose_linear(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Merge ``second(first(x))`` of two Linear operators; see :func:`compose`."""
    weight = second.weight.double() @ first.weight.double()
    bias = _sum_biases(second.weight.double(), first.bias, second.bias)
    merged = nn.Linear(
        first.in_features, second.out_features, bias is not None, device=weight.device, dtype=first.weight.dtype
    )
    _write(merged, weight, bias)
    return merged


def compose_convolutions(first: Convolution, second: Convolution) -> Convolution:
    """Merge ``second(first(x))`` of two convolutions of the same number of axes; see :func:`compose`."""
    axes = len(first.kernel_size)
    p1, p2 = _padding(first), _padding(second)
    _check_borders(first, second, p2)

    groups = gcd(first.groups, second.groups)
    w1 = _regroup(first.weight.double(), first.groups, groups)  # (middle, in / groups, *k1)
    w2 = _regroup(second.weight.double(), second.groups, groups)  # (out, middle / groups, *k2)
    # Taps lie d1 apart in the first kernel and s1 * d2 apart in the second; the merged kernel needs only the common
    # grid of the two, which a 1-tap kernel does not make finer.
    steps1 = first.dilation
    steps2 = tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True))
    dilation = tuple(
        gcd(a if k1 > 1 else 0, b if k2 > 1 else 0) or 1
        for a, b, k1, k2 in zip(steps1, steps2, first.kernel_size, second.kernel_size, strict=True)
    )
    # Groups side by side as channels: (out / groups, middle, *k2) -> (out / groups, in, *k)
    out_per_group, in_per_group = second.out_channels // groups, first.in_channels // groups
    w2 = w2.unflatten(0, (groups, out_per_group)).transpose(0, 1).flatten(1, 2)
    kernel = _TRANSPOSED[type(first)](
        w2,
        w1,
        # along an axis where a kernel has one tap its step does not matter
        stride=tuple(b // d if k > 1 else 1 for b, d, k in zip(steps2, dilation, second.kernel_size, strict=True)),
        dilation=tuple(a // d if k > 1 else 1 for a, d, k in zip(steps1, dilation, first.kernel_size, strict=True)),
        groups=groups,
    )
    kernel = kernel.unflatten(1, (groups, in_per_group)).transpose(0, 1).flatten(0, 1)  # (out, in / groups, *k)

    taps_summed = _regroup(second.weight.double(), second.groups, 1).flatten(2).sum(-1)
    bias = _sum_biases(taps_summed, first.bias, second.bias)
    merged = type(first)(
        first.in_channels,
        second.out_channels,
        kernel_size=tuple(kernel.shape[2:]),
        stride=_products(first.stride, second.stride),  # type: ignore[arg-type]
        padding=tuple(a + s * b for a, s, b in zip(p1, first.stride, p2, strict=True)),  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias is not None,
        padding_mode=first.padding_mode if any(p1) else "zeros",
        device=kernel.device,
        dtype=first.weight.dtype,
    )
    assert len(merged.kernel_size) == axes
    _write(merged, kernel, bias)
    return merged


def _check_borders(first: Convolution, second: Convolution, p2: tuple[int, ...]) -> None:
    """Refuse a padding of the second convolution that acts on what the first would have computed there."""
    if not any(p2):
        return
    if second.padding_mode != "zeros" or first.padding_mode != "zeros":
        mode = second.padding_mode if second.padding_mode != "zeros" else first.padding_mode
        raise CannotMergeError(f"padding mode {mode!r} does not commute with the padding {p2} between them")
    if any(p > 0 and k > 1 for p, k in zip(p2, first.kernel_size, strict=True)):
        raise CannotMergeError(
            f"the second pads its input by {p2}: at the borders it sees zeros where the first "
            f"({'×'.join(map(str, first.kernel_size))}) would have computed something"
        )
    if first.bias is not None and bool(first.bias.any()):
        raise CannotMergeError(
            f"the second pads its input by {p2}: at the borders it sees zeros where the first would have put its bias"
        )


def _padding(convolution: Convolution) -> tuple[int, ...]:
    padding = numeric_padding(convolution)
    if padding is None:
        raise CannotMergeError("padding='same' pads its two sides unevenly")
    return padding


def _regroup(weight: Tensor, groups: int, coarser: int) -> Tensor:
    """Write a grouped kernel with fewer groups, zeros where channels were not connected.

    Args:
        weight: ``(out, in / groups, *k)``.
        groups: Its number of groups.
        coarser: The number wanted, a divisor of ``groups``.

    Returns:
        ``(out, in / coarser, *k)``.
    """
    if groups == coarser:
        return weight
    inner = groups // coarser
    blocks = weight.unflatten(0, (coarser, inner, -1))  # (coarser, inner, out / groups, in / groups, *k)
    wide = blocks.new_zeros(coarser, inner, blocks.shape[2], inner, *blocks.shape[3:])
    diagonal = torch.arange(inner, device=weight.device)
    # Indices on both sides of a slice put the indexed axis first.
    wide[:, diagonal, :, diagonal] = blocks.transpose(0, 1)
    return wide.flatten(3, 4).flatten(0, 2)


def _sum_biases(weight: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """``weight @ first + second``, None where both are."""
    total = None if first is None else weight @ first.double()
    if second is None:
        return total
    return second.double() if total is None else total + second.double()


def _products(a: Any, b: Any) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))


def _write(operator: nn.Linear | Convolution, weight: Tensor, bias: Tensor | None) -> None:
    operator.weight.copy_(weight)
    if bias is not None:
        assert operator.bias is not None
        operator.bias.copy_(bias)
