"""Time calls in turn and compare them pair by pair, so that other work on the machine decides nothing.

Seconds that were measured at two moments can't be compared: between them another process may have come or gone. Samples
that were taken one right after the other can, and their ratio hardly notices what slows the machine down for a while.
All that decides anything here is such a ratio.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from statistics import quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)

MARGIN = 0.02
"""Two timings of one thing differ by about this much; less is not an improvement."""

_SECONDS_A_SAMPLE = 0.01
_MAX_RUNS_A_SAMPLE = 200
# What many samples may take in all, and the fewest that tell anything.
_SECONDS_IN_ALL = 1.5
_FEWEST_SAMPLES = 5
# Of a comparison: how many at first, and at most where they leave it open; that takes a longer time, too.
_SAMPLES, _MOST_SAMPLES, _MORE_SECONDS = 15, 60, 4.0
# Of the table of operators: as many at first, and more where they differ from each other by more than this share.
_SAMPLES_OF_AN_OPERATOR, _MOST_SAMPLES_OF_AN_OPERATOR, _SPREAD = 7, 28, 0.05
# Quartiles that are so many times apart, with 1 between them, tell nothing.
_WIDE = 1.5
# So many operators are timed in turn with one yardstick.
_GROUP = 8


def stopwatch(call: Callable[[], Any]) -> Callable[[int], float]:
    """Return what times a call: a number of runs -> seconds a run. It waits until an accelerator is done.

    Every time that is measured in this package comes from here.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return lambda runs: timer.timeit(runs).mean


@dataclass(frozen=True)
class Latency:
    """Time of one call in seconds: the median of several samples, and their spread.

    Attributes:
        median: Median over the samples.
        spread: Interquartile range over the samples.
        samples: The samples, in the order they were taken.
    """

    median: float
    spread: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Latency":
        """Sum up samples."""
        first, middle, third = quantiles(samples, n=4)
        return cls(middle, third - first, tuple(samples))


@dataclass(frozen=True)
class Speedup:
    """How many times faster one call is than another: the ratios of samples that were taken in turn.

    Attributes:
        ratios: Time before per time after, a pair of neighbouring samples each.
    """

    ratios: tuple[float, ...] = field(repr=False)

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the ratios."""
        first, middle, third = quantiles(self.ratios, n=4)
        return first, middle, third

    @property
    def median(self) -> float:
        """Median of the ratios."""
        return self.quartiles[1]

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Between which values the median lies if many more pairs were taken, with a confidence of 95 %.

        They are order statistics: whatever distribution the ratios have, the number of those below the true median is
        binomial. With fewer than six pairs, least and largest (94 % with five).
        """
        ordered, n = sorted(self.ratios), len(self.ratios)
        below, tail = 0, 0.5**n
        while 2 * tail <= 0.05:  # the chance that the true median is outside
            below += 1
            tail += math.comb(n, below) * 0.5**n
        low = max(below - 1, 0)
        return ordered[low], ordered[n - 1 - low]

    def is_above(self, bar: float) -> bool:
        """Tell whether it is so many times faster, by more than noise explains."""
        return self.bounds[0] > bar

    def is_below(self, bar: float) -> bool:
        """Tell whether it is not so many times faster, by more than noise explains."""
        return self.bounds[1] < bar

    def leaves_open(self, bar: float) -> bool:
        """Tell whether the timings disagree about it among themselves."""
        return not (self.is_above(bar) or self.is_below(bar))

    def __str__(self) -> str:
        first, middle, third = self.quartiles
        if self.leaves_open(1.0) and third > _WIDE * first:  # a median of that would be no figure
            return f"unclear ({first:.2f}–{third:.2f}×: the timings disagree)"
        return f"{middle:.2f}× ({first:.2f}–{third:.2f})"


def speed_up(before: Latency, after: Latency) -> Speedup:
    """Compare two latencies that were measured in turn."""
    return Speedup(tuple(b / a for b, a in zip(before.samples, after.samples, strict=True)))


