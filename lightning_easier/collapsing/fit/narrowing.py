"""Chains that stay what they are, with fewer inner channels.

Of an operator, an activation and an operator the first loses output channels, and all that lies between loses them,
too; the last is fitted again on those that are left (see :mod:`lightning_easier.collapsing.algebra.narrowing`). Between
them may be depthwise convolutions, with an activation more: the body of an inverted residual.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import Fit, Geometry, Moments
from lightning_easier.collapsing.algebra.narrowing import Narrowed, narrowed
from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.fit.fittable import FittableChain
from lightning_easier.structure.padding import numeric_padding
from lightning_easier.support.finite import is_finite

SHARES = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}
"""How many of the inner channels are left, by the name of that share."""
# Columns of sums that are inverted, in float64.
_MOST_UNKNOWNS = 2**13


@dataclass(frozen=True)
class NarrowFit(Fit):
    """A chain with fewer inner channels; ``operator`` is that chain in a row, without batch norms.

    Attributes:
        channels: Which are left, ascending.
        weight: Of the last operator.
        bias: Of the last operator; it may be left to a batch norm.
    """

    channels: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class NarrowableChain(FittableChain):
    """A chain whose inner channels may become fewer.

    Attributes:
        geometry: Which of the inner values the last operator reads.
        chain: The chain.
    """

    chain: FittableChain = field(kw_only=True)

    @property
    def key(self) -> tuple[str, ...]:
        """The activations, told from the chain around them."""
        return "width", *self.sites

    @property
    def ladder(self) -> tuple[str, ...]:
        """The activations: something narrower and one operator are steps on the same way."""
        return self.chain.ladder

    @property
    def whole(self) -> FittableChain:
        """The chain: prices are of all of it."""
        return self.chain

    @property
    def described(self) -> str:
        """What to call it in a sentence."""
        return f"the inner channels around {self.sites[0]!r}"

    @property
    def told(self) -> tuple[str, ...]:
        """Nothing: reasons are given for the chain."""
        return ()

    @property
    def ends(self) -> tuple[str, str]:
        """Name of the last operator: the sums are over what that reads."""
        return self.operators[-1], self.operators[-1]

    def fits(self, model: nn.Module, moments: Moments) -> Iterator[Fit]:
        """Yield the chain with fewer and fewer inner channels."""
        width = self.geometry.channels
        names: dict[int, str] = {}
        for name, share in SHARES.items():
            names.setdefault(max(1, round(share * width)), name)
        names.pop(width, None)
        for found in narrowed(moments, [*names], self._importance(model).to(moments.fitted.gram)):
            if is_finite(found.weight, found.bias, found.mean, found.variance):
                kind = f"{names[len(found.channels)]} of the channels"
                operator = self._in_a_row(model, found)
                yield NarrowFit(
                    kind, operator, found.explained, found.mean, found.variance,
                    found.channels, found.weight, found.bias,
                )  # fmt: skip

    def _importance(self, model: nn.Module) -> Tensor:
        """Return what the batch norm after it multiplies each output with; ones if there is none."""
        if self.norm is None:
            return torch.ones(self.outputs(model))
        norm: Any = model.get_submodule(self.norm)
        if norm.running_var is None:
            return torch.ones(self.outputs(model))
        scale = (norm.running_var + norm.eps).rsqrt()
        return scale if norm.weight is None else (scale * norm.weight.detach()).abs()

    def _in_a_row(self, model: nn.Module, found: Narrowed) -> nn.Module:
        modules = self.narrow_modules(model, found.channels, found.weight, found.bias)
        row = [name for pair in zip(self.operators, self.sites, strict=False) for name in pair]
        return nn.Sequential(*(modules.get(name) or model.get_submodule(name) for name in (*row, self.operators[-1])))

    def narrow_modules(
        self, model: nn.Module, channels: Tensor, weight: Tensor, bias: Tensor | None
    ) -> dict[str, nn.Module]:
        """Return what takes the places of the modules of the chain, by name; what stays as it is is left out.

        Args:
            model: The model, in which the chain has all its channels.
            channels: Which are left.
            weight: Of the last operator.
            bias: Of the last operator; None for none.
        """
        *others, last = self.operators
        new: dict[str, nn.Module] = {}
        for name in (*others, *self.between, *self.sites):
            module = model.get_submodule(name)
            if _tensors_of(module):
                new[name] = _narrow(module, channels)
        operator: Any = deepcopy(model.get_submodule(last))
        like = operator.weight
        operator.weight = nn.Parameter(weight.to(like).contiguous(), like.requires_grad)
        operator.bias = None if bias is None else nn.Parameter(bias.to(like), like.requires_grad)
        _set_channels(operator, len(channels), _NAMES_OF_INPUTS)
        return new | {last: operator}


_NAMES_OF_INPUTS = ("in_channels", "in_features")
_NAMES_OF_CHANNELS = ("out_channels", "out_features", "num_features", "num_parameters")
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def _set_channels(module: nn.Module, count: int, names: Sequence[str]) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, count)


def _tensors_of(module: nn.Module) -> list[str]:
    """Return the names of the tensors that hold something for each channel; a slope for all of them is none."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return []
    return [name for name in _PER_CHANNEL if isinstance(getattr(module, name, None), Tensor)]


