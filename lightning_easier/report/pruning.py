"""What a pruning run did, round by round."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lightning_easier.report.tables import Report, Table
from lightning_easier.report.tables import number as written


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
        reason: Why it was taken back, or kept, without a judgement; None otherwise.
        counted: How much of it is counted as removed; as many as were chosen by default.
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
    counted: int | None = None

    @property
    def number_removed(self) -> int:
        """How much was removed, where that is counted."""
        return len(self.chosen) if self.counted is None else self.counted


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
        verdict = "kept" if this.accepted else f"beyond the tolerance {tolerance:g}"
        verdict = this.reason or verdict
        return f"Round {number}: removed {what or 'nothing (dense)'}; {score}: {verdict}."

    def _table(self, numbers: Iterable[int]) -> Table:
        scores = f"{self.monitor} before", f"{self.monitor} after", "judged against"
        columns = ("round", "removed", "entropy [bit]", *scores, "verdict")
        return Table("Pruning", columns, [self._row(number, self.rounds[number]) for number in numbers])

    def _row(self, number: int, this: Round) -> tuple[str, ...]:
        return (
            str(number),
            ", ".join(_with_notes(name, *this.notes.get(name, ())) for name in this.chosen) or "(dense)",
            ", ".join(written(this.entropies.get(name)) for name in this.chosen) or "-",
            written(this.score_before),
            written(this.score_after),
            _reference(this),
            {True: "kept", False: "taken back", None: "not judged"}[this.accepted]
            + (f": {this.reason}" if this.reason else ""),
        )


def _with_notes(name: str, *notes: str) -> str:
    told = "; ".join(note for note in notes if note)
    return f"{name} ({told})" if told else name


def _entropy(name: str, this: Round) -> str:
    return f"{this.entropies[name]:.4f} bit" if name in this.entropies else ""


def _reference(this: Round) -> str:
    if this.reference is None:
        return "-"
    return f"{this.reference:.4f} ({f'round {this.reference_round}' if this.reference_round else 'dense'})"