class _Turns:
    """Times several calls in turn, round by round; every other round in the opposite order. Gradients are off.

    Args:
        calls: The calls by name.
        progress: What to call it in a progress bar.
        rounds: How many the progress bar expects.

    Attributes:
        samples: Name -> seconds, one a round.
    """

    def __init__(self, calls: Mapping[Name, Callable[[], Any]], progress: str | None, rounds: int) -> None:
        self.samples: dict[Any, list[float]] = {name: [] for name in calls}
        self._timers = {name: stopwatch(call) for name, call in calls.items()}
        self._runs: dict[Any, int] = {}
        self._slowest = 0.0
        total = len(calls) * (rounds + 1)
        self._bar = tqdm(total=total, desc=progress, leave=False, delay=1, disable=None if progress else True)
        with torch.no_grad():
            for name, seconds_of in self._timers.items():
                seconds_of(2)  # warm-up
                seconds = seconds_of(2)
                self._slowest = max(self._slowest, seconds)
                self._runs[name] = int(min(max(_SECONDS_A_SAMPLE / max(seconds, 1e-9), 1), _MAX_RUNS_A_SAMPLE))
                self._bar.update()

    def rounds_in(self, seconds: float) -> int:
        """Return how many rounds about so many seconds for each call allow, a few at least."""
        return max(_FEWEST_SAMPLES, int(seconds / max(self._slowest, _SECONDS_A_SAMPLE)))

    def take(self, rounds: int) -> None:
        """Take more samples."""
        with torch.no_grad():
            for _ in range(rounds):
                forwards = len(next(iter(self.samples.values()), ())) % 2 == 0
                for name in self._timers if forwards else reversed(self._timers):
                    self.samples[name].append(self._timers[name](self._runs[name]))
                    self._bar.update()

    def take_until(self, is_enough: Callable[[], bool], first: int, most: int) -> None:
        """Take samples until they are enough, or there are as many as there may be."""
        rounds = min(first, self.rounds_in(_SECONDS_IN_ALL))
        self.take(rounds)
        most = min(most, self.rounds_in(_MORE_SECONDS))
        while rounds < most and not is_enough():
            self.take(min(rounds, most - rounds))
            rounds = min(2 * rounds, most)
        self._bar.close()

    @property
    def latencies(self) -> dict[Any, Latency]:
        """What was measured so far."""
        return {name: Latency.of(samples) for name, samples in self.samples.items()}

    def speedup(self, before: Hashable, after: Hashable) -> Speedup:
        """Compare two of the calls."""
        return Speedup(tuple(b / a for b, a in zip(self.samples[before], self.samples[after], strict=True)))


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]], arguments: Sequence[Tensor], *, samples: int = _SAMPLES
) -> dict[str, Latency]:
    """Time several callables on the same arguments, in turn, so that noise meets all of them alike.

    Args:
        candidates: The callables by name.
        arguments: Positional arguments; the device they are on is the device that is timed.
        samples: How many samples to take of each, after a warm-up; fewer where that would take seconds.
    """
    return time_interleaved({name: partial(call, *arguments) for name, call in candidates.items()}, samples=samples)


def time_interleaved(
    calls: Mapping[Name, Callable[[], Any]], *, samples: int, progress: str | None = None
) -> dict[Name, Latency]:
    """Time several calls in turn, so that noise meets all of them alike; gradients are off.

    Args:
        calls: The calls by name.
        samples: How many samples to take of each, after a warm-up; fewer where that would take seconds.
        progress: What to call it in a progress bar, on a terminal, when it takes more than a second; none by default.
    """
    turns = _Turns(calls, progress, samples)
    turns.take_until(lambda: True, samples, samples)
    return turns.latencies


