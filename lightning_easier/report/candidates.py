"""What may be removed, and what that would bring together."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_easier.report.tables import Report, Table, number
from lightning_easier.support.costs import price_in_words


@dataclass(frozen=True)
class Candidate:
    """An activation that could become linear, and what that would bring together.

    Attributes:
        name: Qualified name.
        kind: Class name of the activation.
        neuron_dim: The axis of its neurons.
        entropy: In bits; None where it was not measured.
        before: Qualified names of the linear operators before it.
        after: Qualified names of the linear operators after it.
        merges: Pairs of operators that would become one.
        reason: Why none would, or not all that would meet; None otherwise.
    """

    name: str
    kind: str
    neuron_dim: int
    entropy: float | None
    before: tuple[str, ...]
    after: tuple[str, ...]
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
        columns = ("activation", "kind", "entropy [bit]", "before → after", "would merge")
        note = "names that begin with a dot are beside the activation"
        yield Table(f"Candidates ({note})", columns, [self._row(candidate) for candidate in self.candidates])

    def _row(self, this: Candidate) -> tuple[str, ...]:
        beside = f"{this.name.rpartition('.')[0]}."

        def shown(names: Iterable[str], separator: str) -> str:
            return separator.join(
                f".{name.removeprefix(beside)}" if name.startswith(beside) else name for name in names
            )

        merges = "; ".join(shown(pair, " + ") for pair in this.merges)
        around = f"{shown(this.before, ', ') or '-'} → {shown(this.after, ', ') or '-'}"
        verdict = "; ".join(part for part in (merges, this.reason and f"not: {this.reason}") if part)
        return (this.name, this.kind, number(this.entropy), around, verdict)


@dataclass(frozen=True)
class BlockWay:
    """Something that may take the place of a whole block, and saves something.

    Attributes:
        kind: ``"identity"`` or ``"zeros"`` where nothing is left, else the kind of operator, as in :class:`Fitted`.
        unexplained: Share of the variance of what comes out that it does not explain: of the block, its skip among it;
            of a branch, of the sum that it is added to.
        saving: What it saves, in the unit of the objective.
        price: Of the block, in that unit.
        objective: What savings are measured in.
    """

    kind: str
    unexplained: float
    saving: float
    price: float
    objective: Literal["latency", "macs", "depth"]

    def __str__(self) -> str:
        saved = f"{price_in_words(self.saving, self.objective)}, {self.saving / self.price:.0%}"
        return f"{self.kind} ({self.unexplained:.1%} lost, saves {saved})"


@dataclass(frozen=True)
class BlockCandidate:
    """A block, or a branch of an addition, that could go whole.

    Attributes:
        name: Qualified name.
        kind: Class name of the module.
        inside: Qualified name of the innermost other block that holds it; None for an outermost one.
        ways: What may take its place and saves something.
        chosen: Which of them would; None if none would.
        reason: Why none would, or not all that may; None otherwise.
    """

    name: str
    kind: str
    inside: str | None
    ways: tuple[BlockWay, ...]
    chosen: str | None
    reason: str | None

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "BlockCandidate":
        """Rebuild it from plain data."""
        return cls(**{**plain, "ways": tuple(BlockWay(**way) for way in plain["ways"])})


@dataclass
class FitReport(CandidateReport):
    """The activations of a model, and its blocks, in execution order.

    Attributes:
        candidates: One a site.
        blocks: One a block, an outer one before those in it.
    """

    blocks: list[BlockCandidate]

    def tables(self) -> Iterator[Table]:
        """Yield the table of the activations, and one with a row a block."""
        yield from super().tables()
        columns = ("block", "kind", "inside", "what would take its place", "or", "why not")
        title = "Blocks and branches that may go whole" if self.blocks else "No blocks or branches that may go whole"
        yield Table(title, columns, [self._block_row(each) for each in self.blocks])

    @staticmethod
    def _block_row(this: BlockCandidate) -> tuple[str, ...]:
        chosen = next((str(way) for way in this.ways if way.kind == this.chosen), "-")
        others = ", ".join(str(way) for way in this.ways if way.kind != this.chosen)
        return (this.name, this.kind, this.inside or "-", chosen, others or "-", this.reason or "")
