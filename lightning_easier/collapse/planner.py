"""Does a merge pay? Price two operators and what they would become, at their true shapes on their own device."""

from typing import Literal, get_args

import torch
from torch import nn

from lightning_easier.costs import count_macs, measure_latency, speed_up

Objective = Literal["latency", "macs", "depth"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

# Two timings of one thing differ by about this much; less is not an improvement.
_LATENCY_MARGIN = 0.02


def prices(
    objective: Objective, pair: tuple[nn.Module, nn.Module], merged: nn.Module, input_shape: torch.Size
) -> tuple[float, float]:
    """Price a pair of operators and their merge: seconds, multiply-accumulates or number of operators.

    Args:
        objective: The unit.
        pair: The two operators, in execution order.
        merged: What they would become.
        input_shape: Shape of the input of the first.
    """
    if objective == "depth":
        return 2.0, 1.0
    weight: torch.Tensor = pair[0].weight  # type: ignore[assignment]
    arguments = (torch.randn(input_shape, dtype=weight.dtype, device=weight.device),)
    original = nn.Sequential(*pair)
    if objective == "macs":
        return float(count_macs(original, arguments)), float(count_macs(merged, arguments))
    latency = measure_latency({"original": original, "merged": merged}, arguments)
    _, faster, _ = speed_up(latency["original"], latency["merged"])
    return latency["original"].median, latency["original"].median / faster


def pays(objective: Objective, before: float, after: float) -> bool:
    """Tell whether a price is an improvement on another, beyond what noise explains."""
    return after < before * (1 - _LATENCY_MARGIN if objective == "latency" else 1)
