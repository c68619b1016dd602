"""Errors as a command line tells them: one line, and an exit code."""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_easier.support.output import until_nobody_reads

WRONG_VALUE, FAILURE, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"

_MOST, _SHORT = 600, 60  # letters of a line, and of a value in it
_NEVER_MEANT = ("Expected a <class 'NoneType'>", "Not a valid subclass of")


@contextmanager
def one_line_errors(program: str, *, debug: bool | None = None) -> Iterator[None]:
    """Write an error as one line, and leave: with 2 if what was given is wrong, with 1 if something failed.

    What was noted of it (``add_note``) is in the line, too.

    An interruption (Ctrl+C) is a line, too, with 130; a pipe that nobody reads any more is none, with 1.

    Args:
        program: What the line begins with.
        debug: Whether errors pass with their traceback; by default, if ``--debug`` is among the words of the process.
    """
    debug = DEBUG in sys.argv if debug is None else debug
    try:
        with until_nobody_reads():
            yield
    except KeyboardInterrupt as interruption:
        if debug:
            raise
        sys.stderr.write(f"\n{program}: interrupted{_notes(interruption)}\n")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        told, notes = _told(error), _notes(error)
        sys.stderr.write(
            f"{program}: error: {told.rstrip('.') if notes else told}{notes} (`{DEBUG}` shows the traceback)\n"
        )
        raise SystemExit(WRONG_VALUE if _is_wrong_value(error) else FAILURE) from error


def in_one_line(message: str) -> str:
    """Return what matters of a message.

    jsonargparse tells of a value of several types what is wrong with it as each of them. The first is told, but not
    that it isn't None, or of a class that it was never meant to be.
    """
    line = _of_the_first(message.splitlines())
    return line if len(line) <= _MOST else f"{line[: _MOST - 1]}…"


def _of_the_first(lines: Sequence[str]) -> str:
    starts = [number for number, line in enumerate(lines) if line.strip() == "Errors:"]
    if not starts:
        return " ".join(" ".join(lines).split())
    start = starts[0]
    errors: list[list[str]] = []
    for line in lines[start + 1 :]:
        depth = _depth(line)
        if line.strip() and depth <= _depth(lines[start]) and not line.strip().startswith("- "):
            break
        if line.strip().startswith("- ") and (not errors or depth <= _depth(errors[0][0])):
            errors.append([line])
        elif errors:
            errors[-1].append(line)
    told = [error for error in errors if not any(error[0].strip().startswith(f"- {each}") for each in _NEVER_MEANT)]
    first = _of_the_first(told[0] if told else errors[0] if errors else [""]).removeprefix("- ")
    head = lines[0].strip() if lines[0].strip().endswith(":") and start > 0 else ""
    given = next((line.split(": ", 1)[1] for line in lines if line.strip().startswith("Given value: ")), "")
    is_short = given and len(given) <= _SHORT and not given.startswith(("NestedArg(", "Namespace(", "[", "{"))
    return f"{head} {first}".strip() + (f", got {given}" if is_short and given not in first else "")


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _told(error: Exception) -> str:
    """Return the message of an error in a line; its class, too, where it is no error of an argument."""
    line = in_one_line(str(error) or "no message")
    return line if _is_wrong_value(error) else f"{type(error).__name__}: {line}"


def _notes(error: BaseException) -> str:
    """Return what was noted of an error besides, such as where what was made by then is, and a command: uncut."""
    return "".join(f". {' '.join(note.splitlines())}" for note in getattr(error, "__notes__", ()))


def _is_wrong_value(error: Exception) -> bool:
    """Tell whether it is the user who has to change something: our errors of arguments say what they expected.

    So do some of torch, about what a model does. Those of classes that jsonargparse makes are told inside of its own.
    """
    if isinstance(error, MisconfigurationException):
        return True
    message = str(error)
    is_ours = (message.startswith("Expected ") and _is_of_the_package(error)) or "- Expected argument `" in message
    return isinstance(error, ValueError | TypeError | OSError) and is_ours


def _is_of_the_package(error: Exception) -> bool:
    """Tell whether it was raised by a module of ours."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]
