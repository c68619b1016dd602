"""What the docs name is there."""

import ast
import re
from pathlib import Path

import pytest

import lightning_easier

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCS = [*(ROOT / name for name in AT_THE_ROOT), *sorted((ROOT / "docs").rglob("*.md"))]
OF_TESTS = [ROOT / "docs" / "supported.md", ROOT / "docs" / "maintainers" / "shown-by.md"]


def _name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCS, ids=_name)
def test_files_that_the_docs_name_are_there(document):
    text = re.sub(r"^( *)```.*?^\1```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = {*re.findall(r"`([\w/]+\.py)`", text), *re.findall(r"\]\(((?!http|#)[^)#]+)", text)}
    missing = [
        name
        for name in named
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "lightning_easier", document.parent))
    ]
    assert not missing


@pytest.mark.parametrize("document", OF_TESTS, ids=_name)
def test_tests_that_the_docs_name_are_there(document):
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert named
    assert not named - defined


def test_every_page_that_maintainers_keep_names_its_tests():
    """The index is for maintainers; the page of users stays one screen for each question."""
    index, matrix = (len(re.findall(r"`test_\w+`", path.read_text())) for path in reversed(OF_TESTS))
    assert matrix < 10 < 100 < index


def test_every_public_name_is_in_the_reference_once():
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
    shown = re.findall(r"^::: lightning_easier\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(shown) == sorted(lightning_easier.__all__)


def test_messages_that_the_faq_quotes_are_those_of_the_library():
    said = "\n".join(_strings()).replace("`", "").replace("'", "")
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "faq.md").read_text().splitlines() if line.startswith("| ")]
    quoted = [part.strip() for row in rows for span in re.findall(r"`([^`]+)`", row) for part in span.split("…")]
    assert len(quoted) > 40
    assert not [part for part in quoted if part.replace("'", "") not in said]


def _strings():
    """Yield every string of the library as it is written, with … where something is put in."""
    for path in (ROOT / "lightning_easier").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
