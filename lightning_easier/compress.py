"""Make a trained model shallower and faster without training it: fit, check, keep or take back, in minutes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier.activations import isolate_activations, match_names, unwrap
from lightning_easier.arguments import as_globs, check_choice, check_integer, check_non_negative
from lightning_easier.collapse import CollapseResult, collapse
from lightning_easier.collapse.fitting import (
    CannotFitError,
    ChainPrices,
    Chains,
    Choice,
    FitChain,
    fit_chain,
    put,
    replace,
)
from lightning_easier.collapse.prices import OBJECTIVES, LatencyTable, Objective
from lightning_easier.costs import measure_latency
from lightning_easier.inference import device_of, forward, model_inputs, tensors_in
from lightning_easier.report import CompressReport, ModelCost, Trial

# A model whose estimated time is so near to the target is collapsed and timed.
_NEARLY = 1.1
# So many tell the order in which chains go.
_SAMPLES_FOR_DRIFT = 512


@dataclass(frozen=True)
class CompressResult:
    """A compressed model and how it came about.

    Attributes:
        model: A new module in eval mode, collapsed.
        fitted: The model as it was given, with the fitted operators in their places and nothing merged, in eval mode:
            the one to train on.
        report: What was tried, kept and taken back, and the cost before and after.
    """

    model: nn.Module
    fitted: nn.Module
    report: CompressReport


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    tolerance: float = 0.01,
    mode: Literal["min", "max"] = "max",
    target_speedup: float | None = None,
    target_depth: int | None = None,
    objective: Objective = "latency",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    max_rejections: int = 3,
    slack: float = 0.02,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
) -> CompressResult:
    """Replace chains around activations by fitted operators, the one that changes least per second saved first.

    For every activation between two operators, the cheapest operator is fitted that represents the chain well (see
    :func:`~lightning_easier.collapse` with ``mode="fit"``), and tried alone: the *drift* is the share of the variance
    of the model's outputs on the calibration batches that changes. In the order of drift per saving, each is fitted
    again to what the model has become, put in place, and the model is evaluated; where the score has fallen by more
    than the tolerance, it is taken back. The result is collapsed exactly.

    Args:
        model: Any module; it is not changed.
        batches: Calibration data, such as a few batches of a training loader: a tensor each, or a sequence whose first
            elements are the forward's positional arguments.
        evaluate: Returns the score of a model, which it gets in eval mode. Without it nothing is taken back.
        tolerance: By how much the score may fall below that of the model as given.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        target_speedup: Stop when the collapsed model is measured to be so many times faster at ``example_inputs``.
        target_depth: Stop when it has no more operators than this one behind the other.
        objective: What is to be saved: ``"latency"``, ``"macs"`` or ``"depth"``.
        include: Name globs of the activations that may go; all by default.
        exclude: Name globs of those that may not.
        max_rejections: How many in a row may be taken back before it stops.
        slack: How much less of the variance than the best operator one may explain to be taken for its price.
        example_inputs: What costs are measured at; the first batch by default.

    Returns:
        The collapsed model, the model to train on, and a report.

    Raises:
        TypeError: If ``model`` is not a Module, or an argument is of another type.
        ValueError: If an argument has a value out of range, or ``batches`` yields none.
        CollapseError: As :func:`~lightning_easier.collapse`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(mlp, [torch.randn(64, 8) for _ in range(4)], objective="macs")
        >>> result.model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    check_non_negative("tolerance", tolerance)
    check_non_negative("slack", slack)
    check_choice("mode", mode, ("min", "max"))
    check_choice("objective", objective, OBJECTIVES)
    check_integer("max_rejections", max_rejections, 1)
    if target_speedup is not None:
        check_non_negative("target_speedup", target_speedup)
    if target_depth is not None:
        check_integer("target_depth", target_depth, 1)
    if isinstance(batches, Tensor):
        raise TypeError("Expected argument `batches` to be an iterable of batches, but got a tensor. Pass `[tensor]`.")
    source = deepcopy(unwrap(model)).eval()
    sites = match_names(list(isolate_activations(source)), as_globs("include", include), as_globs("exclude", exclude))
    taken = list(batches)
    if not taken:
        raise ValueError("Expected argument `batches` to yield at least one batch, but it yielded none")
    count = len(example_inputs) if isinstance(example_inputs, list | tuple) else 1
    device = device_of(source)
    calibration = [tuple(x.to(device) for x in model_inputs(batch, count)) for batch in taken]
    examples = calibration[0] if example_inputs is None else example_inputs
    arguments = (examples,) if isinstance(examples, Tensor) else tuple(examples)
    with torch.no_grad():
        for inputs, name in ((arguments, "example_inputs"), (calibration[0], "batches")):
            forward(source, inputs, name)

    table = LatencyTable()
    search = _Search(source, calibration, arguments, ChainPrices(objective, table), slack)
    goal = _Goal(source, arguments, objective, table, target_speedup, target_depth)
    dense_score = None if evaluate is None else float(evaluate(source))
    rejections = 0
    for candidate in search.candidates(sites):
        if rejections == max_rejections or goal.is_reached(search.model, search.saved):
            break
        trial = search.take(candidate)
        if trial is None or evaluate is None:
            continue
        trial.score = float(evaluate(search.model.eval()))
        fall = (dense_score - trial.score) * (1 if mode == "max" else -1)  # type: ignore[operator]
        if fall <= tolerance:  # not of NaN
            rejections = 0
        else:
            search.take_back(trial, f"beyond the tolerance {tolerance:g} of {dense_score:.4f}")
            rejections += 1
    result = goal.collapsed(search.model)
    report = CompressReport(search.trials, search.reasons, dense_score, *goal.costs(result), result.report)
    return CompressResult(result.model, search.model, report)


