"""Rounds in which fitted operators take the places of chains, in an order that knows what is saved."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_easier import FitChains, candidates, collapse, fit_chains, load_pruned, measure_entropy
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support import timing
from lightning_easier.zoo import CifarResNet, DigitsDataModule
from tests.clocks import Clock, busy_at_times, busy_between, drifting, honest, jittering
from tests.integration.interrupted import At, Small, outcome, run, stop, uninterrupted
from tests.integration.tiny import assert_equal_states, pruning, train


class Residual(LightningModule):
    """A CIFAR ResNet on digits."""

    def __init__(self, depth: int = 8, scores: tuple[float, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = CifarResNet(depth, in_channels=1)
        self.scores = scores

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        hits = (self.model(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", hits)

    def on_validation_epoch_end(self):
        if self.scores:
            self.log("scripted", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


INNER = [f"model.layer{stage}.0.relu1" for stage in (1, 2, 3)]
FITTED = {"fit": True, "mergeable_only": True, "monitor": "val_acc"}


def fits_of(pl_module, trainer):
    batches = list(trainer.val_dataloaders)[:3]
    return {f"model.{name}": fit for name, fit in fit_chains(pl_module.model, batches).items()}


class Watch(Callback):
    """Measures itself what the callback has to measure, when a round is over."""

    def __init__(self) -> None:
        self.fits, self.outputs = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.fits.append(fits_of(pl_module, trainer))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in pl_module.parameters())
        if batch_idx == 0 and trainer.current_epoch:
            (name,) = stand_ins(pl_module).keys() & self.fits[-1].keys()
            host = pl_module.get_submodule(name.replace("relu1", "conv1"))
            expected = self.fits[-1][name]
            (weight,) = (value for key, value in expected.tensors.items() if "conv1" in key)
            torch.testing.assert_close(host.weight.detach(), weight, rtol=1e-2, atol=1e-3)
            assert host.weight not in trainer.optimizers[0].state
            self.outputs.append(name)


def test_an_operator_fitted_to_the_validation_takes_the_place_of_a_chain(tmp_path):
    watch = Watch()
    callback = pruning(**FITTED)
    model = Residual()
    train(model, callback, watch, root=tmp_path, epochs=4, limit_val_batches=3)
    assert callback.removed == watch.outputs
    assert sorted(callback.removed) == INNER
    assert all("convolution" in this.notes[this.removed[0]][-1] for this in callback.rounds[1:])
    assert "% explained" in str(callback.report())
    # conv1 has the kernel, bn2 stays, what is between is gone
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {"model.layer1.0.conv1", "model.layer1.0.bn2"} <= names
    assert not names & {f"model.layer1.0.{part}" for part in ("bn1", "conv2")}
    x = torch.randn(4, 1, 8, 8)
    result = collapse(model.model.eval(), x, objective="depth")
    assert result.report.after.depth == 8 - 3
    again = load_pruned(Residual(), callback.last_good)
    torch.testing.assert_close(again.model.eval()(x), model.model(x), rtol=0, atol=0)


class Inverted(Small):
    """The body of an inverted residual between two layers, on maps of four positions."""

    def __init__(self, scores: tuple[float, ...] = (0.9,)) -> None:
        super().__init__(scores)
        torch.manual_seed(0)
        body = [
            nn.Conv2d(4, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.PReLU(24),
            nn.Conv2d(24, 4, 1, bias=False), nn.BatchNorm2d(4),
        ]  # fmt: skip
        stem = [nn.Linear(4, 16), nn.Tanh(), nn.Unflatten(1, (4, 2, 2))]
        self.layers = nn.Sequential(*stem, *body, nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize("scores", [(0.9,), (0.9, 0.1)])
@pytest.mark.parametrize("moment", [("on_train_batch_end", 1, 1), ("on_train_epoch_end", 0, None)])
def test_the_body_of_an_inverted_residual_goes_as_one_in_a_run(tmp_path, tmp_path_factory, scores, moment):
    options = {"scores": scores, "pruning": FITTED | {"monitor": "score"}, "epochs": 3}
    name = f"inverted, {scores}"
    whole = uninterrupted(tmp_path_factory, name, lambda root: run(root, model=Inverted(scores), **options))
    model, callback, trainer = whole
    this = callback.rounds[1]
    assert (this.removed, this.accepted) == (["layers.5"], scores == (0.9,))
    assert this.notes["layers.5"][-1].startswith("convolution, together with `layers.8`, ")
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    gone = {f"layers.{place}" for place in (4, 6, 7, 8, 9)}
    assert names & gone == (set() if this.accepted else gone)
    if this.accepted:
        again, x = load_pruned(Inverted(), callback.last_good).eval(), torch.randn(5, 4)
        saved = load_pruned(Inverted(), callback.last_good).eval()
        linear = collapse(again, x, objective="macs").model
        torch.testing.assert_close(linear(x), saved(x), rtol=1e-4, atol=1e-5)
    saver = At(*moment, lambda trainer: (trainer.save_checkpoint(tmp_path / "saved.ckpt"), stop(trainer)))
    run(tmp_path, saver, model=Inverted(scores), **options)
    resumed = run(tmp_path, model=Inverted(scores), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_fits_are_those_of_the_last_validation_over_all_loaders_and_the_users_choice_is_carried_out(tmp_path):
    class Last(FitChains):
        def select(self, ranks, count):
            return [max(name for name in ranks if name in INNER)]

    class Two(Residual):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    class Fits(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            batches = [batch for loader in trainer.val_dataloaders for batch in loader]
            fits = fit_chains(pl_module.model, batches)
            self.explained.append({f"model.{name}": fit.explained for name, fit in fits.items()})

        explained: list = []  # noqa: RUF012

    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    loaders = [data.val_dataloader(), data.test_dataloader()]
    data.val_dataloader = lambda: loaders
    fits = Fits()
    monitor = {"monitor": "val_acc/dataloader_idx_1", "best_per_depth": True, "tolerance": 100.0}
    callback = pruning(**FITTED | monitor | {"method": Last})
    train(Two(), callback, fits, root=tmp_path, epochs=4, val_check_interval=0.5, data=data, limit_val_batches=1.0)
    assert callback.removed == sorted(INNER, reverse=True)
    for before, this in zip(fits.explained, callback.rounds[1:], strict=False):
        (name,) = this.removed
        explained = float(this.notes[name][-1].rpartition(", ")[2].removesuffix("% explained")) / 100
        assert explained == pytest.approx(before[name], abs=2e-3)
    assert sorted(callback.best_checkpoints) == [0, 1, 2, 3]
    for removed, path in callback.best_checkpoints.items():
        if removed:
            assert stand_ins(load_pruned(Residual(), path)).keys() == {*callback.removed[:removed]}


def test_a_rejected_fit_brings_everything_back(tmp_path):
    class Dense(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}

    watch = Dense()
    model = Residual(scores=(0.9, 0.1))
    callback = pruning(**FITTED | {"monitor": "scripted", "tolerance": 0.2})
    trainer = train(model, callback, watch, root=tmp_path, epochs=4)
    assert [this.accepted for this in callback.rounds] == [True, False]
    assert all(torch.equal(value, watch.state[key]) for key, value in model.state_dict().items())
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()]


def test_the_order_is_that_of_linearity_per_what_is_saved(tmp_path):
    class Ranks(FitChains):
        seen: list = []  # noqa: RUF012

        def select(self, ranks, count):
            self.seen.append(dict(ranks))
            return super().select(ranks, count)

    class Fits(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.fits = fits_of(pl_module, trainer)

    for gain in (None, "macs", "latency"):
        Ranks.seen = []
        fits = Fits()
        callback = pruning(method=Ranks, criterion="linearity", gain=gain)
        train(Residual(), callback, fits, root=tmp_path / str(gain), epochs=2, limit_val_batches=3)
        ranks = Ranks.seen[0]
        finite = {name for name, rank in ranks.items() if rank != float("inf")}
        if gain is None:
            assert ranks.keys() > set(INNER)
            for name in INNER:
                assert ranks[name] == pytest.approx(1 - fits.fits[name].explained, abs=2e-3)
        else:
            assert finite == set(INNER)
        assert callback.removed == [min(ranks, key=ranks.__getitem__)]


def test_linearity_without_fits_is_that_of_the_affine(tmp_path):
    _, callback, _ = run(tmp_path, pruning={"criterion": "linearity", "stand_in": "affine"}, epochs=2)
    (_, this) = callback.rounds
    assert this.notes == {}
    _, by_entropy, _ = run(tmp_path / "entropy", epochs=2)
    assert callback.entropies is not None
    assert by_entropy.rounds[1].entropies[by_entropy.removed[0]] <= this.entropies[this.removed[0]]


def test_what_merges_nothing_is_left_out_and_the_exact_merge_that_saves_most_goes_first(tmp_path):
    class Wide(Small):
        """Linear layers whose merges save very different numbers of multiply-accumulates."""

        def __init__(self):
            super().__init__()
            sizes = [4, 64, 4, 8, 32, 2]
            layers = []
            for before, after in pairwise(sizes):
                layers += [nn.Linear(before, after), nn.ReLU()]
            self.layers = nn.Sequential(*layers[:-1], nn.ReLU())

    merges = {each.name for each in candidates(Wide()).candidates if each.merges}
    model, callback, _ = run(tmp_path, model=Wide(), pruning={"gain": "macs", "mergeable_only": True}, epochs=8)
    assert merges == {"layers.1", "layers.3", "layers.5", "layers.7"}
    # 4 → 64 → 4 saves most; 64 → 4 → 8 would cost more than it saves
    assert set(callback.removed) == merges - {"layers.3"}
    assert stand_ins(model).keys() == set(callback.removed)


def test_a_run_is_over_when_its_target_is_reached(tmp_path):
    deep = {"removals": 1, "gain": "macs"}
    callback = pruning(**FITTED | deep | {"depth": 6})
    model = Residual()
    train(model, callback, root=tmp_path, epochs=6)
    assert len(callback.removed) == 2
    assert collapse(model.model.eval(), torch.randn(4, 1, 8, 8), objective="macs").report.after.depth == 6
    at_once = pruning(**FITTED | deep | {"speedup": 1.01})
    train(Residual(), at_once, root=tmp_path / "slow", epochs=6)
    assert len(at_once.removed) == 1  # the dense network is not asked


def test_a_run_that_misses_its_target_says_what_it_has_reached(tmp_path):
    callback = pruning(**FITTED | {"gain": "macs", "speedup": 50, "depth": 6})
    model = Residual()
    told = "its target is not reached: 2.* of the 50× .* and a depth of 5, where 6 was.*Nothing was taken back, nothing"
    with pytest.warns(UserWarning, match=told):
        train(model, callback, root=tmp_path, epochs=6)
    assert len(callback.removed) == 3
    # the figure is that of the last round that was kept
    callback = pruning(
        **FITTED | {"gain": "macs", "monitor": "scripted", "depth": 1, "max_rejections": 3, "tolerance": 0.1}
    )
    model = Residual(scores=(0.9, 0.9, 0.1))
    told = "its target is not reached: a depth of 7, where 1 was asked for. Raise `tolerance` or `max_epochs`, or let"
    with pytest.warns(UserWarning, match=told):
        train(model, callback, root=tmp_path / "rejected", epochs=8)
    assert len(callback.removed) == 1
    # and nothing where nothing could go
    callback = pruning(**FITTED | {"depth": 1, "monitor": "scripted", "tolerance": 0.1})
    with pytest.warns(UserWarning, match="its target is not reached: nothing was removed"):
        train(Residual(scores=(0.9, 0.1)), callback, root=tmp_path / "none", epochs=5)


class Wider(Small):
    """Linear layers whose merges, and whose fits, save very different times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = []
        for before, after in pairwise([4, 1024, 4, 256, 8, 512, 2]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])


