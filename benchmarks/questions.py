"""What a benchmark asks, and how it is answered: times are taken in turn, and what counts is their ratio.

A part of the benchmarks yields questions; each has cases, and each case variants of one thing, the first of which is
what the others are compared with. All variants of a case are timed in turn after a warm-up, every other round in the
opposite order, so that other work on the machine meets all of them alike. A case with one variant alone is timed in
turn with a *yardstick*, some convolutions that are the same everywhere.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_easier.support import timing
from lightning_easier.support.timing import MARGIN, Latency, Speedup, speed_up

T = TypeVar("T")

YARDSTICK = "yardstick"
FEWEST = 3
"""Samples of each variant, however long they take; two in tiny sizes."""
_SECONDS_A_SAMPLE, _MOST_RUNS = 0.02, 200


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        name: What it is called.
        samples: Of each variant, unless that takes longer than ``seconds``.
        seconds: How long the variants of a case may be timed; three samples of each are always taken.
        device: Where: ``"cpu"`` or ``"cuda"``.
        folder: Where a case may leave what later ones would make again; None for nowhere.
    """

    name: str
    samples: int
    seconds: float
    device: str = "cpu"
    folder: str | None = None

    def pick(self, full: T, quick: T, dry: T) -> T:
        """Return what suits it."""
        return {"full": full, "quick": quick, "dry": dry}[self.name]


EFFORTS = {each.name: each for each in (Effort("full", 15, 120.0), Effort("quick", 5, 4.0), Effort("dry", 2, 0.0))}


@dataclass(frozen=True)
class Bar:
    """What is hoped for.

    Attributes:
        time: How many times as long as the first variant it may take, per unit of its work.
        seconds: How long it may take.
        memory: How many times as much as the first variant the memory may grow.
    """

    time: float | None = None
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        sample: Does it once, and returns the seconds that count.
        work: How much it does, in any unit: times are compared for each of it.
    """

    sample: Callable[[], float]
    work: float = 1.0


@dataclass(frozen=True)
class Case:
    """Variants of one thing.

    Attributes:
        name: What it is called.
        make: Makes the variants on a device, by name; the first is what the others are compared with.
        bars: Of variants.
        is_slow: Whether a sample takes minutes: there is no warm-up then, and there are as few samples as may be.
        has_memory: Whether the memory of each variant is measured, too; each is made once more for that.
        needs: What has to be installed for it, besides what the package needs.
    """

    name: str
    make: Callable[[torch.device], Mapping[str, Variant]]
    bars: Mapping[str, Bar] = field(default_factory=dict)
    is_slow: bool = False
    has_memory: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question, and the cases that it is asked of."""

    name: str
    cases: tuple[Case, ...]


Questions = Callable[[Effort], Iterator[Question]]
"""What a part is: it yields its questions."""


@dataclass(frozen=True)
class Quartiles:
    """First quartile, median and third quartile."""

    first: float
    median: float
    third: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quartiles":
        """Return those of samples."""
        return cls(*quantiles(samples, n=4))


