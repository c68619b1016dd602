"""How fast or how shallow a model should become, and whether it is."""

import dataclasses
import math
from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor, nn

from lightning_easier.collapse import CollapseResult, collapse
from lightning_easier.collapse.prices import LatencyTable, Objective
from lightning_easier.costs import measure_latency
from lightning_easier.linearize import restore, stand_ins
from lightning_easier.report import ModelCost

# A model whose estimated time is so near to the target is collapsed and timed.
_NEARLY = 1.1


class Goal:
    """Tells whether a model has become as fast, or as shallow, as it should.

    Args:
        source: The model as it was given.
        arguments: Example inputs.
        objective: What a collapse makes least.
        table: Times that were measured already.
        speedup: How many times faster; None for no matter.
        depth: How many operators at most; None for no matter.
    """

    def __init__(
        self,
        source: nn.Module,
        arguments: tuple[Tensor, ...],
        objective: Objective,
        table: LatencyTable,
        speedup: float | None,
        depth: int | None,
    ) -> None:
        self._source = source
        self._arguments = arguments
        self._objective: Objective = objective
        self._table = table
        self._speedup = speedup
        self._depth = depth
        self._dense = self.collapsed(source).report
        self._not_before = 0.0  # of what is saved: less is not worth another look

    def collapsed(self, model: nn.Module) -> CollapseResult:
        """Collapse a model exactly."""
        return collapse(model, self._arguments, objective=self._objective, latencies=self._table)

    def is_reached(self, model: nn.Module, saved: float) -> bool:
        """Tell whether a model is there.

        Args:
            model: The model.
            saved: Of its price, in the unit of the objective.
        """
        if self._speedup is None and self._depth is None:
            return False
        if self._speedup is not None and self._objective == "latency":
            seconds = self._dense.after.latency.median  # a first estimate; only what may be there is collapsed
            is_far = self._dense.before.latency.median < _NEARLY * self._speedup * (seconds - saved)
            if is_far or saved < self._not_before:
                return False
        result = self.collapsed(model)
        before, after, _ = self.costs(result)
        if self._speedup is not None:  # to collapse takes its time: only half of what is missing is waited for
            missing = after.latency.median - before.latency.median / self._speedup
            self._not_before = saved + missing / 2
        is_fast = self._speedup is None or before.latency.median >= self._speedup * after.latency.median
        return is_fast and (self._depth is None or after.depth <= self._depth)

    def costs(self, result: CollapseResult) -> tuple[ModelCost, ModelCost, ModelCost]:
        """Return the costs of the model as given, of that collapsed exactly, and of a result, timed interleaved."""
        latency = measure_latency({"before": self._source, "after": result.model}, self._arguments)
        before = dataclasses.replace(self._dense.before, latency=latency["before"])
        return before, dataclasses.replace(result.report.after, latency=latency["after"]), self._dense.after


def is_reached(
    network: nn.Module,
    arguments: tuple[Tensor, ...],
    removed: Sequence[str],
    speedup: float | None,
    depth: int | None,
    objective: Objective,
    table: LatencyTable,
) -> bool:
    """Tell whether a network with linear activations is as fast, or as shallow, as it should be.

    Args:
        network: A copy of the network.
        arguments: Example inputs.
        removed: Names of the activations that the dense network has, as they end: it may be a part of a larger one.
        speedup: How many times faster than the dense one, as it is written; None for no matter.
        depth: How many operators at most; None for no matter.
        objective: What a collapse makes least.
        table: Times that were measured already.
    """
    network = network.eval()
    arguments = tuple(value.detach().clone() for value in arguments)
    dense = deepcopy(network)
    restore(dense, [name for name in stand_ins(dense) if any(f".{other}".endswith(f".{name}") for other in removed)])
    return Goal(dense, arguments, objective, table, speedup, depth).is_reached(network, math.inf)
