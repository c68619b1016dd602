"""A run that was killed, at any moment, and started again ends as one that was not."""

import shutil
from functools import cache
from itertools import count
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_easier import EntropyPruningCallback
from lightning_easier.structure.linearize import stand_ins
from tests.integration.interrupted import BATCHES, HOOKS, At, Small, kill, outcome, run, stop
from tests.integration.tiny import assert_equal_states

# name -> scores, options of the callback, options of the Trainer
RECIPES = {
    "plain": ((0.9,), {}, {}),
    "taken back": ((0.9, 0.9, 0.1), {}, {}),
    "next": ((0.5, 0.9, 0.6, 0.1, 0.8), {"max_rejections": 3, "reference": "best"}, {"epochs": 5}),
    "next, four epochs": ((0.9, 0.9, 0.1, 0.1, 0.9), {"max_rejections": 3}, {}),
    "restart": ((0.9,), {"restart": "optimizer", "removals": 2}, {}),
    "on training": ((0.9,), {"on": "training"}, {}),
    "two validations": ((0.9,), {"stand_in": "on_off"}, {"val_check_interval": 1}),
    "rare validations": ((0.9,), {}, {"check_val_every_n_epoch": 2, "epochs": 5}),
    "long rounds": ((0.9,), {"epochs": 2, "warmup_epochs": 1}, {"epochs": 6}),
    "affine": ((0.9, 0.9, 0.1, 0.1, 0.9), {"max_rejections": 3, "stand_in": "affine"}, {"epochs": 5}),
    "affine, trained": (
        (0.9, 0.9, 0.1, 0.1, 0.9),
        {"max_rejections": 3, "stand_in": "affine", "trainable": True},
        {"epochs": 5},
    ),
    "affine on training": ((0.9,), {"on": "training", "stand_in": "affine"}, {}),
    "fitted": ((0.9, 0.9, 0.1, 0.1, 0.9), {"max_rejections": 3, "fit": True}, {"epochs": 5}),
    "fitted, by gain": (
        (0.9, 0.9, 0.9, 0.1),
        {"fit": True, "criterion": "linearity", "gain": "macs", "mergeable_only": True},
        {},
    ),
    "accumulated": ((0.9,), {}, {"accumulate_grad_batches": 2}),
    "steps": ((0.9,), {"on": "training", "criterion": "tlc"}, {"epochs": 9, "max_steps": 4 * BATCHES}),
}
# Where Lightning itself resumes exactly: moment -> batch, if the hook has one
SAVED_AT = {
    "in the middle": ("on_train_batch_end", 1),
    "after the last batch": ("on_train_batch_end", BATCHES - 1),
    "before validation": ("on_validation_start", None),
    "in validation": ("on_validation_batch_end", 0),
    "at the end of validation": ("on_validation_epoch_end", None),
    "after validation": ("on_validation_end", None),
    "at the end": ("on_train_epoch_end", None),
}


@cache
def uninterrupted(recipe: str, root: Path) -> dict:
    scores, pruning, options = RECIPES[recipe]
    return outcome(*run(root, scores=scores, pruning=pruning, **options))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return lambda recipe: uninterrupted(recipe, tmp_path_factory.getbasetemp() / "uninterrupted" / recipe)


def has_a_part_in(hook: str) -> bool:
    """Tell whether the callback does anything there: if not, what is saved can't depend on who comes first."""
    return getattr(EntropyPruningCallback, hook) is not getattr(Callback, hook)


MOMENTS = [
    (moment, first) for moment, (hook, _) in SAVED_AT.items() for first in (True, False)
    if has_a_part_in(hook) or not first
]  # fmt: skip


@cache
def saved(recipe: str, root: Path) -> dict[tuple[str, bool], At]:
    """Train once and save at each of the moments, with a copy of what was on the disk then."""
    scores, pruning, options = RECIPES[recipe]

    def saver(moment: str, saved_first: bool) -> At:
        hook, batch = SAVED_AT[moment]
        epoch = 3 if recipe == "long rounds" or (recipe == "rare validations" and "validation" in moment) else 2

        def save(trainer):
            at = root / f"{moment}, {saved_first}"
            trainer.save_checkpoint(at / "saved.ckpt")
            shutil.copytree(root / "rounds", at / "rounds")

        return At(hook, epoch, batch, save)

    savers = {when: saver(*when) for when in MOMENTS}
    before = tuple(saver for (_, first), saver in savers.items() if first)
    after = [saver for (_, first), saver in savers.items() if not first]
    run(root, *after, before=before, scores=scores, pruning=pruning, **options)
    return savers


