"""Export models with ``torch.export``, those that reshape what attention returns by ``view`` too.

In eval mode without gradients ``nn.MultiheadAttention`` takes a fused path, whose output is contiguous. While a model
is exported it takes another, whose output is a transposed view where ``batch_first`` is set: a ``view`` of it fails.
"""

import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_easier.support.calls import Arguments, bound, split

# What the reference implementation of `view` says, and the kernel's own
_STRIDES = re.compile("Cannot view a tensor with shape|view size is not compatible")


def export_program(
    model: nn.Module, arguments: Sequence[Tensor], sizes: Sequence[Any] | None, *, reads_code: bool
) -> ExportedProgram:
    """Export a model, once more with contiguous outputs of its attention where a ``view`` has failed.

    Args:
        model: The model; it is as before afterwards.
        arguments: Example inputs.
        sizes: What :func:`torch.export.export` is to know of the sizes of each (``dynamic_shapes``); none is free by
            default.
        reads_code: Whether it reads the Python of the forward instead of running it (``strict``).

    Raises:
        Exception: Whatever torch.export raises.
    """
    positional, by_name = split(arguments)
    with _named(model, by_name):
        shapes = None if sizes is None else bound(model, Arguments(sizes, by_name))
        export = partial(
            torch.export.export, model, positional, dict(by_name), dynamic_shapes=shapes, strict=reads_code
        )
        try:
            return export()
        except Exception as error:
            attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
            if not (attention and _is_of_strides(error)):
                raise
        with _contiguous(attention):
            return export()


@contextmanager
def _named(model: nn.Module, by_name: Iterable[str]) -> Iterator[None]:
    """Give arguments that a forward collects (``**inputs``) names of their own: torch.export asks for sizes of `L`."""
    signature = inspect.signature(model.forward)
    known = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    collected = [name for name in by_name if name not in signature.parameters]
    if not collected:
        yield
        return
    original, own = model.forward, vars(model).get("forward")

    def forward(*args: Any, **inputs: Any) -> Any:
        return original(*args, **inputs)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in collected]
    vars(forward)["__signature__"] = signature.replace(parameters=[*known, *named])
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def remedy_for(error: Exception) -> str | None:
    """Say what to do where torch.export can't take a ``view``; None where it is no such error."""
    if not _is_of_strides(error):
        return None
    return (
        "Write `reshape` in the place of `view`: what it is called on has other strides in torch.export than in a call"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what is said of sizes of one, of graphs that don't run, and of other versions of ONNX."""
    loggers = [
        logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx.experimental", "onnxscript")
    ]
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
