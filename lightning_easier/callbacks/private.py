"""All that the callbacks do to what Lightning and torch call private, in one place.

Checked with Lightning 2.6.0 and torch 2.6, and with Lightning 2.6.6 and torch 2.15.
``tests/integration/test_private.py`` fails where one takes a name away, or gives it another meaning.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn


@contextmanager
def without_trainer(module: LightningModule) -> Iterator[None]:
    """Take the Trainer from a module for a while: a copy must not copy it."""
    trainer, module._trainer = module._trainer, None
    try:
        yield
    finally:
        module._trainer = trainer


def lend_trainer(part: LightningModule, owner: LightningModule) -> None:
    """Let a module ask for the Trainer of another, without being its module."""
    part._trainer = owner._trainer


@contextmanager
def logged_in_place(module: LightningModule) -> Iterator[None]:
    """Have what was logged before stay where it is when it is logged again, if it is on the device of the module.

    Lightning moves it to the new value's device each time, and copies for that all that it knows of it, which takes
    longer than the rest.
    """
    results = (getattr(module.trainer, "_results", None) or {}).values()
    there = [result for result in results if result.is_tensor and result.value.device == module.device]
    for result in there:
        result.to = lambda *_, **__: None
    try:
        yield
    finally:
        for result in there:
            vars(result).pop("to", None)


def spawns_or_forks(trainer: Trainer) -> bool:
    """Tell whether a strategy starts processes that bring the weights back into the model of this one."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def replace_stopping_check(callback: EarlyStopping, check: Callable[[EarlyStopping, Trainer], None]) -> None:
    """Have a callback check otherwise whether training stops."""
    callback._run_early_stopping_check = lambda trainer: check(callback, trainer)  # type: ignore[method-assign]


def check_stopping(callback: EarlyStopping, trainer: Trainer) -> None:
    """Check as its class does whether training stops."""
    type(callback)._run_early_stopping_check(callback, trainer)


def restore_stopping_check(callback: EarlyStopping) -> None:
    """Undo :func:`replace_stopping_check`."""
    vars(callback).pop("_run_early_stopping_check", None)


def begin_static_graph_anew(strategy: DDPStrategy) -> None:
    """Have manual optimization with a static graph begin as with a new wrapper."""
    strategy._pl_static_graph_delay_done = False


def mark_validation_as_not_run(trainer: Trainer) -> None:
    """Have the fit loop not take an epoch that is resumed at its end for one that never began."""
    trainer.fit_loop.epoch_loop.val_loop._has_run = False


def have_skipped_training_followed(trainer: Trainer, follow: Callable[[], None]) -> Callable[[], None]:
    """Have something done in the place of a training that the fit loop skips: it is over already, or has no batches.

    Returns:
        What undoes that.
    """
    loop = trainer.fit_loop
    run = loop.run

    def run_and_follow() -> None:
        before = loop.epoch_progress.total.ready
        run()
        if loop.epoch_progress.total.ready == before and loop.skip:
            follow()

    loop.run = run_and_follow  # type: ignore[method-assign]
    return lambda: vars(loop).pop("run", None)


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether a module is compiled, or calls compiled code in the place of its forward."""
    return isinstance(module, torch._dynamo.OptimizedModule) or (
        getattr(module, "_compiler_ctx", None) is not None or getattr(module, "_compiled_call_impl", None) is not None
    )


def compiled_from(value: Any) -> Any:
    """Return what a function was compiled from; None for one that was not."""
    return getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None


def is_compiled_function(value: Any) -> bool:
    """Tell whether a value is a compiled function."""
    return compiled_from(value) is not None


def something_was_compiled() -> bool:
    """Tell whether torch.compile has worked in this process since it was told to forget, on whatever it was."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(frames.input_codes.seen)


def forget_compiled() -> None:
    """Have torch.compile forget all that it has compiled in this process."""
    torch._dynamo.reset()
