"""What a run needs besides its weights to be taken up: optimizers as they were, what was pending, whose state it is."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_easier import Linearize, restore_structure_on_load
from lightning_easier.callbacks import wiring
from lightning_easier.structure.linearize import MARK_KEY, stand_ins
from tests.integration.interrupted import BATCHES, At, Small, outcome, run, stop
from tests.integration.test_verdicts import no_warning_of
from tests.integration.tiny import assert_equal_states
from tests.settings import callback as callback_of

SLOPE = "layers.3"


class SlopeFirst(Linearize):
    """Removes the activation that has a parameter, then others."""

    def select(self, ranks, count):
        return [SLOPE] if SLOPE in ranks else super().select(ranks, count)


def slopes_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, nn.PReLU) for p in module.parameters()]


class GroupOfItsOwn(Small):
    """A parameter group of slopes, as one makes it to spare them the weight decay."""

    def configure_optimizers(self):
        slopes = slopes_of(self)
        others = [p for p in self.parameters() if all(p is not slope for slope in slopes)]
        groups = [{"params": others}, *([{"params": slopes, "weight_decay": 0.0}] if slopes else [])]
        optimizer = torch.optim.Adam(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


class OptimizerOfItsOwn(Small):
    """Slopes have an optimizer, which can't be made without any."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        slopes = slopes_of(self)
        others = [p for p in self.parameters() if all(p is not slope for slope in slopes)]
        optimizer = torch.optim.Adam(others, lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer, torch.optim.SGD(slopes, lr=0.1, momentum=0.9)], [schedule]


