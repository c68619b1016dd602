"""What a pruning run did, read from one of its checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_easier.report import PruningReport, Round
from lightning_easier.structure.checkpoint import callback_states, read_checkpoint
from lightning_easier.structure.linearize import read_marks


def read_pruning_report(checkpoint_path: str | Path, *, weights_only: bool = True) -> PruningReport:
    """Read what a pruning run did from one of its checkpoints.

    Args:
        checkpoint_path: A Lightning checkpoint.
        weights_only: As for :func:`torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint is not from a run with an EntropyPruningCallback.
    """
    checkpoint = read_checkpoint(checkpoint_path, weights_only=weights_only)
    for state in callback_states(checkpoint):
        if {"monitor", "rounds"} <= set(state):
            try:
                rounds = [Round(**this) for this in state["rounds"]]
                return PruningReport(
                    state["monitor"], rounds, state.get("mode", "max"), list(state.get("activations", ()))
                )
            except TypeError as error:
                raise ValueError(
                    f"Expected argument `checkpoint_path` to be a checkpoint of a pruning run, but the rounds in "
                    f"{checkpoint_path} have another form ({error}): was it saved by another version?"
                ) from error
    linear = list(read_marks(checkpoint.get("state_dict", {})))
    raise ValueError(
        f"Expected argument `checkpoint_path` to be a checkpoint of a pruning run with its callbacks' states, but "
        f"{checkpoint_path} has none (saved with weights only?). Its weights mark {linear or 'nothing'} as linear."
    )


@contextmanager
def named_as_options(checkpoint: str = "--ckpt_path") -> Iterator[None]:
    """Have errors of what reads checkpoints name its arguments as the command line does.

    Args:
        checkpoint: What it calls the checkpoint.
    """
    names = {"checkpoint_path": checkpoint, "weights_only=False": "--weights_only false"}
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
        for name, option in names.items():
            told = told.replace(f"`{name}`", f"`{option}`")
        if told == str(error) or len(error.args) != 1:
            raise
        raise type(error)(told) from error.__cause__
