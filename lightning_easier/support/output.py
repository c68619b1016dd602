"""What is written to the standard output, and what may end before it is: a pipe."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """Write out what is left at the end, and leave quietly where nobody reads it any more, as after ``| head``.

    Raises:
        SystemExit: With 1, if the pipe behind the standard output is closed; what the block raises besides, if it does.
    """
    failure: BaseException | None = None
    try:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            raise
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed():  # another pipe, of a process that loads data for example
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes out once more when it ends
        if failure is not None and not isinstance(failure, BrokenPipeError):
            raise failure from failure.__cause__
        raise SystemExit(1) from None


def _is_closed() -> bool:
    """Tell whether the other end of the standard output is closed."""
    if not hasattr(select, "poll"):  # Windows
        return True
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