class GroupByName(Small):
    """A group for each layer."""

    def configure_optimizers(self):
        layers = {name.rpartition(".")[0] for name, _ in self.named_parameters()}
        groups = [
            {"params": [p for name, p in self.named_parameters() if name.rpartition(".")[0] == layer]}
            for layer in sorted(layers)
        ]
        optimizer = torch.optim.Adam(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


def seeded(make):
    """Make a model of the same weights each time."""
    torch.manual_seed(3)
    return make()


def saver(path: Path):
    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    return save


@pytest.mark.parametrize("make", [GroupOfItsOwn, OptimizerOfItsOwn, GroupByName])
def test_optimizers_are_built_again_as_they_were_before_a_parameter_left(tmp_path, make):
    path = tmp_path / "saved.ckpt"
    whole = run(tmp_path / "whole", model=seeded(make), method=SlopeFirst)
    run(tmp_path, At("on_train_batch_end", 2, 1, saver(path)), model=seeded(make), method=SlopeFirst)
    model = seeded(make)
    resumed = run(tmp_path, model=model, method=SlopeFirst, ckpt_path=path)
    assert resumed[1].rounds[1].removed == [SLOPE]
    assert_equal_states(outcome(*resumed), outcome(*whole))
    assert slopes_of(model) == []
    held = {p for optimizer in resumed[2].optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert "configure_optimizers" not in vars(model)


@pytest.mark.parametrize(("most", "accepted"), [(1, [True, True, False]), (3, [True, True, False, True])])
def test_a_run_whose_score_was_nan_goes_on_from_its_last_good_model(tmp_path, most, accepted):
    scores, options = (0.9, 0.9, math.nan), {"pruning": {"max_rejections": most}, "epochs": 4}
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="finite, but got nan in epoch 2"):
        run(tmp_path, saved, scores=scores, **options)
    model, callback, _ = run(tmp_path, scores=(0.9,), ckpt_path=saved.ckpt_path, **options)
    assert [this.accepted for this in callback.rounds] == accepted
    assert sorted(stand_ins(model)) == sorted(callback.removed)
    assert not set(callback.rounds[2].removed) & set(callback.removed)


def test_early_stopping_sees_the_end_of_an_epoch_that_lightning_skips(tmp_path):
    scores = (0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    options = {"scores": scores, "pruning": {"epochs": 3, "tolerance": 5.0}, "epochs": 9}

    def stopping():
        return EarlyStopping("score", mode="max", patience=2)

    whole = run(tmp_path / "whole", stopping(), **options)
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    run(tmp_path, stopping(), saved, At("on_validation_start", 4, None, stop), **options)
    resumed = run(tmp_path, stopping(), ckpt_path=tmp_path / "saved" / "last.ckpt", **options)
    assert whole[2].current_epoch == 6
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_early_stopping_waits_for_a_score_of_the_structure_as_it_is(tmp_path):
    waited = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            waited.append(stopping.wait_count)

    stopping = EarlyStopping("score", mode="max", patience=2, check_on_train_epoch_end=True, strict=False)
    _, callback, trainer = run(tmp_path, stopping, Note(), epochs=12, check_val_every_n_epoch=4,
                               scores=tuple(0.1 + 0.05 * epoch for epoch in range(12)))  # fmt: skip
    assert len(callback.removed) == 2
    assert trainer.current_epoch == 12
    assert max(waited) == 0
    assert "_run_early_stopping_check" not in vars(stopping)


def test_a_callback_that_is_used_again_knows_nothing_of_its_last_run(tmp_path):
    callback = callback_of("score", dirpath=str(tmp_path / "rounds"))
    run(tmp_path / "first", kind=lambda **_: callback, epochs=1)
    path = tmp_path / "saved.ckpt"
    run(tmp_path / "second", At("on_validation_start", 0, None, saver(path)), kind=lambda **_: callback)
    state = next(s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if "Entropy" in key)
    assert state["interruption"]["validation_due"]
    assert callback.entropies is None


def test_a_callback_that_goes_on_with_another_trainer_does_not_go_on_with_its_rounds(tmp_path):
    callback = callback_of("score", tolerance=0.2, dirpath=str(tmp_path / "rounds"))
    model, _, first = run(tmp_path / "first", kind=lambda **_: callback, epochs=2)
    run(tmp_path / "second", kind=lambda **_: callback, epochs=4)
    assert len(callback.removed) == 3
    first.fit_loop.max_epochs = 4
    first.fit(model, first.train_dataloader, first.val_dataloaders)
    assert len(callback.removed) == 1
    assert len(stand_ins(model)) == 2


def test_a_save_at_the_start_of_a_resumed_run_does_not_ask_for_a_validation_that_was_had(tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    options = {"val_check_interval": 2}
    run(tmp_path, At("on_validation_end", 1, None, saver(first)), **options)
    run(tmp_path, At("on_train_start", 1, None, saver(second)), ckpt_path=first, **options)
    for path in (first, second):
        state = next(s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if "Entropy" in key)
        assert not state["interruption"]["validation_due"]


def test_a_validation_that_is_made_up_for_when_pruning_is_over_has_its_own_epoch(tmp_path):
    epochs = []

    class Note(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                epochs.append(trainer.current_epoch)

    options = {"pruning": {"max_removals": 1}, "min_epochs": 6, "epochs": 6}
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_batch_end", 4, BATCHES - 1, saver(path)), **options)
    run(tmp_path, Note(), ckpt_path=path, **options)
    assert epochs == [4, 5]


def test_a_finder_that_loads_its_own_checkpoint_takes_up_no_run(tmp_path):
    class Found(Small):
        lr = 0.02

    run(tmp_path, epochs=2)
    kept = (tmp_path / "rounds" / "round_1.ckpt").read_bytes()
    finder = LearningRateFinder(num_training_steps=2)
    with pytest.warns(UserWarning, match="holds the checkpoints of another run"):
        run(tmp_path, finder, model=Found(), epochs=2)
    assert (tmp_path / "rounds" / "round_1.ckpt").read_bytes() == kept
    assert (tmp_path / "rounds-v1" / "round_1.ckpt").exists()
    with pytest.raises(MisconfigurationException, match="leave time for a round"):
        run(tmp_path, finder, model=Found(), epochs=2, pruning={"epochs": 3})


def test_a_best_checkpoint_that_can_not_be_read_is_forgotten(tmp_path):
    path, options = tmp_path / "saved.ckpt", {"pruning": {"best_per_depth": True}}
    run(tmp_path, At("on_train_epoch_end", 2, None, saver(path)), **options)
    (tmp_path / "rounds" / "best_removed_0.ckpt").write_bytes(b"half of it")
    _, callback, _ = run(tmp_path, ckpt_path=path, **options)
    assert sorted(callback.best_checkpoints) == [1, 2, 3]


# What is refused, or counted right, at the start


class Averaging(Small):
    def __init__(self):
        super().__init__()
        self.average = AveragedModel(self.layers)


class Lenient(Small):
    def __init__(self):
        super().__init__()
        self.strict_loading = False


class Filtering(Small):
    """Leaves a part out of its state dict, as one does with an encoder that is frozen."""

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "layers.7" not in key}


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """As torch's own is named, which needs processes."""


class Sharding(Small):
    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Averaging, {}, "the averaged model `average`"),
        (Lenient, {}, r"`strict_loading=False`.*restore_structure_on_load\(self\)"),
        (Filtering, {}, r"Filtering.state_dict\(\) drops .* of \['layers.7'\]"),
        (Sharding, {}, "ZeroRedundancyOptimizer"),
        (Small, {"plugins": [AsyncCheckpointIO()]}, "AsyncCheckpointIO"),
        (Small, {"val_check_interval": 10, "check_val_every_n_epoch": None, "epochs": 3}, "4 epochs with the warmup"),
    ],
)
def test_what_could_not_be_taken_up_is_refused(tmp_path, make, options, message):
    model = make()
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, model=model, **options)
    assert stand_ins(model) == {}


