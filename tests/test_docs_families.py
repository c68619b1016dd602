"""What the tables of will-it-help.md count, and that they are what docs/maintainers/families.py prints."""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from lightning_easier.zoo import CifarResNet

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def families():
    """Return the script as a module."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    spec = importlib.util.spec_from_file_location("families", DOCS / "maintainers" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.backends.mha.set_fastpath_enabled(was_enabled)


@pytest.fixture
def resnet():
    """Return a network of three blocks, of which one keeps its shape, and an image."""
    return "small", CifarResNet(8), torch.randn(1, 3, 8, 8)


def as_line(cells):
    return f"| {' | '.join(cells)} |"


def test_what_could_be_replaced_is_counted(families, resnet):
    stem, stages, head = 432 * 64, (4608 * 64, 13824 * 16, 55296 * 4), 640
    total = stem + sum(stages) + head
    chains, blocks = f"{sum(stages) / total:.0%}", f"{stages[0] / total:.0%}"
    assert families.row(*resnet) == ("small", "7", "3", "3", chains, "1", blocks)


def test_time_goes_to_the_modules_that_spend_it(families, resnet, monkeypatch):
    sizes = []

    def time_inside(models, arguments, *_, **__):
        sizes.append(len(arguments[0]))
        spent = {"layer1.0.conv1": 3.0, "layer1.0: add": 1.0, "layer2.0.conv2": 2.0, "linear": 2.0, "flatten": 2.0}
        return dict.fromkeys(models, spent)

    monkeypatch.setattr(families, "time_inside", time_inside)
    assert families.timed_row(*resnet) == ("small", "50%", "50%", "40%", "40%")
    assert sizes == [1, 8]


@pytest.mark.parametrize(("option", "columns"), [([], "COLUMNS"), (["--time"], "TIMED")])
def test_the_command_prints_the_table_of_the_page(families, resnet, option, columns, monkeypatch, capsys):
    page = (DOCS / "will-it-help.md").read_text().splitlines()
    monkeypatch.setattr(families, "networks", lambda: iter([resnet]))
    monkeypatch.setattr(families, "timed_row", lambda name, *_: (name, "a", "b", "c", "d"))
    monkeypatch.setattr(sys, "argv", ["families.py", *option])
    families.main()
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head == as_line(getattr(families, columns))
    assert page[page.index(head) + 1] == rule
    assert row == (as_line(["small", "a", "b", "c", "d"]) if option else as_line(families.row(*resnet)))


def test_rows_of_the_page_are_what_is_counted(families):
    page = (DOCS / "will-it-help.md").read_text().splitlines()
    for network in islice(families.networks(), 2):
        assert as_line(families.row(*network)) in page
