"""Nothing that lies in the folder of a run is unpickled, unless the user says so, or the run has written it itself."""

import os
import pickle
from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import save as save_folder

from lightning_easier.callbacks.files import RunFiles, _digest_if_unsafe, read_marks_of
from lightning_easier.pruning.state import RunState
from lightning_easier.structure.linearize import linearize
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.tiny import assert_equal_states

KEY = "EntropyPruningCallback"
TAKEN_BACK = (0.9, 0.9, 0.1, 0.9)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def spring(path, trace) -> None:
    """Put a trap into a checkpoint that is good otherwise."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["more"] = Trap(trace)
    torch.save(checkpoint, path)


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / "trace"), tmp_path / "trap.ckpt")
    torch.load(tmp_path / "trap.ckpt", weights_only=False)
    assert (tmp_path / "trace").is_dir()


def saved(path):
    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    return save


@pytest.mark.parametrize("how", ["in the same process", "resumed"])
def test_a_last_good_checkpoint_that_was_replaced_runs_nothing(tmp_path, how):
    trace, file, ckpt_path = tmp_path / "trace", tmp_path / "rounds" / "round_1.ckpt", None
    replace = At("on_validation_start", 2, None, lambda trainer: spring(file, trace))
    if how == "resumed":
        ckpt_path = tmp_path / "saved.ckpt"
        run(tmp_path, At("on_validation_start", 2, None, saved(ckpt_path)), scores=TAKEN_BACK)
    with pytest.raises(ValueError, match=r"round_1\.ckpt can't be read safely: .*posix\.mkdir.*weights_only=False"):
        run(tmp_path, replace, scores=TAKEN_BACK, ckpt_path=ckpt_path)
    assert not trace.exists()


def test_a_dense_checkpoint_that_was_replaced_runs_nothing(tmp_path):
    trace = tmp_path / "trace"
    replace = At("on_train_epoch_end", 0, None, lambda trainer: spring(tmp_path / "rounds" / "round_0.ckpt", trace))
    with pytest.raises(ValueError, match=r"round_0\.ckpt can't be read safely"):
        run(tmp_path, replace, pruning={"distill": True})
    assert not trace.exists()


def test_a_best_checkpoint_that_was_replaced_runs_nothing_and_does_not_count(tmp_path):
    trace, path, pruning = tmp_path / "trace", tmp_path / "saved.ckpt", {"best_per_depth": True}
    run(tmp_path, At("on_train_epoch_end", 2, None, saved(path)), pruning=pruning)
    spring(tmp_path / "rounds" / "best_removed_0.ckpt", trace)
    with pytest.warns(UserWarning, match=r"does not count any more: .*best_removed_0\.ckpt can't be read safely"):
        _, callback, _ = run(tmp_path, pruning=pruning, ckpt_path=path)
    assert not trace.exists()
    assert sorted(callback.best_checkpoints) == [1, 2, 3]


NAMES = ["../other.ckpt", "/root/other.ckpt", "a/other.ckpt", "a\\other.ckpt", "..", "", "c:other.ckpt", 3]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_names_are_files_of_a_run(name):
    best = {"1": {"score": 0.5, "file": name}}
    snapshot = RunState().to_plain()["snapshot"]
    for changed in ({"snapshot": snapshot | {"file": name}}, {"best": best}):
        with pytest.raises(ValueError, match="to name files in its own folder, but got"):
            RunState.from_plain(RunState().to_plain() | changed)


@pytest.mark.parametrize("where", ["last_good", "best"])
def test_a_record_that_names_a_file_elsewhere_is_refused(tmp_path, where):
    path, pruning = tmp_path / "saved.ckpt", {"best_per_depth": True}
    run(tmp_path, At("on_validation_start", 2, None, saved(path)), scores=TAKEN_BACK, pruning=pruning)
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["callbacks"][KEY]
    file = "../elsewhere.ckpt"
    if where == "best":
        record["best"]["1"]["file"] = file
    else:
        record["snapshot"]["file"] = file
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="to name files in its own folder, but got"):
        run(tmp_path, scores=TAKEN_BACK, pruning=pruning, ckpt_path=path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    file, other = tmp_path / "rounds" / "round_1.ckpt", tmp_path / "other.ckpt"

    def link(trainer):
        file.rename(other)
        file.symlink_to(other)

    with pytest.raises(ValueError, match=r"to be a file in the folder of the run, but it is a link to .*other\.ckpt"):
        run(tmp_path, At("on_validation_start", 2, None, link), scores=TAKEN_BACK)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_last_good_checkpoint_that_was_cut_short_is_named(tmp_path):
    cutter = At("on_validation_start", 2, None, lambda trainer: cut(tmp_path / "rounds" / "round_1.ckpt"))
    with pytest.raises(ValueError, match=r"round_1\.ckpt can't be read \(.*\). Was it cut short"):
        run(tmp_path, cutter, scores=TAKEN_BACK)


def test_a_best_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    path, pruning = tmp_path / "saved.ckpt", {"best_per_depth": True}
    run(tmp_path, At("on_train_epoch_end", 2, None, saved(path)), pruning=pruning)
    cut(tmp_path / "rounds" / "best_removed_1.ckpt")
    with pytest.warns(UserWarning, match=r"does not count any more: .*best_removed_1\.ckpt can't be read"):
        _, callback, _ = run(tmp_path, pruning=pruning, ckpt_path=path)
    assert sorted(callback.best_checkpoints) == [0, 2, 3]


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_a_checkpoint_to_resume_from_that_was_cut_short_is_named(tmp_path, missing):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_epoch_end", 1, None, saved(path)))
    path.write_bytes(path.read_bytes()[:-missing])
    model = Small()
    with pytest.raises(ValueError, match=r"`ckpt_path` to be a checkpoint, but .*saved\.ckpt can't be read.*cut short"):
        run(tmp_path, model=model, ckpt_path=path)
    assert "load_checkpoint" not in vars(model.trainer.strategy)


def test_a_checkpoint_to_resume_from_that_holds_objects_is_named(tmp_path):
    path, trace = tmp_path / "saved.ckpt", tmp_path / "trace"
    run(tmp_path, At("on_train_epoch_end", 1, None, saved(path)))
    spring(path, trace)
    with pytest.raises(ValueError, match=r"`ckpt_path` .*saved\.ckpt can't be read safely.*mkdir.*weights_only=False"):
        run(tmp_path, ckpt_path=path)
    assert not trace.exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        run(tmp_path, ckpt_path=tmp_path / "nowhere.ckpt")


BROKEN = [
    (lambda c: c.pop("callbacks"), "no 'callbacks'"),
    (lambda c: c["callbacks"].clear(), "no rounds of EntropyPruningCallback"),
    (lambda c: c["callbacks"][KEY].update(rounds=1), "no rounds of EntropyPruningCallback"),
    (lambda c: c.update(state_dict=[]), "no 'state_dict'"),
    (lambda c: c.pop("lr_schedulers"), "no 'lr_schedulers'"),
    (lambda c: c.update(optimizer_states=[{}]), "'optimizer_states' are no such"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
def test_what_has_not_the_form_of_a_checkpoint_is_named(tmp_path, change, reason):
    path, strategy = tmp_path / "round_1.ckpt", SingleDeviceStrategy()
    trainer = SimpleNamespace(strategy=strategy)
    checkpoint = {"callbacks": {KEY: {"rounds": []}}, "state_dict": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(checkpoint, path)
    assert RunFiles().find(trainer, path, KEY, []) == (path, checkpoint)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"round_1\.ckpt to be a checkpoint of this run, but .*{reason}"):
        RunFiles().find(trainer, path, KEY, [])


def test_a_model_that_can_not_go_back_stays(tmp_path):
    file, model, states = tmp_path / "rounds" / "round_1.ckpt", Small(TAKEN_BACK), []

    def break_it(trainer):
        torch.save({"state_dict": model.state_dict()}, file)
        states.append({key: value.clone() for key, value in model.state_dict().items()})

    with pytest.raises(ValueError, match=r"round_1\.ckpt to be a checkpoint of this run, but it has no 'callbacks'"):
        run(tmp_path, At("on_validation_start", 2, None, break_it), model=model)
    assert_equal_states({**model.state_dict()}, states[0])


def test_a_record_of_another_form_is_named(tmp_path):
    path = tmp_path / "saved.ckpt"
    run(tmp_path, At("on_train_epoch_end", 0, None, saved(path)))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][KEY]["rounds"] = 1
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="to hold the record of a pruning run, but it has another form"):
        run(tmp_path, ckpt_path=path)
    for change in ({"other": 1}, {"best": {"a": {"score": 1.0, "file": "b"}}}, {"folder": 3}, {"decision": 1}):
        with pytest.raises(ValueError, match="to hold the record of a pruning run, but it has another form"):
            RunState.from_plain(RunState().to_plain() | change)


class Settings:
    """Hyperparameters of a class of the user's own."""


