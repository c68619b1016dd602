"""Rounds that are trained on the dense network's logits, too."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_easier.callbacks.distillation import DenseTeacher, Distillation, divergence
from lightning_easier.structure.linearize import linearize, restore
from tests.integration.interrupted import At, Small, outcome, run, stop, uninterrupted
from tests.integration.tiny import Tiny, assert_equal_states, pruning, train

DISTILLED = {"distill": True, "weight": 0.3, "temperature": 2.0}


class Expected(Callback):
    """Computes by hand, from a model and a batch before a step, what the step has to log."""

    def __init__(self):
        self.dense = None
        self.expected, self.logged, self.losses = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        if self.dense is None:
            self.dense = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            return
        student = copy.deepcopy(pl_module)
        teacher = restore(copy.deepcopy(pl_module))
        teacher.load_state_dict(self.dense)
        with torch.no_grad():
            z, t = student.train()(batch[0]) / 2.0, teacher.eval()(batch[0]) / 2.0
            divergence = (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
            self.expected.append(4.0 * divergence)
            self.losses.append(0.7 * F.cross_entropy(z * 2.0, batch[1]) + 0.3 * 4.0 * divergence)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch > 0:
            self.logged.append(trainer.callback_metrics["distill_loss"])
            torch.testing.assert_close(outputs["loss"], self.losses[-1], rtol=1e-4, atol=1e-6)
        else:
            assert "distill_loss" not in trainer.callback_metrics


class WithDict(Small):
    """Returns its loss among other things, and its logits in a mapping."""

    class Inner(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    def __init__(self):
        super().__init__()
        self.layers = self.Inner(*self.layers)

    def forward(self, x):
        return super().forward(x)["logits"]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "more": 1}


class Checkpointed(Small):
    """Recomputes the whole network in the backward pass."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(checkpoint(self, batch[0], use_reentrant=False), batch[1])


@pytest.mark.parametrize("make", [Small, WithDict, Checkpointed])
def test_a_step_is_that_of_a_loss_written_by_hand(tmp_path, make):
    watch = Expected()
    torch.manual_seed(0)
    model, callback, trainer = run(tmp_path, watch, model=make(), pruning=DISTILLED, epochs=3)
    assert len(callback.removed) == 2
    assert len(watch.logged) == 6
    for logged, expected in zip(watch.logged, watch.expected, strict=True):
        torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-6)
    assert float(max(watch.logged)) > 1e-4
    assert "training_step" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any("teacher" in key for key in model.state_dict())


def test_the_weights_follow_the_divergence(tmp_path):
    """With all the weight on it, labels do not matter."""

    def fit(labels):
        torch.manual_seed(0)
        model = Small()
        step = model.training_step

        def relabelled(batch, batch_idx):
            wanted = labels(batch[1]) if model.current_epoch > 0 else batch[1]
            return step((batch[0], wanted), batch_idx)

        model.training_step = relabelled
        model, *_ = run(tmp_path / str(labels(0)), model=model, pruning=DISTILLED | {"weight": 1.0}, epochs=3)
        assert model.training_step is relabelled  # the user's own is back
        return model.state_dict()

    assert_equal_states(dict(fit(lambda y: y)), dict(fit(lambda y: 1 - y)))


@pytest.mark.parametrize("moment", [("on_train_batch_end", 1), ("on_train_epoch_end", None)])
@pytest.mark.parametrize("more", [{}, {"fit": True, "max_rejections": 3}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, tmp_path_factory, moment, more):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    options = {"scores": (0.9, 0.9, 0.1, 0.9), "pruning": DISTILLED | {"max_rejections": 3} | more}
    whole = uninterrupted(tmp_path_factory, f"distilled, {more}", lambda root: run(root, **options))
    run(tmp_path, At(moment[0], 2, moment[1], save), **options)
    resumed = run(tmp_path, ckpt_path=path, **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_accumulated_gradients_and_autocast(tmp_path):
    _, callback, trainer = run(tmp_path, pruning=DISTILLED, accumulate_grad_batches=2, precision="bf16-mixed", epochs=3)
    assert len(callback.removed) == 2
    assert torch.isfinite(trainer.callback_metrics["distill_loss"])


def test_maps_of_logits(tmp_path):
    class Maps(Small):
        def forward(self, x):
            return super().forward(x)[:, :, None, None].expand(-1, -1, 3, 2)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1][:, None, None].expand(-1, 3, 2))

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    watch = Expected()
    run(tmp_path / "maps", model=Maps(), pruning=DISTILLED, epochs=2)
    _, _, trainer = run(tmp_path, watch, pruning=DISTILLED, epochs=2)
    assert torch.isfinite(trainer.callback_metrics["distill_loss"])


