"""What a compression with a target leaves as it was: the least change that reaches it is wanted."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import CollapseResult, compress
from lightning_easier.pruning import targets
from lightning_easier.report import CompressReport, ModelCost
from lightning_easier.support import timing
from lightning_easier.support.inference import relative_difference
from tests.clocks import Clock, honest, jittering


class Sum(nn.Module):
    """MLPs of some widths, each added times a scale."""

    def __init__(self, widths: list[int], scales: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scales = scales
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for mlp, scale in zip(self.mlps, self.scales, strict=True):
            x = x + mlp(x) * scale
        return x


torch.manual_seed(1)
BATCHES = [torch.randn(64, 32) for _ in range(3)]


def kept(report) -> list[str]:
    """Return which part of the model operators took the place of."""
    return sorted(trial.operators[0].removeprefix("mlps.").split(".")[0] for trial in report.trials if trial.kept)


def test_what_a_later_step_has_made_needless_is_taken_back(monkeypatch):
    """The small MLPs change less for what they save, so that they go first; the large one is enough alone."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    model = Sum([128, 128, 1024], [0.02, 0.02, 0.5]).eval()
    result = compress(model, BATCHES, target_speedup=1.6, max_drift=math.inf)
    report = result.report
    assert kept(report) == ["2"]
    assert report.speedup.median > 1.6
    needless = [trial for trial in report.trials if str(trial.reason).startswith("not needed for the target: ")]
    assert {trial.operators[0] for trial in needless} == {"mlps.0", "mlps.1"}
    assert all("of the 1.6× that was asked for, without it" in trial.reason for trial in needless)
    assert report.ended.startswith(f"the target is reached: {report.speedup} of")
    with torch.no_grad():
        for number in (0, 1):
            assert torch.equal(result.fitted.mlps[number](BATCHES[0]), model.mlps[number](BATCHES[0]))
        assert relative_difference(result.model(BATCHES[0]), result.fitted(BATCHES[0])) < 1e-5
        dense, now = (torch.cat([each(x) for x in BATCHES]) for each in (model, result.fitted))
    changed = float((now - dense).square().sum() / (dense - dense.mean(0)).square().sum())
    assert report.drift == pytest.approx(changed, rel=1e-3)


