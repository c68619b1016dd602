"""What has to hold around the callback: the strategy, the other callbacks, the data, compiled code."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import LBFGS
from torch.optim.swa_utils import AveragedModel

from lightning_easier.callbacks import private
from lightning_easier.pruning.methods import Method
from lightning_easier.sites.activations import match_names
from lightning_easier.sites.rectifiers import FunctionalPReLU
from lightning_easier.structure.checkpoint import will_restore_structure

# Where a validation loader does not tell its length.
_BATCHES_OF_ENDLESS_LOADERS = 16


def check(
    trainer: Trainer,
    candidates: Mapping[str, nn.Module],
    on: str,
    dirpath: str | Path | None,
    *,
    only_validation: bool = False,
) -> None:
    """Refuse what pruning does not go with, before anything is changed.

    Args:
        trainer: The Trainer, before it starts.
        candidates: Name -> module of the activations that may become linear.
        on: Which batches the entropy is measured on.
        dirpath: Folder of the rounds' checkpoints.
        only_validation: Whether it can't be measured on training batches.

    Raises:
        MisconfigurationException: With the reason and the remedy.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise MisconfigurationException(
            "Pruning does not support FSDPStrategy, which wraps modules so that an activation can't be "
            "replaced by its name. Use ModelParallelStrategy (FSDP2), DDP or one device."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            "Pruning does not support DeepSpeedStrategy, whose engine keeps the weights and moments "
            "that a rejected round would have to bring back. Use ModelParallelStrategy (FSDP2), DDP or one device."
        )
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise MisconfigurationException(
            "Pruning does not go with AsyncCheckpointIO: it goes back to checkpoints that have to be "
            "written by then. Use the checkpoint plugin that it wraps."
        )
    if not trainer.lightning_module.strict_loading and not will_restore_structure(trainer.lightning_module):
        raise MisconfigurationException(
            "Pruning does not go with `strict_loading=False`, by which a pruned checkpoint would load into the "
            "unpruned model without a word. Call `lightning_easier.restore_structure_on_load(self)` at the end of the "
            "module's `__init__`, which brings the structure with the weights."
        )
    _check_parameters(trainer, candidates)
    averaged = [name for name, part in trainer.lightning_module.named_modules() if isinstance(part, AveragedModel)]
    if averaged:
        raise MisconfigurationException(
            f"Pruning does not go with the averaged model `{averaged[0]}` (torch.optim.swa_utils), a "
            f"second model that would stay unpruned. Prune without it, and average afterwards."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"Pruning does not go with {type(callback).__name__}, which adds parameter groups while "
                f"training goes on: a rejected round could not bring the optimizer back. Give the optimizer all "
                f"groups from the start, and set their learning rates."
            )
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise MisconfigurationException(
                f"Pruning does not go with {type(callback).__name__}, which keeps a second model "
                f"that would stay unpruned. Remove one of the two."
            )
    if private.spawns_or_forks(trainer) and not will_restore_structure(trainer.lightning_module):
        raise MisconfigurationException(
            "A strategy that spawns or forks processes brings the pruned weights back into a model that is not pruned. "
            "Call `lightning_easier.restore_structure_on_load(model)` before `trainer.fit(model)`, or use "
            "strategy='ddp' in a script, or torchrun."
        )
    if dirpath is not None and Path(dirpath).exists() and not Path(dirpath).is_dir():
        raise MisconfigurationException(f"Expected argument `dirpath` to be a folder, but {dirpath} is a file")
    if on == "validation" and not trainer.enable_validation:
        raise MisconfigurationException(
            f"Pruning measures on validation batches, but the run has none (limit_val_batches="
            f"{trainer.limit_val_batches}). Add a validation loader and step"
            + ("." if only_validation else ", or pass Measuring(on='training').")
        )


