"""Read checkpoints without running what they hold, and say what is wrong with those that can't be read.

A pickle may name any function, which runs when it is unpickled. ``torch.load(weights_only=True)`` refuses all but
tensors and plain data; a folder that was written by :mod:`torch.distributed.checkpoint` has an index that torch
unpickles as it is, and small values besides: here both are read with as little trust.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_easier.support.storage import first_line

# What the index of a folder is made of: plain data classes of torch, and what they hold.
_OF_AN_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


@contextmanager
def explained(path: Path, what: str, opt_in: str) -> Iterator[None]:
    """Turn whatever the reading of a broken or unsafe checkpoint raises into an error that names it.

    Args:
        path: The checkpoint.
        what: What it has to be: "Expected ... to be a checkpoint".
        opt_in: How to have any object unpickled.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever bytes may be taken for
        if isinstance(error, pickle.UnpicklingError):
            named = ", ".join(unsafe_objects(path))
            more = f"more than tensors and plain data ({named})" if named else "no checkpoint, or more than plain data"
            raise ValueError(
                f"Expected {what}, but {path} can't be read safely: it holds {more}. If you trust the file, {opt_in}, "
                f"which runs what it names; or allow these classes alone with `torch.serialization.add_safe_globals`."
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
    with explained(path, what, opt_in):
        return torch.load(path, **options)


class FolderReader(FileSystemReader):
    """Reads a folder that :mod:`torch.distributed.checkpoint` has written, and unpickles nothing but its index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            UnpicklingError: If it names anything else than an index does.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"an index is a Metadata, but this is a {type(metadata).__name__}")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"{place.relative_path} is no file of the folder")
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names, if an index may."""
        if name in _OF_AN_INDEX.get(module, ()) or (module == "torch" and isinstance(_dtype(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


def _dtype(name: str) -> Any:
    return getattr(torch, name, None)


class _SafePlanner(DefaultLoadPlanner):
    """Loads values that are no tensors as safely as tensors."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO | IO[bytes]) -> None:
        """Read one."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_tensors_of(folder: Path, ends: str) -> dict[str, torch.Tensor]:
    """Read some tensors of a folder that :mod:`torch.distributed.checkpoint` has written.

    Args:
        folder: The folder.
        ends: How their names end.
    """
    reader = FolderReader(folder)
    tensors: dict[str, Any] = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in reader.read_metadata().state_dict_metadata.items()
        if name.endswith(ends) and isinstance(metadata, TensorStorageMetadata)
    }
    _fill(tensors, reader, None)
    return tensors


def check_folder(folder: Path) -> None:
    """Find out whether the index and the values of a folder can be read safely, without what it holds else.

    torch's own :func:`torch.distributed.checkpoint.load` unpickles both as they are.

    Raises:
        UnpicklingError: If one of them names what is not loaded safely.
    """
    reader = FolderReader(folder)
    metadata = reader.read_metadata()
    values: dict[str, Any] = {
        name: None for name, each in metadata.state_dict_metadata.items() if isinstance(each, BytesStorageMetadata)
    }
    _fill(values, reader, _SafePlanner(flatten_state_dict=False))


def _fill(values: dict[str, Any], reader: FolderReader, planner: LoadPlanner | None) -> None:
    """Read values in this process alone, and raise what goes wrong as it is."""
    if not values:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone
            torch.distributed.checkpoint.load(values, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception, and it holds the one of each process
        raise next(iter(error.failures.values()))[0] from error
