"""Where the time of a call goes: to which modules, and to which functions between them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_easier.support.calls import call, copies
from lightning_easier.support.devices import waits_for

_ROUNDS = 3  # a median of which leaves out one that was held up


def time_inside(
    models: Mapping[str, nn.Module], arguments: Sequence[Tensor], left: Callable[[], float], most: float = 1.0
) -> dict[str, dict[str, float]]:
    """Time what models call, in turn, so that noise meets all of them alike.

    These times are for looking at: what decides anything is timed as a whole, see
    :mod:`~lightning_easier.support.timing`.

    Args:
        models: The models by name, in eval mode; each was called before, so that it is warm.
        arguments: Example inputs.
        left: Returns for how many more seconds may be timed; one round is always taken.
        most: For how many seconds it is timed at most.

    Returns:
        Name of the model -> qualified name of a module -> seconds of one call, in the order of the calls: medians of
        some rounds. Functions that are called in the forward of a module that has others inside go by its name and
        their own: ``layer1.0: add``.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    begun = time.perf_counter()
    with torch.no_grad():
        for number in range(_ROUNDS):
            if number and time.perf_counter() - begun > min(most, left()):
                break
            for name, model in models.items():
                rounds[name].append(_time_once(model, arguments))
    return {
        name: {key: median(each.get(key, 0.0) for each in taken) for key in taken[0]} for name, taken in rounds.items()
    }


def _time_once(model: nn.Module, arguments: Sequence[Tensor]) -> dict[str, float]:
    mode = _Stopwatch(arguments[0].device)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(mode.enter, name, any(module.children()))))
        handles.append(module.register_forward_hook(mode.leave, always_call=True))
    inputs = copies(arguments)
    try:
        with mode:
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dict(mode.seconds)


class _Stopwatch(TorchFunctionMode):
    """Times every function of torch, and knows in which module it is called."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[tuple[str, bool]] = []
        self._wait = waits_for(device)

    def enter(self, name: str, has_children: bool, *_: Any) -> None:
        self._inside.append((name, has_children))

    def leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._wait()
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._wait()
        seconds = time.perf_counter() - begun
        if _holds_tensors(result):  # sizes and the like are asked for in passing
            self.seconds[self._name_of(func)] += seconds
        return result

    def _name_of(self, func: Any) -> str:
        name, has_children = self._inside[-1] if self._inside else ("", True)
        if name and not has_children:
            return name
        called = getattr(func, "__name__", str(func)).partition(".")[0].strip("_")
        return f"{name}: {called}" if name else called


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))
