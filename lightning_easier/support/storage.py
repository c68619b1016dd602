"""Write files such that the old one or the new one is there, whole, whatever happens in between.

What is new is written under a temporary name in the same folder, flushed to the disk, and renamed. Temporary names
begin with a dot, so that nothing takes what a killed process has left behind for a result.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NEW, _OLD = ".part", ".old"


@contextmanager
def replacing(path: str | Path, remedy: str = "Make room there, or write elsewhere.") -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of a file or folder when the block is over.

    Args:
        path: What is to be written; its folder is made if need be.
        remedy: What to do when that fails.

    Yields:
        The temporary path, in the same folder.

    Raises:
        OSError: If it can't be written. ``path`` is as it was then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.md"
        >>> with replacing(path) as new:
        ...     _ = new.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    new = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        put_in_place(new, path)
    except OSError as error:
        raise not_written(path, error, remedy) from error
    finally:
        with suppress(OSError):  # there may be another error, which says more
            remove(new)


def check_writable(argument: str, path: Path) -> None:
    """Refuse a file that can't be written, for who has long work to do first; nothing is made.

    Args:
        argument: What the path was given as, for errors.
        path: The file; its folder need not be there.

    Raises:
        ValueError: If it is a folder.
        NotADirectoryError: If a file is where its folder would be.
        PermissionError: If nothing may be written there.
    """
    if path.is_dir():
        raise ValueError(f"Expected argument `{argument}` to be a file, but {path} is a folder")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(
            f"Expected argument `{argument}` to be a file in a folder, but got {str(path)!r}, and {folder} is a file: "
            f"write to another folder"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Expected argument `{argument}` to be a file that may be written, but got {str(path)!r}, and {folder} "
            f"may not be written to: write to another folder"
        )


def not_written(path: Path, error: BaseException, remedy: str) -> OSError:
    """Say that a file could not be written; the error keeps the number of an OSError, and so its class."""
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, f"{path} could not be written, and is as it was before: {first_line(error)}. {remedy}")


def first_line(error: BaseException) -> str:
    """Say what was raised, without pages of advice; the rest is in the exception's cause."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def temporary(path: Path) -> Path:
    """Return the name under which a file or folder is written first."""
    return path.with_name(f".{path.name}{_NEW}")


def put_aside(path: Path) -> Path:
    """Return the name under which a folder waits while another takes its place."""
    return path.with_name(f".{path.name}{_OLD}")


def put_in_place(new: Path, path: Path) -> None:
    """Flush a file or folder to the disk, and rename it; of a folder the old one goes when the new one is there.

    Raises:
        OSError: If that fails; ``path`` is as it was then.
    """
    for each in [*new.rglob("*")] if new.is_dir() else [new]:
        if each.is_file():
            with each.open("r+b") as file:
                os.fsync(file.fileno())
    if not path.is_dir() and not (new.is_dir() and path.exists()):
        os.replace(new, path)
    else:  # a folder is not replaced in one step
        old = put_aside(path)
        remove(old)
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
        remove(old)
    with suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def left_behind(folder: Path, owns: Callable[[str], bool]) -> list[Path]:
    """List the files and folders whose writing a killed process may not have finished; they need not exist.

    Args:
        folder: The folder, which may hold files of others.
        owns: Tells by its name whether a file is one that the process writes.
    """
    names = [
        path.name.removeprefix(".").removesuffix(suffix)
        for path in folder.glob(".*")
        for suffix in (_OLD, _NEW)
        if path.name.endswith(suffix)
    ]
    return [folder / name for name in dict.fromkeys(names) if owns(name)]


def clean_up(folder: Path, owns: Callable[[str], bool]) -> None:
    """Remove what a killed process has left behind in a folder; what it had put aside and not replaced comes back.

    Args:
        folder: The folder, which may hold files of others.
        owns: Tells by its name whether a file is one that the process writes; the temporary files of others stay.
    """
    for path in left_behind(folder, owns):
        remove(temporary(path))
        if path.exists():
            remove(put_aside(path))
        elif put_aside(path).exists():
            os.replace(put_aside(path), path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