def compare(
    calls: Mapping[str, Callable[..., Any]], arguments: Sequence[Tensor], bars: Mapping[tuple[str, str], float]
) -> dict[str, Latency]:
    """Time several callables in turn until it is clear of some of them whether one is so many times faster.

    Args:
        calls: The callables by name.
        arguments: Positional arguments.
        bars: Names of two of them -> how many times faster than the first the second is to be. More samples are taken
            while :meth:`Speedup.leaves_open` that, up to a limit.
    """
    turns = _Turns({name: partial(call, *arguments) for name, call in calls.items()}, None, _SAMPLES)

    def is_clear() -> bool:
        return not any(turns.speedup(*pair).leaves_open(bar) for pair, bar in bars.items())

    turns.take_until(is_clear, _SAMPLES, _MOST_SAMPLES)
    return turns.latencies


@dataclass
class LatencyTable:
    """Measured times of operators by structure, shape and device; pass one to several collapses to measure once.

    What was measured at different moments can still be compared: everything is timed in turn with one call, the
    yardstick of its device, and noted as a multiple of that. Seconds are those of the moment at which the yardstick
    was timed first.

    Attributes:
        seconds: The time of a call, by what was called.
        speedups: How many times faster one chain of operators is than another, by what they do.
    """

    seconds: dict[Hashable, float] = field(default_factory=dict)
    speedups: dict[Hashable, Speedup] = field(default_factory=dict)
    _yardsticks: dict[Hashable, tuple[Callable[[], Any], float]] = field(default_factory=dict, repr=False)

    def measure(self, calls: Mapping[Hashable, Callable[[], Callable[[], Any]]], device: torch.device) -> None:
        """Time what was not timed yet.

        Args:
            calls: Key -> what makes the call to be timed.
            device: Where it runs.
        """
        missing = {key: make for key, make in calls.items() if key not in self.seconds}
        for group in _groups(missing, _GROUP):
            self._measure({key: missing[key]() for key in group}, (str(device), torch.get_num_threads()))

    def compare(
        self,
        key: Hashable,
        before: Callable[..., Any],
        after: Callable[..., Any],
        arguments: Sequence[Tensor],
        bar: float,
    ) -> Speedup:
        """Time two calls beside each other, if they were not.

        Args:
            key: What they do, and on what.
            before: The one.
            after: The other.
            arguments: Positional arguments of both.
            bar: How many times faster it is to be, see :func:`compare`.
        """
        if key not in self.speedups:
            latency = compare({"before": before, "after": after}, arguments, {("before", "after"): bar})
            self.speedups[key] = speed_up(latency["before"], latency["after"])
        return self.speedups[key]

    def _measure(self, calls: dict[Hashable, Callable[[], Any]], where: Hashable) -> None:
        yardstick: Hashable = _YARDSTICK
        if where in self._yardsticks:
            calls = {_YARDSTICK: self._yardsticks[where][0], **calls}
        turns = _Turns(calls, "Timing operators", _SAMPLES_OF_AN_OPERATOR)

        def is_clear() -> bool:
            compared = [turns.speedup(name, yardstick) for name in turns.samples if name != yardstick]
            return all(high - low <= 2 * _SPREAD * each.median for each in compared for low, high in [each.bounds])

        if where not in self._yardsticks:  # the slowest of those that come first
            turns.take(_SAMPLES_OF_AN_OPERATOR)
            latencies = turns.latencies
            yardstick = max(latencies, key=lambda name: latencies[name].median)
            self._yardsticks[where] = calls[yardstick], latencies[yardstick].median
        turns.take_until(is_clear, _SAMPLES_OF_AN_OPERATOR, _MOST_SAMPLES_OF_AN_OPERATOR)
        unit = self._yardsticks[where][1]
        self.seconds.update(
            (name, unit * turns.speedup(name, yardstick).median) for name in calls if name is not _YARDSTICK
        )


_YARDSTICK = object()


def _groups(names: Mapping[Hashable, Any], size: int) -> Iterator[list[Hashable]]:
    remaining = iter(names)
    while group := list(islice(remaining, size)):
        yield group