@cache
def resumed(recipe: str, root: Path, files: frozenset[tuple[str, bytes]]) -> dict:
    """Go on from what was on the disk at some moment; from the same bytes it is the same run, and done once."""
    shutil.rmtree(root / "rounds")
    for name, content in files:  # as if the run had ended then
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    scores, pruning, options = RECIPES[recipe]
    return outcome(*run(root, scores=scores, pruning=pruning, ckpt_path=root / "saved.ckpt", **options))


@pytest.mark.parametrize(("moment", "saved_first"), [
    pytest.param(moment, first, id=f"{moment}-{'before' if first else 'after'} the callback")
    for moment, first in MOMENTS
])  # fmt: skip
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "next, four epochs"])
def test_a_run_goes_on_from_wherever_it_was_saved(tmp_path_factory, reference, recipe, moment, saved_first):
    root = tmp_path_factory.getbasetemp() / "saved" / recipe
    assert saved(recipe, root)[moment, saved_first].done
    at = root / f"{moment}, {saved_first}"
    files = frozenset((str(path.relative_to(at)), path.read_bytes()) for path in at.rglob("*") if path.is_file())
    assert_equal_states(resumed(recipe, root, files), reference(recipe))


KILLED_AT = [*HOOKS, "save"]
SCORES = (0.9, 0.9, 0.1, 0.1, 0.9)


def be_killed(root: Path, hook: str) -> None:
    """Train with a checkpoint after every batch, until SIGKILL."""
    torch.set_num_threads(1)  # as in the tests' own process, or numbers differ in their last bit
    if hook == "save":  # all is written, and not yet where it belongs
        original, saves = LocalFileOpener.commit, count()
        LocalFileOpener.commit = lambda file: kill(None) if next(saves) == 11 else original(file)
    epoch = 4 if hook in ("on_train_end", "on_fit_end", "teardown") else 3
    batch = 1 if hook in ("on_train_batch_start", "on_train_batch_end") else None
    run(root, ModelCheckpoint(root / "saved", every_n_train_steps=1, save_last=True), At(hook, epoch, batch, kill),
        scores=SCORES, pruning={"max_rejections": 3})  # fmt: skip


@pytest.mark.parametrize("hook", KILLED_AT)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path, forked, reference, hook):
    process = forked.Process(target=be_killed, args=(tmp_path, hook))
    process.start()
    process.join(120)
    assert process.exitcode == -SIGKILL
    again = run(tmp_path, ckpt_path=tmp_path / "saved" / "last.ckpt", scores=SCORES, pruning={"max_rejections": 3})
    assert_equal_states(outcome(*again), reference("next, four epochs"))


