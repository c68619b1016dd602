"""Operations on a model inside a Trainer: optimizers, wrapper and the other processes follow.

After each operation the optimizers hold exactly the live parameters, a wrapper that keeps a list of them is made anew,
and all processes compare what they have.
"""

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_easier.callbacks import private
from lightning_easier.callbacks.files import loads_into_model
from lightning_easier.callbacks.optimizers import (
    Place,
    Position,
    drop_parameters,
    forget_moments,
    groups_for,
    join,
    put_back_parameters,
)
from lightning_easier.callbacks.recipe import clear_gradients
from lightning_easier.structure.inventory import not_removed, outermost
from lightning_easier.structure.linearize import (
    MARK_KEY,
    bypass,
    read_marks,
    restore,
    restructure_as_marked,
    stand_ins,
)
from lightning_easier.structure.operations import Change, Operation
from lightning_easier.support.processes import reshard


class Carried(NamedTuple):
    """What has come of operations.

    Attributes:
        notes: Name -> what the report says of it.
        dropped: Where parameters that are gone were in the optimizers.
        joined: Where new parameters are in the optimizers.
    """

    notes: dict[str, list[str]]
    dropped: list[Position]
    joined: list[Place]


def carry_out(trainer: Trainer, pl_module: LightningModule, operations: Sequence[Operation]) -> Carried:
    """Carry out operations on a running Trainer.

    Args:
        trainer: The Trainer.
        pl_module: The model.
        operations: What is to be done, one after the other.

    Raises:
        RuntimeError: If the processes do not hold the same model afterwards.
    """
    changes = _applied(pl_module, operations)
    lost = [parameter for change in changes for parameter in change.lost]
    dropped = drop_parameters(trainer.optimizers, lost)
    forget_moments(trainer.optimizers, [parameter for change in changes for parameter in change.rewritten])
    joined = groups_for(pl_module, trainer.optimizers, [name for change in changes for name in change.joined])
    join(pl_module, trainer.optimizers, joined)
    if lost or joined:
        _wrap_anew(trainer)
    check_processes_agree(trainer, pl_module)
    notes: dict[str, list[str]] = {}
    for change in changes:
        for name, said in change.notes.items():
            notes.setdefault(name, []).extend(said)
    return Carried(notes, dropped, joined)


def _applied(pl_module: LightningModule, operations: Sequence[Operation]) -> list[Change]:
    """Apply operations; where one fails, the structure is as it was, though not values that were rewritten.

    Raises:
        ValueError: If parameters are to join of a module that is not there.
    """
    changes: list[Change] = []
    try:
        for operation in operations:
            changes.append(operation.apply(pl_module))
        there = dict(pl_module.named_modules(remove_duplicate=False))
        strange = [name for change in changes for name in change.joined if name not in there]
        if strange:
            raise ValueError(f"Expected what an operation calls `joined` to be modules of the model, but got {strange}")
    except BaseException:
        for operation in reversed(operations[: len(changes)]):
            operation.undo(pl_module)
        raise
    return changes


def go_back(
    trainer: Trainer,
    pl_module: LightningModule,
    operations: Sequence[Operation],
    dropped: Sequence[Position],
    path: Path,
    checkpoint: Mapping[str, Any],
    load: Callable[[Trainer, Path], Mapping[str, Any]],
) -> None:
    """Bring back structure, weights, batch-norm statistics, optimizers, schedulers and loss scale of a checkpoint.

    Args:
        trainer: The Trainer.
        pl_module: The model.
        operations: What was done since the checkpoint.
        dropped: Where the parameters that have gone since were in the optimizers.
        path: Of the checkpoint.
        checkpoint: What it holds, with everything on the CPU; a strategy that loads into the model will do so itself.
        load: Has the strategy load it.

    Raises:
        RuntimeError: If the optimizers or schedules are not those of the checkpoint, before anything was changed; if
            the processes do not hold the same model afterwards.
    """
    leaving = [parameter for operation in operations for parameter in operation.leaving(pl_module)]
    _check_recipe(trainer, dropped, set(leaving), path, checkpoint)
    drop_parameters(trainer.optimizers, leaving)
    gone = _undone(pl_module, operations, checkpoint)
    put_back_parameters(trainer.optimizers, gone, dropped)
    if loads_into_model(trainer):
        reshard(pl_module)
        checkpoint = load(trainer, path)
    pl_module.on_load_checkpoint(dict(checkpoint))
    trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    clear_gradients(trainer.optimizers)
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    precision = trainer.precision_plugin
    precision.on_load_checkpoint(dict(checkpoint))
    if type(precision).__qualname__ in checkpoint:
        precision.load_state_dict(checkpoint[type(precision).__qualname__])
    if gone or leaving:
        _wrap_anew(trainer)
    check_processes_agree(trainer, pl_module)


