"""Make activations linear, reversibly, and leave a mark that a checkpoint carries.

An identity has no parameters, so a pruned state dict would load into the unpruned network without a word and bring the
rectifiers back. Each stand-in therefore has an extra state, its *mark*: a strict load into another structure fails on
it, in both directions. A mark is a tensor of bytes (JSON), because every tool that handles state dicts handles tensors.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.activations import isolate_activations, planned_sites, replace_activation, unwrap
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
    """

    stand_in: str
    activation: str

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
            return cls(data["stand_in"], data["activation"]) if _MAGIC in data else None
        except (ValueError, TypeError, KeyError):
            return None


class IdentityStandIn(nn.Module):
    """The identity in the place of an activation, which it keeps to be restored.

    The activation is not a submodule: its parameters, if any, are no longer the model's.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.training = activation.training
        self._activation = (activation,)  # in a tuple, so that it does not register

    @property
    def activation(self) -> nn.Module:
        """The activation that was replaced."""
        return self._activation[0]

    @property
    def mark(self) -> Mark:
        """What the state dict says of this stand-in."""
        return Mark("identity", type(self.activation).__name__)

    def forward(self, input: Tensor, *_: Tensor) -> Tensor:
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
        """Name the activation that was replaced."""
        return f"in place of {self.activation}"


def linearize(
    model: nn.Module,
    names: Iterable[str],
    *,
    stand_in: str = "identity",
    statistics: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make the named activations linear, in place.

    Args:
        model: Any module; its activations are isolated first.
        names: Qualified names as :func:`~lightning_easier.isolate_activations` returns them, those of gates among
            them. Names that are linear already stay so.
        stand_in: What takes the place of an activation: ``"identity"``.
        statistics: Reserved for stand-ins that are fitted to data; the identity takes none.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name or ``stand_in`` is unknown, or ``statistics`` is given.

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
    activations = isolate_activations(inner, gates=gates)
    for name in names:
        if name not in linear:
            replace_activation(inner, name, IdentityStandIn(activations[name]))
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
    for name in names:
        activation = linear[name].activation
        activation.train(linear[name].training)
        if next(activation.parameters(), None) is not None:  # it was not moved or cast with the model
            like = next((tensor for tensor in inner.parameters() if tensor.is_floating_point()), torch.empty(0))
            activation.to(like.device, like.dtype)
        replace_activation(inner, name, activation)
    return model


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


def restructure_as_marked(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Give a model the structure that a state dict is marked with, in place: what is marked is linear, the rest is not.

    Returns:
        The names that were made linear, and those that were restored by this call.

    Raises:
        ValueError: If a mark names an activation that the model does not have, or another kind of it.
    """
    marks = read_marks(state_dict)
    inner = unwrap(model)
    linear = stand_ins(inner)
    if set(marks) == set(linear):
        return [], []
    sites, _ = _activations_for(inner, [name for name in marks if name not in linear])
    for name, mark in marks.items():
        found = linear[name].activation if name in linear else sites.get(name)
        if found is None or type(found).__name__ != mark.activation or mark.stand_in not in STAND_INS:
            raise ValueError(
                f"Expected the model to have an activation {name!r} of class {mark.activation}, which the checkpoint "
                f"marks as linear ({mark.stand_in}), but got {found}. The model has {list(sites) + list(linear)}: load "
                f"the checkpoint into a model built as the one that was saved."
            )
    linearized = [name for name in marks if name not in linear]
    restored = [name for name in linear if name not in marks]
    linearize(inner, linearized)
    restore(inner, restored)
    return linearized, restored


def _activations_for(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, nn.Module], frozenset[str]]:
    """Return the activations of a model that names can stand for, and the gates among those named."""
    activations = {site.name: site.module for site in planned_sites(model)}
    if all(name in activations for name in names):
        return activations, frozenset()
    activations = {site.name: site.module for site in planned_sites(model, gates=True)}
    kinds = {activation_kind(activations[name]) for name in names if name in activations}
    return activations, frozenset(GATES.keys() & kinds)


def _as_names(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"Expected argument `names` to be an iterable of names, but got the string {names!r}")
    return list(names)