class WithSettings(Small):
    """Saves objects that are no plain data."""

    def __init__(self, scores=TAKEN_BACK, settings=None) -> None:
        super().__init__(scores)
        self.save_hyperparameters({"settings": settings or Settings()})


def with_settings():
    seed_everything(3, verbose=False)  # as `run` does before it builds a model
    return WithSettings()


def test_a_module_that_stores_any_objects_goes_back_to_what_the_run_itself_has_written(tmp_path):
    whole = outcome(*run(tmp_path / "plain", scores=TAKEN_BACK, pruning={"distill": True}))
    with pytest.warns(UserWarning, match=r"round_0\.ckpt holds more than .*Settings.*weights_only=False") as caught:
        other = run(tmp_path / "other", model=with_settings(), pruning={"distill": True})
    assert sum("holds more than" in str(each.message) for each in caught) == 1
    assert [this.accepted for this in other[1].rounds] == [True, True, False]
    assert_equal_states(outcome(*other), whole)


def test_what_was_put_in_the_place_of_such_a_file_runs_nothing(tmp_path):
    trace, file = tmp_path / "trace", tmp_path / "rounds" / "round_1.ckpt"

    def replace(trainer):
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"more": Trap(trace)}, file)

    with pytest.raises(ValueError, match=r"round_1\.ckpt can't be read safely"):
        run(tmp_path, At("on_validation_start", 2, None, replace), model=with_settings())
    assert not trace.exists()


