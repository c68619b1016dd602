"""Make a trained model shallower and faster without training it: fit, check, keep or take back, in minutes."""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_easier.collapsing.exact.prices import OBJECTIVES, Objective
from lightning_easier.collapsing.fit.fit_prices import SLACK, ChainPrices, PricedFit, choose
from lightning_easier.collapsing.fit.fittable import (
    ACTIVATIONS_IN_A_CHAIN,
    CannotFitError,
    FittableChain,
    FittableChains,
)
from lightning_easier.collapsing.fit.fitting import MOST_FITS, Gathered, fit_to, gather
from lightning_easier.collapsing.fit.placing import put, replace, try_out
from lightning_easier.pruning.rules import Rejections, Tolerance
from lightning_easier.pruning.targets import Look, Target, TargetWatch, check_target
from lightning_easier.report import CompressReport, Trial
from lightning_easier.sites.activations import isolate_activations, match_names, unwrap
from lightning_easier.sites.discovery import KnownForwards
from lightning_easier.support.arguments import as_globs, check_choice, check_non_negative, check_positive
from lightning_easier.support.calibration import inputs_left_out, read_calibration
from lightning_easier.support.inference import (
    arguments_wanted,
    as_arguments,
    check_weights,
    copies,
    describe,
    device_of,
    forward,
    tensors_in,
)
from lightning_easier.support.progress import Stages
from lightning_easier.support.timing import LatencyTable, Pace

# Of its price, an operator in the place of a chain has to save so much more than another.
_WORTH_A_TRIAL = 0.1
# So many tell the order in which chains go.
_SAMPLES_FOR_DRIFT = 256
# What a compression does, and about how much of its time that takes; with a limit, when a stage has to be over.
_PREPARING, _SEARCHING, _TRYING, _TIMING = "Preparing", "Looking for operators", "Trying operators", "Timing the result"
_STAGES = {_PREPARING: 0.1, _SEARCHING: 0.4, _TRYING: 0.3, _TIMING: 0.2}
# Units of the bar in which one chain's operators are timed, beside one for each batch and each fit.
_UNITS_OF_PRICES = 10
# As many timings does any other step take: of prices, and of whole models.
_TIMINGS = 2
# What keeps a network usable where nobody says how good it has to be, see docs/collapse.md.
MAX_DRIFT = 0.1


