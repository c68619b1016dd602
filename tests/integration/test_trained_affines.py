"""Affines that are trained join the optimizer that is there."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_easier import load_pruned
from lightning_easier.structure.linearize import stand_ins
from tests.integration.interrupted import Small, run
from tests.integration.tiny import assert_equal_states
from tests.settings import callback as callback_of

TRAINED = {"stand_in": "affine", "trainable": True}


class Grouped(Small):
    """Norms are not decayed; what lies after the last rectifier learns faster; parameters are known by name."""

    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
        )

    def configure_optimizers(self):
        norms = list(self.norm.named_parameters("norm")) + list(self.layers[1].named_parameters("layers.1"))
        body = [*self.layers[0].named_parameters("layers.0"), *self.layers[3].named_parameters("layers.3")]
        optimizer = torch.optim.SGD(
            [{"params": body}, {"params": norms, "weight_decay": 0.0}], 0.05, momentum=0.9, weight_decay=0.01
        )
        head = torch.optim.SGD(self.layers[5].named_parameters("layers.5"), 0.1)
        self.automatic_optimization = False
        return [optimizer, head], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class Groups(Callback):
    """Notes the names in each parameter group, and the affines, after each batch."""

    def __init__(self):
        self.names, self.scales = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        known = {id(p): name for name, p in pl_module.named_parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.names.append([[known[id(p)] for p in group["params"]] for group in groups])
        assert self.names[-1] == [group["param_names"] for group in groups]
        self.scales.append({name: each.weight.clone() for name, each in stand_ins(pl_module).items()})


def test_they_join_the_group_of_what_is_trained_before_them_and_are_trained(tmp_path):
    noted = Groups()
    model, callback, trainer = run(tmp_path, noted, model=Grouped(), pruning=TRAINED, epochs=3)
    assert len(callback.removed) == 2
    body, norms, head = noted.names[-1]
    assert norms[-2:] == ["layers.2.weight", "layers.2.bias"]
    assert body[-2:] == ["layers.4.weight", "layers.4.bias"]
    assert head == ["layers.5.weight", "layers.5.bias"]
    first = callback.removed[0]
    seen = [scales[first] for scales in noted.scales if first in scales]
    assert not any(torch.equal(before, after) for before, after in pairwise(seen))
    kept = [len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert sum(kept) == len(list(model.parameters()))


def test_they_leave_again_when_their_round_is_taken_back(tmp_path):
    noted = Groups()
    model, callback, _ = run(tmp_path, noted, model=Grouped((0.9, 0.9, 0.1)), pruning=TRAINED)
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    (kept,) = callback.removed
    assert list(stand_ins(model)) == [kept]
    assert isinstance(stand_ins(model)[kept].weight, nn.Parameter)
    dense, with_one, with_two = (sorted(map(len, names)) for names in noted.names[::3][:3])
    assert (sum(dense), sum(with_one), sum(with_two)) == (10, 12, 14)


def test_a_checkpoint_holds_them(tmp_path):
    _, callback, _ = run(tmp_path, pruning=TRAINED)
    loaded = load_pruned(Small(), callback.last_good)
    assert all(isinstance(each.weight, nn.Parameter) for each in stand_ins(loaded).values())
    saved = torch.load(callback.last_good, weights_only=True)["state_dict"]
    assert_equal_states(dict(loaded.state_dict()), dict(saved))


def test_frozen_neighbours_are_passed_over(tmp_path):
    class Frozen(Small):
        def configure_optimizers(self):
            return torch.optim.SGD(self.layers[10].parameters(), 0.1)  # after all rectifiers

    model, _, trainer = run(tmp_path, model=Frozen(), pruning=TRAINED, epochs=2)
    ((_, affine),) = stand_ins(model).items()
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"][2:]] == [id(affine.weight), id(affine.bias)]


def test_an_identity_has_nothing_to_train():
    with pytest.raises(ValueError, match="`trainable` to be False with stand_in='identity', but got True"):
        callback_of("score", trainable=True)
    with pytest.raises(TypeError, match="`trainable`"):
        callback_of("score", stand_in="affine", trainable="yes")


def test_lbfgs_can_not_take_them(tmp_path):
    class Full(Small):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="with which parameters leave or join LBFGS"):
        run(tmp_path, model=Full(), pruning=TRAINED)
