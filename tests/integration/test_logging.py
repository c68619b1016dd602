"""What a run shows in TensorBoard, in CSV files, and without a logger."""

import csv
import logging
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_easier import (
    EntropyGuidedPruningCallback,
    Files,
    Measuring,
    OptimalTransportCallback,
    RemoveBlocks,
    Rounds,
    Target,
    collapse,
)
from lightning_easier.report import figures, log_report
from lightning_easier.report.figures import plot_entropies, read_entropies
from tests.integration.residual import Net
from tests.integration.tiny import NAMES, Tiny, pruning, train


class Recorded:
    """Stands in for the object that a logger talks to: keeps what it was asked for, name by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class Wandb(WandbLogger):
    """The logger itself, with another experiment: nothing is sent, and the package need not be there."""

    def __init__(self, root):
        Logger.__init__(self)
        self.recorded, self._prefix, self._save_dir, self._id = Recorded(), "", str(root), None

    @property
    def experiment(self):
        return self.recorded

    @property
    def name(self):
        return "wandb"

    def log_hyperparams(self, params): ...

    def log_metrics(self, metrics, step=None):
        self.recorded.log(dict(metrics), step)

    def finalize(self, status): ...

    def after_save_checkpoint(self, checkpoint_callback): ...


class MLFlow(MLFlowLogger):
    def __init__(self):
        Logger.__init__(self)
        self.recorded = Recorded()

    @property
    def experiment(self):
        return self.recorded

    @property
    def run_id(self):
        return "a-run"

    @property
    def name(self):
        return "mlflow"

    @property
    def save_dir(self):
        return None

    def log_hyperparams(self, params): ...

    def log_metrics(self, metrics, step=None):
        self.recorded.log(dict(metrics), step)

    def finalize(self, status): ...

    def after_save_checkpoint(self, checkpoint_callback): ...


@pytest.fixture(scope="module", autouse=True)
def wandb():
    """What the logger asks of the package."""
    patched = pytest.MonkeyPatch()
    fake = SimpleNamespace(Image=lambda image: image, Table=lambda columns, data, dataframe=None: (columns, data))
    patched.setitem(sys.modules, "wandb", fake)
    yield
    patched.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    callback = pruning(monitor="scripted", tolerance=0.05)
    model = Tiny(scores=(0.9, 0.88, 0.87, 0.5))
    loggers = [TensorBoardLogger(root, "tb", ""), CSVLogger(root, "csv", ""), Wandb(root), MLFlow()]
    train(model, callback, root=root, epochs=9, logger=loggers)
    return root, callback, loggers


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def charts(events):
    """Return the charts of the one layout: title -> regular expressions of tags."""
    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


@pytest.fixture(scope="module")
def events(run):
    return read(run[0] / "tb")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The events of a run that prunes weights; the dense round, and two more that are kept."""
    root = tmp_path_factory.mktemp("sparse")
    callback = EntropyGuidedPruningCallback("val_acc", tolerance=1.0, rounds=Rounds(epochs=2), files=Files(root))
    train(Tiny(), callback, root=root, epochs=6, logger=TensorBoardLogger(root, "tb", ""))
    assert [this.chosen for this in callback.rounds[:3]] == [[], ["weights"], ["weights"]]
    return read(root / "tb")


def test_every_activation_has_a_curve_that_ends_with_its_removal(run, events):
    callback = run[1]
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("entropy/")} == {f"entropy/{n}" for n in NAMES}
    for this in callback.rounds[1:]:
        (name,) = this.removed
        curve = events.Scalars(f"entropy/{name}")
        assert len(curve) == this.epoch  # one point a dense epoch
        assert curve[-1].value == pytest.approx(this.entropies[name], rel=1e-6)
        assert all(0 <= point.value <= 1 for point in curve)


def test_the_number_removed_and_the_score_against_it(events):
    assert [point.value for point in events.Scalars("removed")] == [0, 1, 2, 3, 2]  # the last was taken back
    curve = events.Scalars("score_by_removed/scripted")
    assert [(point.step, pytest.approx(point.value)) for point in curve] == [(0, 0.9), (1, 0.88), (2, 0.87), (3, 0.5)]


