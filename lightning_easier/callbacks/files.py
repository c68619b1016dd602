"""The checkpoints that a run writes: one of every round that was kept, and the best for each number of removals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from shutil import rmtree
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_easier.callbacks.state import BestCheckpoint
from lightning_easier.linearize import EXTRA_STATE, restructure_as_marked
from lightning_easier.report import Round


def folder_of(trainer: Trainer, dirpath: str | None, known: str | None, *, is_new: bool) -> str:
    """Return where a run keeps its checkpoints, the same on all processes.

    Args:
        trainer: The Trainer.
        dirpath: What the user has asked for.
        known: Where it kept them so far.
        is_new: Whether the run has just begun; it leaves alone what another run has written.
    """
    folder = Path(dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "entropy_pruning")
    if known is not None and Path(known).exists():
        folder = Path(known)
    elif is_new:
        free = next(each for each in _versions(folder) if not any(each.glob("*.ckpt")))
        if free != folder:
            rank_zero_warn(f"{folder} holds the checkpoints of another run, so those of this one go to {free}.")
        folder = free
    return str(trainer.strategy.broadcast(str(folder)))


def _versions(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-v{number}") for number in count(1))


def save(trainer: Trainer, path: Path) -> None:
    """Save everything; every process has to call this, and has to be able to read what was written.

    Raises:
        MisconfigurationException: If a process can't see the file.
    """
    if trainer.is_global_zero and path.is_dir():  # a folder of shards, or else old ones would lie among the new
        rmtree(path)
    trainer.strategy.barrier()
    trainer.save_checkpoint(path, weights_only=False)
    if not trainer.strategy.reduce_boolean_decision(path.exists(), all=True):
        raise MisconfigurationException(
            f"EntropyPruningCallback goes back to checkpoints of its own, but not every process can read {path}. Pass "
            f"a `dirpath` that all nodes share."
        )


def find(
    trainer: Trainer,
    path: Path | None,
    state_key: str,
    kept: Sequence[Round],
    what: str = "last good checkpoint",
    purpose: str = "go back to it",
) -> tuple[Path, Mapping[str, Any]]:
    """Find the checkpoint of a round that was kept, the last good one by default, and read it.

    Args:
        trainer: The Trainer.
        path: Of the checkpoint, if it is known.
        state_key: Of the callback.
        kept: The rounds that it has to know.
        what: What it is, for an error.
        purpose: What it is needed for.

    Returns:
        The path, and all that it holds; without the weights for a strategy that loads them into the model.

    Raises:
        FileNotFoundError: If it is gone.
        RuntimeError: If it is of another run.
    """
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"The {what} {path} is gone, so the model can't {purpose}. Keep the folder of argument `dirpath` until the "
            f"run is over."
        )
    if loads_into_model(trainer):
        checkpoint = _read_on_cpu(path)
    else:
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
    if checkpoint["callbacks"][state_key]["rounds"] != [asdict(this) for this in kept]:
        raise RuntimeError(
            f"The {what} {path} is of another run, so the model can't {purpose}. Give every run a `dirpath` of its own."
        )
    return path, checkpoint


def still_best(
    trainer: Trainer, folder: str | None, state_key: str, best: Mapping[str, BestCheckpoint]
) -> dict[str, BestCheckpoint]:
    """Return those of the best checkpoints that are on disk still, the same on all processes.

    A run that is taken up at an older checkpoint may find that it has written better ones since: those are of a model
    that it has yet to become, or never will.
    """
    held = {
        number: each for number, each in best.items() if _holds(Path(str(folder), each.file), state_key, number, each)
    }
    return dict(trainer.strategy.broadcast(held))


def _holds(path: Path, state_key: str, number: str, best: BestCheckpoint) -> bool:
    if not path.exists():
        return False
    try:
        then = _read_on_cpu(path)["callbacks"].get(state_key, {}).get("best", {})
    except (OSError, RuntimeError, EOFError, UnpicklingError):  # it was being written when the run was killed
        return False
    return bool(then.get(number) == asdict(best))


def _read_on_cpu(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint; of one that a sharding strategy has written as a folder, all but the weights."""
    held = path / "meta.pt" if path.is_dir() else path
    checkpoint: Mapping[str, Any] = torch.load(held, mmap=True, map_location="cpu", weights_only=False)
    return checkpoint


def loads_into_model(trainer: Trainer) -> bool:
    """Tell whether the strategy loads a checkpoint straight into the model, whose structure has to be there before."""
    return trainer.strategy.restore_checkpoint_after_setup


def restructure_before_loading(trainer: Trainer, model: nn.Module) -> None:
    """Have a strategy that loads into the model give it the structure of the checkpoint first.

    Nothing else is told the path before: Lightning's hooks come when the weights are there.
    """
    if not loads_into_model(trainer):
        return
    load = type(trainer.strategy).load_checkpoint

    def restructure_and_load(path: Any, *others: Any, **more: Any) -> dict[str, Any]:
        restructure_as_marked(model, read_marks_of(Path(path)))
        return load(trainer.strategy, path, *others, **more)

    trainer.strategy.load_checkpoint = restructure_and_load  # type: ignore[method-assign,assignment]


def load_as_ever(trainer: Trainer) -> None:
    """Undo :func:`restructure_before_loading`."""
    vars(trainer.strategy).pop("load_checkpoint", None)


def read_marks_of(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of linear activations, without its weights.

    Args:
        path: A checkpoint file, or a folder that a sharding strategy has written.
    """
    if not path.is_dir():
        state_dict = _read_on_cpu(path)["state_dict"]
        return {key: value for key, value in state_dict.items() if key.endswith(EXTRA_STATE)}
    reader = FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    marks: dict[str, Any] = {
        key: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for key, metadata in known.items()
        if key.endswith(EXTRA_STATE) and isinstance(metadata, TensorStorageMetadata)
    }
    if marks:
        torch.distributed.checkpoint.load(marks, storage_reader=reader, no_dist=True)
    return {key.removeprefix("state_dict."): value for key, value in marks.items()}
