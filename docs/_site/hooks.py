"""What MkDocs is told besides mkdocs.yml.

The pages at the root of the repository (CONTRIBUTING.md, ...) are pages of the site. What a page names outside of
`docs` is copied into the site, so that every link leads somewhere without a network. Drawings are put into the page,
where `currentColor` is that of the theme.
"""

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_ELSEWHERE = "files"  # where what lies outside of `docs` is copied to
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FIGURE = re.compile(r"<td>(?=[^<]*\d)([\d\s.,:+\-–−→×%()≥~*e]{1,40})</td>")
_CELL = re.compile(r"<td>.*?</td>", re.DOTALL)
_CELL_CODE = re.compile(r"(?<=<code>)[^<>\s]{24,}(?=</code>)")
_DRAWING = re.compile(r'<img alt="([^"]*)" src="([^"]*?)([\w-]+)\.svg"[^>]*/?>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files that a page names outside of `docs`."""
    docs = Path(config.docs_dir)
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(docs.parent / name).read_text()))
    for page in files.documentation_pages():
        for _, target, _, _ in _LINK.findall(page.content_string):
            named = _outside(page.src_uri, target)
            if named is None or named in ROOT_PAGES or not (docs.parent / named).is_file():
                continue
            uri = f"{_ELSEWHERE}/{named}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(docs.parent / named)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave `docs`, or come from the root, to the copies."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        named = _outside(page.file.src_uri, target)
        if named is not None:
            uri = ROOT_PAGES.get(named, f"{_ELSEWHERE}/{named}")
        elif _is_root(page.file.src_uri) and target.startswith("docs/"):
            uri = target.removeprefix("docs/")
        else:
            return match[0]
        return f"{before}{posixpath.relpath(uri, here or '.')}{anchor or ''}{after}"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put drawings into the page, and tell where cells break: figures nowhere, long names after a dot or a slash."""

    def drawn(match: re.Match[str]) -> str:
        alt, _, name = match.groups()
        path = Path(config.docs_dir) / "images" / f"{name}.svg"
        if not path.is_file():
            return match[0]
        return f'<span class="drawing" role="img" aria-label="{alt}">{path.read_text().strip()}</span>'

    def breaking(cell: re.Match[str]) -> str:
        return _CELL_CODE.sub(lambda code: re.sub(r"(?<=[./])(?=\w)", "<wbr>", code[0]), cell[0])

    if not any(title.children for title in page.toc):  # an empty list of contents leaves its place to the page
        page.meta["hide"] = [*page.meta.get("hide", []), "toc"]
    cells = _CELL.sub(breaking, _FIGURE.sub(r'<td class="figure">\1</td>', html))
    return _DRAWING.sub(drawn, cells)


def _is_root(uri: str) -> bool:
    return uri in ROOT_PAGES.values()


def _outside(uri: str, target: str) -> str | None:
    """Return the path, from the root of the repository, of what a page names outside of `docs`; None otherwise."""
    if ":" in target or target.startswith("/"):
        return None
    folder = "" if _is_root(uri) else posixpath.join("docs", posixpath.dirname(uri))
    named = posixpath.normpath(posixpath.join(folder, unescape(target)))
    return None if named.startswith(("docs/", "..")) or not posixpath.splitext(named)[1] else named


def on_config(config: MkDocsConfig) -> Any:
    """Find the package beside this file, from whatever folder the site is built."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(Path(config.docs_dir).parent)]
    return config
