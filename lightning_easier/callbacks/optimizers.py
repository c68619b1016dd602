"""Keep optimizers holding exactly the live parameters while activations come and go."""

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

Position = list[Any]
"""Which of the parameters, optimizer, parameter group and place within it, and its name there, if any; plain data."""


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


def put_back_parameters(
    optimizers: Sequence[Optimizer], parameters: Sequence[Parameter], positions: Sequence[Position]
) -> None:
    """Undo :func:`drop_parameters`; the moments are the checkpoint's business."""
    for index, number, group_number, place, name in reversed(positions):
        group = optimizers[number].param_groups[group_number]
        group["params"].insert(place, parameters[index])
        if name is not None:
            group["param_names"].insert(place, name)
