"""What takes the place of an activation that was made linear, and the mark by which a checkpoint tells of it.

An identity has no parameters, so a pruned state dict would load into the unpruned network without a word and bring the
rectifiers back. Each stand-in therefore has an extra state, its *mark*: a strict load into another structure fails on
it, in both directions. A mark is a tensor of bytes (JSON), because every tool that handles state dicts handles tensors.

Whoever loads such a state dict may know nothing of all this, and sees nothing but the key that does not fit: so the key
says what to do.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.measure.affines import AffineFit
from lightning_easier.structure.block_operators import Layer, blank_operator, form_of
from lightning_easier.structure.padding import PaddingShift
from lightning_easier.structure.substitution import Form, Substitution
from lightning_easier.support.hooks import first_tensor

STAND_INS = ("identity", "affine")
LEAVES = ("identity", "zeros")
"""What a block may leave: its input, or zeros where it is a branch of an addition."""
OPERATOR = "operator"
"""What takes the place of a block where it leaves neither: one operator."""
EXTRA_STATE = "_extra_state"
HINT = "made_linear_by_lightning_easier__use_load_pruned_or_restore_structure_on_load"
MARK_KEY = f"{HINT}.{EXTRA_STATE}"
_MAGIC = "lightning_easier.linear"
_VERSION = 1


@dataclass(frozen=True)
class Mark:
    """What a state dict says of one linearized activation.

    Attributes:
        stand_in: The kind of stand-in: ``"identity"``, ``"affine"``, or, in the place of a block, ``"zeros"`` or
            ``"operator"``.
        activation: Class name of the activation it replaces, or of the block.
        shifts_padding: Whether the padding of the convolution after it was moved to the one before it.
        channels: Of an affine; 0 for an identity.
        dim: The axis of an affine's channels.
        trainable: Whether an affine's scale and offset are trained.
        form: What became of the chain around it, if a fitted operator has taken its place.
        returns: How many values a block returned, if that was a tuple; 0 otherwise.
        layers: What the operator in the place of a block is made of, if there is one.
    """

    stand_in: str
    activation: str
    shifts_padding: bool = False
    channels: int = 0
    dim: int = 1
    trainable: bool = False
    form: Form | None = None
    returns: int = 0
    layers: tuple[Layer, ...] = ()

    def encode(self) -> Tensor:
        """Return the mark as a uint8 tensor."""
        data = {_MAGIC: _VERSION, **asdict(self)}
        for name in ("returns", "layers"):  # as it was written before there were blocks
            if not data[name]:
                del data[name]
        return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, value: Any) -> "Mark | None":
        """Read a mark; None for the extra state of something else.

        Raises:
            ValueError: If it was written by another version of lightning_easier.
        """
        if not isinstance(value, Tensor) or value.ndim != 1:
            return None
        try:  # a state dict that was cast as a whole (.half()) still holds the bytes exactly
            data = json.loads(bytes(value.to("cpu", torch.uint8).tolist()))
            version = data[_MAGIC]
        except (ValueError, TypeError, KeyError):
            return None
        if version != _VERSION:
            raise ValueError(
                f"Expected the state dict to hold marks of linear activations of version {_VERSION}, but got "
                f"{version}: it was saved by another version of lightning_easier. Load it with that one."
            )
        try:
            return cls(
                data["stand_in"], data["activation"], bool(data.get("shifts_padding", False)),
                int(data.get("channels", 0)), int(data.get("dim", 1)), bool(data.get("trainable", False)),
                None if data.get("form") is None else Form.from_plain(data["form"]), int(data.get("returns", 0)),
                tuple(Layer.from_plain(layer) for layer in data.get("layers", ())),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError):
            return None

    def blank(self) -> AffineFit | None:
        """Return an affine of its shape, whose numbers are still to be loaded; None for an identity."""
        if self.stand_in != "affine":
            return None
        return AffineFit(torch.ones(self.channels), torch.zeros(self.channels), self.dim, 0.0)

    def blank_operator(self) -> nn.Module | None:
        """Return an operator of its shapes, whose numbers are still to be loaded; None where there is none."""
        return blank_operator(self.layers) if self.stand_in == OPERATOR else None


class _Marked(nn.Module):
    """Keeps the mark of a stand-in in the state dict, under a key that is told when it fits nowhere.

    Args:
        stand_in: What it is of.
    """

    def __init__(self, stand_in: "StandIn") -> None:
        super().__init__()
        self.training = stand_in.training
        self._stand_in = (stand_in,)  # in a tuple, so that it does not register

    def get_extra_state(self) -> Tensor:
        """Return the mark as bytes."""
        return self._stand_in[0].mark.encode()

    def set_extra_state(self, state: Any) -> None:
        """Check that an incoming state is of the same structure.

        Raises:
            ValueError: If its mark is another.
        """
        mark, own = Mark.decode(state), self._stand_in[0].mark
        if mark != own:
            raise ValueError(f"Expected the state of a stand-in to carry the mark {own}, but got {mark}")


class StandIn(nn.Module):
    """Takes the place of an activation, which it keeps to be restored.

    The activation is not a submodule: its parameters, if any, are no longer the model's.
    """

    forward_is_alike = True  # in every instance of a class, for who looks at what forwards do

    def __init__(
        self, activation: nn.Module, shift: PaddingShift | None = None, substitution: Substitution | None = None
    ) -> None:
        super().__init__()
        self.training = activation.training
        self._activation = (activation,)  # in a tuple, so that it does not register
        self.shift = shift
        self.substitution = substitution
        self.add_module(HINT, _Marked(self))

    @property
    def activation(self) -> nn.Module:
        """The activation that was replaced."""
        return self._activation[0]

    @property
    def absorbed(self) -> list[nn.Module]:
        """The modules of its chain that are identities now."""
        return [] if self.substitution is None else self.substitution.absorbed

    def absorbed_by_name(self, name: str) -> dict[str, nn.Module]:
        """Return qualified name -> module for the same, given the name of this stand-in."""
        return {} if self.substitution is None else self.substitution.absorbed_by_name(name)

    def names_around(self, name: str) -> set[str]:
        """Return the names of the operators that were changed with the activation, given the name of this stand-in."""
        return {
            *(() if self.shift is None else self.shift.names(name)),
            *(() if self.substitution is None else self.substitution.names(name)),
        }

    @property
    def moves_padding(self) -> bool:
        """Whether there was a padding to move."""
        return self.shift is not None and self.shift.moves_padding

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        return Mark("identity", type(self.activation).__name__, self.shift is not None, form=self._form)

    @property
    def _form(self) -> Form | None:
        return None if self.substitution is None else self.substitution.form

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Name the activation that was replaced, and what was done to the operators around it."""
        fitted = "" if self._form is None else ", with a fitted operator in place of its chain"
        return f"in place of {self.activation}" + (", with padding moved" if self.moves_padding else "") + fitted