def test_a_run_of_such_a_module_is_resumed_as_the_trainer_is_told_to_load(tmp_path):
    path, pruning = tmp_path / "saved.ckpt", {"best_per_depth": True, "distill": True}
    whole = outcome(*run(tmp_path / "whole", model=with_settings(), pruning=pruning))
    run(tmp_path, At("on_validation_start", 2, None, saved(path)), model=with_settings(), pruning=pruning)
    resumed = run(tmp_path, model=with_settings(), pruning=pruning, ckpt_path=path, weights_only=False)
    assert_equal_states(outcome(*resumed), whole)
    assert sorted(resumed[1].best_checkpoints) == [0, 1, 2]
    with torch.serialization.safe_globals([Settings]):
        resumed = run(tmp_path, model=with_settings(), pruning=pruning, ckpt_path=path)
    assert_equal_states(outcome(*resumed), whole)


class Named(dict):
    """A dict of another class, which the safe reader does not fill, though it is allowed."""


@pytest.mark.parametrize(
    "settings", [Named(a=1), deque([1]), defaultdict(list, a=[1])], ids=["dict", "deque", "default"]
)
def test_a_run_goes_back_to_a_file_with_what_is_allowed_and_can_not_be_built(tmp_path, settings):
    seed_everything(3, verbose=False)
    with torch.serialization.safe_globals([type(settings), list]), pytest.warns(UserWarning, match="holds more than"):
        callback = run(tmp_path, model=WithSettings(settings=settings))[1]
    assert [this.accepted for this in callback.rounds] == [True, True, False]


def test_a_file_with_a_hole_fails_as_one_that_can_not_be_written(tmp_path):
    path = tmp_path / "round_0.ckpt"
    torch.save({"weights": torch.randn(100), "numbers": list(range(30))}, path)
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=TorchCheckpointIO()))
    assert _digest_if_unsafe(trainer, path) is None
    whole, failed = path.read_bytes(), 0
    for place in range(0, len(whole) - 100, 20):
        path.write_bytes(whole[:place] + bytes(100) + whole[place + 100 :])
        try:
            _digest_if_unsafe(trainer, path)
        except (OSError, RuntimeError):  # what all processes are told of
            failed += 1
    assert failed


def sharding_trainer():
    return SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))


@pytest.fixture
def folder(tmp_path):
    """What a strategy that shards the weights has written."""
    model = linearize(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["1"])
    path = tmp_path / "round_0.ckpt"
    state = {"state_dict": model.state_dict(), "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.99)}}
    save_folder(state, checkpoint_id=path, no_dist=True)
    torch.save({"callbacks": {KEY: {"rounds": []}}}, path / "meta.pt")
    return path


def test_a_folder_of_shards_is_read(folder):
    path, checkpoint = RunFiles().find(sharding_trainer(), folder, KEY, [])
    assert checkpoint["callbacks"] == {KEY: {"rounds": []}}
    assert [key.split(".")[0] for key in read_marks_of(path)] == ["1"]


@pytest.mark.parametrize("part", ["meta.pt", ".metadata", "a value"])
def test_a_folder_of_shards_that_was_replaced_runs_nothing(folder, tmp_path, part):
    trace = tmp_path / "trace"
    if part == "meta.pt":
        torch.save({"callbacks": Trap(trace)}, folder / part)
    elif part == ".metadata":
        (folder / part).write_bytes(pickle.dumps(Trap(trace)))
    else:
        save_folder({"optimizer_0": {"lr": Trap(trace)}}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(ValueError, match=r"round_0\.ckpt can't be read safely"):
        RunFiles().find(sharding_trainer(), folder, KEY, [])
    if part != "meta.pt":
        with pytest.raises(ValueError, match=r"round_0\.ckpt can't be read safely"):
            read_marks_of(folder)
    assert not trace.exists()


def test_an_index_that_names_a_file_elsewhere_is_refused(folder):
    index = FileSystemReader(folder).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = "../" + place.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"round_0\.ckpt can't be read safely"):
        read_marks_of(folder)
