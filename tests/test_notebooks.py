"""The notebooks run from their first cell to their last, and what is kept of their outputs is fit to be read."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
# What the cell of parameters holds in a short run
SHORT = {
    "1_quickstart": "warmup, epochs, rounds = 2, 1, 1",
    "2_entropy": "epochs, draws = 4, 2",
    "3_what_pays": "sizes, channels, side = (1, 2), 8, 10",
    "4_own_model": "epochs, tuning, steps = 1, 1, 4",
    "5_empty_layers": "warmup, epochs, rounds = 4, 1, 2",
}
# Text -> what runs in its place: a search takes the minutes that it is given, and a Trainer all batches that there are
FEW = {'"enable_checkpointing": False': '"enable_checkpointing": False, "limit_train_batches": 6'}
SHORTER = {
    "1_quickstart": {"max_minutes=1": "max_minutes=0.04", **FEW},
    "2_entropy": {"enable_checkpointing=False": "enable_checkpointing=False, limit_train_batches=6"},
    "4_own_model": {
        "max_minutes=0.5": "max_minutes=0.04",
        "max_minutes=0.4": "max_minutes=0.04",
        "batch_size=32, shuffle=True": "batch_size=32, sampler=range(192)",
        "held_out = len(origin) // 5": "held_out = 256",
    },
    "5_empty_layers": FEW,
}
# No names of another notebook are left, and as in the tests' own process times are counted; the notebook itself knows
# none of these names
BEGIN = """%reset -f
import os, lightning_easier.support.timing, tests.clocks
lightning_easier.support.timing.stopwatch = tests.clocks.Clock(tests.clocks.honest)
os.chdir({folder!r})
del os, lightning_easier, tests
"""


def parameters(book):
    """Return the cell of parameters."""
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


def words(output):
    """Return all text of an output."""
    texts = [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if "image" not in kind)]
    return "\n".join(texts)


def test_there_are_five_notebooks():
    assert [path.stem for path in BOOKS] == list(SHORT)


@pytest.fixture(scope="module")
def kernel():
    """A process that runs them all, one after the other: what takes long is to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other take minutes beside other tests
        patch.setenv("PYTHONPATH", str(FOLDER.parent), prepend=os.pathsep)
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, kernel):
    book = nbformat.read(path, as_version=4)
    cell = parameters(book)
    assert SHORT[path.stem].split(" = ")[0] == cell.source.split(" = ")[0]
    cell.source = SHORT[path.stem]
    for old, new in SHORTER.get(path.stem, {}).items():
        (cell,) = (each for each in book.cells if old in each.source and each.cell_type == "code")
        cell.source = cell.source.replace(old, new)
    book.cells.insert(0, nbformat.v4.new_code_cell(BEGIN.format(folder=str(tmp_path))))
    NotebookClient(book, kernel, timeout=240).execute()  # raises what they do
    assert all(each.execution_count for each in book.cells if each.cell_type == "code")


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook_is_whole_and_names_no_machine(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    run = book.metadata["lightning_easier"]  # as `make notebooks` has noted it
    assert run["seconds"] < 120
    assert run["cores"] <= 2
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in one go, from the top
    kinds = {kind for output in outputs(book) for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} & kinds
    for output in outputs(book):
        assert output.output_type != "error"
        assert not re.search(r"/(work|tmp|home|root|Users|usr)/", words(output))
    for link in re.findall(r"\]\(([^)#]+)\)", "\n".join(cell.source for cell in book.cells)):
        assert link.startswith("https://") or (FOLDER / link).exists(), link
