"""The callback in a real Trainer on real digits."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import (
    EntropyPruningCallback,
    Linearize,
    collapse,
    isolate_activations,
    load_pruned,
    measure_entropy,
)
from lightning_easier.structure.linearize import linearize, stand_ins
from lightning_easier.support.inference import has_hooks
from lightning_easier.zoo import DigitsDataModule
from tests.integration.tiny import NAMES, Tiny, assert_equal_states, pruning, train, weights_of


class Witness(Callback):
    """Notes, at the moments that matter, what is linear and what ModelCheckpoint would see."""

    def __init__(self):
        self.linear_in_epoch, self.removed_logged, self.hooked_in_training = [], [], False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.linear_in_epoch.append(sorted(stand_ins(pl_module)))
        self.hooked_in_training |= any(has_hooks(module) for module in pl_module.modules())

    def on_train_epoch_end(self, trainer, pl_module):
        self.removed_logged.append(trainer.callback_metrics["removed"].item())


def test_rounds_remove_the_lowest_entropy_at_the_start_of_the_next_epoch(tmp_path):
    model, callback, witness = Tiny(), pruning(), Witness()
    train(model, callback, witness, root=tmp_path, epochs=6)
    removed = [name for this in callback.rounds for name in this.removed]
    assert callback.removed == removed
    assert sorted(removed) == sorted(NAMES)
    assert witness.linear_in_epoch == [sorted(removed[:count]) for count in range(5)]
    assert witness.removed_logged == [0, 1, 2, 3, 4]
    assert [this.epoch for this in callback.rounds] == [0, 1, 2, 3, 4]
    assert not witness.hooked_in_training
    assert not any(has_hooks(module) for module in model.modules())
    scores = [this.score_after for this in callback.rounds]
    assert [this.score_before for this in callback.rounds] == [None, *scores[:-1]]
    assert all(this.accepted for this in callback.rounds)
    assert isolate_activations(model) == {}
    report = callback.report().to_markdown()
    assert all(f"| {name} |" in report for name in removed)


def test_entropies_are_those_of_the_validation_data_and_decide(tmp_path):
    model, callback = Tiny(), pruning()
    seen = {}

    class Check(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.sanity_checking:
                return
            batches = [batch for batch, _ in zip(trainer.datamodule.val_dataloader(), range(3), strict=False)]
            seen[trainer.current_epoch] = measure_entropy(pl_module, batches)
            assert not pl_module.training

    trainer = train(model, callback, Check(), root=tmp_path, epochs=2)
    (name,) = callback.rounds[1].removed
    assert callback.rounds[1].entropies[name] == pytest.approx(min(seen[0].values()), rel=1e-6)
    assert name == min(seen[0], key=seen[0].get)
    assert {f"entropy/{n}": v for n, v in seen[1].items()} == pytest.approx(
        {k: v.item() for k, v in trainer.callback_metrics.items() if k in {f"entropy/{n}" for n in seen[1]}}, rel=1e-6
    )


class KeepLastGood(Callback):
    """Copies everything that has to come back, at the end of every epoch."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        self.states.append(
            copy.deepcopy((pl_module.state_dict(), optimizer.state_dict(), config.scheduler.state_dict()))
        )


def test_a_fall_beyond_the_tolerance_brings_everything_back_and_stops(tmp_path):
    model = Tiny(scores=(0.9, 0.9, 0.88, 0.70))
    callback, keep = pruning(monitor="scripted", tolerance=0.05), KeepLastGood()
    trainer = train(model, callback, keep, root=tmp_path, epochs=9)
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]
    assert trainer.current_epoch == 4
    good_weights, good_optimizer, good_scheduler = keep.states[2]
    assert sorted(stand_ins(model)) == sorted(callback.removed)
    assert len(callback.removed) == 2
    assert_equal_states(dict(model.state_dict()), dict(good_weights))
    assert not torch.equal(keep.states[3][0]["bn.running_mean"], good_weights["bn.running_mean"])
    assert_equal_states(trainer.optimizers[0].state_dict(), good_optimizer)
    assert_equal_states(trainer.lr_scheduler_configs[0].scheduler.state_dict(), good_scheduler)
    assert callback.last_good == tmp_path / "entropy_pruning" / "round_2.ckpt"
    loaded = load_pruned(Tiny, callback.last_good)
    assert_equal_states(dict(loaded.state_dict()), dict(good_weights))