def test_maps_are_averaged_over_samples_and_positions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    by_hand = [
        sum(p * (p / q).log() for p, q in zip((t / 3).softmax(0), (s / 3).softmax(0), strict=True))
        for s, t in zip(student.movedim(1, -1).reshape(-1, 5), teacher.movedim(1, -1).reshape(-1, 5), strict=True)
    ]
    torch.testing.assert_close(divergence(student, teacher, 3.0), 9 * torch.stack(by_hand).mean())


class Gradients(Callback):
    """Sums up by hand the gradients of the batches that one step takes, and compares."""

    def __init__(self, batches):
        self.batches, self.dense, self.sums, self.compared = batches, None, {}, 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.dense = self.dense or copy.deepcopy(pl_module.state_dict())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            return
        student, teacher = copy.deepcopy(pl_module).train(), restore(copy.deepcopy(pl_module))
        teacher.load_state_dict(self.dense)
        s, t = student(batch[0]), teacher.eval()(batch[0]).detach()
        target = (t / 2).softmax(1)
        term = 4 * (target * (target.log() - (s / 2).log_softmax(1))).sum(1).mean()
        student.zero_grad()
        ((0.7 * F.cross_entropy(s, batch[1]) + 0.3 * term) / self.batches).backward()
        for name, parameter in student.named_parameters():
            self.sums[name] = self.sums.get(name, 0) + parameter.grad

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.named_parameters() if self.sums else ():
            torch.testing.assert_close(parameter.grad, self.sums[name], rtol=1e-4, atol=1e-6)
            self.compared += 1
        self.sums = {}


@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_are_those_of_a_loss_written_by_hand(tmp_path, batches):
    watch = Gradients(batches)
    run(tmp_path, watch, pruning=DISTILLED, accumulate_grad_batches=batches, epochs=3)
    assert watch.compared > 10


def logged(tmp_path, model, *callbacks, **options):
    """Train, and return what was logged in each batch with a teacher."""
    seen = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch > 0:
                seen.append(float(trainer.callback_metrics["distill_loss"]))

    run(tmp_path, Note(), *callbacks, model=model, pruning=DISTILLED, epochs=3, **options)
    return seen


def seeded(make):
    torch.manual_seed(3)
    return make()


class CompiledForward(Small):
    def __init__(self):
        super().__init__()
        self.forward = torch.compile(self.forward, backend="eager")


@pytest.mark.parametrize("make", [CompiledForward, lambda: torch.compile(Small(), backend="eager")])
def test_the_teacher_of_a_compiled_module_is_the_dense_one(tmp_path, make):
    plain = logged(tmp_path / "plain", seeded(Small))
    assert min(plain) > 1e-4
    assert logged(tmp_path, seeded(make)) == pytest.approx(plain, rel=1e-4)


class InPlace(Small):
    """Writes to its inputs, which are a copy of the batch's."""

    def forward(self, x):
        return super().forward(x.mul_(1.5))

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].clone(), batch[1]], batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0].clone())


class OutOfPlace(InPlace):
    def forward(self, x):
        return Small.forward(self, x * 1.5)


def test_what_a_network_writes_to_its_inputs_is_not_seen_by_the_teacher(tmp_path):
    expected = logged(tmp_path / "plain", seeded(OutOfPlace))
    assert logged(tmp_path, seeded(InPlace)) == expected


class Twice(Small):
    """Calls the network for each half of a batch, and once more without gradients."""

    def training_step(self, batch, batch_idx):
        halves = [self(half) for half in batch[0].chunk(2)]
        with torch.no_grad():
            self(batch[0] * 9)
        return F.cross_entropy(torch.cat(halves), batch[1])


def test_calls_are_averaged_and_those_without_gradients_left_out(tmp_path):
    found = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.dense = getattr(self, "dense", None) or copy.deepcopy(pl_module.state_dict())

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch > 0:
                student, teacher = copy.deepcopy(pl_module).train(), restore(copy.deepcopy(pl_module))
                teacher.load_state_dict(self.dense)
                with torch.no_grad():
                    terms = [divergence(student(x), teacher.eval()(x), 2.0) for x in batch[0].chunk(2)]
                found.append(float(sum(terms) / 2))

    assert logged(tmp_path, Twice(), Watch()) == pytest.approx(found, rel=1e-4)


