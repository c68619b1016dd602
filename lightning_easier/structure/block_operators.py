"""What one operator in the place of a block is made of, as plain data, for state dicts and proposals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.structure.substitution import CONVOLUTIONS, attributes_of
from lightning_easier.support.affine import ChannelAffine
from lightning_easier.support.finite import is_finite

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, ChannelAffine)
_KINDS = {kind.__name__: kind for kind in _LAYERS}


@dataclass(frozen=True)
class Layer:
    """One layer of an operator.

    Attributes:
        kind: Name of its class: a Linear, a convolution, or a scale and an offset for each channel.
        attributes: What its class is made with.
        bias: Whether it has one.
    """

    kind: str
    attributes: dict[str, Any]
    bias: bool

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Layer":
        """Rebuild a layer from what became of it in JSON.

        Raises:
            KeyError: If its kind is unknown, or something is missing.
        """
        attributes = {name: tuple(v) if isinstance(v, list) else v for name, v in plain["attributes"].items()}
        if plain["kind"] not in _KINDS:
            raise KeyError(plain["kind"])
        return cls(plain["kind"], attributes, bool(plain["bias"]))

    def blank(self) -> nn.Module:
        """Return a layer of its shapes."""
        return _KINDS[self.kind](**self.attributes, bias=self.bias)


@dataclass(frozen=True)
class BlockFit:
    """An operator that was fitted to a whole block.

    Attributes:
        kind: Of the operator, as in :class:`~lightning_easier.report.Fitted`.
        unexplained: Share of the variance of what comes out that it does not explain: of the block, its skip among it;
            of a branch, of the sum that it is added to.
        layers: What it is made of.
        tensors: Values of its parameters, by name.
        returns: How many values the block returns, if that is a tuple; 0 otherwise.
    """

    kind: str
    unexplained: float
    layers: tuple[Layer, ...]
    tensors: dict[str, Tensor]
    returns: int = 0

    @classmethod
    def of(
        cls, operator: nn.Module, kind: str, unexplained: float, like: Tensor, returns: int = 0
    ) -> "BlockFit | None":
        """Describe an operator in the dtype of a tensor; None if its values are too large for that."""
        tensors = {name: value.detach().to("cpu", like.dtype) for name, value in operator.state_dict().items()}
        return cls(kind, unexplained, form_of(operator), tensors, returns) if is_finite(*tensors.values()) else None

    def operator(self) -> nn.Module:
        """Return it."""
        made = blank_operator(self.layers)
        made.to(next(iter(self.tensors.values())).dtype).load_state_dict(self.tensors)
        return made

    def to_plain(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts: what a checkpoint may hold, and another process read."""
        return {**vars(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "BlockFit":
        """Rebuild a fit from what :meth:`to_plain` returned."""
        return cls(**{**plain, "layers": tuple(Layer.from_plain(layer) for layer in plain["layers"])})


def dtype_of_values(block: nn.Module, model: nn.Module, seen: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype of the values that a block reads and returns.

    It is what was seen, as long as the model has anything of it: it may have been cast since. Else it is that of the
    matrices in the block: norms may be kept in another one. A block without any has the model's.

    Args:
        block: The block.
        model: The model that holds it.
        seen: The dtype of its values, if that was seen.
    """
    if seen is not None and any(each.dtype == seen for each in (*model.parameters(), *model.buffers())):
        return seen
    floating = [each for part in (block, model) for each in part.parameters() if each.is_floating_point()]
    matrices = (each for each in block.parameters() if each.is_floating_point() and each.ndim > 1)
    return next((each.dtype for each in (*matrices, *floating)), torch.get_default_dtype())


def form_of(operator: nn.Module) -> tuple[Layer, ...]:
    """Return the layers of an operator: itself, or those that it calls one after the other."""
    layers: Sequence[Any] = list(operator) if isinstance(operator, nn.Sequential) else [operator]
    return tuple(Layer(type(layer).__name__, _attributes(layer), layer.bias is not None) for layer in layers)


def _attributes(layer: Any) -> dict[str, Any]:
    if isinstance(layer, ChannelAffine):
        return {"channels": layer.channels, "dim": layer.dim}
    return attributes_of(layer)


def blank_operator(layers: Sequence[Layer]) -> nn.Module:
    """Return an operator of some layers, whose numbers are still to be loaded."""
    with torch.random.fork_rng(devices=[]):  # what is drawn for them is not missing elsewhere
        made = [layer.blank() for layer in layers]
    return made[0] if len(made) == 1 else nn.Sequential(*made)
