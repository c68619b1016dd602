"""How much is done, counted, as models and runs grow: nothing grows with the square of their size."""

import math
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_easier import collapse, fit_chains, isolate_activations, linearize, measure_affines
from lightning_easier.callbacks import private, wiring
from lightning_easier.callbacks.scores import LoggedScores
from lightning_easier.collapsing.exact import commuting, torch_export
from lightning_easier.collapsing.exact.capture import capture
from lightning_easier.pruning.state import RunState
from lightning_easier.sites.discovery import Discovery, KnownForwards
from lightning_easier.sites.rectifiers import GATES
from lightning_easier.structure.linearize import restructure_as_marked, stand_ins
from lightning_easier.structure.substitution import Absorbed
from tests.settings import callback as callback_of

TRACERS = [("tracing", "_read"), ("discovery", "trace_forward")]


def counted(monkeypatch: pytest.MonkeyPatch, *functions: tuple[str, str]) -> Counter[str]:
    """Count the calls of functions of the package, each by the room that calls it and its name there."""
    counts: Counter[str] = Counter()
    for room, name in functions:
        module = import_module(f"lightning_easier.sites.{room}")
        original = getattr(module, name)

        def count(*args, original=original, name=name, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, count)
    return counts


def mlp(depth: int, width: int = 6) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def linear_mlp(depth: int, kind: str) -> nn.Sequential:
    model = mlp(depth).eval()
    batches = [torch.randn(64, 6)]
    sites = list(isolate_activations(model))
    if kind == "fitted":
        for site in sites:
            linearize(model, [site], stand_in="fitted", statistics=fit_chains(model, batches))
        return model
    statistics = measure_affines(model, batches) if kind == "affine" else None
    return linearize(model, sites, stand_in=kind, statistics=statistics)


