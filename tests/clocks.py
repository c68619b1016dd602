"""Clocks that tell times that are made up: the work of a call, times how slow the machine is at that moment."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_easier.support.costs import count_macs

_SECONDS_A_MAC, _SECONDS_AN_OPERATOR, _SECONDS_OF_ANY = 1e-9, 2e-6, 1e-3

Slowness = Callable[[float], float]
"""The moment in seconds -> how many times slower than it should be the machine is."""


class Clock:
    """Stands in for :func:`~lightning_easier.support.timing.stopwatch`: a call takes its work, times slowness.

    Args:
        slowness: The slowness of the machine.
    """

    def __init__(self, slowness: Slowness) -> None:
        self.now = 0.0
        self._slowness = slowness

    def __call__(self, call: Callable[[], Any]) -> Callable[[int], float]:
        cost = work_of(call)

        def seconds_of(runs: int) -> float:
            seconds = cost * self._slowness(self.now)
            self.now += runs * seconds
            return seconds

        return seconds_of


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def work_of(call: Callable[[], Any]) -> float:
    """Count what a call computes, in seconds of an honest clock."""
    operators = _Operators()

    def counted() -> None:
        operators.count = 0
        with operators:  # inside the other counter: it sees an operator before it is taken apart
            call()

    try:
        with torch.no_grad():
            macs = count_macs(counted, ())
    except Exception:  # what can't be looked at takes as long as any other
        return _SECONDS_OF_ANY
    return macs * _SECONDS_A_MAC + (1 + operators.count) * _SECONDS_AN_OPERATOR


def honest(now: float) -> float:
    """Nothing else runs."""
    return 1.0


def busy_between(start: float, end: float) -> Slowness:
    """Another job makes everything five times slower for a while."""
    return lambda now: 5.0 if start <= now < end else 1.0


def busy_at_times(period: float, begin: float = 0.0) -> Slowness:
    """Another job comes and goes."""
    return lambda now: 5.0 if (now - begin) % period < period / 2 else 1.0


def drifting(now: float) -> float:
    """The machine heats up, and throttles."""
    return 1.0 + 3.0 * (1 - math.exp(-now / 5))


def jittering(spread: float) -> Slowness:
    """Every sample is off by a share of its own."""
    numbers = random.Random(0)
    return lambda now: math.exp(numbers.gauss(0, spread))
