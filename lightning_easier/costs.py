"""What a model costs: parameters, multiply-accumulates and measured time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

_SECONDS_A_SAMPLE = 0.01
_MAX_RUNS_A_SAMPLE = 200


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


def speed_up(before: Latency, after: Latency) -> tuple[float, float, float]:
    """Compare two latencies that were measured interleaved: quartiles of the ratio of neighbouring samples.

    What slows the machine down for a while meets both samples of a pair, so the ratio hardly notices.

    Returns:
        First quartile, median and third quartile of how many times faster ``after`` is.
    """
    first, middle, third = quantiles([b / a for b, a in zip(before.samples, after.samples, strict=True)], n=4)
    return first, middle, third


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    """Count the multiply-accumulates of one call, by torch's own counter (convolutions, matrix products, attention)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    return counter.get_total_flops() // 2


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]], arguments: Sequence[Tensor], *, samples: int = 15
) -> dict[str, Latency]:
    """Time several callables on the same arguments, interleaved, so that noise meets all of them alike.

    Args:
        candidates: The callables by name.
        arguments: Positional arguments; the device they are on is the device that is timed.
        samples: How many samples to take of each, after a warm-up.
    """
    timers = {
        name: Timer(
            "call(*arguments)", globals={"call": call, "arguments": arguments}, num_threads=torch.get_num_threads()
        )
        for name, call in candidates.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    with torch.no_grad():
        runs = {}
        for name, timer in timers.items():
            timer.timeit(2)  # warm-up
            runs[name] = int(min(max(_SECONDS_A_SAMPLE / timer.timeit(2).mean, 1), _MAX_RUNS_A_SAMPLE))
        for _ in range(samples):
            for name, timer in timers.items():
                times[name].append(timer.timeit(runs[name]).mean)
    return {name: Latency(median(v), _interquartile_range(v), tuple(v)) for name, v in times.items()}


def _interquartile_range(values: list[float]) -> float:
    first, _, third = quantiles(values, n=4)
    return third - first
