"""The script for a GPU does every part whatever becomes of the others, within its time, or says what it lacks."""

import os
import re
import subprocess
from pathlib import Path

import command
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"

PYTHON = """#!/bin/bash
echo "$@" >> calls.txt
case "$*" in *curve*) exit 3 ;; *measuring*) exec sleep 100 ;; esac
"""


def test_the_script_for_a_gpu_does_one_part_after_the_other_whatever_becomes_of_them(tmp_path):
    folder = tmp_path / "checkout" / "benchmarks"
    folder.mkdir(parents=True)
    script, python = folder / "gpu.sh", tmp_path / "python"
    text = SCRIPT.read_text()
    script.write_text(text.replace("bench 60 24 measuring", "bench 1 1 measuring"))
    assert script.read_text() != text
    python.write_text(PYTHON)
    for each in (script, python):
        each.chmod(0o755)
    done = subprocess.run([script, "--dry"], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "== of seven parts 2 failed: measuring curve;" in done.stdout
    calls = (folder.parent / "calls.txt").read_text().splitlines()
    parts = [call.split()[2] for call in calls if call.startswith("-m benchmarks")]
    assert sorted(parts) == sorted(command.ON_A_GPU)
    assert all("--dry --output" in call for call in calls if call.startswith("-m benchmarks"))
    assert any("pytest" in call and "test_gpu.py" in call for call in calls)
    log = (folder.parent / "gpu_results" / "log.txt").read_text()
    assert "ended with 3" in log
    assert "ended with 124 after at most 1 s" in log


def test_the_script_for_a_gpu_leaves_every_case_less_time_than_its_part_has():
    text = SCRIPT.read_text()
    limits = {
        part: (int(whole), int(case)) for whole, case, part in re.findall(r"^bench (\d+) (\d+) (\w+)", text, re.M)
    }
    assert sorted(limits) == sorted(command.ON_A_GPU)
    assert all(case + 10 <= whole for whole, case in limits.values())
    assert all(2 * case < whole for part, (whole, case) in limits.items() if part != "curve")


PYTHON_THAT_LACKS_SOMETHING = """#!/bin/bash
echo "$@" >> calls.txt
case "$*" in -c*|"-m $FAILS "*) exit 1 ;; esac
"""


@pytest.mark.parametrize("fails", ["venv", "pip", "nothing"])
def test_the_script_for_a_gpu_stops_where_what_is_needed_can_not_be_installed(fails, tmp_path):
    benchmarks, made = tmp_path / "checkout" / "benchmarks", tmp_path / "made" / "bin"
    for folder in (benchmarks, made):
        folder.mkdir(parents=True)
    script, python = benchmarks / "gpu.sh", made / "python"
    script.write_text(SCRIPT.read_text())
    python.write_text(PYTHON_THAT_LACKS_SOMETHING)
    for each in (script, python):
        each.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "VENV": str(made.parent), "FAILS": fails}
    done = subprocess.run([script, "--dry"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lacks some of torch, lightning, " in done.stdout
    assert "could not be installed" in done.stdout.splitlines()[-1]
    calls = (benchmarks.parent / "calls.txt").read_text()
    assert ("-m pip install" in calls) == (fails != "venv")
    assert "-m benchmarks" not in calls
    assert "-m pytest" not in calls
