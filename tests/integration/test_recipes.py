"""The user's own recipe stays in force: schedules, optimizers, loops, checkpoints, precision."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_easier import Linearize, load_pruned
from lightning_easier.callbacks import wiring
from lightning_easier.structure.linearize import stand_ins
from tests.integration.interrupted import BATCHES, At, Small, run
from tests.integration.tiny import assert_equal_states
from tests.settings import callback as callback_of


class Rates(Callback):
    """Notes the learning rate and the steps that the moments have seen, at the first batch of every epoch."""

    def __init__(self):
        self.rates, self.steps = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            (group,) = trainer.optimizers[0].param_groups
            self.rates.append(group["lr"])
            self.steps.append({int(state["step"]) for state in trainer.optimizers[0].state.values()})


@pytest.mark.parametrize(
    ("restart", "rates", "steps"),
    [
        ("none", [0.02, 0.02, 0.01, 0.01, 0.005], [1, 4, 7, 10, 13]),
        ("schedule", [0.02, 0.02, 0.02, 0.02, 0.02], [1, 4, 7, 10, 13]),
        ("optimizer", [0.02, 0.02, 0.02, 0.02, 0.02], [1, 4, 1, 4, 1]),
    ],
)
def test_what_begins_anew_with_a_removal(tmp_path, restart, rates, steps):
    noted = Rates()
    _, callback, _ = run(tmp_path, noted, pruning={"restart": restart, "epochs": 2}, epochs=5)
    assert [this.epoch for this in callback.rounds] == [0, 2, 4]
    assert noted.rates == pytest.approx(rates)
    assert noted.steps == [{step} for step in steps]


def schedules(optimizer):
    lr = torch.optim.lr_scheduler
    return [
        lr.OneCycleLR(optimizer, 0.1, total_steps=2 * BATCHES),
        lr.SequentialLR(optimizer, [lr.LinearLR(optimizer), lr.CosineAnnealingLR(optimizer, 4)], [2]),
        lr.ChainedScheduler([lr.StepLR(optimizer, 1), lr.ExponentialLR(optimizer, 0.9)]),
        lr.LambdaLR(optimizer, lambda step: 0.5**step),
        lr.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=True),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_kind_of_schedule_runs_through_in_every_round(tmp_path, number):
    class Scheduled(Small):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
            return [optimizer], [{"scheduler": schedules(optimizer)[number], "interval": "step"}]

    class EveryBatch(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (group,) = trainer.optimizers[0].param_groups
            self.rates.append((trainer.current_epoch, group["lr"], group["momentum"]))

    noted = EveryBatch()
    pruning = {"restart": "optimizer", "epochs": 2}
    run(tmp_path, noted, pruning=pruning, epochs=6, model=Scheduled())
    rounds = [[rate[1:] for rate in noted.rates if rate[0] // 2 == number] for number in range(3)]
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({rate for rate, _ in rounds[0]}) > 1


def test_the_next_candidate_is_tried_from_the_last_good_model(tmp_path):
    states = {}

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states[trainer.current_epoch] = copy.deepcopy(dict(pl_module.state_dict()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                states[f"start of {trainer.current_epoch}"] = copy.deepcopy(dict(pl_module.state_dict()))

    scores = (0.9, 0.9, 0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 0.9)
    _, callback, trainer = run(tmp_path, Keep(), scores=scores, pruning={"max_rejections": 3}, epochs=20)
    assert [this.accepted for this in callback.rounds] == [True, True, False, False, True, False]
    tried = [this.removed[0] for this in callback.rounds[1:]]
    assert len(set(tried)) == 5  # nothing is tried twice
    assert trainer.current_epoch == 6  # and nothing is left
    entropies = [this.entropies[this.removed[0]] for this in callback.rounds[2:5]]
    assert entropies == sorted(entropies)
    for epoch in (3, 4):
        begun = {key: value for key, value in states[f"start of {epoch}"].items() if "_extra_state" not in key}
        assert all(torch.equal(value, states[1][key]) for key, value in begun.items())
    assert callback.removed == [tried[0], tried[3]]


def test_rejections_in_a_row_have_a_bound(tmp_path):
    pruning = {"max_rejections": 2}
    model, callback, trainer = run(tmp_path, scores=(0.9, 0.1, 0.1, 0.9), pruning=pruning, epochs=20)
    assert [this.accepted for this in callback.rounds] == [True, False, False]
    assert trainer.current_epoch == 3
    assert stand_ins(model) == {}


def test_scores_of_another_structure_are_nan_until_they_are_logged_again(tmp_path):
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            metrics = trainer.callback_metrics
            seen.append((len(stand_ins(pl_module)), metrics.get("removed"), metrics.get("score")))

    scores = (0.9, 0.8, 0.1)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}-{removed:.0f}-{score:.2f}", "score", mode="max", save_top_k=-1,
                            every_n_train_steps=2, save_last=False)  # fmt: skip
    _, _, trainer = run(tmp_path, See(), saver, scores=scores, epochs=5, pruning={"epochs": 2})
    for linear, removed, score in seen[BATCHES:]:
        assert removed.item() == linear
        expected = {0: scores[0], 1: math.nan}[linear] if not score.isnan() else math.nan
        assert score.item() == pytest.approx(expected, nan_ok=True) or linear == 1
    first_of_round = seen[2 * BATCHES]
    assert first_of_round[0] == 1
    assert first_of_round[2].isnan()
    assert trainer.callback_metrics["score"].item() == pytest.approx(0.8)  # that of the model that came back
    assert trainer.callback_metrics["removed"].item() == 0
    for file in (tmp_path / "saved").glob("*.ckpt"):
        _, removed, score = (part.split("=")[1] for part in file.stem.split("-"))
        marks = [key for key in torch.load(file, weights_only=True)["state_dict"] if "_extra_state" in key]
        assert len(marks) == int(removed)
        assert score in {0: ("0.90", "0.80"), 1: ("nan", "0.10")}[int(removed)]


def test_the_best_checkpoint_for_each_depth_is_kept(tmp_path):
    scores = (0.6, 0.9, 0.7, 0.8, 0.85, 0.5, 0.1, 0.2)
    pruning = {"epochs": 2, "tolerance": 0.45, "best_per_depth": True}
    _, callback, _ = run(tmp_path, scores=scores, pruning=pruning, epochs=20)
    best = callback.best_checkpoints
    assert {removed: path.name for removed, path in best.items()} == {
        number: f"best_removed_{number}.ckpt" for number in range(4)
    }
    epochs = {removed: torch.load(path, weights_only=True)["epoch"] for removed, path in best.items()}
    assert epochs == {0: 1, 1: 3, 2: 4, 3: 7}
    for removed, path in best.items():
        assert len(stand_ins(load_pruned(Small(), path) if removed else Small())) == removed
    resumed = run(tmp_path, scores=scores, pruning=pruning, epochs=20, ckpt_path=best[1])
    assert resumed[1].report() == callback.report()


def test_a_best_checkpoint_that_was_written_over_since_is_not_taken_for_this_runs(tmp_path):
    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")

    scores = (0.6, 0.7, 0.9)
    options = {"pruning": {"epochs": 3, "best_per_depth": True}, "epochs": 3}
    run(tmp_path, At("on_train_epoch_end", 1, None, save), scores=scores, **options)
    # Taken up again where the best had 0.7: the file holds the model of 0.9 by now.
    _, callback, _ = run(tmp_path, scores=(0.6, 0.7, 0.65), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert torch.load(callback.best_checkpoints[0], weights_only=True)["epoch"] == 2
    assert callback.state_dict()["best"]["0"]["score"] == pytest.approx(0.65)


def test_the_best_checkpoint_by_a_score_of_training(tmp_path):
    noted = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            noted[trainer.current_epoch] = trainer.callback_metrics["train_loss"].item()

    pruning = {"monitor": "train_loss", "mode": "min", "tolerance": 9.0, "best_per_depth": True, "epochs": 3}
    _, callback, _ = run(tmp_path, Note(), pruning=pruning, epochs=6)
    epochs = [torch.load(path, weights_only=True)["epoch"] for path in callback.best_checkpoints.values()]
    assert epochs == [min(range(start, start + 3), key=noted.get) for start in (0, 3)]  # not an epoch late


class ManualPair(Small):
    """Two optimizers, stepped by hand."""

    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        halves = [list(self.layers[:4].parameters()), [*self.norm.parameters(), *self.layers[4:].parameters()]]
        return [torch.optim.Adam(half, 0.01) for half in halves]


class Slope(Linearize):
    """Removes the activation that has a parameter first."""

    def select(self, ranks, count):
        return sorted(ranks, key=lambda name: name != "layers.3")[:count]


class InHalf(Small):
    """Adam's usual ε is zero in half precision, and the first step divides by it."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02, eps=1e-3)


