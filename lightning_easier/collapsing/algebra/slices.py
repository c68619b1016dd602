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


@dataclass(frozen=True, eq=False)
class Connections:
    """Which outputs of an operator read which inputs.

    Attributes:
        nonzero: ``(groups, outputs of a group, inputs of a group)``: whether a weight is not zero, or not a number.
        finite: ``(groups, outputs of a group)``: whether all weights of an output are finite.
    """

    nonzero: Tensor
    finite: Tensor

    @classmethod
    def of(cls, operator: Any) -> "Connections":
        """Read the weights of an operator."""
        weight = kernel(operator)
        nonzero = weight[..., 0] != 0 if weight.shape[-1] == 1 else (weight != 0).any(-1)
        return cls(nonzero, weight.sum((-2, -1), dtype=torch.float64).isfinite())


def constant_outputs(operator: Any, connections: Connections, constants: Tensor) -> Tensor:
    """Return the constants that an operator writes whatever its other inputs, which are taken to be finite.

    Args:
        operator: The operator.
        connections: Its own.
        constants: ``(inputs,)``: those that it reads, NaN where they are none.

    Returns:
        ``(outputs,)``, in float64: NaN where they are none.
    """
    groups, outputs, inputs = connections.nonzero.shape
    read = constants.view(groups, inputs)
    passes = read.isfinite() if keeps_constants(operator) else read == 0
    lives = (connections.nonzero & ~passes[:, None]).any(-1) | ~connections.finite
    made = bias_or_zeros(operator, groups * outputs).detach().cpu().clone().view(groups, outputs)
    counts = passes & (read != 0)
    for group in counts.any(1).nonzero().flatten().tolist():
        sums = kernel(operator)[group][:, counts[group]].double().sum(-1)
        made[group] += sums @ read[group, counts[group]]
    return made.masked_fill(lives | ~made.isfinite(), torch.nan).view(-1)


@torch.no_grad()
def without_channels(operator: Any, selection: Selection) -> Any:
    """Return an operator, in float64, without the channels that leave; the argument is not changed.

    Args:
        operator: One of the classes :data:`OPERATORS`.
        selection: What stays. Groups that stay have equally many channels; those that leave altogether are gone.
    """
    weight = kernel(operator)
    groups, outputs, inputs, _ = weight.shape
    stays, writes = selection.inputs.view(groups, inputs), selection.outputs.view(groups, outputs)
    constants, carriers = selection.constants.view(groups, inputs), selection.carriers.view(groups, inputs)
    bias = bias_or_zeros(operator, groups * outputs).cpu().view(groups, outputs)
    parts, biases = [], []
    for group in (stays.any(1) | writes.any(1)).nonzero().flatten().tolist():
        own, constant = weight[group][writes[group]], constants[group]
        part, offset = own[:, stays[group]].double(), bias[group][writes[group]]
        leaves = ~stays[group] & constant.isfinite() & (constant != 0) & (own != 0).any(-1).any(0)
        in_bias = leaves & (carriers[group] < 0)
        offset = offset + own[:, in_bias].double().sum(-1) @ constant[in_bias]
        for place in (leaves & (carriers[group] >= 0)).nonzero().flatten().tolist():
            carrier = int(carriers[group, place]) - group * inputs
            share = constant[place] / constant[carrier]
            part[:, int(stays[group, :carrier].sum())] += own[:, place].double() * share
        parts.append(part)
        biases.append(offset)
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
