"""What is written to a pipe that nobody reads any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_easier.support.output import until_nobody_reads

ROOT = Path(__file__).parents[2]
WRITE = """
import sys
from lightning_easier.support.output import until_nobody_reads
with until_nobody_reads():
    sys.stdin.readline()  # until the other end is closed
    for _ in range(10000):
        sys.stdout.write("a line\\n")
"""


def run(words, **environment):
    """Run Python with a closed pipe for its output; return its code and what it wrote of errors."""
    reading, writing = os.pipe()
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE, env=given, text=True
    )
    os.close(writing)
    os.close(reading)
    _, errors = process.communicate("go\n")
    return process.returncode, errors


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [["-c", WRITE], ["-m", "lightning_easier", "recipes", "list"]], ids=["many", "command"]
)
def test_a_pipe_that_nobody_reads_is_no_traceback(words, unbuffered):
    assert run(words, PYTHONUNBUFFERED=unbuffered) == (1, "")


def test_another_broken_pipe_is_an_error():
    with pytest.raises(BrokenPipeError, match="of a worker"), until_nobody_reads():
        raise BrokenPipeError("of a worker")
