"""The algebra against the operators themselves, in float64, borders included."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_easier.collapsing.algebra.operators import compose
from lightning_easier.collapsing.errors import CannotMergeError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolution_pairs(draw):
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (4, 2), (3, 6)]))
    middle = math.lcm(*groups) * draw(st.integers(1, 2))
    channels = (groups[0] * draw(st.integers(1, 2)), middle, groups[1] * draw(st.integers(1, 2)))

    def per_axis(least: int, most: int):
        return st.tuples(*[st.integers(least, most)] * axes)

    torch.manual_seed(draw(st.integers(0, 2**31)))
    pair = [
        CONVOLUTIONS[axes](
            channels[i],
            channels[i + 1],
            draw(per_axis(1, 3)),
            draw(per_axis(1, 3)),
            draw(per_axis(0, 2)) if i == 0 or draw(st.booleans()) else 0,
            draw(per_axis(1, 2)),
            groups[i],
            draw(st.booleans()),
            dtype=torch.float64,
        )
        for i in range(2)
    ]
    x = torch.randn(2, channels[0], *draw(per_axis(6, 13)), dtype=torch.float64)
    return *pair, x


@settings(max_examples=300, deadline=None)
@given(convolution_pairs())
def test_two_convolutions_become_the_same_function_or_are_refused_for_their_borders(case):
    first, second, x = case
    padded = [p > 0 for p in second.padding]
    exact = not any(padded) or (
        first.bias is None and all(k == 1 for k, p in zip(first.kernel_size, padded, strict=True) if p)
    )
    if not exact:
        with pytest.raises(CannotMergeError, match="at the borders it sees zeros"):
            compose(first, second)
        return
    merged = compose(first, second)
    try:
        expected = second(first(x))
    except RuntimeError:  # the image is smaller than the kernel
        assume(False)
    assert merged(x).shape == expected.shape
    assert (merged(x) - expected).norm() <= 1e-12 * expected.norm()
    assert merged.groups == math.gcd(first.groups, second.groups)
    assert (merged.bias is None) == (first.bias is None and second.bias is None)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3), biases=st.tuples(st.booleans(), st.booleans()))
def test_two_linears_become_the_same_function(sizes, biases):
    first = nn.Linear(sizes[0], sizes[1], biases[0], dtype=torch.float64)
    second = nn.Linear(sizes[1], sizes[2], biases[1], dtype=torch.float64)
    x = torch.randn(2, 3, sizes[0], dtype=torch.float64)
    merged, expected = compose(first, second)(x), second(first(x))
    assert (merged - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_a_padding_mode_of_the_first_is_kept_where_the_second_pads_nothing(mode):
    first = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode, dtype=torch.float64)
    second = nn.Conv2d(3, 4, (2, 1), dtype=torch.float64)
    x = torch.randn(2, 2, 7, 9, dtype=torch.float64)
    assert torch.allclose(compose(first, second)(x), second(first(x)), rtol=1e-12)
    second.padding = (1, 1)
    with pytest.raises(CannotMergeError, match=f"padding mode '{mode}' does not commute"):
        compose(first, second)


def test_padding_by_name():
    x = torch.randn(2, 2, 8, 9, dtype=torch.float64)
    second = nn.Conv2d(3, 2, 1, padding="valid", dtype=torch.float64)
    first = nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(1, 2), dtype=torch.float64)
    assert torch.allclose(compose(first, second)(x), second(first(x)), rtol=1e-12)
    with pytest.raises(CannotMergeError, match="unevenly"):
        compose(nn.Conv2d(2, 3, (3, 2), padding="same", dtype=torch.float64), second)


def test_dtype_mode_trainability_and_arguments_are_kept():
    first, second = nn.Conv2d(2, 8, 3, padding=1).requires_grad_(False).eval(), nn.Conv2d(8, 3, 1).eval()
    before = copy.deepcopy((first.state_dict(), second.state_dict()))
    merged = compose(first, second)
    assert merged.weight.dtype == torch.float32
    assert merged.weight.requires_grad
    assert not merged.training
    for operator, state in zip((first, second), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in operator.state_dict().items())
    assert not compose(first, second.requires_grad_(False)).weight.requires_grad


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64), "differ in dtype or device"),
        (nn.Linear(2, 2), nn.Linear(2, 2).eval(), "training mode"),
        (nn.Conv1d(2, 2, 1), nn.Linear(2, 2), "no merge of Conv1d and Linear"),
        (nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), "no merge of Conv1d and Conv2d"),
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1), r"pads its input by \(1, 1\).*\(3×3\)"),
        (nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1), "would have put its bias"),
    ],
)
def test_refusals_give_their_reason(first, second, reason):
    with pytest.raises(CannotMergeError, match=reason):
        compose(first, second)
