"""Run notebooks from top to end and keep their outputs, how long each took, and on how many cores.

The outputs name no folder of the machine, and the cells no time. A notebook that fails stays as it was:

    python notebooks/run.py                              # all
    python notebooks/run.py notebooks/2_entropy.ipynb
"""

import argparse
import os
import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(file: Path, timeout: float = 600) -> int:
    """Run a notebook in a folder of its own, and write it with what it printed and drew.

    Args:
        file: The notebook.
        timeout: Of each cell, in seconds.

    Returns:
        How many seconds it took, the start of its process included.

    Raises:
        CellExecutionError: If a cell raises; the file is not written.
        CellTimeoutError: If a cell takes longer.
    """
    book = nbformat.read(file, as_version=4)
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when it was run
    with TemporaryDirectory() as folder:
        client = NotebookClient(book, timeout=timeout, record_timing=False, resources={"metadata": {"path": folder}})
        began = perf_counter()
        client.execute()
        seconds = round(perf_counter() - began)
        names = short_names(folder)
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            shorten(output, names)
    book.metadata["lightning_easier"] = {"seconds": seconds, "cores": cores()}
    nbformat.write(book, file)
    return seconds


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def short_names(folder: str) -> dict[str, str]:
    """Return what stands for each folder of the machine, the innermost first.

    Args:
        folder: The one that the notebook runs in.
    """
    named = {folder: ".", str(FOLDER.parent): ".", gettempdir(): "tmp", str(Path.home()): "~"}
    paths = sysconfig.get_paths()
    named |= {paths["stdlib"]: "python", paths["purelib"]: "site-packages", paths["platlib"]: "site-packages"}
    named[sys.prefix] = "python"
    found = {each: name for path, name in named.items() for each in (path, str(Path(path).resolve()))}
    found.pop("/", None)  # as the home of some users is
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def shorten(output: Any, names: Mapping[str, str]) -> None:
    """Put short names in the place of folders in all text of an output.

    Args:
        output: Of a cell, as the format has it; changed in place.
        names: Folder -> what stands for it; the first that fits counts.
    """
    pattern = re.compile("|".join(rf"(?<![\w.~-]){re.escape(path)}(?![\w-])" for path in names))

    def shortened(text: Any) -> Any:
        return pattern.sub(lambda match: names[match[0]], text) if isinstance(text, str) else text

    if "text" in output:
        output["text"] = shortened(output["text"])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            output["data"][kind] = shortened(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run those that are named, or all.

    Args:
        arguments: Words of the command line; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; by default all of this folder")
    for file in parser.parse_args(arguments).files or sorted(FOLDER.glob("*.ipynb")):
        sys.stdout.write(f"{file.name}: {run(file)} s on {cores()} cores\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
