"""What a run, an export or a report says it has written is there and whole, whatever the disk does."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_easier import export, load_pruned
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.tiny import assert_equal_states


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """Refuse files larger than a few bytes, as a full disk does, in this process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def forked():
    context = get_context("forkserver")  # a clean process that has imported everything
    context.set_forkserver_preload([__name__])
    return context


def ends_well(context, target, *args) -> None:
    process = context.Process(target=target, args=args)
    process.start()
    process.join(180)
    assert process.exitcode == 0


def fill_the_disk_in_the_middle_of_a_round(root: Path, pruning: dict) -> None:
    torch.set_num_threads(1)
    limits = full_disk()
    callbacks = []
    fills = At("on_train_batch_start", 1, 1, lambda trainer: (callbacks.extend(trainer.callbacks), limits.__enter__()))
    with pytest.raises(OSError, match="could not be written, and is as it was before: .*Make room") as caught:
        run(root, fills, ModelCheckpoint(root / "saved", save_last=True), pruning=pruning)
    limits.__exit__(None, None, None)
    name = "best_removed_1.ckpt" if pruning else "round_1.ckpt"
    assert str(root / "rounds" / name) in str(caught.value)
    assert caught.value.errno == errno.EFBIG
    callback = callbacks[0]
    assert callback.last_good == root / "rounds" / "round_0.ckpt"
    for path in (callback.last_good, *callback.best_checkpoints.values()):
        torch.load(path, weights_only=True)
    assert sorted(callback.best_checkpoints) == ([0] if pruning else [])
    assert not list((root / "rounds").glob(".*.part"))


@pytest.mark.parametrize("pruning", [{}, {"best_per_depth": True}], ids=["round", "best"])
def test_a_disk_that_is_full_in_the_middle_of_a_round_leaves_what_was_there_and_the_run_goes_on(
    tmp_path, forked, pruning
):
    ends_well(forked, fill_the_disk_in_the_middle_of_a_round, tmp_path, pruning)
    whole = outcome(*run(tmp_path / "whole", pruning=pruning))
    again = run(tmp_path, pruning=pruning, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert_equal_states(outcome(*again), whole)


@pytest.mark.parametrize("name", ["round_0", "round_1"])
def test_a_round_that_could_not_be_saved_is_saved_when_the_run_is_taken_up(tmp_path, monkeypatch, name):
    """From a checkpoint that was saved on the very exception: the round is judged by then."""
    scores, replace, callbacks = (0.9, 0.9, 0.1, 0.9), os.replace, []
    whole = outcome(*run(tmp_path / "whole", scores=scores))

    def fail(source, target):
        if Path(target).stem == name:
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    begins = At("on_train_start", 0, None, lambda trainer: callbacks.extend(trainer.callbacks))
    with pytest.raises(OSError, match=rf"{name}\.ckpt could not be written.*Read-only file system.*`dirpath`"):
        run(tmp_path, begins, OnExceptionCheckpoint(tmp_path / "saved", "failed"), scores=scores)
    good = callbacks[0].last_good
    assert (None if good is None else good.name) == (None if name == "round_0" else "round_0.ckpt")
    monkeypatch.undo()
    assert_equal_states(outcome(*run(tmp_path, scores=scores, ckpt_path=tmp_path / "saved" / "failed.ckpt")), whole)


def test_a_folder_that_can_not_be_written_to_is_named_before_training(tmp_path):
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / ".in_use").mkdir()  # whoever runs the tests may write everywhere
    seen = []
    with pytest.raises(OSError, match=r"rounds/\.in_use could not be written.*Pass a `dirpath` that can be"):
        run(tmp_path, At("on_train_batch_start", 0, 0, seen.append))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written.*Pass a `dirpath` that can be"):
        run(tmp_path, At("on_train_batch_start", 0, 0, seen.append), pruning={"dirpath": str(tmp_path / "file/rounds")})
    assert seen == []


ROUNDS = [f"round_{number}.ckpt" for number in range(4)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def test_a_run_that_begins_while_another_goes_on_has_a_folder_of_its_own(tmp_path):
    others = []
    begins = At("on_train_batch_start", 0, 1, lambda trainer: others.append(run(tmp_path)[1]))
    with pytest.warns(UserWarning, match="another run, so those of this one go to .*rounds-v1"):
        _, callback, _ = run(tmp_path, begins)
    assert callback.last_good == tmp_path / "rounds" / "round_3.ckpt"
    assert others[0].last_good == tmp_path / "rounds-v1" / "round_3.ckpt"
    assert checkpoints(tmp_path / "rounds") == checkpoints(tmp_path / "rounds-v1") == ROUNDS


def run_with_others(root: Path, all_are_there) -> None:
    torch.set_num_threads(1)
    meet = At("on_train_start", 0, None, lambda trainer: all_are_there.wait(120))
    _, callback, _ = run(root, before=(meet,))
    load_pruned(Small(), callback.last_good)


def test_processes_that_begin_at_once_have_folders_of_their_own(tmp_path, forked):
    barrier = forked.Barrier(3)
    processes = [forked.Process(target=run_with_others, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(tmp_path.iterdir()) == [tmp_path / name for name in ("rounds", "rounds-v1", "rounds-v2")]
    assert all(checkpoints(folder) == ROUNDS for folder in tmp_path.iterdir())


def test_a_run_is_not_taken_up_twice_at_once(tmp_path):
    path = tmp_path / "saved.ckpt"

    def save_and_stop(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    run(tmp_path, At("on_train_epoch_end", 1, None, save_and_stop))

    def take_up(trainer):
        with pytest.raises(MisconfigurationException, match="another process has taken up that run, too"):
            run(tmp_path, ckpt_path=path)

    twice = At("on_train_batch_start", 2, 1, take_up)
    _, callback, _ = run(tmp_path, twice, ckpt_path=path)
    assert twice.done
    assert len(callback.removed) == 3


def test_what_a_killed_run_has_left_behind_is_removed_when_it_is_taken_up(tmp_path):
    path, folder = tmp_path / "saved.ckpt", tmp_path / "rounds"

    def save_and_stop(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    run(tmp_path, At("on_train_epoch_end", 1, None, save_and_stop))
    (folder / ".round_2.ckpt.part").write_text("cut")
    run(tmp_path, ckpt_path=path)
    assert sorted(each.name for each in folder.iterdir()) == [".in_use", *ROUNDS]


def export_to_a_full_disk(root: Path, format: str) -> None:
    model, path = nn.Sequential(nn.Linear(100, 100), nn.ReLU()).eval(), root / f"model.{format}"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError, match="could not be written, and is as it was before") as caught:
        export(model, path, torch.randn(2, 100))
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert list(root.iterdir()) == [path]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_export_to_a_full_disk_leaves_what_was_there(tmp_path, forked, format):
    ends_well(forked, export_to_a_full_disk, tmp_path, format)


def test_an_export_that_can_not_be_put_in_place_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    path = tmp_path / "model.pt2"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=rf"{path} could not be written.*export to another folder"):
        export(nn.Linear(2, 2).eval(), path, torch.randn(2, 2))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