def test_what_changes_less_takes_the_place_of_a_step_that_passes_the_target(monkeypatch):
    """By drift per saving the largest is before the one in the middle, which is enough."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    model = Sum([192, 640, 448], [0.02, 0.5, 0.45]).eval()
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(float(model(BATCHES[0]).detach().mean()))
        return seen[-1]

    result = compress(model, BATCHES, target_speedup=1.4, evaluate=evaluate, tolerance=100.0, narrow=False)
    report = result.report
    assert kept(report) == ["2"]
    (large,) = (trial for trial in report.trials if trial.operators[0].startswith("mlps.1"))
    assert large.reason.endswith("linear in its place")
    assert 1.4 < report.speedup.median < 1.8
    with torch.no_grad():  # the score that is told is that of the result, whatever was tried last
        assert report.score_after == float(result.fitted(BATCHES[0]).mean()) != large.score
    assert f"{report.score_after:.4f}" in str(report)


def test_what_is_passed_while_the_timings_disagree_comes_back_when_they_agree(monkeypatch):
    """A machine that is busy while things are tried leaves open whether the target is reached, until all is gone."""
    widths, scales = [512, 640, 768, 896], [0.3, 0.4, 0.5, 0.6]
    noise, is_quiet = jittering(1.5), [True]

    def evaluate(_: nn.Module) -> float:
        calls = next(counted)
        is_quiet[0] = calls == 0 or calls > 3
        return 1.0

    def compressed(count: Iterable[int]) -> CompressReport:
        nonlocal counted
        counted = iter(count)
        clock = Clock(lambda now: 1.0 if is_quiet[0] else noise(now))
        monkeypatch.setattr(timing, "stopwatch", clock)
        return compress(Sum(widths, scales).eval(), BATCHES, target_speedup=1.5, evaluate=evaluate).report

    counted = iter(())
    quiet = compressed(itertools.repeat(0))
    busy = compressed(itertools.count())
    assert any("not needed" in str(trial.reason) for trial in busy.trials)
    assert kept(busy) == kept(quiet)


class Deep(nn.Module):
    """A block of some Linears in a row."""

    def __init__(self, depth: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.row = nn.Sequential(*(each for _ in range(depth) for each in (nn.Linear(32, 32), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row(x) * self.scale


def test_a_depth_that_is_passed_is_given_back_and_what_is_too_deep_is_not_timed(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Deep(2, 1e-4), Deep(6, 1e-2), nn.Linear(32, 4)).eval()
    looks = []
    compare = targets.compare
    monkeypatch.setattr(targets, "compare", lambda *args: looks.append(args) or compare(*args))
    report = compress(model, BATCHES, target_depth=5, objective="depth", max_drift=math.inf).report
    assert report.before.depth == 10
    assert report.after.depth <= 5
    assert kept(report) == ["2"]
    assert len(looks) == 2  # when the target was reached, and when it was without the first block


def test_it_stops_to_look_for_what_is_not_needed_where_it_looks_in_vain(monkeypatch):
    """Each look takes a collapse and timings; where those are off, many steps seem to be needed by nothing."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    monkeypatch.setattr(targets.TargetWatch, "is_passed", lambda *_: True)
    monkeypatch.setattr(targets.TargetWatch, "may_do_with", lambda *_: True)
    looks = []
    monkeypatch.setattr(targets.TargetWatch, "look_if_enough", lambda *given: looks.append(given) or "it is not enough")
    model = Sum([256] * 8, [0.02] * 8).eval()
    report = compress(model, BATCHES, target_speedup=1.8, max_drift=math.inf, max_rejections=2, narrow=False).report
    assert sum(trial.kept for trial in report.trials) > 3
    assert len(looks) == 2 * 2


def test_what_is_not_enough_without_a_step_is_timed_beside_the_dense_network_alone(monkeypatch):
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    looks, look = [], targets.TargetWatch._look
    monkeypatch.setattr(targets.TargetWatch, "_look", lambda *given: looks.append(given) or look(*given))
    model = Sum([64, 64], [0.1, 0.1]).eval()
    watch = targets.TargetWatch(model, (BATCHES[0],), "latency", timing.LatencyTable(), targets.Target(speedup=1.5))
    smaller = Sum([64, 48], [0.1, 0.1]).eval()
    assert "of the 1.5× that was asked for" in str(watch.look_if_enough(smaller, 1.0))
    assert not looks
    enough = watch.look_if_enough(Sum([16, 16], [0.1, 0.1]).eval(), 1.0)
    assert isinstance(enough, targets.Look)
    assert enough.attained.is_reached
    assert len(looks) == 1


def test_less_is_enough_where_its_median_is_and_noise_leaves_no_more_doubt_than_of_a_target(monkeypatch):
    """What is a little faster than asked for is not surely that where timings differ; what is slower is not enough."""
    model, smaller = (Sum(widths, [0.1, 0.1]).eval() for widths in ([64, 64], [16, 16]))

    def found(target: float, slowness) -> targets.Look | str:
        monkeypatch.setattr(timing, "stopwatch", Clock(slowness))
        arguments = (BATCHES[0],), "latency", timing.LatencyTable(), targets.Target(speedup=target)
        return targets.TargetWatch(model, *arguments).look_if_enough(smaller, 1.0)

    first = found(1.1, honest)
    assert isinstance(first, targets.Look)
    true = first.result.report.speedup.median
    assert isinstance(found(true / 1.01, honest), targets.Look)
    slower = found(true * 1.01, honest)
    assert isinstance(slower, str)
    assert "that was asked for" in slower
    noisy = found(true / 1.004, jittering(0.03))
    assert isinstance(noisy, targets.Look)
    assert noisy.result.report.speedup.leaves_open(true / 1.004)
    assert noisy.result.report.speedup.median >= true / 1.004


