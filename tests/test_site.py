"""The site builds strictly, needs nothing from elsewhere, and its code runs as it stands."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from lightning.pytorch import seed_everything
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.integration.blocks import ROOT, blocks, names, run
from tests.once import made_once

PAGES = sorted((ROOT / "docs").rglob("*.md"))
# What stands on pages: run, or shown as what it is
LANGUAGES = {"python", "bash", "yaml", "diff", "text", "toml"}
# Text -> what runs in its place: these take too long as they stand, or belong to a run of the reader's
SHORTER = {
    "start.md": {
        '"resnet10t"': '"test_resnet"',
        "epochs=5": "epochs=1",
        "max_minutes=3": 'max_minutes=0.1, objective="macs", max_rejections=1',
        "images[:1400], labels[:1400]": "images[:256], labels[:256]",
    },
}


def _name(page):
    return page.relative_to(ROOT / "docs").as_posix()


def _code(page):
    """Return what of a page is to run."""
    return [block for block in blocks(page) if block.language in ("python", "bash") and not block.title]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: a warning is an error."""

    def make(folder):
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)

    return made_once(tmp_path_factory, "site", make)


class _Loaded(HTMLParser):
    """Lists what a browser loads with a page."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.urls.append(given.get("src"))
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.urls.append(given.get("href"))


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text())
        urls = [url for url in loaded.urls if url]
        assert urls
        for url in urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name} loads {url}"
            if page.name != "404.html":  # whose links begin at the root
                assert (page.parent / url.partition("?")[0]).exists(), f"{page.name} loads {url}"
    sheets = "".join(sheet.read_text() for sheet in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(https?:)?//", sheets)


def test_drawings_take_the_colour_of_the_text(site):
    drawings = list((ROOT / "docs" / "images").glob("*.svg"))
    shown = "\n".join(page.read_text() for page in site.rglob("*.html"))
    assert len(drawings) >= 8
    for drawing in drawings:
        text = drawing.read_text()
        assert "currentColor" in text
        assert set(re.findall(r'(?:fill|stroke)="([^"]+)"', text)) <= {"none", "currentColor"}
        assert text.strip() in shown, f"no page shows {drawing.name}"


def test_long_names_in_cells_break_and_a_page_without_headings_takes_the_place_of_their_list(site):
    networks, faq = ((site / name).read_text() for name in ("networks.html", "faq.html"))
    assert "<code>head.<wbr>classification_head.<wbr>conv" in networks
    assert "<code>isolate_activations</code>" in networks
    hidden = re.compile(r'<div class="md-sidebar md-sidebar--secondary"[^>]* hidden>')
    assert hidden.search(networks)
    assert not hidden.search(faq)


def test_old_paths_lead_somewhere(site):
    for name in ("collapse", "experiments", "house", "methods", "networks", "supported"):
        assert (site / f"{name}.html").is_file()


# by tests/integration/test_text_on_the_command_line.py
RUN_ELSEWHERE = ('title="own.py"', 'title="beside own.py"')


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_is_not_run_says_so(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"a block at line {block.line} says not what it is"
        if block.title and block.language in ("python", "bash"):
            is_named = block.title.startswith('title="not run here: ')
            assert is_named or block.title in RUN_ELSEWHERE, f"line {block.line}: {block.title}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [*filter(_code, PAGES)], ids=_name)
def test_the_blocks_of_a_page_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed_everything(0)
    assert run(page, names(), SHORTER.get(_name(page))) == len(_code(page))


def test_the_examples_for_contributors_work_and_are_short(tmp_path):
    """What CONTRIBUTING adds is put into a copy of the package, and its tests run there."""
    page = ROOT / "CONTRIBUTING.md"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_easier", tmp_path / "lightning_easier", ignore=without)
    # whatever repository the folder may lie in
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for name in ("__init__.py", "conftest.py", "clocks.py", "torch_once.py"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    sections = re.findall(r"^## Add .*?(?=^## )", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(sections) == 3
    tests = []
    for section in sections:
        code = re.findall(r"^```(python|diff)(?: title=\"([^\"]+)\")?\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        own = [text for _, title, text in code if not title.startswith("tests/")]
        assert 0 < sum(bool(line.strip()) for text in own for line in text.splitlines()) < 50
        for language, title, text in code:
            if language == "diff":
                subprocess.run(["git", "apply", "-"], cwd=tmp_path, env=environment, input=text, text=True, check=True)
            else:
                (tmp_path / title).write_text(text)
                tests += [title] if title.startswith("tests/") else []
    assert len(tests) == 3
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    linted = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "lightning_easier"]
    assert not subprocess.run(linted, cwd=tmp_path, capture_output=True).returncode


def test_links_between_pages_and_to_the_root_are_moved(site):
    html = (site / "contributing.html").read_text()
    assert 'href="how-to/own-method.html"' in html
    assert 'href="architecture.html"' in html
    results = (site / "experiments.html").read_text()
    assert 'href="files/benchmarks/cifar.py"' in results
    copied, source = (folder / "benchmarks" / "cifar.py" for folder in (site / "files", ROOT))
    assert copied.read_text() == source.read_text()
