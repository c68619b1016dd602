"""Export models with ``torch.export``, those that reshape what attention returns by ``view`` too.

In eval mode without gradients ``nn.MultiheadAttention`` takes a fused path, whose output is contiguous. While a model
is exported it takes another, whose output is a transposed view where ``batch_first`` is set: a ``view`` of it fails.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

# What the reference implementation of `view` says, and the kernel's own
_STRIDES = re.compile("Cannot view a tensor with shape|view size is not compatible")


def export_program(model: nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> ExportedProgram:
    """Export a model, once more with contiguous outputs of its attention where a ``view`` has failed.

    Args:
        model: The model; it is as before afterwards.
        arguments: Example inputs.
        options: For :func:`torch.export.export`.

    Raises:
        Exception: Whatever torch.export raises.
    """
    try:
        return torch.export.export(model, arguments, **options)
    except Exception as error:
        attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        if not (attention and _is_of_strides(error)):
            raise
    with _contiguous(attention):
        return torch.export.export(model, arguments, **options)


def remedy_for(error: Exception) -> str | None:
    """Say what to do where torch.export can't take a ``view``; None where it is no such error."""
    if not _is_of_strides(error):
        return None
    return (
        "Write `reshape` in the place of `view`: what it is called on has other strides in torch.export than in a call"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what torch says of sizes of one, and of graphs that don't run."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx.experimental")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_of_strides(error: Exception) -> bool:
    return _STRIDES.search(str(error)) is not None


@contextmanager
def _contiguous(attention: list[nn.MultiheadAttention]) -> Iterator[None]:
    """Have attention return contiguous outputs, as its fused path does."""
    hooks = [module.register_forward_hook(_make_contiguous) for module in attention]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _make_contiguous(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, tuple):  # a class of somebody's own
        return output
    return (output[0].contiguous(), *output[1:])
