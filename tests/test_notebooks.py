"""What is kept of the notebooks' outputs is whole, and fit to be read; `make notebooks` runs them."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = ["1_quickstart", "2_entropy", "3_what_pays", "4_own_model", "5_empty_layers"]


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


def words(output):
    """Return all text of an output."""
    texts = [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if "image" not in kind)]
    return "\n".join(texts)


def test_there_are_five_notebooks():
    assert [path.stem for path in BOOKS] == NAMES


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook_is_whole_and_names_no_machine(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in one go, from the top
    kinds = {kind for output in outputs(book) for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} & kinds
    for output in outputs(book):
        assert output.output_type != "error"
        assert not re.search(r"/(work|tmp|home|root|Users|usr)/", words(output))
    for link in re.findall(r"\]\(([^)#]+)\)", "\n".join(cell.source for cell in book.cells)):
        assert link.startswith("https://") or (FOLDER / link).exists(), link
