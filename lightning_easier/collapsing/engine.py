"""Capture, simplify, plan, write, verify, round: the steps of a collapse in their order."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.operators import uses_batch_statistics
from lightning_easier.collapsing.baseline import Baseline, baseline_of, graph_of
from lightning_easier.collapsing.errors import CaptureError, CollapseError, CollapseStep, DifferenceError, StepError
from lightning_easier.collapsing.exact.capture import capture, duplicate
from lightning_easier.collapsing.exact.chains import depth
from lightning_easier.collapsing.exact.prices import OBJECTIVES, Objective
from lightning_easier.collapsing.exact.signatures import fixed_arguments, lost_arguments
from lightning_easier.collapsing.exact.steps import Steps
from lightning_easier.collapsing.exact.verification import (
    check_comparable,
    check_repeatable,
    differences,
    verify_in_float64,
    verify_rounded,
)
from lightning_easier.collapsing.fit.fit_prices import SLACK, ChainPrices, PricedFit
from lightning_easier.collapsing.fit.replacing import replace_chains
from lightning_easier.report import CollapseReport, Fitted, ModelCost, OperatorTime, Refusal
from lightning_easier.sites.activations import isolate_activations, unwrap
from lightning_easier.structure.norms import split_norms
from lightning_easier.structure.stand_in import BlockStandIn, Bypass, OperatorStandIn
from lightning_easier.structure.substitution import Absorbed
from lightning_easier.support.arguments import check_choice, check_non_negative
from lightning_easier.support.batches import BatchReader, InputsOf, as_arguments
from lightning_easier.support.calibration import read_calibration
from lightning_easier.support.calls import call, copies
from lightning_easier.support.costs import count_macs, count_parameters, count_together, measure_activation_memory
from lightning_easier.support.devices import draws_restored
from lightning_easier.support.inference import check_weights, forward, full_float32, without_masks
from lightning_easier.support.layouts import in_fast_layout
from lightning_easier.support.operators import time_inside
from lightning_easier.support.timing import MARGIN, Latency, LatencyTable, Pace, compare, speed_up

# How many times faster a collapsed model has to be at the least; less is slower.
_NOT_SLOWER = 1 - MARGIN

# What stays of a block that was taken out, where its place is in a forward that is not rewritten.
_LEFT = {
    "identity": "the block is gone, but its place stays, which passes on what it gets: what calls it stays whole",
    "zeros": "the branch is gone, but zeros are added in its place: what calls it stays whole",
}

_logger = logging.getLogger(__name__)
Counts = TypeVar("Counts")

_COLLAPSED = "collapsed_by_lightning_easier"


def is_collapsed(module: nn.Module) -> bool:
    """Tell whether a collapse has made a module; copies, and what was saved whole and loaded, are known."""
    return isinstance(module, fx.GraphModule) and (_COLLAPSED in module.meta or _COLLAPSED in vars(module))


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
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    mode: Literal["exact", "fit"] = "exact",
    objective: Objective = "latency",
    sites: Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
    latencies: LatencyTable | None = None,
    slack: float = SLACK,
    inputs_of: InputsOf | None = None,
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
        example_inputs: A tensor, the tuple of the forward's positional arguments, or a dictionary of arguments by name
            (labels are left out, where the forward can do without), on the model's device. Prices and costs are those
            at this shape.
        mode: ``"exact"``: the same function. ``"fit"``: besides, chains around activations are replaced.
        objective: ``"latency"`` (measured on the inputs' device), ``"macs"`` (between equals, fewer operations), or
            ``"depth"`` (fewer operations). What does not improve it is not done.
        sites: For ``mode="fit"``: names of the activations, as :func:`~lightning_easier.isolate_activations` returns
            them.
        calibration: For ``mode="fit"``: batches, such as a DataLoader's; a tensor each, a sequence whose first elements
            are the arguments that ``example_inputs`` gives, or a dictionary or dataclass with these by name.
        latencies: Times of operators; pass one table to several calls, and what was timed once is not timed again.
        slack: For ``mode="fit"``: how much less of the variance than the best operator one may explain to be taken
            for its price.
        inputs_of: For ``mode="fit"``: returns what ``example_inputs`` are of a batch of ``calibration``, where they are
            found elsewhere.

    Returns:
        The collapsed model, an ordinary module in eval mode, and a report. Its forward takes what the model's does.
        Of an argument that ``example_inputs`` leave out, the default was recorded, and it refuses any other value
        (``AssertionError``); only numbers that no control flow depends on stay free.

    Warns:
        UserWarning: If the forward has arguments that the collapsed one can't take, or a step went wrong and was left
            out.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If ``mode``, ``objective`` or another argument has a value that is not supported, ``example_inputs``
            hold no sample, they or the model are on the meta device, the model does not accept ``example_inputs`` or
            ``calibration``, or its outputs can't be compared.
        CollapseError: If the model can't be captured, or the result differs from it on the example inputs (in
            float64, or after rounding), and that can't be pinned to steps, which are left out then; the message names
            the first operator where it does.

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
    if mode == "exact" and any(each is not None for each in (sites, calibration, inputs_of)):
        raise ValueError(
            "Expected arguments `sites`, `calibration` and `inputs_of` to be None: they belong to mode='fit'"
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected argument `objective` to be one of {OBJECTIVES}, but got {objective!r}")
    check_non_negative("slack", slack)
    model = unwrap(model)
    arguments = as_arguments(example_inputs, model)
    check_weights(model)
    table = LatencyTable() if latencies is None else latencies
    with draws_restored(arguments[0].device):
        source, expected = _source(model, arguments)
        fits = _Fits([], {}, [])
        fitted = source
        if mode == "fit":
            fitted = deepcopy(source)
            reader = BatchReader(fitted, "calibration", inputs_of, arguments)
            fits = _fit(fitted, sites, calibration, reader, arguments, ChainPrices(objective, table), slack)
            with torch.no_grad(), full_float32():
                expected = call(fitted, copies(arguments))
        prepared = Prepared(model, source, fitted, expected, arguments, objective, table, fits)
        result = prepared.settle(compare(prepared.models, copies(arguments), prepared.bars.items(), table.pace))
        warn_of_lost_arguments(model, result.report)
        return with_operators(result, prepared.baseline.model, arguments, table.pace)


def prepare(
    model: nn.Module,
    arguments: Sequence[Tensor],
    objective: Objective,
    table: LatencyTable,
    baseline: Baseline | None = None,
) -> "Prepared":
    """Collapse a model exactly, but for what its times as a whole decide: those are the caller's to take.

    Args:
        model: The model; it is not changed.
        arguments: Example inputs.
        objective: What is to be least.
        table: Times that were measured already.
        baseline: The dense network to compare the result with; that of the model by default.

    Raises:
        CollapseError: As :func:`collapse`.
    """
    with draws_restored(arguments[0].device):
        source, expected = _source(model, arguments)
        return Prepared(model, source, source, expected, arguments, objective, table, _Fits([], {}, []), baseline)


def warn_of_lost_arguments(model: nn.Module, report: CollapseReport) -> None:
    """Warn if a collapsed model no longer takes what the model does; once, of what is returned to a user."""
    if report.lost_arguments:
        rank_zero_warn(
            f"The collapsed {type(model).__name__} no longer takes the arguments {', '.join(report.lost_arguments)}, "
            f"and computes what it does without them. Make them attributes of the model, or give it those that it "
            f"needs in `example_inputs`."
        )


def with_operators(
    result: CollapseResult, dense: nn.Module, arguments: Sequence[Tensor], pace: Pace | None
) -> CollapseResult:
    """Tell in a report where the time goes; it decides nothing, and a forward may fail while it is looked at.

    Args:
        result: The collapsed model, and its report.
        dense: What it is compared with.
        arguments: Example inputs.
        pace: How long it may take; about a second by default.
    """
    left = Pace().left if pace is None else pace.left
    counting = [module for module in result.model.modules() if uses_batch_statistics(module)]
    counted = [deepcopy(module.state_dict()) for module in counting]  # runs that are timed are no training
    try:
        with draws_restored(arguments[0].device):
            times = time_inside({"before": dense, "after": result.model}, arguments, left)
    except Exception as error:
        _logger.debug("%s fails while its operators are timed: %s", type(result.model).__name__, error)
        return result
    finally:
        for module, state in zip(counting, counted, strict=True):
            module.load_state_dict(state)
    report = replace(result.report, operators=OperatorTime.beside(times["before"], times["after"]))
    return CollapseResult(result.model, report)


class _Fits(NamedTuple):
    """What was fitted, why other sites were not, and what was left out of the calibration data."""

    choices: list[PricedFit]
    reasons: dict[str, str]
    notes: list[str]


def _source(model: nn.Module, arguments: Sequence[Tensor]) -> tuple[nn.Module, Any]:
    """Copy a model for eval mode, on which everything runs; return what it computes, too."""
    source = _in_eval_mode(model)
    with torch.no_grad(), full_float32():
        expected = forward(source, copies(arguments), "example_inputs")
        check_comparable(expected, source)
        check_repeatable(model, source, expected, arguments)
    return source, expected


def _fit(
    fitted: nn.Module,
    sites: Sequence[str] | None,
    calibration: Iterable[Any] | None,
    reader: BatchReader,
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> _Fits:
    """Replace the chains around activations in place."""
    if calibration is None:
        raise ValueError("Expected argument `calibration` to hold batches, which mode='fit' fits to, but got None")
    if sites is None or isinstance(sites, str) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"Expected argument `sites` to be a sequence of names of activations, but got {sites!r}")
    split_norms(fitted)
    known = isolate_activations(fitted, gates=True)
    for name in sites:
        if name not in known:
            raise ValueError(
                f"Expected argument `sites` to hold names of activations that are not linear, but got {name!r}, not "
                f"one of {list(known)}"
            )
    data = read_calibration(reader, calibration, fitted)
    batches = in_fast_layout(fitted, data.batches)
    return _Fits(*replace_chains(fitted, sites, batches, arguments, prices, slack), data.notes)


class Prepared:
    """A collapse of which all is done but what the times of whole models decide.

    Args:
        model: The model as it was given, its arguments checked.
        source: A copy of it in eval mode.
        fitted: What is collapsed exactly: the same, or a copy with fitted operators.
        expected: What that returns of the example inputs, computed in full float32.
        arguments: Example inputs.
        objective: What is to be least.
        latencies: Times that were measured already.
        fits: What was fitted.
        baseline: The dense network to compare the result with; that of the model by default.

    Attributes:
        baseline: That network.
        models: What is to be timed in turn, by name: ``"before"``, ``"dense"``, ``"after"``, and what ``"after"`` would
            be without merges. What is the same has two names: it need be timed only once.
        bars: Names of two of them -> how many times faster the second has to be for :meth:`settle` to be content.

    Raises:
        CollapseError: As :func:`collapse`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: nn.Module,
        fitted: nn.Module,
        expected: Any,
        arguments: Sequence[Tensor],
        objective: Objective,
        latencies: LatencyTable,
        fits: _Fits,
        baseline: Baseline | None = None,
    ) -> None:
        self._model, self._arguments, self._expected = model, arguments, expected
        self._objective: Objective = objective
        self._fits = fits
        try:
            captured = capture(fitted, copies(arguments))
        except CaptureError as error:
            raise CollapseError(
                f"The data flow of {type(model).__name__} can't be captured: {error}. Collapse the part of the model "
                f"that torch.fx or torch.export can trace."
            ) from error
        before = duplicate(captured)
        self._done = _rewrite(captured, before, fitted, arguments, expected, objective, latencies, type(model).__name__)
        steps, collapsed, unmerged = self._done.steps, self._done.collapsed, self._done.unmerged
        graph = before if fitted is source else graph_of(source, arguments)
        gone = [name for name, part in fitted.named_modules() if isinstance(part, (BlockStandIn, Bypass))]
        self._blocks = [name for name in gone if not isinstance(fitted.get_submodule(name), OperatorStandIn)]
        absorbed = any(isinstance(part, Absorbed) for part in fitted.modules())
        # else its own forward is as good, and may be faster than what was recorded
        self._is_changed = bool(steps.changed or absorbed or gone)
        self._depth = depth(graph)
        timed = deepcopy(source)
        self.baseline = baseline_of(source, arguments, graph) if baseline is None else baseline
        if baseline is None and self.baseline.is_as_given:
            self.baseline = replace(self.baseline, model=timed)
        self.models: dict[str, nn.Module] = {
            "before": timed, "dense": self.baseline.model, "after": collapsed if self._is_changed else timed,
        }  # fmt: skip
        self.bars: dict[tuple[str, str], float] = {}
        self._without_merges: float | None = None  # how far it is off then
        if self._is_changed and unmerged is not None:
            self.bars["before", "after"] = _NOT_SLOWER
            if steps.merges:
                self._without_merges, _ = verify_in_float64(fitted, before, unmerged, arguments, expected)
                steps.round(unmerged)
                self.models["unmerged"], self.bars["unmerged", "after"] = unmerged, _NOT_SLOWER
        self._result: CollapseResult | None = None

    @property
    def has_less(self) -> bool:
        """Whether something has become one operator, unless it turned out to be slower, or dead channels are gone."""
        return bool(self._done.steps.merges or self._done.steps.trimmed)

    @property
    def depth(self) -> int:
        """Longest chain of weight-carrying operators of ``"after"``."""
        after = self.models["after"]
        return depth(after) if isinstance(after, fx.GraphModule) else self._depth

    def settle(self, latency: Mapping[str, Latency]) -> CollapseResult:
        """Return the result, by times that were taken in turn; what was decided once stays so.

        Args:
            latency: The time of each of :attr:`models`.
        """
        if self._result is None:
            chosen, difference, exactly = self._chosen(latency)
            self._result = self._as_result(chosen, latency, difference, exactly)
            latency = {**latency, "after": latency[chosen]}
            self.bars, self.models = {}, {
                "before": self.models["before"], "dense": self.models["dense"], "after": self._result.model,
            }  # fmt: skip
        result, report = self._result.model, self._result.report
        for name, module in result.named_modules():
            if uses_batch_statistics(module):  # it has counted the runs that were timed
                module.load_state_dict(self._model.get_submodule(name).state_dict())
        report = replace(
            report,
            before=replace(report.before, latency=latency["before"]),
            dense=replace(report.dense, latency=latency["dense"]),
            after=replace(report.after, latency=latency["after"]),
        )
        self._result = CollapseResult(result, report)
        return self._result

    def _chosen(self, latency: Mapping[str, Latency]) -> tuple[str, float, float | None]:
        """Return which of the models is the result, and how far it is off, relative: rounded, and in float64."""
        if not self._is_changed:
            self._done.steps.dropped = []
            return "before", 0.0, 0.0
        steps, name = self._done.steps, type(self._model).__name__
        slower = {first for first, _ in self.bars if speed_up(latency[first], latency["after"]).is_below(_NOT_SLOWER)}
        chosen, difference, exactly = "after", self._done.difference, self._done.exactly
        if "unmerged" in slower:
            steps.give_up_merges()
            chosen, exactly = "unmerged", self._without_merges
            unmerged = self.models["unmerged"]
            difference = verify_rounded(unmerged, self._arguments, self._expected, self._done.rounding, name)
        if "before" in slower and speed_up(latency["before"], latency[chosen]).is_below(_NOT_SLOWER):
            steps.give_up(name)
            self._fits = _Fits([], {}, [])
            return "before", 0.0, 0.0
        return chosen, difference, exactly

    def _as_result(
        self, chosen: str, latency: Mapping[str, Latency], difference: float, exactly: float | None
    ) -> CollapseResult:
        result, steps, fits = self.models[chosen], self._done.steps, self._fits
        left = _leave_for_good(result)
        models = {"before": self.models["before"], "dense": self.models["dense"], "after": result}
        depths = {"before": self._depth, "dense": self.baseline.depth}
        depths["after"] = self._depth if chosen == "before" else depth(result)  # type: ignore[arg-type]
        known: dict[int, ModelCost] = {}
        cost = {}
        with torch.no_grad(), draws_restored(self._arguments[0].device):
            for name, each in models.items():
                known[id(each)] = known.get(id(each)) or cost_of(
                    each, copies(self._arguments), depths[name], latency[chosen if name == "after" else name]
                )
                cost[name] = replace(known[id(each)], depth=depths[name])
        refusals = [*(Refusal((site,), reason) for site, reason in fits.reasons.items()), *steps.refusals]
        refusals += [Refusal((name,), _LEFT[leaves]) for name, leaves in left.items()]
        report = CollapseReport(
            steps.merges, steps.fused, steps.dropped, refusals, cost["before"], cost["dense"], cost["after"],
            difference, exactly, [_record(choice, self._objective) for choice in fits.choices], fits.notes,
            fixed_arguments(result) if isinstance(result, fx.GraphModule) else {},
            lost_arguments(self._model, self._arguments) if isinstance(result, fx.GraphModule) else [],
            steps.trimmed, self._blocks,
        )  # fmt: skip
        if isinstance(result, fx.GraphModule):
            result.meta[_COLLAPSED] = True  # which a copy takes with it
            vars(result)[_COLLAPSED] = True  # as a pickle does
            for node in result.graph.nodes:
                node.meta.clear()  # shapes are those of the example inputs only
        return CollapseResult(result, report)


