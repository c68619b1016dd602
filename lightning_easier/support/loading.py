"""Read checkpoints without running what they hold, and say what is wrong with those that can't be read.

A pickle may name any function, which runs when it is unpickled. ``torch.load(weights_only=True)`` refuses all but
tensors and plain data. Folders are read in :mod:`lightning_easier.support.folders`.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_easier.support.storage import first_line


@contextmanager
def explained(path: Path, what: str, opt_in: str | None) -> Iterator[None]:
    """Turn whatever the reading of a broken or unsafe checkpoint raises into an error that names it.

    Args:
        path: The checkpoint.
        what: What it has to be: "Expected ... to be a checkpoint".
        opt_in: How to have any object unpickled; None where that was asked for.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever bytes may be taken for
        if isinstance(error, pickle.UnpicklingError) and opt_in is not None:
            named = ", ".join(unsafe_objects(path))
            more = f"more than tensors and plain data ({named})" if named else "no checkpoint, or more than plain data"
            raise ValueError(
                f"Expected {what}, but {path} can't be read safely: it holds {more}. If you trust the file, {opt_in}, "
                f"which runs what it names; or allow these classes alone with `torch.serialization.add_safe_globals`."
            ) from error
        if isinstance(error, ImportError | AttributeError) and opt_in is None:
            raise ValueError(
                f"Expected {what}, but {path} can't be read here: a class or function that it names is not found "
                f"({first_line(error)[:120]}). Make it importable where it was when the file was saved."
            ) from error
        raise ValueError(
            f"Expected {what}, but {path} can't be read ({first_line(error)[:120]}). Was it cut short, as by a full "
            f"disk? Take another one."
        ) from error


def unsafe_objects(path: Path) -> list[str]:
    """List what a checkpoint names that is not loaded safely; nothing is run for it, or found in a broken one."""
    held = path / "meta.pt" if path.is_dir() else path
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(held)))[:5]
    except Exception:  # not a file of torch.save, or not a whole one
        return []


def read(path: Path, what: str, opt_in: str, **options: Any) -> Any:
    """Read what ``torch.save`` has written.

    Args:
        path: The file.
        what: What it has to be, for an error.
        opt_in: How to have any object unpickled, for an error.
        **options: As for :func:`torch.load`.

    Raises:
        ValueError: If it can't be read.
    """
    with explained(path, what, None if options.get("weights_only") is False else opt_in):
        return torch.load(path, **options)