def test_one_layout_shows_all_curves_in_one_chart(events):
    assert charts(events) == {
        "Entropy of every activation [bit]": ["^entropy/.*$"],
        "Number removed": ["^removed$"],
        "Activations left": ["^remaining$"],
        "scripted against the number removed": ["^score_by_removed/.*$"],
    }


def test_a_run_that_prunes_weights_has_charts_of_zeros_and_of_emptied_layers_besides(events, sparse):
    """Each regular expression finds the tags that are logged and no others; runs of other methods have none of it."""
    found = charts(sparse)
    assert list(found) == [
        "Entropy of every activation [bit]", "Zeros among the weights", "Layers emptied", "Number removed",
        "Activations left", "val_acc against the number removed",
    ]  # fmt: skip
    tags = sparse.Tags()["scalars"]
    shown = {title: {tag for tag in tags if re.search(pattern, tag)} for title, (pattern,) in found.items()}
    weights = {f"weight_sparsity/{name}" for name, value in Tiny().named_parameters() if value.ndim > 1}
    assert shown["Entropy of every activation [bit]"] == {f"entropy/{name}" for name in NAMES}
    assert shown["Zeros among the weights"] == {"sparsity", *weights}
    assert shown["Layers emptied"] == {"emptied"}
    assert not any(tag.startswith(("sparsity", "weight_sparsity", "emptied")) for tag in events.Tags()["scalars"])


class Elsewhere(Net):
    """Logs a distance of its own."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val/distance/mean", 1.0)
        self.log("other_transport_loss", 1.0)


def test_a_run_that_takes_blocks_out_has_charts_of_distances_and_of_the_loss_besides(tmp_path):
    callback = OptimalTransportCallback("score", weight=1.0, files=Files(tmp_path / "rounds"))
    samples = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
    data = LightningDataModule.from_datasets(samples, samples, batch_size=4)
    train(Elsewhere(), callback, root=tmp_path, epochs=1, data=data, logger=TensorBoardLogger(tmp_path, "tb", ""),
          log_every_n_steps=1)  # fmt: skip
    events = read(tmp_path / "tb")
    found, tags = charts(events), events.Tags()["scalars"]
    shown = {title: {tag for tag in tags if re.search(pattern, tag)} for title, (pattern,) in found.items()}
    assert shown["Distance of blocks"] == {f"distance/blocks.{place}" for place in range(3)}
    assert shown["Distance in the loss of training steps"] == {"transport_loss"}
    assert shown["Number removed"] == {"removed"}
    # no chart without a curve
    assert [*RemoveBlocks(weight=0.0).charts] == ["Distance of blocks"]


@pytest.mark.parametrize("method", ["identities", "fitted", "sparse", "blocks"])
def test_no_name_that_is_logged_is_a_folder_of_another(method, tmp_path):
    """MLflow's folders keep each value in a file of its name, and take letters, digits and ``_-./ :`` alone."""
    model, data, files = Tiny(), None, Files(tmp_path / "rounds")
    if method == "sparse":
        callback = EntropyGuidedPruningCallback("val_acc", tolerance=1.0, rounds=Rounds(epochs=1), files=files)
    elif method == "blocks":
        callback, model = OptimalTransportCallback("score", weight=1.0, files=files), Net()
        samples = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
        data = LightningDataModule.from_datasets(samples, samples, batch_size=4)
    else:
        callback = pruning(fit=method == "fitted", measuring=Measuring(costs=True), files=files)
    train(model, callback, root=tmp_path, epochs=3, data=data, logger=CSVLogger(tmp_path, "csv", ""),
          log_every_n_steps=1)  # fmt: skip
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        tags = csv.DictReader(file).fieldnames
    assert {"entropy/act1"} <= set(tags) if method != "blocks" else {"distance/blocks.0"} <= set(tags)
    folders = {"/".join(tag.split("/")[:place]) for tag in tags for place in range(1, tag.count("/") + 1)}
    assert not folders & set(tags)
    assert all(re.fullmatch(r"[\w\-./ :]+", tag) for tag in tags)


