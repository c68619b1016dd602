"""The user's own recipe around the rounds: schedules that begin anew, scores that belong to a structure, patience."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.optim import Optimizer

from lightning_easier.callbacks import private

Restart = Literal["none", "schedule", "optimizer"]
RESTARTS: tuple[Restart, ...] = ("none", "schedule", "optimizer")


class InitialRecipe:
    """Optimizers and schedules as ``configure_optimizers`` made them, to begin anew with.

    Args:
        trainer: A Trainer whose optimizers were made and not stepped yet, nor loaded from a checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._groups = [[_hyperparameters(group) for group in each.param_groups] for each in trainer.optimizers]
        self._schedules = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]

    def restart(self, trainer: Trainer, what: Restart) -> None:
        """Begin anew, in place: parameters stay where they are, and whoever holds an optimizer holds it still.

        Args:
            trainer: The Trainer.
            what: ``"schedule"``: the schedulers, and the hyperparameters in the parameter groups. ``"optimizer"``: the
                moments too. ``"none"``: nothing.
        """
        if what == "none":
            return
        groups_now = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if groups_now != [len(groups) for groups in self._groups]:
            raise MisconfigurationException(
                f"Expected the optimizers to keep the parameter groups that `configure_optimizers` gave them, but got "
                f"{groups_now} groups instead of {[len(groups) for groups in self._groups]}, so that they can't begin "
                f"anew. Pass restart='none', or all groups from the start."
            )
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, initial in zip(optimizer.param_groups, groups, strict=True):
                _put(group, initial)
            if what == "optimizer":
                optimizer.state.clear()
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))


def plateaus(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the state of the schedules that follow a score: Lightning steps them after a checkpoint was saved."""
    return [
        {
            "number": number,
            "schedule": deepcopy(config.scheduler.state_dict()),
            "rates": [float(group["lr"]) for group in config.scheduler.optimizer.param_groups],
        }
        for number, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
    ]


def put_plateaus(trainer: Trainer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Bring back what :func:`plateaus` returned."""
    for state in saved:
        scheduler = trainer.lr_scheduler_configs[state["number"]].scheduler
        scheduler.load_state_dict(deepcopy(dict(state["schedule"])))
        for group, rate in zip(scheduler.optimizer.param_groups, state["rates"], strict=True):
            _put(group, {"lr": torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate})


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}


def _put(group: dict[str, Any], initial: dict[str, Any]) -> None:
    """Set hyperparameters; a learning rate that is a tensor, as compiled optimizers have it, stays that tensor."""
    for key, value in initial.items():
        if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
            group[key].copy_(value)
        else:
            group[key] = deepcopy(value)


def clear_gradients(optimizers: list[Optimizer]) -> None:
    """Forget gradients that were accumulated for weights that are gone."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def reset_patience(trainer: Trainer) -> None:
    """Have every EarlyStopping compare with the structure as it is, from its first score on.

    Otherwise the dense score would be the one to beat, and patience would run out however well the pruned model trains.
    """
    for callback in trainer.early_stopping_callbacks:
        assert isinstance(callback, EarlyStopping)
        callback.wait_count = 0
        callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


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
        for name in trainer.callback_metrics:
            trainer.callback_metrics[name] = self._unknown

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
        """Have every EarlyStopping check as ever."""
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
