"""What an activation is on neurons that do not switch: linear, for activations made of two linear pieces.

A neuron whose pre-activation is always positive (ON) or always negative (OFF) sees one side of the activation only.
Where that side is a line through zero, the activation is a scale there, exactly: for ReLU 1 where ON, 0 where OFF. GELU
and SiLU are linear on neither side; there the affine that was measured is as close as one comes.

Source: NEPENTHE, arXiv 2404.16890; TLC, arXiv 2412.15077.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.rectifiers import FunctionalPReLU


class Pieces(NamedTuple):
    """The slopes of an activation on the two sides of zero; None where it is no line through zero.

    Attributes:
        off: Where the pre-activation is negative: a number, or a tensor of shape ``(1,)`` or ``(C,)``.
        on: Where it is positive.
    """

    off: Tensor | float | None
    on: Tensor | float | None


class States(NamedTuple):
    """How often the neurons of an activation were ON and OFF.

    Attributes:
        on: Shape ``(C,)``, int64.
        off: Shape ``(C,)``, int64.
        dim: The axis of the neurons.
    """

    on: Tensor
    off: Tensor
    dim: int


class SwitchedAffine(NamedTuple):
    """What takes the place of an activation on neurons that do not switch.

    Attributes:
        affine: A scale and an offset for each neuron.
        is_exact: Whether it equals the activation where neurons are ON, and OFF, as was said.
    """

    affine: AffineFit
    is_exact: bool


def pieces(activation: nn.Module) -> Pieces:
    """Return the slopes of an activation on the two sides of zero, in the mode that it is in.

    Args:
        activation: Any module. Of torch's rectifiers ReLU, LeakyReLU, PReLU, and RReLU in eval mode have both slopes;
            ELU, CELU and SELU are linear where ON only, ReLU6 where OFF only. All others, and subclasses with a forward
            of their own, have none.

    Example:
        >>> from torch import nn
        >>> pieces(nn.LeakyReLU(0.1))
        Pieces(off=0.1, on=1.0)
        >>> pieces(nn.GELU())
        Pieces(off=None, on=None)
    """
    forward = None if "forward" in vars(activation) else type(activation).forward
    match activation:
        case nn.ReLU() if forward is nn.ReLU.forward:
            return Pieces(0.0, 1.0)
        case nn.ReLU6() if forward is nn.ReLU6.forward:
            return Pieces(0.0, None)  # above 6 it is constant
        case nn.LeakyReLU() if forward is nn.LeakyReLU.forward:
            return Pieces(float(activation.negative_slope), 1.0)
        case nn.PReLU() if forward is nn.PReLU.forward:
            return Pieces(activation.weight.detach(), 1.0)
        case FunctionalPReLU() if forward is FunctionalPReLU.forward:
            return Pieces(None, 1.0)  # its slope is known only to who calls it
        case nn.RReLU() if forward is nn.RReLU.forward:
            return Pieces(None if activation.training else (activation.lower + activation.upper) / 2, 1.0)
        case nn.ELU() | nn.CELU() if forward in (nn.ELU.forward, nn.CELU.forward):
            return Pieces(None, 1.0)
        case nn.SELU() if forward is nn.SELU.forward:
            return Pieces(None, float(F.selu(torch.ones((), dtype=torch.float64))))
    return Pieces(None, None)


def has_pieces(activation: nn.Module, dim: int) -> bool:
    """Tell whether an activation has a slope on both sides for neurons on an axis: then nothing has to be measured."""
    return not any(_for_each(slope, 1, dim).isnan().any() for slope in pieces(activation))


def switched_affine(
    activation: nn.Module, on: Tensor, dim: int, closest: AffineFit | None = None
) -> SwitchedAffine | None:
    r"""Return the affine that an activation is on neurons that are always ON, or always OFF.

    With :math:`s_+` and :math:`s_-` the slopes of :func:`pieces`, a neuron becomes :math:`y = s_+ z` where ``on`` and
    :math:`y = s_- z` elsewhere. A neuron that is zero throughout may be called either: with a slope, zero stays zero.

    Args:
        activation: The activation, in eval mode.
        on: Which neurons are ON, bool of shape ``(C,)``; the others are OFF.
        dim: The axis of the neurons.
        closest: The affine that comes closest to the activation, as
            :func:`~lightning_easier.measure_affines` returns it. It is taken for neurons on a side where the activation
            has no slope.

    Returns:
        The affine, float64 on the CPU, and whether it is exact. It explains all where it is exact, else what
        ``closest`` does. None where a slope is missing and ``closest`` is not given.

    Raises:
        TypeError: If ``on`` is not a bool tensor.
        ValueError: If it is not of shape ``(C,)``, or ``closest`` has other neurons or another axis.

    Note:
        A PReLU with several slopes has one for each index of axis 1. Where the neurons are on another axis its slopes
        count as unknown: on vectors -1 would be the same axis, on tokens not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> switched_affine(nn.ReLU(), torch.tensor([True, False]), dim=1).affine.scale
        tensor([1., 0.], dtype=torch.float64)
    """
    if on.dtype != torch.bool:
        raise TypeError(f"Expected argument `on` to be a bool tensor, but got dtype {on.dtype}. Pass `counts > 0`.")
    if on.ndim != 1:
        raise ValueError(f"Expected argument `on` to have shape (C,), but got {tuple(on.shape)}")
    if closest is not None and (closest.dim != dim or closest.scale.shape != on.shape):
        raise ValueError(
            f"Expected argument `closest` to have {len(on)} neurons on axis {dim}, as `on` and `dim` say, but got "
            f"{len(closest.scale)} on axis {closest.dim}"
        )
    on = on.cpu()
    off_slope, on_slope = (_for_each(slope, len(on), dim) for slope in pieces(activation))
    if off_slope.shape != on.shape:
        raise ValueError(
            f"Expected argument `on` to have shape {tuple(off_slope.shape)}, as {activation} has slopes, but "
            f"got {tuple(on.shape)}"
        )
    scale = torch.where(on, on_slope, off_slope)
    unknown = scale.isnan()
    offset = torch.zeros_like(scale)
    if not unknown.any():
        return SwitchedAffine(AffineFit(scale, offset, dim, 1.0), True)
    if closest is None:
        return None
    scale = torch.where(unknown, closest.scale.cpu().double(), scale)
    offset = torch.where(unknown, closest.offset.cpu().double(), offset)
    return SwitchedAffine(AffineFit(scale, offset, dim, closest.explained), False)


def _for_each(slope: Tensor | float | None, neurons: int, dim: int) -> Tensor:
    """Return the slope of each neuron, float64 on the CPU; NaN where it is not known."""
    if slope is None or (isinstance(slope, Tensor) and slope.numel() > 1 and dim != 1):
        slope = torch.nan
    slopes = torch.as_tensor(slope, dtype=torch.float64, device="cpu")
    return slopes if slopes.numel() > 1 else slopes.expand(neurons)