class Holds(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in pl_module.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ManualPair, {}),
        (Small, {"accumulate_grad_batches": 2}),
        (Small, {"gradient_clip_val": 0.1}),
        (Small, {"check_val_every_n_epoch": 2}),
        (Small, {"val_check_interval": 1}),
        (Small, {"check_val_every_n_epoch": None, "val_check_interval": 2}),
        (Small, {"limit_val_batches": 1}),
        (Small, {"reload_dataloaders_every_n_epochs": 1}),
        (Small, {"max_epochs": -1, "max_steps": 5 * BATCHES}),
        (Small, {"precision": "bf16-true"}),
        (Small, {"precision": "bf16-mixed"}),
        (Small, {"precision": "64-true"}),
        (Small, {"precision": "16-mixed"}),
        (InHalf, {"precision": "16-true"}),
    ],
    ids=str,
)
def test_an_activation_with_a_parameter_leaves_and_comes_back(tmp_path, kind, options):
    """The first removal is taken back, whatever the recipe, and the optimizers hold what lives."""
    epochs = 8
    scores = (0.9, 0.9, 0.1, 0.1, 0.9) if options.get("check_val_every_n_epoch") == 2 else (0.9, 0.1, 0.9)
    model, callback, _ = run(tmp_path, Holds(), method=Slope, model=kind(scores), pruning={"max_rejections": 3},
                             epochs=epochs, **options)  # fmt: skip
    assert [this.removed for this in callback.rounds[:2]] == [[], ["layers.3"]]
    assert [this.accepted for this in callback.rounds[:3]] == [True, False, True]
    assert isinstance(model.layers[3], nn.PReLU)