def _check_parameters(trainer: Trainer, candidates: Mapping[str, nn.Module]) -> None:
    """Refuse activations whose parameters can't leave the model under this strategy."""
    shards = isinstance(trainer.strategy, ModelParallelStrategy)
    if trainer.world_size == 1 and not shards:
        return
    borrowed = [name for name, module in candidates.items() if isinstance(module, FunctionalPReLU)]
    if borrowed:
        raise MisconfigurationException(
            f"Pruning can't remove {borrowed} under {trainer.world_size} processes: their slope is a "
            f"parameter of another module, which the strategy would wait for. Pass them as `exclude`, or give each "
            f"call an nn.PReLU of its own."
        )
    owned = [name for name, module in candidates.items() if next(module.parameters(), None) is not None]
    if owned and shards:
        raise MisconfigurationException(
            f"Pruning can't remove {owned} under {type(trainer.strategy).__name__}: they have "
            f"parameters, which are sharded with those of other modules. Pass them as `exclude`."
        )


def check_length(trainer: Trainer, pl_module: LightningModule, epochs: int) -> bool:
    """Refuse a run that is over before its first round.

    Args:
        trainer: The Trainer, at the start of training, when its batches are known.
        pl_module: The model.
        epochs: How many the first round takes.

    Returns:
        Whether there is time for anything after it.

    Raises:
        MisconfigurationException: If the run is shorter.
    """
    every = trainer.check_val_every_n_epoch if trainer.enable_validation else 1
    if every is not None:  # a round ends with a validation
        epochs = math.ceil((trainer.current_epoch + epochs) / every) * every - trainer.current_epoch
    elif math.isfinite(trainer.val_check_batch or math.inf) and math.isfinite(trainer.num_training_batches):
        while not _is_validated(trainer, trainer.current_epoch + epochs - 1):
            epochs += 1
    longest = trainer.max_epochs
    if longest is not None and longest >= 0 and longest - trainer.current_epoch < epochs:
        raise MisconfigurationException(
            f"Expected the Trainer's `max_epochs` to leave time for a round of pruning, {epochs} epochs "
            f"with the warmup and the validation at its end, but got {longest}, at epoch {trainer.current_epoch}. "
            f"Raise it, or lower `warmup_epochs` or `epochs` of the rounds, or `check_val_every_n_epoch`."
        )
    goes_on = longest is None or longest < 0 or longest - trainer.current_epoch > epochs
    if trainer.max_steps < 0 or not pl_module.automatic_optimization or trainer.num_training_batches == math.inf:
        return goes_on
    steps = sum(
        math.ceil(trainer.num_training_batches / _accumulation(trainer, trainer.current_epoch + epoch))
        for epoch in range(epochs)
    )
    if trainer.max_steps - trainer.global_step < steps:
        raise MisconfigurationException(
            f"Expected the Trainer's `max_steps` to leave time for a round of pruning, {epochs} epochs "
            f"or {steps} steps with the warmup, but got {trainer.max_steps}, at step {trainer.global_step}. Raise it, "
            f"or lower `warmup_epochs` or `epochs` of the rounds."
        )
    return goes_on and trainer.max_steps - trainer.global_step > steps


def _is_validated(trainer: Trainer, epoch: int) -> bool:
    """Tell whether a validation every so many batches, counted over all epochs, falls into an epoch."""
    batches, interval = int(trainer.num_training_batches), int(trainer.val_check_batch)  # type: ignore[arg-type]
    return (epoch + 1) * batches // interval > epoch * batches // interval


