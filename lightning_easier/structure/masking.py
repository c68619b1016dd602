"""An operation that makes weights zero and holds them so.

A mask is not a parametrization: the parameter stays what it is, under its own name, and what was pruned is made zero
again after every step of an optimizer. So momentum and weight decay do what they like, a state dict has no other keys,
and at the end there is nothing to make permanent.
"""

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from lightning_easier.structure.operations import Affines, Change, Operation
from lightning_easier.support.processes import reshard


def packed(pruned: Tensor) -> Tensor:
    """Return a bool tensor as bits: uint8, shape ``(ceil(n / 8),)``, on the CPU."""
    return torch.from_numpy(np.packbits(pruned.detach().cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return what :func:`packed` was given, on the CPU.

    Raises:
        ValueError: If there are more or fewer bits than the shape has elements.
    """
    count = prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
        raise ValueError(
            f"Expected the mask of a weight of shape {tuple(shape)} to have {(count + 7) // 8} bytes, but got "
            f"{tuple(bits.shape)} of {bits.dtype}: the model is not the one that it was made for"
        )
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool().view(shape)


@dataclass
class Switched(Affines):
    """Affines take the places of activations that do not switch any more, all at once.

    Attributes:
        called: What a report calls it.
        said: What a report says of it.
    """

    kind = "switched"
    shift_padding: bool = False  # it would compute something else at the borders
    called: str = "linear"
    said: list[str] = field(default_factory=list)

    @property
    def removes(self) -> int:
        """The activations."""
        return len(self.names)

    def apply(self, model: nn.Module) -> Change:
        """Carry it out, in place."""
        change = super().apply(model)
        notes = [f"`{name}`: {note}" for name, each in change.notes.items() for note in each]
        return replace(change, notes={self.called: [*self.said, *notes]})


@dataclass
class Masks(Switched):
    """Weights become zero and stay so; affines take the places of activations that do not switch any more.

    Attributes:
        pruned: Parameter name -> which of its elements are zero, as bits (:func:`packed`), those of earlier rounds
            among them.
    """

    kind = "masks"
    is_large = True
    called: str = "weights"
    pruned: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._masks: dict[str, tuple[Parameter, Tensor]] = {}

    def apply(self, model: nn.Module) -> Change:
        """Carry it out, in place. What optimizers know of the weights that stay is as good as before."""
        for name in self.pruned:
            self._mask_of(model, name)  # all of them fit, or nothing is changed
        change = super().apply(model)
        reshard(model)
        self.hold(model)
        return change

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """Make the weights zero again: an optimizer has changed them."""
        for name in self.pruned:
            parameter, mask = self._mask_of(model, name)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.masked_fill_(mask, 0.0)

    def supersedes(self, earlier: Operation) -> bool:
        """Whether an earlier one need not hold any more: a later mask of a weight has the zeros of the earlier."""
        return isinstance(earlier, Masks) and earlier.pruned.keys() <= self.pruned.keys()

    @property
    def parts(self) -> set[str]:
        """The activations, and the modules whose weights it prunes."""
        return super().parts | {name.rpartition(".")[0] for name in self.pruned}

    def _mask_of(self, model: nn.Module, name: str) -> tuple[Parameter, Tensor]:
        """Return a parameter, and the mask of what this process has of it.

        Raises:
            ValueError: If the parameter is not there, or has another shape.
        """
        try:
            parameter = model.get_parameter(name)
        except AttributeError as error:
            raise ValueError(
                f"Expected the model to have a parameter {name!r}, of which weights were pruned. Does another callback "
                f"mask it, or parametrize it?"
            ) from error
        known = self._masks.get(name)
        if known is None or known[0] is not parameter or known[1].device != parameter.device:
            mask = unpacked(self.pruned[name], parameter.shape)
            if isinstance(parameter, DTensor):  # every process has the whole mask: nothing is sent
                mesh, placements = parameter.device_mesh, parameter.placements
                mask = distribute_tensor(mask.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()
            known = self._masks[name] = parameter, mask.to(parameter.device)
        return known