def signs_of(model: nn.Module, precision: str) -> dict[str, list[torch.Tensor]]:
    """Gather the signs of all pre-activations, seen by hooks of the test's own."""
    signs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU | nn.PReLU):
            module.register_forward_pre_hook(
                lambda module, args, name=name: signs.setdefault(name, []).append(args[0].double().sign())
            )
    return signs


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "16-true"])
def test_the_same_signs_are_the_same_entropies_in_every_precision(tmp_path, precision):
    torch.manual_seed(1)
    model, callback = Small(), callback_of("score")
    signs = signs_of(model, precision)
    trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, callbacks=[callback])  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(64, 4), torch.zeros(64, dtype=torch.long)), 16)
    trainer.validate(model, data, verbose=False)
    for name, seen in signs.items():
        states = torch.cat(seen)
        on, off = (states > 0).sum(0).double(), (states < 0).sum(0).double()
        p = on / (on + off)
        entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
        assert callback.entropies[name] == pytest.approx(entropy.mean().item(), rel=1e-12)


def test_learning_rates_are_monitored_as_ever(tmp_path):
    logger = CSVLogger(tmp_path, "logs", "")
    run(tmp_path, LearningRateMonitor(), logger=logger, log_every_n_steps=1, pruning={"restart": "optimizer"})
    assert "lr-Adam" in (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0]