def _accumulation(trainer: Trainer, epoch: int) -> int:
    """Return how many batches a step takes in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def check_names(
    model: str, method: Method, known: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    """Return what may be removed.

    Args:
        model: Name of the model's class.
        method: The method.
        known: All that the method removes, what was removed among it.
        include: Name globs of what may be removed.
        exclude: Name globs of what may not.

    Raises:
        MisconfigurationException: If there is nothing, a glob matches nothing, or nothing may be removed.
    """
    if not known:
        raise MisconfigurationException(
            f"Expected {model} {method.wanted}, for {type(method).__name__}, but found none."
        )
    try:
        chosen = match_names(known, include, exclude)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if not chosen:
        raise MisconfigurationException(
            f"Expected arguments `include` {include} and `exclude` {exclude} to leave something to prune, but they "
            f"leave none of {known}"
        )
    return chosen


def check_axes(sites: Sequence[str], neuron_dim: Mapping[str, int]) -> None:
    """Refuse an axis for an activation that is not there.

    Args:
        sites: All activations, those that are linear among them.
        neuron_dim: Axis of the neurons by name glob.

    Raises:
        MisconfigurationException: If a glob matches none.
    """
    for glob in neuron_dim:
        if not any(fnmatchcase(name, glob) for name in sites):
            raise MisconfigurationException(
                f"Expected argument `neuron_dim` to hold globs that match activations, but {glob!r} matches none of "
                f"{sites}"
            )


def check_validation_ran(trainer: Trainer) -> None:
    """Refuse an epoch at whose end a validation was due that ran on nothing.

    Raises:
        MisconfigurationException: If so.
    """
    every = trainer.check_val_every_n_epoch
    if every is not None and (trainer.current_epoch + 1) % every == 0 and not any(trainer.num_val_batches):
        raise MisconfigurationException(
            f"Pruning measures on validation batches, but validation in epoch {trainer.current_epoch} "
            f"ran none: the validation loader yielded nothing. Check its dataset, or pass Measuring(on='training')."
        )


def check_there_was_training(trainer: Trainer) -> None:
    """Refuse a fit in which the training loader has yielded nothing.

    Raises:
        MisconfigurationException: If so.
    """
    if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0 and trainer.max_epochs:
        raise MisconfigurationException(
            "Pruning needs training batches, but the training loader yielded none. Check its dataset and batch size "
            "(`drop_last` drops an incomplete batch)."
        )


def check_monitor(trainer: Trainer, monitor: str, score: float | None) -> None:
    """Refuse a score that is not logged; every process has to call this, rank 0 tells.

    Args:
        trainer: The Trainer, at the end of an epoch.
        monitor: Name of the score.
        score: Its value, if it is known.

    Raises:
        MisconfigurationException: If there is none.
    """
    if not trainer.strategy.broadcast(score is not None or monitor in trainer.callback_metrics):
        raise MisconfigurationException(
            f"Expected argument `monitor` to be a logged score, but {monitor!r} is not among "
            f"{sorted(trainer.callback_metrics)}. Log it with `self.log({monitor!r}, ...)` in the validation step."
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers that can't begin anew, or let parameters go.

    Raises:
        MisconfigurationException: If there is a ZeroRedundancyOptimizer.
    """
    kinds = {type(optimizer).__name__ for optimizer in trainer.optimizers}
    if "ZeroRedundancyOptimizer" in kinds:  # its module is not there in every build of torch
        raise MisconfigurationException(
            "Pruning does not go with ZeroRedundancyOptimizer, which keeps the moments in another "
            "optimizer, a part on each process. Use that optimizer itself."
        )


def validation_batches(trainer: Trainer) -> int:
    """Return how many batches a validation of this process has; a guess where its loaders have no length."""
    return sum(int(n) if math.isfinite(n) else _BATCHES_OF_ENDLESS_LOADERS for n in trainer.num_val_batches)


def check_strategy_lets_parameters_change(trainer: Trainer, wanted: tuple[str, str] | None) -> None:
    """Refuse what changes parameters under a strategy that shards them.

    Args:
        trainer: The Trainer.
        wanted: What would be done to parameters, and the remedy; None if nothing is.

    Raises:
        MisconfigurationException: If it does.
    """
    if wanted is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    what, remedy = wanted
    raise MisconfigurationException(
        f"Pruning can't {what} under {type(trainer.strategy).__name__}, which has sharded the "
        f"parameters before. {remedy}."
    )


def can_tell_what_merges(trainer: Trainer) -> bool:
    """Tell whether the operators are whole on this process."""
    return not isinstance(trainer.strategy, ModelParallelStrategy)


def check_network_can_be_priced(trainer: Trainer, with_target: bool) -> None:
    """Refuse to price a network that is sharded, or that no validation runs.

    Args:
        trainer: The Trainer.
        with_target: Whether the run has a target, or the costs of each round are asked for.

    Raises:
        MisconfigurationException: With the reason and the remedy.
    """
    if not can_tell_what_merges(trainer):
        raise MisconfigurationException(
            f"Pruning can't tell what merges, or price it, under {type(trainer.strategy).__name__}, which shards the "
            f"operators. Pass no `target`, no `costs` of Measuring and a method that prices nothing "
            f"(Order(gain=None, mergeable_only=False)), or use DDP."
        )
    if with_target and not trainer.enable_validation:
        raise MisconfigurationException(
            f"Pruning prices the network on validation batches, but the run has none (limit_val_batches="
            f"{trainer.limit_val_batches}). Add a validation loader and step, or leave out `target` and "
            f"`costs` of Measuring."
        )


