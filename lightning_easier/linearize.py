"""Make activations linear, reversibly, and leave a mark that a checkpoint carries.

An identity has no parameters, so a pruned state dict would load into the unpruned network without a word and bring the
rectifiers back. Each stand-in therefore has an extra state, its *mark*: a strict load into another structure fails on
it, in both directions. A mark is a tensor of bytes (JSON), because every tool that handles state dicts handles tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.activations import ActivationSite, isolate_activations, planned_sites, replace_activation, unwrap
from lightning_easier.padding import PaddingShift, apply_shifts, possible_shift, undo_shifts
from lightning_easier.rectifiers import GATES, activation_kind

STAND_INS = ("identity",)
EXTRA_STATE = "_extra_state"
_MAGIC = "lightning_easier.linear"


@dataclass(frozen=True)
class Mark:
    """What a state dict says of one linearized activation.

    Attributes:
        stand_in: The kind of stand-in: ``"identity"``.
        activation: Class name of the activation it replaces.
        shifts_padding: Whether the padding of the convolution behind it was moved to the one before it.
    """

    stand_in: str
    activation: str
    shifts_padding: bool = False

    def encode(self) -> Tensor:
        """Return the mark as a uint8 tensor."""
        return torch.tensor(list(json.dumps({_MAGIC: 1, **asdict(self)}).encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, value: Any) -> "Mark | None":
        """Read a mark; None for the extra state of something else."""
        if not isinstance(value, Tensor) or value.ndim != 1:
            return None
        try:  # a state dict that was cast as a whole (.half()) still holds the bytes exactly
            data = json.loads(bytes(value.to("cpu", torch.uint8).tolist()))
            if _MAGIC not in data:
                return None
            return cls(data["stand_in"], data["activation"], bool(data.get("shifts_padding", False)))
        except (ValueError, TypeError, KeyError):
            return None


class IdentityStandIn(nn.Module):
    """The identity in the place of an activation, which it keeps to be restored.

    The activation is not a submodule: its parameters, if any, are no longer the model's.
    """

    def __init__(self, activation: nn.Module, shift: PaddingShift | None = None) -> None:
        super().__init__()
        self.training = activation.training
        self._activation = (activation,)  # in a tuple, so that it does not register
        self.shift = shift

    @property
    def activation(self) -> nn.Module:
        """The activation that was replaced."""
        return self._activation[0]

    @property
    def moves_padding(self) -> bool:
        """Whether there was a padding to move."""
        return self.shift is not None and self.shift.moves_padding

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        return Mark("identity", type(self.activation).__name__, self.shift is not None)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the input; the slope that a functional ``F.prelu`` is called with is not needed."""
        return input

    def get_extra_state(self) -> Tensor:
        """Return the mark as bytes."""
        return self.mark.encode()

    def set_extra_state(self, state: Any) -> None:
        """Check that an incoming state is of the same structure.

        Raises:
            ValueError: If its mark is another.
        """
        mark = Mark.decode(state)
        if mark != self.mark:
            raise ValueError(f"Expected the state of a stand-in to carry the mark {self.mark}, but got {mark}")

    def extra_repr(self) -> str:
        """Name the activation that was replaced, and the padding that was moved."""
        return f"in place of {self.activation}" + ("" if self.shift is None else f", {self.shift}")


def linearize(
    model: nn.Module,
    names: Iterable[str],
    *,
    stand_in: str = "identity",
    statistics: Mapping[str, Any] | None = None,
    shift_padding: bool = False,
) -> nn.Module:
    """Make the named activations linear, in place.

    Args:
        model: Any module; its activations are isolated first.
        names: Qualified names as :func:`~lightning_easier.isolate_activations` returns them, those of gates among
            them. Names that are linear already stay so.
        stand_in: What takes the place of an activation: ``"identity"``.
        statistics: Reserved for stand-ins that are fitted to data; the identity takes none.
        shift_padding: Where a convolution before the activation and one behind it would meet, move the padding of the
            second to the first: with strides s₁ and paddings p₁, p₂ the first then pads p₁ + s₁·p₂ and the second
            nothing. The function changes at the borders, and the two can be merged exactly. Operators of other kinds,
            with other padding modes or with a second reader keep theirs.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name or ``stand_in`` is unknown, or ``statistics`` is given.

    Source: Moving the padding: Kim et al., Efficient Latency-Aware CNN Depth Compression (ICML 2023).

    Example:
        >>> from torch import nn
        >>> linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): IdentityStandIn(in place of ReLU())
        )
    """
    if stand_in not in STAND_INS:
        raise ValueError(f"Expected argument `stand_in` to be one of {STAND_INS}, but got {stand_in!r}")
    if statistics is not None:
        raise ValueError("Expected argument `statistics` to be None: the identity stand-in takes no statistics")
    inner = unwrap(model)
    names = _as_names(names)
    linear = stand_ins(inner)
    known, gates = _activations_for(inner, [name for name in names if name not in linear])
    for name in names:
        if name not in known and name not in linear:
            close = get_close_matches(name, known, n=3) or list(known)[:5]
            raise ValueError(
                f"Expected argument `names` to hold names of activations, but got {name!r}. Did you mean one of "
                f"{close}? `isolate_activations(model)` lists all {len(known)}."
            )
    shifts = {name: possible_shift(known[name].neighbourhood) for name in names if shift_padding and name not in linear}
    activations = isolate_activations(inner, gates=gates)
    with _paddings_unshifted(inner):
        for name in names:
            if name not in linear:
                replace_activation(inner, name, IdentityStandIn(activations[name], shifts.get(name)))
    return model


