"""A text classifier of Hugging Face on the command line, with the `./own.py` and the commands of the page."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from lightning_easier.command import main
from tests.integration.blocks import ROOT, SHORTER, blocks, commands

PAGE = ROOT / "docs" / "how-to" / "own-model.md"


@pytest.fixture
def beside_own_py(tmp_path, monkeypatch):
    """A folder with the page's `own.py` in it; the process is in it, too."""
    (own,) = (block.text for block in blocks(PAGE) if block.title == 'title="own.py"')
    (tmp_path / "own.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the folder in front
    yield tmp_path
    sys.modules.pop("own", None)


def test_the_commands_of_the_page_leave_a_file_that_takes_texts_of_any_length(beside_own_py):
    (lines,) = (block.text for block in blocks(PAGE) if block.title == 'title="beside own.py"')
    given = list(commands(lines))
    assert [words[:2] for words in given] == [["lightning-easier", "fit"], ["lightning-easier", "compress"]]
    fit, compress = (words[1:] for words in given)
    main([*fit, "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    named = next(each for each in compress if "*" in each)
    (checkpoint,) = Path().glob(named)  # as the shell does
    main([*(str(checkpoint) if each == named else each for each in compress), *SHORTER["compress"]])

    session = onnxruntime.InferenceSession("text.onnx")
    assert {each.name for each in session.get_inputs()} == {"input_ids", "attention_mask"}
    for samples, length in ((1, 16), (3, 5)):
        words = np.ones((samples, length), dtype=np.int64)
        (logits,) = session.run(["logits"], {"input_ids": words, "attention_mask": words})
        assert logits.shape == (samples, 2)
    assert torch.tensor(logits).isfinite().all()
    shutil.rmtree("texts")