def check_optimizers_let_parameters_change(
    trainer: Trainer, pl_module: LightningModule, names: Sequence[str], with_others: bool
) -> None:
    """Refuse that a parameter leaves or joins an optimizer that can't have that.

    Args:
        trainer: The Trainer.
        pl_module: The model.
        names: What is about to become linear.
        with_others: Whether other parameters than those of these activations leave or join.

    Raises:
        MisconfigurationException: If an activation among them has a parameter, or others leave or join, and an
            optimizer is LBFGS.
    """
    has_parameters = {name: next(pl_module.get_submodule(name).parameters(), None) is not None for name in names}
    owners = [name for name in names if with_others or has_parameters[name]]
    if owners and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"Pruning can't make {owners} linear, with which parameters leave or join LBFGS, which "
            f"keeps all parameters as one vector. Pass them as `exclude`, or use another optimizer."
        )


def epoch_end_has_begun(trainer: Trainer) -> bool:
    """Tell whether callbacks are being told that an epoch has ended."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed > progress.completed)


def check_early_stopping(trainer: Trainer, pl_module: LightningModule) -> None:
    """Have EarlyStopping look at the end of an epoch that Lightning skips when it resumes after its last batch."""
    for callback in trainer.early_stopping_callbacks:
        assert isinstance(callback, EarlyStopping)
        if callback.monitor in trainer.callback_metrics:  # else that is lost
            callback.on_train_epoch_end(trainer, pl_module)


def ends_inside_epoch(trainer: Trainer) -> bool:
    """Tell whether the run ends before the epoch does; a loader may end earlier than its last batch was expected."""
    out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
    return (trainer.should_stop or out_of_steps) and not trainer.is_last_batch


def batches_trained(trainer: Trainer) -> int:
    """Return the number of the last training batch, counted over all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def validation_is_due(trainer: Trainer, validated_at: int) -> bool:
    """Tell whether a validation follows the last training batch and is not over yet.

    Lightning does not run it any more when it resumes from a checkpoint that was saved in between.

    Args:
        trainer: The Trainer, in the middle of a fit.
        validated_at: The training batch before the last validation that is over, counted over all epochs.
    """
    loop, every = trainer.fit_loop.epoch_loop, trainer.check_val_every_n_epoch
    progress: Any = loop.batch_progress.current
    seen = loop.total_batch_idx
    if seen < 0 or seen == validated_at or not trainer.enable_validation:
        return False
    if progress.processed < progress.ready:  # it is trained on now
        return False
    if every is not None and (trainer.current_epoch + 1) % every != 0:
        return False
    interval = trainer.val_check_batch
    if interval is None:  # by the clock
        return False
    if interval == float("inf"):  # of a loader without a length
        return trainer.is_last_batch
    return ((seen if every is None else loop.batch_idx) + 1) % interval == 0


def run_validation(trainer: Trainer, epochs_ago: int) -> None:
    """Run a validation before a fit goes on, as the fit loop would have run it.

    Args:
        trainer: The Trainer, at the start of training.
        epochs_ago: How many epochs further the Trainer is than it was then.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.completed -= epochs_ago
    progress.processed -= epochs_ago
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    progress.completed += epochs_ago
    progress.processed += epochs_ago
    private.mark_validation_as_not_run(trainer)


def is_compiled(pl_module: LightningModule) -> bool:
    """Tell whether the module, a part of it, a method, or a function that it may call is compiled."""
    if private.something_was_compiled():
        return True
    modules = list(pl_module.modules())
    owners = [*modules, *dict.fromkeys(map(type, modules))]
    called = filter(callable, (value for owner in owners for value in vars(owner).values()))
    return any(map(private.is_compiled_module, modules)) or any(map(private.is_compiled_function, called))


def forget_compiled_code(pl_module: LightningModule) -> None:
    """Have compiled code made anew: it neither sees hooks that were added since, nor misses those that are gone."""
    if is_compiled(pl_module):
        private.forget_compiled()
