"""Blocks of the docs that are neither commands nor statements: configs, and programs that take commands."""

import ast
import importlib
import re
import runpy
import sys

import onnx
import pytest
import yaml

from lightning_easier.cli import EasierCLI
from lightning_easier.zoo import DigitsDataModule, ImageClassifier
from tests.integration.blocks import NOT_RUN, ROOT, SHORTER, blocks

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What a config that says nothing of it is put on
PARTS = {"model": "model/fused_resnet_digits", "data": "data/digits"}
# What the pages' `my_package` holds besides the classes of the page
PACKAGE = """
from lightning_easier.zoo import DigitsDataModule, ImageClassifier


class MyClassifier(ImageClassifier):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__("fused_resnet", backbone_args={"in_channels": 1, "widths": [4, 8]}, lr=lr)


class MyData(DigitsDataModule):
    def __init__(self) -> None:
        super().__init__(batch_size=64)
"""


class MyModule(ImageClassifier):
    """Is told the batch size."""

    def __init__(self, batch_size: int = 1) -> None:
        super().__init__("fused_resnet", backbone_args={"in_channels": 1, "widths": [4, 8]}, lr=0.05)
        self.batch_size = batch_size


def found(language, is_chosen=lambda block: True):
    """Return the blocks of a language on all pages, each with its page, for `parametrize`."""
    return [
        pytest.param(page, block, id=f"{page.relative_to(ROOT).as_posix()}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.language == language and not block.title.startswith(NOT_RUN) and is_chosen(block)
    ]


def is_program(block):
    return "__main__" in block.text


def classes_of(page, config):
    """Return the source of the classes that a config names and its page defines, and of all imports of the page."""
    source = "\n".join(block.text for block in blocks(page) if block.language == "python")
    kept = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.ClassDef) and f"my_package.{node.name}" in config)
    ]
    return "\n".join(map(ast.unparse, kept))


def kind_of(entry):
    """Return the class that an entry of a config names."""
    module, _, name = entry["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_holds(shown, composed):
    """Check that all that a config says is in what was composed of it."""
    for key, value in shown.items():
        if isinstance(value, dict):
            check_holds(value, composed[key])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for each, other in zip(value, composed[key], strict=True):
                check_holds(each, other)
        else:
            assert composed[key] == value, key


def test_there_are_such_blocks():
    assert len(found("yaml")) >= 3
    assert len(found("python", is_program)) >= 2


@pytest.mark.parametrize(("page", "block"), found("yaml"))
def test_a_config_of_the_docs_builds_what_it_says(page, block, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_package", None)  # what is imported now goes when the test has ended
    del sys.modules["my_package"]
    (tmp_path / "my_package.py").write_text(f"{PACKAGE}\n{classes_of(page, block.text)}")
    file = tmp_path / "block.yaml"
    file.write_text(block.text)
    shown = yaml.safe_load(block.text)
    parts = [f"--config={part}" for section, part in PARTS.items() if section not in shown]
    cli = EasierCLI(args=[*parts, f"--config={file}", "--trainer.accelerator=cpu"], run=False)
    check_holds(shown, cli.config.as_dict())
    made = [cli.model, cli.datamodule, *cli.trainer.callbacks]
    for entry in (*(shown[section] for section in PARTS if section in shown), *shown["trainer"]["callbacks"]):
        (built,) = [each for each in made if type(each) is kind_of(entry)]
        if method := entry.get("init_args", {}).get("method"):
            assert built.settings.method == kind_of(method)(**method["init_args"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "block"), found("python", is_program))
def test_a_program_of_the_docs_trains_and_compresses(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(block.text)
    given = {"MyModule": MyModule, "MyData": DigitsDataModule}

    def run(command, *options):
        monkeypatch.setattr(sys, "argv", ["train.py", command, *options])
        runpy.run_path("train.py", given, "__main__")

    run("fit", *(option for option in SHORTER["fit"] if ".callbacks." not in option), "--data.batch_size=32")
    version = tmp_path / "lightning_logs" / "version_0"
    saved = yaml.safe_load((version / "config.yaml").read_text())
    assert saved["data"]["batch_size"] == 32
    (checkpoint,) = (version / "checkpoints").glob("*.ckpt")
    told = [f"--config={version / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--output=model.onnx"]
    run("compress", *told, "--monitor=val_acc", *SHORTER["compress"])
    assert len(onnx.load("model.onnx").graph.input) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_is_fenced_as_one(page):
    texts = [block.text for block in blocks(page) if block.language in ("", "text")]
    assert not re.findall(r"^\s*\$? ?(lightning-easier|pip|python|make|git) .*", "\n".join(texts), re.MULTILINE)