LIARS = {
    "busy from some moment on": lambda: busy_between(0.3, math.inf),
    "busy at times": lambda: busy_at_times(0.5),
    "drifting": lambda: drifting,
    "jittering": lambda: jittering(0.1),
}


@pytest.mark.parametrize("options", [{}, {"fit": True, "criterion": "linearity", "speedup": 2.2}])
def test_a_run_removes_alike_under_a_clock_that_lies(tmp_path, monkeypatch, options):
    def removed_under(slowness, name):
        monkeypatch.setattr(timing, "stopwatch", Clock(slowness))
        chosen = {"gain": "latency", "mergeable_only": True} | options
        _, callback, _ = run(tmp_path / name, model=Wider(), pruning=chosen, epochs=6)
        return callback.removed

    expected = removed_under(honest, "honest")
    assert len(expected) == (2 if options else 3)
    for name, liar in LIARS.items():
        assert removed_under(liar(), name) == expected, name


@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}, {"min_epochs": 9}])
def test_targets_in_rounds_of_several_epochs(tmp_path, options):
    long = {"gain": "macs", "warmup_epochs": 1, "epochs": 2, "depth": 6}
    callback, model = pruning(**FITTED | long), Residual()
    train(model, callback, root=tmp_path, epochs=11, **options)
    assert len(callback.removed) == 2
    assert all(this.accepted for this in callback.rounds)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_hooks_of_several_validations_are_gone_where_training_is_measured(tmp_path):
    options = {"on": "training", "depth": 5, "gain": "macs"}
    model, callback, _ = run(tmp_path, pruning=options, epochs=4, val_check_interval=1)
    assert len(callback.removed) == 1
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_target_without_a_validation_is_refused(tmp_path):
    options = {"on": "training", "depth": 5, "monitor": "train_loss", "mode": "min"}
    with pytest.raises(MisconfigurationException, match="prices the network on validation batches, but the run has no"):
        run(tmp_path, pruning=options, limit_val_batches=0)