@dataclass(frozen=True)
class CompressResult:
    """A compressed model and how it came about.

    Attributes:
        model: A new module in eval mode, collapsed.
        fitted: The model as it was given, with the fitted operators in their places and nothing merged: the one to
            train on. It is in eval mode, too; call ``fitted.train()`` before it is fine-tuned.
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
    max_drift: float | None = None,
    max_minutes: float | None = None,
    objective: Objective = "latency",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    max_rejections: int = 3,
    slack: float = SLACK,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
) -> CompressResult:
    """Replace chains around activations by fitted operators, the one that changes least per second saved first.

    Around every activation between two operators, and every two in a row, every kind of operator is fitted (see
    :func:`~lightning_easier.collapse` with ``mode="fit"``) and tried alone: the *drift* is the share of the variance of
    the model's outputs on the calibration batches that changes. In the order of drift per saving, each is fitted again
    to what the model has become, put in place, and the model is evaluated; where the score has fallen by more than the
    tolerance, it is taken back. A chain may go in two steps: a convolution takes its place first, and an affine for
    each channel, which merges with the skip beside it, when that is next. The result is collapsed exactly.

    Args:
        model: Any module; it is not changed.
        batches: Calibration data, such as a few batches of a training loader: a tensor each, or a sequence whose first
            elements are the forward's positional arguments: as many as it can't do without, or as ``example_inputs``
            has. What follows them is taken for labels: with a warning where the forward would take it, too, and with a
            note in the report where it is the last and holds classes. Batches without samples and samples that are not
            finite are left out.
        evaluate: Returns the score of a model, which it gets in eval mode. Without it ``max_drift`` tells what stays.
        tolerance: By how much the score may fall below that of the model as given.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        target_speedup: Stop when the collapsed model is measured to be so many times faster at ``example_inputs`` than
            the dense network with its batch norms folded, both timed in turn.
        target_depth: Stop when it has no more operators than this one behind the other.
        max_drift: How large a share of the variance of the model's outputs on the calibration data all that is replaced
            may change; what goes beyond is taken back. By default 0.1 without ``evaluate``, and no limit with it.
        max_minutes: Stop after so many minutes with what is there then; no limit by default. The first half is for
            the search, what is left up to 80 % for trials, and the rest for the costs in the report. In each, timings
            take fewer samples where time is short, five at least; bounds are wider then, and a note says so. What is
            not cut short: reading ``batches``, each call of ``evaluate`` (one at least), the first run over the data,
            a chain or a trial that has begun, the collapse and its verification.
        objective: What is to be saved: ``"latency"``, ``"macs"`` or ``"depth"``.
        include: Name globs of the activations that may go; all by default.
        exclude: Name globs of those that may not.
        max_rejections: How many in a row may be taken back before it stops.
        slack: Where neither a score nor a target tells where to stop: how much less of the variance of a chain than the
            best operator one may explain to be taken for its price.
        example_inputs: What costs are measured at; the first batch by default.

    Returns:
        The collapsed model, the model to train on, and a report.

    Warns:
        UserWarning: If there is a target and it is not reached, ``max_minutes`` are over before anything is tried,
            something is left out of ``batches``, or they may hold inputs that the forward is not given.

    Raises:
        TypeError: If ``model`` is not a Module, or an argument is of another type.
        ValueError: If an argument has a value out of range, ``batches`` yields none, ``example_inputs`` hold no sample,
            they or the model are on the meta device, or the score is not finite.
        CollapseError: As :func:`~lightning_easier.collapse`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(mlp, [torch.randn(64, 8) for _ in range(4)], objective="macs", max_drift=0.5)
        >>> result.model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    allowed, most = Tolerance(tolerance, mode), Rejections(max_rejections)
    check_non_negative("slack", slack)
    check_choice("objective", objective, OBJECTIVES)
    check_target(target_speedup, target_depth, "target_")
    has_target = target_speedup is not None or target_depth is not None
    target = Target(target_speedup, target_depth) if has_target else None
    for argument, value, check in (
        ("max_drift", max_drift, check_non_negative), ("max_minutes", max_minutes, check_positive),
    ):  # fmt: skip
        if value is not None and value != math.inf:
            check(argument, value)
    clock = _Clock(max_minutes)
    model = unwrap(model)
    check_weights(model)
    source = deepcopy(model).eval()
    sites = match_names(list(isolate_activations(source)), as_globs("include", include), as_globs("exclude", exclude))
    given = None if example_inputs is None else as_arguments(example_inputs)
    count = arguments_wanted(source) if given is None else len(given)
    device = device_of(source)
    if given is not None:
        with torch.no_grad():
            forward(source, copies(given), "example_inputs")
    data = read_calibration("batches", batches, source, count, [device] * count)
    notes = list(data.notes)
    if given is None:
        doubt, decision = inputs_left_out(source, data.first, count)
        if doubt is not None:
            rank_zero_warn(doubt)
        notes += [said for said in (doubt, decision) if said is not None]
    arguments = copies(given or data.batches[0])

    with Stages(_STAGES) as progress:
        progress.begin(_PREPARING, units=_TIMINGS)
        judge = _Judge(source, evaluate, allowed, max_drift, device)
        pace = Pace(clock.left, progress.tell)
        table = LatencyTable(pace=pace)
        is_guided = evaluate is not None or target is not None
        search = _Search(
            source, data.batches, arguments, ChainPrices(objective, table), math.inf if is_guided else slack
        )
        clock.begin(_SEARCHING)
        watch = TargetWatch(source, arguments, objective, table, target)
        look = watch.look_if_due(search.model, search.saved)
        candidates: list[_Candidate] = []
        if look is None or not look.attained.is_reached:  # else by an exact collapse alone
            candidates = search.candidates(sites, clock, progress)
        clock.begin(_TRYING)
        progress.begin(_TRYING, len(candidates), _TIMINGS)
        rejections, ended, is_over = 0, "", False
        for candidate in candidates:
            if most.are_too_many(rejections):
                ended = f"{rejections} in a row were taken back"
                break
            if is_over := clock.is_over():
                ended = f"the time for trials is over, 80 % of the {max_minutes:g} minutes of `max_minutes`"
                break
            progress.name(" + ".join(candidate.choice.chain.operators))
            trial = search.take(candidate)
            if trial is not None:
                trial.score = judge.score(search.model)
                trial.reason = judge.why_not(trial.score, search.drift)
                if trial.reason is not None:
                    search.take_back(trial.reason)
                    rejections += 1
                else:
                    rejections = 0
                    look = watch.look_if_due(search.model, search.saved)
                    if look is not None and (look.attained.is_reached or look.is_impossible):
                        break
            progress.finish()
        else:
            ended = judge.why_nothing_is_left(search.was_cut)
        clock.begin(_TIMING)
        progress.begin(_TIMING, units=_TIMINGS)
        if look is None:  # whatever was estimated: what is returned is measured
            look = watch.look(search.model, search.saved)
        drift = search.drift
    is_too_short = not search.trials and (search.was_cut or is_over)
    if is_too_short and not look.attained.is_reached:
        ended = f"nothing was tried: {search.looked_at} within the {max_minutes:g} minutes of `max_minutes`"
    ended = _why_ended(ended, look) if watch.has_target else ended
    if is_too_short and not look.attained.is_reached:
        rank_zero_warn(f"Compression ended since {ended}. Raise `max_minutes`.")
    elif watch.has_target and not look.attained.is_reached:
        rank_zero_warn(
            f"Compression ended since {ended}. Raise `tolerance` or `max_drift`, or include more activations."
        )
    if pace.was_short:
        notes.append(
            f"`max_minutes` left time for few samples, {len(look.before.latency.samples)} of each model: the bounds of "
            f"speed-ups are wider than without it, and so are those of prices"
        )
    report = CompressReport(
        search.trials, search.reasons, judge.dense_score, look.before, look.dense, look.exact, look.result.report.after,
        drift, look.result.report, ended, notes,
    )  # fmt: skip
    return CompressResult(look.result.model, search.model, report)


