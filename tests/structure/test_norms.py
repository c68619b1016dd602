"""Batch norms that compute more than that are split where that computes the same, and only there."""

import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from lightning_easier import candidates, collapse, compress
from lightning_easier.structure.norms import split_norms
from lightning_easier.support.inference import relative_difference


def trained(norm: nn.Module) -> nn.Module:
    """Give a batch norm values that it may have after training."""
    with torch.no_grad():
        for each in norm.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.running_mean.normal_()
                each.running_var.uniform_(0.5, 2)
                each.weight.uniform_(0.5, 2)
                each.bias.normal_()
    return norm


class Activated(nn.BatchNorm1d):
    """As people write it for vectors and sequences."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.3)
        self.slope = nn.PReLU(channels)

    def forward(self, x):
        return self.slope(super().forward(x))


class Added(Activated):
    def forward(self, x):
        return x + self.slope(nn.BatchNorm1d.forward(self, x))


class Scaled(Activated):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.full((channels,), 2.0))

    def forward(self, x):
        return super().forward(x) * self.gain


@pytest.mark.parametrize(("norm", "shape"), [
    (lambda: BatchNormAct2d(4), (5, 4, 3, 2)), (lambda: BatchNormAct2d(4, act_layer=nn.SiLU), (5, 4, 3, 2)),
    (lambda: BatchNormAct2d(4, apply_act=False), (5, 4, 3, 2)), (lambda: Activated(4), (5, 4, 3)),
    (lambda: Activated(4).double(), (5, 4, 3)),
])  # fmt: skip
def test_it_computes_the_same_in_either_mode_with_the_same_parameters(norm, shape):
    torch.manual_seed(0)
    whole, copy = trained(norm()), norm()
    copy.load_state_dict(whole.state_dict())
    dtype = whole.weight.dtype
    model = nn.Sequential(nn.Identity(), whole)
    parameters = set(model.parameters())
    assert split_norms(model) == ["1"]
    assert type(model[1].norm) in (nn.BatchNorm1d, nn.BatchNorm2d)
    assert set(model.parameters()) == parameters
    assert [name for name, _ in copy.named_children()] == [name for name, _ in model[1].named_children()][1:]
    for mode in (False, True, True, False):
        values = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(model.train(mode)(values.clone()), copy.train(mode)(values.clone()))
    torch.testing.assert_close(model[1].norm.running_var, copy.running_var)
    assert split_norms(model) == []


def test_what_computes_something_else_or_is_watched_stays():
    hooked = BatchNormAct2d(4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleList([Added(4), Scaled(4), hooked, nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
    before = dict(model.named_modules())
    assert split_norms(model) == []
    assert dict(model.named_modules()) == before


def test_blocks_of_timm_are_compressed_through_them():
    torch.manual_seed(0)
    blocks = [InvertedResidual(6, 6, exp_ratio=4.0, norm_layer=BatchNormAct2d) for _ in range(2)]
    model = trained(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))).eval()
    data = [torch.randn(8, 6, 12, 12) for _ in range(4)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    listed = {each.name: each for each in candidates(model).candidates}
    assert listed["1.bn1.act"].merges == (("1.conv_pw", "1.conv_dw"),)
    result = compress(model, data, objective="macs", max_drift=math.inf)
    through = [trial for trial in result.report.trials if any("bn1.act" in site for site in trial.sites) and trial.kept]
    assert through
    assert relative_difference(result.model(data[0]), result.fitted(data[0])) < 1e-4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    site = through[0].sites[0]
    fitted = collapse(model, data[0], mode="fit", sites=[site], calibration=data, objective="macs", slack=9.0)
    assert [each.sites for each in fitted.report.fitted] == [(site,)]
