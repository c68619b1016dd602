"""The Python blocks of the README run as they stand, one after the other, in shorter runs; `make` has what is named."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.integration.blocks import ROOT, blocks, commands, names, run

README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed_everything(0)
    given = names()
    ran = run(README, given, languages=["python"])
    assert ran == sum(block.language == "python" for block in blocks(README)) >= 6
    assert given["pruning"].last_good is not None
    assert Path("model.onnx").is_file()
    shipped, images = given["shipped"], given["images"]
    with torch.no_grad():
        torch.testing.assert_close(shipped(images), given["module"].model.eval()(images), rtol=1e-3, atol=1e-3)
    assert "as given" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_make_is_told_is_a_target(page):
    told = [words for block in blocks(ROOT / page) if block.language == "bash" for words in commands(block.text)]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = {target for words in told if words[0] == "make" for target in words[1:]}
    assert wanted
    assert wanted <= set(targets)
