"""The built wheel, with none of the checkout: what the README says to type works from an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import onnxruntime
import pytest

import lightning_easier
from tests.integration.blocks import SHORTER
from tests.once import made_once

ROOT = Path(__file__).parents[1]
FENCE = re.MULTILINE | re.DOTALL
# The installed script runs them, one after the other in one process: what takes long is to import torch
RUN = """
import json, runpy, sys
script, given = sys.argv[1:]
for arguments in json.loads(given):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
import lightning_easier
print(lightning_easier.__file__)
"""


def commands() -> list[list[str]]:
    """Return what follows ``lightning-easier`` in each command of the README."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == ["lightning-easier"]]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder that the wheel is installed in."""

    def make(folder):
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        offline = ["--no-deps", "--no-index"]
        subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True)
        (wheel,) = folder.glob("*.whl")
        subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)

    return made_once(tmp_path_factory, "wheel", make) / "site"


def test_a_wheel_has_every_recipe_and_nothing_beside_the_package(installed):
    (wheel,) = installed.parent.glob("*.whl")
    names = ZipFile(wheel).namelist()
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.*")}
    assert {f"lightning_easier/{name}" for name in configs} <= set(names)
    assert "lightning_easier/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lightning_easier"}


def test_what_an_index_shows_of_a_wheel_is_the_readme_without_links_that_lead_nowhere(installed):
    (wheel,) = installed.parent.glob("*.whl")
    archive = ZipFile(wheel)
    (place,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    head, _, shown = archive.read(place).decode().partition("\n\n")
    readme = (ROOT / "README.md").read_text()
    assert "Description-Content-Type: text/markdown" in head
    assert re.findall(r"^```.*?^```$", shown, FENCE) == re.findall(r"^```.*?^```$", readme, FENCE)
    relative = re.findall(r"\]\((?!https:)([^)]*)\)", re.sub(r"^```.*?^```$", "", readme, flags=FENCE))
    assert len(relative) > 30
    assert not re.findall(r"\]\((?!https:)", re.sub(r"^```.*?^```$", "", shown, flags=FENCE))
    files = {target.partition("#")[0] for target in relative} - {""}
    assert all((ROOT / file).is_file() and f"`{file}`" in shown for file in files)
    assert set(re.findall(r"\]\(https:[^)]*\)", readme)) == set(re.findall(r"\]\(https:[^)]*\)", shown)) != set()


def test_the_commands_of_the_readme_run_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    given = commands()
    assert {words[0] for words in given} == {"fit", "candidates", "compress", "export", "report", "recipes"}
    arguments = json.dumps([["--version"], *([*words, *SHORTER.get(words[0], [])] for words in given)])
    script = installed / "bin" / "lightning-easier"
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, script, arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"lightning-easier {lightning_easier.__version__}"
    assert lines[-1] == str(installed / "lightning_easier" / "__init__.py")
    assert "model.stages.0.0.relu" in done.stdout
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].shape[1:] == [1, 8, 8]
