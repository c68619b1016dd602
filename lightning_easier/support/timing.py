"""Time calls in turn and compare them pair by pair, so that other work on the machine decides nothing.

Seconds that were measured at two moments can't be compared: between them another process may have come or gone. Samples
that were taken one right after the other can, and their ratio hardly notices what slows the machine down for a while.
All that decides anything here is such a ratio.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from statistics import quantiles
from timeit import Timer, default_timer
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_easier.support.calls import call
from lightning_easier.support.devices import current

Name = TypeVar("Name", bound=Hashable)

MARGIN = 0.02
"""Two timings of one thing differ by about this much; less is not an improvement."""

_SECONDS_A_SAMPLE = 0.01
# Calls that take so long have little to warm up; one that is off by so much for once is not timed as if it always were.
_SLOW, _VERY_SLOW = 0.05, 1.0
# What a clock that is too coarse tells of nothing is no zero.
_LEAST = 1e-9
_MAX_RUNS_A_SAMPLE = 200
# What the first samples of all calls may take together, without what warms them up; and the fewest that tell anything.
_SECONDS_IN_ALL = 2.5
_FEWEST_SAMPLES = 5
# Of a comparison: how many at first, at most where they leave it open, and how many seconds those after the first take.
_SAMPLES, _MOST_SAMPLES, _MORE_SECONDS = 15, 120, 16.0
# Of one that decides nothing: the fewest by which a median is bounded with 95 %, half of them in either order
_SAMPLES_TO_TELL = 6
# Of the table of operators: as many at first, and more where they differ from each other by more than this share, but
# not for more seconds a group: there may be hundreds, and a search compares prices that are far apart.
_SAMPLES_OF_AN_OPERATOR, _MOST_SAMPLES_OF_AN_OPERATOR, _SPREAD, _SECONDS_OF_A_GROUP = 7, 28, 0.05, 1.0
# Of those that are timed first, the quickest that takes so long is the yardstick: all others are timed along with it.
_YARDSTICK_SECONDS = 1e-3
# Quartiles that are so many times apart, with 1 between them, tell nothing.
_WIDE = 1.5
# So many operators are timed in turn with one yardstick.
_GROUP = 8


def stopwatch(call: Callable[[], Any]) -> Callable[[int], float]:
    """Return what times a call: a number of runs -> seconds a run. It waits until the current accelerator is done.

    It runs nothing besides: torch's own ``Timer`` runs a call twice before each sample, two thirds of the time of what
    is slow. Every time of a whole call that is measured in this package comes from here.
    """
    timed = Timer(call, timer=_when_done if torch.accelerator.is_available() else default_timer)
    return lambda runs: max(timed.timeit(runs) / runs, _LEAST)


def _when_done() -> float:
    torch.accelerator.synchronize()
    return default_timer()


def _device_of(arguments: Sequence[Tensor]) -> torch.device | None:
    return next((each.device for each in arguments), None)


@dataclass(frozen=True)
class Latency:
    """Time of one call in seconds: the median of several samples, and their spread.

    Attributes:
        median: Median over the rounds in which all took part that were timed in turn.
        spread: Interquartile range over the same.
        samples: All samples, in the order they were taken: one a round, in which others took theirs.
        rounds: The number of each sample's round, of all that were timed in turn; 0, 1 and so on if it has none.
    """

    median: float
    spread: float
    samples: tuple[float, ...] = field(repr=False)
    rounds: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Latency":
        """Sum up samples, one a round from the first on."""
        return cls.by_round(dict(enumerate(samples)))

    @classmethod
    def by_round(cls, samples: Mapping[int, float], common: Collection[int] | None = None) -> "Latency":
        """Sum up samples.

        Args:
            samples: Number of a round -> the sample.
            common: The rounds in which all took part; all of them by default.
        """
        first, middle, third = quantiles([samples[each] for each in (samples if common is None else common)], n=4)
        return cls(middle, third - first, tuple(samples.values()), tuple(samples))

    @property
    def of_rounds(self) -> dict[int, float]:
        """Number of a round -> the sample."""
        return dict(zip(self.rounds or range(len(self.samples)), self.samples, strict=True))


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

    def may_be_settled(self, bar: float, samples: int) -> bool:
        """Tell whether so many samples in all would hardly leave it open still.

        The more there are, the nearer the bounds come to the median, with the square root of their number. By then the
        median itself may have moved, as a rule not by more than half of what the bounds leave open today.

        Args:
            bar: How many times faster it is to be.
            samples: How many there may be in all, those that there are among them.
        """
        (low, high), share = self.bounds, min(1.0, len(self.ratios) / samples)
        kept, moved = math.sqrt(share), math.sqrt(1 - share) / 2
        below, above = self.median - low, high - self.median
        return self.median + moved * above - kept * below > bar or self.median - moved * below + kept * above < bar

    def __str__(self) -> str:
        first, middle, third = self.quartiles
        if self.leaves_open(1.0) and third > _WIDE * first:  # a median of that would be no figure
            return f"unclear ({first:.2f}–{third:.2f}×: the timings disagree)"
        return f"{middle:.2f}× ({first:.2f}–{third:.2f})"


def speed_up(before: Latency, after: Latency) -> Speedup:
    """Compare two latencies that were measured in turn, by the rounds in which both were."""
    return _speed_up(before.of_rounds, after.of_rounds)


def _speed_up(before: Mapping[int, float], after: Mapping[int, float]) -> Speedup:
    return Speedup(tuple(seconds / after[number] for number, seconds in before.items() if number in after))


def _forever() -> float:
    return math.inf


def _nobody(share: float) -> None: ...


@dataclass
class Pace:
    """How long timings may take, and who is told how far they are.

    Attributes:
        left: Returns for how many more seconds may be timed. The fewest samples that tell anything are always taken.
        tell: Called while something is timed, with the share of its greatest length that has passed since the last
            call; over one timing they add up to 1.
        was_short: Whether something was timed with fewer samples than it would have been without a limit.
    """

    left: Callable[[], float] = _forever
    tell: Callable[[float], object] = _nobody
    was_short: bool = False


class _Turns:
    """Times several calls in turn, round by round; every other round in the opposite order. Gradients are off.

    Args:
        calls: The calls by name.
        first: How many rounds at first; fewer where all calls together would take seconds.
        most: How many at most.
        pace: How long it may take.
        progress: What to call it in a progress bar; none by default.
        seconds: How long the rounds after the first may take together.
        device: Where the calls run; the current one by default.
        earlier: What was timed in turn of some of the calls before: these rounds count, and go on.

    Attributes:
        samples: Name -> number of a round -> seconds, for each round that it took part in.
    """

    def __init__(
        self,
        calls: Mapping[Name, Callable[[], Any]],
        first: int,
        most: int,
        pace: Pace | None = None,
        progress: str | None = None,
        seconds: float = _MORE_SECONDS,
        device: torch.device | None = None,
        earlier: Mapping[Any, Latency] = MappingProxyType({}),
    ) -> None:
        self._device = device
        known = {name: latency for name, latency in earlier.items() if name in calls}
        self.samples: dict[Any, dict[int, float]] = {
            name: known[name].of_rounds if name in known else {} for name in calls
        }
        self._timers = {name: stopwatch(call) for name, call in calls.items()}
        self._pace = Pace() if pace is None else pace
        with torch.no_grad(), current(device):
            once = {
                name: known[name].median if name in known else self._estimate(seconds_of)
                for name, seconds_of in self._timers.items()
            }
        slowest = max([_SECONDS_A_SAMPLE, *once.values()])
        # all alike: what was run just before has its values in the caches. What ran before it has left others there
        self._warm_ups = int(slowest < _SLOW)
        self._runs = {
            name: int(min(max(_SECONDS_A_SAMPLE / each, 1), _MAX_RUNS_A_SAMPLE)) for name, each in once.items()
        }
        self._seconds = {  # that one sample takes, about
            name: (self._runs[name] + self._warm_ups) * each for name, each in once.items()
        }
        a_round = sum(self._runs[name] * each for name, each in once.items())
        self._first = min(first, max(_FEWEST_SAMPLES, int(_SECONDS_IN_ALL / max(a_round, _LEAST))))
        self._began = self._rounds  # those that were taken before
        self._most = self._began + max(self._first, most)
        self._more_seconds = seconds
        more = int(seconds / max(sum(self._seconds.values()), _LEAST))
        planned = len(calls) * min(self._most - self._began, self._first + more)
        self._step = 1 / max(planned, 1)
        self._share_told = 0.0
        self._bar = tqdm(total=planned, desc=progress, leave=False, delay=1, disable=None if progress else True)

    def _estimate(self, seconds_of: Callable[[int], float]) -> float:
        """Warm a call up, and return about how long it takes."""
        seconds = seconds_of(1)
        if seconds < _SLOW:
            seconds = seconds_of(2)
        elif seconds < _VERY_SLOW:
            seconds = min(seconds, seconds_of(1))
        self._pace.tell(0.0)
        return seconds

    @property
    def _rounds(self) -> int:
        return max((number + 1 for samples in self.samples.values() for number in samples), default=0)

    def _fewest(self, names: Iterable[Any]) -> int:
        """Return how many samples there are of each of some calls at least."""
        return min((len(self.samples[name]) for name in names), default=0)

    def _allowed(self, names: Collection[Any], seconds: float = math.inf) -> int:
        """Return how many more rounds of some calls the time allows, of those that are left."""
        wanted = self._most - self._rounds
        a_round = sum(self._seconds[name] for name in names)
        return wanted if a_round == 0 else int(min(wanted, min(seconds, self._pace.left()) / a_round))

    def _take(self, rounds: int, names: Collection[Any]) -> float:
        """Take samples of some calls, each round if time allows; return the seconds that it took."""
        spent = 0.0
        with torch.no_grad(), current(self._device):
            for _ in range(rounds):
                if self._fewest(names) >= _FEWEST_SAMPLES and self._allowed(names) <= 0:
                    self._pace.was_short = True
                    break
                number = self._rounds
                forwards = number % 2 == 0
                for name in self._timers if forwards else reversed(self._timers):
                    if name in names:
                        if self._warm_ups:
                            self._timers[name](self._warm_ups)
                        seconds = self._timers[name](self._runs[name])
                        self.samples[name][number] = seconds
                        self._seconds[name] = (self._runs[name] + self._warm_ups) * seconds
                        spent += self._seconds[name]
                        self._tell(self._step)
        return spent

    def _tell(self, share: float) -> None:
        share = min(share, 1 - self._share_told)
        self._share_told += share
        self._pace.tell(share)
        self._bar.update(min(1, self._bar.total - self._bar.n))

    def take_first(self) -> None:
        """Take as many samples as at first; as many again where there are some, if time allows."""
        fewest = 0 if self._fewest(self.samples) else _FEWEST_SAMPLES
        rounds = min(self._first, max(fewest, self._allowed(self.samples)))
        self._pace.was_short |= rounds < self._first
        self._take(rounds, self.samples)

    def take_while(self, still_open: Callable[[int], Collection[Any]]) -> None:
        """Take samples of what is open still, until nothing is or there are as many as there may be.

        Args:
            still_open: Given how many more samples there may be, returns the names of the calls; one that is none of
                them once is left out from then on.
        """
        if not self._fewest(self.samples):
            self.take_first()
        names, seconds = set(self.samples), self._more_seconds
        while self._rounds < self._most:
            names &= set(still_open(max(0, self._allowed(names, seconds))))
            if not names:
                break
            rounds = min(max(self._rounds - self._began, self._first), self._allowed(names, seconds))
            if rounds <= 0:
                self._pace.was_short |= self._allowed(names) <= 0
                break
            seconds -= self._take(rounds, names)
        self._tell(1.0)
        self._bar.close()

    @property
    def latencies(self) -> dict[Any, Latency]:
        """What was measured so far."""
        shared = set.intersection(*map(set, self.samples.values())) if self.samples else set()
        return {name: Latency.by_round(samples, sorted(shared)) for name, samples in self.samples.items()}

    def speedup(self, before: Hashable, after: Hashable) -> Speedup:
        """Compare two of the calls, by the rounds in which both were timed."""
        return _speed_up(self.samples[before], self.samples[after])


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]], arguments: Sequence[Tensor], *, samples: int = _SAMPLES
) -> dict[str, Latency]:
    """Time several callables on the same arguments, in turn, so that noise meets all of them alike.

    Args:
        candidates: The callables by name.
        arguments: Positional arguments; the device they are on is the device that is timed.
        samples: How many samples to take of each, after a warm-up; fewer where that would take seconds.
    """
    calls = {name: partial(call, each, arguments) for name, each in candidates.items()}
    return time_interleaved(calls, samples=samples, device=_device_of(arguments))


def time_interleaved(
    calls: Mapping[Name, Callable[[], Any]],
    *,
    samples: int,
    progress: str | None = None,
    device: torch.device | None = None,
) -> dict[Name, Latency]:
    """Time several calls in turn, so that noise meets all of them alike; gradients are off.

    Args:
        calls: The calls by name.
        samples: How many samples to take of each, after a warm-up; fewer where that would take seconds.
        progress: What to call it in a progress bar, on a terminal, when it takes more than a second; none by default.
        device: Where they run; the current one by default.
    """
    turns = _Turns(calls, samples, samples, progress=progress, device=device)
    turns.take_while(lambda _: ())
    return turns.latencies


def compare(
    calls: Mapping[Name, Callable[..., Any]],
    arguments: Sequence[Tensor],
    bars: Iterable[tuple[tuple[Name, Name], float]],
    pace: Pace | None = None,
    earlier: Mapping[Name, Latency] = MappingProxyType({}),
) -> dict[Name, Latency]:
    """Time several callables in turn until it is clear of some of them whether one is so many times faster.

    Args:
        calls: The callables by name; one that has several names is timed once.
        arguments: Positional arguments.
        bars: Names of two of them, and how many times faster than the first the second is to be. More samples of both
            are taken while :meth:`Speedup.leaves_open` that, up to a limit; none where as many as that would leave it
            open still, see :meth:`Speedup.may_be_settled`. Without any nothing is decided, and few are taken of each.
        pace: How long it may take; no limit by default.
        earlier: What one earlier comparison has found of some of them, on the same arguments. Rounds in which two were
            timed tell the same of them whatever else took part, calls aside that are so slow that nothing is run before
            each: those count here, too, and no more are taken of what is clear by all of them together, after the first
            with the others. The limit is that of each pair, whose last samples are not cut short.
    """
    distinct = {id(each): each for each in calls.values()}
    numbers = {name: id(each) for name, each in calls.items()}
    pairs = [((numbers[before], numbers[after]), bar) for (before, after), bar in bars]
    first, most = (_SAMPLES, _MOST_SAMPLES) if pairs else (_SAMPLES_TO_TELL, _SAMPLES_TO_TELL)
    turns = _Turns(
        {number: partial(call, each, arguments) for number, each in distinct.items()}, first, most, pace,
        "Timing" if pace is None else None, device=_device_of(arguments),
        earlier={numbers[name]: latency for name, latency in earlier.items() if name in numbers},
    )  # fmt: skip

    def still_open(more: int) -> set[int]:
        compared = {pair: turns.speedup(*pair) for pair, _ in pairs}
        at_most = {pair: min(most, len(each.ratios) + more) for pair, each in compared.items()}
        return {
            each
            for pair, bar in pairs
            if len(compared[pair].ratios) < most
            and compared[pair].leaves_open(bar)
            and compared[pair].may_be_settled(bar, at_most[pair])
            for each in pair
        }

    turns.take_while(still_open)
    latencies = turns.latencies
    return {name: latencies[number] for name, number in numbers.items()}


@dataclass
class LatencyTable:
    """Measured times of operators by structure, shape and device; pass one to several collapses to measure once.

    What was measured at different moments can still be compared: everything is timed in turn with one call, the
    yardstick of its device, and noted as a multiple of that. Seconds are those of the moment at which the yardstick
    was timed first.

    Attributes:
        seconds: The time of a call, by what was called.
        speedups: How many times faster one chain of operators is than another, by what they do.
        pace: How long what is timed for this table may take, and who is told; no limit by default, and a progress bar.
    """

    seconds: dict[Hashable, float] = field(default_factory=dict)
    speedups: dict[Hashable, Speedup] = field(default_factory=dict)
    pace: Pace | None = field(default=None, repr=False)
    _yardsticks: dict[Hashable, tuple[Callable[[], Any], float]] = field(default_factory=dict, repr=False)

    def measure(self, calls: Mapping[Hashable, Callable[[], Callable[[], Any]]], device: torch.device) -> None:
        """Time what was not timed yet.

        Args:
            calls: Key -> what makes the call to be timed.
            device: Where it runs.
        """
        missing = {key: make for key, make in calls.items() if key not in self.seconds}
        for group in _groups(missing, _GROUP):
            self._measure({key: missing[key]() for key in group}, device)

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
            latency = compare({"before": before, "after": after}, arguments, [(("before", "after"), bar)], self.pace)
            self.speedups[key] = speed_up(latency["before"], latency["after"])
        return self.speedups[key]

    def _measure(self, calls: dict[Hashable, Callable[[], Any]], device: torch.device) -> None:
        yardstick: Hashable = _YARDSTICK
        where = str(device), torch.get_num_threads()
        if where in self._yardsticks:
            calls = {_YARDSTICK: self._yardsticks[where][0], **calls}
        progress = "Timing operators" if self.pace is None else None  # else there is one already
        turns = _Turns(
            calls, _SAMPLES_OF_AN_OPERATOR, _MOST_SAMPLES_OF_AN_OPERATOR, self.pace, progress, _SECONDS_OF_A_GROUP,
            device,
        )  # fmt: skip

        def still_open(_: int) -> Collection[Hashable]:
            compared = [turns.speedup(name, yardstick) for name in turns.samples if name != yardstick]
            is_clear = all(high - low <= 2 * _SPREAD * each.median for each in compared for low, high in [each.bounds])
            return () if is_clear else turns.samples

        if where not in self._yardsticks:
            turns.take_first()
            latencies = turns.latencies
            medians = {name: latency.median for name, latency in latencies.items()}
            slow = [name for name in medians if medians[name] >= _YARDSTICK_SECONDS]
            yardstick = min(slow, key=medians.__getitem__) if slow else max(medians, key=medians.__getitem__)
            self._yardsticks[where] = calls[yardstick], latencies[yardstick].median
            turns.take_first()  # all that is timed later is a multiple of it
        turns.take_while(still_open)
        unit = self._yardsticks[where][1]
        self.seconds.update(
            (name, unit * turns.speedup(name, yardstick).median) for name in calls if name is not _YARDSTICK
        )


_YARDSTICK = object()


def _groups(names: Mapping[Hashable, Any], size: int) -> Iterator[list[Hashable]]:
    remaining = iter(names)
    while group := list(islice(remaining, size)):
        yield group
