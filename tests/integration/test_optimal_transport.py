"""LaCoOT in a Trainer: blocks are brought near to the identity in training, and taken out when it has ended."""

import copy
import pickle
from contextlib import suppress

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import (
    EntropyPruningCallback,
    Files,
    OptimalTransportCallback,
    PruningCallback,
    Regularizer,
    RemoveBlocks,
    Rounds,
    SlicedWasserstein,
    collapse,
    load_pruned,
)
from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.cli import read_pruning_report
from lightning_easier.command import main
from lightning_easier.pruning.methods import Measuring
from lightning_easier.structure.linearize import stand_ins
from tests.integration.interrupted import Killed, ResumableLoader
from tests.integration.residual import Net, Residual
from tests.integration.test_cli import CONFIGS, SHORT
from tests.integration.tiny import assert_equal_states


def data(count=12):
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(values, (values.sum(1) > 0).long())


def fit(root, *callbacks, model=None, epochs=2, ckpt_path=None, batch=4, val_batch=6, kind=None, **options):
    torch.manual_seed(3)
    model = model if isinstance(model, LightningModule) else (model or Net)()
    kind = kind or OptimalTransportCallback
    callback = kind(**({"monitor": "score", "tolerance": 0.1, "files": Files(dirpath=str(root / "rounds"))} | options))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=[callback, *callbacks],
    )  # fmt: skip
    loaders = ResumableLoader(data(), batch), DataLoader(data(), val_batch)
    with suppress(Killed):
        trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return model, callback, trainer


def chosen(callback):
    return [this.chosen for this in callback.rounds]


def test_the_nearest_blocks_go_first_while_the_score_allows(tmp_path):
    model, callback, trainer = fit(tmp_path, model=Net((0.9, 0.95, 0.85, 0.7)))
    assert chosen(callback) == [[], ["blocks.1"], ["blocks.2"], ["blocks.0"]]
    assert [this.score_after for this in callback.rounds] == pytest.approx([0.9, 0.95, 0.85, 0.7])
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]
    assert callback.removed == list(stand_ins(model)) == ["blocks.1", "blocks.2"]
    assert "blocks.2 (the block was taken out)" in str(callback.report())
    assert trainer.global_step == 6, "nothing is trained after the first"

    loaded = load_pruned(Net, callback.last_good).eval()
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), model.eval()(x))
    small = collapse(model, x).model
    assert (small(x) - model(x)).norm() < 1e-5 * model(x).norm()
    expected = sum(p.numel() for part in (model.stem, model.blocks[0], model.head) for p in part.parameters())
    assert sum(p.numel() for p in small.parameters()) <= expected
    assert not [name for name in small.state_dict() if "blocks.1" in name or "blocks.2" in name]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_others_are_tried_where_that_is_asked_for(tmp_path):
    class Needed(Net):
        def on_validation_epoch_end(self):
            self.log("score", 0.9 if "blocks.1" not in stand_ins(self) else 0.1)

    model, callback, _ = fit(tmp_path, model=Needed(), rounds=Rounds(epochs=0, max_rejections=2))
    assert chosen(callback) == [[], ["blocks.1"], ["blocks.2"], ["blocks.0"]]
    assert callback.removed == list(stand_ins(model)) == ["blocks.0", "blocks.2"] or callback.removed == [
        "blocks.2", "blocks.0",
    ]  # fmt: skip


