"""Run a model without training it: inputs, mode, device, and errors that say which argument was at fault."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from lightning_easier.support.calls import Arguments, call, split
from lightning_easier.support.hooks import is_of_one_model


def check_weights(model: nn.Module) -> None:
    """Refuse a model without weights.

    Raises:
        ValueError: If a parameter or a buffer is on the meta device.
    """
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind():
            if tensor.is_meta:
                raise ValueError(
                    f"Expected argument `model` to have weights, but {type(model).__name__} has `{name}` on the meta "
                    f"device, without data. Load them first: `model.to_empty(device=...)`, then `load_state_dict`."
                )


def random_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return random numbers of a tensor's dtype on its device; the generators of the run stay where they are."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(tensor)


def arguments_wanted(model: nn.Module) -> int:
    """Return how many positional arguments a model's forward can't do without, 1 at least."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(each.kind in kinds and each.default is inspect.Parameter.empty for each in parameters))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, the CPU if it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def has_hooks(module: nn.Module) -> bool:
    """Tell whether calling a module runs anything besides its forward that may matter; what only counts does not."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    return any(not is_of_one_model(hook) for each in hooks for hook in each.values())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; every module's own mode comes back, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            if module.training != training:  # to set it takes much longer than to read it
                module.training = training


def forward(model: nn.Module, arguments: Sequence[Any], argument: str) -> Any:
    """Call a model and blame the named argument where its forward doesn't accept it.

    Raises:
        ValueError: If the forward fails on these inputs; running out of memory is not their fault and passes through.
    """
    try:
        return call(model, arguments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"Expected argument `{argument}` to be accepted by the forward of {type(model).__name__}, but "
            f"{describe(arguments)} made it fail: {error}. Pass inputs of the shape, dtype and number that it is "
            f"trained on."
        ) from error


def tensors_in(output: Any) -> list[Tensor]:
    """List the tensors in a forward's output, whatever its structure."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def relative_difference(output: Any, reference: Any) -> float:
    """Largest ``‖output - reference‖ / ‖reference‖`` over the tensors of two outputs, taken over what is finite.

    It is inf where structure, shapes or the places of what is not finite differ.
    """
    pairs = tensors_in(output), tensors_in(reference)
    if len(pairs[0]) != len(pairs[1]) or any(a.shape != b.shape for a, b in zip(*pairs, strict=True)):
        return float("inf")
    largest = 0.0
    for a, b in zip(*pairs, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return float("inf")
        difference, norm = float((a - b)[finite].norm()), float(b[finite].norm())
        largest = max(largest, difference / norm if norm > 0 else difference)
    return largest


@contextmanager
def full_float32() -> Iterator[None]:
    """Have products of float32 computed in float32: a GPU rounds what convolutions read to ten bits by default (TF32).

    Two equal networks differ by more than :data:`TOLERANCES` then, where a batch norm was folded, say. What was set
    comes back, also after an exception.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        with suppress(RuntimeError):  # it was set by kinds, below, which is told apart since torch 2.9
            if backends.cudnn.allow_tf32:
                stack.callback(setattr, backends.cudnn, "allow_tf32", True)
                backends.cudnn.allow_tf32 = False
        with suppress(RuntimeError):
            if (precision := torch.get_float32_matmul_precision()) != "highest":
                stack.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision("highest")
        kinds = [getattr(each, kind, None) for each in (backends.cudnn, backends.mkldnn) for kind in ("conv", "rnn")]
        for kind in (*kinds, getattr(backends.mkldnn, "matmul", None), backends.cuda.matmul):
            if getattr(kind, "fp32_precision", "none") not in ("none", "ieee"):
                stack.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
                kind.fp32_precision = "ieee"
        yield


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative differences that rounding explains."""


def tolerance_for(outputs: Any) -> float:
    """Relative difference that rounding explains at the coarsest dtype among the outputs."""
    return max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in tensors_in(outputs)), default=0.0)


def describe(value: Any) -> str:
    """Describe a value by type and, for tensors, shape and dtype, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Arguments):
        positional, by_name = split(value)
        told = [describe(each) for each in positional]
        return f"a call with {', '.join(told + [f'{describe(each)} as `{name}`' for name, each in by_name.items()])}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(describe(item) for item in value[:4]) or 'nothing'}"
    return f"a value of type {type(value).__name__}"


def without_masks(model: nn.Module) -> nn.Module:
    """Copy a model; what ``torch.nn.utils.prune`` masks at every call of it is zero in the copy for good."""
    masked = [
        (name, hook._tensor_name)
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    computed = [getattr(model.get_submodule(name), tensor) for name, tensor in masked]
    source = deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})  # they have a history
    for name, tensor in masked:
        prune.remove(source.get_submodule(name), tensor)
    return source
