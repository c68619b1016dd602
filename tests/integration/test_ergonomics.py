"""What a user sees of a run, and what a dry run says before it."""

import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import EntropyPruningCallback, measure_entropy
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.inference import has_hooks
from tests.integration.interrupted import At, Small, run, stop
from tests.settings import callback as callback_of


class Fields(TQDMProgressBar):
    """Keeps what it shows."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self.shown.append(self.get_metrics(trainer, pl_module))


def test_the_progress_bar_shows_how_far_pruning_is(tmp_path):
    fields = Fields()
    _, callback, _ = run(tmp_path, fields, enable_progress_bar=True, epochs=3)
    assert [(shown["removed"], shown["round"]) for shown in fields.shown] == [(0, 0), (1, 1), (2, 2)]
    assert [shown["H_min"] for shown in fields.shown[:2]] == pytest.approx(
        [this.entropies[this.removed[0]] for this in callback.rounds[1:]], abs=1e-3
    )


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("moment", [("on_train_batch_end", 2), ("on_validation_batch_end", 0)])
def test_a_progress_bar_stands_a_validation_that_is_made_up_for(tmp_path, bar, moment):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    run(tmp_path, At(moment[0], 1, moment[1], save))
    _, callback, _ = run(tmp_path, bar(), enable_progress_bar=True, ckpt_path=path)
    assert len(callback.rounds) == 4


def test_one_line_a_round(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        _, callback, _ = run(tmp_path, scores=(0.9, 0.9, 0.1), epochs=9)
    lines = [record.message for record in caplog.records if record.message.startswith("Round ")]
    (first,), (second,) = callback.rounds[1].removed, callback.rounds[2].removed
    bits = [callback.rounds[number].entropies[name] for number, name in ((1, first), (2, second))]
    assert lines == [
        "Round 0: removed nothing (dense); score 0.9000: kept.",
        f"Round 1: removed `{first}` ({bits[0]:.4f} bit); score 0.9000 against 0.9000 (dense): kept.",
        f"Round 2: removed `{second}` ({bits[1]:.4f} bit); score 0.1000 against 0.9000 (dense): beyond the "
        f"tolerance 0.2.",
    ]


def loader() -> DataLoader:
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(32, 4), torch.zeros(32, dtype=torch.long)), 8)


def validating(callback: EntropyPruningCallback) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   callbacks=[callback])  # fmt: skip


def test_validation_alone_is_a_pure_measurement():
    model, callback = Small(), callback_of("score", max_removals=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = validating(callback)
    trainer.validate(model, loader(), verbose=False)
    assert callback.entropies == measure_entropy(model, loader())
    assert trainer.callback_metrics["H_min"].item() == pytest.approx(min(callback.entropies.values()))
    assert trainer.callback_metrics["removed"].item() == 0
    assert callback.rounds[0].score_after is None
    assert callback.removed == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(has_hooks(module) for module in model.modules())


def test_a_dry_run_lists_the_candidates_and_touches_nothing(caplog):
    model, callback = Small(), callback_of("score", dry_run=True, exclude="layers.1", removals=2)
    with caplog.at_level(logging.INFO):
        validating(callback).validate(model, loader(), verbose=False)
    rows = {candidate.name: candidate for candidate in callback.listed.candidates}
    assert {name: row.entropy for name, row in rows.items() if name != "layers.1"} == callback.entropies
    assert rows["layers.3"].merges == (("layers.2", "layers.4"),)
    lowest = sorted(callback.entropies, key=callback.entropies.get)[:2]
    assert f"`{lowest[0]}`, `{lowest[1]}` would be removed next" in caplog.text
    assert ".2 + .4" in caplog.text
    assert stand_ins(model) == {}


def test_a_dry_run_of_a_fit_stops_at_the_first_decision(tmp_path):
    model, callback, trainer = run(tmp_path, pruning={"dry_run": True, "epochs": 2}, epochs=9)
    assert trainer.current_epoch == 2
    assert callback.listed.candidates[0].entropy == callback.entropies["layers.1"]
    assert callback.removed == []
    assert stand_ins(model) == {}


def test_a_share_of_each_batch_is_enough_and_the_same_in_every_run(tmp_path):
    model = Small()
    data = DataLoader(TensorDataset(torch.randn(4000, 4), torch.zeros(4000, dtype=torch.long)), 100)
    exact = measure_entropy(model, data)
    runs = []
    for _ in range(2):
        callback = callback_of("score", sample=0.25)
        validating(callback).validate(model, data, verbose=False)
        runs.append(callback.entropies)
    assert runs[0] == runs[1] != exact
    assert runs[0] == pytest.approx(exact, abs=0.05)


def test_a_share_of_training_batches_goes_on_after_an_interruption(tmp_path):
    options = {"pruning": {"on": "training", "sample": 0.5}}
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    _, whole, _ = run(tmp_path, **options)
    run(tmp_path, At("on_train_batch_end", 1, 1, save), **options)
    _, resumed, _ = run(tmp_path, ckpt_path=path, **options)
    assert resumed.report() == whole.report()


def test_a_run_that_ends_before_its_first_round_says_that_nothing_was_pruned(tmp_path):
    def enough(trainer):
        trainer.should_stop = True

    with pytest.warns(UserWarning, match="Nothing was pruned: the run ended before its first round, 3 epochs"):
        run(tmp_path, At("on_train_epoch_end", 0, None, enough), pruning={"epochs": 3})


def test_a_dry_run_of_an_interrupted_run_carries_nothing_out_and_a_real_one_goes_on_from_it(tmp_path):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    _, whole, _ = run(tmp_path)
    run(tmp_path, At("on_train_epoch_end", 1, None, save))
    model, dry, trainer = run(tmp_path, ckpt_path=path, pruning={"dry_run": True})
    assert len(stand_ins(model)) == 1
    assert dry.listed is not None
    assert trainer.current_epoch == 2
    trainer.save_checkpoint(path)
    _, callback, _ = run(tmp_path, ckpt_path=path)
    assert callback.report() == whole.report()


def test_a_module_that_is_completed_in_setup_is_measured_by_validation_alone():
    class Completed(Small):
        def setup(self, stage):
            self.norm = torch.nn.BatchNorm1d(4)

    callback = callback_of("score", dry_run=True, exclude="layers.1")
    validating(callback).validate(Completed(), loader(), verbose=False)
    assert list(callback.entropies) == ["layers.3", "layers.5", "layers.7", "layers.9"]
    assert callback.listed is not None


def test_fast_dev_run_is_not_too_short(tmp_path):
    run(tmp_path, pruning={"epochs": 10, "warmup_epochs": 5}, fast_dev_run=True)


def test_the_files_of_a_run_that_was_moved_are_found(tmp_path):
    path = tmp_path / "first" / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    scores = (0.9, 0.9, 0.1)
    run(tmp_path / "first", At("on_train_epoch_end", 1, None, save), scores=scores)
    (tmp_path / "first").rename(tmp_path / "second")
    _, callback, _ = run(tmp_path / "second", scores=scores, ckpt_path=tmp_path / "second" / "saved.ckpt", epochs=9)
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    assert callback.last_good == tmp_path / "second" / "rounds" / "round_1.ckpt"


def test_a_new_run_leaves_the_files_of_another_alone(tmp_path):
    _, first, _ = run(tmp_path, epochs=2)
    kept = first.last_good.read_bytes()
    with pytest.warns(UserWarning, match="rounds holds the checkpoints of another run"):
        _, second, _ = run(tmp_path, epochs=3)
    assert second.last_good == tmp_path / "rounds-v1" / "round_2.ckpt"
    assert first.last_good == tmp_path / "rounds" / "round_1.ckpt"
    assert first.last_good.read_bytes() == kept
    assert run(tmp_path, epochs=3, ckpt_path=second.last_good)[1].last_good == second.last_good


def test_a_name_that_no_validation_has_logged_is_told_before_the_first_epoch(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(4, 4), torch.tensor([0, 1, 0, 1])), 2)
    told_before = []

    def count(*_):
        told_before.append(sum("`monitor`" in str(warning.message) for warning in told))

    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[callback_of(monitor="scor", tolerance=1.0), LambdaCallback(on_train_start=count)],
    )  # fmt: skip
    with (
        pytest.warns(UserWarning, match=r"`monitor` 'scor' is not among .*did you mean 'score'\?") as told,
        pytest.raises(MisconfigurationException, match="to be a logged score"),
    ):
        trainer.fit(Small(), data, data)
    assert told_before == [1]
