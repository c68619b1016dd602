r"""On which side of zero a pre-activation lies, from its mean and deviation alone.

Right after a batch norm the two are parameters: its shift :math:`\beta` and its scale :math:`\gamma`. So no data are
needed to tell which activations hardly switch.

Source: TLC, arXiv 2412.15077.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_easier.sites.discovery import ActivationSite
from lightning_easier.support.finite import is_finite


class Moments(NamedTuple):
    """Mean and standard deviation of each neuron of a pre-activation.

    Attributes:
        mean: Shape ``(C,)``, float64.
        deviation: Shape ``(C,)``, float64, not negative.
        dim: The axis of the neurons.
    """

    mean: Tensor
    deviation: Tensor
    dim: int

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are."""
        return is_finite(self.mean, self.deviation)


def moments_of(sums: Tensor, neuron_dim: int) -> Moments:
    """Compute mean and deviation from the sums of :class:`~lightning_easier.measure.affines.AffineStatistics`.

    Args:
        sums: The six numbers of each channel, shape ``(6, C)``.
        neuron_dim: The axis of the channels.
    """
    count, mean, _, squares, *_ = sums.cpu().double()
    return Moments(mean, (squares / count.clamp(min=1)).sqrt(), neuron_dim)


def batch_norms_before(
    model: nn.Module, sites: Iterable[ActivationSite], axes: Mapping[str, int]
) -> dict[str, _BatchNorm]:
    """Return name -> batch norm, of the activations that have one right before them, whose channels are their neurons.

    Args:
        model: The model.
        sites: Its activations.
        axes: Axis of the neurons by name glob, where the one found is not the one wanted.
    """
    found = {}
    for site in sites:
        name = site.neighbourhood.batch_norm
        norm = None if name is None or site.axis(axes) != 1 else model.get_submodule(name)
        if isinstance(norm, _BatchNorm):
            found[site.name] = norm
    return found


def moments_after(norm: _BatchNorm) -> Moments:
    """Return mean and deviation of what a batch norm returns for a batch: its shift, and the size of its scale.

    Args:
        norm: The batch norm. One without scale and shift has a mean of 0 and a deviation of 1.
    """
    mean, scale = torch.zeros(norm.num_features), torch.ones(norm.num_features)
    if norm.affine:
        mean, scale = norm.bias.detach().cpu(), norm.weight.detach().cpu()
    return Moments(mean.double(), scale.double().abs(), 1)


def error_likelihood(moments: Moments) -> float:
    r"""Compute how likely it is that a neuron's pre-activation lies on the other side of zero than its mean.

    The mean over the neurons of :math:`\Phi(-|\beta| / \gamma)`, with :math:`\Phi` the normal distribution function,
    :math:`\beta` the mean and :math:`\gamma` the deviation. A neuron that does not vary has 0, or 1/2 if it is zero.

    Returns:
        In [0, 1/2].

    Source: TLC, arXiv 2412.15077, the error likelihood of a channel.

    Example:
        >>> import torch
        >>> error_likelihood(Moments(torch.tensor([0.0, -3.0]), torch.tensor([1.0, 0.0]), 1))
        0.25
    """
    distance = moments.mean.abs() / moments.deviation
    return float(torch.special.ndtr(-torch.where(moments.mean == 0, 0.0, distance)).mean())
