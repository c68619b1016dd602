"""The rules of a run: which score is good enough, how long a round is, how much is tried next.

They are plain data and pure functions. The loop of the callback and ``compress`` judge by the same ones.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_easier.report import Round
from lightning_easier.support.arguments import check_choice, check_integer, check_non_negative

Restart = Literal["none", "schedule", "optimizer"]
RESTARTS: tuple[Restart, ...] = ("none", "schedule", "optimizer")
# Words in the name of a score that tell whether less or more of it is better, and those that may turn it round.
_LESS = {
    "loss",
    "losses",
    "error",
    "err",
    "mse",
    "rmse",
    "mae",
    "nll",
    "perplexity",
    "ppl",
    "wer",
    "cer",
    "crossentropy",
}
_MORE = {
    "acc",
    "accuracy",
    "auc",
    "auroc",
    "f1",
    "f1score",
    "precision",
    "recall",
    "iou",
    "miou",
    "dice",
    "map",
    "psnr",
}
_TURNED = {"neg", "negative", "minus", "inv", "inverse", "drop", "gap", "delta", "diff", "reduction", "improvement"}
# A fall that float32 can't tell from the tolerance is not beyond it.
_SCORE_RESOLUTION = torch.finfo(torch.float32).eps


def mode_in_name(monitor: str) -> Literal["min", "max"] | None:
    """Return the mode that the name of a score suggests; None if it suggests none, or both.

    Example:
        >>> mode_in_name("val_loss"), mode_in_name("valid/topAcc"), mode_in_name("score"), mode_in_name("neg_loss")
        ('min', 'max', None, None)
    """
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"cross[^a-z]?entropy", "crossentropy", monitor.lower())))
    words |= {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", monitor)}
    less = bool(words & _LESS) or any(word.endswith(("loss", "error")) for word in words)
    more = bool(words & _MORE) or any(word.endswith("accuracy") for word in words)
    if less == more or words & _TURNED or monitor.startswith("1"):  # `1-acc` is an error
        return None
    return "min" if less else "max"


@dataclass(frozen=True)
class Tolerance:
    """How far a score may fall.

    Args:
        amount: By how much, in the score's own unit. A fall that float32 can't tell from it is not beyond it.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).

    Raises:
        TypeError: If the amount is no number.
        ValueError: If it is negative, or the mode another.

    Example:
        >>> Tolerance(0.1).allows(0.8, reference=0.9), Tolerance(0.1).allows(0.7, reference=0.9)
        (True, False)
    """

    amount: float = 0.01
    mode: Literal["min", "max"] = "max"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("min", "max"))
        check_non_negative("tolerance", self.amount)

    def fall(self, score: float, reference: float) -> float:
        """Return by how much a score is worse than a reference; negative if it is better."""
        return (reference - score) * (1 if self.mode == "max" else -1)

    def allows(self, score: float, reference: float) -> bool:
        """Tell whether a score is near enough to a reference, or better; NaN never is."""
        return self.fall(score, reference) <= self._allowed(reference)

    def is_exceeded(self, gain: float, reference: float) -> bool:
        """Tell whether a score that is better than a reference by so much is so by more than the tolerance."""
        return gain > self._allowed(reference)

    def is_better(self, score: float, than: float) -> bool:
        """Tell whether a score is better than another, by however little."""
        return self.fall(score, than) < 0

    def _allowed(self, reference: float) -> float:
        return self.amount + _SCORE_RESOLUTION * abs(reference)


@dataclass(frozen=True)
class Rejections:
    """How much may be taken back before a run is over.

    Args:
        most: How many in a row.

    Raises:
        TypeError: If that is no integer.
        ValueError: If it is below 1.
    """

    most: int = 3

    def __post_init__(self) -> None:
        check_integer("max_rejections", self.most, 1)

    @property
    def allow_others(self) -> bool:
        """Whether something else is tried after the first."""
        return self.most > 1

    def are_too_many(self, in_a_row: int) -> bool:
        """Tell whether a run with so many is over."""
        return in_a_row >= self.most


@dataclass(frozen=True)
class Rounds:
    """How long a round is, how much goes in it, and what it is judged against.

    Args:
        epochs: Training epochs of a round. With 0 the whole run trains the dense network; what goes goes when training
            has ended, one round after another without training in between, each judged on a validation of its own.
        removals: How much is removed at once, activations for example.
        max_removals: How much may be removed in a run, activations for example; no limit by default.
        warmup_epochs: Epochs before the dense round.
        max_rejections: How many rounds in a row may be taken back before the run stops. Below that the next candidate
            is tried; what was taken back is not tried again. By default the run stops at the first.
        reference: What a round is judged against: the dense score, or the best score of any round that was kept, the
            dense one among them. The latter suits a network that goes on learning after its first round.
        restart: What begins anew with every round: nothing, the learning-rate schedules and with them the
            hyperparameters of the optimizers, or the optimizers with their moments too (EASIER).

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range.
    """

    epochs: int = 1
    removals: int = 1
    max_removals: int | None = None
    warmup_epochs: int = 0
    max_rejections: int = 1
    reference: Literal["dense", "best"] = "dense"
    restart: Restart = "none"

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 0)
        check_integer("removals", self.removals, 1)
        check_integer("warmup_epochs", self.warmup_epochs, 0)
        if not self.trains and (self.warmup_epochs or self.restart != "none"):
            raise ValueError(
                f"Expected arguments `warmup_epochs` and `restart` to be left out with epochs=0, but got "
                f"{self.warmup_epochs} and {self.restart!r}: the dense round is the whole run, and none after it trains"
            )
        if self.max_removals is not None:
            check_integer("max_removals", self.max_removals, 1)
        Rejections(self.max_rejections)
        check_choice("reference", self.reference, ("dense", "best"))
        check_choice("restart", self.restart, RESTARTS)

    @property
    def trains(self) -> bool:
        """Whether the network is trained between two removals."""
        return self.epochs > 0


@dataclass(frozen=True)
class Rules:
    """The rules by which rounds are judged.

    Args:
        tolerance: How far the score may fall.
        rounds: What a round is.
    """

    tolerance: Tolerance = Tolerance()
    rounds: Rounds = Rounds()

    @property
    def rejections(self) -> Rejections:
        """How much may be taken back."""
        return Rejections(self.rounds.max_rejections)

    def epochs_of(self, number: int) -> float:
        """Return how many epochs a round takes, the dense one being number 0; inf if it takes the whole run."""
        if not self.rounds.trains:
            return math.inf if number == 0 else 0
        return self.rounds.epochs + (self.rounds.warmup_epochs if number == 0 else 0)

    def judge(self, rounds: Sequence[Round], score: float) -> None:
        """Accept the last round, or not, by its score and that of the dense round, or of the best that was kept."""
        this = rounds[-1]
        this.score_after = score
        if this is rounds[0]:
            this.accepted = True
            return
        this.reference_round, this.reference = self._reference(rounds)
        this.accepted = self.tolerance.allows(score, this.reference)

    def _reference(self, rounds: Sequence[Round]) -> tuple[int, float]:
        """Return which round is the one to compare with, and its score."""
        kept = [
            (number, this.score_after)
            for number, this in enumerate(rounds)
            if this.accepted and this.score_after is not None
        ]
        best = kept[0]
        for each in kept[1:] if self.rounds.reference == "best" else ():
            if self.tolerance.is_better(each[1], best[1]):
                best = each
        return best

    def rise_per_epoch(self, dense_scores: Sequence[float | None]) -> float | None:
        """Return by how much the score got better an epoch at the end of the dense round; None after one score.

        Args:
            dense_scores: The score of each epoch of the dense round; None where it was not logged.
        """
        known = [(epoch, score) for epoch, score in enumerate(dense_scores) if score is not None]
        if len(known) < 2:
            return None
        (before, first), (after, last) = known[-2:]
        return self.tolerance.fall(first, last) / (after - before)

    def is_still_learning(self, rounds: Sequence[Round], dense_scores: Sequence[float | None]) -> bool:
        """Tell whether the dense score still got better by more than the tolerance an epoch when it became final."""
        rise = self.rise_per_epoch(dense_scores)
        return rise is not None and self.tolerance.is_exceeded(rise, rounds[0].score_after or 0.0)

    def is_first_to_overtake(self, rounds: Sequence[Round]) -> bool:
        """Tell whether the last round, as the first, is better than the dense one by more than the tolerance.

        Then the dense network had not learned all that it could, and the next rounds may lose more than the tolerance.
        """
        dense = rounds[0].score_after
        if dense is None:
            return False
        overtaking = [
            this
            for this in rounds[1:]
            if this.score_after is not None
            and self.tolerance.is_exceeded(self.tolerance.fall(dense, this.score_after), dense)
        ]
        return len(overtaking) == 1 and overtaking[0] is rounds[-1]

    def how_many(self, removed: int, eligible: int) -> int:
        """Return how much is removed next, when so much is removed already and so much may be."""
        most = self.rounds.max_removals
        left = eligible if most is None else most - removed
        return max(0, min(self.rounds.removals, left, eligible))