class IdentityStandIn(StandIn):
    """The identity in the place of an activation."""

    computes_identity = True  # for who looks at what lies between operators

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the input; the slope that a functional ``F.prelu`` is called with is not needed."""
        return input


class Bypass(nn.Module):
    """Passes on the first value that it is called with, or zeros like it: all that is left of a block for good.

    Args:
        leaves: ``"identity"``, or ``"zeros"`` for a branch of an addition.
        returns: How many values it returns, if that is a tuple, the first of them that value; 0 otherwise.
    """

    def __init__(self, leaves: str = "identity", returns: int = 0) -> None:
        super().__init__()
        self.leaves = leaves
        self.returns = returns

    @property
    def computes_identity(self) -> bool:
        """Whether it is the identity, for who looks at what lies between operators."""
        return self.leaves == "identity" and not self.returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor, or zeros like it; what else a block is called with does not matter."""
        return _left(self.leaves, self.returns, args, kwargs)

    def extra_repr(self) -> str:
        """Name what is left."""
        return self.leaves


class InPlaceOfBlock(nn.Module):
    """An operator in the place of a block: it reads the first value that the block is called with.

    Args:
        operator: The operator.
        returns: How many values the block returned, if that was a tuple; 0 otherwise.
    """

    def __init__(self, operator: nn.Module, returns: int = 0) -> None:
        super().__init__()
        self.operator = operator
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the operator makes of the first value, and None for all others that the block returned."""
        value = self.operator(first_tensor(args, kwargs))
        return (value, *[None] * (self.returns - 1)) if self.returns else value


class BlockStandIn(StandIn):
    """What a whole block leaves: the first tensor that it is called with, or zeros like it.

    Args:
        block: The block.
        leaves: ``"identity"``, or ``"zeros"`` for a branch of an addition.
        returns: How many values the block returned, if that was a tuple, the first of them that value; 0 otherwise.
    """

    def __init__(self, block: nn.Module, leaves: str = "identity", returns: int = 0) -> None:
        super().__init__(block)
        self.leaves = leaves
        self.returns = returns
        # They are moved and cast with the model, which tells what the block has to follow when it comes back. There is
        # one of each dtype: a cast to one that the block has already shows in the others.
        likes = {each.dtype: each.detach() for each in block.parameters() if each.is_floating_point()}
        for place, like in enumerate(likes.values() or [torch.empty(0)]):
            self.register_buffer(f"_witness_{place}", like.new_empty(0), persistent=False)
        self._as_it_was = [(each.dtype, each.device) for each in self._witnesses]

    @property
    def _witnesses(self) -> list[Tensor]:
        return [buffer for name, buffer in self._buffers.items() if name.startswith("_witness_") and buffer is not None]

    def bring_along(self) -> None:
        """Move and cast the block as the model was since it was taken out."""
        witnesses = self._witnesses
        for (dtype, device), witness in zip(self._as_it_was, witnesses, strict=True):
            if witness.device != device:
                self.activation.to(witness.device)
            if witness.dtype != dtype:
                self.activation.to(witness.dtype)
        self._as_it_was = [(each.dtype, each.device) for each in witnesses]

    def for_good(self) -> nn.Module:
        """Return what does the same, without the block and without a mark."""
        return Bypass(self.leaves, self.returns).train(self.training)

    @property
    def computes_identity(self) -> bool:
        """Whether it is the identity, for who looks at what lies between operators."""
        return self.leaves == "identity" and not self.returns

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        return Mark(self.leaves, type(self.activation).__name__, returns=self.returns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first value, or zeros like it; what else a block is called with does not matter."""
        return _left(self.leaves, self.returns, args, kwargs)

    def extra_repr(self) -> str:
        """Name the class of the block that was there."""
        return f"{self.leaves} in place of {type(self.activation).__name__}"


