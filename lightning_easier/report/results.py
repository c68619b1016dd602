"""Plain results that can be shown as a table, Markdown, a dict or JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_easier.support.timing import Latency, Speedup, speed_up


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """Render as a GitHub Markdown table under its title."""
        lines = [f"**{self.title}**", "", _row(self.columns), _row(["---"] * len(self.columns))]
        return "\n".join(lines + [_row(row) for row in self.rows])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render with rich, where it is installed: ``rich.print(table)``."""
        from rich.table import Table as RichTable
        from rich.text import Text

        rendered = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            rendered.add_column(Text(column), overflow="fold", justify="left" if number == 0 else "right")
        for row in self.rows:
            rendered.add_row(*(Text(cell) for cell in row))
        yield rendered


class Report:
    """Base of the reports: subclasses are dataclasses that say what their tables are."""

    def tables(self) -> Iterator[Table]:
        """Yield the tables of the report."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass

    def to_json(self) -> str:
        """Return JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_markdown(self) -> str:
        """Render every table as Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables()) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render with rich, where it is installed: ``rich.print(report)``."""
        yield from self.tables()


@dataclass
class Round:
    """One round of pruning.

    Attributes:
        removed: The activations that became linear in this round; none in the dense round.
        entropies: Entropies in bits of what was chosen, when it was.
        score_before: The monitored score before the round.
        score_after: The monitored score at its end; None while the round goes on.
        accepted: Whether the score stayed within the tolerance; None while the round goes on.
        epoch: The epoch, counted from 0, at whose start it began.
        chosen: What was removed, activations for example; nothing in the dense round.
        notes: Name -> what else there is to say of what was chosen.
        reference: The score that it was judged against; None for the dense round, and where there was no judgement.
        reference_round: The number of the round whose score that is.
        reason: Why it was taken back without a judgement; None otherwise.
    """

    removed: list[str]
    entropies: dict[str, float]
    score_before: float | None
    score_after: float | None
    accepted: bool | None
    epoch: int
    chosen: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    reference: float | None = None
    reference_round: int | None = None
    reason: str | None = None


@dataclass
class PruningReport(Report):
    """What a pruning run did, round by round.

    Attributes:
        monitor: Name of the monitored score.
        rounds: The rounds, the dense one first.
    """

    monitor: str
    rounds: list[Round] = field(default_factory=list)

    def tables(self) -> Iterator[Table]:
        """Yield one table with a row a round."""
        yield self._table(range(len(self.rounds)))

    def event(self, number: int) -> str:
        """Describe one round as Markdown."""
        return self._table([number]).to_markdown()

    def line(self, number: int, tolerance: float) -> str:
        """Say in one line what a round was, what it was judged against, and whether it was kept.

        Args:
            number: Of the round, from 0.
            tolerance: The fall that was allowed.
        """
        this = self.rounds[number]
        what = ", ".join(
            _with_notes(f"`{name}`", _entropy(name, this), *this.notes.get(name, ())) for name in this.chosen
        )
        score = "no score" if this.score_after is None else f"{self.monitor} {this.score_after:.4f}"
        if this.reference is not None:
            score += f" against {_reference(this)}"
        verdict = "kept" if this.accepted else this.reason or f"beyond the tolerance {tolerance:g}"
        return f"Round {number}: removed {what or 'nothing (dense)'}; {score}: {verdict}."

    def _table(self, numbers: Iterable[int]) -> Table:
        scores = f"{self.monitor} before", f"{self.monitor} after", "judged against"
        columns = ("round", "removed", "entropy [bit]", *scores, "verdict")
        return Table("Pruning by entropy", columns, [self._row(number, self.rounds[number]) for number in numbers])

    def _row(self, number: int, this: Round) -> tuple[str, ...]:
        return (
            str(number),
            ", ".join(_with_notes(name, *this.notes.get(name, ())) for name in this.chosen) or "(dense)",
            ", ".join(_number(this.entropies.get(name)) for name in this.chosen) or "-",
            _number(this.score_before),
            _number(this.score_after),
            _reference(this),
            {True: "kept", False: "taken back", None: "not judged"}[this.accepted]
            + (f": {this.reason}" if this.reason else ""),
        )


