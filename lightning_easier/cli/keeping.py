"""What took minutes to make is not lost where it can't be written as it was asked for."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
from torch import nn

from lightning_easier.support.storage import first_line, remove, replacing


def save_whole(network: nn.Module, path: Path) -> None:
    """Write a network with its classes, for ``torch.load(..., weights_only=False)``.

    Raises:
        OSError: If there is no room. torch's own writer ends the process then.
    """
    whole = io.BytesIO()
    torch.save(network, whole)
    path.write_bytes(whole.getbuffer())


@contextmanager
def kept(network: nn.Module, output: Path, is_written: Callable[[], bool]) -> Iterator[None]:
    """Keep a network beside the file that a block exports it to, until it is there; an error says where, and what then.

    Args:
        network: The network.
        output: The file.
        is_written: Whether the block has written it.
    """
    place, reason = _free(output), ""
    try:
        with replacing(place) as new:
            save_whole(network, new)
    except Exception as error:  # a disk without room, or a class that can't be pickled: the export may do all the same
        reason = first_line(error)
    try:
        yield
    except BaseException as error:
        if not is_written():
            error.add_note(_kept_in(place) if not reason else f"The network could not be kept: {reason}")
        raise
    finally:
        if is_written():
            with suppress(OSError):
                remove(place)


def _free(output: Path) -> Path:
    """Return a file beside another one that is not there: what an earlier try has kept is not replaced."""
    names = (f"{output.name}{f'.{number}' if number else ''}.pt" for number in count())
    return next(path for path in map(output.with_name, names) if not path.exists())


def _kept_in(place: Path) -> str:
    return (
        f"The network is kept in {place}: `export --config FILE --ckpt_path {place} --weights_only=false "
        f"--no-collapse`, with the same config, exports it, to .pt2 or with another `--opset_version`, say"
    )
