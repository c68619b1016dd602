r"""The algebra of convolutions and transposed convolutions.

Composition, with strides :math:`s`, dilations :math:`d` and paddings :math:`p`:
    tap :math:`t_1` of the first kernel and tap :math:`t_2` of the second meet at offset
    :math:`t_1 d_1 + t_2 d_2 s_1`, so the merged kernel is a transposed convolution of the second kernel with the first,
    the merged stride :math:`s_1 s_2` and the merged padding :math:`p_1 + s_1 p_2`.

Borders:
    the second convolution pads *its* input with zeros, where the first would have computed something. The merged
    operator is equal only along axes with :math:`p_2 = 0`, or where the first would have computed zero there: a 1-tap
    kernel with no bias. Anything else is refused.

Transposed convolutions:
    are the adjoints of convolutions with the very same weight, and :math:`A_1^T` followed by :math:`A_2^T` is
    :math:`(A_1 A_2)^T`; a crop (their ``padding``) between them acts as a padding does above. With stride 1 either kind
    is the other with a flipped kernel and padding :math:`d (k - 1) - p`.

Sums:
    convolutions of one input with one stride add up tap by tap on the common grid of their kernels, those with less
    padding shifted inwards.

Everything here works on tensors without data too (the ``meta`` device), where only the structure is wanted; a bias that
is there counts as a bias there.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import product
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.structure.padding import numeric_padding

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_FLAT = {kind: axes for kinds in (CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS) for axes, kind in enumerate(kinds, 1)}


def number_of_axes(operator: nn.Module) -> int:
    """Return the number of spatial axes of a convolution, transposed or not."""
    return _FLAT[type(operator)]


def compose_convolutions(first: Convolution, second: Convolution) -> Convolution:
    """Merge ``second(first(x))`` of two convolutions of the same number of axes.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    p1, p2 = padding_of(first), padding_of(second)
    _check_borders(first, second, p2)
    kernel, dilation, groups = _compose_kernels(first, second)
    taps_summed = regroup(second.weight.double(), second.groups, 1).flatten(2).sum(-1)
    return make_convolution(
        kernel,
        sum_biases(taps_summed, first.bias, second.bias),
        first.weight.dtype,
        stride=_products(first.stride, second.stride),
        padding=tuple(a + s * b for a, s, b in zip(p1, first.stride, p2, strict=True)),
        dilation=dilation,
        groups=groups,
        padding_mode=first.padding_mode if any(p1) else "zeros",
    )