def _narrow(module: Any, channels: Tensor) -> nn.Module:
    """Copy a module with some of its output channels; a depthwise convolution loses the inputs, too."""
    copied = deepcopy(module)
    for name in _tensors_of(module):
        value = getattr(module, name)
        kept = value.detach()[channels.to(value.device)]
        setattr(copied, name, nn.Parameter(kept, value.requires_grad) if isinstance(value, nn.Parameter) else kept)
    _set_channels(copied, len(channels), _NAMES_OF_CHANNELS)
    if getattr(copied, "groups", 1) > 1:
        copied.in_channels = copied.groups = len(channels)
    return copied


def narrowable(model: nn.Module, chain: FittableChain) -> NarrowableChain | None:
    """Return a chain as one whose inner channels may become fewer; None if they may not.

    They may where every module between acts on each channel alone and is known to, and where the operators at the ends
    have no groups.

    Args:
        model: The model, in eval mode.
        chain: The chain.
    """
    operators: list[Any] = [model.get_submodule(name) for name in chain.operators]
    *_, last = operators
    geometry = _read_by(last)
    if geometry is None or geometry.channels < 2 or geometry.unknowns > _MOST_UNKNOWNS:
        return None
    width = geometry.channels
    if getattr(operators[0], "groups", 1) != 1 or len(operators[0].weight) != width:
        return None
    if any(not _is_depthwise(operator, width) for operator in operators[1:-1]):
        return None
    if any(not _has_channels_alone(model.get_submodule(name), width) for name in (*chain.between, *chain.sites)):
        return None
    return NarrowableChain(chain.sites, chain.operators, chain.between, geometry, chain.norm, chain.total, chain=chain)


def _read_by(operator: Any) -> Geometry | None:
    """Return what an operator reads at a position; None for one that is not summed up."""
    if type(operator) is nn.Linear:
        return Geometry(operator.in_features)
    padding = numeric_padding(operator) if type(operator) in CONVOLUTIONS else None
    if padding is None or operator.groups != 1 or (any(padding) and operator.padding_mode != "zeros"):
        return None
    return Geometry(
        operator.in_channels, tuple(operator.kernel_size), tuple(operator.stride), padding,
        dilation=tuple(operator.dilation),
    )  # fmt: skip


def _is_depthwise(operator: Any, width: int) -> bool:
    return type(operator) in CONVOLUTIONS and operator.groups == operator.in_channels == operator.out_channels == width


def _has_channels_alone(module: Any, width: int) -> bool:
    """Tell whether a module between two operators holds something for each of the channels, or nothing for any."""
    tensors = [*module.parameters(), *module.buffers()]
    if type(module) in BATCH_NORMS:
        return bool(module.num_features == width)
    if type(module) is nn.PReLU:
        return module.num_parameters in (1, width)
    return not tensors
