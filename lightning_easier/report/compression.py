"""What a compression tried, kept and took back."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lightning_easier.report.collapsing import CollapseReport
from lightning_easier.report.costs import ModelCost, costs_table, prices_in_words
from lightning_easier.report.figures import Draw, scores_by_time
from lightning_easier.report.tables import Report, Table, notes_table, number
from lightning_easier.support.timing import Speedup, speed_up


@dataclass
class Trial:
    """A chain, or a whole block, that an operator was tried in the place of.

    Attributes:
        sites: The activations in it.
        operators: Its operators; the name of a block.
        kind: Of the fitted operator, as in :class:`Fitted`; ``"identity"`` or ``"zeros"`` where a block leaves nothing.
        explained: Share of the variance of its output that the operator explains on data held out.
        drift: Share of the variance of the model's outputs that changes if it alone goes.
        price_before: Of the chain or the block, in the unit of the objective.
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


# What a user does next with `CompressResult.fitted`.
_MODES = "`.fitted`, the model to train on, is in eval mode: call `.fitted.train()` before fine-tuning"


@dataclass
class CompressReport(Report):
    """What a compression tried, kept and took back, and what the model costs before and after.

    Attributes:
        trials: What was tried, in order.
        reasons: Activation, or block -> why nothing was tried for it.
        score: Of the model as it was given; None if it was not evaluated.
        before: Cost of the model as it was given, in eval mode.
        dense: The same with its batch norms folded, and its activations back if some were linear.
        exact: The model as it was given, collapsed exactly: what is to be had without a fit.
        after: Cost of the result. All four were timed in turn.
        drift: Share of the variance of the model's outputs on the calibration data that the fits have changed.
        collapse: What the final collapse merged of the fitted model.
        ended: Why nothing more was tried.
        notes: What else there is to know, of the calibration data for example.
        score_after: Of the result; None if it was not evaluated.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        dense_score: Of the dense network; None if it was not evaluated, as where activations of the model were linear.
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
    score_after: float | None = None
    mode: Literal["min", "max"] = "max"
    dense_score: float | None = None

    @property
    def speedup(self) -> Speedup:
        """How many times faster the result is than the dense network with its batch norms folded."""
        return speed_up(self.dense.latency, self.after.latency)

    def panels(self) -> dict[str, tuple[Draw, float]]:
        """Return the score against the measured time, if there is one, and a bar an operator."""
        panels = {}
        if self.score is not None and self.score_after is not None:
            costs = {
                "dense": self.dense, "as given": self.before, "collapsed exactly": self.exact, "compressed": self.after,
            }  # fmt: skip
            points = {
                name: (costs[name].latency.median * 1e3, score)
                for name, score in self._scores().items()
                if score is not None
            }
            panels["score_by_time"] = scores_by_time(
                points, "score", "latency of one call [ms]", higher_is_better=self.mode == "max"
            )
        return panels | self.collapse.panels()

    def tables(self) -> Iterator[Table]:
        """Yield the costs, and what was tried."""
        costs = {"as given": self.before, "collapsed exactly": self.exact, "compressed": self.after}
        title = f"Compression: {self.ended}" if self.ended else "Compression"
        yield costs_table(title, costs, self.dense, self._scores())
        if self.trials:
            yield Table(
                "Tried", ("chain or block", "by", "variance explained", "drift", "price", "score", "verdict"),
                [(" + ".join(t.operators), t.kind, f"{t.explained:.1%}", f"{t.drift:.2%}",
                  prices_in_words(t.price_before, t.price_after, t.objective), number(t.score),
                  "kept" if t.kept else str(t.reason)) for t in self.trials],
            )  # fmt: skip
        if self.reasons:
            yield Table("Not tried", ("activation or block", "reason"), list(self.reasons.items()))
        drift = f"{self.drift:.2%} of the variance of the outputs has changed on the calibration data"
        yield from notes_table([drift, *self.notes, _MODES])

    def _scores(self) -> dict[str, float | None]:
        """Return the score of each model whose cost is known; a collapse alone computes what it is of."""
        return {
            "dense": self.dense_score, "as given": self.score, "collapsed exactly": self.score,
            "compressed": self.score_after,
        }  # fmt: skip