def test_the_loss_gets_the_distance_of_what_goes_in_and_comes_out(tmp_path):
    """Of one neuron the only directions are 1 and -1, so that the distance can be written down."""
    model = Net((0.9, 0.1), width=1)
    for block in model.blocks:
        block.norm = nn.Identity()
    noted = []

    class Notes(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            noted.append([p.grad.clone() for p in pl_module.parameters()])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            noted.append((outputs["loss"].clone(), trainer.callback_metrics["transport_loss"].clone()))

    begun = copy.deepcopy(model)
    _, _, trainer = fit(tmp_path, Notes(), model=model, epochs=1, weight=2.5, batch=12)
    ((gradients), (loss, logged)) = noted

    x, labels = data().tensors
    x, distances = begun.stem(x), []
    for block in begun.blocks:
        y = block(x)
        distances.append(((y.sort(0).values - x.sort(0).values) ** 2).mean().sqrt())
        x = y
    mean = sum(distances) / 3
    wanted = F.cross_entropy(begun.head(x), labels) + 2.5 * mean
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(logged, mean.detach())
    torch.testing.assert_close(gradients, [p.grad for p in begun.parameters()])
    assert trainer.callback_metrics["distance/blocks.1"] < trainer.callback_metrics["distance/blocks.2"]


def kept_dense(root, **net):
    """Train, and have no block go: what was logged in training is there still."""
    model, _, trainer = fit(root, epochs=2, weight=1.0, tolerance=0.0, model=lambda: Net((0.9, 0.1), **net))
    return model, trainer.callback_metrics["transport_loss"]


def test_a_block_that_is_computed_again_in_the_backward_pass_is_trained_the_same(tmp_path):
    (plain, loss), (recomputed, other) = kept_dense(tmp_path / "0"), kept_dense(tmp_path / "1", recomputed=True)
    assert_equal_states(dict(recomputed.state_dict()), dict(plain.state_dict()))
    assert loss == other > 0


def test_a_block_that_writes_to_its_input_is_compared_with_what_it_was(tmp_path):
    begun = Net(width=1, inplace=True)
    for block in begun.blocks:
        block.norm, block.scale = nn.Identity(), 0.0  # it computes relu(x)
    noted = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            x = pl_module.stem(batch[0]).detach()
            noted.append((x.sort(0).values - x.clamp(min=0).sort(0).values).square().mean().sqrt() / 3)

        def on_train_batch_end(self, trainer, *_):
            noted.append(trainer.callback_metrics.get("transport_loss"))

    fit(tmp_path, Notes(), model=begun, epochs=2, weight=1.0, batch=12)
    torch.testing.assert_close(noted[1::2], noted[::2])
    assert noted[0] > 0


class Notices(Regularizer):
    """Notes whether a block is called in a step, in its forward pass."""

    key = "nothing"

    def __init__(self):
        self.noted = []

    def attach(self, model, names):
        def note(*_):
            self.noted.append((torch.is_grad_enabled(), self.in_step))

        self.handle = model.blocks[0].register_forward_pre_hook(note)

    def detach(self):
        self.handle.remove()

    def begin_step(self, number):
        assert self.in_step

    def term(self):
        assert not self.in_step


def test_a_regularizer_is_told_whether_a_step_goes_on(tmp_path):
    """Each block is called in a step, again in the backward pass, and in validations."""
    notices = Notices()

    class Method(RemoveBlocks):
        def regularizer(self):
            return notices

    fit(tmp_path, model=Net(recomputed=True), epochs=1, batch=12, val_batch=12,
        kind=lambda **options: PruningCallback(Method(), **options, rounds=Rounds(epochs=0)))  # fmt: skip
    assert notices.noted[:3] == [(True, True), (True, False), (False, False)]


def test_each_step_looks_along_other_directions_and_a_seed_along_the_same(tmp_path):
    class Still(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Notes(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, *_):
            self.losses.append(float(trainer.callback_metrics["transport_loss"]))

    def losses(seed):
        notes = Notes()
        fit(tmp_path / str(seed), notes, model=Still, weight=1.0, batch=12, epochs=3, seed=seed, directions=1)
        return notes.losses

    first = losses(0)
    assert len({*first}) == 3
    assert first == losses(0) != losses(1)


def test_it_brings_blocks_nearer_to_the_identity(tmp_path):
    def distances(root, weight):
        _, _, trainer = fit(root, epochs=25, weight=weight, tolerance=0.0, model=Net((0.9, 0.1)))
        return [float(trainer.callback_metrics[f"distance/blocks.{n}"]) for n in range(3)]

    without, with_it = distances(tmp_path / "0", 0.0), distances(tmp_path / "1", 3.0)
    assert max(with_it) < 0.3 * max(without)


class Dies(Callback):
    """Leaves at the n-th call of a hook, as if killed."""

    def __init__(self, hook, number):
        self.left = number

        def count(*_, **__):
            self.left -= 1
            if self.left == 0:
                raise Killed

        setattr(self, hook, count)


class Saves(Callback):
    """Saves a checkpoint at the end of each training batch and epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "last.ckpt")


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_train_batch_start", 3),
        ("on_train_epoch_start", 2),
        ("on_train_end", 1),
        ("on_validation_start", 4),
        ("on_validation_end", 5),
        ("on_validation_start", 6),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, hook, number):
    """Validations number 1 and 2 are the sanity check and that of the first epoch; those from number 4 remove."""
    scores = (0.9, 0.95, 0.85, 0.7)
    options = {"weight": 1.0, "epochs": 2}
    whole = fit(tmp_path / "whole", model=lambda: Net(scores), **options)
    root = tmp_path / "killed"
    root.mkdir()
    fit(root, Saves(root), Dies(hook, number), model=lambda: Net(scores), **options)
    saved = max([*root.glob("rounds/round_*.ckpt"), root / "last.ckpt"], key=lambda path: path.stat().st_mtime_ns)
    resumed = fit(root, Saves(root), model=lambda: Net(scores), ckpt_path=saved, **options)
    assert [vars(this) for this in resumed[1].rounds] == [vars(this) for this in whole[1].rounds]
    assert resumed[1].removed == whole[1].removed == ["blocks.1", "blocks.2"]
    assert_equal_states(dict(resumed[0].state_dict()), dict(whole[0].state_dict()))
    assert_equal_states(resumed[2].optimizers[0].state_dict(), whole[2].optimizers[0].state_dict())


def test_without_an_epoch_of_training_a_trained_model_is_pruned(tmp_path):
    trained, *_ = fit(tmp_path / "trained", weight=0.0, tolerance=0.0, model=Net((0.9, 0.1)))
    assert not stand_ins(trained)
    trained.scores = (0.9,)
    before = dict(trained.state_dict())
    model, callback, _ = fit(tmp_path / "pruned", model=trained, epochs=0)
    assert len(callback.removed) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


@pytest.mark.parametrize("method", ["easier", "blocks"])
def test_other_methods_remove_after_training_too(tmp_path, method):
    kinds = {"easier": EntropyPruningCallback, "blocks": lambda **options: PruningCallback(RemoveBlocks(), **options)}
    model, callback, trainer = fit(tmp_path, kind=kinds[method], rounds=Rounds(epochs=0))
    assert len(callback.removed) == len(stand_ins(model)) == 3
    assert trainer.global_step == 6


def test_blocks_may_go_with_training_after_each(tmp_path):
    model, callback, trainer = fit(tmp_path, rounds=Rounds(epochs=1), epochs=4, weight=1.0)
    assert [this.epoch for this in callback.rounds] == [0, 1, 2, 3]
    assert len(stand_ins(model)) == 3
    assert trainer.global_step == 12


def test_the_step_is_as_it_was_afterwards(tmp_path):
    model = Net()
    fit(tmp_path, model=model, weight=1.0)
    assert "training_step" not in vars(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert "run" not in vars(model.trainer.fit_loop)


def test_a_module_keeps_the_dtypes_of_its_parts(tmp_path):
    model = Net((0.9, 0.1))
    model.stem = nn.Linear(4, 6).bfloat16()
    model.blocks[0].register_forward_pre_hook(lambda block, args: (args[0].float(),))
    model.stem.register_forward_pre_hook(lambda stem, args: (args[0].bfloat16(),))
    before = {name: p.dtype for name, p in model.named_parameters()}
    fit(tmp_path, model=model, tolerance=0.0)
    assert {name: p.dtype for name, p in model.named_parameters()} == before


def test_a_callback_can_be_pickled_after_its_run(tmp_path):
    _, callback, _ = fit(tmp_path, weight=1.0)
    assert pickle.loads(pickle.dumps(callback)).removed == callback.removed


def test_a_run_whose_training_is_over_does_not_train_on(tmp_path):
    _, callback, _ = fit(tmp_path, model=lambda: Net((0.9, 0.9, 0.1)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")}
    with pytest.raises(MisconfigurationException, match="`max_epochs` to be 2 or less, but got 4"):
        fit(tmp_path, model=Net((0.9,)), epochs=4, ckpt_path=tmp_path / "rounds" / "round_1.ckpt")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")} == before
    assert len(callback.removed) == 1


class Unreached(Net):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            x = self.stem(batch[0])
            for block in self.blocks:
                x = block(x)
        return F.cross_entropy(self.head(x), batch[1])


def test_it_is_said_once_where_nothing_is_added(tmp_path):
    with pytest.warns(UserWarning, match="Nothing is added to the loss for transport_loss") as told:
        fit(tmp_path, model=Unreached, weight=1.0)
    assert sum("Nothing is added" in str(each.message) for each in told) == 1


class Narrow(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    forward = Net.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class ByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        (Narrow, {}, "at least one block .*`collapsible_blocks`.*but found none"),
        (ByHand, {"weight": 1.0}, "`weight` to be .* manual optimization"),
        (Net, {"blocks": ["nothing*"]}, "`blocks` to hold globs that match blocks, but 'nothing\\*'"),
        (Net, {"weight": 1.0, "batch": 1}, "training batches of two samples or more, but 'blocks.0'"),
        (Net, {"weight": 0.0, "val_batch": 1}, "validation batches of two samples or more"),
    ],
)
def test_what_it_can_not_work_on_is_refused(tmp_path, model, options, error):
    with pytest.raises((ValueError, MisconfigurationException), match=error):
        fit(tmp_path, model=model(), **options)


class Spread(nn.Module):
    """Adds rows and columns; nobody can tell without running it that this is larger than what goes in."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.mix(x).transpose(0, 1)


class WithSpread(Net):
    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.blocks[1] = Spread()

    def forward(self, x):
        x = self.stem(x)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(("weight", "samples"), [(1.0, 4), (0.0, 6)])  # it is noticed in training, or in validation
def test_a_block_of_another_shape_is_named_and_everything_is_as_it_was(tmp_path, weight, samples):
    model = WithSpread()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    states = []

    class Notes(Callback):
        def on_exception(self, trainer, pl_module, exception):
            states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    shapes = f"\\({samples}, 1, 6\\) and \\({samples}, {samples}, 6\\)"
    with pytest.raises(ValueError, match=f"'blocks.1' can't be taken out.*{shapes}.*`exclude`"):
        fit(tmp_path, Notes(), model=model, weight=weight)
    assert_equal_states(dict(model.state_dict()), dict(before))
    assert modules.items() <= dict(model.named_modules()).items()
    assert not stand_ins(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert "training_step" not in vars(model)
    assert weight == 0 or states == [{}], "no step was made"
    assert not [*tmp_path.rglob("*.ckpt")]


def test_a_block_that_is_excluded_is_not_measured(tmp_path):
    _, callback, trainer = fit(tmp_path, model=WithSpread(), weight=1.0, exclude="blocks.1")
    assert sorted(callback.removed) == ["blocks.0", "blocks.2"]
    assert "distance/blocks.1" not in trainer.callback_metrics


class Diverges(Net):
    """Its weights are NaN after the first step, which its score does not tell."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_blocks_whose_distances_are_not_finite_stay_and_it_is_said_why(tmp_path, weight):
    with pytest.warns(UserWarning, match=r"\['blocks.0', 'blocks.1', 'blocks.2'\] are not taken out.*not finite"):
        model, callback, _ = fit(tmp_path, model=Diverges(), weight=weight)
    assert [this.accepted for this in callback.rounds] == [True]
    assert callback.removed == list(stand_ins(model)) == []


def test_a_sample_that_is_not_finite_is_left_out_of_the_distances(tmp_path, monkeypatch):
    whole = data()
    values = whole.tensors[0].clone()
    values[3] = float("nan")
    strange = TensorDataset(values, whole.tensors[1])
    monkeypatch.setattr(f"{__name__}.data", lambda: strange)

    class Trained(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].nan_to_num(), batch[1]], batch_idx)

    with pytest.warns(UserWarning, match="1 of the 12 samples .* were left out"):
        _, callback, _ = fit(tmp_path, model=Trained())
    assert sorted(callback.removed) == ["blocks.0", "blocks.1", "blocks.2"]


class OneStrange(Net):
    """What one block computes is infinite."""

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        strange = self.blocks[2](x).detach()
        return self.head(torch.where(strange.isfinite(), strange, x))


def test_one_block_whose_distance_is_not_finite_keeps_no_other(tmp_path):
    model = OneStrange()
    model.blocks[2].scale = float("inf")
    with pytest.warns(UserWarning, match=r"\['blocks.2'\] are not taken out"):
        model, callback, _ = fit(tmp_path, model=model, weight=0.0)
    assert sorted(callback.removed) == ["blocks.0", "blocks.1"]


class Summary(Net):
    """A block that is given the mean of the batch: one sample at once."""

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        return self.head(x + self.blocks[2](x.mean(0, keepdim=True)))


def test_a_block_that_is_given_one_sample_at_once_stays_and_it_is_said_why(tmp_path):
    with pytest.warns(UserWarning, match=r"\['blocks.2'\] are not taken out: .* one sample at once"):
        _, callback, trainer = fit(tmp_path, model=Summary(), weight=0.0)
    assert sorted(callback.removed) == ["blocks.0", "blocks.1"]
    assert "distance/blocks.2" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"two samples or more, but 'blocks.2' has computed one.*`exclude`"):
        fit(tmp_path / "trained", model=Summary(), weight=1.0)
    _, callback, _ = fit(tmp_path / "without", model=Summary(), weight=1.0, exclude="blocks.2")
    assert sorted(callback.removed) == ["blocks.0", "blocks.1"]


def test_a_last_batch_of_one_sample_is_left_out_of_the_distances(tmp_path):
    """Of 12 samples 11 are in the first batch."""

    class Still(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Notes(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append((outputs["loss"].item(), F.cross_entropy(pl_module(batch[0]), batch[1]).item()))

    notes = Notes()
    options = {"weight": 1.0, "tolerance": 0.0, "batch": 11, "val_batch": 11, "epochs": 1}
    model, _, trainer = fit(tmp_path, notes, model=Still((0.9, 0.1)), **options)
    (first, plain), (last, alone) = notes.losses
    assert first > plain
    assert last == alone
    x = model.stem(data().tensors[0][:11])
    metric = SlicedWasserstein()
    metric.update(x, model.blocks[0](x))
    assert trainer.callback_metrics["distance/blocks.0"] == pytest.approx(float(metric.compute()))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Residual(6)

    def forward(self, x):
        return x + F.relu(self.inner(x))


def test_blocks_that_overlap_are_refused_and_the_outermost_are_the_default(tmp_path):
    model = Net()
    model.blocks[1] = Nested()
    with pytest.raises(ValueError, match="'blocks.1.inner' lies inside 'blocks.1'"):
        fit(tmp_path / "overlap", model=copy.deepcopy(model), blocks="blocks.*")
    assert "training_step" not in vars(model)
    _, callback, _ = fit(tmp_path / "outermost", model=copy.deepcopy(model))
    assert sorted(callback.removed) == ["blocks.0", "blocks.1", "blocks.2"]
    pruned, callback, _ = fit(tmp_path / "inner", model=copy.deepcopy(model), blocks=["blocks.1.inner", "blocks.0"])
    assert sorted(callback.removed) == sorted(stand_ins(pruned)) == ["blocks.0", "blocks.1.inner"]


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"directions": 0}, {"p": 0.5}, {"seed": -1}, {"blocks": 3}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        OptimalTransportCallback("score", **options)


@pytest.mark.parametrize("options", [{"measuring": Measuring(on="training")}, {"distillation": Distillation()}])
def test_what_needs_training_does_not_go_with_rounds_that_have_none(options):
    with pytest.raises(ValueError, match="epochs=0"):
        EntropyPruningCallback("score", rounds=Rounds(epochs=0), **options)


def test_a_dry_run_changes_nothing(tmp_path):
    model, callback, _ = fit(tmp_path, dry_run=True)
    assert not stand_ins(model)
    assert [row.name for row in callback.listed.blocks] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_score_that_is_not_a_number_is_taken_back(tmp_path):
    model, callback, _ = fit(tmp_path, model=Net((0.9, float("nan"))))
    assert [this.accepted for this in callback.rounds] == [True, False]
    assert not stand_ins(model)


def test_the_recipe_runs_from_the_command_line_and_its_options_are_overridden(tmp_path):
    small = "--model.backbone_args.widths=[4,8]", "--model.backbone_args.blocks=2", "--trainer.limit_val_batches=2"
    options = "weight=0.5", "tolerance=1", "blocks=model.stages.*"
    main([
        "fit", f"--config={CONFIGS / 'digits.yaml'}", f"--trainer={CONFIGS / 'recipe' / 'lacoot.yaml'}", *SHORT, *small,
        *(f"--trainer.callbacks.{each}" for each in options), f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip
    saved = tmp_path / "lightning_logs" / "version_0"
    callback = yaml.safe_load((saved / "config.yaml").read_text())["trainer"]["callbacks"][-1]
    assert callback["class_path"] == "lightning_easier.OptimalTransportCallback"
    assert callback["init_args"]["weight"] == 0.5
    *_, last = sorted((saved / "entropy_pruning").glob("round_*.ckpt"))
    rounds = read_pruning_report(last).rounds
    blocks = ["model.stages.0.0", "model.stages.0.1", "model.stages.1.1"]  # the first of the second stage has a stride
    assert sorted(name for this in rounds for name in this.removed) == blocks