def restore(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Bring back activations that were made linear, in place.

    Args:
        model: A model that :func:`linearize` has changed.
        names: Which ones; all of them by default.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name is not that of a linearized activation.

    Example:
        >>> from torch import nn
        >>> restore(linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"]))
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
        )
    """
    inner = unwrap(model)
    linear = stand_ins(inner)
    names = list(linear) if names is None else _as_names(names)
    for name in names:
        if name not in linear:
            raise ValueError(
                f"Expected argument `names` to hold names of linearized activations, but got {name!r}; linear are "
                f"{list(linear)}"
            )
    with _paddings_unshifted(inner):
        for name in names:
            activation = linear[name].activation
            activation.train(linear[name].training)
            if next(activation.parameters(), None) is not None:  # it was not moved or cast with the model
                like = next((tensor for tensor in inner.parameters() if tensor.is_floating_point()), torch.empty(0))
                activation.to(like.device, like.dtype)
            replace_activation(inner, name, activation)
    return model


@contextmanager
def _paddings_unshifted(model: nn.Module) -> Iterator[None]:
    """Take all shifts of padding back, and carry out those of the stand-ins that are there afterwards."""
    undo_shifts(model, _shifts(model))
    try:
        yield
    finally:
        apply_shifts(model, _shifts(model))


def _shifts(model: nn.Module) -> list[PaddingShift]:
    return [stand_in.shift for stand_in in stand_ins(model).values() if stand_in.shift is not None]


def stand_ins(model: nn.Module) -> dict[str, IdentityStandIn]:
    """Return qualified name -> stand-in for every linearized activation."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, IdentityStandIn)}


def read_marks(state_dict: Mapping[str, Any]) -> dict[str, Mark]:
    """Return qualified name -> mark for every linearized activation that a state dict knows of."""
    marks = {}
    for key, value in state_dict.items():
        if key == EXTRA_STATE or key.endswith(f".{EXTRA_STATE}"):
            mark = Mark.decode(value)
            if mark is not None:
                marks[key.removesuffix(EXTRA_STATE).removesuffix(".")] = mark
    return marks


def restructure_as_marked(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[dict[str, Mark], dict[str, Mark]]:
    """Give a model the structure that a state dict is marked with, in place: what is marked is linear, the rest is not.

    Returns:
        The marks of the names that were made linear, and of those that were restored, by this call.

    Raises:
        ValueError: If a mark names an activation that the model does not have, or another kind of it.
    """
    marks = read_marks(state_dict)
    inner = unwrap(model)
    linear = stand_ins(inner)
    if marks == {name: stand_in.mark for name, stand_in in linear.items()}:
        return {}, {}
    known, _ = _activations_for(inner, [name for name in marks if name not in linear])
    sites = {name: site.module for name, site in known.items()}
    for name, mark in marks.items():
        found = linear[name].activation if name in linear else sites.get(name)
        if found is None or type(found).__name__ != mark.activation or mark.stand_in not in STAND_INS:
            raise ValueError(
                f"Expected the model to have an activation {name!r} of class {mark.activation}, which the checkpoint "
                f"marks as linear ({mark.stand_in}), but got {found}. The model has {list(sites) + list(linear)}: load "
                f"the checkpoint into a model built as the one that was saved."
            )
    restored = {name: stand_in.mark for name, stand_in in linear.items() if marks.get(name) != stand_in.mark}
    linearized = {name: mark for name, mark in marks.items() if name not in linear or name in restored}
    restructure(inner, restored, linearized)
    return linearized, restored


def restructure(model: nn.Module, restored: Iterable[str], linearized: Mapping[str, Mark]) -> None:
    """Restore some activations and make others linear as they are marked."""
    restore(model, restored)
    # What shifts a padding saw the others linear when it did.
    linearize(model, [name for name, mark in linearized.items() if not mark.shifts_padding])
    linearize(model, [name for name, mark in linearized.items() if mark.shifts_padding], shift_padding=True)


def _activations_for(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, ActivationSite], frozenset[str]]:
    """Return the activations of a model that names can stand for, and the gates among those named."""
    sites = {site.name: site for site in planned_sites(model)}
    if all(name in sites for name in names):
        return sites, frozenset()
    sites = {site.name: site for site in planned_sites(model, gates=True)}
    kinds = {activation_kind(sites[name].module) for name in names if name in sites}
    return sites, frozenset(GATES.keys() & kinds)


def _as_names(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"Expected argument `names` to be an iterable of names, but got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(f"Expected argument `names` to be an iterable of names, but got {names!r}")
    return list(names)