def test_tolerance_is_from_the_dense_score_and_its_edge_is_within(tmp_path):
    callback = pruning(monitor="scripted", tolerance=0.05)
    train(Tiny(scores=(0.80, 0.77, 0.75, 0.74)), callback, root=tmp_path, epochs=9)
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]
    assert callback.rounds[0].score_after - callback.rounds[2].score_after > 0.05  # by what float32 can't tell


def test_a_lower_score_can_be_the_better_one(tmp_path):
    callback = pruning(monitor="scripted", mode="min", tolerance=0.05)
    train(Tiny(scores=(0.10, 0.05, 0.14, 0.16)), callback, root=tmp_path, epochs=9)
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]


def test_warmup_length_and_size_of_rounds_and_their_limit(tmp_path):
    callback, witness = pruning(warmup_epochs=1, epochs=2, removals=2, max_removals=3), Witness()
    trainer = train(Tiny(), callback, witness, root=tmp_path, epochs=20)
    assert [len(names) for names in witness.linear_in_epoch] == [0, 0, 0, 2, 2, 3, 3]
    assert trainer.current_epoch == 7
    assert [len(this.removed) for this in callback.rounds] == [0, 2, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"include": ["act*"], "exclude": "act4"}, ["act1", "act2"]), ({"include": "relu"}, ["relu"])],
)
def test_only_the_wanted_activations_become_linear(tmp_path, options, expected):
    callback = pruning(**options)
    train(Tiny(), callback, root=tmp_path, epochs=9)
    assert sorted(callback.removed) == expected


def test_training_batches_can_be_measured_instead(tmp_path):
    class NoValidation(Tiny):
        validation_step = LightningModule.validation_step

    callback = pruning(monitor="train_loss", mode="min", on="training")
    train(NoValidation(), callback, root=tmp_path, epochs=3, num_sanity_val_steps=0)
    assert len(callback.removed) == 2
    with_validation = pruning(on="training")
    train(Tiny(), with_validation, root=tmp_path, epochs=3)
    assert len(with_validation.removed) == 2


def test_a_round_is_judged_on_a_validation_at_its_end(tmp_path):
    """With validation every second epoch, a round of one epoch waits for it."""
    callback = pruning()
    train(Tiny(), callback, root=tmp_path, epochs=6, check_val_every_n_epoch=2)
    assert [this.epoch for this in callback.rounds] == [0, 2, 4]


def test_several_validations_an_epoch_and_several_loaders(tmp_path):
    callback, data = pruning(monitor="val_acc/dataloader_idx_1"), DigitsDataModule(batch_size=64)
    data.setup("fit")
    loaders = [data.val_dataloader(), data.test_dataloader()]
    data.val_dataloader = lambda: loaders
    train(Tiny(), callback, root=tmp_path, epochs=3, val_check_interval=0.5, data=data)
    assert [this.epoch for this in callback.rounds] == [0, 1, 2]


def test_the_end_of_the_run_judges_a_round_that_it_cuts_short(tmp_path):
    for last, accepted in ((0.9, True), (0.1, False)):
        model, callback = (
            Tiny(scores=(0.9, 0.9, 0.9, last)),
            pruning(monitor="scripted", epochs=3, tolerance=0.1),
        )
        train(model, callback, root=tmp_path, epochs=4)
        assert [this.accepted for this in callback.rounds] == [True, accepted]
        assert len(stand_ins(model)) == len(callback.removed) == int(accepted)
        loaded = load_pruned(Tiny, callback.last_good) if accepted else model
        assert_equal_states(dict(loaded.state_dict()), dict(model.state_dict()))


