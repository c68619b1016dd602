"""What an accelerator needs beside its tensors: it is waited for, and its random generator is put back."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch


def waits_for(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device is done with what it was given; the host itself always is."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or device.type != accelerator.type:
        return _nothing
    return partial(torch.accelerator.synchronize, device)


def current(device: torch.device | None) -> AbstractContextManager[Any]:
    """Have a device be the current one of its kind, where there may be several: that alone is waited for."""
    if device is None or device.type == "cpu":
        return nullcontext()
    of_kind = getattr(getattr(torch, device.type, None), "device", None)
    return nullcontext() if of_kind is None else of_kind(device)


def draws_restored(device: torch.device) -> AbstractContextManager[None]:
    """Put the random generators of the host and of a device back afterwards. torch can not do that for MPS."""
    kind = device.type
    can_be_forked = kind not in ("cpu", "mps") and hasattr(getattr(torch, kind, None), "get_rng_state")
    return torch.random.fork_rng([device], device_type=kind) if can_be_forked else torch.random.fork_rng([])


def _nothing() -> None: ...
