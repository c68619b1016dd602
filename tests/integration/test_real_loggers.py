"""Weights & Biases, offline, and MLflow themselves get what TensorBoard gets; where both are installed."""

import json
from collections import defaultdict

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_easier import EntropyGuidedPruningCallback, Files, Measuring, Rounds
from tests.integration.tiny import Tiny, pruning, train

pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")
_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4


def stored_by_mlflow(root, name="run"):
    """A logger with a database, as MLflow asks for, and a folder for files."""
    uri = f"sqlite:///{root / name}.db"
    return MLFlowLogger("pruning", tracking_uri=uri, artifact_location=str(root / f"{name}_artifacts"))


def records(path):
    """Yield the records of W&B's file: a header of seven bytes, then blocks as in a log of LevelDB."""
    data, place, record = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""


def history_of_wandb(root):
    """Return what W&B has in its file: name -> (step, value) of each time, parts of media under `NAME/part`."""
    from wandb.proto import wandb_internal_pb2

    (file,) = root.glob("wandb/offline-run-*/run-*.wandb")
    history = defaultdict(list)
    for raw in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
            for name, value in items.items():
                history[name].append((items.get("trainer/global_step"), value))
    return history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    mlflow = stored_by_mlflow(root)
    callback = pruning(monitor="scripted", tolerance=0.05, measuring=Measuring(costs=True))
    loggers = [TensorBoardLogger(root, "tb", ""), WandbLogger("pruning", root, offline=True), mlflow]
    train(Tiny(scores=(0.9, 0.88, 0.87, 0.5)), callback, root=root, epochs=9, logger=loggers)
    wandb.finish()
    events = EventAccumulator(str(root / "tb"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return root, callback, events, mlflow


def scalars(events):
    """Return name -> (step, value) of each time, of what TensorBoard has and is not its own."""
    tags = set(events.Tags()["scalars"]) - {"hp_metric"}
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags}


def texts(events):
    return {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}


def assert_alike(found, expected):
    assert len(found) == len(expected)
    for (step, value), (their_step, theirs) in zip(sorted(found), sorted(expected), strict=True):
        assert step == their_step
        assert value == pytest.approx(theirs, rel=1e-6, nan_ok=True)


def test_mlflow_has_the_same_values_pictures_and_texts_under_the_same_names(run):
    _, callback, events, mlflow = run
    client = mlflow.experiment
    expected = scalars(events)
    assert expected.keys() == client.get_run(mlflow.run_id).data.metrics.keys()
    for name, values in expected.items():
        assert_alike([(each.step, each.value) for each in client.get_metric_history(mlflow.run_id, name)], values)
    folders = {"pruning", "collapse"}
    assert {each.path for each in client.list_artifacts(mlflow.run_id)} == folders
    files = {each.path for folder in folders for each in client.list_artifacts(mlflow.run_id, folder)}
    assert files == {f"{tag}.png" for tag in events.Tags()["images"]} | {f"{tag}.md" for tag in texts(events)}
    table = client.download_artifacts(mlflow.run_id, "pruning/rounds.md")
    with open(table, encoding="utf-8") as file:
        assert file.read() == callback.report().to_markdown()


def test_wandb_has_the_same_values_pictures_and_texts_under_the_same_names(run):
    root, callback, events, _ = run
    history = history_of_wandb(root)
    for name, values in scalars(events).items():
        assert_alike(history[name], values)
    kinds = {name.removesuffix("/_type"): {kind for _, kind in history[name]} for name in history if "/_type" in name}
    pictures = dict.fromkeys(events.Tags()["images"], frozenset({"images/separated"}))
    assert kinds == pictures | dict.fromkeys(texts(events), frozenset({"table-file"}))
    folder = next(root.glob("wandb/offline-run-*/files"))
    _, path = history["pruning/rounds/path"][-1]
    assert json.loads((folder / path).read_text())["data"][-1][1] == callback.report().to_markdown()


@pytest.mark.parametrize("store", ["database", "folders"])
def test_a_sparsity_beside_those_of_weights_is_kept_by_mlflow(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folders = MLFlowLogger("pruning", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    mlflow = folders if store == "folders" else stored_by_mlflow(tmp_path)
    callback = EntropyGuidedPruningCallback("val_acc", tolerance=1.0, rounds=Rounds(epochs=1), files=Files(tmp_path))
    train(Tiny(), callback, root=tmp_path, epochs=2, logger=mlflow)
    kept = mlflow.experiment.get_run(mlflow.run_id).data.metrics
    assert kept["sparsity"] > 0
    assert {name for name in kept if name.startswith("weight_sparsity/")} == {
        f"weight_sparsity/{name}" for name, value in Tiny().named_parameters() if value.ndim > 1
    }