class _Rewriting(NamedTuple):
    """A graph that was rewritten, and verified.

    Attributes:
        steps: What was done.
        collapsed: The graph.
        unmerged: The same without its merges, where times decide; its new operators are in float64 still.
        difference: Of its output from the source's, relative.
        exactly: The same in float64; None for a model that does not run in it.
        rounding: Relative difference that the source's own rounding makes.
    """

    steps: Steps
    collapsed: fx.GraphModule
    unmerged: fx.GraphModule | None
    difference: float
    exactly: float | None
    rounding: float


def _rewrite(
    captured: fx.GraphModule,
    before: fx.GraphModule,
    source: nn.Module,
    arguments: Sequence[Tensor],
    expected: Any,
    objective: Objective,
    latencies: LatencyTable,
    name: str,
) -> _Rewriting:
    """Rewrite a graph step by step, and verify it; steps that turn out to be wrong are left out, and it begins anew.

    Args:
        captured: The graph.
        before: A copy of it.
        source: What it was captured from.
        arguments: Example inputs.
        expected: What the source returns.
        objective: What is to be least.
        latencies: Times that were measured already.
        name: What to call the model.

    Raises:
        CollapseError: If the result is not the same function, and no step is to blame.
    """
    left_out: dict[CollapseStep, str] = {}
    while True:
        steps = Steps(captured, objective, latencies, left_out)
        try:
            steps.simplify()
            steps.drop_stand_ins()
            steps.drop_zeros()
            steps.trim()
            unmerged = steps.snapshot() if objective == "latency" else None  # work decides without whole models
            steps.merge()
            collapsed = steps.finish()
            exactly, rounding = verify_in_float64(source, before, collapsed, arguments, expected)
            steps.round()
            difference = verify_rounded(collapsed, arguments, expected, rounding, name)
            break
        except StepError as error:
            left_out[error.step] = str(error)
        except DifferenceError as error:
            blamed = steps.blamed(differences(before, collapsed, arguments, error.exactly))
            if not blamed:  # not a step, or not one alone
                raise
            left_out.update(blamed)
        captured = duplicate(before)  # it was rewritten in place
    if left_out:
        rank_zero_warn(
            f"{len(left_out)} of the steps by which {name} would have become smaller went wrong and were left out; the "
            f"rest was verified. The report's refusals name them; please report it."
        )
    return _Rewriting(steps, collapsed, unmerged, difference, exactly, rounding)


