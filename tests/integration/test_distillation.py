"""Rounds that are trained on the dense network's logits, too."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_easier.linearize import restore
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.tiny import Tiny, assert_equal_states, pruning, train

DISTILLED = {"distill": True, "distill_weight": 0.3, "distill_temperature": 2.0}


class Expected(Callback):
    """Computes by hand, from a model and a batch before a step, what the step has to log."""

    def __init__(self):
        self.dense = None
        self.expected, self.logged, self.losses = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        if self.dense is None:
            self.dense = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            return
        student = copy.deepcopy(pl_module)
        teacher = restore(copy.deepcopy(pl_module))
        teacher.load_state_dict(self.dense)
        with torch.no_grad():
            z, t = student.train()(batch[0]) / 2.0, teacher.eval()(batch[0]) / 2.0
            divergence = (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
            self.expected.append(4.0 * divergence)
            self.losses.append(0.7 * F.cross_entropy(z * 2.0, batch[1]) + 0.3 * 4.0 * divergence)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch > 0:
            self.logged.append(trainer.callback_metrics["distill_loss"])
            torch.testing.assert_close(outputs["loss"], self.losses[-1], rtol=1e-4, atol=1e-6)
        else:
            assert "distill_loss" not in trainer.callback_metrics


class WithDict(Small):
    """Returns its loss among other things, and its logits in a mapping."""

    class Inner(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    def __init__(self):
        super().__init__()
        self.layers = self.Inner(*self.layers)

    def forward(self, x):
        return super().forward(x)["logits"]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "more": 1}


@pytest.mark.parametrize("make", [Small, WithDict])
def test_a_step_is_that_of_a_loss_written_by_hand(tmp_path, make):
    watch = Expected()
    torch.manual_seed(0)
    model, callback, trainer = run(tmp_path, watch, model=make(), pruning=DISTILLED, epochs=3)
    assert len(callback.removed) == 2
    assert len(watch.logged) == 6
    for logged, expected in zip(watch.logged, watch.expected, strict=True):
        torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-6)
    assert float(max(watch.logged)) > 1e-4
    assert "training_step" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any("teacher" in key for key in model.state_dict())


def test_the_weights_follow_the_divergence(tmp_path):
    """With all the weight on it, labels do not matter."""

    def fit(labels):
        torch.manual_seed(0)
        model = Small()
        step = model.training_step

        def relabelled(batch, batch_idx):
            wanted = labels(batch[1]) if model.current_epoch > 0 else batch[1]
            return step((batch[0], wanted), batch_idx)

        model.training_step = relabelled
        model, *_ = run(tmp_path / str(labels(0)), model=model, pruning=DISTILLED | {"distill_weight": 1.0}, epochs=3)
        assert model.training_step is relabelled  # the user's own is back
        return model.state_dict()

    assert_equal_states(dict(fit(lambda y: y)), dict(fit(lambda y: 1 - y)))


@pytest.mark.parametrize("moment", [("on_train_batch_end", 1), ("on_train_epoch_end", None)])
@pytest.mark.parametrize("more", [{}, {"collapse": "fit", "on_reject": "next"}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, moment, more):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    options = {"scores": (0.9, 0.9, 0.1, 0.9), "pruning": DISTILLED | {"on_reject": "next"} | more}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path, At(moment[0], 2, moment[1], save), **options)
    resumed = run(tmp_path, ckpt_path=path, **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_accumulated_gradients_and_autocast(tmp_path):
    _, callback, trainer = run(tmp_path, pruning=DISTILLED, accumulate_grad_batches=2, precision="bf16-mixed", epochs=3)
    assert len(callback.removed) == 2
    assert torch.isfinite(trainer.callback_metrics["distill_loss"])


def test_maps_of_logits(tmp_path):
    class Maps(Small):
        def forward(self, x):
            return super().forward(x)[:, :, None, None].expand(-1, -1, 3, 2)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1][:, None, None].expand(-1, 3, 2))

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    watch = Expected()
    run(tmp_path / "maps", model=Maps(), pruning=DISTILLED, epochs=2)
    _, _, trainer = run(tmp_path, watch, pruning=DISTILLED, epochs=2)
    assert torch.isfinite(trainer.callback_metrics["distill_loss"])


class Elsewhere(Small):
    """Trains by a method that calls no module that holds all activations."""

    def training_step(self, batch, batch_idx):
        x = self.norm(batch[0])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(x, batch[1])


class Strange(Small):
    """Returns what has no logits."""

    def forward(self, x):
        return SimpleNamespace(scores=super().forward(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).scores, batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Elsewhere, r"training step of Elsewhere called none of \['its forward', 'layers'\]"),
        (Strange, "a tensor or the `logits` of an output, but the network returned SimpleNamespace"),
    ],
)
def test_what_can_not_be_distilled_is_an_error_and_leaves_nothing_behind(tmp_path, make, message):
    model = make()
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, model=model, pruning=DISTILLED)
    assert "training_step" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_manual_optimization_is_refused_at_the_start(tmp_path):
    model = Small()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`distill` to be False with manual optimization"):
        run(tmp_path, model=model, pruning=DISTILLED)


def test_a_dense_checkpoint_that_is_gone_is_named(tmp_path):
    class Lose(Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                (tmp_path / "entropy_pruning" / "round_0.ckpt").unlink()

    callback = pruning(**DISTILLED)
    train(Tiny(), callback, Lose(), root=tmp_path, epochs=3)  # it is read once
    saved = tmp_path / "entropy_pruning" / "round_1.ckpt"
    with pytest.raises(FileNotFoundError, match="its checkpoint .*round_0.ckpt is gone"):
        train(Tiny(), pruning(**DISTILLED), root=tmp_path, epochs=5, ckpt_path=saved)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distill": "yes"}, TypeError, "`distill` to be a bool, but got 'yes'"),
        ({"distill_weight": 0}, ValueError, "`distill_weight` to be above 0 and at most 1, but got 0"),
        ({"distill_temperature": 0}, ValueError, "`distill_temperature` to be above 0, but got 0"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pruning(**options)