def test_a_target_does_not_excuse_a_fall_beyond_the_tolerance(tmp_path):
    callback = pruning(**FITTED | {"depth": 7, "monitor": "scripted", "tolerance": 0.1})
    model = Residual(scores=(0.9, 0.5))
    train(model, callback, root=tmp_path, epochs=5)
    assert [this.accepted for this in callback.rounds] == [True, False]
    assert stand_ins(model) == {}


def test_several_at_once_never_share_an_operator(tmp_path):
    _, callback, _ = run(tmp_path, pruning={"fit": True, "removals": 3}, epochs=4)
    chosen = [this.removed for this in callback.rounds[1:]]
    assert len(chosen[0]) >= 1
    for names in chosen:
        places = sorted(int(name.rpartition(".")[2]) for name in names if name in callback.rounds[1].notes)
        assert all(b - a > 2 for a, b in pairwise(places))
    assert len(callback.removed) > len(chosen[0])


@pytest.mark.parametrize("most", [1, 2])
def test_a_checkpoint_holds_no_fits_that_can_not_be_chosen_any_more(tmp_path, most):
    run(tmp_path, pruning={"fit": True, "max_rejections": most}, epochs=2)
    saved = torch.load(tmp_path / "rounds" / "round_0.ckpt", weights_only=True)
    (state,) = (value for key, value in saved["callbacks"].items() if key.startswith("EntropyPruning"))
    assert [len(operation["fits"]) for operation in state["decision"]["chosen"]["operations"]] == [1]
    proposal = state["snapshot"]["measured"]["proposal"]
    assert len(proposal["ranks"]) > 1
    assert (len(proposal["operations"]) > 1) == (most > 1)


