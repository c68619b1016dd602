"""The rules of a pruning run: how long a round is, which score is good enough, how much is tried next.

Nothing here knows a Trainer or a model.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_easier.callbacks.state import PruningState
from lightning_easier.support.arguments import check_choice, check_integer, check_non_negative

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
class Policy:
    """The rules of a run; the arguments are those of :class:`~lightning_easier.EntropyPruningCallback`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range.
    """

    mode: Literal["min", "max"] = "max"
    tolerance: float = 0.01
    epochs_per_round: int = 1
    removals_per_round: int = 1
    max_removals: int | None = None
    warmup_epochs: int = 0
    on_reject: Literal["stop", "next"] = "stop"
    max_rejections: int = 3
    reference: Literal["dense", "best"] = "dense"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("min", "max"))
        check_non_negative("tolerance", self.tolerance)
        check_integer("epochs_per_round", self.epochs_per_round, 1)
        check_integer("removals_per_round", self.removals_per_round, 1)
        check_integer("warmup_epochs", self.warmup_epochs, 0)
        if self.max_removals is not None:
            check_integer("max_removals", self.max_removals, 1)
        check_choice("on_reject", self.on_reject, ("stop", "next"))
        check_integer("max_rejections", self.max_rejections, 1)
        check_choice("reference", self.reference, ("dense", "best"))

    def is_better(self, score: float, than: float) -> bool:
        """Tell whether a score is better than another."""
        return self._fall(than, score) < 0

    def epochs_of_round(self, state: PruningState) -> int:
        """Return how many epochs the round takes that goes on now."""
        return self.epochs_per_round + (self.warmup_epochs if len(state.rounds) == 1 else 0)

    def judge(self, state: PruningState, score: float) -> None:
        """Accept the last round, or not, by its score and that of the dense round, or of the best that was kept."""
        this = state.rounds[-1]
        this.score_after = score
        if this is state.rounds[0]:
            this.accepted = True
            return
        this.reference_round, this.reference = self._reference(state)
        this.accepted = self._fall(this.reference, score) <= self.tolerance + self._resolution(this.reference)

    def _reference(self, state: PruningState) -> tuple[int, float]:
        """Return which round is the one to compare with, and its score."""
        kept = [
            (number, this.score_after)
            for number, this in enumerate(state.rounds)
            if this.accepted and this.score_after is not None
        ]
        best = kept[0]
        for each in kept[1:] if self.reference == "best" else ():
            if self.is_better(each[1], best[1]):
                best = each
        return best

    def rise_per_epoch(self, state: PruningState) -> float | None:
        """Return by how much the score got better an epoch at the end of the dense round; None after one score."""
        known = [(epoch, score) for epoch, score in enumerate(state.dense_scores) if score is not None]
        if len(known) < 2:
            return None
        (before, first), (after, last) = known[-2:]
        return self._fall(last, first) / (after - before)

    def is_still_learning(self, state: PruningState) -> bool:
        """Tell whether the dense score still got better by more than the tolerance an epoch when it became final."""
        rise = self.rise_per_epoch(state)
        return rise is not None and rise > self.tolerance + self._resolution(state.rounds[0].score_after or 0.0)

    def is_first_to_overtake(self, state: PruningState) -> bool:
        """Tell whether the last round, as the first, is better than the dense one by more than the tolerance.

        Then the dense network had not learned all that it could, and the next rounds may lose more than the tolerance.
        """
        dense = state.rounds[0].score_after
        if dense is None:
            return False
        allowed = self.tolerance + self._resolution(dense)
        overtaking = [
            this
            for this in state.rounds[1:]
            if this.score_after is not None and self._fall(this.score_after, dense) > allowed
        ]
        return len(overtaking) == 1 and overtaking[0] is state.rounds[-1]

    def settle(self, state: PruningState) -> bool:
        """Take note of the last round's verdict; return whether something else may be removed."""
        this = state.rounds[-1]
        if this.accepted:
            state.rejections = 0
            state.attained_of_last_good = state.attained or state.attained_of_last_good
            if state.entropies is None or state.ranked is None:  # the end of the run came before they were measured
                return False
            state.entropies_of_last_good, state.affines_of_last_good = dict(state.entropies), dict(state.affines)
            state.ranked_of_last_good = state.ranked
            return True
        state.rejections += 1
        state.rejected += this.removed
        return self.on_reject == "next" and state.rejections < self.max_rejections

    def eligible(self, state: PruningState, ranks: Mapping[str, float], candidates: Container[str]) -> dict[str, float]:
        """Return the ranks of the activations that may become linear next."""
        return {name: value for name, value in ranks.items() if name in candidates and name not in state.rejected}

    def how_many(self, removed: int, eligible: int) -> int:
        """Return how many activations become linear next, when so many are linear and so many may become so."""
        left = eligible if self.max_removals is None else self.max_removals - removed
        return max(0, min(self.removals_per_round, left, eligible))

    @staticmethod
    def _resolution(score: float) -> float:
        return _SCORE_RESOLUTION * abs(score)

    def _fall(self, before: float, after: float) -> float:
        return (before - after) * (1 if self.mode == "max" else -1)