def test_zeros_have_a_curve_that_rises_with_every_round(sparse):
    curve = [point.value for point in sparse.Scalars("sparsity")]
    assert len(curve) == 6  # one point an epoch
    rounds = [curve[place : place + 2] for place in (0, 2, 4)]
    assert all(first == last for first, last in rounds)
    assert rounds[0] == [0.0, 0.0]
    assert all(before[1] < after[0] < 1 for before, after in pairwise(rounds))
    assert [point.value for point in sparse.Scalars("weight_sparsity/fc4.weight")] == [0.0] * 6  # the head


def test_each_round_is_a_readable_event(run, events):
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("pruning/events/text_summary")]
    assert len(texts) == len(run[1].rounds) == 4
    assert "(dense)" in texts[0]
    for text, this in zip(texts[1:], run[1].rounds[1:], strict=True):
        assert this.removed[0] in text
        assert f"{this.entropies[this.removed[0]]:.4f}" in text
        assert "| 0.9000 (dense) |" in text
    assert "kept" in texts[2]
    assert "taken back" in texts[3]


def test_a_csv_file_has_score_and_number_removed_side_by_side(run):
    with (run[0] / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["scripted"]]
    assert [(float(row["removed"]), float(row["scripted"])) for row in rows] == [
        (0, pytest.approx(0.9)), (1, pytest.approx(0.88)), (2, pytest.approx(0.87)), (3, pytest.approx(0.5)),
    ]  # fmt: skip
    assert set(rows[0]) >= {f"entropy/{name}" for name in NAMES}


def test_the_figure_is_drawn_from_the_logs(run, tmp_path):
    curves = read_entropies(run[0] / "tb")
    assert sorted(curves) == sorted(NAMES)
    plot_entropies(run[0] / "tb", tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="to hold a run that has logged entropies"):
        read_entropies(tmp_path)


def test_works_with_no_logger(tmp_path):
    callback = pruning()
    train(Tiny(), callback, root=tmp_path, logger=False)
    assert len(callback.removed) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["entropy_pruning"]


def test_the_curves_of_a_run_that_was_taken_up_are_one(tmp_path):
    for begin, values in ((0, (0.1, 0.2, 0.3)), (2, (0.4, 0.5))):
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in enumerate(values, begin):
                writer.add_scalar("entropy/act", value, step)
    ((name, (steps, found)),) = read_entropies(tmp_path).items()
    assert (name, steps) == ("act", [0, 1, 2, 3])
    assert found == pytest.approx([0.1, 0.2, 0.4, 0.5])


PICTURES = {"pruning/entropies", "pruning/heat_map", "pruning/score_by_removed"}


