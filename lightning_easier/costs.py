"""What a model costs: parameters, multiply-accumulates, memory and measured time."""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)

_SECONDS_A_SAMPLE = 0.01
_MAX_RUNS_A_SAMPLE = 200
_SECONDS_IN_ALL = 1.5
_FEWEST_SAMPLES = 5
# Two timings of one thing differ by about this much; less is not an improvement.
_MARGIN = 0.02


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


def is_faster(before: Latency, after: Latency) -> bool:
    """Tell whether something is faster than before, by more than two timings of one thing differ."""
    return speed_up(before, after)[1] > 1 / (1 - _MARGIN)


def is_slower(before: Latency, after: Latency) -> bool:
    """Tell whether something is slower than before, beyond what noise explains."""
    return speed_up(before, after)[2] < 1 - _MARGIN


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
    """Count the multiply-accumulates of one call, by torch's own counter (convolutions, matrix products, attention).

    The model is counted as it runs; where that fails, with the attention that is fused (of nested tensors, say)
    written out.

    Raises:
        Exception: Whatever the forward raises in both cases, while its operators are looked at.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        return _count_macs(model, arguments)
    except Exception:
        torch.backends.mha.set_fastpath_enabled(False)
        return _count_macs(model, arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _count_macs(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    counter.mod_tracker = _Untracked()
    with counter, torch.no_grad():
        model(*arguments)
    return int(counter.get_total_flops()) // 2


class _Untracked(ModuleTracker):
    """Tells no modules apart: its hooks on them don't take all that a forward may be called with."""

    def __enter__(self) -> "_Untracked":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _of_attention(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    """Count the operations of attention with its four projections; batch first."""
    (samples, length, _), (_, others, _) = query, key
    return 4 * samples * width * ((length + others) * width + length * others)


def _of_transformer_layer(source: Any, width: int, *others: Any, **_: Any) -> int:
    """Count the operations of a layer of a transformer."""
    samples, length, _ = source
    hidden, _ = others[12]  # the shape of the first weight behind the attention
    return _of_attention(source, source, source, width) + 4 * samples * length * width * hidden


# What torch's counter has no formulas for
_FUSED = {
    torch.ops.aten._native_multi_head_attention: _of_attention,
    torch.ops.aten._transformer_encoder_layer_fwd: _of_transformer_layer,
}


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]], arguments: Sequence[Tensor], *, samples: int = 15
) -> dict[str, Latency]:
    """Time several callables on the same arguments, interleaved, so that noise meets all of them alike.

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
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    times: dict[Name, list[float]] = {name: [] for name in timers}
    bar = tqdm(
        total=len(timers) * (samples + 1), desc=progress, leave=False, delay=1, disable=None if progress else True
    )
    with torch.no_grad(), bar:
        runs = {}
        slowest = 0.0
        for name, timer in timers.items():
            timer.timeit(2)  # warm-up
            seconds = timer.timeit(2).mean
            slowest = max(slowest, seconds)
            runs[name] = int(min(max(_SECONDS_A_SAMPLE / seconds, 1), _MAX_RUNS_A_SAMPLE))
            bar.update()
        enough = max(_FEWEST_SAMPLES, int(_SECONDS_IN_ALL / max(slowest, _SECONDS_A_SAMPLE)))
        for _ in range(min(samples, enough)):
            for name, timer in timers.items():
                times[name].append(timer.timeit(runs[name]).mean)
                bar.update()
    return {name: Latency(median(v), _interquartile_range(v), tuple(v)) for name, v in times.items()}


class _PeakMemory(TorchDispatchMode):
    """Follow the memory that operators allocate and release."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def release(_: Any) -> None:
            self._now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, release)
        self._now += size
        self.peak = max(self.peak, self._now)


def measure_activation_memory(model: nn.Module, arguments: Sequence[Tensor]) -> int:
    """Measure the most bytes that the values of one call take at a time, without parameters, buffers and inputs.

    What an operator needs inside itself (the workspace of a convolution) is not seen.
    """
    memory = _PeakMemory()
    memory.ignore((*model.parameters(), *model.buffers(), *arguments))
    with torch.no_grad(), memory:
        model(*arguments)
    return memory.peak


def _interquartile_range(values: list[float]) -> float:
    first, _, third = quantiles(values, n=4)
    return third - first
