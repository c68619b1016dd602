"""What a collapse merged, and what it did not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_easier.report.costs import ModelCost, costs_table, prices_in_words
from lightning_easier.report.figures import Draw, bars_of_operators
from lightning_easier.report.tables import Report, Table, notes_table
from lightning_easier.support.timing import Speedup, speed_up


@dataclass(frozen=True)
class Merge:
    """Linear steps in a row that became one operator, or one that has moved to a cheaper place.

    Attributes:
        operators: Qualified names, in execution order; functions go by the name of their node.
        into: What they became.
        objective: The unit of the prices: ``"latency"`` (seconds), ``"macs"`` or ``"depth"`` (operations).
        price_before: Price of the operators.
        price_after: Price of what they became.
    """

    operators: tuple[str, ...]
    into: str
    objective: str
    price_before: float
    price_after: float


@dataclass(frozen=True)
class Refusal:
    """Something that was not merged.

    Attributes:
        operators: Qualified names, in execution order.
        reason: Why not.
    """

    operators: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Trimmed:
    """An operator of which channels are gone that nothing needs, because they are constant or nothing reads them.

    Attributes:
        operator: Its qualified name; a function goes by the name of its node.
        before: How many channels it wrote.
        after: How many it writes.
    """

    operator: str
    before: int
    after: int


@dataclass(frozen=True)
class Fitted:
    """A chain that a fitted operator has taken the place of.

    Attributes:
        sites: The activations in it.
        operators: Its operators.
        kind: Of the operator: ``"convolution"``, ``"pointwise"``, ``"separable"``, ``"linear"``, ``"low-rank"`` or
            ``"affine"``.
        explained: Share of the variance of the chain's output that it explains on data held out.
        price_before: Of the chain, in the unit of the objective.
        price_after: Of the operator.
        objective: What the prices are of.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...]
    kind: str
    explained: float
    price_before: float
    price_after: float
    objective: str


@dataclass(frozen=True)
class OperatorTime:
    """What the calls of a module, or of a function in it, take in one call of the model.

    Attributes:
        name: Qualified name of the module; with the name of the function where it is one between modules.
        before: Seconds in the dense network; None if it has no such operator.
        after: Seconds in the collapsed model; None if it is gone.
    """

    name: str
    before: float | None
    after: float | None

    @classmethod
    def beside(cls, before: Mapping[str, float], after: Mapping[str, float]) -> "list[OperatorTime]":
        """Put the times of two models beside each other, in the order of their calls."""
        names, at = [*before], 0
        for name in after:
            if name not in before:  # it took the place of what was inside, or followed what came before it
                inside = (place for place, other in enumerate(names) if other.startswith(f"{name}."))
                names.insert(next(inside, at), name)
            at = max(at, names.index(name) + 1)
        return [cls(name, before.get(name), after.get(name)) for name in names]


@dataclass
class CollapseReport(Report):
    """What a collapse merged, what it did not and why, and the model's cost before and after.

    Attributes:
        merges: What became one operator, or moved.
        fused: Batch norms that were folded into the operator before them.
        dropped: Operators that compute the identity in eval mode and are gone.
        refusals: What was not merged, with the reason.
        before: Cost of the model as it was given, in eval mode.
        dense: Cost of the dense network that it comes from: all its activations are back, its batch norms folded.
        after: Cost of the collapsed model. All three were timed in turn.
        relative_difference: Of the collapsed model's output on the example inputs, ``‖y - y₀‖ / ‖y₀‖``.
        relative_difference_float64: The same with both in float64, before the new weights were rounded; None for a
            model that does not run in float64.
        fitted: What fitted operators have taken the place of. The differences are from the model that has them.
        notes: What else there is to know, of the calibration data for example.
        fixed_arguments: Arguments that were left out of the example, and their defaults: the collapsed model takes no
            other values.
        lost_arguments: Those that it does not take at all; ``*args`` and ``**kwargs`` of the forward with their stars.
        trimmed: Operators of which dead channels are gone.
        taken_out: Blocks that were taken out of the model before.
        operators: Where the time of the dense network went, and where that of the collapsed one goes, in execution
            order; none where a model does not run while its operators are looked at.
    """

    merges: list[Merge]
    fused: list[str]
    dropped: list[str]
    refusals: list[Refusal]
    before: ModelCost
    dense: ModelCost
    after: ModelCost
    relative_difference: float
    relative_difference_float64: float | None
    fitted: list[Fitted] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fixed_arguments: dict[str, Any] = field(default_factory=dict)
    lost_arguments: list[str] = field(default_factory=list)
    trimmed: list[Trimmed] = field(default_factory=list)
    taken_out: list[str] = field(default_factory=list)
    operators: list[OperatorTime] = field(default_factory=list)

    @property
    def speedup(self) -> Speedup:
        """How many times faster the collapsed model is than the dense network with its batch norms folded."""
        return speed_up(self.dense.latency, self.after.latency)

    def panels(self) -> dict[str, tuple[Draw, float]]:
        """Return a bar an operator: where the time went, and where it goes."""
        if not self.operators:
            return {}
        return {"operators": bars_of_operators({each.name: (each.before, each.after) for each in self.operators})}

    def tables(self) -> Iterator[Table]:
        """Yield the costs, what was fitted, the channels that are gone, the merges and the refusals."""
        yield costs_table("Collapse", {"as given": self.before, "collapsed": self.after}, self.dense)
        if self.fitted:
            rows = [
                (" + ".join(f.operators), f.kind, f"{f.explained:.1%}",
                 prices_in_words(f.price_before, f.price_after, f.objective)) for f in self.fitted
            ]  # fmt: skip
            yield Table("Fitted", ("chain", "by", "variance explained", "price"), rows)
        if self.trimmed:
            channels = [(each.operator, f"{each.before} → {each.after}") for each in self.trimmed]
            yield Table("Dead channels", ("operator", "channels"), channels)
        merges = [(" + ".join(m.operators), m.into, prices_in_words(m.price_before, m.price_after, m.objective))
                  for m in self.merges]  # fmt: skip
        if self.fused:
            merges.append((f"{len(self.fused)} batch norms", "folded into the operators before them", "-"))
        if merges:
            yield Table("Merged", ("operators", "into", "price"), merges)
        if self.refusals:
            yield Table(
                "Not merged", ("operators", "reason"), [(" + ".join(r.operators), r.reason) for r in self.refusals]
            )
        arguments = [(name, f"only {default!r}, its default") for name, default in self.fixed_arguments.items()]
        arguments += [(name, "no longer") for name in self.lost_arguments]
        if arguments:
            yield Table("Arguments that the example left out", ("argument", "is taken"), arguments)
        blocks = [f"`{name}` was taken out" for name in self.taken_out]
        yield from notes_table([*blocks, *self.notes])