def test_the_patience_of_early_stopping_begins_anew_with_a_removal_and_ends_the_run_judged(tmp_path):
    model = Tiny(scores=(0.6, 0.7, 0.8, 0.9, 0.85, 0.84, 0.83, 0.82))
    callback = pruning(monitor="scripted", epochs=4, tolerance=0.15)
    trainer = train(model, callback, EarlyStopping("scripted", mode="max", patience=2), root=tmp_path, epochs=9)
    assert trainer.current_epoch == 7  # a dense score to beat would have ended it an epoch earlier
    assert [(this.score_after, this.accepted) for this in callback.rounds] == [
        (pytest.approx(0.9), True), (pytest.approx(0.83), True)
    ]  # fmt: skip


def test_every_checkpoint_pairs_a_score_with_its_structure(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "all", "{epoch}-{removed:.0f}-{val_acc:.6f}", "val_acc", save_top_k=-1)
    train(Tiny(), pruning(), checkpoints, root=tmp_path, epochs=5, enable_checkpointing=True)
    files = sorted((tmp_path / "all").glob("*.ckpt"))
    assert len(files) == 5
    for file in files:
        epoch, removed, accuracy = (part.split("=")[1] for part in file.stem.split("-"))
        model = Tiny() if int(removed) == 0 else None
        if model is None:
            model = load_pruned(Tiny, file)
        else:
            model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        assert len(stand_ins(model)) == int(removed) == int(epoch)
        metrics = Trainer(logger=False, enable_progress_bar=False, limit_val_batches=3, accelerator="cpu",
                          enable_checkpointing=False).validate(model, DigitsDataModule(64), verbose=False)  # fmt: skip
        assert metrics[0]["val_acc"] == pytest.approx(float(accuracy), abs=1e-6)


class InOrder(DigitsDataModule):
    """The same batches in every epoch of every run."""

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_after):
    scores = (0.9, 0.9, 0.9, 0.5, 0.9)

    def make():
        torch.manual_seed(3)
        return Tiny(scores=scores), pruning(monitor="scripted", tolerance=0.2)

    whole, whole_callback = make()
    reference = train(whole, whole_callback, root=tmp_path / "whole", epochs=5, data=InOrder(64))
    first, first_callback = make()
    saver = ModelCheckpoint(tmp_path / "part", save_last=True)
    options = {"data": InOrder(64), "enable_checkpointing": True}
    train(first, first_callback, saver, root=tmp_path / "part", epochs=stop_after, **options)
    second, second_callback = make()
    last = tmp_path / "part" / "last.ckpt"
    resumed = train(second, second_callback, root=tmp_path / "rest", epochs=5, ckpt_path=last, data=InOrder(64))
    assert second_callback.removed == whole_callback.removed
    assert second_callback.report() == whole_callback.report()
    assert resumed.current_epoch == reference.current_epoch == 4
    assert_equal_states(dict(second.state_dict()), dict(whole.state_dict()))
    assert_equal_states(resumed.optimizers[0].state_dict(), reference.optimizers[0].state_dict())


class Padded(Tiny):
    """Three padded convolutions in a row."""

    def __init__(self, scores: tuple[float, ...] = ()) -> None:
        super().__init__(scores)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2, self.mid, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.conv3(self.mid(self.conv2(self.act1(self.bn(self.conv(x))))))
        return self.fc4(self.act4(self.fc3(self.fc2(self.act2(self.fc1(x.flatten(1)))))))

    @property
    def paddings(self):
        return [layer.padding for layer in (self.conv, self.conv2, self.conv3)]


class Act1First(Linearize):
    def select(self, ranks, count):
        return ["act1" if "act1" in ranks else "mid"]


