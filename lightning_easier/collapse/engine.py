"""Capture, simplify, plan, write, verify, round: the steps of a collapse in their order."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lightning_easier.activations import unwrap
from lightning_easier.collapse.capture import capture
from lightning_easier.collapse.chains import depth
from lightning_easier.collapse.errors import CaptureError, CollapseError
from lightning_easier.collapse.prices import OBJECTIVES, LatencyTable, Objective
from lightning_easier.collapse.reading import uses_batch_statistics
from lightning_easier.collapse.steps import Steps
from lightning_easier.collapse.verification import (
    check_comparable,
    check_repeatable,
    copies,
    verify_in_float64,
    verify_rounded,
)
from lightning_easier.costs import (
    Latency,
    count_macs,
    count_parameters,
    is_slower,
    measure_activation_memory,
    measure_latency,
)
from lightning_easier.inference import as_arguments, forward
from lightning_easier.report import CollapseReport, ModelCost


@dataclass(frozen=True)
class CollapseResult:
    """A collapsed model and what was done.

    Attributes:
        model: A new module in eval mode, with parameters of its own.
        report: What was merged, what was not and why, and the cost before and after.
    """

    model: nn.Module
    report: CollapseReport


def collapse(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    mode: Literal["exact", "fit"] = "exact",
    objective: Objective = "latency",
    sites: Sequence[str] | None = None,
    calibration: Any = None,
    latencies: LatencyTable | None = None,
) -> CollapseResult:
    """Turn what is linear in a row into the cheapest equal operators, exactly.

    The model is taken as in eval mode: identities and dropouts go, batch norms are folded into the operator before
    them. Only a batch norm that is in training mode inside a model in eval mode stays as it is. Chains of linear steps
    (operators, affines, average pooling, layouts; additions, differences and concatenations of linear branches of one
    value) are cut into pieces, each of which becomes one operator, so that the total price is least. A plan that does
    not beat what is there is not carried out.

    Args:
        model: Any module that ``torch.fx`` or ``torch.export`` can trace, in part at least; it is not changed.
        example_inputs: A tensor, or the tuple of the forward's positional arguments, on the model's device. Prices and
            costs are those at this shape.
        mode: ``"exact"``: the same function. ``"fit"`` is not supported yet.
        objective: ``"latency"`` (measured on the inputs' device), ``"macs"`` (between equals, fewer operations), or
            ``"depth"`` (fewer operations). What does not improve it is not done.
        sites: For ``mode="fit"`` only.
        calibration: For ``mode="fit"`` only.
        latencies: Times of operators; pass one table to several calls, and what was timed once is not timed again.

    Returns:
        The collapsed model, an ordinary module in eval mode, and a report.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If ``mode``, ``objective`` or another argument has a value that is not supported, the model does not
            accept ``example_inputs``, or its outputs can't be compared.
        CollapseError: If the model can't be captured, or the result differs from it on the example inputs (in
            float64, or after rounding); the message names the first operator where it does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_easier import linearize
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> result = collapse(linearize(model, ["1"]), torch.randn(4, 8), objective="macs")
        >>> result.model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    if mode != "exact":
        raise ValueError(
            f"Expected argument `mode` to be 'exact', but got {mode!r}; least-squares replacements ('fit') are not "
            f"supported yet"
        )
    if sites is not None or calibration is not None:
        raise ValueError("Expected arguments `sites` and `calibration` to be None: they belong to mode='fit'")
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected argument `objective` to be one of {OBJECTIVES}, but got {objective!r}")
    arguments = as_arguments(example_inputs)
    model = unwrap(model)
    device = arguments[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _collapse(model, arguments, objective, LatencyTable() if latencies is None else latencies)


def _collapse(
    model: nn.Module, arguments: Sequence[Tensor], objective: Objective, latencies: LatencyTable
) -> CollapseResult:
    """Collapse a model after its arguments were checked; everything runs on a copy."""
    source = _in_eval_mode(model)
    with torch.no_grad():
        expected = forward(source, copies(arguments), "example_inputs")
        check_comparable(expected, source)
        check_repeatable(model, source, expected, arguments)
    try:
        captured = capture(source, copies(arguments))
    except CaptureError as error:
        raise CollapseError(
            f"The data flow of {type(model).__name__} can't be captured: {error}. Collapse the part of the model that "
            f"torch.fx or torch.export can trace."
        ) from error
    before = fx.GraphModule(captured, deepcopy(captured.graph))
    depth_before = depth(captured)

    steps = Steps(captured, objective, latencies)
    steps.drop_assertions()
    steps.drop_identities()
    steps.fold_batch_norms()
    steps.drop_stand_ins()
    steps.merge()
    collapsed = steps.finish()

    exactly, rounding = verify_in_float64(source, before, collapsed, arguments, expected)
    steps.round()
    difference = verify_rounded(collapsed, arguments, expected, rounding, type(model).__name__)

    timed = deepcopy(source)
    arguments = copies(arguments)  # timing may write into them again and again
    with torch.no_grad():
        latency = measure_latency({"before": timed, "after": collapsed}, arguments)
        cost_before = _cost(timed, arguments, depth_before, latency["before"])
        cost_after = _cost(collapsed, arguments, depth(collapsed), latency["after"])
    result: nn.Module = collapsed
    if not steps.changed:  # its own forward is as good, and may be faster than what was recorded of it
        steps.dropped = []
        result, cost_after, difference, exactly = timed, cost_before, 0.0, 0.0
    if objective == "latency" and is_slower(latency["before"], latency["after"]):
        steps.give_up(type(model).__name__)
        result, cost_after, difference, exactly = timed, cost_before, 0.0, 0.0
    report = CollapseReport(
        steps.merges, steps.fused, steps.dropped, steps.refusals, cost_before, cost_after, difference, exactly
    )
    for name, module in result.named_modules():
        if uses_batch_statistics(module):  # it has counted the runs above
            module.load_state_dict(model.get_submodule(name).state_dict())
    for node in collapsed.graph.nodes:
        node.meta.clear()  # shapes are those of the example inputs only
    return CollapseResult(result, report)


def _in_eval_mode(model: nn.Module) -> nn.Module:
    """Copy a model for eval mode; batch norms that were left in training mode in a model in eval mode stay in it."""
    source = deepcopy(model)
    kept = [module for module in source.modules() if uses_batch_statistics(module) and not model.training]
    source.eval()
    for module in kept:
        module.train()
    return source


def _cost(model: nn.Module, arguments: Sequence[Tensor], depth: int, latency: Latency) -> ModelCost:
    macs, memory = count_macs(model, arguments), measure_activation_memory(model, arguments)
    return ModelCost(depth, count_parameters(model), macs, memory, latency)
