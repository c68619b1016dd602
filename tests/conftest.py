"""Every test is small: one thread each is the fastest, and leaves a busy machine its other cores.

What decides by time gets its times from a clock that counts work, so that it decides alike in every run. The tests that
are marked ``real_clock`` use the machine's; the others look at operators one by one in one round only.
"""

import atexit
import gc
import os
from functools import cache
from multiprocessing import forkserver, get_context

import pytest
import torch
from hypothesis import settings
from lightning.fabric.utilities import registry

from lightning_easier.support import operators, timing
from tests.clocks import Clock, honest
from tests.torch_once import read_once

torch.set_num_threads(1)
os.fsync = lambda file: None  # runs write a checkpoint a round, and no test cuts the power: what is renamed is there
registry.entry_points = cache(registry.entry_points)  # each Trainer read what is told of all packages: eight of ten ms
read_once()
# The same examples in each run, so that a test that passes goes on to pass; `make prove` draws new ones
settings.register_profile("alike", derandomize="COLLAPSE_EXAMPLES" not in os.environ)
settings.load_profile("alike")
# Files whose tests take tens of seconds, or share what does
_LONG = ("tests/test_notebooks.py", "tests/test_wheel.py", "tests/benchmarks/", "tests/test_site.py",
         "tests/integration/test_cli.py", "tests/integration/test_readme.py")  # fmt: skip
_REAL = timing.stopwatch
_ROUNDS = operators._ROUNDS


def pytest_collection_modifyitems(items):
    """Put first what takes long: of the processes of pytest-xdist, the first begins there, and what is short is left.

    One that has done its share takes what is at the end of another's, so that none waits for the other at last. And the
    first alone needs what `forked` imports, or a kernel for the notebooks.
    """
    items.sort(key=lambda item: ("forked" not in getattr(item, "fixturenames", ()), not item.nodeid.startswith(_LONG)))


def pytest_collection_finish():
    """Look for garbage seldom, and never among what was imported: the tests allocate much, and it took a sixth.

    Nor when pytest looks five times at its end; the interpreter clears that up, too.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _told_times(request):
    """Time nothing, count instead."""
    is_real = request.node.get_closest_marker("real_clock") is not None
    timing.stopwatch = _REAL if is_real else Clock(honest)
    operators._ROUNDS = _ROUNDS if is_real else 1
    yield
    timing.stopwatch, operators._ROUNDS = _REAL, _ROUNDS


@pytest.fixture(autouse=True)
def _seeded():
    """Draw the same numbers in each run, so that a test that passes goes on to pass."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forked():
    """Processes that are forked off a clean one that has imported everything; it takes seconds, so there is one."""
    context = get_context("forkserver")
    context.set_forkserver_preload([
        "tests.integration.processes", "tests.integration.test_interruptions", "tests.integration.test_writing",
        "tests.measure.test_entropy", "tests.measure.test_over_processes", "tests.measure.test_transport",
        "tests.sites.test_activations",
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "1")  # they iterate over sets in an order of their own
        forkserver.ensure_running()
    return context
