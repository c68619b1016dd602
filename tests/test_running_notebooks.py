"""What runs the notebooks keeps their outputs, how long they took, and nothing that tells of the machine."""

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

RUN = runpy.run_path(str(Path(__file__).parents[1] / "notebooks" / "run.py"))
FOLDERS = "\n".join(
    [
        "import pathlib, sys, IPython",
        "print(pathlib.Path.cwd() / 'x', IPython.__file__, sys.prefix, pathlib.Path.home() / 'y')",
    ]
)


def written(path, *sources):
    """Write a notebook of these cells, the first of which tells when it was run."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["execution"] = {"iopub.execute_input": "2020-01-01T00:00:00Z"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_notebook_is_kept_with_its_outputs_and_how_long_it_took(tmp_path, capsys):
    path = written(tmp_path / "two.ipynb", "value = 20 + 1", "import time\ntime.sleep(1)\nprint('it is')\n2 * value")
    RUN["main"]([str(path)])
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert [cell.execution_count for cell in book.cells] == [1, 2]
    printed, value = book.cells[1].outputs
    assert (printed.text, value.data["text/plain"]) == ("it is\n", "42")
    assert not any(cell.metadata for cell in book.cells)
    kept = book.metadata["lightning_easier"]
    assert set(kept) == {"seconds", "cores"}
    assert kept["seconds"] >= 1
    assert kept["cores"] == RUN["cores"]() >= 1
    assert capsys.readouterr().out == f"two.ipynb: {kept['seconds']} s on {kept['cores']} cores\n"


def test_what_is_kept_names_no_folder_of_the_machine(tmp_path):
    path = written(tmp_path / "names.ipynb", FOLDERS, "sys.prefix")
    RUN["run"](path)
    first, second = nbformat.read(path, as_version=4).cells
    here, module, prefix, home = first.outputs[0].text.split()
    assert (here, prefix, home) == ("./x", "python", "~/y")
    assert module == "site-packages/IPython/__init__.py"
    assert second.outputs[0].data["text/plain"] == "'python'"


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = written(tmp_path / "wrong.ipynb", "1", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        RUN["run"](path)
    assert path.read_bytes() == before


def test_what_only_begins_as_a_folder_is_another():
    output = {"text": "/a/b/c /a/bc /a /x/a"}
    RUN["shorten"](output, {"/a/b": ".", "/a": "~"})
    assert output["text"] == "./c ~/bc ~ /x/a"
