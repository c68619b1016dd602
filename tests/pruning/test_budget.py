"""The budget against an independent reading of its equations in NumPy, and in its corners."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easier.pruning.methods.budget import LayerState, budgets, shares, total_budget, uniform_budgets


def oracle(importances, left, amount, leaves_out_zero):
    """Share by the softmax of relevances; whoever has less left than its share is emptied, and the rest begins anew."""
    importances, left = np.array(importances, dtype=np.float64), np.array(left)
    result = np.zeros(len(left), dtype=int)
    takes_part = importances > 0 if leaves_out_zero else np.ones(len(left), dtype=bool)
    budget = int(np.floor(amount * left[takes_part].sum()))
    while takes_part.any():
        chosen = np.flatnonzero(takes_part)
        with np.errstate(divide="ignore"):
            relevance = np.where(importances[chosen] > 0, importances[chosen].sum() / importances[chosen], 0.0)
        softmax = np.exp(relevance - relevance.max())
        part = np.floor(budget * (softmax / softmax.sum())).astype(int)
        short = left[chosen] < part
        if not short.any():
            result[chosen] = part
            return result.tolist()
        result[chosen[short]] = left[chosen[short]]
        budget -= left[chosen[short]].sum()
        takes_part[chosen[short]] = False
    return result.tolist()


LAYERS = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-3, 2.0)), st.integers(0, 100_000)), min_size=1, max_size=20
)


@given(LAYERS, st.floats(0.0, 1.0), st.booleans())
def test_it_is_what_the_equations_say(layers, amount, leaves_out_zero):
    importances, left = zip(*layers, strict=True)
    found = budgets([LayerState(*layer) for layer in layers], amount, leaves_out_zero=leaves_out_zero)
    expected = oracle(importances, left, amount, leaves_out_zero)
    # a share may be rounded to either side of a whole number
    assert np.abs(np.array(found) - expected).max() <= 1 or _is_on_the_edge(layers, amount, leaves_out_zero)


def _is_on_the_edge(layers, amount, leaves_out_zero):
    """Tell whether a layer has as much left as its share, up to rounding, so that the two may part there."""
    nudged = [
        oracle([i for i, _ in layers], [max(left + by, 0) for _, left in layers], amount, leaves_out_zero)
        for by in (-1, 1)
    ]
    return np.abs(np.subtract(*nudged)).max() > 2


@given(LAYERS, st.floats(0.0, 1.0), st.booleans())
def test_never_more_than_the_budget_or_than_is_left(layers, amount, leaves_out_zero):
    states = [LayerState(*layer) for layer in layers]
    found = budgets(states, amount, leaves_out_zero=leaves_out_zero)
    assert all(0 <= count <= state.left for count, state in zip(found, states, strict=True))
    assert sum(found) <= total_budget(states, amount)
    if leaves_out_zero:
        assert all(count == 0 for count, state in zip(found, states, strict=True) if state.importance == 0)


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_shares_sum_up_to_one_and_follow_importance(importances):
    found = shares(importances)
    assert math.isclose(sum(found), 1.0, rel_tol=1e-9)
    switching = sorted((i, s) for i, s in zip(importances, found, strict=True) if i > 0)
    assert all(a[1] >= b[1] for a, b in pairwise(switching) if a[0] < b[0])


def test_equal_layers_get_equal_shares():
    assert budgets([LayerState(0.7, 1000)] * 4, 0.5) == [500] * 4
    assert budgets([LayerState(0.0, 1000)] * 4, 0.5) == [500] * 4
    assert budgets([LayerState(0.0, 1000)] * 4, 0.5, leaves_out_zero=True) == [0] * 4


def test_a_layer_of_zero_entropy():
    """EGP leaves it out of budget and sum; NEPENTHE has it count with a relevance of zero: exp(0) = 1."""
    layers = [LayerState(0.0, 1000), LayerState(1.0, 1000), LayerState(1.0, 1000)]
    assert budgets(layers, 0.5, leaves_out_zero=True) == [0, 500, 500]
    part = 1500 * math.e**-2 / (2 + math.e**-2)
    assert budgets(layers, 0.5) == [math.floor(part), *[math.floor((1500 - part) / 2)] * 2]


def test_a_layer_that_is_nearly_emptied_leaves_the_rest_to_the_others():
    layers = [LayerState(0.1, 20), LayerState(1.0, 100), LayerState(1.0, 100)]
    assert budgets(layers, 0.5) == [20, 45, 45]
    # with exactly as much left as its share it is not one that has less
    assert budgets([LayerState(1.0, 50), LayerState(1.0, 50)], 1.0) == [50, 50]


def test_a_relevance_beyond_floats_takes_what_there_is():
    layers = [LayerState(5e-324, 30), LayerState(1.0, 1000)]
    assert budgets(layers, 0.5) == [30, 485]
    assert shares([5e-324, 1e300]) == [1.0, 0.0]


def test_a_share_of_zero_and_of_one():
    layers = [LayerState(0.5, 10), LayerState(1.0, 1000), LayerState(0.9, 0)]
    assert budgets(layers, 0.0) == [0, 0, 0]
    assert budgets(layers, 1.0) == [10, 1000, 0]
    assert budgets([], 0.5) == []


def test_uniform_takes_the_same_share_of_each():
    assert uniform_budgets([LayerState(1.0, 10), LayerState(0.0, 7), LayerState(0.3, 0)], 0.5) == [5, 3, 0]


@pytest.mark.parametrize("amount", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(amount):
    with pytest.raises(ValueError, match=r"`amount` to be a share in \[0, 1\], but got"):
        budgets([LayerState(1.0, 1)], amount)


@pytest.mark.parametrize("importance", [-1.0, math.nan, math.inf])
def test_an_importance_that_is_none_is_refused(importance):
    with pytest.raises(ValueError, match="`importance` to be finite and not negative"):
        LayerState(importance, 1)
    with pytest.raises(ValueError, match="`left` to be 0 or more, but got -1"):
        LayerState(1.0, -1)
