"""Canaries: what Lightning and torch call private is there still, and does what `callbacks.private` expects."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier.callbacks import private
from tests.integration.interrupted import Small


def test_a_module_gives_its_trainer_away_for_a_while():
    module, other = Small(), Small()
    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=False)
    module.trainer = trainer
    with private.without_trainer(module):
        assert module._trainer is None
    assert module.trainer is trainer
    private.lend_trainer(other, module)
    assert other.trainer is trainer


def trained(root, *callbacks, epochs=4) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=list(callbacks),
    )  # fmt: skip
    data = TensorDataset(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))
    trainer.fit(Small(), DataLoader(data, 2), DataLoader(data, 2))
    return trainer


def test_early_stopping_asks_its_check_on_the_instance(tmp_path):
    stopper, asked = EarlyStopping("score", mode="max", patience=1), []
    private.replace_stopping_check(stopper, lambda callback, trainer: asked.append(callback))
    assert trained(tmp_path, stopper).current_epoch == 4  # its own check would stop: the score stays as it is
    assert asked == [stopper] * 4
    private.restore_stopping_check(stopper)
    assert "_run_early_stopping_check" not in vars(stopper)
    own = EarlyStopping("score", mode="max", patience=1)
    private.replace_stopping_check(own, private.check_stopping)
    assert trained(tmp_path, own).current_epoch == 2


def test_loops_and_strategies_have_what_is_set(tmp_path):
    trainer = trained(tmp_path, epochs=1)
    assert trainer.fit_loop.epoch_loop.val_loop._has_run
    private.mark_validation_as_not_run(trainer)
    assert not trainer.fit_loop.epoch_loop.val_loop._has_run
    strategy = DDPStrategy()
    assert strategy._pl_static_graph_delay_done is False
    strategy._pl_static_graph_delay_done = True
    private.begin_static_graph_anew(strategy)
    assert not strategy._pl_static_graph_delay_done


class Logs(Small):
    """Logs two values at the end of each validation, and fails in the third."""

    def __init__(self):
        super().__init__()
        self.in_place = []

    def on_validation_epoch_end(self):
        results = self.trainer._results
        with private.logged_in_place(self):
            self.log_dict({"first": float(self.current_epoch), "second": 1.0})
            if self.current_epoch == 2:
                raise KeyError("any")
        first = results["on_validation_epoch_end.first"]
        there, first.value = first.value, torch.zeros((), device="meta")  # as on another device
        with private.logged_in_place(self):
            self.in_place.append([result.meta.name for result in results.values() if "to" in vars(result)])
        first.value = there


def test_what_is_logged_again_in_place_has_the_new_value_and_is_moved_as_before_afterwards(tmp_path, monkeypatch):
    module, moved, to = Logs(), [], _ResultMetric.to
    monkeypatch.setattr(_ResultMetric, "to", lambda self, *args: moved.append(self.meta.name) or to(self, *args))
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(4, 4), torch.tensor([0, 1, 0, 1])), 2)
    results = trainer.fit_loop.epoch_loop.val_loop._results
    with pytest.raises(KeyError, match="any"):
        trainer.fit(module, data, data)
    assert moved.count("first") == moved.count("second") == 2  # when it was new, and to the CPU at the end
    assert results["on_validation_epoch_end.first"].value == 2.0
    assert not any("to" in vars(result) for result in results.values())
    assert all("first" not in names and "second" in names for names in module.in_place)


@pytest.mark.parametrize(("strategy", "does"), [("ddp_spawn", True), ("ddp", False), ("auto", False)])
def test_strategies_that_spawn_are_known(strategy, does):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=strategy, **quiet)
    assert private.spawns_or_forks(trainer) == does


def test_what_is_compiled_is_known():
    def double(x):
        return 2 * x

    private.forget_compiled()
    assert not private.something_was_compiled()
    compiled = torch.compile(double, backend="eager")
    assert private.compiled_from(compiled) is double
    assert private.compiled_from(double) is None
    compiled(torch.ones(2))
    assert private.something_was_compiled()
    private.forget_compiled()
    assert not private.something_was_compiled()

    layer, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not private.is_compiled_module(layer)
    assert private.is_compiled_module(torch.compile(layer, backend="eager"))
    in_place.compile(backend="eager")
    assert private.is_compiled_module(in_place)


@pytest.mark.parametrize(("epochs", "limit", "follows"), [(0, 1.0, True), (1, 0, True), (1, 1.0, False)])
def test_what_follows_a_training_that_is_skipped(epochs, limit, follows):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, limit_train_batches=limit, enable_model_summary=False, **quiet
    )
    followed = []
    undo = private.have_skipped_training_followed(trainer, lambda: followed.append(trainer.training))
    loaders = [DataLoader(TensorDataset(torch.randn(4, 4), torch.zeros(4, dtype=torch.long)), 2) for _ in range(2)]
    trainer.fit(Small(), *loaders)
    assert followed == [True] * follows  # once, while the Trainer trains
    undo()
    assert "run" not in vars(trainer.fit_loop)


def test_the_command_line_of_lightning_has_what_ours_overrides():
    for name in ("_add_subcommands", "_parse_ckpt_path", "_run_subcommand", "_add_arguments"):
        assert callable(getattr(LightningCLI, name))
    parser, child = LightningArgumentParser(), LightningArgumentParser()
    parser.add_subcommands().add_subcommand("own", child, help="Added later, too.")
    parser._subcommands_action.add_subcommand("more", LightningArgumentParser(), help="Added by whoever comes after.")
    assert parser.parse_args(["more"]).subcommand == "more"