def test_tensorboard_has_a_picture_of_every_round_and_the_table_of_all(run, events):
    rounds = run[1].rounds
    tags = events.Tags()
    assert set(tags["images"]) == PICTURES
    assert all(len(events.Images(tag)) == len(rounds) for tag in PICTURES)
    first, last = events.Images("pruning/heat_map")[:: len(rounds) - 1]
    assert last.encoded_image_string != first.encoded_image_string
    table = events.Tensors("pruning/rounds/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table == run[1].report().to_markdown()


def test_every_logger_gets_the_same_values_texts_and_pictures_under_the_same_names(run, events):
    root, callback, (_, _, wandb, mlflow) = run
    report = callback.report().to_markdown()
    scalars = set(events.Tags()["scalars"])
    with (root / "csv" / "metrics.csv").open() as file:
        assert set(csv.DictReader(file).fieldnames) - {"step"} >= scalars - {"epoch", "hp_metric"}
    for logger in (wandb, mlflow):
        logged = [args for name, args, _ in logger.recorded.calls if name == "log"]
        assert {key for metrics, _ in logged for key in metrics} >= scalars - {"hp_metric"}
        by_removed = [(step, metrics[key]) for metrics, step in logged for key in metrics if key.startswith("score_by")]
        assert by_removed == [(0, pytest.approx(0.9)), (1, pytest.approx(0.88)), (2, pytest.approx(0.87)), (3, 0.5)]
    media = {key: value for name, args, _ in wandb.recorded.calls for key, value in args[0].items() if name == "log"}
    assert all(media[tag][0].ndim == 3 and media[tag][0].shape[-1] == 3 for tag in PICTURES)
    columns, ((_, text),) = media["pruning/rounds"]
    assert (columns, text) == (["step", "text"], report)
    drawn = {args[2] for name, args, _ in mlflow.recorded.calls if name == "log_figure"}
    written = {args[2]: args[1] for name, args, _ in mlflow.recorded.calls if name == "log_text"}
    assert drawn == {f"{tag}.png" for tag in PICTURES}
    assert written["pruning/rounds.md"] == (root / "csv" / "pruning" / "rounds.md").read_text() == report
    assert all((root / "csv" / f"{tag}.png").read_bytes().startswith(b"\x89PNG") for tag in PICTURES)


def test_a_checkpoint_is_enough_for_the_figure(run):
    checkpoint = torch.load(run[1].last_good, weights_only=True)
    again = pruning(monitor="scripted", tolerance=0.05)
    again.load_state_dict(next(state for key, state in checkpoint["callbacks"].items() if "Pruning" in key))
    axes = again.figure().axes
    assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == NAMES
    assert [each.measured.keys() for each in again.rounds] == [each.measured.keys() for each in run[1].rounds[:3]]
    assert run[1].rounds[0].measured[0].keys() == set(NAMES)


def test_activations_left_fall_with_every_removal(events):
    assert [point.value for point in events.Scalars("remaining")] == [4, 3, 2, 1]


@pytest.mark.parametrize("options", [{"target": Target(depth=1)}, {"measuring": Measuring(costs=True)}], ids=str)
def test_a_run_that_prices_its_rounds_shows_depth_and_score_against_latency_and_what_merged(options, tmp_path):
    callback = pruning(**options)
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    train(Tiny(), callback, root=tmp_path, epochs=3, logger=loggers)
    events = read(tmp_path / "tb")
    (_, *later) = callback.rounds
    assert [point.value for point in events.Scalars("depth")] == [this.costs["depth"] for this in later]
    by_latency = [(point.step, point.value) for point in events.Scalars("score_by_latency/val_acc")]
    dense = (round(later[0].costs["dense_latency"] * 1e6), pytest.approx(callback.rounds[0].score_after))
    assert by_latency[0] == dense
    assert by_latency[1:] == [(round(this.costs["latency"] * 1e6), pytest.approx(this.score_after)) for this in later]
    assert set(events.Tags()["images"]) == PICTURES | {"pruning/score_by_latency", "collapse/operators"}
    assert "Merged" in (tmp_path / "csv" / "collapse" / "report.md").read_text()
    found, tags = charts(events), events.Tags()["scalars"]
    assert all(any(re.search(pattern, tag) for tag in tags) for (pattern,) in found.values())


def test_a_report_is_logged_beside_the_run(tmp_path):
    report = collapse(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.randn(2, 4)).report
    logger = CSVLogger(tmp_path, "csv", "")
    log_report([logger], "shipped", report, 3)
    assert (tmp_path / "csv" / "shipped" / "report.md").read_text() == report.to_markdown()
    assert (tmp_path / "csv" / "shipped" / "operators.png").is_file()
    with pytest.raises(ValueError, match="`name` to be what the report is called in the loggers, but got ''"):
        log_report([logger], "", report)


def test_without_matplotlib_loggers_get_texts_and_a_word_on_the_rest(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    report = collapse(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4)).report
    with caplog.at_level(logging.INFO, "lightning.fabric.utilities.rank_zero"):
        log_report([CSVLogger(tmp_path, "csv", "")], "shipped", report)
    assert "pip install 'lightning-easier[figures]'" in caplog.text
    assert [path.name for path in (tmp_path / "csv" / "shipped").iterdir()] == ["report.md"]
