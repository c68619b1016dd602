"""What a model has: all its activations, those that were removed among them."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lightning_easier.sites.activations import planned_sites
from lightning_easier.sites.rectifiers import GATES
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.substitution import Absorbed


def activations_of(model: nn.Module, gates: Collection[str]) -> dict[str, str]:
    """Return name -> class of all activations, those that are linear among them.

    Args:
        model: The model.
        gates: Kinds of gates that count.
    """
    live = {site.name: type(site.module).__name__ for site in planned_sites(model, gates)}
    return live | {name: type(stand_in.activation).__name__ for name, stand_in in stand_ins(model).items()}


def check_activations(model: nn.Module, known: Mapping[str, str]) -> None:
    """Find out whether a model has the activations of the one that was saved.

    Args:
        model: The model.
        known: Name -> class of those.

    Raises:
        ValueError: If one is missing, or of another class.
    """
    now = activations_of(model, GATES.keys())
    absorbed = {name for name, part in model.named_modules() if isinstance(part, Absorbed)}  # it went with another
    gone = {*known} - {*not_removed(model, known), *stand_ins(model)}  # with a block
    others = [
        f"{name!r} is {now.get(name, 'gone')}, and was {kind}"
        for name, kind in known.items()
        if now.get(name) != kind and name not in absorbed | gone
    ]
    if others:
        raise ValueError(
            f"Expected {type(model).__name__} to have the activations of the run that is resumed, but "
            f"{'; '.join(others[:5])}. Build the module as the one that was saved, or start a new run."
        )


def not_removed(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return which of some modules are in a model still: neither they, nor a block that they are in, have gone."""
    linear = stand_ins(model)
    blocks = tuple(f"{name}." for name in linear)
    return [name for name in names if name not in linear and not name.startswith(blocks)]


def outermost(names: Iterable[str]) -> list[str]:
    """Leave out modules that lie inside another of them."""
    names = list(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def originals(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return, by name, the modules that are no longer in a model since activations became linear.

    Args:
        model: The model.
        names: The activations.
    """
    linear = stand_ins(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        if name in linear:
            found[name] = linear[name].activation
            found.update(linear[name].absorbed_by_name(name))
    return found
