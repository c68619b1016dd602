"""Capture, simplify, plan, write, verify, round: the steps of a collapse in their order."""

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, fx, nn

from lightning_easier.activations import isolate_activations, unwrap
from lightning_easier.arguments import check_choice, check_non_negative
from lightning_easier.collapse.capture import capture, duplicate, note_shapes
from lightning_easier.collapse.chains import depth
from lightning_easier.collapse.errors import CaptureError, CollapseError, DifferenceError, Step, StepError
from lightning_easier.collapse.fit_prices import ChainPrices, Choice
from lightning_easier.collapse.fitting import fit_chains
from lightning_easier.collapse.prices import OBJECTIVES, LatencyTable, Objective
from lightning_easier.collapse.reading import uses_batch_statistics
from lightning_easier.collapse.signatures import fixed_arguments, lost_arguments
from lightning_easier.collapse.steps import Steps
from lightning_easier.collapse.verification import (
    check_comparable,
    check_repeatable,
    differences,
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
from lightning_easier.inference import as_arguments, check_weights, copies, forward, model_inputs
from lightning_easier.report import CollapseReport, Fitted, ModelCost, Refusal
from lightning_easier.substitution import Absorbed

_logger = logging.getLogger(__name__)


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
    if mode == "exact" and (sites is not None or calibration is not None):
        raise ValueError("Expected arguments `sites` and `calibration` to be None: they belong to mode='fit'")
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected argument `objective` to be one of {OBJECTIVES}, but got {objective!r}")
    check_non_negative("slack", slack)
    arguments = as_arguments(example_inputs)
    model = unwrap(model)
    check_weights(model)
    batches = [] if mode == "exact" else _batches(calibration, arguments)
    table = LatencyTable() if latencies is None else latencies
    device = arguments[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        source = _source(model, arguments)
        fits = _Fits([], {})
        fitted = source
        if mode == "fit":
            fitted = deepcopy(source)
            fits = _fit(fitted, sites, batches, arguments, ChainPrices(objective, table), slack)
        return _collapse(model, source, fitted, arguments, objective, table, fits)


class _Fits(NamedTuple):
    """What was fitted, and why other sites were not."""

    choices: list[Choice]
    reasons: dict[str, str]


def _source(model: nn.Module, arguments: Sequence[Tensor]) -> nn.Module:
    """Copy a model for eval mode; everything runs on the copy."""
    source = _in_eval_mode(model)
    with torch.no_grad():
        expected = forward(source, copies(arguments), "example_inputs")
        check_comparable(expected, source)
        check_repeatable(model, source, expected, arguments)
    return source


def _batches(calibration: Iterable[Any] | None, arguments: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return the forward's positional arguments for each batch, on the device of the example inputs."""
    if calibration is None:
        raise ValueError("Expected argument `calibration` to hold batches, which mode='fit' fits to, but got None")
    if isinstance(calibration, Tensor):
        raise TypeError(
            "Expected argument `calibration` to be an iterable of batches, but got a tensor, whose samples would be "
            "taken for batches. Pass `[tensor]`."
        )
    batches = [
        tuple(x.to(like.device) for x, like in zip(model_inputs(batch, len(arguments)), arguments, strict=True))
        for batch in calibration
    ]
    if not batches:
        raise ValueError("Expected argument `calibration` to yield at least one batch, but it yielded none")
    return batches


def _fit(
    fitted: nn.Module,
    sites: Sequence[str] | None,
    batches: list[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> _Fits:
    """Replace the chains around activations in place."""
    if sites is None or isinstance(sites, str) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"Expected argument `sites` to be a sequence of names of activations, but got {sites!r}")
    known = isolate_activations(fitted, gates=True)
    for name in sites:
        if name not in known:
            raise ValueError(
                f"Expected argument `sites` to hold names of activations that are not linear, but got {name!r}, not "
                f"one of {list(known)}"
            )
    with torch.no_grad():
        forward(fitted, batches[0], "calibration")
    return _Fits(*fit_chains(fitted, sites, batches, arguments, prices, slack))


def _collapse(
    model: nn.Module,
    source: nn.Module,
    fitted: nn.Module,
    arguments: Sequence[Tensor],
    objective: Objective,
    latencies: LatencyTable,
    fits: _Fits,
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
    before = duplicate(captured)
    left_out: dict[Step, str] = {}
    while True:
        steps = Steps(captured, objective, latencies, left_out)
        try:
            collapsed = _rewritten(steps)
            exactly, rounding = verify_in_float64(fitted, before, collapsed, arguments, expected)
            steps.round()
            difference = verify_rounded(collapsed, arguments, expected, rounding, type(model).__name__)
            break
        except StepError as error:
            left_out[error.step] = str(error)
        except DifferenceError as error:
            blamed = steps.blamed(differences(before, collapsed, arguments, error.exactly))
            if not blamed:  # not a step, or not one alone
                raise
            left_out.update(blamed)
        captured = duplicate(before)  # it was rewritten in place
        note_shapes(captured, copies(arguments))
    if left_out:
        rank_zero_warn(
            f"{len(left_out)} of the steps by which {type(model).__name__} would have become smaller went wrong and "
            f"were left out; the rest was verified. The report's refusals name them; please report it."
        )

    timed = deepcopy(source)
    depth_before = depth(before if fitted is source else capture(deepcopy(source), copies(arguments)))
    arguments = copies(arguments)  # timing may write into them again and again
    with torch.no_grad():
        latency = measure_latency({"before": timed, "after": collapsed}, arguments)
        cost_before = _cost(timed, arguments, depth_before, latency["before"])
        cost_after = _cost(collapsed, arguments, depth(collapsed), latency["after"])
    result: nn.Module = collapsed
    absorbed = any(isinstance(part, Absorbed) for part in fitted.modules())
    if not (steps.changed or absorbed):  # its own forward is as good, and may be faster than what was recorded
        steps.dropped = []
        result, cost_after, difference, exactly = timed, cost_before, 0.0, 0.0
    if objective == "latency" and is_slower(latency["before"], latency["after"]):
        steps.give_up(type(model).__name__)
        fits = _Fits([], {})
        result, cost_after, difference, exactly = timed, cost_before, 0.0, 0.0
    refusals = [*(Refusal((site,), reason) for site, reason in fits.reasons.items()), *steps.refusals]
    report = CollapseReport(
        steps.merges, steps.fused, steps.dropped, refusals, cost_before, cost_after, difference, exactly,
        [_record(choice, objective) for choice in fits.choices],
        fixed_arguments(collapsed) if result is collapsed else {},
        lost_arguments(model, len(arguments)) if result is collapsed else [],
    )  # fmt: skip
    if report.lost_arguments:
        rank_zero_warn(
            f"The collapsed {type(model).__name__} no longer takes the arguments {', '.join(report.lost_arguments)}, "
            f"and computes what it does with their defaults. Make them attributes of the model, or give it those that "
            f"it needs in `example_inputs`."
        )
    for name, module in result.named_modules():
        if uses_batch_statistics(module):  # it has counted the runs above
            module.load_state_dict(model.get_submodule(name).state_dict())
    for node in collapsed.graph.nodes:
        node.meta.clear()  # shapes are those of the example inputs only
    return CollapseResult(result, report)


def _rewritten(steps: Steps) -> fx.GraphModule:
    steps.drop_assertions()
    steps.drop_identities()
    steps.fold_batch_norms()
    steps.drop_stand_ins()
    steps.merge()
    return steps.finish()


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


def _cost(model: nn.Module, arguments: Sequence[Tensor], depth: int, latency: Latency) -> ModelCost:
    macs, memory = (_told(count, model, arguments) for count in (count_macs, measure_activation_memory))
    return ModelCost(depth, count_parameters(model), macs, memory, latency)


def _told(
    count: Callable[[nn.Module, Sequence[Tensor]], int], model: nn.Module, arguments: Sequence[Tensor]
) -> int | None:
    """Count what is only told: a forward may run, and yet fail while its operators are looked at."""
    try:
        return count(model, arguments)
    except Exception as error:
        _logger.debug("%s fails in %s: %s", type(model).__name__, count.__name__, error)
        return None
