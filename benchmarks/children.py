"""A function in a process of its own, which may be stopped, and whose memory is nobody else's."""

import gc
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
_SECONDS_TO_END = 10.0

# Where that is safe, forked off a process that has imported what they need, and computed nothing, on no device
_start_method = "fork" if sys.platform == "linux" else "spawn"


def process_context() -> Any:
    """Return what makes processes."""
    return get_context(_start_method)


def start_from_nothing() -> None:
    """Have processes import everything anew, for where one that was forked can't reach a GPU."""
    global _start_method
    _start_method = "spawn"


class ChildError(RuntimeError):
    """What a function raised in its process, or that the process did not end as it should."""


def in_child(
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float | None = None,
    tell: Callable[[Any], object] | None = None,
) -> Any:
    """Return what a function returns in a process of its own.

    Args:
        function: A function of a module.
        *arguments: What it is given; they are pickled, as is what it returns.
        seconds: How long it may take; no limit by default.
        tell: The function is given, as its last argument, what calls this here.

    Raises:
        ChildError: If it raises, takes longer, or its process is killed.
    """
    receiving, sending = process_context().Pipe(duplex=False)
    process = process_context().Process(target=_send, args=(sending, tell is not None, function, *arguments))
    process.start()
    sending.close()
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    try:
        while True:
            left = None if seconds is None else max(deadline - time.monotonic(), 0.0)
            if not receiving.poll(left):
                raise ChildError(f"was stopped after {seconds:g} seconds")
            is_told, value = receiving.recv()
            if not is_told:
                break
            assert tell is not None
            tell(value)
        process.join(_SECONDS_TO_END)
    except EOFError:
        process.join(_SECONDS_TO_END)
        raise ChildError(f"its process ended with {process.exitcode}") from None
    finally:
        receiving.close()
        if process.is_alive():
            process.kill()
            process.join()
    result, error = value
    if error:
        raise ChildError(error)
    return result


def _send(sending: Connection, tells: bool, function: Callable[..., Any], *arguments: Any) -> None:
    told = [lambda value: sending.send((True, value))] if tells else []
    try:
        outcome = function(*arguments, *told), ""
    except Exception as error:
        traceback.print_exc()
        outcome = None, f"{type(error).__name__}: {error}"
    sending.send((False, outcome))


def forgets_peak(device: torch.device) -> bool:
    """Have the process forget the most memory that it has held so far; tell whether it has: else a next peak hides."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux
        return True
    return False


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call needs.

    On a GPU it is the most that tensors hold at a time, those that were there before among them; on the CPU by how much
    the resident memory of the process grows at most, which a process of its own has to itself.
    """
    gc.collect()
    if device.type == "cuda":
        forgets_peak(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    forgets_peak(device)
    before = _highest()
    call()
    return _highest() - before


def _highest() -> int:
    """Return the most bytes of resident memory so far, since that was forgotten where it can be."""
    with suppress(OSError, StopIteration):  # Linux; what getrusage tells there begins with that of who has started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