def _why_ended(ended: str, look: Look) -> str:
    """Say why a compression with a target has ended, and what it has reached."""
    if look.attained.is_reached:
        return f"the target is reached: {look.attained.words}"
    if look.is_impossible:
        ended = (
            f"of {look.dense.macs:,} multiply-accumulates {look.result.report.after.macs:,} are left, and it is no "
            f"use to go on: the time on this device does not come from them, or something else keeps the machine busy"
        )
    return f"{ended}, and the target is not reached: {look.attained.words}"


class _Clock:
    """Tells how much of the time that a compression may take is left, for the stage that it is in.

    Args:
        minutes: How many it may take; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._begin = monotonic()
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._end = self._seconds

    def begin(self, stage: str) -> None:
        """Begin a stage."""
        shares = list(_STAGES.values())[: list(_STAGES).index(stage) + 1]
        self._end = sum(shares) * self._seconds

    def left(self) -> float:
        """Return how many seconds are left for the stage."""
        return max(0.0, self._begin + self._end - monotonic())

    def is_over(self) -> bool:
        """Tell whether the time for the stage has gone."""
        return self.left() <= 0


class _Judge:
    """Tells whether a model is still good enough.

    Args:
        source: The model as it was given.
        evaluate: Returns its score; None if there is none.
        tolerance: How far the score may fall.
        max_drift: How much of the variance of the outputs may change; None for the default.
        device: Where the model belongs.

    Attributes:
        dense_score: The score of the model as it was given; None if there is none.

    Raises:
        ValueError: If that is not finite.
    """

    def __init__(
        self,
        source: nn.Module,
        evaluate: Callable[[nn.Module], float] | None,
        tolerance: Tolerance,
        max_drift: float | None,
        device: torch.device,
    ) -> None:
        self._evaluate = evaluate
        self._tolerance = tolerance
        self._device = device
        self._max_drift = max_drift if max_drift is not None else math.inf if evaluate is not None else MAX_DRIFT
        self._went_beyond = False
        self.dense_score = self.score(source)
        if self.dense_score is not None and not math.isfinite(self.dense_score):
            raise ValueError(
                f"Expected argument `evaluate` to return a finite score of the model, but got {self.dense_score}"
            )

    def score(self, model: nn.Module) -> float | None:
        """Return the score of a model, None if there is none; the model is in eval mode and in its place afterwards.

        Raises:
            TypeError: If what is returned is no number.
        """
        return None if self._evaluate is None else _score(self._evaluate, model, self._device)

    def why_not(self, score: float | None, drift: float) -> str | None:
        """Say why a model of this score and drift is not good enough; None if it is."""
        if not drift <= self._max_drift:  # of NaN
            self._went_beyond = True
            return (
                f"{drift:.2%} of the variance of the outputs changed, beyond the {self._max_drift:.2%} of `max_drift`"
            )
        if score is None or self.dense_score is None:
            return None
        if self._tolerance.allows(score, self.dense_score):
            return None
        return f"beyond the tolerance {self._tolerance.amount:g} of {self.dense_score:.4f}"

    def why_nothing_is_left(self, was_cut: bool) -> str:
        """Say why nothing is left to try.

        Args:
            was_cut: Whether the time was over before all was looked at.
        """
        ended = "nothing is left to try"
        if was_cut:
            ended += " of what was found in half of the time of `max_minutes`"
        if self._went_beyond:
            ended += f" within the {self._max_drift:.0%} of `max_drift`; pass `evaluate` or a larger one to go on"
        return ended


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module, device: torch.device) -> float:
    """Evaluate a model in eval mode, and have it in that mode and place afterwards.

    Raises:
        TypeError: If what is returned is no number.
    """
    score = evaluate(model.eval())
    model.to(device).eval()
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected argument `evaluate` to return the score, a number, but it returned {describe(score)}"
        ) from error


class _Candidate(NamedTuple):
    """An operator that might take the place of a chain.

    Attributes:
        choice: The operator, as it was fitted to the model that was given.
        drift: Share of the variance of the outputs that changes if it alone is put in place.
    """

    choice: PricedFit
    drift: float

    @property
    def rank(self) -> float:
        """Drift per saving."""
        return self.drift / self.choice.saving

    def follows(self, other: "_Candidate") -> bool:
        """Tell whether it saves more of what another has begun with."""
        return {*other.choice.chain.sites} <= {*self.choice.chain.sites} and self.choice.saving > other.choice.saving

    def rank_behind(self, other: "_Candidate") -> float:
        """Drift per saving, of what it adds to another."""
        return (self.drift - other.drift) / (self.choice.saving - other.choice.saving)


def _hull(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return those for one chain that are worth their drift, each beside the one that saves less: the convex hull."""
    hull: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.choice.saving, -each.drift)):
        while hull and (
            candidate.choice.saving <= hull[-1].choice.saving
            or candidate.rank_behind(hull[-1]) <= (hull[-1].rank_behind(hull[-2]) if hull[1:] else hull[-1].rank)
        ):
            hull.pop()
        begun_with = hull[-1].choice.saving if hull else 0.0
        if candidate.choice.saving - begun_with >= _WORTH_A_TRIAL * candidate.choice.price_before:
            hull.append(candidate)
    return hull


