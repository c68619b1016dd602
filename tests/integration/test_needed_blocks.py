"""Blocks that a model can't run without stay, and it is said why, before training would crash."""

import random

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_easier import FitChains, OptimalTransportCallback, PruningCallback
from lightning_easier.pruning import without_blocks
from lightning_easier.pruning.without_blocks import WithoutBlocks
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.linearize import stand_ins
from tests.integration import residual
from tests.integration.test_optimal_transport import Dies, Saves, chosen, fit


class Net(residual.Net):
    """The second of its blocks has to be of its class, which no look at its forward tells."""

    def forward(self, x):
        x = super().forward(x)
        if not isinstance(self.blocks[1], residual.Residual):
            raise NotImplementedError("no such block")
        return x


class Late(residual.Net):
    """It reads what each block sets while it runs."""

    class Block(residual.Residual):
        def forward(self, x):
            y = super().forward(x)
            self.last = (y - x).square().mean()
            return y

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks = nn.ModuleList(self.Block(6) for _ in range(3))

    def forward(self, x):
        x = super().forward(x)
        return x + 0 * sum(block.last for block in self.blocks)


def fitting(blocks=None, **options):
    """Take blocks out in rounds of training, one after the other."""
    return PruningCallback(FitChains(blocks=True), include=blocks or ["blocks.?"], **options)


KIND = pytest.mark.parametrize("kind", [OptimalTransportCallback, fitting])


@KIND
def test_a_block_that_the_model_can_not_run_without_stays_and_it_is_said_why(tmp_path, kind):
    with pytest.warns(UserWarning, match=r"\['blocks.1'\] are not taken out: .*\(NotImplementedError: no such block"):
        model, callback, _ = fit(tmp_path, model=Net(), kind=kind, epochs=3)
    assert sorted(callback.removed) == ["blocks.0", "blocks.2"]
    assert "blocks.1" not in stand_ins(model)


@KIND
def test_where_no_block_is_left_it_is_said_why(tmp_path, kind):
    with pytest.warns(UserWarning, match=r"are not taken out: .*(another forward reads|does not run without)"):
        _, callback, _ = fit(tmp_path, model=Late(), kind=kind)
    assert callback.removed == []


def test_a_dry_run_lists_what_the_model_can_not_run_without(tmp_path):
    _, callback, _ = fit(tmp_path, model=Net(), dry_run=True)
    assert [row.name for row in callback.listed.blocks] == ["blocks.0", "blocks.2"]
    assert [*callback.listed.left_out] == ["blocks.1"]
    _, callback, _ = fit(tmp_path, model=Net(), kind=fitting, dry_run=True)
    row = next(row for row in callback.listed.blocks if row.name == "blocks.1")
    assert row.chosen is None
    assert "NotImplementedError" in row.reason