@dataclass(frozen=True)
class Measurement:
    """What was measured of one variant of a case.

    Attributes:
        part: The part that asks.
        question: Name of the question.
        case: Name of the case.
        variant: Name of the variant.
        against: Name of the variant that it is compared with.
        device: ``"cpu"`` or ``"cuda"``.
        threads: How many there were.
        effort: How much was measured.
        samples: How many were taken.
        seconds: Quartiles of the samples.
        ratio: Of the ratios of neighbouring samples: how many times as long it takes, per unit of work.
        bounds: Between which the median of these lies, with a confidence of 95 %.
        memory: By how many bytes the memory grew at most, or which the accelerator held at most.
        memory_ratio: How many times that of the one that it is compared with.
        bar: What is hoped for.
        failure: What went wrong; nothing was measured then.
    """

    part: str
    question: str
    case: str
    variant: str
    against: str
    device: str
    threads: int
    effort: str
    samples: int = 0
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    bounds: tuple[float, float] | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    bar: Bar = Bar()
    failure: str = ""

    @property
    def case_key(self) -> tuple[str, ...]:
        """What all variants of a case have in common."""
        return self.part, self.question, self.case, self.device, str(self.threads), self.effort

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others in a table."""
        return *self.case_key, self.variant

    def verdicts(self) -> Iterator[str]:
        """Say of each bar whether it is kept; it is open where the timings disagree about it."""
        if self.bar.time is not None and self.bounds is not None:
            yield f"≤ {self.bar.time:g}×: {_verdict(self.bounds, self.bar.time)}"
        if self.bar.seconds is not None and self.seconds is not None:
            yield f"≤ {self.bar.seconds:g} s: {_verdict((self.seconds.first, self.seconds.third), self.bar.seconds)}"
        if self.bar.memory is not None and self.memory_ratio is not None:
            yield f"memory ≤ {self.bar.memory:g}×: {_verdict((self.memory_ratio,) * 2, self.bar.memory)}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Measurement":
        """Read one that was written as plain data."""
        read = dict(values)
        for name, kind in (("seconds", Quartiles), ("ratio", Quartiles), ("bar", Bar)):
            if read.get(name) is not None:
                read[name] = kind(**read[name])
        if read.get("bounds") is not None:
            read["bounds"] = tuple(read["bounds"])
        return cls(**read)


def _verdict(between: tuple[float, float], bar: float) -> str:
    low, high = between
    return "kept" if high <= bar else "missed" if low > bar else "open"


def timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Return what runs a call without gradients and returns the seconds it takes: by CUDA events on a GPU.

    What takes less than some milliseconds is run several times.
    """
    seconds_of = _by_events(call) if device.type == "cuda" else timing.stopwatch(call)
    runs = 0

    def sample() -> float:
        nonlocal runs
        with torch.no_grad():
            if not runs:
                runs = int(min(max(_SECONDS_A_SAMPLE / max(seconds_of(1), 1e-9), 1), _MOST_RUNS))
            return seconds_of(runs)

    return sample


def _by_events(call: Callable[[], Any]) -> Callable[[int], float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds_of(runs: int) -> float:
        begin.record()
        for _ in range(runs):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / runs

    return seconds_of


def elapsed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Return what runs a call once and returns the seconds that pass: for what computes on the host as well."""

    def sample() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return sample


def yardstick(device: torch.device, seconds: float = 0.1) -> Variant:
    """Return convolutions that are the same everywhere, for some time."""
    convolution, images = nn.Conv2d(32, 32, 3, padding=1).to(device), torch.randn(8, 32, 32, 32, device=device)
    once = timed(lambda: convolution(images), device)
    once()
    times = min(max(1, round(seconds / max(once(), 1e-9) / _MOST_RUNS)), 50)
    return Variant(lambda: sum(once() for _ in range(times)) / times)


def in_turn(
    variants: Mapping[str, Variant], samples: int, seconds: float = math.inf, warm_up: bool = True
) -> dict[str, Latency]:
    """Sample variants in turn, every other round in the opposite order.

    Args:
        variants: By name.
        samples: How many of each.
        seconds: How long it may take; the fewest samples are always taken.
        warm_up: Whether to sample each once before.
    """
    if warm_up:
        for variant in variants.values():
            variant.sample()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    began = time.monotonic()
    for number in range(samples):
        if number >= FEWEST and time.monotonic() - began > seconds:
            break
        for name in list(variants)[:: 1 if number % 2 else -1]:
            taken[name].append(variants[name].sample())
    return {name: Latency.of(values) for name, values in taken.items()}


def compared(latency: Latency, reference: Latency, work: float = 1.0) -> tuple[Quartiles, tuple[float, float]]:
    """Return how many times as long as another something takes, per unit of work: quartiles, and the median's bounds.

    Args:
        latency: Of the one.
        reference: Of the other, taken in turn with it.
        work: How many times as much it does.
    """
    ratios = Speedup(tuple(ratio / work for ratio in speed_up(latency, reference).ratios))
    return Quartiles.of(ratios.ratios), ratios.bounds


def is_slower(new: Measurement, old: Measurement) -> bool:
    """Tell whether something takes longer than it did, by more than the spread of both explains."""
    if new.ratio is None or old.ratio is None:
        return False
    return new.ratio.first > old.ratio.third and new.ratio.median > (1 + MARGIN) * old.ratio.median
