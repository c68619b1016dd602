"""Two real processes: the counts are summed, the decisions one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessRaisedException

from tests.integration.tiny import Tiny, pruning, train

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Start a script that Lightning starts a second time for the second process."""
    command = [sys.executable, "-m", "tests.integration.two_processes", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("static_graph", ["", "static_graph"])
def test_two_processes_take_one_decision(tmp_path, static_graph):
    result = launch(tmp_path, "ReLU", static_graph)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first["linear"]) == 1
    # Rank 1 logged a fall in every epoch; rank 0, which decides, only in the last.
    assert [this["accepted"] for this in first["rounds"]] == [True, True, False]


def test_an_activation_with_parameters_is_refused_under_several_processes(tmp_path):
    result = launch(tmp_path, "PReLU")
    assert result.returncode != 0
    assert "can't remove ['act2'] under 2 processes" in result.stderr


def test_processes_whose_structure_would_not_come_back_are_refused(tmp_path):
    with pytest.raises((MisconfigurationException, ProcessRaisedException), match="spawn or fork processes"):
        train(Tiny(), pruning(), root=tmp_path, devices=1, strategy="ddp_spawn")
