"""The planner against every possible cut, and what it counts."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_easier import collapse
from lightning_easier.collapsing import engine
from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.operators import CannotMergeError, compose, structure
from lightning_easier.collapsing.exact import recipes
from lightning_easier.collapsing.exact.prices import macs_at, output_shape
from lightning_easier.support import costs, timing
from lightning_easier.support.timing import LatencyTable

POINTWISE = st.lists(st.integers(1, 40), min_size=3, max_size=7)


def every_cut(operators: list[nn.Module], shape: tuple[int, ...]) -> float:
    """The least MACs over all cuts of a chain, each piece composed from left to right."""
    least = math.inf
    for count in range(len(operators)):
        for ends in combinations(range(1, len(operators)), count):
            pieces = []
            try:
                for start, end in zip((0, *ends), (*ends, len(operators)), strict=True):
                    piece = operators[start]
                    for operator in operators[start + 1 : end]:
                        piece = compose(piece, operator)
                    pieces.append(piece)
            except CannotMergeError:
                continue
            least = min(least, float(costs.count_macs(nn.Sequential(*pieces), (torch.randn(shape),))))
    return least


@settings(max_examples=40, deadline=None)
@given(POINTWISE)
def test_the_cut_of_linears_is_the_cheapest_of_all(widths):
    operators = [nn.Linear(a, b) for a, b in pairwise(widths)]
    report = collapse(nn.Sequential(*operators), torch.randn(2, widths[0]), objective="macs").report
    assert report.after.macs == every_cut(operators, (2, widths[0]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 2)), min_size=2, max_size=4), st.data())
def test_the_cut_of_convolutions_is_the_cheapest_of_all(layers, data):
    operators, channels = [], 3
    for width, kernel, stride in layers:
        groups = data.draw(st.sampled_from([1, math.gcd(channels, width)]))
        operators.append(nn.Conv2d(channels, width, kernel, stride, groups=groups))
        channels = width
    shape = (1, 3, 40, 33)
    report = collapse(nn.Sequential(*operators).eval(), torch.randn(shape), objective="macs").report
    assert report.after.macs == every_cut(operators, shape)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (nn.Linear(5, 7), (2, 3, 5)),
        (ChannelAffine(5, dim=1), (2, 5, 3)),
        (nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2), (3, 4, 17)),
        (nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (1, 3)), (3, 4, 9, 11)),
        (nn.Conv3d(1, 2, 2), (1, 1, 4, 5, 6)),
        (nn.ConvTranspose1d(4, 2, 3, 2, 1, 1, groups=2), (2, 4, 5)),
        (nn.ConvTranspose2d(2, 3, (2, 3), (2, 1), (1, 0), dilation=(1, 2)), (2, 2, 5, 6)),
    ],
)
def test_shapes_and_macs_are_those_of_a_call(operator, shape):
    bare = structure(operator)
    assert bare.weight.is_meta
    assert output_shape(bare, shape) == operator(torch.randn(shape)).shape
    assert macs_at(bare, shape) == costs.count_macs(operator, (torch.randn(shape),))


def test_a_chain_longer_than_the_window_is_merged_in_linear_time(monkeypatch):
    composed = []

    def compose_counted(first, second):
        composed.append(second)
        return compose(first, second)

    monkeypatch.setattr(recipes.operators, "compose", compose_counted)
    counts = []
    for length in (50, 200):
        composed.clear()
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(length))).double()
        report = collapse(model, torch.randn(2, 4, dtype=torch.float64), objective="depth").report
        assert report.after.depth == 1
        counts.append(len(composed) / length)
    assert counts[1] < 1.3 * counts[0]


def test_a_table_of_latencies_is_filled_once():
    table = LatencyTable()
    model = nn.Sequential(nn.Linear(16, 256), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 256), nn.Linear(256, 16))
    x = torch.randn(8, 16)
    first = collapse(model, x, latencies=table).report
    known = dict(table.seconds)
    assert known
    assert all(seconds > 0 for seconds in known.values())
    assert len(table.speedups) == 1  # the two chains are alike
    second = collapse(model, x, latencies=table).report
    assert (table.seconds, len(table.speedups)) == (known, 1)
    assert [(m.operators, m.price_before, m.price_after) for m in first.merges] == [
        (m.operators, m.price_before, m.price_after) for m in second.merges
    ]


def test_what_is_timed_decides(monkeypatch):
    """Both ways of one network, with times that are told instead of measured."""

    def told(faster):
        def stopwatch(call):
            module = next(part for part in (call.func, *call.args) if isinstance(part, nn.Module))
            weights = [m.weight.shape for m in module.modules() if isinstance(m, nn.Linear)]
            merged = weights == [(16, 16)]
            return lambda runs: 1.0 if merged == faster else 3.0

        return stopwatch

    model = nn.Sequential(nn.Linear(16, 256), nn.Linear(256, 16))
    for faster in (True, False):
        monkeypatch.setattr(timing, "stopwatch", told(faster))
        report = collapse(model, torch.randn(4, 16)).report
        assert len(report.merges) == int(faster)
        assert len(report.refusals) == int(not faster)


def test_an_operator_passes_many_layouts():
    class Turns(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    model = nn.Sequential(nn.Linear(3, 4), *(Turns() for _ in range(400)), nn.Linear(4, 2))
    assert len(collapse(model, torch.randn(2, 5, 3), objective="macs").report.merges) == 1


def tell(monkeypatch, chain, **times):
    """Have a chain become so many times faster, and the named models take so many seconds, one by default."""
    monkeypatch.setattr(timing.LatencyTable, "compare", lambda *_: timing.Speedup((chain,) * 6))
    monkeypatch.setattr(
        engine, "compare", lambda calls, *_: {name: timing.Latency.of([times.get(name, 1.0)] * 6) for name in calls}
    )


def test_a_plan_that_is_slower_as_a_whole_is_not_carried_out(monkeypatch):
    tell(monkeypatch, 0.5)
    model = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16))
    report = collapse(model, torch.randn(4, 16)).report
    assert report.merges == []
    assert [refusal.operators for refusal in report.refusals] == [("0", "1")]
    assert "timed as a whole" in report.refusals[0].reason


def test_a_model_that_became_slower_is_returned_as_it_was(monkeypatch):
    tell(monkeypatch, 2.0, after=2.0, unmerged=2.0)
    model = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16))
    result = collapse(model, torch.randn(4, 16))
    assert type(result.model) is nn.Sequential
    assert result.model[0] is not model[0]
    assert result.report.merges == []
    assert "slower than the model itself" in result.report.refusals[-1].reason
    assert result.report.after.depth == result.report.before.depth == 2


def test_merges_that_make_the_whole_slower_are_given_up_and_batch_norms_stay_folded(monkeypatch):
    tell(monkeypatch, 2.0, before=2.0, after=1.5)
    model = nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), nn.Linear(512, 16)).eval()
    x = torch.randn(4, 16)
    result = collapse(model, x)
    assert result.report.fused == ["1"]
    assert result.report.merges == []
    assert [refusal.operators for refusal in result.report.refusals][-1] == ("0", "2")
    assert "slower with this" in result.report.refusals[-1].reason
    assert result.report.speedup.median == 1.0
    assert result.report.relative_difference_float64 < 1e-12
    torch.testing.assert_close(result.model(x), model(x))


def test_what_would_have_far_more_weights_than_before_stays_apart():
    model = nn.Sequential(nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3, dilation=10_000)).eval()
    report = collapse(model, torch.randn(1, 64, 20_010), objective="depth").report
    assert report.merges == []
    assert [refusal.reason for refusal in report.refusals] == ["together they would have 81,932,288 weights"]
    wide = nn.Sequential(nn.Linear(2**14, 2), nn.Linear(2, 2**14)).eval()
    assert [merge.into for merge in collapse(wide, torch.randn(1, 2**14), objective="depth").report.merges] == []
