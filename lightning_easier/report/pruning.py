"""What a pruning run did, round by round."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_easier.report.figures import Draw, curves_of_entropy, map_of_rounds, scores_by_removals, scores_by_time
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
        measured: Epoch -> name -> entropy in bits, of all activations that were not linear in it, in the order of the
            network: as measured last in that epoch.
        costs: What the collapsed network costs at its end, where that was asked for: ``latency`` and ``dense_latency``,
            in seconds, measured in turn, ``speedup``, ``depth`` and ``dense_depth``.
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
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

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
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        order: Names of the activations in the order of the network, as far as it is known.
    """

    monitor: str
    rounds: list[Round] = field(default_factory=list)
    mode: Literal["min", "max"] = "max"
    order: list[str] = field(default_factory=list)

    def tables(self) -> Iterator[Table]:
        """Yield one table with a row a round."""
        yield self._table(range(len(self.rounds)))

    def panels(self) -> dict[str, tuple[Draw, float]]:
        """Return the entropies over the epochs and at the ends of rounds, the score against removals and time."""
        panels, names = {}, self._names()
        if names:
            begins = {number: this.epoch - 0.5 for number, this in enumerate(self.rounds)}
            linear = {name: max(at) for name in self._linear() if (at := self._curve(name))}
            panels["entropies"] = curves_of_entropy(
                {name: self._curve(name) for name in names}, begins, linear, "epoch"
            )
            ends = [this.measured[max(this.measured)] if this.measured else {} for this in self.rounds]
            taken_back = [this.accepted is False for this in self.rounds]
            panels["heat_map"] = map_of_rounds(
                {name: [end.get(name) for end in ends] for name in names},
                ["dense", *map(str, range(1, len(self.rounds)))], taken_back,
            )  # fmt: skip
        points = self.scores_by_removals()
        if points:
            panels["score_by_removed"] = scores_by_removals(points, self.monitor)
        timed = {
            "dense" if number == 0 else f"round {number}": (1e3 * this.costs["latency"], this.score_after)
            for number, this in enumerate(self._with_costs())
            if this.score_after is not None and "latency" in this.costs
        }
        if len(timed) > 1:
            panels["score_by_latency"] = scores_by_time(
                timed, self.monitor, "latency of the collapsed network [ms]", higher_is_better=self.mode == "max"
            )
        return panels

    def scores_by_removals(self) -> list[tuple[int, float, bool]]:
        """Return how much was removed in each round that has a score, the score, and whether it was kept."""
        removed, points = 0, []
        for this in self.rounds:
            if this.score_after is not None:
                points.append((removed + this.number_removed, this.score_after, this.accepted is not False))
            removed += 0 if this.accepted is False else this.number_removed
        return points

    def _with_costs(self) -> list[Round]:
        """The rounds; the dense one with the costs that others were measured beside."""
        found = next((this.costs for this in self.rounds if "dense_latency" in this.costs), None)
        if found is None or self.rounds[0].costs:
            return self.rounds
        dense, *others = self.rounds
        return [replace(dense, costs={"latency": found["dense_latency"], "depth": found["dense_depth"]}), *others]

    def _names(self) -> list[str]:
        seen = dict.fromkeys(name for this in self.rounds for each in this.measured.values() for name in each)
        known = [name for name in self.order if name in seen]
        return [*known, *(name for name in seen if name not in known)]

    def _curve(self, name: str) -> dict[float, float]:
        return {
            float(epoch): each[name]
            for this in self.rounds for epoch, each in this.measured.items() if name in each
        }  # fmt: skip

    def _linear(self) -> list[str]:
        return [name for this in self.rounds if this.accepted is not False for name in this.removed]

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
