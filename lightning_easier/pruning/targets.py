"""How fast or how shallow a model should become, and whether it is."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from lightning_easier.collapsing import CollapseResult
from lightning_easier.collapsing.engine import Prepared, counted, prepare, warn_of_lost_arguments, with_operators
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.report import CollapseReport, ModelCost
from lightning_easier.sites.activations import unwrap
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.arguments import check_integer, check_positive
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import call, copies, mapped
from lightning_easier.support.costs import count_macs
from lightning_easier.support.inference import check_weights
from lightning_easier.support.timing import MARGIN, Latency, LatencyTable, Speedup, compare, speed_up

# A model whose estimated time is so near to the target is collapsed and timed.
_NEARLY = 1.1
# One that is surely so many times faster than it should be may do with less. Prices tell as exactly what is left.
_PASSED = 1 + 2 * MARGIN
# A look takes its time: of what was missing at the last one, so much has to be saved by estimate before the next, and
# so much of the dense network's time. What an estimate was worth at the last look it is worth after it, within limits.
_WORTH_A_LOOK, _LEAST_SAVING = 0.85, 0.02
_LEAST_WORTH, _MOST_WORTH = 0.5, 1.5
# So many times fewer multiply-accumulates than the target asks for, and not there: the times do not come from what is
# computed, or something else decides them.
_IMPOSSIBLE = 3.0
# Said of a target that the timings leave open.
_DOUBT = " (the timings leave it open whether it is that; objective='macs' and `target_depth` go by the work alone)"


@dataclass(frozen=True)
class Target:
    """How fast, or how shallow, a network should become; a run or a search is over when it is.

    Args:
        speedup: How many times faster than the dense network with its batch norms folded, both measured in turn; above
            1. None for any.
        depth: The most operators in a row; None for any.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a speed-up is none, a depth is below 1, or neither is given.
    """

    speedup: float | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.speedup is None and self.depth is None:
            raise ValueError("Expected arguments `speedup` and `depth` of a Target not both to be None")
        check_target(self.speedup, self.depth)


def check_target(speedup: float | None, depth: int | None, prefix: str = "") -> None:
    """Check a target.

    Args:
        speedup: As for :class:`Target`.
        depth: As for :class:`Target`.
        prefix: What the names of the arguments begin with.
    """
    if speedup is not None:
        check_positive(f"{prefix}speedup", speedup)
        if speedup <= 1:
            raise ValueError(
                f"Expected argument `{prefix}speedup` to be above 1, how many times faster than the dense network the "
                f"result is to be, but got {speedup}"
            )
    if depth is not None:
        check_integer(f"{prefix}depth", depth, 1)


@dataclass(frozen=True)
class Attained:
    """How fast and how shallow a model is, and whether that is enough; plain data.

    Attributes:
        is_reached: Whether it is as fast and as shallow as it should be.
        words: What was measured, and what it should be.
        costs: What was measured, as in :class:`~lightning_easier.report.Round`.
    """

    is_reached: bool
    words: str
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """What was found when a model was collapsed and timed; all costs were timed in turn.

    Attributes:
        result: The collapsed model, and what was merged.
        before: Cost of the model as it was given.
        dense: Cost of the same with its batch norms folded.
        exact: Cost of the model as it was given, collapsed exactly.
        attained: Whether the model is as fast and as shallow as it should be.
        is_impossible: Whether the work has become so much less, and the time has not, that it is no use to go on.
        timed: The time of each of what the collapse chose among, by name.
    """

    result: CollapseResult
    before: ModelCost
    dense: ModelCost
    exact: ModelCost
    attained: Attained
    is_impossible: bool
    timed: Mapping[str, Latency]


class TargetWatch:
    """Tells whether a model has become as fast, or as shallow, as it should.

    What decides is a ratio of times that were measured in turn. When it is worth measuring is estimated, in shares of
    what the dense network costs: by the prices of what was replaced, and by the multiply-accumulates that are left; for
    a depth alone it is known from the collapsed graph. Nothing is timed before that.

    Args:
        source: The model as it was given, in eval mode.
        arguments: Example inputs.
        objective: What a collapse makes least.
        table: Times that were measured already; it tells how long timings may take, too.
        target: What is to be reached; None for nothing.

    Raises:
        CollapseError: If the model can't be collapsed.
    """

    def __init__(
        self,
        source: nn.Module,
        arguments: tuple[Tensor, ...],
        objective: Objective,
        table: LatencyTable,
        target: Target | None,
    ) -> None:
        self._source = source
        self._arguments = arguments
        self._objective: Objective = objective
        self._table = table
        self._target = target
        speedup = self._speedup = None if target is None else target.speedup
        self._depth = None if target is None else target.depth
        self._exact = prepare(source, arguments, objective, table)
        self._dense = self._exact.baseline.model
        self._macs = None if speedup is None else counted(count_macs, self._dense, arguments)
        self._price: float | None = None  # of the dense network, in the unit of the table
        # shares that were left, and the speed-up, at the last look
        self._last: tuple[float, float, float] | None = None

    @property
    def has_target(self) -> bool:
        """Whether there is anything to reach."""
        return self._target is not None

    def look_if_due(self, model: nn.Module, saved: float) -> Look | None:
        """Look at a model that may have reached the target; None for one that can't have, or if there is none.

        Args:
            model: The model.
            saved: Of its price, in the unit of the objective; 0 for the model as it was given.
        """
        if not self.has_target or (saved == 0 and not self._gains_exactly):  # it is the dense network still
            return None
        if self._speedup is None:
            prepared = self._prepared(model, saved)
            return self._look(prepared, saved) if self._depth is not None and prepared.depth <= self._depth else None
        if not self._is_due(model, saved, self._speedup):
            return None
        prepared = self._prepared(model, saved)
        left = self._share(counted(count_macs, prepared.models["after"], self._arguments))
        if self._is_impossible(left, self._speedup):  # the search is over, whether it is enough or not
            return self._look(prepared, saved)
        enough = self._speedup * (1 - MARGIN)
        found, timed = self._beside_the_dense(prepared, enough)
        if found.is_above(enough):
            return self._look(prepared, saved, timed)
        self._note(saved, left, found.median)
        return None

    def _is_due(self, model: nn.Module, saved: float, speedup: float) -> bool:
        if self._last is None and self._gains_exactly:  # what that saves is not estimated
            return True
        by_macs = self._share(counted(count_macs, model, self._arguments))
        by_price = 1 - saved / self._dense_price() if self._objective == "latency" else by_macs
        if by_price is None:  # nothing tells but the clock
            return True
        if self._is_impossible(by_macs, speedup):
            return True
        by_macs = 1.0 if by_macs is None else by_macs
        if self._last is None:
            return min(by_price / _NEARLY, by_macs) <= 1 / speedup
        price_then, macs_then, then = self._last
        wanted = max(_WORTH_A_LOOK * (1 / then - 1 / speedup), _LEAST_SAVING)
        for before, now in ((price_then, by_price), (macs_then, by_macs)):
            worth = _worth(1 - before, 1 - 1 / then)
            # where all that is left would not be enough, half of it has to be gone
            if worth * (before - now) >= min(wanted, worth * before / 2):
                return True
        return False

    def _is_impossible(self, macs: float | None, speedup: float) -> bool:
        """Tell whether so little work is left that it is no use to go on, by its share of the dense network's."""
        return macs is not None and macs * speedup * _IMPOSSIBLE <= 1

    @property
    def _gains_exactly(self) -> bool:
        """Whether something merges or is dead from the start, or there are linear activations."""
        return self._exact.has_less or bool(stand_ins(self._source))

    def _share(self, macs: int | None) -> float | None:
        """Return what share multiply-accumulates are of the dense network's; None where they can't be counted."""
        return None if macs is None or not self._macs else macs / self._macs

    def _dense_price(self) -> float:
        if self._price is None:
            key, (first, *_) = object(), self._arguments
            self._table.measure({key: lambda: partial(call, self._dense, copies(self._arguments))}, first.device)
            self._price = self._table.seconds.pop(key)
        return self._price

    def _prepared(self, model: nn.Module, saved: float) -> Prepared:
        if saved == 0:
            return self._exact
        return prepare(model, self._arguments, self._objective, self._table, self._exact.baseline)

    def look(self, model: nn.Module, saved: float) -> Look:
        """Collapse a model, and time it beside what it comes from.

        Args:
            model: The model.
            saved: As for :meth:`look_if_due`.
        """
        return self._look(self._prepared(model, saved), saved)

    def look_again(self, model: nn.Module, saved: float, look: Look) -> Look:
        """Collapse a model again of which only values have changed since a look: it takes as long as it did.

        Args:
            model: The model.
            saved: As for :meth:`look_if_due`.
            look: The look.
        """
        prepared = self._prepared(model, saved)
        if prepared.models.keys() - look.timed.keys():  # it is collapsed to something else
            return self._look(prepared, saved)
        settled = prepared.settle(look.timed)
        report = dataclasses.replace(settled.report, before=look.before, dense=look.dense)
        return dataclasses.replace(look, result=CollapseResult(settled.model, report))

    def with_operators(self, look: Look) -> Look:
        """Say in the report of a look where the time goes, too.

        Args:
            look: The look.
        """
        result = with_operators(look.result, self._dense, self._arguments, self._table.pace)
        return dataclasses.replace(look, result=result)

    def look_if_enough(self, model: nn.Module, saved: float) -> Look | str:
        """Look at a model that is as fast and as shallow as it should be; say of another what it is instead.

        That is more than to reach a target: what is given up for it has reached that already. So the median has to be
        as fast as was asked for, too, and not only within the margin below it.

        Args:
            model: The model.
            saved: As for :meth:`look_if_due`.
        """
        prepared = self._prepared(model, saved)
        if self._depth is not None and prepared.depth > self._depth:
            return "it is too deep"
        timed: Mapping[str, Latency] = MappingProxyType({})
        if self._speedup is not None:
            enough = self._speedup * (1 - MARGIN)
            speedup, timed = self._beside_the_dense(prepared, enough)
            if not speedup.is_above(enough) or speedup.median < self._speedup:
                return _of_wanted(speedup, self._speedup)
        look = self._look(prepared, saved, timed)
        is_as_fast = self._speedup is None or look.result.report.speedup.median >= self._speedup
        return look if look.attained.is_reached and is_as_fast else look.attained.words

    def _beside_the_dense(self, prepared: Prepared, bar: float) -> tuple[Speedup, Mapping[str, Latency]]:
        """Time a model and the dense network in turn, until it is clear whether it is so many times faster.

        Returns:
            How many times it is, and what was timed, by name: a look at the model counts that, too.
        """
        names: list[str] = [name for name in ("after", "unmerged") if name in prepared.models]
        models: dict[str, nn.Module] = {"dense": self._dense, **{name: prepared.models[name] for name in names}}
        bars = [(("dense", name), bar) for name in names]
        latency = compare(models, copies(self._arguments), bars, self._table.pace)
        return max((speed_up(latency["dense"], latency[name]) for name in names), key=lambda each: each.median), latency

    def _note(self, saved: float, macs: float | None, speedup: float) -> None:
        """Note what was left at a look, and how fast that was."""
        known = 1.0 if macs is None else macs
        by_price = 1 - saved / self._dense_price() if self._objective == "latency" else known
        self._last = by_price, known, speedup

    def is_passed(self, look: Look) -> bool:
        """Tell whether a model is so much faster than it should be, or shallower, that less may be enough."""
        if not look.attained.is_reached:
            return False
        report = look.result.report
        if self._speedup is not None:
            return report.speedup.is_above(self._speedup * _PASSED)
        return self._depth is not None and report.after.depth < self._depth

    def may_do_with(self, look: Look, saved: float, less: float) -> bool:
        """Tell whether a model may still be fast enough that saves less; if a depth alone is asked for, it may.

        What was measured that all its steps save together is shared out by their prices.

        Args:
            look: The last look at the model.
            saved: Of its price by then, in the unit of the objective.
            less: How much less it is to be.
        """
        if self._speedup is None:
            return True
        share = 1 / look.result.report.speedup.median
        return share + (1 - share) * less / saved <= _PASSED / self._speedup

    def _look(self, prepared: Prepared, saved: float, timed: Mapping[str, Latency] = MappingProxyType({})) -> Look:
        """Time all that is told of a model in turn, and take the result.

        Args:
            prepared: The model, collapsed.
            saved: As for :meth:`look_if_due`.
            timed: What :meth:`_beside_the_dense` has timed of it. One answer is given to whether the target is
                reached, by all that was timed of the two: else a second one may contradict the first by chance.
        """
        both = {"exact": self._exact, "fitted": prepared}
        models = {(whose, name): model for whose, each in both.items() for name, model in each.models.items()}
        bars = [(((whose, a), (whose, b)), bar) for whose, each in both.items() for (a, b), bar in each.bars.items()]
        if self._speedup is not None:  # which is the result is known at last; and whether less might do is asked next
            names = [name for name in ("after", "unmerged") if name in prepared.models]
            wanted = (self._speedup * (1 - MARGIN), self._speedup, self._speedup * _PASSED)
            bars += [((("exact", "dense"), ("fitted", name)), bar) for name in names for bar in wanted]
        earlier = {("exact" if name == "dense" else "fitted", name): each for name, each in timed.items()}
        latency = compare(models, copies(self._arguments), bars, self._table.pace, earlier)

        def settled(whose: str) -> CollapseResult:
            return both[whose].settle({name: each for (whom, name), each in latency.items() if whom == whose})

        exact = settled("exact").report
        result = settled("fitted") if prepared is not self._exact else settled("exact")
        report = dataclasses.replace(result.report, before=exact.before, dense=exact.dense)
        result = CollapseResult(result.model, report)
        attained = _attained(report, self._speedup, self._depth)
        by_macs = self._share(report.after.macs)
        is_impossible = False
        if self._speedup is not None:
            self._note(saved, by_macs, report.speedup.median)
            is_impossible = not attained.is_reached and self._is_impossible(by_macs, self._speedup)
        of_fitted = {name: each for (whose, name), each in latency.items() if whose == "fitted"}
        return Look(result, exact.before, exact.dense, exact.after, attained, is_impossible, of_fitted)


