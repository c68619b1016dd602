"""What is written to a pipe that nobody reads any more."""

import os
import sys

import pytest

from lightning_easier.support.output import until_nobody_reads
from tests.fresh import begun


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("number", [0, 1], ids=["many", "command"])
def test_a_pipe_that_nobody_reads_is_no_traceback(number, unbuffered, tmp_path_factory):
    assert begun(tmp_path_factory, unbuffered)["ended"][number] == [1, ""]


def test_another_broken_pipe_is_an_error():
    with pytest.raises(BrokenPipeError, match="of a worker"), until_nobody_reads():
        raise BrokenPipeError("of a worker")


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_what_failed_is_told_though_nobody_reads(kind, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(kind, match="no room"), until_nobody_reads():
            _report_and_fail(kind)


def _report_and_fail(kind):
    sys.stdout.write("a report")
    raise kind("no room")
