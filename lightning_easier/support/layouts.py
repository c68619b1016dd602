"""The layout of memory in which a model is run: convolutions on a CPU take less time where channels come last."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from lightning_easier.support.calls import Arguments, call, copies, names_of
from lightning_easier.support.inference import device_of, evaluation_mode, relative_difference, tolerance_for


def in_fast_layout(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> Sequence[tuple[Tensor, ...]]:
    """Return batches whose copies have their channels last, if a model computes the same of them, and maybe sooner.

    oneDNN's convolutions of float32 on a CPU read that layout directly, and others from a copy that they make in every
    call: MobileNetV2 takes 1.6 times as long without it. The batches share the memory of those that are given.

    Args:
        model: The model. What it returns is compared: a forward may read its inputs by strides (``Tensor.view``).
        batches: The forward's positional arguments, for each batch.
    """
    if not (batches and _has_fast_convolutions(model) and any(map(_is_image, batches[0]))):
        return batches
    last = [Arguments(batch, names_of(batch), torch.channels_last) for batch in batches]
    of_each_size = {tuple(value.shape for value in batch): batch for batch in last}
    model = deepcopy(model, {id(weight): weight for weight in model.parameters()})  # it may keep something of a call
    with evaluation_mode(model):
        is_same = all(_is_computed_alike(model, batch) for batch in of_each_size.values())
    return last if is_same else batches


def _is_computed_alike(model: nn.Module, last: Arguments) -> bool:
    """Tell whether a model computes the same of arguments whose channels come last."""
    expected = call(model, copies(Arguments(last, last.names)))
    try:
        return relative_difference(call(model, copies(last)), expected) <= tolerance_for(expected)
    except Exception:  # whatever the user's forward raises
        return False


def _has_fast_convolutions(model: nn.Module) -> bool:
    has_them = device_of(model).type == "cpu" and torch.backends.mkldnn.is_available()
    return has_them and any(isinstance(module, nn.Conv2d) for module in model.modules())


def _is_image(value: Tensor) -> bool:
    """Tell whether a value has channels that can come last; with one, both layouts are the same."""
    return value.ndim == 4 and value.shape[1] > 1 and value.dtype == torch.float32