def _worth(estimated: float, measured: float) -> float:
    """Return how much was saved for each second that was estimated, within limits; 1 if nothing was estimated."""
    return min(max(measured / estimated, _LEAST_WORTH), _MOST_WORTH) if estimated > 0 else 1.0


def _of_wanted(speedup: Speedup, wanted: float) -> str:
    """Say in words how fast something is, beside what was asked for."""
    doubt = _DOUBT if speedup.leaves_open(wanted) else ""
    return f"{speedup} of the {wanted:g}× that was asked for{doubt}"


def _attained(report: CollapseReport, speedup: float | None, depth: int | None) -> Attained:
    words, are_reached = [], []
    if speedup is not None:
        are_reached.append(report.speedup.is_above(speedup * (1 - MARGIN)))
        words.append(_of_wanted(report.speedup, speedup))
    if depth is not None:
        are_reached.append(report.after.depth <= depth)
        words.append(f"a depth of {report.after.depth}, where {depth} was asked for")
    costs = {
        "latency": report.after.latency.median, "dense_latency": report.dense.latency.median,
        "speedup": report.speedup.median, "depth": float(report.after.depth), "dense_depth": float(report.dense.depth),
    }  # fmt: skip
    return Attained(all(are_reached) and bool(are_reached), " and ".join(words), costs)


