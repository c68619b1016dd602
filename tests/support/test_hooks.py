"""Tests of hooks that stay with their model."""

import copy
import io
import pickle
import weakref

import torch
from torch import nn

from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.support.hooks import Remembered, Undone


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


def test_what_was_put_around_an_object_is_undone_once_and_by_the_original_alone():
    undone = []
    around = Undone()
    around.callback(undone.append, "first")
    around.callback(undone.append, "last")
    for copied in (copy.deepcopy(around), pickle.loads(pickle.dumps(around))):
        copied.close()
    assert undone == []
    around.close()
    around.close()
    assert undone == ["last", "first"]


def test_an_object_is_known_again_while_it_lives_and_by_the_original_alone():
    first, second = nn.Identity(), nn.Identity()
    known = Remembered(first)
    assert known.is_(first)
    assert not known.is_(second)
    assert not Remembered().is_(first)
    for copied in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert not copied.is_(first)
    gone = weakref.ref(first)
    del first
    assert gone() is None