def _compose_kernels(first: Convolution, second: Convolution) -> tuple[Tensor, tuple[int, ...], int]:
    """Return the kernel ``(out, in / groups, *k)`` of ``second(first(x))`` in float64, its dilation and groups."""
    groups = gcd(first.groups, second.groups)
    w1 = regroup(first.weight.double(), first.groups, groups)  # (middle, in / groups, *k1)
    w2 = regroup(second.weight.double(), second.groups, groups)  # (out, middle / groups, *k2)
    # Taps lie d1 apart in the first kernel and s1 * d2 apart in the second; the merged kernel needs only the common
    # grid of the two, which a 1-tap kernel does not make finer.
    steps1 = first.dilation
    steps2 = tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True))
    dilation = tuple(
        gcd(a if k1 > 1 else 0, b if k2 > 1 else 0) or 1
        for a, b, k1, k2 in zip(steps1, steps2, first.kernel_size, second.kernel_size, strict=True)
    )
    w1 = w1.unflatten(0, (groups, -1))  # (groups, middle / groups, in / groups, *k1)
    w2 = w2.unflatten(0, (groups, -1))  # (groups, out / groups, middle / groups, *k2)
    # along an axis where a kernel has one tap its step does not matter
    steps1 = tuple(a // d if k > 1 else 1 for a, d, k in zip(steps1, dilation, first.kernel_size, strict=True))
    steps2 = tuple(b // d if k > 1 else 1 for b, d, k in zip(steps2, dilation, second.kernel_size, strict=True))
    spans1 = tuple((k - 1) * a + 1 for k, a in zip(first.kernel_size, steps1, strict=True))
    size = tuple((k - 1) * b + span for k, b, span in zip(second.kernel_size, steps2, spans1, strict=True))
    kernel = w1.new_zeros(groups, w2.shape[1], *w1.shape[2:3], *size)
    # A transposed convolution of the second kernel by the first does the same, many times slower in float64
    for tap in product(*map(range, second.kernel_size)):
        begins = tuple(t * b for t, b in zip(tap, steps2, strict=True))
        where = tuple(slice(t, t + span, a) for t, span, a in zip(begins, spans1, steps1, strict=True))
        kernel[(..., *where)] += (w2[(..., *tap)] @ w1.flatten(2)).unflatten(2, w1.shape[2:])
    return kernel.flatten(0, 1), dilation, groups


def _check_borders(first: Convolution, second: Convolution, p2: tuple[int, ...]) -> None:
    """Refuse a padding of the second convolution that acts on what the first would have computed there."""
    if not any(p2):
        return
    if second.padding_mode != "zeros" or (first.padding_mode != "zeros" and any(padding_of(first))):
        mode = second.padding_mode if second.padding_mode != "zeros" else first.padding_mode
        raise CannotMergeError(f"padding mode {mode!r} does not commute with the padding {p2} between them")
    if any(p > 0 and k > 1 for p, k in zip(p2, first.kernel_size, strict=True)):
        raise CannotMergeError(
            f"the second pads its input by {p2}: at the borders it sees zeros where the first "
            f"({'×'.join(map(str, first.kernel_size))}) would have computed something"
        )
    if has_bias(first):
        raise CannotMergeError(
            f"the second pads its input by {p2}: at the borders it sees zeros where the first would have put its bias"
        )


def compose_transposed(first: TransposedConvolution, second: TransposedConvolution) -> TransposedConvolution:
    """Merge ``second(first(x))`` of two transposed convolutions of the same number of axes.

    Raises:
        CannotMergeError: With the reason, when there is no exact equal.
    """
    pointwise = is_pointwise(second)
    if has_bias(first) and not pointwise:
        raise CannotMergeError(
            "the bias of the first reaches the outputs of the transposed convolution after it unevenly"
        )
    p1, p2 = padding_of(first), padding_of(second)
    if any(p > 0 and k > 1 for p, k in zip(p1, second.kernel_size, strict=True)):
        raise CannotMergeError(
            f"the first crops its output by {p1}: the transposed convolution after it would reach across that border"
        )
    if any(p > 0 and o > 0 for p, o in zip(p1, second.output_padding, strict=True)):
        raise CannotMergeError(f"the first crops its output by {p1}: the output padding after it would show that again")
    kernel, dilation, groups = _compose_kernels(_adjoint(second), _adjoint(first))
    stride = _products(first.stride, second.stride)
    beyond = tuple(
        b + s * a for a, s, b in zip(first.output_padding, second.stride, second.output_padding, strict=True)
    )
    if any(o >= max(s, d) for o, s, d in zip(beyond, stride, dilation, strict=True)):
        raise CannotMergeError(f"together they would need an output padding of {beyond}, more than their stride")
    bias = None if second.bias is None else second.bias.double()
    if has_bias(first):
        matrix = regroup(_adjoint(second).weight.double().flatten(1), second.groups, 1)  # (middle, out)
        bias = sum_biases(matrix.T, first.bias, second.bias)
    return make_transposed_convolution(
        kernel, bias, first.weight.dtype, stride=stride, dilation=dilation, groups=groups, output_padding=beyond,
        padding=tuple(b + s * a for a, s, b in zip(p1, second.stride, p2, strict=True)),
    )  # fmt: skip


def _adjoint(transposed: TransposedConvolution) -> Convolution:
    """Return the convolution, without bias, whose adjoint a transposed convolution is; it has the same weight."""
    return make_convolution(
        transposed.weight, None, transposed.weight.dtype, stride=transposed.stride, padding=transposed.padding,
        dilation=transposed.dilation, groups=transposed.groups,
    )  # fmt: skip


def as_transposed(convolution: Convolution) -> TransposedConvolution:
    """Write a convolution of stride 1 as a transposed one.

    Raises:
        CannotMergeError: If its stride is another, or it pads more than its kernel reaches.
    """
    padding = _flipped_padding(convolution)
    weight = convolution.weight.unflatten(0, (convolution.groups, -1)).transpose(1, 2).flatten(0, 1)
    return make_transposed_convolution(
        weight.flip(list(range(2, weight.ndim))), convolution.bias, weight.dtype, stride=convolution.stride,
        padding=padding, dilation=convolution.dilation, groups=convolution.groups,
    )  # fmt: skip


def as_forward(transposed: TransposedConvolution) -> Convolution:
    """Write a transposed convolution of stride 1 as an ordinary one.

    Raises:
        CannotMergeError: If its stride is another, or it crops more than its kernel reaches.
    """
    padding = _flipped_padding(transposed)
    weight = transposed.weight.unflatten(0, (transposed.groups, -1)).transpose(1, 2).flatten(0, 1)
    return make_convolution(
        weight.flip(list(range(2, weight.ndim))), transposed.bias, weight.dtype, stride=transposed.stride,
        padding=padding, dilation=transposed.dilation, groups=transposed.groups,
    )  # fmt: skip


def _flipped_padding(operator: Convolution | TransposedConvolution) -> tuple[int, ...]:
    """Return ``d (k - 1) - p``, the padding of the other kind with a flipped kernel."""
    padding = padding_of(operator)
    geometry = zip(operator.dilation, operator.kernel_size, padding, strict=True)
    flipped = tuple(d * (k - 1) - p for d, k, p in geometry)
    if any(s != 1 for s in operator.stride) or any(getattr(operator, "output_padding", ())):
        raise CannotMergeError("a transposed convolution and a strided one have no single equal")
    if min(flipped) < 0 or (any(padding) and operator.padding_mode != "zeros"):
        raise CannotMergeError("a transposed convolution and one that pads more than its kernel have no single equal")
    return flipped


def add_convolutions(parts: Sequence[Convolution]) -> Convolution:
    """Return the convolution that computes the sum of several of one input.

    Raises:
        CannotMergeError: With the reason, when there is none.
    """
    aligned, geometry = _align(parts, reduce(gcd, (part.groups for part in parts)))
    bias = reduce(_add, (None if part.bias is None else part.bias.double() for part in parts), None)
    return make_convolution(reduce(torch.add, aligned), bias, parts[0].weight.dtype, **geometry)


def concatenate_convolutions(parts: Sequence[Convolution]) -> Convolution:
    """Return the convolution that computes the outputs of several of one input side by side, along the channels.

    Raises:
        CannotMergeError: With the reason, when there is none.
    """
    aligned, geometry = _align(parts, 1)
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([bias_or_zeros(part, part.out_channels) for part in parts])
    return make_convolution(torch.cat(aligned), bias, parts[0].weight.dtype, **geometry)


def _align(parts: Sequence[Convolution], groups: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Write the kernels of several convolutions of one input on one grid: ``(out, in / groups, *k)`` each."""
    stride = parts[0].stride
    if any(part.stride != stride for part in parts):
        raise CannotMergeError("the parallel branches differ in stride")
    paddings = [padding_of(part) for part in parts]
    modes = {part.padding_mode for part, padding in zip(parts, paddings, strict=True) if any(padding)}
    alike = all(
        padding == paddings[0] and part.kernel_size == parts[0].kernel_size and part.dilation == parts[0].dilation
        for part, padding in zip(parts, paddings, strict=True)
    )
    if modes - {"zeros"} and not (alike and len(modes) == 1):
        raise CannotMergeError("the parallel branches differ in padding, and one does not pad with zeros")
    axes = range(len(stride))
    # Along each axis, relative to the place of the output: where the kernels begin and end, and their common step
    ends = [
        tuple(d * (k - 1) - p for d, k, p in zip(part.dilation, part.kernel_size, padding, strict=True))
        for part, padding in zip(parts, paddings, strict=True)
    ]
    for axis in axes:
        if len({padding[axis] - end[axis] for padding, end in zip(paddings, ends, strict=True)}) > 1:
            raise CannotMergeError("the parallel branches differ in the size of their outputs at some input sizes")
    padding = tuple(max(each[axis] for each in paddings) for axis in axes)
    dilation = tuple(
        reduce(
            gcd,
            [part.dilation[axis] for part in parts if part.kernel_size[axis] > 1]
            + [padding[axis] - each[axis] for each in paddings],
        )
        or 1
        for axis in axes
    )
    size = tuple((max(end[axis] for end in ends) + padding[axis]) // dilation[axis] + 1 for axis in axes)
    aligned = []
    for part, own in zip(parts, paddings, strict=True):
        weight = regroup(part.weight.double(), part.groups, groups)
        wide = weight.new_zeros(*weight.shape[:2], *size)
        places: Any = tuple(
            slice(
                (padding[axis] - own[axis]) // dilation[axis],
                (padding[axis] - own[axis] + part.dilation[axis] * (part.kernel_size[axis] - 1)) // dilation[axis] + 1,
                max(part.dilation[axis] // dilation[axis], 1),
            )
            for axis in axes
        )
        wide[(..., *places)] = weight
        aligned.append(wide)
    mode = modes.pop() if modes else "zeros"
    return aligned, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}


def is_pointwise(operator: Any) -> bool:
    """Tell whether a convolution, transposed or not, treats every position alone."""
    if type(operator) not in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        return False
    sizes = (*operator.kernel_size, *operator.stride)
    return all(size == 1 for size in sizes) and not any(padding_of(operator)) and not any(operator.output_padding)


def has_bias(operator: Any) -> bool:
    """Tell whether an operator has a bias that is not zero, as far as its device tells."""
    bias = operator.bias
    return bias is not None and (bias.is_meta or bool(bias.any()))


def bias_or_zeros(operator: Any, channels: int) -> Tensor:
    """Return the bias of an operator in float64, zeros where it has none."""
    if operator.bias is None:
        return torch.zeros(channels, dtype=torch.float64, device=operator.weight.device)
    return operator.bias.double()


def padding_of(convolution: Any) -> tuple[int, ...]:
    """Return the padding per axis.

    Raises:
        CannotMergeError: If the two sides of an axis differ.
    """
    padding = numeric_padding(convolution)
    if padding is None:
        raise CannotMergeError("padding='same' pads its two sides unevenly")
    return padding


def regroup(weight: Tensor, groups: int, coarser: int) -> Tensor:
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


def sum_biases(weight: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """``weight @ first + second`` in float64, None where both are."""
    total = None if first is None else (weight @ first.double()[:, None])[:, 0]
    return _add(total, None if second is None else second.double())


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def make_convolution(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **geometry: Any) -> Any:
    """Make a convolution of a kernel ``(out, in / groups, *k)`` and a bias."""
    if weight.ndim not in (3, 4, 5):
        raise CannotMergeError(f"there are no convolutions with {weight.ndim - 2} axes")
    channels = weight.shape[1] * geometry.get("groups", 1), weight.shape[0]
    return _make(CONVOLUTIONS[weight.ndim - 3], channels, weight, bias, dtype, geometry)


def make_transposed_convolution(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **geometry: Any) -> Any:
    """Make a transposed convolution of a kernel ``(in, out / groups, *k)`` and a bias."""
    channels = weight.shape[0], weight.shape[1] * geometry.get("groups", 1)
    return _make(TRANSPOSED_CONVOLUTIONS[weight.ndim - 3], channels, weight, bias, dtype, geometry)


def _make(
    kind: Any,
    channels: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    geometry: dict[str, Any],
) -> Any:
    made = kind(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", dtype=dtype, **geometry)
    return with_tensors(made, weight, bias, dtype)


def with_tensors(operator: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """Put a weight and a bias into an operator that was made without data."""
    operator.weight = nn.Parameter(weight.detach().to(dtype).contiguous())
    operator.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype))
    return operator


def _products(a: Any, b: Any) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