def attained(
    network: nn.Module,
    arguments: tuple[Tensor, ...],
    target: Target | None,
    objective: Objective,
    table: LatencyTable,
) -> tuple[Attained, CollapseReport]:
    """Tell how fast and how shallow a network with linear activations is, and whether that is enough.

    Args:
        network: A copy of the network.
        arguments: Example inputs.
        target: What is to be reached; None for nothing, which is never enough.
        objective: What a collapse makes least.
        table: Times that were measured already.

    Returns:
        The answer, and what the collapse has merged.

    Raises:
        CollapseError: If the network can't be collapsed.
    """
    network = unwrap(network).eval()
    check_weights(network)
    arguments = as_arguments(mapped(lambda value: value.detach().clone(), arguments), network)
    speedup, depth = (None, None) if target is None else (target.speedup, target.depth)
    prepared = prepare(network, arguments, objective, table)
    bars = dict(prepared.bars)
    if speedup is not None and not bars:  # else too few are taken to tell whether it is so fast
        bars["dense", "after"] = speedup * (1 - MARGIN)
    result = prepared.settle(compare(prepared.models, copies(arguments), bars.items(), table.pace))
    warn_of_lost_arguments(network, result.report)
    report = with_operators(result, prepared.baseline.model, arguments, table.pace).report
    return _attained(report, speedup, depth), report
