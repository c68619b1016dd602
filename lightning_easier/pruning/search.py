"""The search of a compression: which operators might go where, in chains and blocks, and one trial after the other."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property, partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_easier.collapsing.algebra.least_squares import Fit
from lightning_easier.collapsing.fit.correcting import RunUpTo, beginnings_of, gather_alone
from lightning_easier.collapsing.fit.drift import as_matrices, change_of, drift_of, outputs_of, samples_that_tell
from lightning_easier.collapsing.fit.enough import enough_to_fit, first_batches
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, choose
from lightning_easier.collapsing.fit.fittable import (
    ACTIVATIONS_IN_A_CHAIN,
    CannotFitError,
    FittableChain,
    FittableChains,
    Place,
)
from lightning_easier.collapsing.fit.fittable_blocks import FittableBlock
from lightning_easier.collapsing.fit.fitting import MOST_FITS, Gathered, fit_to, gather
from lightning_easier.collapsing.fit.narrowing import NarrowableChain, NarrowFit, narrowable
from lightning_easier.collapsing.fit.norms import MatchedNorms
from lightning_easier.collapsing.fit.placing import put, replace, try_out
from lightning_easier.pruning.stages import SEARCHING, Clock
from lightning_easier.report import Trial
from lightning_easier.sites.discovery import KnownForwards
from lightning_easier.support.beginnings import Beginnings
from lightning_easier.support.calls import Arguments, call, copies, layout_of, names_of
from lightning_easier.support.finite import is_finite
from lightning_easier.support.progress import Stages

# Of its price, an operator in the place of a chain has to save so much more than another.
_WORTH_A_TRIAL = 0.1
# So many are put in their places on trial at most before one is taken.
_MEASURED_ANEW = 6
# Units of the bar in which one chain's operators are timed, beside one for each batch and each fit.
_UNITS_OF_PRICES = 10


class FittedCandidate(NamedTuple):
    """An operator that might take the place of a chain, or of a block.

    Attributes:
        choice: The operator, as it was fitted to the model that was given.
        drift: Share of the variance of the outputs that changes if it alone is put in place.
        change: What of the outputs changes then, as a vector.
    """

    choice: PricedFit
    drift: float
    change: Tensor

    @property
    def rank(self) -> float:
        """Drift per saving."""
        return self.drift / self.choice.worth

    def follows(self, other: "FittedCandidate") -> bool:
        """Tell whether it saves more of what another has begun with."""
        return self.choice.place.holds(other.choice.place) and self.choice.worth > other.choice.worth

    def rank_after(self, other: "FittedCandidate") -> float:
        """Drift per saving, of what it adds to another."""
        return (self.drift - other.drift) / (self.choice.worth - other.choice.worth)


def hull(candidates: Sequence[FittedCandidate]) -> list[FittedCandidate]:
    """Return those for one chain that are worth their drift, each beside the one that saves less: the convex hull."""
    hull: list[FittedCandidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.choice.worth, -each.drift)):
        while hull and (
            candidate.choice.worth <= hull[-1].choice.worth
            or candidate.rank_after(hull[-1]) <= (hull[-1].rank_after(hull[-2]) if hull[1:] else hull[-1].rank)
        ):
            hull.pop()
        begun_with = hull[-1].choice.worth if hull else 0.0
        if candidate.choice.worth - begun_with >= _WORTH_A_TRIAL * candidate.choice.price_before:
            hull.append(candidate)
    return hull


class Taken(NamedTuple):
    """What one trial has changed.

    Attributes:
        trial: The trial.
        place: What the operator has taken the place of.
        fit: The operator.
        saving: Of the price.
        worth: What it was ranked by, as in :class:`PricedFit`.
        change: As in :class:`FittedCandidate`.
        old: What was there before, by name.
        new: What has taken its place, by name.
    """

    trial: Trial
    place: Place
    fit: Fit
    saving: float
    worth: float
    change: Tensor
    old: dict[str, nn.Module]
    new: dict[str, nn.Module]


class _Anew(NamedTuple):
    """What a candidate changes beside what is in place.

    Attributes:
        beside: The steps that were in place, in the order they were taken, by the identity of their trials.
        instead: Those of them that it would take the place of.
        change: What of the outputs changes; None if they are not finite, or the model does not run with it.
    """

    beside: tuple[int, ...]
    instead: tuple[int, ...]
    change: Tensor | None


class FittedPlace(NamedTuple):
    """What was fitted to a chain or a block, and what that depends on.

    Attributes:
        place: The chain, or the block.
        choices: The operators that save something.
        ran: Which of the modules that may be replaced ran before the place had ended.
        beside: What had taken the place of those by then, by name.
    """

    place: Place
    choices: list[PricedFit]
    ran: frozenset[str]
    beside: dict[str, nn.Module]


def _is_covered(model: nn.Module, block: FittableBlock, chains: Sequence[FittableChain]) -> bool:
    """Tell whether a block is a chain, its skip and an activation after both.

    What takes the place of the chain keeps the activation, and costs hardly more than one operator in the place of all:
    without the activation, that comes as near on its own, and what follows has less to work with when it is trained.
    """
    if block.ends_in is None:
        return False
    weighty = {name for name in block.parts if any(True for _ in model.get_submodule(name).parameters(recurse=False))}
    return any(weighty - {block.ends_in} <= chain.parts < block.parts for chain in chains)


def _identities(steps: Sequence[Taken]) -> tuple[int, ...]:
    """Return what tells steps apart, for good: their trials are kept."""
    return tuple(id(step.trial) for step in steps)


class Search:
    """Tries operators in the places of chains.

    Args:
        source: The model as it was given, in eval mode, its activations isolated.
        batches: Calibration data.
        arguments: Example inputs.
        prices: Tells what modules cost.
        slack: How much less of the variance of a chain than the best operator one may explain to be tried.
        narrows: Whether chains may lose inner channels.
        work: Of the model for each sample, see :func:`~lightning_easier.pruning.work.work_of_a_sample`.

    Attributes:
        model: What it has become.
        trials: What was tried.
        reasons: Site -> why nothing was tried.
        was_cut: Whether the time was over before all chains were looked at.
        looked_at: How many chains were, in words.
        some_batches: Of the calibration data, as much as is run through the model where each value is known then.
    """

    def __init__(
        self,
        source: nn.Module,
        batches: Sequence[tuple[Tensor, ...]],
        arguments: Sequence[Tensor],
        prices: ChainPrices,
        slack: float,
        narrows: bool = False,
        work: float | None = None,
    ) -> None:
        self.model = deepcopy(source)
        self._source = source
        self.trials: list[Trial] = []
        self.reasons: dict[str, str] = {}
        self.was_cut = False
        self.looked_at = ""
        self._batches = batches
        self._work = work
        self.some_batches = first_batches(batches, enough_to_fit(work))
        self._telling = samples_that_tell(source, batches, work)
        self._arguments = Arguments(arguments, names_of(arguments), layout_of(batches[0]))  # they run as the batches do
        self._prices = prices
        self._by_depth = prices.objective == "depth"
        self._slack = slack
        self._narrows = narrows
        self._dense_outputs = self._outputs()
        self._norms = MatchedNorms(self.model, source, self._telling)
        self._known = KnownForwards()
        self._replaceable: list[str] = []
        self._fitted: dict[tuple[str, ...], FittedPlace] = {}
        self._only_what_they_leave: set[tuple[str, ...]] = set()  # keys of blocks that no operator takes the place of
        self._steps: list[Taken] = []  # those that are in place, in the order they were taken
        self._taken_back: list[Taken] = []
        self._seen = self._dense_outputs  # what the model has returned when it was looked at last
        self._anew: dict[int, _Anew] = {}  # by the identity of the candidate
        self._undone: list[
            tuple[int, Taken]
        ] = []  # those that the last one has taken the place of, and where they were

    @cached_property
    def dense(self) -> Beginnings:
        """The model as it was given, and what its modules return; kept until :meth:`forget_dense`."""
        return beginnings_of(self._source, self._batches, self._work)

    def forget_dense(self) -> None:
        """Keep no longer what the modules of the model as it was given return: hundreds of megabytes."""
        vars(self).pop("dense", None)

    @property
    def saved(self) -> float:
        """What is saved of the price so far."""
        return sum(step.saving for step in self._steps)

    @property
    def kept_channels(self) -> dict[str, Tensor]:
        """Name of what lies in a narrower chain -> which of its channels are left."""
        narrower = ((step.place, step.fit) for step in self._steps)
        return {
            name: fit.channels
            for place, fit in narrower
            if isinstance(place, NarrowableChain) and isinstance(fit, NarrowFit)
            for name in place.between
        }

    @property
    def drift(self) -> float:
        """Share of the variance of the outputs that all that is in place has changed."""
        self._seen = self._outputs()
        return self.drift_seen

    @property
    def drift_seen(self) -> float:
        """The same as it was when a step was taken or undone last: what is trained or refitted since is not in it."""
        return drift_of(self._seen, self._dense_outputs)

    def candidates(
        self, sites: Sequence[str], blocks: Sequence[FittableBlock], clock: Clock, progress: Stages
    ) -> list[FittedCandidate]:
        """Fit operators for every chain and block alone, and return those that may take its place, the best first."""
        chains = FittableChains(self.model, sites, self._known, self._by_depth)
        found: list[FittedCandidate] = []
        windows = chains.in_windows(ACTIVATIONS_IN_A_CHAIN)
        whole = self._in_order([*windows, *self._narrowable(windows), *blocks])
        self._only_what_they_leave = {block.key for block in blocks if _is_covered(self.model, block, windows)}
        self._replaceable = sorted({name for place in whole for name in place.replaced})
        looked_at = 0
        progress.begin(SEARCHING, len(whole), len(self._batches) + MOST_FITS + _UNITS_OF_PRICES, _UNITS_OF_PRICES)
        sums = self._gather(whole, progress.advance)
        beginnings = Beginnings(self.model, self._telling)
        while looked_at < len(whole) and not clock.is_over():
            place, gathered = next(sums)
            progress.name(" + ".join(place.operators))
            found += self._candidates_for(place, gathered, beginnings, chains.reasons, progress.advance)
            progress.finish()
            looked_at += 1
        self.was_cut = looked_at < len(whole)
        what = "chains around activations and blocks" if blocks else "chains around activations"
        done, of_all = (sum(bool(place.told) for place in places) for places in (whole[:looked_at], whole))
        self.looked_at = f"{done} of {of_all} {what} were looked at"
        for site in (site for place in whole[looked_at:] for site in place.told):
            chains.reasons.setdefault(site, "the time of `max_minutes` was over before it was looked at")
        tried = {name for each in found for name in (*each.choice.place.sites, *each.choice.place.told)}
        self.reasons = {site: reason for site, reason in chains.reasons.items() if site not in tried}
        of_place: dict[tuple[str, ...], list[FittedCandidate]] = {}
        for each in found:
            of_place.setdefault(each.choice.place.ladder, []).append(each)
        best = [each for candidates in of_place.values() for each in hull(candidates)]

        def rank(candidate: FittedCandidate) -> float:
            return max([candidate.rank, *(candidate.rank_after(o) for o in best if candidate.follows(o))])

        return sorted(best, key=rank)

    def _narrowable(self, chains: Sequence[FittableChain]) -> list[NarrowableChain]:
        """Return the chains whose inner channels may become fewer."""
        if not self._narrows:
            return []
        return [found for chain in chains if (found := narrowable(self.model, chain)) is not None]

    def _in_order(self, places: Sequence[Place]) -> list[Place]:
        """Return chains and blocks in the order of where they end, a block right after what is in it.

        Where the time is over before all are looked at, some of each sort were.
        """
        numbers = {name: number for number, (name, _) in enumerate(self.model.named_modules(remove_duplicate=False))}

        def end(place: Place) -> int:  # isolated activations come last in their module, wherever they are called
            return max(numbers[name] for name in place.parts if name not in place.sites)

        return sorted(places, key=lambda place: (end(place), len(place.parts)))

    def _candidates_for(
        self,
        place: Place,
        gathered: Gathered | None,
        beginnings: Beginnings,
        reasons: dict[str, str],
        advance: Callable[[], object],
    ) -> list[FittedCandidate]:
        """Return what may go into one place; add why nothing may, by site."""
        try:
            choices = self._fit_to(place, gathered, advance)
            if isinstance(place, FittableBlock) and place.key in self._only_what_they_leave:
                choices = [choice for choice in choices if choice.fit.kind == place.leaves]
            choices = self._worthwhile(choices)
        except CannotFitError as error:
            if len(place.told) == 1:
                reasons[place.told[0]] = str(error)
            return []
        found = []
        run = beginnings.running_from(place.parts)
        for choice in choices:
            try:
                outputs = as_matrices(try_out(self.model, choice, partial(self._norms.run, run)))
            except CannotFitError as error:  # the forward reads what only an operator of another kind has
                reasons.update(dict.fromkeys(place.told, str(error)))
                continue
            drift = drift_of(outputs, self._dense_outputs)
            if math.isfinite(drift):
                found.append(FittedCandidate(choice, drift, change_of(outputs, self._dense_outputs)))
            else:
                reasons.update(dict.fromkeys(place.told, f"the model's outputs are not finite with {choice.fit.kind}"))
        return found

    def _worthwhile(self, choices: Sequence[PricedFit]) -> list[PricedFit]:
        """Return what saves something and has no equal that saves more.

        Raises:
            CannotFitError: If nothing does.
        """
        good = [choice for choice in choices if choice.represents_chain(self._slack)]
        if not math.isinf(self._slack) or all(choice.saving <= 0 for choice in good):
            return [choose(choices, self._prices, self._slack)]
        return [
            choice
            for choice in good
            if choice.saving > 0
            and not any(o.worth >= choice.worth and o.fit.explained > choice.fit.explained for o in good)
        ]

    def next_of(
        self, candidates: Sequence[FittedCandidate], is_over: Callable[[], bool] = lambda: False
    ) -> FittedCandidate:
        """Return the candidate that adds least to what has changed, per second it saves besides.

        To first order, changes of the outputs add up: one that goes against what is in place already adds little. But
        of blocks in a row each can be done without, and not all of them: together they change far more. So what
        comes first is measured anew, in the model as it is, until what comes first was measured so. What others add
        was less when they were measured last, as a rule, so that few are (lazy evaluation: Minoux, 1978, there for
        gains that fall).

        Args:
            candidates: What is left.
            is_over: Tells whether the time is over: then nothing more is measured.
        """
        now = change_of(self._seen, self._dense_outputs)
        ranks = {id(candidate): self._rank(candidate, now) for candidate in candidates}
        for _ in range(_MEASURED_ANEW):
            first = min(candidates, key=lambda each: ranks[id(each)])
            if self._is_known(first) or is_over() or not self._measure_anew(first):
                return first
            ranks[id(first)] = self._rank(first, now)
        known = [each for each in candidates if self._is_known(each)]
        return min(known, key=lambda each: ranks[id(each)])

    def _rank(self, candidate: FittedCandidate, now: Tensor) -> float:
        """Return what a candidate adds to what has changed by now, per second that it saves besides."""
        begun = self._begun(candidate.choice.place)
        worth = candidate.choice.worth - sum(each.worth for each in begun)
        anew = self._anew.get(id(candidate))
        if anew is not None and anew.instead == _identities(begun):
            step = anew.change
        else:
            step = sum((-each.change for each in begun), candidate.change)
        return float((2 * now + step) @ step) / worth if worth > 0 and step is not None else math.inf

    def _begun(self, place: Place) -> list[Taken]:
        """Return the steps that are in place of parts of a place."""
        return [step for step in self._steps if place.meets(step.place)]

    def _is_known(self, candidate: FittedCandidate) -> bool:
        """Tell whether it was measured what a candidate changes in the model as it is."""
        beside = _identities(self._steps)
        return (not beside) if (anew := self._anew.get(id(candidate))) is None else anew.beside == beside

    def _measure_anew(self, candidate: FittedCandidate) -> bool:
        """Measure what a candidate changes beside what is in place; return whether that can be told.

        It is tried as it was fitted to the model as given. What would be refused is not tried, nor what shares an
        operator with a step: a chain beside it, or one of which less has gone. In the place of a block it does not
        matter what has become of its parts.
        """
        place = candidate.choice.place
        begun = self._begun(place)
        if self._was_rejected(candidate) or not self._may_follow(candidate, begun):
            return False
        is_block = isinstance(place, FittableBlock)
        meant = [place.name] if isinstance(place, FittableBlock) else place.parts
        there = {name for name, _ in self.model.named_modules(remove_duplicate=False)}
        beside = [step for step in self._steps if not (is_block and step in begun)]
        if not there.issuperset(meant) or not all(place.parts.isdisjoint(step.place.parts) for step in beside):
            return False
        telling = self._telling

        def run() -> list[Any]:
            return self._norms.run(lambda: [call(self.model, copies(batch)) for batch in telling], self.kept_channels)

        change: Tensor | None = None
        with suppress(CannotFitError):
            outputs = as_matrices(try_out(self.model, candidate.choice, run))
            change = change_of(outputs, self._seen)
        if change is not None and not is_finite(change):
            change = None
        self._anew[id(candidate)] = _Anew(_identities(self._steps), _identities(begun), change)
        return True

    def take(self, candidate: FittedCandidate) -> Trial | None:
        """Put an operator in its place, fitted to what the model has become; None if none pays any more."""
        place, wanted = candidate.choice.place, candidate.choice.fit
        begun = self._begun(place)
        if self._was_rejected(candidate) or not self._may_follow(candidate, begun):
            return None
        self._undone = [(self._steps.index(step), step) for step in begun]
        for step in reversed(begun):
            put(self.model, step.old)
            self._steps.remove(step)
        try:
            place = self._found_again(place)
            if begun:
                with RunUpTo(self.model, place) as shown:  # what comes after it is not looked at before it is fitted
                    self._norms.match_alike(shown.run, self.kept_channels)
            choices = [choice for choice in self._fit(place) if choice.fit.kind == wanted.kind]
            if not choices:
                raise CannotFitError("does not pay any more beside its neighbours")
            choice = next((each for each in choices if str(each.fit.operator) == str(wanted.operator)), choices[0])
            old = replace(self.model, choice, self._arguments)
        except CannotFitError as error:
            self._redo()
            if begun:
                self._match_norms()
            else:
                self.reasons.update(dict.fromkeys(place.told, str(error)))
            return None
        trial = Trial(place.sites, place.operators, wanted.kind, choice.fit.explained, candidate.drift,
                      choice.price_before, choice.price_after, self._prices.objective)  # fmt: skip
        for step in begun:
            step.trial.kept, step.trial.reason = False, f"{wanted.kind} has taken its place"
        new = {name: self.model.get_submodule(name) for name in old}
        self._steps.append(Taken(trial, place, choice.fit, choice.saving, choice.worth, candidate.change, old, new))
        self.trials.append(trial)
        self._match_norms()
        for name in (*place.sites, *place.told):
            self.reasons.pop(name, None)
        return trial

    def _found_again(self, place: Place) -> Place:
        """Return a place as it is now: a neighbour of a chain may have gone, and one of its ends with it.

        Raises:
            CannotFitError: If it is none any more.
        """
        if not isinstance(place, FittableChain):
            return place
        chain = FittableChains(self.model, place.sites, self._known, self._by_depth).around(place.sites)
        if not isinstance(place, NarrowableChain):
            return chain
        found = narrowable(self.model, chain)
        if found is None:
            raise CannotFitError("its inner channels may become fewer no more")
        return found

    def _was_rejected(self, candidate: FittedCandidate) -> bool:
        """Tell whether something that changes less of the same was taken back."""
        place = candidate.choice.place
        return any(place.holds(each.place) and each.trial.drift <= candidate.drift for each in self._taken_back)

    def _may_follow(self, candidate: FittedCandidate, begun: Sequence[Taken]) -> bool:
        """Tell whether a candidate saves more than what is in place of parts of it, and whether that can be undone."""
        place, worth = candidate.choice.place, candidate.choice.worth
        if isinstance(place, NarrowableChain) and not all(isinstance(o.place, NarrowableChain) for o in begun):
            return False  # an operator is not taken out again for what it has taken the place of
        if isinstance(place, FittableChain):
            if not all(self._is_there([step]) and worth > step.worth for step in begun):
                return False
        elif not self._is_there(begun) or not worth > sum(step.worth for step in begun):
            return False
        return all(place.holds(step.place) for step in begun)

    def _is_there(self, steps: Sequence[Taken]) -> bool:
        """Tell whether what steps have put in place, one after the other, is there still."""
        new = {name: module for step in steps for name, module in step.new.items()}
        there = dict(self.model.named_modules(remove_duplicate=False))
        return all(there.get(name) is module for name, module in new.items())

    def take_back(self, reason: str) -> None:
        """Undo the last trial, since the model is not good enough with it; what changes more there is not tried."""
        self._taken_back.append(self._steps[-1])
        self.undo(reason)

    def undo(self, reason: str) -> None:
        """Undo the last trial."""
        step = self._steps.pop()
        put(self.model, step.old)
        step.trial.kept, step.trial.reason = False, reason
        self._redo()
        self._match_norms()

    @property
    def steps(self) -> list[Taken]:
        """Those that are in place, in the order they were taken."""
        return list(self._steps)

    def is_uncovered(self, step: Taken) -> bool:
        """Tell whether a step is in place, and nothing was put where it is since: it can be undone by itself."""
        return self._is_there([step])

    def leave_out(self, step: Taken) -> int:
        """Undo a step, whichever it is; return its number, for :meth:`put_back`."""
        number = self._steps.index(step)
        put(self.model, self._steps.pop(number).old)
        self._match_norms()
        return number

    def put_back(self, step: Taken, number: int) -> None:
        """Put a step back that was left out."""
        put(self.model, step.new)
        self._steps.insert(number, step)
        self._match_norms()

    def forget_fits(self) -> None:
        """Forget what was fitted, since all values of the model may have changed."""
        self._fitted.clear()
        self._anew.clear()
        self._norms.forget()

    def _redo(self) -> None:
        for place, step in self._undone:
            put(self.model, step.new)
            self._steps.insert(place, step)
            step.trial.kept, step.trial.reason = True, None
        self._undone = []

    def _fit(self, place: Place) -> list[PricedFit]:
        """Return the operators for a place that save something, those of the last time where nothing before it changed.

        Raises:
            CannotFitError: If there are none.
        """
        known = self._fitted.get(place.key)
        if known is None or known.place != place or known.beside != self._in_place(known.ran):
            dense = self.dense if self._steps else None
            gathered = gather_alone(self.model, dense, place, self._batches, self._arguments, self._watched)
            self._fit_to(place, gathered)
        return self._fitted[place.key].choices

    def _gather(
        self, places: Sequence[Place], advance: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Place, Gathered | None]]:
        return gather(
            self.model, places, self._batches, self._arguments, self._watched, advance, len(self.some_batches)
        )

    @property
    def _watched(self) -> list[str]:
        """Of what something may take the place, that which is there: what was in a block goes with it."""
        there = dict(self.model.named_modules(remove_duplicate=False))
        return [name for name in self._replaceable if name in there]

    def _fit_to(
        self, place: Place, gathered: Gathered | None, advance: Callable[[], object] = lambda: None
    ) -> list[PricedFit]:
        choices = fit_to(self.model, place, gathered, self._prices, advance)
        ran = frozenset() if gathered is None else gathered.ran
        saving = [choice for choice in choices if choice.saving > 0]
        self._fitted[place.key] = FittedPlace(place, saving, ran, self._in_place(ran))
        return choices

    def _in_place(self, names: Container[str]) -> dict[str, nn.Module]:
        """Return what has taken the place of modules of these names."""
        return {name: module for step in self._steps for name, module in step.new.items() if name in names}

    def _match_norms(self) -> None:
        """Have the norms that are left make up for what is in place by now, as far as they can."""
        self._norms.restore()
        is_changed = bool(self._steps)
        self._seen = self._norms.match(self._dense_outputs, self.kept_channels) if is_changed else self._dense_outputs

    def _outputs(self) -> list[Tensor]:
        return outputs_of(self.model, self._telling)
