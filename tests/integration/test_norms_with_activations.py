"""Batch norms that hold an activation, as timm's: a run names them, and prunes through them once they are split."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.norms import norms_to_split, split_norms
from tests.integration.tiny import pruning, train

WARNING = "6 modules, such as 'model.1.bn1', are a batch norm and what follows it in one"
FITTED = {"fit": True, "criterion": "linearity", "gain": "macs", "mergeable_only": True}


class Mobile(LightningModule):
    """Two blocks of timm's MobileNets on digits, on as many channels as make a convolution cheaper than a block."""

    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        blocks = [InvertedResidual(6, 6, exp_ratio=6.0, norm_layer=BatchNormAct2d) for _ in range(2)]
        self.model = nn.Sequential(nn.Conv2d(1, 6, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
        if split:
            split_norms(self)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def warned(record):
    return [str(each.message) for each in record if "a batch norm and what follows it" in str(each.message)]


def test_they_are_named_when_a_run_starts_that_would_find_nothing_through_them(tmp_path):
    callback = pruning(**FITTED)
    with pytest.warns(UserWarning, match=WARNING):
        train(Mobile(), callback, root=tmp_path)
    assert callback.removed == []


def test_they_are_named_in_a_dry_run_and_not_where_no_operator_is_looked_at(tmp_path):
    with pytest.warns(UserWarning, match=WARNING):
        train(Mobile(), pruning(**FITTED, dry_run=True), root=tmp_path / "dry")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train(Mobile(), pruning(), root=tmp_path / "easier")
    assert warned(record) == []


def test_once_they_are_split_one_operator_takes_the_place_of_what_is_around_their_activations(tmp_path):
    callback, model = pruning(**FITTED), Mobile(split=True)
    assert norms_to_split(model) == []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train(model, callback, root=tmp_path)
    assert warned(record) == []
    assert sorted(callback.removed) == ["model.1.bn1.act", "model.2.bn1.act"]
    assert {*callback.removed} <= stand_ins(model).keys()
