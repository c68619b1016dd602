"""The user's own recipe around the rounds: optimizers and schedules that begin anew, patience."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.optim import Optimizer

from lightning_easier.pruning.rules import Restart


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
                f"anew. Pass Rounds(restart='none'), or all groups from the start."
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