def _record(choice: PricedFit, objective: Objective) -> Fitted:
    chain, fit = choice.place, choice.fit
    return Fitted(
        chain.sites, chain.operators, fit.kind, fit.explained, choice.price_before, choice.price_after, objective
    )


def _leave_for_good(model: nn.Module) -> dict[str, str]:
    """Drop the blocks that stand-ins keep, and their marks, in place; return name -> what is left, for each."""
    for name, part in [*model.named_modules()]:
        if isinstance(part, BlockStandIn):
            model.set_submodule(name, part.for_good())
    return {name: part.leaves for name, part in model.named_modules() if isinstance(part, Bypass)}


def _in_eval_mode(model: nn.Module) -> nn.Module:
    """Copy a model for eval mode; batch norms that were left in training mode in a model in eval mode stay in it."""
    source = without_masks(model)
    kept = [module for module in source.modules() if uses_batch_statistics(module) and not model.training]
    source.eval()
    for module in kept:
        module.train()
    return source


def cost_of(model: nn.Module, arguments: Sequence[Tensor], depth: int, latency: Latency) -> ModelCost:
    """Count what a model costs, beside the time that was measured."""
    macs, memory = counted(count_together, model, arguments) or (
        counted(count_macs, model, arguments), counted(measure_activation_memory, model, arguments)
    )  # fmt: skip
    return ModelCost(depth, count_parameters(model), macs, memory, latency)


def counted(
    count: Callable[[nn.Module, Sequence[Tensor]], Counts], model: nn.Module, arguments: Sequence[Tensor]
) -> Counts | None:
    """Count what is only told: a forward may run, and yet fail while its operators are looked at."""
    try:
        return count(model, arguments)
    except Exception as error:
        _logger.debug("%s fails in %s: %s", type(model).__name__, count.__name__, error)
        return None
