"""Where ``lightning-easier`` begins: what needs no network is done without the packages of its command line."""

import os
import sys
from collections.abc import Sequence

from lightning_easier import __version__
from lightning_easier.support.output import until_nobody_reads

_PROGRAM, _DEBUG = "lightning-easier", "--debug"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Its words; those of the process by default.

    Raises:
        SystemExit: With 2 if what was given is wrong, with 1 if something failed, and with 0 after a help.
    """
    words = list(sys.argv[1:] if args is None else args)
    asked = [word for word in words if word != _DEBUG]
    if asked[:1] == ["--version"]:
        _write(f"{_PROGRAM} {__version__}")
        raise SystemExit(0)
    if asked[:1] == ["recipes"]:
        from lightning_easier import recipes

        _write(recipes.command(asked[1:], _PROGRAM))
        return
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)  # so that `class_path: own.Mine` is found in ./own.py, as `python` finds it
    try:
        from lightning_easier.cli import EasierCLI, one_line_errors
    except ModuleNotFoundError as error:
        if _DEBUG in words:
            raise
        sys.stderr.write(f"{_PROGRAM}: error: {error} (`{_DEBUG}` shows the traceback)\n")
        raise SystemExit(1) from error

    named = [word for word in asked[:1] if not word.startswith("-")]
    with one_line_errors(" ".join([_PROGRAM, *named]), debug=_DEBUG in words):
        EasierCLI(args=None if args is None else words, parser_kwargs={"prog": _PROGRAM})


def _write(text: str) -> None:
    with until_nobody_reads():
        sys.stdout.write(f"{text}\n")
