"""A collapsed network in the LightningModule that it comes from: fine-tuned, tested, saved, taken up, exported."""

import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_easier import collapse, compress, export, linearize
from tests.models import randomize_batch_norms


class Module(LightningModule):
    """Somebody's own: a network, a metric, all four steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16), nn.ReLU(),
            nn.Linear(16, 3),
        )  # fmt: skip
        randomize_batch_norms(self.net)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_acc", self.accuracy, on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data() -> DataLoader:
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)


def trainer(root, *callbacks, epochs: int = 2) -> Trainer:
    return Trainer(
        max_epochs=epochs, default_root_dir=root, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )  # fmt: skip


def collapsed(module: Module) -> nn.Module:
    linearize(module.net, ["2"])
    return collapse(module.net, torch.randn(32, 8), objective="macs").model


def compressed(module: Module) -> nn.Module:
    return compress(module.net, data(), objective="macs", max_drift=0.9).model


@pytest.mark.parametrize("make", [collapsed, compressed])
def test_a_network_that_became_smaller_goes_on_in_its_module(tmp_path, make):
    module = Module()
    module.net = make(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_acc", mode="max")
    first = trainer(tmp_path).test(module, data(), verbose=False)[0]["val_acc"]
    run = trainer(tmp_path, best)
    run.fit(module, data(), data())
    assert all(not torch.equal(value, before[name]) for name, value in module.net.state_dict(prefix="net.").items())
    (tested,) = run.test(module, data(), ckpt_path="best", verbose=False)
    assert tested["val_acc"] == pytest.approx(float(best.best_model_score))
    assert tested["val_acc"] > first
    x, labels = data().dataset.tensors
    predicted = torch.cat(run.predict(module, data()))
    assert float(MulticlassAccuracy(3)(predicted, labels)) == pytest.approx(tested["val_acc"])

    # In another process: the network as it was saved, and any checkpoint of the run
    torch.save(module.net, tmp_path / "net.pt")
    again = Module()
    again.net = torch.load(tmp_path / "net.pt", weights_only=False)
    (loaded,) = trainer(tmp_path).test(again, data(), ckpt_path=best.best_model_path, verbose=False)
    assert loaded == tested
    longer = trainer(tmp_path, epochs=4)
    longer.fit(again, data(), data(), ckpt_path=best.best_model_path)
    assert longer.current_epoch == 4

    export(again.net, tmp_path / "net.onnx", x[:4], input_names=["features"], output_names=["scores"], opset_version=18)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (scores,) = session.run(["scores"], {"features": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scores), again.net.eval()(x), atol=1e-4, rtol=1e-4)