class OperatorStandIn(BlockStandIn):
    """One operator in the place of a whole block; it is trained if anything in the block was.

    Args:
        block: The block.
        operator: What reads the first tensor that the block is called with.
        returns: As for :class:`BlockStandIn`.
    """

    def __init__(self, block: nn.Module, operator: nn.Module, returns: int = 0) -> None:
        super().__init__(block, OPERATOR, returns)
        parameters = list(block.parameters())
        is_trained = any(parameter.requires_grad for parameter in parameters) or not parameters
        self.operator = operator.train(self.training).requires_grad_(is_trained)

    def for_good(self) -> nn.Module:
        """Return what does the same, without the block and without a mark."""
        return InPlaceOfBlock(self.operator, self.returns).train(self.training)

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        block = type(self.activation).__name__
        return Mark(OPERATOR, block, returns=self.returns, layers=form_of(self.operator))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the operator makes of the first value, and None for all others that the block returned."""
        value = self.operator(first_tensor(args, kwargs))
        return (value, *[None] * (self.returns - 1)) if self.returns else value

    def extra_repr(self) -> str:
        """Name the operator, and the class of the block that was there."""
        return f"{self.operator} in place of {type(self.activation).__name__}"


class AffineStandIn(StandIn):
    """A scale and an offset for each channel in the place of an activation.

    Args:
        activation: The activation.
        fit: Scale and offset of each channel.
        trainable: Whether they are parameters; buffers otherwise.
        shift: The padding that moves.
        substitution: What becomes of the chain around the activation.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        activation: nn.Module,
        fit: AffineFit,
        trainable: bool = False,
        shift: PaddingShift | None = None,
        substitution: Substitution | None = None,
    ) -> None:
        super().__init__(activation, shift, substitution)
        self.dim = fit.dim
        for name, value in (("weight", fit.scale), ("bias", fit.offset)):
            value = value.detach().clone()
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        of_activation = type(self.activation).__name__, self.shift is not None
        trainable = isinstance(self.weight, nn.Parameter)
        return Mark("affine", *of_activation, len(self.weight), self.dim, trainable, self._form)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scale and offset each channel, in the dtype of the input; the shape stays."""
        shape = [1] * input.ndim
        shape[self.dim] = -1
        scale, offset = (each.view(shape).to(input.dtype) for each in (self.weight, self.bias))
        return torch.addcmul(offset, input, scale)

    def extra_repr(self) -> str:
        """Name the channels and their axis, too."""
        return f"{len(self.weight)}, dim={self.dim}, {super().extra_repr()}"


def _left(leaves: str, returns: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block leaves of what it is called with."""
    value = first_tensor(args, kwargs)
    if leaves == "zeros":
        value = torch.zeros_like(value)
    return (value, *[None] * (returns - 1)) if returns else value