def test_a_copy_and_a_pickle_have_a_step_of_their_own(tmp_path):
    def look(trainer):
        model = trainer.lightning_module
        assert "training_step" in vars(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.training_step.__self__ is other
            assert other.training_step.__func__ is Small.training_step

    looked = At("on_train_batch_start", 1, 0, look)
    run(tmp_path, looked, pruning=DISTILLED, epochs=2)
    assert looked.done


def test_nothing_is_left_behind_by_an_exception(tmp_path):
    def fail(trainer):
        raise KeyError("any")

    model = Small()
    with pytest.raises(KeyError):
        run(tmp_path, At("on_before_optimizer_step", 1, None, fail), model=model, pruning=DISTILLED)
    assert "training_step" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dense_checkpoint_of_another_run_is_no_teacher(tmp_path):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    run(tmp_path, At("on_train_batch_end", 2, 1, save), pruning=DISTILLED)
    run(tmp_path / "other", scores=(0.7,), pruning=DISTILLED, epochs=2)
    (tmp_path / "other" / "rounds" / "round_0.ckpt").replace(tmp_path / "rounds" / "round_0.ckpt")
    with pytest.raises(RuntimeError, match="dense round .* is of another run, so the model can't be distilled from it"):
        run(tmp_path, pruning=DISTILLED, ckpt_path=path)


class Keeps(Small):
    """Keeps what hangs on a graph until the next epoch, as many do."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def training_step(self, batch, batch_idx):
        self.loss = super().training_step(batch, batch_idx)
        self.kept.append({"loss": self.loss})
        return self.loss

    def on_train_epoch_start(self):
        self.kept.clear()


class RenamesKeys(Small):
    """Saves its weights under other names, and asks the Trainer when it loads them."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{key}": value for key, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        assert self.trainer.max_epochs == 3
        checkpoint["state_dict"] = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}


class AsksItsTrainer(Small):
    def forward(self, x):
        return super().forward(x + 0 * self.trainer.current_epoch)


@pytest.mark.parametrize("make", [Keeps, RenamesKeys, AsksItsTrainer])
def test_what_else_a_module_does_changes_nothing(tmp_path, make):
    expected = logged(tmp_path / "plain", seeded(Small))
    assert logged(tmp_path, seeded(make)) == pytest.approx(expected, rel=1e-5)


class Logs(Small):
    """Logs in its forward."""

    def forward(self, x):
        logits = super().forward(x)
        if self._trainer is not None and self.trainer.training:
            self.log("mean", logits.mean(), on_step=False, on_epoch=True)
        return logits


def test_what_the_teacher_would_log_is_not_logged(tmp_path):
    """The value of an epoch is the average of the network's own, not of both."""
    own, found = [], []

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            student = copy.deepcopy(pl_module).train()
            own.append(student(batch[0]).mean().detach())

        def on_train_epoch_end(self, trainer, pl_module):
            found.append(trainer.callback_metrics["mean"])

    run(tmp_path, Note(), model=Logs(), pruning=DISTILLED, epochs=3)
    torch.testing.assert_close(torch.stack(found), torch.stack(own).reshape(3, -1).mean(1))


def test_a_step_that_is_skipped_stays_skipped(tmp_path):
    class Skips(Small):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    losses = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs)

    _, callback, _ = run(tmp_path, Note(), model=Skips(), pruning=DISTILLED, epochs=3)
    assert len(callback.removed) == 2
    assert [not loss for loss in losses] == [False, True, False] * 3  # Lightning hands on an empty dict


def test_what_the_step_does_to_its_logits_is_not_seen(tmp_path):
    class Halves(Small):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]).div_(2), batch[1])

    class Copies(Small):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]).div(2), batch[1])

    assert logged(tmp_path, seeded(Halves)) == logged(tmp_path / "plain", seeded(Copies))


@pytest.mark.parametrize("given", [[], ["layers.1"]])
def test_the_teacher_has_the_dense_structure_without_a_hook_that_restructures_it(given):
    """Under the callback, what the state dict says of linear activations brings it, too."""
    model = linearize(seeded(Small), given)
    plain, dense = copy.deepcopy(model).eval(), copy.deepcopy(model.state_dict())
    removed = ["layers.3", "layers.5"]
    linearize(model, removed)
    model.layers[0].weight.data += 1
    distillation = DenseTeacher(Distillation(1.0, 2.0))
    distillation.start(model, [f"layers.{index}" for index in (1, 3, 5, 7, 9)], removed, lambda: {"state_dict": dense})
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loss = model.training_step([x, torch.zeros(5, dtype=torch.long)], 0)
    distillation.stop()
    torch.testing.assert_close(loss, divergence(model(x), plain(x), 2.0))
    assert loss > 1e-3


class Elsewhere(Small):
    """Trains by a method that calls no module that holds all activations."""

    def training_step(self, batch, batch_idx):
        x = self.norm(batch[0])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(x, batch[1])