def test_the_padding_moves_with_the_removal_and_comes_back_with_it(tmp_path):
    model, callback = (
        Padded(scores=(0.9, 0.9, 0.1)),
        pruning(monitor="scripted", tolerance=0.2, include=["act1", "mid"], method=Act1First),
    )
    train(model, callback, root=tmp_path, epochs=4)
    assert [(this.removed, this.accepted) for this in callback.rounds] == [
        ([], True), (["act1"], True), (["mid"], False)
    ]  # fmt: skip
    assert [this.notes for this in callback.rounds] == [
        {}, {"act1": ["the padding of conv2 moves to conv"]}, {}
    ]  # fmt: skip
    assert "act1 (the padding of conv2 moves to conv)" in str(callback.report())
    assert model.paddings == [(2, 2), (0, 0), (0, 0)]

    loaded = load_pruned(Padded, callback.last_good).eval()
    images = torch.rand(8, 1, 8, 8)
    assert loaded.paddings == model.paddings
    assert torch.equal(loaded(images), model.eval()(images))
    result = collapse(loaded.double(), images.double(), objective="depth")
    assert result.report.merges[0].operators == ("conv", "conv2")
    assert result.report.relative_difference < 1e-9

    model, callback = Padded(scores=(0.9, 0.1)), pruning(monitor="scripted", tolerance=0.2, include=["act1"])
    train(model, callback, root=tmp_path / "back", epochs=4)
    assert callback.rounds[-1].accepted is False
    assert model.paddings == [(1, 1), (1, 1), (0, 0)]

    model, callback = Padded(), pruning(include=["act1"], shift_padding=False)
    train(model, callback, root=tmp_path / "unmoved", epochs=2)
    assert callback.removed == ["act1"]
    assert callback.rounds[-1].notes == {}
    assert model.paddings == [(1, 1), (1, 1), (0, 0)]


