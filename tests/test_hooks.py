"""Tests of hooks that stay with their model."""

import copy
import io

import torch
from torch import nn

from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.sites.activations import isolated_sites


def test_what_a_copy_or_a_pickle_computes_is_not_counted():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with EntropyProbe(isolated_sites(model)) as probe:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = copy.deepcopy(model), torch.load(file, weights_only=False)
        model(torch.randn(8, 2))
        before = probe.counts()["1"]
        for other in copies:
            x = torch.randn(5, 2)
            torch.testing.assert_close(other(x), nn.functional.relu(model[0](x)))
        after = probe.counts()["1"]
        model(torch.randn(8, 2))
        counted = probe.counts()["1"]
    assert before["calls"] == after["calls"] == 1
    assert torch.equal(before["on"], after["on"])
    assert counted["calls"] == 2


def test_a_copy_runs_on_when_the_model_has_no_hooks_any_more():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with EntropyProbe(isolated_sites(model)):
        other = copy.deepcopy(model)
    x = torch.randn(4, 2)
    torch.testing.assert_close(other(x), model(x))
