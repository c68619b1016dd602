"""The Python blocks of the README run as they stand, one after the other, in shorter runs."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_easier.zoo import DigitsDataModule, ImageClassifier

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed_everything(0)
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("validate")
    batches = [images for images, _ in data.val_dataloader()][:4]

    @torch.no_grad()
    def accuracy(model):
        hits = [model(images).argmax(-1) == labels for images, labels in data.val_dataloader()]
        return float(torch.cat(hits).double().mean())

    model = ImageClassifier("fused_resnet", backbone_args={"in_channels": 1, "widths": [4, 8]}, lr=0.05)
    names = {"model": model, "data": data, "batches": batches, "images": batches[0], "accuracy": accuracy,
             "MyModule": ImageClassifier}  # fmt: skip
    ran = 0
    for block in blocks():
        shorter = re.sub(r"(max_epochs|epochs)=\d+", lambda match: f"{match[1]}=1", block)
        shorter = shorter.replace("max_epochs=1, callbacks", "max_epochs=3, callbacks")
        before = dict(names)
        exec(compile(shorter, str(README), "exec"), names)
        if "pruning =" in block and ".fit(" not in block:  # another way to make one, that no Trainer has run
            names["pruning"] = before["pruning"]
        ran += 1
    assert ran >= 6
    assert names["pruning"].last_good is not None
    assert Path("model.onnx").is_file()
    shipped = names["shipped"]
    with torch.no_grad():
        torch.testing.assert_close(shipped(batches[0]), names["module"].model.eval()(batches[0]), rtol=1e-3, atol=1e-3)
    assert "as given" in capsys.readouterr().out
