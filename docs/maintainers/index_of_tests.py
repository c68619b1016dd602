"""List all tests by folder and file, their names as words: docs/maintainers/tests.md.

``python docs/maintainers/index_of_tests.py`` writes the page, as ``make index`` does. Files are read, not imported:
Python alone is enough.
"""

import ast
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "maintainers" / "tests.md"
HEAD = """\
---
search:
  exclude: true
---

# All tests

For maintainers: every test by folder and file, its name as words; one that has parameters stands here once.
`make index` writes this page. What they show, sorted by what users ask: [which test shows what](shown-by.md).
"""


def page(tests: Path) -> str:
    """Return the page.

    Args:
        tests: The folder of the tests.
    """
    paths = sorted(tests.rglob("test_*.py"), key=lambda path: (path.parent, path.name))
    parts = [HEAD]
    for folder, files in groupby(paths, key=lambda path: path.parent):
        parts.append(f"## {folder.relative_to(tests.parent).as_posix()}\n")
        parts.extend(section(path) for path in files)
    return "\n".join(parts)


def section(path: Path) -> str:
    """Return what is said of one file: the first line of its docstring, and its tests in their order."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    told = (ast.get_docstring(module) or "").partition("\n")[0]
    listed = "".join(f"- {words}\n" for words in names_in(module.body))
    return "\n".join((f"### {path.name}\n", *([f"{told}\n"] if told else ()), listed))


def names_in(body: Sequence[ast.stmt], group: str = "") -> Iterator[str]:
    """Yield the names of tests as words, those in classes after the name of their class.

    Args:
        body: The statements of a module or of a class.
        group: What the names begin with.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield group + node.name.removeprefix("test_").replace("_", " ")
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from names_in(node.body, f"{group}{node.name.removeprefix('Test')}: ")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(ROOT / "tests"), encoding="utf-8")


if __name__ == "__main__":
    main()
