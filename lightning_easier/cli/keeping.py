"""What took minutes to make is not lost where it can't be written as it was asked for."""

import io
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import count
from pathlib import Path
from shlex import quote

import torch
from torch import nn

from lightning_easier.support.inference import device_of
from lightning_easier.support.storage import first_line, remove, replacing


def save_whole(network: nn.Module, path: Path) -> None:
    """Write a network with its classes, for ``torch.load(..., weights_only=False)`` on whatever machine: on the CPU.

    Raises:
        OSError: If there is no room. torch's own writer ends the process then.
    """
    whole = io.BytesIO()
    torch.save(network if device_of(network).type == "cpu" else deepcopy(network).cpu(), whole)
    path.write_bytes(whole.getbuffer())


@contextmanager
def kept(
    network: nn.Module, output: Path, is_written: Callable[[], bool], others: Collection[Path] = ()
) -> Iterator[None]:
    """Keep a network beside the file that a block exports it to, until it is there; an error says where, and what then.

    Args:
        network: The network.
        output: The file.
        is_written: Whether the block has written it.
        others: Files that the block writes besides.
    """
    place, reason = None, ""
    try:
        place = _reserved(output, others)
        with replacing(place) as new:
            save_whole(network, new)
    except BaseException as error:
        if place is not None:
            with suppress(OSError):
                remove(place)
        if not isinstance(error, Exception):
            raise
        # a disk without room, or a class that can't be pickled: the export may do all the same
        place, reason = None, first_line(error)
    try:
        yield
    except BaseException as error:
        if not is_written():
            told = f"The network could not be kept: {reason}" if place is None else _kept_in(place, output)
            error.add_note(told)
        raise
    finally:
        if place is not None and is_written():
            with suppress(OSError):
                remove(place)


def _reserved(output: Path, others: Collection[Path]) -> Path:
    """Make an empty file beside another one, of a name that nobody has: not an earlier try, nor one at the same time.

    Raises:
        OSError: If it can't be made.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    taken = {other.resolve() for other in others}
    for number in count():
        path = output.with_name(f"{output.name}{f'.{number}' if number else ''}.pt")
        if path.resolve() in taken:
            continue
        with suppress(FileExistsError):
            path.open("xb").close()
            return path
    raise AssertionError  # names do not end


def _kept_in(place: Path, output: Path) -> str:
    return (
        f"The network is kept in {place}: `export --config FILE --ckpt_path {quote(str(place))} --weights_only=false "
        f"--no-collapse --output {quote(str(output))}`, with the same config and the same options of the network, "
        f"exports it, to .pt2 or with another `--opset_version`, say"
    )