def test_a_run_that_is_too_short_for_a_round_is_an_error_at_its_start(tmp_path):
    rare = {"epochs": 4, "check_val_every_n_epoch": 5}
    for options in ({"epochs": 2}, {"epochs": -1, "max_steps": 3 * BATCHES - 1}, rare):
        with pytest.raises(MisconfigurationException, match="`max_(epochs|steps)` to leave time for a round"):
            run(tmp_path, pruning={"epochs": 2, "warmup_epochs": 1}, **options)


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 9, "max_steps": 2 * BATCHES}])
def test_a_run_that_ends_with_its_dense_round_says_so_at_its_start(tmp_path, options):
    with pytest.warns(UserWarning, match="Nothing will be pruned: the run ends with its dense round"):
        run(tmp_path, pruning={"epochs": 2}, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        run(tmp_path / "dry", pruning={"epochs": 2, "dry_run": True}, **options)
        run(tmp_path / "longer", pruning={"epochs": 2}, epochs=3)


def test_gradients_of_the_rejected_model_are_gone(tmp_path):
    class Accumulates(ManualPair):
        """Keeps its gradients over the end of an epoch; no validation clears them."""

        validation_step = LightningModule.validation_step

        def training_step(self, batch, batch_idx):
            self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def on_train_epoch_start(self):
            self.left_over = [p for p in self.parameters() if p.grad is not None]

    for scores, gone in (((0.9, 0.1, 0.9), True), ((0.9, 0.9, 0.9), False)):
        model = Accumulates(scores)
        run(tmp_path / str(gone), model=model, epochs=3, num_sanity_val_steps=0,
            pruning={"max_rejections": 3, "on": "training"})  # fmt: skip
        assert (model.left_over == []) == gone


def test_the_loss_scale_comes_back(tmp_path):
    """The precision plugin has a state of its own, which belongs to the good model."""

    class Counting(Precision):
        count = 0

        def optimizer_step(self, *args, **kwargs):
            self.count += 1
            return super().optimizer_step(*args, **kwargs)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    plugin = Counting()
    run(tmp_path, scores=(0.9, 0.9, 0.1), plugins=[plugin], epochs=9)
    assert plugin.count == 2 * BATCHES


def test_what_a_module_saves_of_its_own_comes_back(tmp_path):
    class Remembers(Small):
        epochs_trained = 0

        def on_train_epoch_end(self):
            self.epochs_trained += 1

        def on_save_checkpoint(self, checkpoint):
            checkpoint["epochs_trained"] = self.epochs_trained

        def on_load_checkpoint(self, checkpoint):
            self.epochs_trained = checkpoint["epochs_trained"]

    model = Remembers((0.9, 0.9, 0.1))
    run(tmp_path, model=model, epochs=9)
    assert model.epochs_trained == 1  # as it was when the good model was saved


def test_deterministic_runs_are_equal(tmp_path):
    first, second = (dict(run(tmp_path / str(number))[0].state_dict()) for number in range(2))
    assert_equal_states(first, second)


def test_a_weights_only_checkpoint_is_enough(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_weights_only=True, save_top_k=-1)
    model, callback, _ = run(tmp_path, saver, epochs=3)
    path = tmp_path / "saved" / "epoch=2.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    assert_equal_states(dict(load_pruned(Small, path).state_dict()), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="_extra_state"):
        Small.load_from_checkpoint(path)
    fresh = Small()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      callbacks=[callback_of("score")])  # fmt: skip
    trainer.validate(fresh, DataLoader(TensorDataset(torch.randn(4, 4), torch.zeros(4).long())), path, verbose=False)
    assert sorted(stand_ins(fresh)) == sorted(callback.removed)


@pytest.mark.parametrize(
    ("strategy", "message"), [(FSDPStrategy, "Use ModelParallelStrategy"), (DeepSpeedStrategy, "engine keeps")]
)
def test_strategies_that_can_not_exchange_modules_are_refused(strategy, message):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=message):
        wiring.check(trainer, {}, "validation", None)