@pytest.mark.parametrize("kind", ["identity", "affine", "fitted"])
def test_a_look_at_a_model_traces_no_stand_in_again(monkeypatch, kind):
    model = linear_mlp(4, kind)
    isolate_activations(model, gates=True)
    counts = counted(monkeypatch, *TRACERS)
    for gates in (False, True):
        isolate_activations(model, gates=gates)
    assert not counts


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class PerRound(Callback):
    """Notes what was counted in each epoch, in all and of each function."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts, self.rounds, self.told = counts, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rounds.append(sum(self.counts.values()))
        self.told.append(dict(self.counts))
        self.counts.clear()


def prune(root: Path, *callbacks: Callback, **options) -> None:
    """Remove all six activations of a classifier, one each epoch; the other callbacks come after that which does it."""
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,))), batch_size=16)
    pruning = callback_of("val_acc", tolerance=2.0, dirpath=str(root / "rounds"), **options)
    trainer = Trainer(
        max_epochs=7, callbacks=[pruning, *callbacks], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Classifier(), data, data)
    assert len(pruning.removed) == 6


@pytest.mark.parametrize("options", [{}, {"fit": True, "gain": "macs"}, {"stand_in": "affine"}], ids=str)
def test_a_round_does_no_more_than_the_one_before(monkeypatch, tmp_path, options):
    for kind in ("identity", "affine", "fitted"):  # a class of stand-ins is traced once in a process: before it counts
        isolate_activations(linear_mlp(1, kind))
    counts = counted(monkeypatch, *TRACERS, ("discovery", "activation_kind"))
    rounds = PerRound(counts)
    prune(tmp_path, rounds, **options)
    _, _, third, *_, last = rounds.rounds
    assert last <= third, rounds.told


def noted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list:
    """Have the objects noted that a method is called of."""
    objects, original = [], getattr(owner, name)

    def note(self, *args, **kwargs):
        objects.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, note)
    return objects


class InEpochs(Callback):
    """Notes what was called in each epoch."""

    def __init__(self, calls: list) -> None:
        self.calls, self.epochs = calls, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append([*self.calls])
        self.calls.clear()


def test_an_epoch_makes_no_metric_when_all_that_is_logged_was_logged_before(monkeypatch, tmp_path):
    epochs = InEpochs(noted(monkeypatch, Metric, "__init__"))
    prune(tmp_path, epochs)
    first, *others = epochs.epochs
    assert first
    assert others == [[]] * 6


def test_what_a_callback_logs_again_is_not_moved_and_what_a_user_does_is(monkeypatch, tmp_path):
    epochs = InEpochs(noted(monkeypatch, _ResultMetric, "to"))
    prune(tmp_path, epochs)
    first, *others = [[result.meta.name for result in moved] for moved in epochs.epochs]
    assert {"val_acc", "removed", "H_min", "entropy/net.1"} <= {*first}
    assert others == [["val_acc", "val_acc"]] * 6


def test_a_checkpoint_is_described_once_and_nothing_is_built_of_what_was_written(monkeypatch, tmp_path):
    described = noted(monkeypatch, RunState, "to_plain")
    saved = noted(monkeypatch, Trainer, "save_checkpoint")
    load, loaded = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: loaded.append(path) or load(path, **kwargs))
    prune(tmp_path)
    assert len(described) == len(saved) == 7
    assert not loaded


def test_a_run_traces_no_more_to_begin_than_one_look_at_its_model(monkeypatch, tmp_path):
    counts = counted(monkeypatch, *TRACERS)
    isolate_activations(Classifier())
    one_look, begun = dict(counts), {}
    counts.clear()

    class Begins(Callback):
        def setup(self, trainer, pl_module, stage):
            begun.update(counts)

    prune(tmp_path, Begins())
    assert begun == one_look != {}


def test_a_class_is_looked_at_once_for_what_is_compiled_however_many_modules_are_of_it(monkeypatch):
    looked, original = [], private.is_compiled_function
    monkeypatch.setattr(private, "is_compiled_function", lambda value: looked.append(value) or original(value))
    numbers = []
    for depth in (1, 20):
        assert not wiring.is_compiled(mlp(depth))
        numbers.append(len(looked))
        looked.clear()
    assert numbers[0] == numbers[1] > 0


def test_scores_are_read_once_to_forget_them_all():
    class Asked:
        scores, reads = {str(number): torch.tensor(0.0) for number in range(9)}, 0

        @property
        def callback_metrics(self):
            self.reads += 1
            return self.scores

    trainer, logged = Asked(), LoggedScores()
    logged.forget(trainer)
    assert trainer.reads == 1
    assert [logged.get(trainer, name) for name in trainer.scores] == [None] * 9


class Block(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.scale * self.down(self.act(self.up(self.norm(x)))) * torch.softmax(x, -1)


class Stack(nn.Module):
    def __init__(self, depth: int, scales: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, scales[number % len(scales)]) for number in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


def described(plan) -> list:
    flow = [(node.kind, node.name, [each.name for each in node.inputs], node.axis) for node in plan.flow.nodes]
    sites = [(site.name, site.neuron_dim, site.neighbourhood.reason, len(site.neighbourhood.meetings))
             for site in plan.sites]  # fmt: skip
    return [flow, sites, plan.left_alone, [type(edit).__name__ for edit in plan.edits]]


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.0)])
def test_forwards_that_are_alike_are_traced_once(monkeypatch, scales):
    counts = counted(monkeypatch, *TRACERS)

    def traced(depth: int) -> int:
        counts.clear()
        assert len(isolate_activations(Stack(depth, scales))) == 2 * depth
        return sum(counts.values())

    assert traced(8) == traced(4)


def test_what_makes_activations_linear_looks_at_the_model_once(monkeypatch):
    counts = counted(monkeypatch, *TRACERS)
    isolate_activations(Stack(3))
    isolated = dict(counts)
    counts.clear()
    model = linearize(Stack(3), ["blocks.1.act", "relu_1"])
    assert dict(counts) == isolated
    assert {*stand_ins(model)} == {"blocks.1.act", "relu_1"}

    counts.clear()
    restructure_as_marked(other := Stack(3), model.state_dict())
    assert {*stand_ins(other)} == {*stand_ins(model)}
    assert sum(counts.values()) <= 2 * sum(isolated.values())


@pytest.mark.parametrize("is_isolated", [False, True])
def test_what_is_known_of_forwards_is_what_would_be_found(monkeypatch, is_isolated):
    model, gates, known = Stack(5, (1.0, 2.0, 3.0, 4.0, 5.0)).eval(), frozenset(GATES), KnownForwards()
    if is_isolated:
        isolate_activations(model)
    first = described(Discovery(gates, known).plan(model))
    assert first == described(Discovery(gates).plan(model))
    counts = counted(monkeypatch, *TRACERS)
    assert described(Discovery(gates, known).plan(model)) == first
    assert not counts

    model.blocks[1].act, model.blocks[1].down = Absorbed(), nn.Linear(8, 4)
    again = described(Discovery(gates, known).plan(model))
    of_one_block = sum(counts.values())
    assert again != first
    assert again == described(Discovery(gates).plan(model))
    assert of_one_block < (sum(counts.values()) - of_one_block) / 2

    model.train()
    assert described(Discovery(gates, known).plan(model)) == described(Discovery(gates).plan(model))


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


def test_operators_pass_the_layouts_before_them_at_once(monkeypatch):
    """One by one, each operator would pass all layouts that those before it have left behind."""
    counts: Counter[str] = Counter()
    for name in ("_swapped", "_moved", "shape_of", "channel_axis", "is_pointwise"):
        original = getattr(commuting, name)

        def count(*args, original=original, name=name):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(commuting, name, count)

    def steps(pairs: int) -> int:
        layers = [
            layer
            for _ in range(pairs)
            for layer in (nn.Conv2d(4, 4, 1), Permute(0, 2, 3, 1), nn.Linear(4, 4), Permute(0, 3, 1, 2))
        ]
        counts.clear()
        result = collapse(nn.Sequential(*layers).eval(), torch.randn(2, 4, 3, 5), objective="macs")
        assert result.report.after.depth == 1
        assert counts["_moved"] == 2 * pairs - 1  # all but the first
        return sum(counts.values())

    assert steps(12) <= 2 * steps(6)


class RoundsUp(nn.Module):
    """Makes whole patches of its maps again and again, as MobileViT does: sizes are roundings of roundings."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(depth))

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
            n, c, height, width = x.shape
            rows, columns = math.ceil(height / 2), math.ceil(width / 2)
            if (height, width) != (2 * rows, 2 * columns):
                x = nn.functional.interpolate(x, (2 * rows, 2 * columns))
            x = x.reshape(n, c, rows, 2, columns, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c, 4, rows * columns)
            x = x.softmax(-1).reshape(n, c, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
            x = x.reshape(n, c, 2 * rows, 2 * columns)
        return x


def test_a_forward_that_rounds_sizes_again_and_again_is_captured_with_fewer_free_axes(monkeypatch):
    """sympy takes minutes for sizes that are such expressions; what a size may cost is told by its length."""
    asked = torch_export.ShapeEnv.evaluate_expr
    model, x = RoundsUp(2).eval(), torch.randn(2, 3, 64, 48)

    whole, samples, *_ = torch_export.attempts((x,))
    assert whole.free == (frozenset(range(4)),)
    assert samples.free == (frozenset({0}),)
    with pytest.raises(RuntimeError, match=r"expression of more than \d+ terms"):
        torch_export.export_layers(model, whole)
    assert torch_export.ShapeEnv.evaluate_expr is asked

    captured = capture(model, (x,))
    more = torch.randn(5, 3, 64, 48)
    torch.testing.assert_close(captured(more), model(more))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[2\] == 64"):
        captured(torch.randn(2, 3, 32, 48))
