"""What a run, an export or a report says it has written is there and whole, whatever the disk does."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_easier import export, load_pruned
from lightning_easier.callbacks.files import RunFiles
from lightning_easier.pruning.state import RunState
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


def saver(path: Path):
    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    return save


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


OF_THE_USER = {
    ".env.old": "secret", "env": "new", ".notes.part": "notes", ".bashrc.old": "mine", ".part": "b", ".old": "c",
    ".last.ckpt.part": "of another library", ".round_one.ckpt.old": "d", "round_7.ckpt.part": "e",
    ".my_round_1.ckpt.old": "f", ".round_01.ckpt.part": "g", ".round_1.ckpt.old.old": "h",
}  # fmt: skip


def test_a_run_leaves_files_alone_that_are_not_its_own(tmp_path):
    path, folder = tmp_path / "saved.ckpt", tmp_path / "rounds"
    folder.mkdir()
    for name, text in OF_THE_USER.items():
        (folder / name).write_text(text)
    begins_in = folder / ".best_removed_0.ckpt.part"
    begins_in.write_text("cut")
    run(tmp_path, At("on_train_epoch_end", 1, None, saver(path)), pruning={"best_per_depth": True})
    assert not begins_in.exists()
    run(tmp_path, ckpt_path=path, pruning={"best_per_depth": True})
    assert {name: (folder / name).read_text() for name in OF_THE_USER} == OF_THE_USER
    best = [f"best_removed_{number}.ckpt" for number in range(4)]
    assert sorted(each.name for each in folder.iterdir()) == sorted([".in_use", *best, *ROUNDS, *OF_THE_USER])


@pytest.mark.parametrize("name", ["round_1.ckpt", "best_removed_1.ckpt"])
def test_a_checkpoint_that_was_put_aside_is_that_of_the_run_still(tmp_path, name):
    """As a folder of shards is, while the next one takes its place."""
    path, folder = tmp_path / "saved.ckpt", tmp_path / "rounds"
    options = {"scores": (0.9, 0.9, 0.1), "pruning": {"best_per_depth": True}}
    run(tmp_path, At("on_train_batch_end", 2, 1, saver(path)), **options)
    kept = (folder / name).read_bytes()
    (folder / name).rename(folder / f".{name}.old")
    _, callback, _ = run(tmp_path, ckpt_path=path, **options)
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    assert (folder / name).read_bytes() == kept
    assert not (folder / f".{name}.old").exists()


def test_a_folder_with_a_checkpoint_that_was_put_aside_is_not_free(tmp_path):
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / ".round_0.ckpt.old").write_text("of another run")
    with pytest.warns(UserWarning, match="another run, so those of this one go to .*rounds-v1"):
        run(tmp_path, epochs=2)
    assert (tmp_path / "rounds" / ".round_0.ckpt.old").read_text() == "of another run"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TAKEN_BACK = (0.9, 0.9, 0.1)


@pytest.fixture
def changed(tmp_path):
    """Save a run in its second round, and have its record name another folder, with files of others."""
    path, other = tmp_path / "saved.ckpt", tmp_path / "elsewhere"

    def change(epoch: int = 2) -> tuple[Path, Path]:
        run(tmp_path, At("on_train_batch_end", epoch, 1, saver(path)), scores=TAKEN_BACK)
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"]["EntropyPruningCallback"]["folder"] = str(other)
        torch.save(checkpoint, path)
        other.mkdir()
        (other / ".round_1.ckpt.part").write_text("any")
        (other / ".round_2.ckpt.old").write_text("any")
        return path, other

    return change


def another_run(root: Path) -> bytes:
    _, callback, _ = run(root, epochs=2, scores=(0.4,))
    return callback.last_good.read_bytes()


@pytest.mark.parametrize("held", ["nothing", "another run", "no checkpoint", "a link", "a file"])
def test_a_record_does_not_have_a_run_write_where_its_checkpoints_are_not(tmp_path, changed, held):
    path, other = changed()
    if held == "another run":
        (other / "round_1.ckpt").write_bytes(another_run(tmp_path / "another"))
    elif held == "no checkpoint":
        (other / "round_1.ckpt").write_text("some text")
    elif held == "a link":
        (other / "round_1.ckpt").symlink_to(tmp_path / "rounds" / "round_1.ckpt")
    elif held == "a file":
        for each in other.iterdir():
            each.unlink()
        other.rmdir()
        other.write_text("some text")
    before = content_of(tmp_path)
    with pytest.raises(
        MisconfigurationException, match=r"Expected .*elsewhere to hold the checkpoints of the run.*`dirpath` that"
    ):
        run(tmp_path, scores=TAKEN_BACK, ckpt_path=path, pruning={"dirpath": None})
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("dirpath", ["rounds", "new"])
def test_a_run_goes_on_in_the_folder_of_the_user_where_that_of_its_record_is_another(tmp_path, changed, dirpath):
    path, other = changed()
    before = content_of(other)
    pruning = {"dirpath": str(tmp_path / dirpath), "max_rejections": 3}
    options = {
        "ckpt_path": path,
        "pruning": pruning,
        "epochs": 4,
        "scores": TAKEN_BACK if dirpath == "rounds" else (0.9,),
    }
    _, callback, _ = run(tmp_path, **options)
    assert callback.last_good.parent == tmp_path / dirpath
    assert callback.last_good.exists()
    assert content_of(other) == before


def test_a_run_that_has_kept_nothing_yet_has_a_folder_of_its_own(tmp_path, changed):
    path, other = changed(epoch=0)
    (other / "round_0.ckpt").write_text("of another run")
    before = content_of(other)
    _, callback, _ = run(tmp_path, ckpt_path=path, pruning={"dirpath": None}, default_root_dir=tmp_path)
    assert callback.last_good == tmp_path / "entropy_pruning" / "round_3.ckpt"
    assert content_of(other) == before


def test_a_run_that_has_kept_nothing_but_its_best_goes_on_beside_it(tmp_path):
    path, pruning = tmp_path / "saved.ckpt", {"best_per_depth": True, "warmup_epochs": 1}
    run(tmp_path, At("on_train_batch_end", 1, 1, saver(path)), pruning=pruning)
    assert checkpoints(tmp_path / "rounds") == ["best_removed_0.ckpt"]
    _, callback, _ = run(tmp_path, ckpt_path=path, pruning=pruning)
    assert callback.last_good == tmp_path / "rounds" / "round_2.ckpt"
    assert callback.best_checkpoints[0] == tmp_path / "rounds" / "best_removed_0.ckpt"


def test_a_run_that_is_taken_up_in_the_folder_of_another_is_refused(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_batch_end", 2, 1, saver(path)))
    (tmp_path / "rounds").rename(tmp_path / "moved")
    another_run(tmp_path)
    before = content_of(tmp_path / "rounds")
    with pytest.raises(MisconfigurationException, match=r"rounds to hold .*but round_1\.ckpt is of another run"):
        run(tmp_path, ckpt_path=path)
    assert content_of(tmp_path / "rounds") == before
    _, callback, _ = run(tmp_path, ckpt_path=path, pruning={"dirpath": str(tmp_path / "moved")})
    assert callback.last_good == tmp_path / "moved" / "round_3.ckpt"


def test_a_run_that_goes_on_elsewhere_than_it_was_asked_to_says_so(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_batch_end", 2, 1, saver(path)))
    with pytest.warns(UserWarning, match=r"goes on in .*rounds, where its checkpoints are, and not in `dirpath` .*new"):
        _, callback, _ = run(tmp_path, ckpt_path=path, pruning={"dirpath": str(tmp_path / "new")})
    assert callback.last_good == tmp_path / "rounds" / "round_3.ckpt"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_ask_for_the_folder_of_the_logger(tmp_path, rank):
    """Lightning broadcasts it: a process that does not ask for it would get the next one's message."""
    asked = []

    class SomeTrainer:
        is_global_zero = rank == 0
        strategy = SimpleNamespace(broadcast=lambda value: asked.append("outcome") or value)

        @property
        def log_dir(self):
            asked.append("log_dir")
            return str(tmp_path)

    files = RunFiles()
    files.claim(SomeTrainer(), None, RunState(), "any")
    files.release()
    assert asked == ["log_dir", "outcome"]


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
