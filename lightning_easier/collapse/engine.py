"""Capture, simplify, plan, write, verify, round: the steps of a collapse in their order."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_easier.activations import isolate_activations, unwrap
from lightning_easier.arguments import check_choice, check_non_negative
from lightning_easier.calibration import read_calibration
from lightning_easier.collapse.baseline import Baseline, baseline_of
from lightning_easier.collapse.capture import capture
from lightning_easier.collapse.chains import depth
from lightning_easier.collapse.errors import CaptureError, CollapseError
from lightning_easier.collapse.fit_prices import ChainPrices, Choice
from lightning_easier.collapse.fitting import fit_chains
from lightning_easier.collapse.prices import OBJECTIVES, Objective
from lightning_easier.collapse.reading import uses_batch_statistics
from lightning_easier.collapse.steps import Steps
from lightning_easier.collapse.verification import (
    check_comparable,
    check_repeatable,
    verify_in_float64,
    verify_rounded,
)
from lightning_easier.costs import count_macs, count_parameters, measure_activation_memory
from lightning_easier.inference import as_arguments, copies, forward
from lightning_easier.report import CollapseReport, Fitted, ModelCost, Refusal
from lightning_easier.substitution import Absorbed
from lightning_easier.timing import MARGIN, Latency, LatencyTable, compare, speed_up

# How many times faster a collapsed model has to be at the least; less is slower.
_NOT_SLOWER = 1 - MARGIN


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
    calibration: Iterable[Any] | None = None,
    latencies: LatencyTable | None = None,
    slack: float = 0.02,
) -> CollapseResult:
    """Turn what is linear in a row into the cheapest equal operators, exactly.

    The model is taken as in eval mode: identities and dropouts go, batch norms are folded into the operator before
    them. Only a batch norm that is in training mode inside a model in eval mode stays as it is. Chains of linear steps
    (operators, affines, average pooling, layouts; additions, differences and concatenations of linear branches of one
    value) are cut into pieces, each of which becomes one operator, so that the total price is least. A plan that does
    not beat what is there is not carried out.

    With ``mode="fit"``, first the chain around each activation in ``sites`` (operator, activation, operator; several in
    a row where they share operators) is replaced by one operator, fitted by least squares to what the chain computes on
    the calibration data. The cheapest is taken of those that represent it well: a convolution of the size of the
    largest in the chain, a 1×1 or a depthwise and a pointwise one, a Linear, a product of two smaller ones, or an
    affine. Chains are fitted in execution order, each on what the last has left, with a quarter of the samples held
    out; the report tells the share of variance that is explained there.

    Args:
        model: Any module that ``torch.fx`` or ``torch.export`` can trace, in part at least; it is not changed.
        example_inputs: A tensor, or the tuple of the forward's positional arguments, on the model's device. Prices and
            costs are those at this shape.
        mode: ``"exact"``: the same function. ``"fit"``: besides, chains around activations are replaced.
        objective: ``"latency"`` (measured on the inputs' device), ``"macs"`` (between equals, fewer operations), or
            ``"depth"`` (fewer operations). What does not improve it is not done.
        sites: For ``mode="fit"``: names of the activations, as :func:`~lightning_easier.isolate_activations` returns
            them.
        calibration: For ``mode="fit"``: batches, such as a DataLoader's; a tensor each, or a sequence whose first
            elements are the forward's positional arguments.
        latencies: Times of operators; pass one table to several calls, and what was timed once is not timed again.

        slack: For ``mode="fit"``: how much less of the variance than the best operator one may explain to be taken
            for its price.

    Returns:
        The collapsed model, an ordinary module in eval mode, and a report.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If ``mode``, ``objective`` or another argument has a value that is not supported, the model does not
            accept ``example_inputs`` or ``calibration``, or its outputs can't be compared.
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
    check_choice("mode", mode, ("exact", "fit"))
    if mode == "exact" and (sites is not None or calibration is not None):
        raise ValueError("Expected arguments `sites` and `calibration` to be None: they belong to mode='fit'")
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected argument `objective` to be one of {OBJECTIVES}, but got {objective!r}")
    check_non_negative("slack", slack)
    arguments = as_arguments(example_inputs)
    model = unwrap(model)
    table = LatencyTable() if latencies is None else latencies
    device = arguments[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        source = _source(model, arguments)
        fits = _Fits([], {}, [])
        fitted = source
        if mode == "fit":
            fitted = deepcopy(source)
            fits = _fit(fitted, sites, calibration, arguments, ChainPrices(objective, table), slack)
        return _collapse(model, source, fitted, arguments, objective, table, fits)


def collapse_beside(
    model: nn.Module, arguments: Sequence[Tensor], objective: Objective, table: LatencyTable, baseline: Baseline
) -> CollapseResult:
    """Collapse a model exactly, and compare it with a dense network that is known already.

    Args:
        model: The model; it is not changed.
        arguments: Example inputs.
        objective: What is to be least.
        table: Times that were measured already.
        baseline: The dense network.

    Raises:
        CollapseError: As :func:`collapse`.
    """
    device = arguments[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        source = _source(model, arguments)
        return _collapse(model, source, source, arguments, objective, table, _Fits([], {}, []), baseline)


class _Fits(NamedTuple):
    """What was fitted, why other sites were not, and what was left out of the calibration data."""

    choices: list[Choice]
    reasons: dict[str, str]
    notes: list[str]


def _source(model: nn.Module, arguments: Sequence[Tensor]) -> nn.Module:
    """Copy a model for eval mode; everything runs on the copy."""
    source = _in_eval_mode(model)
    with torch.no_grad():
        expected = forward(source, copies(arguments), "example_inputs")
        check_comparable(expected, source)
        check_repeatable(model, source, expected, arguments)
    return source


def _fit(
    fitted: nn.Module,
    sites: Sequence[str] | None,
    calibration: Iterable[Any] | None,
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> _Fits:
    """Replace the chains around activations in place."""
    if calibration is None:
        raise ValueError("Expected argument `calibration` to hold batches, which mode='fit' fits to, but got None")
    if sites is None or isinstance(sites, str) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"Expected argument `sites` to be a sequence of names of activations, but got {sites!r}")
    known = isolate_activations(fitted, gates=True)
    for name in sites:
        if name not in known:
            raise ValueError(
                f"Expected argument `sites` to hold names of activations that are not linear, but got {name!r}, not "
                f"one of {list(known)}"
            )
    devices = [x.device for x in arguments]
    data = read_calibration("calibration", calibration, fitted, len(arguments), devices)
    return _Fits(*fit_chains(fitted, sites, data.batches, arguments, prices, slack), data.notes)


def _collapse(
    model: nn.Module,
    source: nn.Module,
    fitted: nn.Module,
    arguments: Sequence[Tensor],
    objective: Objective,
    latencies: LatencyTable,
    fits: _Fits,
    baseline: Baseline | None = None,
) -> CollapseResult:
    """Collapse a copy of a model after its arguments were checked.

    Args:
        model: The model as it was given.
        source: A copy of it in eval mode.
        fitted: What is collapsed exactly: the same, or a copy with fitted operators.
        arguments: Example inputs.
        objective: What is to be least.
        latencies: Times that were measured already.
        fits: What was fitted.
        baseline: The dense network to compare the result with; that of the model by default.
    """
    with torch.no_grad():
        expected = fitted(*copies(arguments))
    try:
        captured = capture(fitted, copies(arguments))
    except CaptureError as error:
        raise CollapseError(
            f"The data flow of {type(model).__name__} can't be captured: {error}. Collapse the part of the model that "
            f"torch.fx or torch.export can trace."
        ) from error
    before = fx.GraphModule(captured, deepcopy(captured.graph))

    steps = Steps(captured, objective, latencies)
    steps.simplify()
    steps.drop_stand_ins()
    unmerged = steps.snapshot()
    steps.merge()
    collapsed = steps.finish()

    exactly, rounding = verify_in_float64(fitted, before, collapsed, arguments, expected)
    steps.round()
    difference = verify_rounded(collapsed, arguments, expected, rounding, type(model).__name__)

    timed = deepcopy(source)
    graph = before if fitted is source else capture(deepcopy(source), copies(arguments))
    dense = baseline_of(source, arguments, graph) if baseline is None else baseline
    arguments = copies(arguments)  # timing may write into them again and again
    models = {"before": timed, "dense": dense.model, "after": collapsed}
    bars = {("before", "after"): _NOT_SLOWER} if objective == "latency" else {}
    if bars and steps.merges:
        without, _ = verify_in_float64(fitted, before, unmerged, arguments, expected)
        steps.round(unmerged)
        models["unmerged"], bars["unmerged", "after"] = unmerged, _NOT_SLOWER
    latency = compare(models, arguments, bars)
    slower = {first for first, _ in bars if speed_up(latency[first], latency["after"]).median < _NOT_SLOWER}
    result: nn.Module = collapsed
    if "unmerged" in slower:
        steps.give_up_merges()
        result, latency["after"], exactly = unmerged, latency["unmerged"], without
        difference = verify_rounded(unmerged, arguments, expected, rounding, type(model).__name__)
    absorbed = any(isinstance(part, Absorbed) for part in fitted.modules())
    unchanged = not (steps.changed or absorbed)  # its own forward is as good, and may be faster than what was recorded
    if unchanged:
        steps.dropped = []
    elif "before" in slower and speed_up(latency["before"], latency["after"]).median < _NOT_SLOWER:
        steps.give_up(type(model).__name__)
        fits, unchanged = _Fits([], {}, []), True
    if unchanged:
        result, latency["after"], difference, exactly = timed, latency["before"], 0.0, 0.0
    depths = {"before": depth(graph), "dense": dense.depth}
    depths["after"] = depths["before"] if unchanged else depth(result)  # type: ignore[arg-type]
    models["after"] = result
    with torch.no_grad():
        cost = {name: cost_of(models[name], arguments, depths[name], latency[name]) for name in depths}
    refusals = [*(Refusal((site,), reason) for site, reason in fits.reasons.items()), *steps.refusals]
    report = CollapseReport(
        steps.merges, steps.fused, steps.dropped, refusals, cost["before"], cost["dense"], cost["after"], difference,
        exactly, [_record(choice, objective) for choice in fits.choices], fits.notes,
    )  # fmt: skip
    for name, module in result.named_modules():
        if uses_batch_statistics(module):  # it has counted the runs above
            module.load_state_dict(model.get_submodule(name).state_dict())
    if isinstance(result, fx.GraphModule):
        for node in result.graph.nodes:
            node.meta.clear()  # shapes are those of the example inputs only
    return CollapseResult(result, report)


def _record(choice: Choice, objective: Objective) -> Fitted:
    chain, fit = choice.chain, choice.fit
    return Fitted(
        chain.sites, chain.operators, fit.kind, fit.explained, choice.price_before, choice.price_after, objective
    )


def _in_eval_mode(model: nn.Module) -> nn.Module:
    """Copy a model for eval mode; batch norms that were left in training mode in a model in eval mode stay in it."""
    source = deepcopy(model)
    kept = [module for module in source.modules() if uses_batch_statistics(module) and not model.training]
    source.eval()
    for module in kept:
        module.train()
    return source


def cost_of(model: nn.Module, arguments: Sequence[Tensor], depth: int, latency: Latency) -> ModelCost:
    """Count what a model costs, beside the time that was measured."""
    macs, memory = count_macs(model, arguments), measure_activation_memory(model, arguments)
    return ModelCost(depth, count_parameters(model), macs, memory, latency)