def test_a_resumed_run_leaves_out_the_same(tmp_path):
    whole = fit(tmp_path / "whole", model=Net)
    root = tmp_path / "killed"
    root.mkdir()
    fit(root, Saves(root), Dies("on_validation_end", 5), model=Net)
    saved = max(root.glob("rounds/round_*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = fit(root, model=Net, ckpt_path=saved)
    assert chosen(resumed[1]) == chosen(whole[1])
    assert sorted(resumed[1].removed) == ["blocks.0", "blocks.2"]


class Logs(residual.Net):
    """It logs in its forward."""

    def forward(self, x):
        if not self.training:
            self.log("whole", float(isinstance(self.blocks[0], residual.Residual)))
        return super().forward(x)


def test_what_is_logged_meanwhile_does_not_count(tmp_path):
    logged = []

    class Notes(Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.append(
                (trainer.sanity_checking, len(stand_ins(pl_module)), trainer.callback_metrics["whole"].item())
            )

    fit(tmp_path, Notes(), model=Logs(), epochs=1)
    assert (False, 0, 1.0) in logged
    assert {whole for _, _, whole in logged} == {0.0, 1.0}


class Inconstant(nn.Module):
    """Two blocks; the model draws, counts and keeps what it did."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.f(x)

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Block(), self.Block()
        self.register_buffer("count", torch.zeros(()))
        self.seen, self.calls = [], 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(self.calls)
        x = self.second(self.first(x)) + torch.rand(3) + random.random()
        return x if isinstance(self.second, self.Block) else x.nope


@torch.no_grad()
def test_each_block_is_tried_once_and_nothing_of_it_is_left():
    model, runs, x = Inconstant().eval(), [], torch.randn(5, 3)
    model.first.register_forward_pre_hook(lambda *_: runs.append(1))
    paused = []
    without = WithoutBlocks(paused.append)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["first", "second"]
    states, hooks = [], len(model._forward_hooks)
    for watched in (False, True, True):
        torch.manual_seed(0)
        random.seed(0)
        runs.clear()
        model.count.zero_()
        model.seen.clear()
        model.calls = 0
        if watched:
            without.watch(model, blocks)
        outputs = [model(x), model(x)]
        without.detach()
        without.agree()
        states.append((*outputs, model.count.clone(), [*model.seen], model.calls, torch.rand(2), random.random()))
        states[-1] = [torch.as_tensor(value) for value in states[-1]]
        # with each block, without the second, and without the first, which does not count here
        assert len(runs) == (4 if watched and not states[2:] else 2)
    for state in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, states[0], strict=True))
    assert [*without.reasons] == ["second"]
    assert without.reasons["second"].startswith("the model does not run without it (AttributeError")
    assert paused == [True, False]
    assert len(model._forward_hooks) == hooks


@torch.no_grad()
def test_what_fails_on_another_process_is_left_out(monkeypatch):
    def with_another(tensors):
        return [tensor + torch.tensor([[1, 1], [1, 0]]) for tensor in tensors]

    monkeypatch.setattr(without_blocks, "sum_over_processes", with_another)
    model = nn.Sequential(Inconstant.Block(), Inconstant.Block()).eval()
    without = WithoutBlocks(lambda paused: None)
    without.watch(model, find_blocks(model))  # this process gets no batch
    without.agree()
    assert without.reasons == {"0": "the model does not run without it on another process"}
    runs = []
    model[0].register_forward_pre_hook(lambda *_: runs.append(1))
    without.watch(model, find_blocks(model))
    model(torch.randn(2, 3))
    assert runs == [1]


class Logarithm(residual.Net):
    """The logarithm of what one block computes; of nothing it is infinite."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return self.head(x + self.blocks[1].second(x).abs().log())


def test_a_branch_without_which_values_are_not_finite_stays(tmp_path):
    assert "blocks.1.second" in [block.name for block in find_blocks(Logarithm())]
    with pytest.warns(UserWarning, match=r"\['blocks.1.second'\] are not taken out: what the model returns is not fin"):
        _, callback, _ = fit(tmp_path, model=Logarithm())
    assert callback.removed == ["blocks.0"]


class ReadByAStep(residual.Net):
    """A step reads an attribute of a block."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("scale", self.blocks[1].scale)


@KIND
def test_an_error_in_a_step_names_the_block_that_was_taken_out_and_the_remedy(tmp_path, kind):
    with pytest.raises(AttributeError, match="has no attribute 'scale'") as caught:
        fit(tmp_path, model=ReadByAStep(), kind=kind, blocks="blocks.1", epochs=3)
    assert "['blocks.1'] were taken out of the model by" in caught.value.__notes__[0]
    assert "pass exclude=['blocks.1']" in caught.value.__notes__[0]


class ReadByIndex(residual.Net):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("length", float(len(self.blocks[1])))

    def __init__(self):
        super().__init__()
        self.blocks[1] = Lengthy(6)


class Lengthy(residual.Residual):
    def __len__(self):
        return 3

    def forward(self, x):
        return x + F.relu(self.first(x))


def test_an_error_without_an_attribute_names_what_the_round_has_taken_out(tmp_path):
    with pytest.raises(TypeError, match="has no len") as caught:
        fit(tmp_path, model=ReadByIndex(), blocks="blocks.1")
    assert "pass exclude=['blocks.1']" in caught.value.__notes__[0]