def test_a_schedule_that_follows_the_score_comes_back_as_the_next_round_found_it(tmp_path):
    class Plateau(Small):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "score"}}

    begun = {}

    class Rate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            begun.setdefault(trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"])

    _, callback, _ = run(tmp_path, Rate(), model=Plateau((0.9, 0.8, 0.1, 0.8)), pruning={"max_rejections": 3}, epochs=4)
    assert [this.accepted for this in callback.rounds] == [True, True, False, True]
    assert begun == pytest.approx({0: 0.1, 1: 0.1, 2: 0.01, 3: 0.01})


def test_early_stopping_neither_takes_an_old_score_for_a_new_one_nor_stops_without_one(tmp_path):
    stopping = EarlyStopping("score", mode="max", patience=9, check_on_train_epoch_end=True, strict=False)
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}-{removed:.0f}-{score:.2f}", save_on_train_epoch_end=True,
                            save_top_k=-1)  # fmt: skip
    _, callback, trainer = run(tmp_path, stopping, saver, scores=(0.5, 0.9, 0.9, 0.8), epochs=5,
                               check_val_every_n_epoch=2)  # fmt: skip
    assert trainer.current_epoch == 5
    names = sorted(path.stem for path in (tmp_path / "saved").glob("epoch=[1-3]*"))
    assert names == ["epoch=1-removed=0-score=0.90", "epoch=2-removed=1-score=nan", "epoch=3-removed=1-score=0.80"]
    assert [(this.score_after, this.accepted) for this in callback.rounds[1:]] == [
        (pytest.approx(0.8), True), (None, False)
    ]  # fmt: skip
    assert stopping.check_finite


def test_early_stopping_still_sees_a_training_that_diverges(tmp_path):
    stopping = EarlyStopping("val_loss", patience=9)

    class Diverges(Small):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", math.nan if self.current_epoch == 3 else 1.0)
            self(batch[0])

    _, _, trainer = run(tmp_path, stopping, model=Diverges(), epochs=9, pruning={"epochs": 3})
    assert trainer.current_epoch == 4


class Head(Small):
    """Has a head that only training calls."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 2), nn.ReLU())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.head(batch[0]).sum()


def test_pruning_is_over_when_only_what_validation_never_calls_is_left(tmp_path):
    _, callback, trainer = run(tmp_path, model=Head(), epochs=9)
    assert len(callback.removed) == 5
    assert trainer.current_epoch == 6


class PartlyCompiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(6, 6), nn.ReLU()

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.relu(self.linear(x))


def test_what_is_compiled_by_a_decorator_is_measured_and_pruned(tmp_path):
    torch._dynamo.reset()
    model = Small()
    model.layers[4], model.layers[5] = PartlyCompiled(), nn.ReLU()
    _, callback, _ = run(tmp_path, model=model, epochs=7)
    assert "layers.4.relu" in callback.removed
    assert len(callback.removed) == 6


@pytest.mark.parametrize("limit", [None, 50])
def test_a_loader_without_a_length(tmp_path, limit):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ((torch.full((4,), float(n)), n % 2) for n in range(12))

    model, callback = Small(), callback_of("score", dirpath=str(tmp_path))
    trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, val_check_interval=2,
                      enable_progress_bar=False, limit_train_batches=limit, callbacks=[callback])  # fmt: skip
    trainer.fit(model, DataLoader(Stream(), 4), DataLoader(Stream(), 4))
    assert len(callback.rounds) == 3


def test_an_epoch_that_the_user_skips_is_not_judged(tmp_path):
    class Skips(Small):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == 1 else None

    _, callback, _ = run(tmp_path, model=Skips())
    assert [this.epoch for this in callback.rounds] == [0, 1, 3]


def test_parameters_that_the_optimizer_knows_by_name(tmp_path):
    class Named(Small):
        def configure_optimizers(self):
            return torch.optim.Adam(self.named_parameters(), 0.01)

    held = []

    class Names(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            names = {id(p): name for name, p in pl_module.named_parameters()}
            (group,) = trainer.optimizers[0].param_groups
            held.append(list(group["param_names"]))
            assert [names[id(p)] for p in group["params"]] == group["param_names"]

    pruning = {"max_rejections": 3, "restart": "optimizer"}
    run(tmp_path, Names(), model=Named((0.9, 0.1, 0.9)), method=Slope, pruning=pruning)
    assert {"layers.3.weight" in names for names in held} == {True, False}


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (Small, lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1)], "adds parameter groups while training"),
        (lambda: Stepping(), list, r"can't make \['layers.3'\] linear, with which parameters leave or join LBFGS"),
    ],
)
def test_optimizers_that_could_not_go_back_are_refused(tmp_path, make, callbacks, message):
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, *callbacks(), model=make(), method=Slope)


class Stepping(Small):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.01, max_iter=1)