def normed(width: int) -> nn.Module:
    """Return a network that is another one when its batch norms are folded."""
    torch.manual_seed(0)
    layers = nn.Linear(32, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 4)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("asked", ["look_if_due", "look_if_enough"])
def test_a_look_counts_what_was_timed_beside_the_dense_network_before_it(monkeypatch, asked):
    """So it is not timed twice, and a second answer does not take back the first."""
    model, smaller = normed(64), normed(16)
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    found, compare = [], targets.compare

    def noting(models, *given):
        found.append(compare(models, *given))
        return found[-1]

    monkeypatch.setattr(targets, "compare", noting)

    def watch(target: float) -> targets.TargetWatch:
        arguments = (BATCHES[0],), "macs", timing.LatencyTable(), targets.Target(speedup=target)
        return targets.TargetWatch(model, *arguments)

    true = watch(1.1).look(smaller, 1.0).result.report.speedup.median
    was_reached = looked = 0
    for seed in range(12):
        rng = random.Random(seed)
        monkeypatch.setattr(timing, "stopwatch", Clock(lambda _, rng=rng: math.exp(rng.gauss(0, 0.05))))
        found.clear()
        look = getattr(watch(true), asked)(smaller, 1.0)  # it is just as fast as was asked for
        if len(found) == 1:  # not clear at once
            continue
        looked += 1
        beside, both = found
        for mine, name in ((("exact", "dense"), "dense"), (("fitted", "after"), "after")):
            assert both[mine].samples[: len(beside[name].samples)] == beside[name].samples
        assert min(both["exact", "before"].rounds) == len(beside["dense"].samples)  # what is timed for the report
        is_look = isinstance(look, targets.Look)
        was_reached += is_look and look.attained.is_reached
        if is_look:
            assert len(look.result.report.speedup.ratios) == len(both["exact", "dense"].samples)
    assert looked > 4
    assert was_reached >= (looked if asked == "look_if_due" else looked - 2)  # else its median may be below in the end


def test_what_a_first_timing_took_for_fast_enough_by_chance_is_not_reached_by_both(monkeypatch):
    model, smaller = normed(64), normed(16)
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    arguments = (BATCHES[0],), "macs", timing.LatencyTable()
    first = targets.TargetWatch(model, *arguments, targets.Target(speedup=1.1)).look(smaller, 1.0)
    true = first.result.report.speedup.median
    watch = targets.TargetWatch(model, *arguments, targets.Target(speedup=1.1 * true))
    seconds = first.result.report.after.latency.median
    lucky = {
        name: cost(first, (each * seconds,) * 20).latency for name, each in (("dense", 1.2 * true), ("after", 1.0))
    }
    prepared = watch._prepared(smaller, 1.0)
    look = watch._look(prepared, 1.0, lucky)
    assert not look.attained.is_reached
    assert len(look.result.report.speedup.ratios) > 20


class Branch(nn.Module):
    """A residual branch that ends in a batch norm, as it is before it is trained: its scale is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.last(self.relu(self.first(x))))


def test_a_target_that_is_reached_without_what_is_dead_needs_no_trial(monkeypatch):
    """As of a network of timm without pretrained weights: what is zero goes in the exact collapse."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branch(), Branch(), *head)
    images = [torch.randn(8, 3, 9, 11) for _ in range(2)]
    result = compress(model.eval(), images, target_speedup=1.3, max_drift=math.inf)
    assert result.report.trials == []
    assert result.report.ended.startswith("the target is reached")
    assert result.report.speedup.median > 1.3
    with torch.no_grad():
        assert relative_difference(result.model(images[0]), model(images[0])) < 1e-5


