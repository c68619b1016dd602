"""Keep optimizers holding exactly the live parameters while activations come and go."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_easier.pruning.state import Place, Position
from lightning_easier.structure.inventory import originals


def drop_parameters(optimizers: Sequence[Optimizer], parameters: Sequence[Parameter]) -> list[Position]:
    """Take parameters, and their moments, out of the optimizers; return where each was, in the order of removal."""
    positions = []
    for index, parameter in enumerate(parameters):
        for number, optimizer in enumerate(optimizers):
            for group_number, group in enumerate(optimizer.param_groups):
                place = next((i for i, other in enumerate(group["params"]) if other is parameter), None)
                if place is not None:
                    del group["params"][place]
                    optimizer.state.pop(parameter, None)
                    name = group["param_names"].pop(place) if "param_names" in group else None
                    positions.append([index, number, group_number, place, name])
    return positions


def forget_moments(optimizers: Sequence[Optimizer], parameters: Iterable[Parameter]) -> None:
    """Have optimizers begin anew with parameters whose values, or shapes, are others now."""
    for parameter in parameters:
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)


def put_back_parameters(
    optimizers: Sequence[Optimizer], parameters: Sequence[Parameter], positions: Sequence[Position]
) -> None:
    """Undo :func:`drop_parameters`; the moments are the checkpoint's business."""
    for index, number, group_number, place, name in reversed(positions):
        group = optimizers[number].param_groups[group_number]
        group["params"].insert(place, parameters[index])
        if name is not None:
            group["param_names"].insert(place, name)


def groups_for(model: nn.Module, optimizers: Sequence[Optimizer], names: Iterable[str]) -> list[Place]:
    """Return which parameter groups the parameters of stand-ins join: those of what is trained right before them.

    That is the batch norm or the operator in front, as far as parameters are registered in the order of their use; what
    a recipe does to it alone (no weight decay, another learning rate) it does to a scale and an offset after it, too.

    Args:
        model: The model.
        optimizers: Its optimizers.
        names: Of stand-ins.
    """
    groups = {
        parameter: (number, group_number)
        for number, optimizer in enumerate(optimizers)
        for group_number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    places: list[Place] = []
    for name in names:
        own = set(model.get_submodule(name).parameters())
        before: list[tuple[int, int]] = []
        after: list[tuple[int, int]] = []
        found = before
        for parameter in model.parameters():
            if parameter in own:
                found = after
            elif parameter in groups:
                found.append(groups[parameter])
        if own and (before or after):
            places.append([name, *(before[-1] if before else after[0])])
    return places


def join(model: nn.Module, optimizers: Sequence[Optimizer], places: Iterable[Place]) -> None:
    """Append the parameters of modules to parameter groups; what has gone since, with a block, has none."""
    there = dict(model.named_modules(remove_duplicate=False))
    for name, number, group_number, *_ in places:
        if name not in there:
            continue
        group = optimizers[number].param_groups[group_number]
        for own_name, parameter in model.get_submodule(name).named_parameters():
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(f"{name}.{own_name}")


def build_as_the_first(
    pl_module: LightningModule, removed: Callable[[], Iterable[str]], joined: Callable[[], Iterable[Place]]
) -> None:
    """Have a resumed run build its optimizers as the first did: over the parameters that have left since, too.

    The groups of a recipe may be of them alone: without them they would be missing, or could not be made at all, and
    the states that were saved would not fit. They leave again at once, and those that have joined since join.

    Args:
        pl_module: The model.
        removed: Tells the names of the activations that are linear and were not at the start of the run, once it is
            known.
        joined: Tells which parameter groups the parameters of stand-ins have joined.
    """
    stop_building_as_the_first(pl_module)
    build = pl_module.configure_optimizers

    @wraps(build)
    def build_with_lent_parameters() -> Any:
        with _lent(pl_module, removed()) as lent:
            built = build()
            optimizers = list(_optimizers_in(built))
            drop_parameters(optimizers, lent)
        join(pl_module, optimizers, joined())
        return built

    build_with_lent_parameters.instead_of = vars(pl_module).get("configure_optimizers")  # type: ignore[attr-defined]
    pl_module.configure_optimizers = build_with_lent_parameters  # type: ignore[method-assign]


def stop_building_as_the_first(pl_module: LightningModule) -> None:
    """Undo :func:`build_as_the_first`; a second call does nothing."""
    now: Any = vars(pl_module).get("configure_optimizers")
    if hasattr(now, "instead_of"):
        del pl_module.configure_optimizers
        if now.instead_of is not None:  # LightningCLI's
            pl_module.configure_optimizers = now.instead_of  # type: ignore[method-assign]


@contextmanager
def _lent(model: nn.Module, names: Iterable[str]) -> Iterator[list[Parameter]]:
    """Put back for a while what became linear, and what went with it; yields the parameters of it."""
    known = set(model.parameters())
    lent = originals(model, names)
    replaced = {name: model.get_submodule(name) for name in lent}
    for name, module in lent.items():
        model.set_submodule(name, module)
    try:
        yield [parameter for parameter in model.parameters() if parameter not in known]
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)


def _optimizers_in(built: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in what ``configure_optimizers`` returned, whichever form that has."""
    if isinstance(built, Optimizer):
        yield built
    elif isinstance(built, dict):
        yield from _optimizers_in(built.get("optimizer"))
    elif isinstance(built, list | tuple):
        for each in built:
            yield from _optimizers_in(each)
