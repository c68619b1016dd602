"""What becomes of memory that is freed, where the C library is glibc: for times it is kept, for peaks given back."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_PAGES = 2**16


def keep_freed_memory() -> None:
    """Have the process keep memory that it frees.

    By default large tensors are given back to the system at once, and asked for again with the next operator. On a
    virtual machine that takes up to four times as long as the operators themselves, and is all that is timed then.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> None:
    """Have the process give back at once what it frees, a few pages aside, so that its peak is that of what it holds.

    By default what is freed leaves holes, and whether the next tensor fits into one is chance.
    """
    _set({_MMAP_MAX: 2**20, _MMAP_THRESHOLD: _PAGES, _TRIM_THRESHOLD: _PAGES})


def _set(options: dict[int, int]) -> None:
    with suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        for option, value in options.items():
            library.mallopt(option, value)
