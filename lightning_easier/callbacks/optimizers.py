"""Keep optimizers holding exactly the live parameters while activations come and go."""

from collections.abc import Sequence

from torch.nn import Parameter
from torch.optim import Optimizer

Position = list[int]
"""Which of the parameters, optimizer, parameter group and place within it; plain data."""


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
                    positions.append([index, number, group_number, place])
    return positions


def put_back_parameters(
    optimizers: Sequence[Optimizer], parameters: Sequence[Parameter], positions: Sequence[Position]
) -> None:
    """Undo :func:`drop_parameters`; the moments are the checkpoint's business."""
    for index, number, group_number, place in reversed(positions):
        optimizers[number].param_groups[group_number]["params"].insert(place, parameters[index])