def test_a_lenient_module_that_expects_the_structure_is_taken_up_with_it(tmp_path):
    path = tmp_path / "saved.ckpt"
    whole = run(tmp_path / "whole", model=restore_structure_on_load(seeded(Lenient)))
    run(tmp_path, At("on_train_epoch_end", 2, None, saver(path)), model=restore_structure_on_load(seeded(Lenient)))
    resumed = run(tmp_path, model=restore_structure_on_load(seeded(Lenient)), ckpt_path=path)
    assert_equal_states(outcome(*resumed), outcome(*whole))


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_module_whose_activation_is_another_one_now_is_not_taken_up(tmp_path, is_linear):
    path = tmp_path / "saved.ckpt"
    _, callback, _ = run(tmp_path, At("on_train_epoch_end", 2, None, saver(path)))
    name = next(name for name in ("layers.1", "layers.5", "layers.7") if (name in callback.removed) == is_linear)
    model = Small()
    model.set_submodule(name, nn.GELU())
    with pytest.raises(ValueError, match=rf"activation.* '{name}' .*(GELU, and was ReLU|ReLU.*but got GELU)"):
        run(tmp_path, model=model, ckpt_path=path)


def test_a_module_that_has_lost_an_activation_is_not_taken_up(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_epoch_end", 0, None, saver(path)))
    model = Small()
    model.layers[5] = nn.Identity()
    with pytest.raises(ValueError, match=r"'layers.5' is gone, and was ReLU.*start a new run"):
        run(tmp_path, model=model, ckpt_path=path)


def test_a_checkpoint_that_has_lost_the_record_is_an_error(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_epoch_end", 2, None, saver(path)))
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.endswith(MARK_KEY)}
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match="were linear in the model that was saved"):
        run(tmp_path, ckpt_path=path)


def test_steps_are_counted_with_a_schedule_of_accumulation(tmp_path):
    options = {"epochs": 9, "pruning": {"epochs": 3}}
    schedule = {0: 1, 1: 3}  # 3 steps, then one an epoch
    _, callback, _ = run(tmp_path, GradientAccumulationScheduler(schedule), max_steps=6, **options)
    assert len(callback.rounds) == 2
    with pytest.raises(MisconfigurationException, match="3 epochs or 5 steps"):
        run(tmp_path, GradientAccumulationScheduler(schedule), max_steps=4, **options)


def test_progress_is_logged_without_validation_too(tmp_path):
    pruning = {"monitor": "train_loss", "mode": "min", "tolerance": 9.0, "on": "training"}
    run(tmp_path, pruning=pruning, limit_val_batches=0, logger=CSVLogger(tmp_path, "logs", ""), log_every_n_steps=1)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("removed")]
    assert [float(row["removed"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["round"]) for row in rows] == [0, 1, 2, 3]


def test_a_dry_run_writes_no_checkpoint(tmp_path):
    run(tmp_path, pruning={"dry_run": True, "best_per_depth": True})
    assert not (tmp_path / "rounds").exists()


def test_a_choice_that_names_an_activation_twice_is_one(tmp_path):
    class Stutters(Linearize):
        def select(self, ranks, count):
            first, *_ = ranks
            return [first, first]

    _, callback, _ = run(tmp_path, method=Stutters, pruning={"removals": 2})
    assert callback.removed == ["layers.1", "layers.3", "layers.5"]


class CompiledInside(Small):
    """Calls compiled code that no attribute of a module shows."""

    def __init__(self):
        super().__init__()
        self.code = {"tail": torch.compile(self._tail, backend="eager")}

    def _tail(self, x):
        return self.layers[5:](x)

    def forward(self, x):
        return self.code["tail"](self.layers[:5](self.norm(x)))


@pytest.mark.parametrize("sanity", [0, 1])
def test_compiled_code_that_is_hidden_is_measured_all_the_same(tmp_path, sanity):
    _, callback, _ = run(tmp_path, model=seeded(CompiledInside), num_sanity_val_steps=sanity)
    _, plain, _ = run(tmp_path / "plain", num_sanity_val_steps=sanity)
    assert callback.removed == plain.removed
    assert len(callback.removed) == 3


def test_that_something_was_compiled_is_known_until_it_is_forgotten():
    model = CompiledInside()
    torch._dynamo.reset()
    assert not wiring.is_compiled(model)
    with torch.no_grad():
        model.eval()(torch.randn(3, 4))
    assert wiring.is_compiled(model)
    wiring.forget_compiled_code(model)
    assert not wiring.is_compiled(model)


def test_what_was_decided_before_is_carried_out_though_it_is_left_out_now(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_epoch_end", 1, None, saver(path)), epochs=3)
    record = torch.load(path, weights_only=True)["callbacks"]["EntropyPruningCallback"]
    (name,) = record["decision"]["chosen"]["names"]
    with pytest.warns(UserWarning, match=rf"\['{name}'\] will be removed next, though `include` and `exclude` leave"):
        _, callback, _ = run(tmp_path, ckpt_path=path, epochs=3, pruning={"exclude": name})
    assert callback.removed[-1] == name
    with no_warning_of("will be removed next"):
        run(tmp_path, ckpt_path=path, epochs=3)