def test_a_dry_run_ranks_as_a_run_does(tmp_path):
    callback = pruning(**FITTED | {"dry_run": True})
    model = Residual()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, callback, root=tmp_path, epochs=3)
    assert callback.listed is not None
    assert callback.removed == []
    assert model.state_dict().keys() == before.keys()


def test_entropies_are_measured_as_ever(tmp_path):
    callback = pruning(**FITTED)
    model = Residual()
    trainer = train(model, callback, root=tmp_path, epochs=1, limit_val_batches=3)
    measured = measure_entropy(model.model, list(trainer.val_dataloaders)[:3])
    assert callback.entropies == pytest.approx({f"model.{name}": value for name, value in measured.items()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "size"}, ValueError, r"`criterion` to be one of .*but got 'size'"),
        ({"gain": "joules"}, ValueError, r"`gain` to be one of \('latency', 'macs'\), but got 'joules'"),
        ({"mergeable_only": "some"}, TypeError, "`mergeable_only` to be a bool, but got 'some'"),
        ({"speedup": 0}, ValueError, "`speedup` to be above 0, but got 0"),
        ({"speedup": 1}, ValueError, "`speedup` to be above 1, .* but got 1"),
        ({"depth": 1.5}, TypeError, "`depth` to be an integer, but got 1.5"),
        ({"fit": True, "on": "training"}, ValueError, "`on` of Measuring to be 'validation' with FitChains"),
        ({"fit": True, "trainable": True}, ValueError, "identity has nothing to train"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pruning(**options)


def test_lbfgs_can_not_let_operators_go(tmp_path):
    class Full(Small):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="with which parameters leave or join LBFGS"):
        run(tmp_path, model=Full(), pruning={"fit": True})


class ByKeyword(Residual):
    """Calls its network by name."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(x=batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.model(x=batch[0]).argmax(-1) == batch[1]).float().mean())


def test_a_target_is_seen_of_a_network_that_is_called_by_name(tmp_path):
    callback = pruning(**FITTED | {"removals": 1, "gain": "macs", "depth": 6})
    model = ByKeyword()
    train(model, callback, root=tmp_path, epochs=6)
    assert len(callback.removed) == 2
    assert collapse(model.model.eval(), torch.randn(4, 1, 8, 8), objective="macs").report.after.depth == 6


class Often(CifarResNet):
    def forward(self, x: torch.Tensor, often: int) -> torch.Tensor:
        return often * super().forward(x)


class OfSomethingElse(Residual):
    """Calls its network with what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Often(8, in_channels=1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0], often=2), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.model(batch[0], often=2).argmax(-1) == batch[1]).float().mean())


def test_a_target_of_a_network_that_can_not_be_priced_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="can't be priced, since no module that holds all activations"):
        train(OfSomethingElse(), pruning(**FITTED | {"depth": 6}), root=tmp_path, epochs=3)


def test_a_target_is_seen_where_training_is_measured(tmp_path):
    _, callback, _ = run(tmp_path, pruning={"on": "training", "depth": 5, "gain": "macs"}, epochs=6)
    assert len(callback.removed) == 1
