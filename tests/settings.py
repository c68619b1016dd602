"""Arguments of the callback by their own names, whichever group they stand in: a test names what it is about."""

from dataclasses import fields
from typing import Any

from lightning_easier import (
    Distillation,
    EntropyPruningCallback,
    Files,
    FitChains,
    Linearize,
    Measuring,
    Method,
    Order,
    PruningCallback,
    Rounds,
    Target,
)

GROUPS = {"rounds": Rounds, "measuring": Measuring, "target": Target, "distillation": Distillation, "files": Files}


def grouped(**options: Any) -> dict[str, Any]:
    """Put arguments into their groups.

    Args:
        **options: Arguments of the callback, of its groups, of the method and of its order. ``method``: its class;
            ``fit``: whether that is FitChains; ``distill``: whether to distil.
    """
    fit = options.pop("fit", False)
    method: type[Method] = options.pop("method", Linearize)
    method = FitChains if fit and method is Linearize else method
    groups = GROUPS if options.pop("distill", False) else {k: v for k, v in GROUPS.items() if k != "distillation"}

    def taken(kind: type) -> dict[str, Any]:
        return {each.name: options.pop(each.name) for each in fields(kind) if each.name in options}

    order = taken(Order)
    of_method = taken(method) | ({"order": Order(**order)} if order else {})
    made = {name: (own, kind) for name, kind in groups.items() if (own := taken(kind)) or name == "distillation"}
    return options | {name: kind(**own) for name, (own, kind) in made.items()} | {"method": method(**of_method)}


def callback(*arguments: Any, **options: Any) -> Any:
    """Make the callback of a method, of arguments by their own names."""
    made = grouped(**options)
    if isinstance(made["method"], Linearize):
        return EntropyPruningCallback(*arguments, **made)
    return PruningCallback(made.pop("method"), *arguments, **made)
