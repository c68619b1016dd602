"""What the docs name is there."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import lightning_easier
from lightning_easier import zoo

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCS = [*(ROOT / name for name in AT_THE_ROOT), *sorted((ROOT / "docs").rglob("*.md"))]
OF_TESTS = [ROOT / "docs" / "maintainers" / name for name in ("shown-by.md", "versions.md")]
INDEX = runpy.run_path(str(ROOT / "docs" / "maintainers" / "index_of_tests.py"))


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


def test_what_is_supported_fits_on_a_screen_and_leaves_tests_to_maintainers():
    text = (ROOT / "docs" / "supported.md").read_text()
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert len(text.splitlines()) <= 60
    assert max(map(len, cells)) <= 140
    assert "`test_" not in text


def test_the_index_of_tests_is_what_its_script_writes():
    is_current = INDEX["PAGE"].read_text(encoding="utf-8") == INDEX["page"](ROOT / "tests")
    assert is_current, "docs/maintainers/tests.md is not of these tests: run `make index`, and commit what it writes"


def test_the_index_has_each_test_once_by_folder_and_file(tmp_path):
    for name, text in (
        ("wing/test_wing.py", _SOME_TESTS),
        ("wing/helpers.py", "def test_in_no_file_of_tests(): ..."),
        ("test_root.py", '"""What it is.\n\nMore of it.\n"""\n\n\ndef test_it(): ...\n'),
    ):
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    listed = INDEX["page"](tmp_path / "tests").removeprefix(INDEX["HEAD"])
    assert listed == (
        "\n## tests\n\n### test_root.py\n\nWhat it is.\n\n- it\n"
        "\n## tests/wing\n\n### test_wing.py\n\n- later in the alphabet\n- Group: one of a class\n- by and by\n"
    )


_SOME_TESTS = """
@pytest.mark.parametrize("value", [1, 2])
def test_later_in_the_alphabet(value):
    def test_inside(): ...

class TestGroup:
    def helper(self): ...
    def test_one_of_a_class(self): ...

async def test_by_and_by(): ...
"""


def test_every_public_name_is_in_the_reference_once():
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
    for package in (lightning_easier, zoo):
        name = re.escape(package.__name__)
        shown = re.findall(rf"^::: {name}\.(\w+)$", "\n".join(pages), re.MULTILINE)
        assert sorted(shown) == sorted(package.__all__)


def test_the_first_page_of_the_reference_lists_what_each_of_its_pages_shows():
    folder = ROOT / "docs" / "reference"
    rows = re.findall(r"^\| \[[^]]+\]\(([\w.]+)\) \| (.*) \|$", (folder / "index.md").read_text(), re.MULTILINE)
    assert {page for page, _ in rows} == {path.name for path in folder.glob("*.md")} - {"index.md"}
    for page, names in rows:
        shown = re.findall(r"^::: lightning_easier\.([\w.]+)$", (folder / page).read_text(), re.MULTILINE)
        listed = re.findall(r"`([\w.]+)`", names)
        assert not {name if "." not in name else f".{name}" for name in shown} - {*listed}, page
        assert page == "cli.md" or len(shown) == len(listed), page  # which lists subcommands besides


def test_what_is_public_is_said_in_the_same_words_wherever_it_is_said():
    said = []
    for path in (ROOT / "CHANGELOG.md", ROOT / "docs" / "reference" / "index.md"):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", path.read_text())
        found = re.search(r"Public is what .*? without notice", plain, re.DOTALL)
        assert found, f"{path.name} does not say what is public"
        said.append(" ".join(found[0].split()))
    assert said[0] == said[1]


def test_every_factor_by_family_says_what_it_is_against_and_the_demos_is_that_of_its_page():
    text = (ROOT / "docs" / "will-it-help.md").read_text()
    table = text.partition("| family |")[2].partition("\n\n")[0]
    told = [line.rstrip("| ").rpartition("|")[2] for line in table.splitlines()[2:]]
    assert len(told) > 8
    for cell in told:
        for part in cell.split(". "):
            assert "×" not in part or re.search("folded|[Aa]s given", part), part
    (demo,) = re.findall(r"It was ([\d.]+×)", (ROOT / "docs" / "demo.md").read_text())
    assert f"(demo.md)'s network {demo}" in table


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