def _undone(
    pl_module: LightningModule, operations: Sequence[Operation], checkpoint: Mapping[str, Any]
) -> list[nn.Parameter]:
    """Undo operations; return the parameters that were lost by them, in the order in which they were.

    A block that comes back in a run that was taken up is as it was built, whatever had become linear inside of it, or
    was replaced, by the time it went: the checkpoint tells.
    """
    known = set(pl_module.parameters())
    back = [operation.undo(pl_module) for operation in reversed(operations)][::-1]
    changed = restructure_as_marked(pl_module, checkpoint["state_dict"])[0] if "state_dict" in checkpoint else {}
    for place, operation in enumerate(operations):
        if any(inner.startswith(f"{name}.") for name in operation.names for inner in changed):
            parts = [pl_module.get_submodule(name) for name in operation.names]
            own = [parameter for part in parts for parameter in part.parameters() if parameter not in known]
            back[place] = list(dict.fromkeys(own))
    return [parameter for parameters in back for parameter in parameters]


def _check_recipe(
    trainer: Trainer,
    dropped: Sequence[Position],
    leaving: Container[nn.Parameter],
    path: Path,
    checkpoint: Mapping[str, Any],
) -> None:
    """Refuse a checkpoint of another recipe: the optimizers would find out when the weights are there already."""
    now = [
        [sum(parameter not in leaving for parameter in group["params"]) for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    for _, optimizer, group, *_ in dropped:
        now[optimizer][group] += 1
    if not loads_into_model(trainer):  # else the states come by the names of the parameters
        then = [[len(group["params"]) for group in state["param_groups"]] for state in checkpoint["optimizer_states"]]
        if now != then:
            raise RuntimeError(
                f"The optimizers hold parameter groups of {now} parameters, but those of the last good checkpoint "
                f"{path} held {then}, so the model can't go back to it. Build the optimizers as they were."
            )
    schedules = len(trainer.lr_scheduler_configs), len(checkpoint["lr_schedulers"])
    if schedules[0] != schedules[1]:
        raise RuntimeError(
            f"The run has {schedules[0]} learning-rate schedules, but the last good checkpoint {path} has "
            f"{schedules[1]}, so the model can't go back to it. Build the schedules as they were."
        )


def check_marks_are_saved(pl_module: LightningModule, names: Sequence[str]) -> None:
    """Find out whether the module's state dict would tell what is linear; the module is as it was afterwards.

    Raises:
        MisconfigurationException: If it drops what belongs to an activation among them.
    """
    names = outermost(names)
    bypass(pl_module, names)
    try:
        told = read_marks(pl_module.state_dict())
    finally:
        restore(pl_module, names)
    silent = [name for name in names if name not in told]
    if silent:
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.state_dict() drops what tells that an activation is linear: of {silent[:5]} a "
            f"checkpoint would not know. Pass them as `exclude`, or keep the keys that end in '{MARK_KEY}'."
        )


def check_is_linear(pl_module: LightningModule, names: Sequence[str]) -> None:
    """Find out whether a checkpoint has brought the structure that belongs to its weights.

    Raises:
        RuntimeError: If an activation among them is not linear.
    """
    missing = not_removed(pl_module, names)
    if missing:
        raise RuntimeError(
            f"The activations {missing} were linear in the model that was saved, but the weights were loaded without: "
            f"the checkpoint has lost what tells so. Did the module's `state_dict` or `on_save_checkpoint` drop the "
            f"keys that end in '{MARK_KEY}'?"
        )


def _wrap_anew(trainer: Trainer) -> None:
    """Have DistributedDataParallel wrap the parameters that are there now; it would wait for those that are gone."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model = strategy.lightning_module  # the old wrapper goes first, and its hooks with it
    strategy.configure_ddp()
    private.begin_static_graph_anew(strategy)


def check_processes_agree(trainer: Trainer, pl_module: LightningModule) -> None:
    """Compare structure and parameters with those of rank 0; every process has to call this.

    Batch-norm statistics are left out: DDP keeps one on each process, and sends those of rank 0 around when it needs
    them.

    Raises:
        RuntimeError: On all processes, if one of them differs.
    """
    if trainer.world_size == 1:
        return
    mine = fingerprint(pl_module)
    agrees = mine == trainer.strategy.broadcast(mine)
    if not trainer.strategy.reduce_boolean_decision(agrees, all=True):
        raise RuntimeError(
            f"The processes do not hold the same model after an operation of pruning: rank "
            f"{trainer.global_rank} {'agrees with' if agrees else 'differs from'} rank 0. Something changes parameters "
            f"on one process only: a callback, or a parameter that was added after the strategy had wrapped the model. "
            f"Resume from the last checkpoint without it."
        )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of which activations are linear and of all parameters, bit for bit where they are not sharded."""
    digest = hashlib.blake2b(digest_size=16)
    for name, stand_in in stand_ins(model).items():
        digest.update(f"{name} {stand_in.mark};".encode())
        for buffer in stand_in.buffers():
            digest.update(buffer.detach().cpu().double().numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        if isinstance(parameter, DTensor):  # every process has another part of it
            continue
        # A copy: memory that NumPy has seen can't be resized any more, which FSDP2 does
        data = parameter.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()