@dataclass(frozen=True)
class ModelCost:
    """What a model costs at the shape of the example inputs.

    Attributes:
        depth: Longest chain of weight-carrying operators.
        parameters: Numbers in all parameters.
        macs: Multiply-accumulates of one call; None for a model that does not run while its operators are counted.
        activation_memory: Most bytes that the values of one call take at a time, without parameters and inputs; None
            as above.
        latency: Measured time of one call, in seconds.
    """

    depth: int
    parameters: int
    macs: int | None
    activation_memory: int | None
    latency: Latency


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

    @property
    def speedup(self) -> Speedup:
        """How many times faster the collapsed model is than the dense network with its batch norms folded."""
        return speed_up(self.dense.latency, self.after.latency)

    def tables(self) -> Iterator[Table]:
        """Yield the costs, what was fitted, the merges and the refusals."""
        yield _costs("Collapse", {"as given": self.before, "collapsed": self.after}, self.dense)
        if self.fitted:
            rows = [
                (" + ".join(f.operators), f.kind, f"{f.explained:.1%}",
                 f"{_price(f, f.price_before)} → {_price(f, f.price_after)}") for f in self.fitted
            ]  # fmt: skip
            yield Table("Fitted", ("chain", "by", "variance explained", "price"), rows)
        merges = [(" + ".join(m.operators), m.into, f"{_price(m, m.price_before)} → {_price(m, m.price_after)}")
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
        yield from _notes(self.notes)


@dataclass
class Trial:
    """A chain that a fitted operator was tried in the place of.

    Attributes:
        sites: The activations in it.
        operators: Its operators.
        kind: Of the fitted operator, as in :class:`Fitted`.
        explained: Share of the variance of the chain's output that it explains on data held out.
        drift: Share of the variance of the model's outputs that changes if this chain alone goes.
        price_before: Of the chain, in the unit of the objective.
        price_after: Of the operator.
        objective: What the prices are of.
        score: Of the model with it; None if it was not evaluated.
        kept: Whether it stayed.
        reason: Why it did not.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...]
    kind: str
    explained: float
    drift: float
    price_before: float
    price_after: float
    objective: str
    score: float | None = None
    kept: bool = True
    reason: str | None = None


@dataclass
class CompressReport(Report):
    """What a compression tried, kept and took back, and what the model costs before and after.

    Attributes:
        trials: What was tried, in order.
        reasons: Activation -> why nothing was tried for it.
        score: Of the model as it was given; None if it was not evaluated.
        before: Cost of the model as it was given, in eval mode.
        dense: The same with its batch norms folded, and its activations back if some were linear.
        exact: The model as it was given, collapsed exactly: what is to be had without a fit.
        after: Cost of the result. All four were timed in turn.
        drift: Share of the variance of the model's outputs on the calibration data that the fits have changed.
        collapse: What the final collapse merged of the fitted model.
        ended: Why nothing more was tried.
        notes: What else there is to know, of the calibration data for example.
    """

    trials: list[Trial]
    reasons: dict[str, str]
    score: float | None
    before: ModelCost
    dense: ModelCost
    exact: ModelCost
    after: ModelCost
    drift: float
    collapse: CollapseReport
    ended: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def speedup(self) -> Speedup:
        """How many times faster the result is than the dense network with its batch norms folded."""
        return speed_up(self.dense.latency, self.after.latency)

    def tables(self) -> Iterator[Table]:
        """Yield the costs, and what was tried."""
        last = next((trial.score for trial in reversed(self.trials) if trial.kept), self.score)
        costs = {"as given": self.before, "collapsed exactly": self.exact, "compressed": self.after}
        scores = {"dense": self.score, "as given": self.score, "collapsed exactly": self.score, "compressed": last}
        yield _costs(f"Compression: {self.ended}" if self.ended else "Compression", costs, self.dense, scores)
        if self.trials:
            yield Table(
                "Tried", ("chain", "by", "variance explained", "drift", "price", "score", "verdict"),
                [(" + ".join(t.operators), t.kind, f"{t.explained:.1%}", f"{t.drift:.2%}",
                  f"{_price(t, t.price_before)} → {_price(t, t.price_after)}", _number(t.score),
                  "kept" if t.kept else str(t.reason)) for t in self.trials],
            )  # fmt: skip
        if self.reasons:
            yield Table("Not tried", ("activation", "reason"), list(self.reasons.items()))
        drift = f"{self.drift:.2%} of the variance of the outputs has changed on the calibration data"
        yield from _notes([drift, *self.notes, _MODES])


@dataclass(frozen=True)
class Parity:
    """How an exported file's output compares with the model's at one batch size.

    Attributes:
        batch_size: The batch size.
        max_difference: Largest absolute difference.
        relative_difference: ``‖y - y₀‖ / ‖y₀‖``.
    """

    batch_size: int
    max_difference: float
    relative_difference: float


@dataclass
class ExportReport(Report):
    """What was exported, and how it compares with the model.

    Attributes:
        path: The file.
        format: ``"onnx"`` or ``"pt2"``.
        size: Size of the file in bytes.
        parity: One comparison a batch size.
        tolerance: Relative difference up to which the file counts as equal.
    """

    path: str
    format: str
    size: int
    parity: list[Parity]
    tolerance: float

    def tables(self) -> Iterator[Table]:
        """Yield the parity figures."""
        rows = [
            (str(p.batch_size), f"{p.max_difference:.2e}", f"{p.relative_difference:.2e}", f"{self.tolerance:.0e}")
            for p in self.parity
        ]
        columns = ("batch size", "largest difference", "relative difference", "tolerance")
        yield Table(f"Export: {self.path} ({self.format}, {self.size:,} bytes)", columns, rows)


@dataclass(frozen=True)
class Candidate:
    """An activation that could become linear, and what that would bring together.

    Attributes:
        name: Qualified name.
        kind: Class name of the activation.
        neuron_dim: The axis of its neurons.
        entropy: In bits; None where it was not measured.
        before: Qualified names of the linear operators before it.
        behind: Qualified names of the linear operators behind it.
        merges: Pairs of operators that would become one.
        reason: Why none would, or not all that would meet; None otherwise.
    """

    name: str
    kind: str
    neuron_dim: int
    entropy: float | None
    before: tuple[str, ...]
    behind: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    reason: str | None


@dataclass
class CandidateReport(Report):
    """The activations of a model in execution order, and what would merge if each alone were linear.

    Attributes:
        candidates: One a site.
    """

    candidates: list[Candidate]

    def tables(self) -> Iterator[Table]:
        """Yield one table with a row an activation."""
        columns = ("activation", "kind", "entropy [bit]", "before → behind", "would merge")
        note = "names that begin with a dot are beside the activation"
        yield Table(f"Candidates ({note})", columns, [self._row(candidate) for candidate in self.candidates])

    def _row(self, this: Candidate) -> tuple[str, ...]:
        beside = f"{this.name.rpartition('.')[0]}."

        def shown(names: Iterable[str], separator: str) -> str:
            return separator.join(
                f".{name.removeprefix(beside)}" if name.startswith(beside) else name for name in names
            )

        merges = "; ".join(shown(pair, " + ") for pair in this.merges)
        around = f"{shown(this.before, ', ') or '-'} → {shown(this.behind, ', ') or '-'}"
        verdict = "; ".join(part for part in (merges, this.reason and f"not: {this.reason}") if part)
        return (this.name, this.kind, _number(this.entropy), around, verdict)


# What a user does next with `CompressResult.fitted`.
_MODES = "`.fitted`, the model to train on, is in eval mode: call `.fitted.train()` before fine-tuning"


def _costs(
    title: str, costs: Mapping[str, ModelCost], dense: ModelCost, scores: Mapping[str, float | None] | None = None
) -> Table:
    """Return what models cost, one a row, beside the dense network that all of them come from."""
    columns = ["", "depth", "parameters", "MACs", "fewer", "activation memory", "latency [ms]", "faster"]
    rows = []
    for name, cost in {"dense, batch norms folded": dense, **costs}.items():
        row = [
            name, str(cost.depth), f"{cost.parameters:,}", _count(cost.macs), _ratio(dense.macs, cost.macs),
            _bytes(cost.activation_memory), f"{cost.latency.median * 1e3:.3f} ± {cost.latency.spread * 1e3:.3f}",
            "-" if cost is dense else str(speed_up(dense.latency, cost.latency)),
        ]  # fmt: skip
        if scores is not None:
            row.append(_number(scores["dense" if cost is dense else name]))
        rows.append(row)
    return Table(title, [*columns, "score"] if scores is not None else columns, rows)


def _notes(notes: Sequence[str]) -> Iterator[Table]:
    if notes:
        yield Table("Notes", ("",), [(note,) for note in notes])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _with_notes(name: str, *notes: str) -> str:
    told = "; ".join(note for note in notes if note)
    return f"{name} ({told})" if told else name


def _entropy(name: str, this: Round) -> str:
    return f"{this.entropies[name]:.4f} bit" if name in this.entropies else ""


def _reference(this: Round) -> str:
    if this.reference is None:
        return "-"
    return f"{this.reference:.4f} ({f'round {this.reference_round}' if this.reference_round else 'dense'})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "not counted"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _count(count: int | None) -> str:
    return "not counted" if count is None else f"{count:,}"


def _ratio(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{before / after:.2f}×" if after else "-"


def _price(merge: Merge | Fitted | Trial, value: float) -> str:
    return f"{value * 1e6:.1f} µs" if merge.objective == "latency" else f"{value:,.0f} {merge.objective}"
