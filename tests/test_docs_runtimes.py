"""Blocks of the docs that need packages which the tests do without: they run where these are installed."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_easier.support.costs import count_macs
from tests.integration.blocks import NOT_RUN, ROOT, blocks, names, run


def ran(page, what):
    """Run the Python blocks of a page, then the one that needs something; return the names that they define."""
    seed_everything(0)
    given = names()
    run(page, given, languages=["python"])
    (block,) = (block for block in blocks(page) if block.title == f'{NOT_RUN}{what}"')
    exec(compile("\n" * block.line + block.text, str(page), "exec"), given)
    return given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["openvino", "executorch"])
def test_a_runtime_computes_what_the_model_does(package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    given = ran(ROOT / "docs" / "how-to" / "export.md", f"needs {package}")
    scores = torch.as_tensor(given["scores"])
    with torch.no_grad():
        expected = given["small"](given["images"])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(scores, expected[: len(scores)], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_pruning_has_narrowed_is_compressed(tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    given = ran(ROOT / "docs" / "coming-from" / "torch-pruning.md", "needs the extra peers")
    images, narrowed = given["images"], given["model"].eval()
    networks = names()["model"].eval(), narrowed, given["result"].model
    macs = [count_macs(model, [images]) for model in networks]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 3
