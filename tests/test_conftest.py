"""What is set for all tests: their order, and what is read once."""

from pathlib import Path
from types import SimpleNamespace

from lightning.fabric.utilities import registry
from lightning.pytorch import Trainer

from tests import conftest


def test_what_is_forked_comes_first_and_then_what_takes_long_and_all_else_stays_in_order():
    def item(nodeid, *fixtures):
        return SimpleNamespace(nodeid=nodeid, fixturenames=fixtures)

    items = [
        item("tests/test_export.py::b"), item("tests/integration/test_cli.py::a"), item("tests/test_export.py::a"),
        item("tests/measure/test_probe.py::a", "tmp_path", "forked"), SimpleNamespace(nodeid="README.md::README.md"),
        item("tests/test_wheel.py::a"), item("tests/sites/test_feeding.py::a"),
        item("tests/benchmarks/test_curve.py::a"), item("tests/test_wheel.py::forks", "forked"),
    ]  # fmt: skip
    conftest.pytest_collection_modifyitems(items)
    assert [each.nodeid for each in items] == [
        "tests/test_wheel.py::forks", "tests/measure/test_probe.py::a",
        "tests/integration/test_cli.py::a", "tests/test_wheel.py::a", "tests/benchmarks/test_curve.py::a",
        "tests/test_export.py::b", "tests/test_export.py::a", "README.md::README.md", "tests/sites/test_feeding.py::a",
    ]  # fmt: skip


def test_long_files_are_there():
    root = Path(conftest.__file__).parents[1]
    assert [name for name in conftest._LONG if not (root / name).exists()] == []


def test_what_is_told_of_all_packages_is_read_once_for_all_trainers(tmp_path):
    def made():
        Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        return registry.entry_points.cache_info()

    first, second = made(), made()
    assert second.misses == first.misses
    assert second.hits > first.hits
    groups = {each.group for each in registry.entry_points(group="lightning.pytorch.callbacks_factory")}
    assert groups <= {"lightning.pytorch.callbacks_factory"}
    assert {each.group for each in registry.entry_points(group="console_scripts")} == {"console_scripts"}
