"""Read folders that :mod:`torch.distributed.checkpoint` has written without running what they hold.

torch unpickles the index of such a folder as it is, and small values besides: here both are read with as little trust
as ``torch.load(weights_only=True)`` has. Imported where a folder is read: that part of
torch takes a while.
"""

import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

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
