"""What the docs name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_files_that_the_docs_name_are_there(document):
    text = document.read_text()
    named = {*re.findall(r"`([\w/]+\.py)`", text), *re.findall(r"\]\(((?!http|#)[^)#]+)", text)}
    missing = [
        name
        for name in named
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "lightning_easier", document.parent))
    ]
    assert not missing


def test_tests_that_the_docs_name_are_there():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "supported.md").read_text()))
    assert named
    assert not named - defined
