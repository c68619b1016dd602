"""Tests of what decides by time: under a clock that lies it decides alike, or says why it can't."""

import io
import math
import pickle
import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import collapse, compress, linearize
from lightning_easier.pruning import stages, targets
from lightning_easier.support import timing
from lightning_easier.support.timing import LatencyTable, Speedup, compare, measure_latency, speed_up
from tests.clocks import Clock, busy_at_times, busy_between, drifting, honest, jittering, work_of
from tests.collapsing.test_collapse_fit import Mlp

LIARS = {
    "busy at the start": lambda: busy_between(0.0, 0.6),
    "busy later": lambda: busy_between(0.7, 3.0),
    "busy from some moment on": lambda: busy_between(1.1, math.inf),
    "busy at times": lambda: busy_at_times(0.9, 0.3),
    "busy at long times": lambda: busy_at_times(4.0),
    "drifting": lambda: drifting,
    "jittering": lambda: jittering(0.15),
}


@pytest.fixture(params=LIARS)
def liar(request):
    return LIARS[request.param]()


def under(monkeypatch, slowness):
    clock = Clock(slowness)
    monkeypatch.setattr(timing, "stopwatch", clock)
    return clock


class Residual(nn.Module):
    """MLPs of different widths, of which the later ones say less."""

    def __init__(self, widths=(256, 128, 512, 192, 384)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, mlp in enumerate(self.mlps):
            x = x + mlp(x) / (1 + 2 * number)
        return x


def batches(count=4):
    torch.manual_seed(1)
    return [torch.randn(64, 32) for _ in range(count)]


def chosen(result):
    return [(trial.sites, trial.kind, trial.kept) for trial in result.report.trials]


@pytest.fixture(scope="module", params=[1.42, 3.0, None])
def honestly(request):
    """What is compressed to a target while nothing else runs; no set of MLPs comes very near to it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        under(monkeypatch, honest)
        result = compress(Residual(), batches(), target_speedup=request.param, max_drift=math.inf, narrow=False)
    return request.param, result


def test_compress_chooses_alike_under_a_clock_that_lies(monkeypatch, liar, honestly):
    target, expected = honestly
    assert target is None or expected.report.speedup.median >= target
    assert target is None or 0 < len(chosen(expected)) < 5, "the target is reached on the way"
    under(monkeypatch, liar)
    found = compress(Residual(), batches(), target_speedup=target, max_drift=math.inf, narrow=False)
    assert chosen(found) == chosen(expected)
    assert found.report.speedup.median == pytest.approx(expected.report.speedup.median, rel=0.2)


def of_as_many_channels(monkeypatch, slowness):
    under(monkeypatch, slowness)
    report = compress(Residual(), batches(), target_speedup=1.42, max_drift=math.inf).report
    assert report.ended.startswith("the target is reached")
    return report.speedup.median


@pytest.fixture(scope="module")
def speedup_of_channels():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return of_as_many_channels(monkeypatch, honest)


def test_compress_takes_as_many_channels_under_a_clock_that_lies(monkeypatch, liar, speedup_of_channels, request):
    """Widths lie near to each other: which is chosen may differ, not that a target is reached and what is needed."""
    is_jittering = "jittering" in request.node.name
    one, other = speedup_of_channels, of_as_many_channels(monkeypatch, liar)
    # what is just fast enough, 1.43 where 1.42 is asked for, is not surely so where each sample is off by a sixth
    assert other >= 1.42 * (1 - timing.MARGIN)
    assert other == pytest.approx(one, rel=0.3 if is_jittering else 0.2)


def test_a_collapse_merges_alike_under_a_clock_that_lies(monkeypatch, liar):
    torch.manual_seed(0)
    model = nn.Sequential(  # one pair that pays, one that does not, one that nearly does
        nn.Conv2d(8, 64, 1), nn.Conv2d(64, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    x = torch.randn(4, 8, 20, 24)
    under(monkeypatch, honest)
    expected = collapse(model, x).report
    assert [merge.operators for merge in expected.merges] == [("0", "1"), ("6", "7")]
    under(monkeypatch, liar)
    found = collapse(model, x).report
    assert [merge.operators for merge in found.merges] == [merge.operators for merge in expected.merges]
    assert found.speedup.median == pytest.approx(expected.speedup.median, rel=0.2)


def test_a_table_holds_times_that_can_be_compared_whenever_they_were_measured(monkeypatch, liar):
    under(monkeypatch, liar)
    table = LatencyTable()
    layers = {width: nn.Linear(64, width) for width in (16, 64, 256, 1024)}
    x = torch.randn(256, 64)
    for width, layer in layers.items():  # one at a time: the machine is another one at each
        table.measure({width: lambda layer=layer: lambda: layer(x)}, x.device)
    true = {width: work_of(lambda layer=layer: layer(x)) for width, layer in layers.items()}
    for width in layers:
        assert table.seconds[width] / table.seconds[16] == pytest.approx(true[width] / true[16], rel=0.12)


class Taking:
    """Stands in for a stopwatch whose calls say how long they take; counts the samples of each."""

    def __init__(self, jitter: float = 0.0) -> None:
        self.samples: dict[float, int] = {}
        self._numbers, self._jitter = random.Random(0), jitter

    def __call__(self, call):
        def seconds_of(runs: int) -> float:
            seconds = call()
            self.samples[seconds] = self.samples.get(seconds, 0) + 1
            return seconds * math.exp(self._numbers.gauss(0, self._jitter))

        return seconds_of


def measured(table: LatencyTable, *seconds: float) -> None:
    table.measure({each: lambda each=each: lambda: each for each in seconds}, torch.device("cpu"))


@pytest.mark.parametrize(("first", "yardstick"), [((0.0004, 0.002, 0.03), 0.002), ((0.0001, 0.0004), 0.0004)])
def test_what_all_is_timed_along_with_is_the_quickest_that_is_more_than_noise(monkeypatch, first, yardstick):
    watch = Taking()
    monkeypatch.setattr(timing, "stopwatch", watch)
    table = LatencyTable()
    measured(table, *first)
    before = dict(watch.samples)
    measured(table, 0.5)
    assert {each for each in first if watch.samples[each] > before[each]} == {yardstick}
    assert table.seconds == pytest.approx({each: each for each in (*first, 0.5)})


def test_slow_operators_are_timed_no_more_often_where_they_jitter(monkeypatch):
    """Seven samples each take longer than a group may; of quick ones there are more."""
    samples = {}
    for seconds in (0.06, 0.0001):
        watch = Taking(jitter=0.5)
        monkeypatch.setattr(timing, "stopwatch", watch)
        calls = {number: lambda s=seconds + number * 1e-9: lambda: s for number in range(8)}
        LatencyTable().measure(calls, torch.device("cpu"))
        samples[seconds] = max(watch.samples.values())
    assert samples[0.06] < 20 < samples[0.0001]


def test_a_table_can_be_pickled_once_it_has_measured():
    table = LatencyTable()
    collapse(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)), torch.randn(4, 8), latencies=table)
    again = pickle.loads(pickle.dumps(table))
    assert again.seconds == table.seconds


def test_where_the_timings_disagree_nothing_is_merged_and_the_reason_says_so(monkeypatch):
    under(monkeypatch, honest)

    def compare_amid_noise(*arguments):
        with monkeypatch.context() as inside:
            under(inside, jittering(2.0))
            return compare(*arguments)

    monkeypatch.setattr(timing, "compare", compare_amid_noise)
    report = collapse(nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 64)), torch.randn(64, 64)).report
    assert report.merges == []
    assert "the timings disagree on whether it pays" in report.refusals[0].reason
    assert "objective='macs'" in report.refusals[0].reason


def test_a_target_that_the_work_has_passed_by_far_ends_the_compression_and_says_why(monkeypatch):
    """A clock by which every call takes as long as any other: nothing is ever faster."""
    monkeypatch.setattr(timing, "stopwatch", lambda call: lambda runs: 1e-3)
    prices = iter(range(10**6, 0, -1))
    monkeypatch.setattr(LatencyTable, "measure", lambda self, calls, device: self.seconds.update(
        (key, work_of(make())) for key, make in calls.items() if key not in self.seconds and next(prices)
    ))  # fmt: skip
    with pytest.warns(UserWarning, match="it is no use to go on"):
        result = compress(Residual(), batches(), target_speedup=1.5, max_drift=math.inf)
    assert "the target is not reached: 1.00×" in result.report.ended
    assert sum(trial.kept for trial in result.report.trials) < 5


def test_the_figure_that_ends_a_compression_is_that_of_its_table(monkeypatch):
    under(monkeypatch, jittering(0.1))
    report = compress(Residual(), batches(), target_speedup=1.5, max_drift=math.inf).report
    assert report.ended == f"the target is reached: {report.speedup} of the 1.5× that was asked for"
    assert str(report.speedup) in str(report).split("compressed")[1]
    assert report.speedup == report.collapse.speedup


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=70))
def test_bounds_hold_the_median_and_grow_narrower(ratios):
    speedup = Speedup(tuple(ratios))
    low, high = speedup.bounds
    assert low <= median(ratios) <= high
    assert speedup.is_above(low) is False
    assert speedup.is_above(low * 0.99)
    assert speedup.is_below(high * 1.01)
    assert speedup.leaves_open(median(ratios))


def test_bounds_miss_the_true_median_as_seldom_as_is_said():
    numbers = random.Random(0)
    for n in (5, 7, 15, 40):
        missed = 0
        for _ in range(2000):
            low, high = Speedup(tuple(numbers.lognormvariate(0, 1) for _ in range(n))).bounds
            missed += not low <= 1.0 <= high
        assert missed / 2000 < (0.08 if n == 5 else 0.06)
        assert n == 5 or missed / 2000 > 0.002, "they are not wider than need be"


def test_a_comparison_goes_on_while_it_is_open(monkeypatch):
    def samples_for(bar):
        under(monkeypatch, jittering(0.2))
        calls = {"before": nn.Linear(64, 512), "after": nn.Linear(64, 256)}
        latency = compare(calls, (torch.randn(512, 64),), [(("before", "after"), bar)])
        return len(latency["before"].samples)

    assert samples_for(1.2) < samples_for(1.98)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=70), st.floats(0.05, 20))
def test_with_no_more_samples_nothing_is_settled_that_is_open(ratios, bar):
    speedup = Speedup(tuple(ratios))
    if min(abs(bar - bound) for bound in speedup.bounds) > 1e-9:
        assert speedup.may_be_settled(bar, len(ratios)) == (not speedup.leaves_open(bar))
    assert speedup.may_be_settled(speedup.bounds[0] / 1.01, 10**6)
    assert speedup.may_be_settled(speedup.bounds[1] * 1.01, len(ratios))


@pytest.mark.parametrize(("taken", "at_most"), [(15, 60), (30, 60), (30, 45)])
def test_what_is_given_up_would_seldom_have_been_settled(taken, at_most):
    numbers = random.Random(0)
    given_up = settled = 0
    for _ in range(4000):
        bar = 1 + numbers.gauss(0, 0.05)
        ratios = tuple(numbers.lognormvariate(0, 0.2) for _ in range(at_most))
        now = Speedup(ratios[:taken])
        if now.leaves_open(bar) and not now.may_be_settled(bar, at_most):
            given_up += 1
            settled += not Speedup(ratios).leaves_open(bar)
    assert given_up > 200
    assert settled / given_up < 0.15


def test_a_comparison_ends_where_as_many_samples_as_there_may_be_would_leave_it_open(monkeypatch):
    def samples_for(bar):
        under(monkeypatch, jittering(0.2))
        calls = {"before": nn.Linear(64, 512), "after": nn.Linear(64, 256)}
        return len(compare(calls, (torch.randn(512, 64),), [(("before", "after"), bar)])["before"].samples)

    found = samples_for(2.0)
    monkeypatch.setattr(Speedup, "may_be_settled", lambda *_: True)
    assert 15 <= found < samples_for(2.0) == 120


@pytest.mark.real_clock
def test_a_stopwatch_runs_what_it_times_as_often_as_it_says():
    called: list[int] = []
    seconds_of = timing.stopwatch(lambda: called.append(1))
    for runs in (1, 5):
        called.clear()
        assert seconds_of(runs) > 0
        assert len(called) == runs


@pytest.mark.parametrize(("seconds", "warm_ups"), [((0.03, 0.04), 1), ((0.04, 0.06), 0)])
def test_calls_of_one_comparison_are_warmed_up_alike(monkeypatch, seconds, warm_ups):
    """Else the slower one would seem slower still: the other finds its own values in the caches."""
    ran: list[float] = []
    monkeypatch.setattr(timing, "stopwatch", lambda call: lambda runs: ran.append(call()) or call())
    calls = {each: lambda each=each: each for each in seconds}
    latencies = timing.time_interleaved(calls, samples=6)
    assert {len(each.samples) for each in latencies.values()} == {6}
    assert {ran.count(each) for each in seconds} == {2 + 6 * (1 + warm_ups)}


def test_a_first_run_that_was_held_up_is_not_what_is_reckoned_with(monkeypatch):
    calls, ran = iter([0.5, *[0.001] * 10**4]), []
    monkeypatch.setattr(timing, "stopwatch", lambda call: lambda runs: ran.append(runs) or next(calls))
    latencies = timing.time_interleaved({"it": print}, samples=12)
    assert len(latencies["it"].samples) == 12
    assert ran[-1] == 10


@pytest.mark.parametrize(
    ("calls", "seconds", "rounds"), [(1, 0.2, 12), (1, 0.01, 15), (2, 0.2, 6), (30, 0.02, 5), (30, 0.005, 8)]
)
def test_the_seconds_of_the_first_samples_are_those_of_all_calls_together(monkeypatch, calls, seconds, rounds):
    """Thirty blocks of a network that take as long as one call each would take as many times the seconds."""
    monkeypatch.setattr(timing, "stopwatch", lambda call: lambda runs: seconds)
    latencies = timing.time_interleaved(dict.fromkeys(range(calls), print), samples=15)
    assert {len(each.samples) for each in latencies.values()} == {rounds}


def test_time_that_a_busy_machine_takes_is_counted_as_it_passes(monkeypatch):
    """What takes ten times as long as at first would take ten times the seconds, if only estimated."""
    ran = []
    monkeypatch.setattr(timing, "stopwatch", lambda call: lambda runs: ran.append(1) or (0.2 if len(ran) < 5 else 2.0))
    calls = {"one": nn.Identity(), "other": nn.Identity()}
    latency = compare(calls, (torch.zeros(1),), [(("one", "other"), 1.0)])
    assert len(latency["one"].samples) <= 12 + 16 / 4 + 1


def test_what_decides_nothing_is_timed_by_the_fewest_samples_that_bound_a_median_half_of_them_in_either_order(
    monkeypatch,
):
    under(monkeypatch, honest)
    calls = {"before": nn.Linear(64, 512), "after": nn.Linear(64, 256)}
    latency = compare(calls, (torch.randn(512, 64),), [])
    assert [len(each.samples) for each in latency.values()] == [6, 6]
    bounds = speed_up(latency["before"], latency["after"])
    assert 2 * 0.5 ** len(bounds.ratios) <= 0.05 < 2 * 0.5 ** (len(bounds.ratios) - 1)


@pytest.mark.real_clock
def test_a_stopwatch_asks_once_whether_there_is_an_accelerator(monkeypatch):
    """Torch asks before and after each sample, and the time that it takes to ask would be that of the call."""
    asked: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: asked.append(1) and False)
    seconds_of = timing.stopwatch(lambda: None)
    for _ in range(5):
        assert seconds_of(1) > 0
    assert len(asked) == 1


def test_several_bars_of_one_pair_are_all_asked_for(monkeypatch):
    under(monkeypatch, jittering(0.1))
    one, other = nn.Linear(64, 512), nn.Linear(64, 512)
    calls, x = {"a": one, "same": one, "b": other}, torch.randn(512, 64)
    clear, is_open = (("same", "b"), 3.0), (("a", "b"), 1.0)
    counts = [len(compare(calls, (x,), bars)["a"].samples) for bars in ([clear], [is_open, clear], [clear, is_open])]
    assert counts[0] == 15 < counts[1] == counts[2]


def test_of_a_comparison_only_what_is_open_is_timed_on(monkeypatch):
    """One pair is clear at once, and one never is: what it says is still of the rounds in which both were timed."""
    under(monkeypatch, jittering(0.1))
    calls = {name: nn.Linear(64, width) for name, width in (("slow", 2048), ("quick", 64), ("one", 512), ("two", 512))}
    latency = compare(calls, (torch.randn(512, 64),), [(("slow", "quick"), 2.0), (("one", "two"), 1.0)])
    counts = {name: len(each.samples) for name, each in latency.items()}
    assert counts["slow"] == counts["quick"] == 15 < counts["one"] == counts["two"]
    true = work_of(lambda: calls["slow"](torch.randn(512, 64))) / work_of(lambda: calls["one"](torch.randn(512, 64)))
    across = speed_up(latency["slow"], latency["one"])
    assert len(across.ratios) == 15
    assert across.median == pytest.approx(true, rel=0.15)
    for each in latency.values():  # seconds that stand side by side are of the same rounds
        assert each.median == pytest.approx(median(each.samples[:15]))


def test_rounds_of_an_earlier_comparison_count_in_one_that_goes_on_with_others_beside(monkeypatch):
    under(monkeypatch, jittering(0.1))
    calls = {name: nn.Linear(64, width) for name, width in (("one", 512), ("two", 256), ("late", 64))}
    x, bar = torch.randn(512, 64), (("one", "two"), 1.9)
    early = compare({name: calls[name] for name in ("one", "two")}, (x,), [bar])
    before = speed_up(early["one"], early["two"])
    assert before.is_above(1.9)
    both = compare(calls, (x,), [bar], earlier={"a": early["one"], **early})  # "a" is none of the calls
    rounds = len(before.ratios)
    assert rounds > 15
    for name in ("one", "two"):
        assert both[name].samples[:rounds] == early[name].samples
        assert both[name].rounds == tuple(range(rounds + 15))  # it is clear by the earlier ones: no more than at first
    assert both["late"].rounds == tuple(range(rounds, rounds + 15))
    pooled, across = speed_up(both["one"], both["two"]), speed_up(both["one"], both["late"])
    assert pooled.ratios[:rounds] == before.ratios
    assert len(pooled.ratios) == rounds + 15
    assert across.ratios == tuple(
        a / b for a, b in zip(both["one"].samples[rounds:], both["late"].samples, strict=True)
    )
    for each in both.values():  # seconds that stand side by side are of the same rounds
        assert each.median == pytest.approx(median(each.samples[-15:]))


def test_what_goes_on_is_neither_estimated_again_nor_taken_more_often_than_one_comparison_would(monkeypatch):
    watch = Taking(jitter=0.2)
    monkeypatch.setattr(timing, "stopwatch", watch)
    calls, seconds = {"one": lambda: 0.02, "other": lambda: 0.0101, "late": lambda: 0.01}, {0.02, 0.0101}
    monkeypatch.setattr(timing, "call", lambda each, _: each())
    bar = (("one", "other"), 1.98)
    monkeypatch.setattr(Speedup, "may_be_settled", lambda *_: True)
    early = compare({name: calls[name] for name in ("one", "other")}, (), [bar])
    assert len(early["one"].samples) == 120
    assert {watch.samples.pop(each) for each in seconds} == {2 + 2 * 120}  # each is warmed up before
    both = compare(calls, (), [bar], earlier=early)
    assert {watch.samples[each] for each in seconds} == {2 * 15}  # with the one that comes late, and no more
    assert {name: len(each.samples) for name, each in both.items()} == {"one": 135, "other": 135, "late": 15}


def test_what_comes_late_is_timed_for_as_long_as_in_a_comparison_of_its_own(monkeypatch):
    watch = Taking(jitter=0.2)
    monkeypatch.setattr(timing, "stopwatch", watch)
    calls = {"one": lambda: 0.02, "other": lambda: 0.0101, "late": lambda: 0.01}
    monkeypatch.setattr(timing, "call", lambda each, _: each())
    monkeypatch.setattr(Speedup, "may_be_settled", lambda *_: True)
    pairs = {name: calls[name] for name in ("one", "other")}
    early = compare(pairs, (), [(("one", "other"), 1.98)])
    assert len(early["one"].samples) == 120
    both = compare(calls, (), [(("one", "other"), 1.98), (("other", "late"), 1.01)], earlier=early)
    assert {name: len(each.samples) for name, each in both.items()} == {"one": 135, "other": 240, "late": 120}
    few = compare(pairs, (), [])
    assert len(few["one"].samples) == 6
    again = compare(pairs, (), [(("one", "other"), 1.98)], earlier=few)  # all are known, and go on where that is open
    assert {len(each.samples) for each in again.values()} == {6 + 120}  # its last step is not cut


def test_what_comes_late_gets_the_fewest_samples_though_the_time_is_over(monkeypatch):
    under(monkeypatch, honest)
    calls = {name: nn.Linear(64, width) for name, width in (("one", 512), ("late", 64))}
    early = compare({"one": calls["one"]}, (torch.randn(512, 64),), [])
    both = compare(calls, (torch.randn(512, 64),), [(("one", "late"), 2.0)], timing.Pace(lambda: 0.0), early)
    assert {name: len(each.samples) for name, each in both.items()} == {"one": 6 + 5, "late": 5}


def test_calls_are_timed_in_turn_and_in_both_orders(monkeypatch):
    order = []

    def stopwatch(call):
        return lambda runs: order.append(call.args[0]) or 1.0

    monkeypatch.setattr(timing, "stopwatch", stopwatch)
    calls = {"a": min, "b": max}
    measure_latency(calls, (), samples=4)
    assert [function.__name__ for function in order[2:]] == ["min", "max", "max", "min", "min", "max", "max", "min"]


def test_a_ratio_does_not_notice_what_slows_both(monkeypatch, liar):
    under(monkeypatch, liar)
    calls = {"before": Mlp(), "after": nn.Linear(8, 8)}
    x = torch.randn(4096, 8)
    latency = measure_latency(calls, (x,))
    before, after = (work_of(lambda call=call: call(x)) for call in calls.values())
    assert speed_up(latency["before"], latency["after"]).median == pytest.approx(before / after, rel=0.15)


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_what_was_not_changed_is_never_faster(monkeypatch, spread, objective):
    model = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 8))
    for _ in range(4):
        under(monkeypatch, jittering(spread))
        with pytest.warns(UserWarning, match="the target is not reached"):
            report = compress(model, batches(1), target_speedup=1.15, objective=objective, include=[]).report
        assert report.trials == []


def test_a_target_that_the_timings_leave_open_is_not_reached():
    wide, close = Speedup((0.4, 0.6, 1.9, 2.4, 3.1, 4.0, 5.0)), Speedup((1.45, 1.5, 1.5, 1.5, 1.51, 1.52, 1.55))
    assert not _attained_at(wide, 1.5).is_reached
    assert "leave it open" in _attained_at(wide, 1.5).words
    assert str(wide) == "unclear (0.60–4.00×: the timings disagree)"
    assert _attained_at(close, 1.47).is_reached
    assert str(close) == "1.50× (1.50–1.52)"


def _attained_at(speedup, target):
    model = nn.Sequential(nn.Linear(8, 4))
    report = collapse(model, torch.randn(2, 8)).report
    before, after = (list(speedup.ratios), [1.0] * len(speedup.ratios))
    report.dense = replace(report.dense, latency=timing.Latency.of(before))
    report.after = replace(report.after, latency=timing.Latency.of(after))
    return targets._attained(report, target, None)


@pytest.mark.parametrize("objective", ["latency", "macs", "depth"])
def test_whether_a_run_is_there_is_asked_of_as_many_samples_whatever_is_made_least(monkeypatch, objective):
    under(monkeypatch, honest)
    model, value = (
        linearize(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)), ["1"]),
        torch.randn(64, 64),
    )
    answer, report = targets.attained(model, (value,), targets.Target(speedup=1.5), objective, LatencyTable())
    assert answer.is_reached
    assert len(report.speedup.ratios) == 15


def test_a_target_is_asked_for_where_nothing_can_be_counted(monkeypatch):
    under(monkeypatch, honest)
    monkeypatch.setattr(targets, "counted", lambda *_: None)
    report = compress(
        Residual(), batches(), target_speedup=1.5, objective="macs", max_drift=math.inf, narrow=False
    ).report
    assert report.ended.startswith("the target is reached")
    assert 0 < len(report.trials) < 5


@pytest.mark.parametrize("options", [{}, {"target_speedup": 3.0}])
def test_timings_keep_to_the_minutes(monkeypatch, options):
    """The counting clock is that of the budget, too: only timings take time."""

    def seconds_within(minutes):
        clock = under(monkeypatch, jittering(0.3))
        monkeypatch.setattr(stages, "monotonic", lambda: clock.now)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the target may not be reached in time
            report = compress(Residual(), batches(), max_drift=math.inf, max_minutes=minutes, **options).report
        return clock.now, report

    free, report = seconds_within(None)
    assert not any("max_minutes" in note for note in report.notes)
    for share in (0.75, 0.5, 0.25):
        taken, report = seconds_within(share * free / 60)
        assert taken < share * free + 0.25 * free, "the fewest samples of what has begun are taken in any case"
        assert any("the bounds of speed-ups are wider" in note for note in report.notes)
        assert len(report.speedup.ratios) >= 5


def test_calls_that_are_one_are_timed_once_under_both_names(monkeypatch):
    under(monkeypatch, jittering(0.3))
    one, other = nn.Linear(64, 512), nn.Linear(64, 64)
    latency = compare({"a": one, "b": other, "c": one}, (torch.randn(512, 64),), [(("a", "c"), 1.0), (("a", "b"), 2.0)])
    assert latency["a"] is latency["c"]
    assert speed_up(latency["a"], latency["b"]).is_above(2.0)


def test_a_pace_that_is_over_leaves_the_fewest_samples_and_says_so(monkeypatch):
    under(monkeypatch, honest)
    told = []
    x = torch.randn(512, 64)
    calls = {"before": nn.Linear(64, 512), "after": nn.Linear(64, 256)}
    for left, samples in ((0.0, 5), (math.inf, 15)):
        told.clear()
        pace = timing.Pace(lambda left=left: left, told.append)
        latency = compare(calls, (x,), [(("before", "after"), 1.0)], pace)
        assert len(latency["before"].samples) == samples
        assert pace.was_short == (left == 0.0)
        assert sum(told) == pytest.approx(1.0)


def test_the_bar_over_operators_ends_at_its_total(monkeypatch):
    under(monkeypatch, jittering(0.5))  # more samples are taken
    bars = []

    class Bar(timing.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO(), "delay": 0})
            self.seen = [self.n]
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

    monkeypatch.setattr(timing, "tqdm", Bar)
    table = LatencyTable()
    layers = [nn.Linear(64, width) for width in range(16, 26)]
    x = torch.randn(256, 64)
    table.measure({width: lambda layer=layer: lambda: layer(x) for width, layer in enumerate(layers)}, x.device)
    assert len(bars) == 2
    for bar in bars:
        assert bar.seen == sorted(bar.seen)
        assert bar.seen[-1] == bar.total


def test_a_gpu_is_the_current_one_while_something_is_timed_on_it(monkeypatch):
    """What waits until it is done waits for the current one only."""
    current = []

    @contextmanager
    def be_current(device):
        current.append(device)
        yield
        current.pop()

    def run(*_):
        assert current == [device]
        ran.append(device)

    def stopwatch(call):
        return lambda runs: call() or 0.1

    monkeypatch.setattr(torch.cuda, "device", be_current)
    monkeypatch.setattr(timing, "stopwatch", stopwatch)
    device, ran = torch.device("cuda:1"), []
    arguments = [SimpleNamespace(device=device)]
    LatencyTable().measure({"operator": lambda: run}, device)
    timed = len(ran)
    assert timed
    measure_latency({"a": run, "b": run}, arguments)
    assert len(ran) > timed
    timed = len(ran)
    compare({"a": run, "b": lambda *_: run()}, arguments, [(("a", "b"), 0.5)])
    assert len(ran) > timed
    assert not current
