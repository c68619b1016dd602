"""Make activations linear, reversibly, and give a model the structure that a state dict is marked with."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from lightning_easier.activations import ActivationSite, isolate_activations, planned_sites, replace_activation, unwrap
from lightning_easier.affines import AffineFit
from lightning_easier.arguments import check_choice
from lightning_easier.padding import PaddingShift, apply_shifts, possible_shift, undo_shifts
from lightning_easier.rectifiers import GATES, activation_kind
from lightning_easier.stand_in import EXTRA_STATE, STAND_INS, AffineStandIn, IdentityStandIn, Mark, StandIn


def linearize(
    model: nn.Module,
    names: Iterable[str],
    *,
    stand_in: str = "identity",
    statistics: Mapping[str, AffineFit] | None = None,
    shift_padding: bool = False,
    trainable: bool = False,
) -> nn.Module:
    """Make the named activations linear, in place.

    Args:
        model: Any module; its activations are isolated first.
        names: Qualified names as :func:`~lightning_easier.isolate_activations` returns them, those of gates among
            them. Names that are linear already stay so.
        stand_in: What takes the place of an activation: ``"identity"``, or ``"affine"``, a scale and an offset for each
            channel. Both are linear, and an exact collapse folds them into their neighbours.
        statistics: For ``"affine"``: name -> scale and offset, as :func:`~lightning_easier.measure_affines` returns
            them.
        shift_padding: Where a convolution before the activation and one behind it would meet, move the padding of the
            second to the first: with strides s₁ and paddings p₁, p₂ the first then pads p₁ + s₁·p₂ and the second
            nothing. The function changes at the borders, and the two can be merged exactly. Operators of other kinds,
            with other padding modes or with a second reader keep theirs.
        trainable: Whether scale and offset of ``"affine"`` are parameters, which an optimizer that is made afterwards
            trains; by default they are buffers.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name or ``stand_in`` is unknown, or ``statistics`` do not go with it.

    Source: EASIER, arXiv 2404.18949, for the identity. Moving the padding:
        Kim et al., Efficient Latency-Aware CNN Depth Compression (ICML 2023).

    Example:
        >>> from torch import nn
        >>> linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): IdentityStandIn(in place of ReLU())
        )
    """
    check_choice("stand_in", stand_in, STAND_INS)
    inner = unwrap(model)
    names = _as_names(names)
    linear = stand_ins(inner)
    fits = _checked(statistics, stand_in, [name for name in names if name not in linear])
    _make_linear(inner, {name: (fits.get(name), trainable) for name in names if name not in linear}, shift_padding)
    return model


def _make_linear(model: nn.Module, wanted: Mapping[str, tuple[AffineFit | None, bool]], shift_padding: bool) -> None:
    """Put stand-ins in the place of activations that are not linear yet.

    Args:
        model: The model.
        wanted: Name -> the affine, None for an identity, and whether it is trained.
        shift_padding: As for :func:`linearize`.
    """
    known, gates = _activations_for(model, wanted)
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=3) or list(known)[:5]
            raise ValueError(
                f"Expected argument `names` to hold names of activations, but got {name!r}. Did you mean one of "
                f"{close}? `isolate_activations(model)` lists all {len(known)}."
            )
    shifts = {name: possible_shift(known[name].neighbourhood) for name in wanted} if shift_padding else {}
    activations = isolate_activations(model, gates=gates)
    like = _floating(model)
    with _paddings_unshifted(model):
        for name, (fit, trainable) in wanted.items():
            made: StandIn
            if fit is None:
                made = IdentityStandIn(activations[name], shifts.get(name))
            else:
                made = AffineStandIn(activations[name], fit, trainable, shifts.get(name)).to(like)
            replace_activation(model, name, made)


def _checked(
    statistics: Mapping[str, AffineFit] | None, stand_in: str, names: Iterable[str]
) -> Mapping[str, AffineFit]:
    """Return the affine for each name; none for identities."""
    if stand_in == "identity":
        if statistics is not None:
            raise ValueError("Expected argument `statistics` to be None: the identity stand-in takes no statistics")
        return {}
    for name in names:
        if not isinstance((statistics or {}).get(name), AffineFit):
            raise ValueError(
                f"Expected argument `statistics` to hold the affine of {name!r}, as `measure_affines(model, batches)` "
                f"returns it, but got {(statistics or {}).get(name)!r}"
            )
    return statistics or {}


def _floating(model: nn.Module) -> torch.Tensor:
    """Return a tensor of the model's dtype, on its device."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))


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
                activation.to(_floating(inner))
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


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """Return qualified name -> stand-in for every linearized activation."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, StandIn)}


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
    for shifts in (False, True):
        wanted = {name: mark for name, mark in linearized.items() if mark.shifts_padding == shifts}
        _make_linear(unwrap(model), {name: (mark.blank(), mark.trainable) for name, mark in wanted.items()}, shifts)


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