def test_a_run_that_is_interrupted_again_and_again(tmp_path, reference):
    scores, pruning, options = RECIPES["next"]
    ckpt_path = None
    for seen in (2, 4, 5, 8, 11, 13):  # a second one after the last batch of an epoch is lost on Lightning itself
        saver = ModelCheckpoint(tmp_path / "saved", f"{seen}", every_n_train_steps=1, save_last=False)
        stopper = At("on_train_batch_start", seen // BATCHES, seen % BATCHES, stop)
        run(tmp_path, saver, stopper, scores=scores, pruning=pruning, ckpt_path=ckpt_path, **options)
        assert stopper.done
        ckpt_path = saver.best_model_path
    resumed = run(tmp_path, scores=scores, pruning=pruning, ckpt_path=ckpt_path, **options)
    assert_equal_states(outcome(*resumed), reference("next"))


@pytest.mark.parametrize("how", ["another Trainer", "the same Trainer"])
@pytest.mark.parametrize(("scores", "accepted", "linear"), [
    ((0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9), [True, False, True], 1),  # the cut-short round is taken back
    ((0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1), [True, True, False], 1),  # and kept; the one after it isn't
])  # fmt: skip
def test_a_round_that_the_end_of_the_run_cut_short_is_closed_when_the_run_goes_on(
    tmp_path, how, scores, accepted, linear
):
    pruning = {"epochs": 3, "max_rejections": 2, "max_removals": 2}
    model, callback, trainer = run(tmp_path, scores=scores, pruning=pruning, epochs=4)
    assert [this.accepted for this in callback.rounds] == accepted[:2]
    if how == "another Trainer":
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        model, callback, trainer = run(tmp_path, scores=scores, pruning=pruning, epochs=7,
                                       ckpt_path=tmp_path / "end.ckpt")  # fmt: skip
    else:
        trainer.fit_loop.max_epochs = 7
        trainer.fit(model, trainer.train_dataloader, trainer.val_dataloaders)
    assert [this.accepted for this in callback.rounds] == accepted
    assert len(set(callback.removed)) == len(callback.removed) == linear
    assert sorted(stand_ins(model)) == sorted(callback.removed)


@pytest.mark.parametrize("saver", [
    lambda path: OnExceptionCheckpoint(path, "saved"),
    lambda path: ModelCheckpoint(path, "saved", save_on_exception=True, every_n_epochs=100, save_top_k=0),
])  # fmt: skip
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("recipe", ["on training", "plain"])
def test_a_run_goes_on_from_a_checkpoint_that_is_saved_on_an_exception(tmp_path, reference, saver, hook, recipe):
    def fail(trainer):
        raise KeyError("any")

    _, pruning, _ = RECIPES[recipe]
    with pytest.raises(KeyError):
        run(tmp_path, saver(tmp_path / "kept"), At(hook, 1, 1, fail), pruning=pruning)
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    assert_equal_states(outcome(*run(tmp_path, pruning=pruning, ckpt_path=path)), reference(recipe))


@pytest.mark.parametrize("recipe", ["plain", "on training"])
def test_a_save_at_the_very_start_of_a_resumed_run_changes_nothing(tmp_path, reference, recipe):
    scores, pruning, options = RECIPES[recipe]
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)

    def save_and_stop(trainer):
        save(trainer)
        stop(trainer)

    run(tmp_path, At("on_train_batch_end", 1, BATCHES - 1, save_and_stop), scores=scores, pruning=pruning, **options)
    saver = At("on_train_start", 2, None, save)
    resumed = run(tmp_path, before=(saver,), scores=scores, pruning=pruning, ckpt_path=path, **options)
    assert saver.done
    assert_equal_states(outcome(*resumed), reference(recipe))
    again = run(tmp_path, scores=scores, pruning=pruning, ckpt_path=path, **options)
    assert_equal_states(outcome(*again), reference(recipe))


def test_the_number_removed_and_the_score_are_known_again_at_once(tmp_path):
    path, seen = tmp_path / "saved.ckpt", {}

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    def look(trainer):
        seen.update({name: value.item() for name, value in trainer.callback_metrics.items()})

    options = {"scores": (0.9, 0.9, 0.8, 0.8), "pruning": {"epochs": 2}}
    run(tmp_path, At("on_train_batch_end", 3, 1, save), **options)
    run(tmp_path, At("on_train_batch_start", 3, 2, look), ckpt_path=path, **options)
    assert seen["removed"] == 1
    assert seen["score"] == pytest.approx(0.8)


@pytest.mark.parametrize("moment", ["after the last batch", "in validation", "after validation"])
def test_a_score_of_training_is_not_judged_before_it_is_known(tmp_path, moment):
    """What training logs once an epoch is not in a checkpoint that was saved before."""
    hook, batch = SAVED_AT[moment]
    path = tmp_path / "saved.ckpt"

    class Logs(Small):
        def training_step(self, batch, batch_idx):
            self.log("epoch_score", 1.0 if self.current_epoch < 1 else 9.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    pruning = {"monitor": "epoch_score", "mode": "min", "tolerance": 1.0}
    run(tmp_path, At(hook, 1, batch, save), model=Logs(), pruning=pruning)
    _, callback, _ = run(tmp_path, model=Logs(), pruning=pruning, ckpt_path=path)
    assert [this.score_after for this in callback.rounds] == [1.0, 9.0]
    assert callback.rounds[-1].accepted is False
