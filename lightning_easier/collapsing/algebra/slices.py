r"""The algebra of channels that leave: an operator without some of the channels that it reads and writes.

An :math:`x_i` that is a constant :math:`c_i` whatever the input leaves :math:`y = W x + b` by
:math:`b \leftarrow b + W_{:i} c_i`, where no zero-padding lies between. Where some does, one constant channel :math:`r`
carries the others, which is exact at the border, too: :math:`W_{:r} \leftarrow W_{:r} + W_{:i} c_i / c_r`.

Kernels are looked at as ``(groups, outputs of a group, inputs of a group, taps)``; that of a Linear has one group and
one tap.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, bias_or_zeros

OPERATORS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
"""Exact classes that :func:`without_channels` knows."""
_COUNTS = ("channels", "num_features", "num_parameters")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which channels of an operator stay, and what those that leave were.

    Attributes:
        inputs: Whether each channel that it reads stays.
        outputs: Whether each channel that it writes stays.
        constants: The constants that those that it reads are; NaN where they are none.
        carriers: For each that it reads, the one that carries it, -1 where its constant goes into the bias.
    """

    inputs: Tensor
    outputs: Tensor
    constants: Tensor
    carriers: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether all channels stay."""
        return bool(self.inputs.all()) and bool(self.outputs.all())


def kernel(operator: Any) -> Tensor:
    """Return the weight of an operator as ``(groups, outputs of a group, inputs of a group, taps)``, on the CPU."""
    weight: Tensor = operator.weight.detach().cpu()
    if isinstance(operator, nn.Linear):
        return weight[None, :, :, None]
    grouped = weight.reshape(operator.groups, -1, weight.shape[1], weight[0, 0].numel())
    return grouped.transpose(1, 2) if isinstance(operator, TRANSPOSED_CONVOLUTIONS) else grouped


def keeps_constants(operator: Any) -> bool:
    """Tell whether an operator makes the same of a constant channel at every position."""
    if isinstance(operator, nn.Linear):
        return True
    padding = operator.padding
    if isinstance(operator, TRANSPOSED_CONVOLUTIONS):
        sizes = (*operator.kernel_size, *operator.stride)
        return all(size == 1 for size in sizes) and not any((*padding, *operator.output_padding))
    if operator.padding_mode != "zeros" or padding == "valid":
        return True
    return all(k == 1 for k in operator.kernel_size) if padding == "same" else not any(padding)


def constant_outputs(operator: Any, constants: Tensor) -> Tensor:
    """Return the constants that an operator writes whatever its other inputs, which are taken to be finite.

    Args:
        operator: The operator.
        constants: ``(inputs,)``: those that it reads, NaN where they are none.

    Returns:
        ``(outputs,)``, in float64: NaN where they are none.
    """
    weight = kernel(operator)
    groups, outputs, inputs, _ = weight.shape
    read = constants.view(groups, 1, inputs)
    passes = read == 0 if not keeps_constants(operator) else read.isfinite()
    lives = ((weight != 0).any(-1) & ~passes).any(-1) | ~weight.isfinite().all(-1).all(-1)
    made = bias_or_zeros(operator, groups * outputs).detach().cpu().clone()
    for group in range(groups):
        counts = passes[group, 0] & (read[group, 0] != 0)
        if counts.any():
            sums = weight[group][:, counts].double().sum(-1)
            made.view(groups, outputs)[group] += sums @ read[group, 0, counts]
    made[lives.view(-1) | ~made.isfinite()] = torch.nan
    return made


@torch.no_grad()
def without_channels(operator: Any, selection: Selection) -> Any:
    """Return an operator, in float64, without the channels that leave; the argument is not changed.

    Args:
        operator: One of the classes :data:`OPERATORS`.
        selection: What stays. Groups that stay have equally many channels; those that leave altogether are gone.
    """
    weight = kernel(operator).double()
    groups, outputs, inputs, _ = weight.shape
    stays, writes = selection.inputs.view(groups, inputs), selection.outputs.view(groups, outputs)
    constants, carriers = selection.constants.view(groups, inputs), selection.carriers.view(groups, inputs)
    bias = bias_or_zeros(operator, groups * outputs).cpu().clone().view(groups, outputs)
    weight = weight.clone()
    needed = (weight != 0).any(-1) & writes[:, :, None]
    counts = needed.any(1) & ~stays & constants.isfinite() & (constants != 0)
    for group, place in counts.nonzero().tolist():
        carrier = int(carriers[group, place]) - group * inputs
        if carriers[group, place] >= 0:
            share = constants[group, place] / constants[group, carrier]
            weight[group, :, carrier] += weight[group, :, place] * share
        else:
            bias[group] += weight[group, :, place].sum(-1) * constants[group, place]
    parts, biases = [], []
    for group in (stays.any(1) | writes.any(1)).nonzero().flatten().tolist():
        parts.append(weight[group][writes[group]][:, stays[group]])
        biases.append(bias[group][writes[group]])
    return _made(operator, torch.stack(parts), torch.cat(biases))


def _made(operator: Any, weight: Tensor, bias: Tensor) -> Any:
    groups, outputs, inputs, _ = weight.shape
    made = copy(operator)
    if isinstance(operator, nn.Linear):
        made.in_features, made.out_features = inputs, outputs
        weight = weight[0, :, :, 0]
    else:
        made.in_channels, made.out_channels, made.groups = groups * inputs, groups * outputs, groups
        if isinstance(operator, TRANSPOSED_CONVOLUTIONS):
            weight = weight.transpose(1, 2)
        weight = weight.flatten(0, 1).unflatten(-1, operator.kernel_size)
    given, device = operator._parameters, operator.weight.device
    needs_bias = given["bias"] is not None or bool(bias.any())
    tensors = {"weight": weight, "bias": bias if needs_bias else None}
    made._parameters = {
        name: None if tensor is None else nn.Parameter(tensor.contiguous().to(device), operator.weight.requires_grad)
        for name, tensor in tensors.items()
    }
    return made


@torch.no_grad()
def without_own_channels(module: nn.Module, stays: Tensor) -> nn.Module:
    """Return what treats each channel alone, in float64, without the channels that leave; the argument is not changed.

    Args:
        module: A module that has a number for each channel, or one for all: an affine, a norm of each instance, a
            PReLU.
        stays: ``(channels,)``: whether each stays.
    """
    made: Any = copy(module)

    def change(tensor: Tensor | None) -> Any:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        changed = tensor.double()
        if tensor.shape == stays.shape and len(stays) > 1:
            changed = changed[stays.to(tensor.device)]
        return nn.Parameter(changed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else changed

    made._parameters = {name: change(tensor) for name, tensor in module._parameters.items()}
    made._buffers = {name: change(tensor) for name, tensor in module._buffers.items()}
    for name in _COUNTS:
        if getattr(module, name, None) == len(stays):
            setattr(made, name, int(stays.sum()))
    return made