def test_whichever_of_a_collapse_is_the_result_is_timed_until_the_target_is_clear(monkeypatch):
    """With merges or without: which one it is, timings tell at last."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    asked, compare = [], targets.compare

    def asking(models, x, bars, *given):
        asked.extend(bars)
        return compare(models, x, bars, *given)

    monkeypatch.setattr(targets, "compare", asking)
    torch.manual_seed(0)
    layers = nn.Linear(32, 256), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 256), nn.Linear(256, 4)
    model = nn.Sequential(*layers).eval()
    watch = targets.TargetWatch(model, (BATCHES[0],), "latency", timing.LatencyTable(), targets.Target(speedup=1.5))
    assert watch.look(model, 0.0).result.report.merges
    of_target = {(after, bar) for (before, (_, after)), bar in asked if before == ("exact", "dense") and bar >= 1.5}
    assert of_target == {(name, bar) for name in ("after", "unmerged") for bar in (1.5, 1.5 * targets._PASSED)}


def test_what_passes_a_target_by_less_than_timings_tell_is_left(monkeypatch):
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    model = Sum([64, 64], [0.1, 0.1]).eval()
    watch = targets.TargetWatch(model, (BATCHES[0],), "latency", timing.LatencyTable(), targets.Target(speedup=1.5))
    look = watch.look(Sum([16, 16], [0.1, 0.1]).eval(), 1.0)
    for beyond, spread, is_passed in ((1.02, 0.0, False), (1.06, 0.0, True), (1.06, 0.1, False)):
        ratios = tuple(1.5 * beyond * (1 + spread * (-1) ** number) for number in range(20))
        report = dataclasses.replace(look.result.report, dense=cost(look, ratios), after=cost(look, (1.0,) * 20))
        assert watch.is_passed(dataclasses.replace(look, result=CollapseResult(look.result.model, report))) == is_passed


def cost(look: targets.Look, samples: tuple[float, ...]) -> ModelCost:
    """Return what a model costs that took so long."""
    return dataclasses.replace(look.result.report.after, latency=timing.Latency.of(samples))


def test_what_is_clearly_too_slow_is_timed_beside_the_dense_network_alone(monkeypatch):
    """All models are timed once it is as fast as it should be."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    monkeypatch.setattr(targets, "_NEARLY", 2.0)  # of which the prices tell too early
    timed, compare = [], targets.compare

    def noted(models, *given):
        latency = compare(models, *given)
        timed.append((len(models), {name: each.median for name, each in latency.items()}))
        return latency

    monkeypatch.setattr(targets, "compare", noted)
    report = compress(
        Sum([256] * 6, [0.02, 0.03, 0.04, 0.05, 0.06, 0.07]).eval(), BATCHES, target_speedup=1.8,
        max_drift=math.inf, narrow=False,
    ).report  # fmt: skip
    assert report.ended.startswith("the target is reached")
    few = [times for count, times in timed if count <= 3]
    speedups = [times["dense"] / times["after"] for times in few]
    assert min(speedups) < 1.8 * (1 - timing.MARGIN)
    whole = [times for count, times in timed if count > 3]
    assert all(times["exact", "dense"] / times["fitted", "after"] >= 1.8 * (1 - timing.MARGIN) for times in whole[:1])
    assert sum(speedup < 1.8 * (1 - timing.MARGIN) for speedup in speedups) == len(few) - 1


@pytest.mark.parametrize(
    ("left", "faster", "due", "not_yet"),
    [
        (0.6, 1 / 0.6, 0.51, 0.52),  # as estimated: 0.1 of the time is missing, 85 % of it has to be saved
        (0.7, 1 / 0.6, 0.63, 0.64),  # more was saved than estimated, by a third
        (0.6, 1 / 0.65, 0.45, 0.46),  # less
        (0.45, 1 / 0.9, 0.225, 0.226),  # all that is left would not be enough by that: half of it
        (0.6, 1 / 1.1, 0.3, 0.301),  # it has become slower
    ],
)
def test_the_next_look_goes_by_what_an_estimate_was_worth_at_the_last(monkeypatch, left, faster, due, not_yet):
    model = Sum([64], [1.0]).eval()
    watch = targets.TargetWatch(model, (BATCHES[0],), "macs", timing.LatencyTable(), targets.Target(speedup=2.0))
    watch._macs, watch._last = 10_000, (left, left, faster)
    for share, expected in ((due, True), (not_yet, False)):
        monkeypatch.setattr(targets, "counted", lambda *_, share=share: round(10_000 * share))
        assert watch._is_due(model, 1.0, 2.0) is expected