class _Candidate(NamedTuple):
    """A chain that might go.

    Attributes:
        chain: The chain.
        drift: Share of the variance of the outputs that changes if it alone goes.
        saving: Of its price.
    """

    chain: FitChain
    drift: float
    saving: float


class _Search:
    """Tries operators in the places of chains.

    Args:
        source: The model as it was given, in eval mode, its activations isolated.
        batches: Calibration data.
        arguments: Example inputs.
        prices: Tells what modules cost.
        slack: As for :func:`compress`.

    Attributes:
        model: What it has become.
        saved: Of its price so far.
        trials: What was tried.
        reasons: Site -> why nothing was tried.
    """

    def __init__(
        self,
        source: nn.Module,
        batches: Sequence[tuple[Tensor, ...]],
        arguments: Sequence[Tensor],
        prices: ChainPrices,
        slack: float,
    ) -> None:
        self.model = deepcopy(source)
        self.saved = 0.0
        self.trials: list[Trial] = []
        self.reasons: dict[str, str] = {}
        self._batches = batches
        self._arguments = arguments
        self._prices = prices
        self._slack = slack
        self._last: tuple[dict[str, nn.Module], float] = {}, 0.0  # what the last trial has replaced, and saved

    def candidates(self, sites: Sequence[str]) -> Iterator[_Candidate]:
        """Fit an operator for every chain alone, and yield those that may go, the best first."""
        chains = Chains(self.model, sites)
        outputs = self._outputs()
        found = []
        for chain in tqdm(chains.one_by_one(), desc="Looking for chains", leave=False, delay=1, disable=None):
            try:
                choice = self._fit(chain)
                old = replace(self.model, choice, self._arguments)
                found.append(_Candidate(chain, _drift(self._outputs(), outputs), _saving(choice)))
                put(self.model, old)
            except CannotFitError as error:
                chains.reasons.update(dict.fromkeys(chain.sites, str(error)))
        self.reasons = chains.reasons
        yield from sorted(found, key=lambda each: each.drift / each.saving)

    def take(self, candidate: _Candidate) -> Trial | None:
        """Put an operator in the place of a chain, fitted to what the model has become; None if none pays any more."""
        chain, taken = candidate.chain, {name for trial in self.trials if trial.kept for name in trial.operators}
        if taken & {*chain.operators}:  # a neighbour has gone, and one operator of this one with it
            chains = Chains(self.model, chain.sites)
            (chain, *_) = chains.one_by_one() or [chain]
            if chains.reasons:
                self.reasons.update(chains.reasons)
                return None
        try:
            choice = self._fit(chain)
            self._last = replace(self.model, choice, self._arguments), _saving(choice)
        except CannotFitError as error:
            self.reasons.update(dict.fromkeys(chain.sites, str(error)))
            return None
        self.saved += _saving(choice)
        trial = Trial(chain.sites, chain.operators, choice.fit.kind, choice.fit.explained, candidate.drift,
                      choice.price_before, choice.price_after, self._prices.objective)  # fmt: skip
        self.trials.append(trial)
        return trial

    def take_back(self, trial: Trial, reason: str) -> None:
        """Undo the last trial."""
        old, saving = self._last
        put(self.model, old)
        self.saved -= saving
        trial.kept, trial.reason = False, reason

    def _fit(self, chain: FitChain) -> Choice:
        return fit_chain(self.model, chain, self._batches, self._arguments, self._prices, self._slack)

    def _outputs(self) -> list[Tensor]:
        """Return what the model makes of some of the calibration data: a matrix for each of its outputs."""
        some, samples = [], 0
        for batch in self._batches:
            some.append(batch)
            samples += len(batch[0])
            if samples >= _SAMPLES_FOR_DRIFT:
                break
        with torch.no_grad():
            each = [tensors_in(self.model(*batch)) for batch in some]
        return [torch.cat([x.flatten(1) for x in column]) for column in zip(*each, strict=True)]


def _saving(choice: Choice) -> float:
    return choice.price_before - choice.price_after


def _drift(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the share of the variance of outputs that has changed, over all of them."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, before, strict=True) if b.is_floating_point()]
    changed = sum(float((a - b).square().sum()) for a, b in pairs)
    variance = sum(float((b - b.mean(0)).square().sum()) for _, b in pairs)
    return changed / variance if variance > 0 else changed


class _Goal:
    """Tells whether a model has become as fast, or as shallow, as it should.

    Args:
        source: The model as it was given.
        arguments: Example inputs.
        objective: As for :func:`compress`.
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
            if self._dense.before.latency.median < _NEARLY * self._speedup * (seconds - saved):
                return False
        result = self.collapsed(model)
        before, after, _ = self.costs(result)
        is_fast = self._speedup is None or before.latency.median >= self._speedup * after.latency.median
        return is_fast and (self._depth is None or after.depth <= self._depth)

    def costs(self, result: CollapseResult) -> tuple[ModelCost, ModelCost, ModelCost]:
        """Return the costs of the model as given, of that collapsed exactly, and of a result, timed interleaved."""
        latency = measure_latency({"before": self._source, "after": result.model}, self._arguments)
        before = dataclasses.replace(self._dense.before, latency=latency["before"])
        return before, dataclasses.replace(result.report.after, latency=latency["after"]), self._dense.after
