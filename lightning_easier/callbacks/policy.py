"""The rules of a pruning run: how long a round is, which score is good enough, how much is tried next.

Nothing here knows a Trainer or a model.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_easier.arguments import check_choice, check_integer, check_non_negative
from lightning_easier.callbacks.state import PruningState

# A fall that float32 can't tell from the tolerance is not beyond it.
_SCORE_RESOLUTION = torch.finfo(torch.float32).eps


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

    def is_better(self, score: float, than: float) -> bool:
        """Tell whether a score is better than another."""
        return self._fall(than, score) < 0

    def epochs_of_round(self, state: PruningState) -> int:
        """Return how many epochs the round takes that goes on now."""
        return self.epochs_per_round + (self.warmup_epochs if len(state.rounds) == 1 else 0)

    def judge(self, state: PruningState, score: float) -> None:
        """Accept the last round, or not, by its score and that of the dense one."""
        dense, this = state.rounds[0], state.rounds[-1]
        this.score_after = score
        if this is dense:
            this.accepted = True
        else:
            assert dense.score_after is not None
            allowed = self.tolerance + _SCORE_RESOLUTION * abs(dense.score_after)
            this.accepted = self._fall(dense.score_after, score) <= allowed

    def settle(self, state: PruningState) -> bool:
        """Take note of the last round's verdict; return whether something else may be removed."""
        this = state.rounds[-1]
        if this.accepted:
            state.rejections = 0
            if state.entropies is None or state.ranked is None:  # the end of the run came before they were measured
                return False
            state.entropies_of_last_good, state.affines_of_last_good = dict(state.entropies), dict(state.affines)
            state.ranked_of_last_good = state.ranked
            state.attained_of_last_good = state.attained or state.attained_of_last_good
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

    def _fall(self, before: float, after: float) -> float:
        return (before - after) * (1 if self.mode == "max" else -1)
