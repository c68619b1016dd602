"""Pretrained weights as plain data, also where a library's own code reads them."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from torch import hub

_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OPPOSITE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def plain_weights(name: str) -> Iterator[None]:
    """Have ``torch.load`` read tensors and plain data only, whatever it is told.

    torchvision's functions that build networks hand no ``weights_only`` on to ``torch.hub``, whose default is to
    unpickle, and which checks the hash of a file at its download only. So this is torch's own switch, for the process.

    Args:
        name: Network that is built.

    Raises:
        ValueError: If a file holds other objects. Nothing of it is executed.
    """
    given = {key: os.environ.pop(key, None) for key in (_SWITCH, _OPPOSITE)}  # torch takes one of them only
    os.environ[_SWITCH] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected pretrained weights of {name!r} to be tensors and plain data, but a file in a cache of downloads "
            f"(torch's is {hub.get_dir()}) holds other objects, or is damaged; delete it, and it is downloaded again: "
            f"{error}"
        ) from error
    finally:
        del os.environ[_SWITCH]
        os.environ.update({key: value for key, value in given.items() if value is not None})
