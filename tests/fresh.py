"""Interpreters that have imported the package and nothing else; to import torch takes long, so there are two."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.once import made_once

ROOT = Path(__file__).parents[1]
# What `python -c CODE` and `python -m MODULE ...` run, one after the other
RUN = [
    [
        "-c",
        """
import sys
from lightning_easier.support.output import until_nobody_reads
with until_nobody_reads():
    for _ in range(10000):
        sys.stdout.write("a line\\n")
""",
    ],
    ["-m", "lightning_easier", "recipes", "list"],
]
# Each is a fork, which ends as an interpreter does. Nobody reads what it writes; its errors are in a file
_FORKS = """
import json, os, runpy, sys, tempfile
import lightning.pytorch
before = set(sys.modules)
import lightning_easier
added, ended = sorted(set(sys.modules) - before), []
for words in json.loads(sys.argv[1]):
    errors = tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.dup2(errors.fileno(), 2)
        os.close(reading)
        os.close(writing)
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors.seek(0)
    ended.append([code, errors.read().decode()])
else:
    print(json.dumps({"added": added, "ended": ended}))
    raise SystemExit
kind, sys.argv = words[0], words[1:]
if kind == "-c":
    exec(words[1])
else:
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
"""


def begun(factory: pytest.TempPathFactory, unbuffered: str, run: Sequence[Sequence[str]] = RUN) -> dict[str, Any]:
    """Return which modules came with the package, after Lightning's, and the code and the errors of each that ran.

    Args:
        factory: The fixture of that name.
        unbuffered: ``PYTHONUNBUFFERED``.
        run: What runs.
    """

    def make(folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        words = [sys.executable, "-c", _FORKS, json.dumps(run)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        (folder / "told.json").write_text(done.stdout.splitlines()[-1])

    told = json.loads((made_once(factory, f"fresh{unbuffered}", make) / "told.json").read_text())
    assert len(told["ended"]) == len(run)
    return told
