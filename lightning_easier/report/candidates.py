"""What may be removed, and what that would bring together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_easier.report.tables import Report, Table, number


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