def test_a_pruned_checkpoint_validates_with_the_callback_and_fails_loudly_without(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    model = Tiny()
    train(model, pruning(), saver, root=tmp_path, epochs=3, enable_checkpointing=True)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    fresh = Tiny()
    measured = Trainer(callbacks=[pruning()], **options).validate(
        fresh, DigitsDataModule(), tmp_path / "last.ckpt", False
    )
    assert measured[0]["removed"] == len(stand_ins(fresh)) == 2
    assert {key for key in measured[0] if key.startswith("entropy/")} == {
        f"entropy/{n}" for n in isolate_activations(fresh)
    }
    with pytest.raises(RuntimeError, match="_extra_state"):
        Trainer(**options).validate(Tiny(), DigitsDataModule(), tmp_path / "last.ckpt", False)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["EntropyPruningCallback"]
    assert len(state["rounds"]) == 3


def test_sanity_check_and_fast_dev_run_have_no_side_effects(tmp_path):
    model, callback = Tiny(), pruning()
    keys, modules = list(model.state_dict()), list(model.named_modules())
    train(model, callback, root=tmp_path, fast_dev_run=3)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert "forward" not in vars(model)
    assert list(tmp_path.iterdir()) == []
    assert callback.removed == []

    class StopAfterSanity(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert not any(has_hooks(module) for module in pl_module.modules())
            assert "removed" not in trainer.callback_metrics
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        train(Tiny(), callback, StopAfterSanity(), root=tmp_path)
    assert callback.report().rounds[0].score_after is None


def test_an_exception_in_validation_leaves_no_hook_behind(tmp_path):
    class Fails(Tiny):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking and batch_idx == 1:
                raise KeyError("any")
            return super().validation_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(KeyError, match="any"):
        train(model, pruning(), root=tmp_path)
    assert not any(has_hooks(module) for module in model.modules())
    assert not model._load_state_dict_pre_hooks


class Act4First(Linearize):
    def select(self, ranks, count):
        return [next(name for name in ("act4", "act2") if name in ranks)]


def test_the_optimizer_holds_exactly_the_live_parameters(tmp_path):
    model = Tiny(scores=(0.9, 0.9, 0.1), activation="PReLU")
    slope = model.act2.weight
    callback = pruning(monitor="scripted", include=["act2", "act4"], tolerance=0.1, method=Act4First)
    live = []

    class Check(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert set(held) == set(pl_module.parameters())
            live.append(any(p is slope for p in held))

    trainer = train(model, callback, Check(), root=tmp_path, epochs=9)
    assert live == [True] * 8 + [False] * 4
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]  # as configure_optimizers made it
    assert any(p is slope for p in held)


def test_going_back_after_a_resume_from_an_older_checkpoint(tmp_path):
    """The killed run had kept a round that the resumed one has not: that round's checkpoint must not come back."""
    saver = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    options = {"data": InOrder(64), "root": tmp_path}
    first = pruning(monitor="scripted", tolerance=0.1)
    train(Tiny(scores=(0.9,)), first, saver, epochs=4, enable_checkpointing=True, **options)
    assert len(first.removed) == 3
    model, callback = Tiny(scores=(0.9, 0.9, 0.1)), pruning(monitor="scripted", tolerance=0.1)
    train(model, callback, epochs=9, ckpt_path=tmp_path / "kept" / "epoch=1.ckpt", **options)
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    assert list(stand_ins(model)) == callback.removed
    assert_equal_states(
        dict(model.state_dict()), dict(torch.load(callback.last_good, weights_only=False)["state_dict"])
    )


def test_a_checkpoint_of_another_run_does_not_come_back(tmp_path):
    class Swap(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                (tmp_path / "kept" / "round_0.ckpt").replace(tmp_path / "kept" / "round_1.ckpt")

    callback = pruning(monitor="scripted", tolerance=0.1, dirpath=str(tmp_path / "kept"))
    with pytest.raises(RuntimeError, match="round_1.ckpt is of another run"):
        train(Tiny(scores=(0.9, 0.9, 0.1)), callback, Swap(), root=tmp_path)


def test_a_run_that_was_over_does_not_train_on_when_it_is_resumed(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    options = {"root": tmp_path, "epochs": 9}
    first = Tiny(scores=(0.9, 0.1))
    train(first, pruning(monitor="scripted", tolerance=0.1), saver, enable_checkpointing=True, **options)
    second, callback = Tiny(scores=(0.9, 0.1)), pruning(monitor="scripted", tolerance=0.1)
    trainer = train(second, callback, ckpt_path=tmp_path / "kept" / "last.ckpt", **options)
    assert trainer.current_epoch == 2
    assert_equal_states(dict(second.state_dict()), dict(first.state_dict()))


def test_the_structure_of_a_checkpoint_comes_with_it_in_either_direction(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    model = Tiny()
    trainer = train(model, pruning(), saver, root=tmp_path, epochs=3, enable_checkpointing=True)
    for epoch in (0, 2, 1):
        trainer.validate(model, DigitsDataModule(64), str(tmp_path / "kept" / f"epoch={epoch}.ckpt"), verbose=False)
        assert len(stand_ins(model)) == epoch == trainer.callback_metrics["removed"]


class Bypassing(Tiny):
    """Trains past its own forward, as one does who needs features and logits."""

    def training_step(self, batch, batch_idx):
        x = self.act1(self.bn(self.conv(batch[0]))).flatten(1)
        x = torch.relu(self.fc2(self.act2(self.fc1(x))))
        return nn.functional.cross_entropy(self.fc4(self.act4(self.fc3(x))), batch[1])


def test_an_activation_that_training_does_not_call_is_left_alone(tmp_path):
    callback = pruning()
    with pytest.warns(UserWarning, match=r"Training does not call \['relu'\]"):
        train(Bypassing(), callback, root=tmp_path, epochs=6)
    assert sorted(callback.removed) == ["act1", "act2", "act4"]


class BuiltInSetup(Tiny):
    """One rectifier from the start, the rest in setup."""

    def __init__(self):
        super().__init__()
        self.act1 = None

    def setup(self, stage):
        self.act1 = nn.ReLU()


def test_a_model_that_is_completed_in_setup_is_seen_whole(tmp_path):
    callback = pruning(include=["act1"])
    train(BuiltInSetup(), callback, root=tmp_path, epochs=2)
    assert callback.removed == ["act1"]


class Outer(LightningModule):
    """Calls a network that is a module of its own."""

    def __init__(self):
        super().__init__()
        self.inner = Tiny()

    def forward(self, x):
        return self.inner(x)

    training_step = Tiny.training_step
    validation_step = Tiny.validation_step
    configure_optimizers = Tiny.configure_optimizers


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_measured_and_pruned_alike(tmp_path, whole):
    def make():
        torch.manual_seed(3)
        return Outer()

    plain, compiled = make(), make()
    expected, callback = pruning(), pruning()
    train(plain, expected, root=tmp_path / "a", epochs=3)
    if not whole:
        compiled.inner.compile(backend="eager")
    handed_over = torch.compile(compiled, backend="eager") if whole else compiled
    train(handed_over, callback, root=tmp_path / "b", epochs=3)
    assert callback.report() == expected.report()
    assert_equal_states([*plain.state_dict().values()], [*compiled.state_dict().values()])


def test_what_is_excluded_is_not_measured(tmp_path):
    trainer = train(Tiny(), pruning(exclude=["act1"]), root=tmp_path, epochs=1)
    assert {key for key in trainer.callback_metrics if key.startswith("entropy/")} == {
        "entropy/act2", "entropy/relu", "entropy/act4",
    }  # fmt: skip


def test_a_choice_of_ones_own_is_held_to_the_limit(tmp_path):
    class Last(Linearize):
        def select(self, ranks, count):
            return dict.fromkeys(list(ranks)[::-1])  # whatever holds names

    callback = pruning(method=Last, max_removals=2)
    train(Tiny(), callback, root=tmp_path, epochs=9)
    assert callback.removed == ["act4", "relu"]

    class Unknown(Linearize):
        def select(self, ranks, count):
            return ["conv"]

    with pytest.raises(ValueError, match=r"`select` to choose among .*but it returned \['conv'\]"):
        train(Tiny(), pruning(method=Unknown), root=tmp_path)

    class Forgets(Linearize):
        def select(self, ranks, count):
            sorted(ranks)

    with pytest.raises(ValueError, match="`select` to choose among .*but it returned None"):
        train(Tiny(), pruning(method=Forgets), root=tmp_path)


@pytest.mark.parametrize("steps", [6, 8])
def test_a_run_that_ends_inside_an_epoch_is_judged(tmp_path, steps):
    model, callback = Tiny(), pruning()
    train(model, callback, root=tmp_path, epochs=-1, max_steps=steps)
    assert [this.accepted for this in callback.rounds] == ([True, False] if steps == 6 else [True, True])
    assert list(stand_ins(model)) == callback.removed


def test_a_checkpoint_of_a_round_that_was_taken_back_says_so(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    model, callback = Tiny(scores=(0.9, 0.9, 0.1)), pruning(monitor="scripted", tolerance=0.1)
    trainer = train(model, callback, saver, root=tmp_path, epochs=9, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"fell beyond the tolerance.*last good model is .*round_1\.ckpt"):
        load_pruned(Tiny, tmp_path / "kept" / "last.ckpt")
    report = callback.report()
    with pytest.warns(UserWarning, match="fell beyond the tolerance"):
        trainer.validate(model, DigitsDataModule(64), str(tmp_path / "kept" / "last.ckpt"), verbose=False)
    assert callback.report() == report  # to look at a checkpoint is not to take up its run


def test_a_trainer_that_goes_on_keeps_its_rounds(tmp_path):
    model, callback = Tiny(), pruning()
    trainer = train(model, callback, root=tmp_path, epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, DigitsDataModule(64))
    assert [this.epoch for this in callback.rounds] == [0, 1, 2, 3]
    assert sorted(stand_ins(model)) == sorted(callback.removed)


def test_a_run_is_not_taken_up_with_another_score(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    train(Tiny(), pruning(), saver, root=tmp_path, epochs=2, enable_checkpointing=True)
    other = pruning(monitor="val_loss", mode="min")
    with pytest.raises(MisconfigurationException, match=r"`mode` to be \('val_acc', 'max'\)"):
        train(Tiny(), other, root=tmp_path, ckpt_path=tmp_path / "kept" / "last.ckpt")


class Manual(Tiny):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class BuiltLate(Outer):
    """Its layers exist only after configure_model."""

    def __init__(self):
        LightningModule.__init__(self)

    def configure_model(self):
        if not hasattr(self, "inner"):
            self.inner = Tiny()


@pytest.mark.parametrize("make", [Manual, BuiltLate])
def test_other_ways_to_write_a_module(tmp_path, make):
    callback = pruning()
    train(make(), callback, root=tmp_path, epochs=3)
    assert len(callback.removed) == 2


def test_a_second_fit_starts_anew(tmp_path):
    callback = pruning(max_removals=1)
    train(Tiny(), callback, root=tmp_path, epochs=5)
    model = Tiny()
    train(model, callback, root=tmp_path, epochs=5)
    assert len(callback.rounds) == 2
    assert len(stand_ins(model)) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"monitor": ""}, ValueError, "`monitor` to be the name of a logged score, but got ''"),
        ({"mode": "up"}, ValueError, r"`mode` to be one of \('min', 'max'\), but got 'up'"),
        ({"tolerance": -0.1}, ValueError, "`tolerance` to be finite and at least 0, but got -0.1"),
        ({"tolerance": math.nan}, ValueError, "`tolerance` to be finite and at least 0, but got nan"),
        ({"tolerance": "1%"}, TypeError, "`tolerance` to be a number, but got '1%'"),
        ({"epochs": -1}, ValueError, "`epochs` to be at least 0, but got -1"),
        ({"removals": 1.5}, TypeError, "`removals` to be an integer, but got 1.5"),
        ({"max_removals": 0}, ValueError, "`max_removals` to be at least 1, but got 0"),
        ({"warmup_epochs": -1}, ValueError, "`warmup_epochs` to be at least 0, but got -1"),
        ({"reference": "last"}, ValueError, r"`reference` to be one of \('dense', 'best'\), but got 'last'"),
        ({"on": "test"}, ValueError, "`on` to be one of"),
        ({"neuron_dim": 1}, TypeError, "`neuron_dim` to map name globs to axes, but got 1"),
        ({"neuron_dim": {"*": "last"}}, TypeError, "`neuron_dim` to map name globs to axes, but got {'\\*': 'last'}"),
        ({"dirpath": ""}, TypeError, "`dirpath` to be a path, but got ''"),
        ({"dirpath": 1}, TypeError, "`dirpath` to be a path, but got 1"),
        ({"include": 5}, TypeError, "`include` to hold name globs, but got 5"),
        ({"include": [1]}, TypeError, r"`include` to hold name globs, but got \[1\]"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pruning(**options)


class Other(EntropyPruningCallback):
    pass


class NoRectifier(Tiny):
    def __init__(self):
        super().__init__()
        self.act1 = self.act2 = self.act4 = nn.Sigmoid()

    def forward(self, x):
        return self.fc4(self.fc1(self.conv(x).flatten(1)))


@pytest.mark.parametrize(
    ("make", "callbacks", "settings", "error", "message"),
    [
        (Tiny, lambda: [pruning(monitor="acc")], {}, MisconfigurationException,
         "`monitor` to be a logged score, but 'acc' is not among .*'val_acc'"),
        (NoRectifier, lambda: [pruning()], {}, MisconfigurationException, "at least one rectifier, .*, but found none"),
        (Tiny, lambda: [pruning(include=["layer*"])], {}, MisconfigurationException,
         r"`include`.*'layer\*' matches none"),
        (Tiny, lambda: [pruning(exclude=["x"])], {}, MisconfigurationException, "`exclude`.*'x' matches none"),
        (Tiny, lambda: [pruning(exclude="*")], {}, MisconfigurationException, "leave none of"),
        (Tiny, lambda: [pruning(neuron_dim={"x": 1})], {}, MisconfigurationException, "'x' matches none"),
        (Tiny, lambda: [pruning(), Other("val_acc")], {}, MisconfigurationException,
         "one EntropyPruningCallback.*but got 2"),
        (Tiny, lambda: [pruning(), pruning()], {}, RuntimeError, "more than one stateful callback"),
        (Tiny, lambda: [pruning(), StochasticWeightAveraging(0.1)], {}, MisconfigurationException,
         "does not go with StochasticWeightAveraging"),
        (Tiny, lambda: [pruning(dirpath=__file__)], {}, MisconfigurationException, "`dirpath` to be a folder, but"),
        (Tiny, lambda: [pruning()], {"limit_val_batches": 0}, MisconfigurationException, "limit_val_batches=0"),
        (lambda: Tiny(scores=(0.9, math.nan)), lambda: [pruning(monitor="scripted")], {}, ValueError,
         "`monitor` 'scripted' to be finite, but got nan in epoch 1.*last good model is .*round_0.ckpt"),
    ],
)  # fmt: skip
def test_bad_wiring_is_named_and_the_model_is_as_it_was(tmp_path, make, callbacks, settings, error, message):
    model, before = make(), {}
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(weights_of(pl_module))

    given = callbacks()
    with pytest.raises(error, match=message):
        train(model, *given, AtStart(), root=tmp_path, **settings)
    assert list(model.state_dict()) == keys
    assert stand_ins(model) == {}
    assert not any(has_hooks(module) for module in model.modules())
    if "epoch 1" in message:  # it diverged in the first round after the dense one, which is back
        good = torch.load(given[0].last_good, weights_only=False)["state_dict"]
        assert_equal_states(dict(model.state_dict()), dict(good))
    elif "acc" not in message:  # found before anything was changed
        assert before == {}
        assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize(("split", "message"), [("val_set", "validation loader yielded nothing"),
                                                ("train_set", "training loader yielded none")])  # fmt: skip
def test_a_loader_that_yields_nothing_is_named(tmp_path, split, message):
    class Empty(DigitsDataModule):
        def setup(self, stage):
            super().setup(stage)
            setattr(self, split, TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))

        def train_dataloader(self):
            return DataLoader(self.train_set, 64)

    model = Tiny()
    before = weights_of(model)
    with pytest.raises(MisconfigurationException, match=message):
        train(model, pruning(), root=tmp_path, data=Empty(64), limit_train_batches=1.0, limit_val_batches=1.0)
    if split == "train_set":
        assert_equal_states(weights_of(model), before)
    assert list(model.state_dict()) == list(before)
    assert stand_ins(model) == {}


def test_a_last_good_checkpoint_of_other_optimizers_does_not_come_back(tmp_path):
    class Adds(Callback):
        """Adds a parameter group while training goes on, which no checkpoint can bring back."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})

    model = Tiny(scores=(0.9, 0.1))
    callback = pruning(monitor="scripted", tolerance=0.1)
    with pytest.raises(RuntimeError, match=r"groups of \[\[12, 1\]\] parameters, but .*round_0.ckpt held \[\[12\]\]"):
        train(model, callback, Adds(), root=tmp_path)
    assert list(stand_ins(model)) == callback.rounds[-1].removed  # structure and weights are as they were


def test_activations_that_come_back_with_a_checkpoint_are_measured_again(tmp_path):
    dense = Tiny()
    trainer = train(dense, root=tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    model, callback = Tiny(), pruning()
    isolate_activations(model)
    linearize(model, ["act1", "relu"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "limit_val_batches": 2}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], **quiet)
    trainer.validate(model, DigitsDataModule(64), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert list(callback.entropies) == NAMES


def test_a_last_good_checkpoint_that_is_gone_is_named(tmp_path):
    class Thief(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            for file in tmp_path.glob("kept/*.ckpt"):
                file.unlink()

    callback = pruning(monitor="scripted", tolerance=0.1, dirpath=str(tmp_path / "kept"))
    with pytest.raises(FileNotFoundError, match="round_0.ckpt is gone"):
        train(Tiny(scores=(0.9, 0.1)), callback, Thief(), root=tmp_path)