class Strange(Small):
    """Returns what has no logits."""

    def forward(self, x):
        return SimpleNamespace(scores=super().forward(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).scores, batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Replaced(Small):
    def __init__(self):
        super().__init__()
        own = self.forward
        self.forward = lambda x: own(x)


class Reentrant(Small):
    """Recomputes: the first forward is without gradients."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(checkpoint(self, batch[0].requires_grad_(), use_reentrant=True), batch[1])


class OneClass(Small):
    def forward(self, x):
        return super().forward(x)[:, :1]

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Replaced, "computes with the weights that are trained"),
        (Reentrant, "or without gradients.*use_reentrant=False"),
        (OneClass, r"at least two classes, but got \(4, 1\)"),
        (Elsewhere, r"training step of Elsewhere called none of \['its forward', 'layers'\]"),
        (Strange, "a tensor or the `logits` of an output, but the network returned SimpleNamespace"),
    ],
)
def test_what_can_not_be_distilled_is_an_error_and_leaves_nothing_behind(tmp_path, make, message):
    model = make()
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, model=model, pruning=DISTILLED)
    assert "training_step" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_manual_optimization_is_refused_at_the_start(tmp_path):
    model = Small()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`distillation` to be None with manual optimization"):
        run(tmp_path, model=model, pruning=DISTILLED)


def test_sharded_parameters_are_refused():
    trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match="`distillation` to be None under ModelParallelStrategy"):
        DenseTeacher(Distillation()).check(trainer, Small())


def test_a_dense_checkpoint_that_is_gone_is_named(tmp_path):
    class Lose(Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                (tmp_path / "entropy_pruning" / "round_0.ckpt").unlink()

    callback = pruning(**DISTILLED)
    train(Tiny(), callback, Lose(), root=tmp_path, epochs=3)  # it is read once
    saved = tmp_path / "entropy_pruning" / "round_1.ckpt"
    with pytest.raises(FileNotFoundError, match="checkpoint of the dense round .*round_0.ckpt is gone"):
        train(Tiny(), pruning(**DISTILLED), root=tmp_path, epochs=5, ckpt_path=saved)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distillation": "yes"}, TypeError, "`distillation` to be a Distillation, but got 'yes'"),
        ({"distill": True, "weight": 0}, ValueError, "`weight` to be above 0 and at most 1, but got 0"),
        ({"distill": True, "temperature": 0}, ValueError, "`temperature` to be above 0, but got 0"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pruning(**options)


class ExpectedFeatures(Expected):
    """Computes the distance of the features, too."""

    def __init__(self):
        super().__init__()
        self.distances, self.logged_distances = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch == 0:
            return
        student = copy.deepcopy(pl_module).train()
        teacher = restore(copy.deepcopy(pl_module))
        teacher.load_state_dict(self.dense)
        teacher.eval()
        with torch.no_grad():
            x, y = student.norm(batch[0]), teacher.norm(batch[0])
            parts = []
            for number, (mine, its) in enumerate(zip(student.layers, teacher.layers, strict=True)):
                x, y = mine(x), its(y)
                if number % 2 and type(mine) is type(its):  # an activation that is one still
                    parts.append((x - y).square().mean() / y.var(correction=0))
        self.distances.append(torch.stack(parts).mean())
        self.losses[-1] += 0.5 * self.distances[-1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.current_epoch > 0:
            self.logged_distances.append(trainer.callback_metrics["feature_loss"])


@pytest.mark.parametrize("make", [Small, Checkpointed])
def test_the_distance_of_features_is_added_as_written_by_hand(tmp_path, make):
    watch = ExpectedFeatures()
    torch.manual_seed(0)
    model, callback, _ = run(tmp_path, watch, model=make(), pruning=DISTILLED | {"features": 0.5}, epochs=3)
    assert len(callback.removed) == 2
    assert len(watch.logged_distances) == 6
    for logged, expected in zip(watch.logged_distances, watch.distances, strict=True):
        torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-6)
    assert float(max(watch.logged_distances)) > 1e-4
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_that_follows_features_is_resumed_as_if_it_had_not_been_interrupted(tmp_path):
    path = tmp_path / "saved.ckpt"

    def save(trainer):
        trainer.save_checkpoint(path)
        stop(trainer)

    options = {"scores": (0.9, 0.9, 0.1, 0.9), "pruning": DISTILLED | {"max_rejections": 3, "features": 2.0}}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path, At("on_train_batch_end", 2, 1, save), **options)
    resumed = run(tmp_path, ckpt_path=path, **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))
    without = run(tmp_path / "without", **options | {"pruning": options["pruning"] | {"features": 0.0}})
    assert any(
        not torch.equal(a, b)
        for a, b in zip(whole[0].parameters(), without[0].parameters(), strict=True)
        if a.shape == b.shape
    )
