"""Transposed convolutions, affines, sums and concatenations against the operators themselves, in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import collapse
from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.operators import add, as_affine, compose, concatenate, fold_batch_norm, on_axis
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.support.inference import relative_difference
from tests.models import randomize_batch_norms

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def assert_equal(merged: Tensor, expected: Tensor) -> None:
    assert merged.shape == expected.shape
    assert (merged - expected).norm() <= 1e-12 * expected.norm()


def affine(channels: int, dim: int, bias: bool = True) -> ChannelAffine:
    made = ChannelAffine(channels, dim, bias, dtype=torch.float64)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@st.composite
def operators(draw, kinds, axes, channels, width):
    kind = draw(st.sampled_from(kinds))
    if kind == "affine":
        return affine(channels, 1, draw(st.booleans()))
    groups = draw(st.sampled_from([1, math.gcd(channels, width)]))
    kernel, stride, dilation = (tuple(draw(st.integers(1, n)) for _ in range(axes)) for n in (3, 2, 2))
    padding = tuple(draw(st.integers(0, 1)) for _ in range(axes))
    options = {"bias": draw(st.booleans()), "groups": groups, "dilation": dilation, "dtype": torch.float64}
    if kind == "pointwise":
        kernel, stride, padding = (1,) * axes, (1,) * axes, (0,) * axes
        kind = draw(st.sampled_from(["convolution", "transposed"]))
    if kind == "convolution":
        return CONVOLUTIONS[axes - 1](channels, width, kernel, stride, padding, **options)
    beyond = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    return TRANSPOSED[axes - 1](channels, width, kernel, stride, padding, beyond, **options)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pairs_with_a_transposed_convolution_or_an_affine_are_exact_or_refused(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    axes = data.draw(st.integers(1, 3))
    channels, middle, width = (data.draw(st.sampled_from([1, 2, 4, 6])) for _ in range(3))
    kinds = ["transposed", "transposed", "convolution", "pointwise", "affine"]
    first = data.draw(operators(kinds, axes, channels, middle))
    second = data.draw(operators(kinds, axes, channels if isinstance(first, ChannelAffine) else middle, width))
    x = torch.randn(2, channels, *(data.draw(st.integers(4, 7)) for _ in range(axes)), dtype=torch.float64)
    try:
        expected = second(first(x))
    except RuntimeError:  # the image is smaller than the kernel
        assume(False)
    merged = attempt(compose, first, second)
    if isinstance(merged, CannotMergeError):
        assert not is_easy(first, second), merged
    else:
        assert_equal(merged(x), expected)


def attempt(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except CannotMergeError as error:
        return error


def is_easy(first: Any, second: Any) -> bool:
    """Two operators of one kind without bias, padding or crop are never refused."""
    plain = all(
        isinstance(each, ChannelAffine) or not any((*each.padding, *each.output_padding)) for each in (first, second)
    )
    return plain and isinstance(first, TRANSPOSED) == isinstance(second, TRANSPOSED) and first.bias is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sums_and_concatenations_are_exact_or_refused(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    axes = data.draw(st.integers(1, 3))
    channels = data.draw(st.sampled_from([1, 2, 4]))
    stride = tuple(data.draw(st.integers(1, 2)) for _ in range(axes))
    parts: list[nn.Module] = []
    for _ in range(data.draw(st.integers(2, 3))):
        kernel = tuple(data.draw(st.sampled_from([1, 3, 2])) for _ in range(axes))
        dilation = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
        # the padding that keeps the size, where there is one
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        groups = data.draw(st.sampled_from([1, channels]))
        parts.append(
            CONVOLUTIONS[axes - 1](
                channels, channels, kernel, stride, padding, dilation, groups, data.draw(st.booleans()),
                dtype=torch.float64,
            )
        )  # fmt: skip
    if set(stride) == {1} and data.draw(st.booleans()):
        parts[0] = affine(channels, 1)
    x = torch.randn(2, channels, *(data.draw(st.integers(5, 9)) for _ in range(axes)), dtype=torch.float64)
    values = [part(x) for part in parts]
    same = len({value.shape for value in values}) == 1
    merged, side_by_side = attempt(add, parts), attempt(concatenate, parts)
    if isinstance(merged, CannotMergeError):
        assert "size of their outputs" in str(merged)
        assert str(side_by_side) == str(merged)
        assert any(size == 2 for part in parts for size in getattr(part, "kernel_size", ()))
    else:
        assert same
        assert_equal(merged(x), sum(values))
        assert_equal(side_by_side(x), torch.cat(values, 1))


def test_a_repvgg_block_becomes_one_3x3():
    parts = [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), affine(4, 1).float()]
    merged = add(parts)
    assert (merged.kernel_size, merged.padding, merged.groups) == ((3, 3), (1, 1), 1)
    depthwise = add([nn.Conv2d(4, 4, 3, padding=1, groups=4), affine(4, 1).float()])
    assert depthwise.groups == 4


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_and_diagonals_on_the_last_axis(bias):
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    linear = nn.Linear(4, 4, bias, dtype=torch.float64)
    diagonal = affine(4, -1, bias)
    for pair in ((linear, diagonal), (diagonal, linear), (diagonal, diagonal)):
        assert_equal(compose(*pair)(x), pair[1](pair[0](x)))
        assert_equal(add(pair)(x), pair[0](x) + pair[1](x))
        assert_equal(concatenate(pair)(x), torch.cat([pair[0](x), pair[1](x)], -1))
    with pytest.raises(CannotMergeError, match="channel axis"):
        compose(linear, affine(4, 1))
    with pytest.raises(CannotMergeError, match="axis of their channels"):
        add([linear, affine(4, 1)])


def test_a_pointwise_operator_for_another_place_of_the_channels():
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    last = x.permute(0, 2, 3, 1)
    for operator in (
        nn.Conv2d(4, 6, 1, groups=2, dtype=torch.float64),
        nn.ConvTranspose2d(4, 6, 1, groups=2, dtype=torch.float64),
        affine(4, 1),
    ):
        moved = on_axis(operator, -1, 2)
        assert_equal(moved(last), operator(x).permute(0, 2, 3, 1))
        assert_equal(on_axis(moved, 1, 2)(x), operator(x))
    with pytest.raises(CannotMergeError, match="every position alone"):
        on_axis(nn.Conv2d(4, 4, 3), -1, 2)


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_a_batch_norm_as_an_affine_and_after_a_grouped_transposed_convolution(options):
    norm = randomize_batch_norms(nn.BatchNorm2d(4, **options)).double().eval()
    operator = nn.ConvTranspose2d(6, 4, 3, 2, groups=2, dtype=torch.float64).eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    assert_equal(as_affine(norm, 1)(operator(x)), norm(operator(x)))
    assert_equal(fold_batch_norm(operator, norm)(x), norm(operator(x)))


def test_padding_modes_of_parallel_branches():
    reflected = [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", dtype=torch.float64) for _ in range(2)]
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    assert_equal(add(reflected)(x), reflected[0](x) + reflected[1](x))
    with pytest.raises(CannotMergeError, match="does not pad with zeros"):
        add([reflected[0], nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)])
    with pytest.raises(CannotMergeError, match="differ in stride"):
        add([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, 2)])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_that_is_folded_into_a_transposed_convolution_leaves_it_one(groups):
    """As an ordinary convolution of stride 1 it would do more work, at the positions around its input."""
    transposed, norm = nn.ConvTranspose1d(2, 4, 3, groups=groups, bias=False), nn.BatchNorm1d(4)
    model = randomize_batch_norms(nn.Sequential(transposed, norm)).double().eval()
    x = torch.randn(2, 2, 5).double()
    result = collapse(model, x, objective="macs")
    assert [type(module) for module in result.model.children()] == [nn.ConvTranspose1d]
    assert result.report.after.macs == result.report.before.macs
    assert relative_difference(result.model(x), model(x)) <= 1e-12
