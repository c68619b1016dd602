"""Logged scores: which of them belong to the structure as it is."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_easier.callbacks import private

REMOVED_KEY = "removed"


class LoggedScores:
    """What of ``trainer.callback_metrics`` belongs to the structure as it is.

    Lightning keeps the last value of everything that was logged. After an operation those are the scores of another
    model: they become NaN, which ModelCheckpoint ranks last, until they are logged again.
    """

    def __init__(self) -> None:
        self._unknown = torch.tensor(math.nan)
        self._marked: dict[str, Any] = {}  # since when -> a score as it was then
        self._waiting: list[EarlyStopping] = []  # those that wait for a score

    def get(self, trainer: Trainer, name: str) -> float | None:
        """Return a score; None if it was not logged for this structure."""
        value = trainer.callback_metrics.get(name)
        return None if value is None or value is self._unknown else float(value)

    def all(self, trainer: Trainer) -> dict[str, float]:
        """Return all scores that were logged for this structure."""
        return {name: float(v) for name, v in trainer.callback_metrics.items() if v is not self._unknown}

    def forget(self, trainer: Trainer) -> None:
        """Mark all scores as those of another structure."""
        scores = trainer.callback_metrics  # Lightning computes them anew each time that it is asked
        scores.update(dict.fromkeys(scores, self._unknown))

    def have_early_stopping_wait(self, trainer: Trainer) -> None:
        """Have every EarlyStopping pass over the checks of a score that is not known for this structure yet."""
        self.release()
        for callback in trainer.early_stopping_callbacks:
            assert isinstance(callback, EarlyStopping)
            private.replace_stopping_check(callback, self._check_what_is_known)
            self._waiting.append(callback)

    def _check_what_is_known(self, callback: EarlyStopping, trainer: Trainer) -> None:
        if trainer.callback_metrics.get(callback.monitor) is not self._unknown:
            private.check_stopping(callback, trainer)

    def release(self) -> None:
        """Have every EarlyStopping check as usual."""
        for callback in self._waiting:
            private.restore_stopping_check(callback)
        self._waiting = []

    def put(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        """Set scores that are known."""
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})

    def mark(self, trainer: Trainer, name: str, since: Literal["validation", "epoch"]) -> None:
        """Remember a score at the start of a validation, or of an epoch."""
        self._marked[since] = trainer.callback_metrics.get(name)

    def is_new(self, trainer: Trainer, name: str, since: Literal["validation", "epoch"]) -> bool:
        """Tell whether a score was logged since then: Lightning puts another tensor there."""
        return trainer.callback_metrics.get(name) is not self._marked.get(since)
