"""Runs whose validation data hold a sample that is not a number, a batch without samples, or no chain at all."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

from tests.integration.tiny import pruning, train

torch.manual_seed(0)
X = torch.randn(128, 8)
Y = (X[:, 0] > 0).long()


class Validated(LightningModule):
    """An MLP whose score does not mind one strange sample."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        super().__init__()
        self.batches = batches
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch)
        self.log("val_acc", 0.9, batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 64)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


OPTIONS = [
    {},
    {"stand_in": "affine"},
    {"stand_in": "affine", "criterion": "linearity"},
    {"fit": True, "criterion": "linearity", "gain": "macs"},
]


def strange() -> list[torch.Tensor]:
    batches = [*X.split(32)]
    batches[1] = batches[1].clone()
    batches[1][5, 3] = math.nan
    return batches


@pytest.mark.parametrize("options", OPTIONS)
def test_one_sample_that_is_not_a_number_is_told_and_spoils_nothing(tmp_path, options):
    model, callback = Validated(strange()), pruning(dirpath=str(tmp_path), **options)
    with pytest.warns(UserWarning, match="1 of the 96 samples in what was measured"):
        train(model, callback, root=tmp_path, epochs=2, data=model)
    assert len(callback.removed) == 1
    assert bool(callback.rounds[-1].notes) == ("fit" in options)
    assert model(X).isfinite().all()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_validation_batch_without_samples_is_passed_over(tmp_path, options):
    model, callback = Validated([X[:0], *X.split(32), X[:0]]), pruning(dirpath=str(tmp_path), **options)
    train(model, callback, root=tmp_path, epochs=2, data=model)
    assert len(callback.removed) == 1
    assert model(X).isfinite().all()


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_removed_where_no_sample_is_finite(tmp_path, options):
    model, callback = Validated([torch.full((4, 8), math.nan)]), pruning(dirpath=str(tmp_path), **options)
    with pytest.warns(UserWarning, match="were not measured: none of the samples that reach them is finite"):
        train(model, callback, root=tmp_path, epochs=3, data=model)
    assert callback.removed == []


def test_nothing_is_said_of_chains_where_there_is_none(tmp_path, recwarn):
    model, callback = Validated([*X.split(32)]), pruning(dirpath=str(tmp_path), fit=True)
    train(model, callback, root=tmp_path, epochs=4, data=model)
    assert len(callback.removed) == 2  # all of them
    assert not [warning for warning in recwarn if "take the place of a chain: {}" in str(warning.message)]
