"""Where ``lightning-easier`` begins: what needs no network is done before torch is imported."""

import os
import sys
from collections.abc import Sequence

from lightning_easier import __version__


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Its words; those of the process by default.

    Raises:
        SystemExit: With 2 if what was given is wrong, with 1 if something failed, and with 0 after a help.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["--version"]:
        sys.stdout.write(f"lightning-easier {__version__}\n")
        raise SystemExit(0)
    if words[:1] == ["recipes"]:
        from lightning_easier import recipes

        sys.stdout.write(f"{recipes.command(words[1:])}\n")
        return
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)  # so that `class_path: own.Mine` is found in ./own.py, as `python` finds it
    from lightning_easier.cli import EasierCLI, one_line_errors

    named = [word for word in words[:1] if not word.startswith("-")]
    with one_line_errors(" ".join(["lightning-easier", *named]), debug="--debug" in words):
        EasierCLI(args=None if args is None else words)
