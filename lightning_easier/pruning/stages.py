"""The stages of a compression, and how much of its time each may take."""

import math
from collections.abc import Mapping
from time import monotonic

# What a compression does, and about how much of its time that takes; with a limit, when a stage has to be over.
PREPARING, SEARCHING, TRYING = "Preparing", "Looking for operators", "Trying operators"
TIMING, REFITTING, FINETUNING = "Timing the result", "Refitting what stays", "Fine-tuning"
STAGES = {PREPARING: 0.1, SEARCHING: 0.4, TRYING: 0.3, TIMING: 0.1, REFITTING: 0.1}
STAGES_WITH_FINETUNING = {PREPARING: 0.1, SEARCHING: 0.3, TRYING: 0.2, TIMING: 0.1, REFITTING: 0.1, FINETUNING: 0.2}


class Clock:
    """Tells how much of the time that a compression may take is left, for the stage that it is in.

    Args:
        minutes: How many it may take; None for no limit.
        stages: Name of each stage -> its share of the time, in order.
    """

    def __init__(self, minutes: float | None, stages: Mapping[str, float] = STAGES) -> None:
        self._stages = stages
        self._begin = monotonic()
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._end = self._seconds

    def begin(self, stage: str) -> None:
        """Begin a stage."""
        shares = list(self._stages.values())[: list(self._stages).index(stage) + 1]
        self._end = sum(shares) * self._seconds

    def left(self) -> float:
        """Return how many seconds are left for the stage."""
        return max(0.0, self._begin + self._end - monotonic())

    def is_over(self) -> bool:
        """Tell whether the time for the stage has gone."""
        return self.left() <= 0