class _Step(NamedTuple):
    """What one trial has changed.

    Attributes:
        trial: The trial.
        saving: Of the price.
        old: What was there before, by name.
        new: What has taken its place, by name.
    """

    trial: Trial
    saving: float
    old: dict[str, nn.Module]
    new: dict[str, nn.Module]


class _Fitted(NamedTuple):
    """What was fitted to a chain, and what that depends on.

    Attributes:
        chain: The chain.
        choices: The operators that save something.
        ran: Which of the modules that may be replaced ran before the chain had ended.
        beside: What had taken the place of those by then, by name.
    """

    chain: FittableChain
    choices: list[PricedFit]
    ran: frozenset[str]
    beside: dict[str, nn.Module]


class _Search:
    """Tries operators in the places of chains.

    Args:
        source: The model as it was given, in eval mode, its activations isolated.
        batches: Calibration data.
        arguments: Example inputs.
        prices: Tells what modules cost.
        slack: How much less of the variance of a chain than the best operator one may explain to be tried.

    Attributes:
        model: What it has become.
        trials: What was tried.
        reasons: Site -> why nothing was tried.
        was_cut: Whether the time was over before all chains were looked at.
        looked_at: How many chains were, in words.
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
        self.trials: list[Trial] = []
        self.reasons: dict[str, str] = {}
        self.was_cut = False
        self.looked_at = ""
        self._batches = batches
        self._arguments = arguments
        self._prices = prices
        self._slack = slack
        self._dense_outputs = self._outputs()
        self._known = KnownForwards()
        self._replaceable: list[str] = []
        self._fitted: dict[tuple[str, ...], _Fitted] = {}
        self._steps: list[_Step] = []  # those that are in place, in the order they were taken
        self._taken_back: list[Trial] = []
        self._undone: list[
            tuple[int, _Step]
        ] = []  # those that the last one has taken the place of, and where they were

    @property
    def saved(self) -> float:
        """What is saved of the price so far."""
        return sum(step.saving for step in self._steps)

    @property
    def drift(self) -> float:
        """Share of the variance of the outputs that all that is in place has changed."""
        return _drift(self._outputs(), self._dense_outputs)

    def candidates(self, sites: Sequence[str], clock: _Clock, progress: Stages) -> list[_Candidate]:
        """Fit operators for every chain alone, and return those that may take its place, the best first."""
        chains = FittableChains(self.model, sites, self._known)
        found: list[_Candidate] = []
        whole = chains.in_windows(ACTIVATIONS_IN_A_CHAIN)
        self._replaceable = sorted({name for chain in whole for name in chain.replaced})
        looked_at = 0
        progress.begin(_SEARCHING, len(whole), len(self._batches) + MOST_FITS + _UNITS_OF_PRICES, _UNITS_OF_PRICES)
        sums = self._gather(whole, progress.advance)
        while looked_at < len(whole) and not clock.is_over():
            chain, gathered = next(sums)
            progress.name(" + ".join(chain.operators))
            found += self._candidates_for(chain, gathered, chains.reasons, progress.advance)
            progress.finish()
            looked_at += 1
        self.was_cut = looked_at < len(whole)
        self.looked_at = f"{looked_at} of {len(whole)} chains around activations were looked at"
        for site in (site for chain in whole[looked_at:] for site in chain.sites):
            chains.reasons.setdefault(site, "the time of `max_minutes` was over before it was looked at")
        tried = {site for each in found for site in each.choice.chain.sites}
        self.reasons = {site: reason for site, reason in chains.reasons.items() if site not in tried}
        of_chain: dict[tuple[str, ...], list[_Candidate]] = {}
        for each in found:
            of_chain.setdefault(each.choice.chain.sites, []).append(each)
        best = [each for candidates in of_chain.values() for each in _hull(candidates)]

        def rank(candidate: _Candidate) -> float:
            return max([candidate.rank, *(candidate.rank_behind(o) for o in best if candidate.follows(o))])

        return sorted(best, key=rank)

    def _candidates_for(
        self, chain: FittableChain, gathered: Gathered | None, reasons: dict[str, str], advance: Callable[[], object]
    ) -> list[_Candidate]:
        """Return what may take the place of one chain; add why nothing may, by site."""
        try:
            choices = self._worthwhile(self._fit_to(chain, gathered, advance))
        except CannotFitError as error:
            if len(chain.sites) == 1:
                reasons[chain.sites[0]] = str(error)
            return []
        found = []
        for choice in choices:
            try:
                outputs = try_out(self.model, choice, self._outputs)
            except CannotFitError as error:  # the forward reads what only an operator of another kind has
                reasons.update(dict.fromkeys(chain.sites, str(error)))
                continue
            found.append(_Candidate(choice, _drift(outputs, self._dense_outputs)))
        return found

    def _worthwhile(self, choices: Sequence[PricedFit]) -> list[PricedFit]:
        """Return what saves something and has no equal that saves more.

        Raises:
            CannotFitError: If nothing does.
        """
        good = [choice for choice in choices if choice.represents_chain(self._slack)]
        if not math.isinf(self._slack) or all(choice.saving <= 0 for choice in good):
            return [choose(good, self._prices, self._slack)]
        return [
            choice
            for choice in good
            if choice.saving > 0
            and not any(o.saving >= choice.saving and o.fit.explained > choice.fit.explained for o in good)
        ]

    def take(self, candidate: _Candidate) -> Trial | None:
        """Put an operator in the place of a chain, fitted to what the model has become; None if none pays any more."""
        chain, wanted = candidate.choice.chain, candidate.choice.fit
        begun = [step for step in self._steps if {*step.trial.sites} & {*chain.sites}]
        if self._was_rejected(candidate) or not all(self._may_follow(candidate, step) for step in begun):
            return None
        self._undone = [(self._steps.index(step), step) for step in begun]
        for step in reversed(begun):
            put(self.model, step.old)
            self._steps.remove(step)
        try:
            # a neighbour may have gone, and one of its ends with it
            chain = FittableChains(self.model, chain.sites, self._known).around(chain.sites)
            choices = [choice for choice in self._fit(chain) if choice.fit.kind == wanted.kind]
            if not choices:
                raise CannotFitError("does not pay any more beside its neighbours")
            choice = next((each for each in choices if str(each.fit.operator) == str(wanted.operator)), choices[0])
            old = replace(self.model, choice, self._arguments)
        except CannotFitError as error:
            self._redo()
            if not begun:
                self.reasons.update(dict.fromkeys(chain.sites, str(error)))
            return None
        trial = Trial(chain.sites, chain.operators, wanted.kind, choice.fit.explained, candidate.drift,
                      choice.price_before, choice.price_after, self._prices.objective)  # fmt: skip
        for step in begun:
            step.trial.kept, step.trial.reason = False, f"{wanted.kind} has taken its place"
        new = {name: self.model.get_submodule(name) for name in old}
        self._steps.append(_Step(trial, choice.saving, old, new))
        self.trials.append(trial)
        for site in chain.sites:
            self.reasons.pop(site, None)
        return trial

    def _was_rejected(self, candidate: _Candidate) -> bool:
        """Tell whether something that changes less of the same was taken back."""
        sites = {*candidate.choice.chain.sites}
        return any({*each.sites} <= sites and each.drift <= candidate.drift for each in self._taken_back)

    def _may_follow(self, candidate: _Candidate, step: _Step) -> bool:
        """Tell whether a candidate saves more than what is in place of a part of its chain and can be undone."""
        is_whole = all(self.model.get_submodule(name) is module for name, module in step.new.items())
        is_part = {*step.trial.sites} <= {*candidate.choice.chain.sites}
        return is_whole and is_part and candidate.choice.saving > step.saving

    def take_back(self, reason: str) -> None:
        """Undo the last trial."""
        step = self._steps.pop()
        put(self.model, step.old)
        step.trial.kept, step.trial.reason = False, reason
        self._taken_back.append(step.trial)
        self._redo()

    def _redo(self) -> None:
        for place, step in self._undone:
            put(self.model, step.new)
            self._steps.insert(place, step)
            step.trial.kept, step.trial.reason = True, None
        self._undone = []

    def _fit(self, chain: FittableChain) -> list[PricedFit]:
        """Return the operators for a chain that save something, those of the last time where nothing before it changed.

        Raises:
            CannotFitError: If there are none.
        """
        known = self._fitted.get(chain.sites)
        if known is None or known.chain != chain or known.beside != self._in_place(known.ran):
            ((_, gathered),) = self._gather([chain])
            self._fit_to(chain, gathered)
        return self._fitted[chain.sites].choices

    def _gather(
        self, chains: Sequence[FittableChain], advance: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[FittableChain, Gathered | None]]:
        return gather(self.model, chains, self._batches, self._arguments, self._replaceable, advance)

    def _fit_to(
        self, chain: FittableChain, gathered: Gathered | None, advance: Callable[[], object] = lambda: None
    ) -> list[PricedFit]:
        choices = fit_to(self.model, chain, gathered, self._prices, advance)
        ran = frozenset() if gathered is None else gathered.ran
        saving = [choice for choice in choices if choice.saving > 0]
        self._fitted[chain.sites] = _Fitted(chain, saving, ran, self._in_place(ran))
        return choices

    def _in_place(self, names: Container[str]) -> dict[str, nn.Module]:
        """Return what has taken the place of modules of these names."""
        return {name: module for step in self._steps for name, module in step.new.items() if name in names}

    def _outputs(self) -> list[Tensor]:
        """Return what the model makes of some of the calibration data: a matrix for each of its outputs."""
        some, samples = [], 0
        for batch in self._batches:
            some.append(batch)
            samples += len(batch[0])
            if samples >= _SAMPLES_FOR_DRIFT:
                break
        with torch.no_grad():
            each = [tensors_in(self.model(*copies(batch))) for batch in some]
        outputs: list[Tensor] = []
        for column in zip(*each, strict=True):
            rows = [x.reshape(len(x), -1) for x in column if x.ndim]
            is_one = len({x.shape[1] for x in rows}) == 1  # else sequences of other lengths
            outputs += [torch.cat(rows)] if is_one else rows
        return outputs


def _drift(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the share of the variance of outputs that has changed, over all of them."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, before, strict=True) if b.is_floating_point()]
    changed = sum(float((a - b).square().sum()) for a, b in pairs)
    variance = sum(float((b - b.mean(0)).square().sum()) for _, b in pairs)
    return changed / variance if variance > 0 else changed
