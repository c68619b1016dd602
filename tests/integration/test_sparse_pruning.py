"""NEPENTHE in a Trainer: weights go, masks hold, activations that do not switch become linear, runs survive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import (
    EntropyGuidedPruningCallback,
    Files,
    Measuring,
    Sparsify,
    collapse,
    load_pruned,
    measure_entropy,
)
from lightning_easier.collapsing.engine import is_collapsed
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.masking import Masks, unpacked
from tests.integration.interrupted import At, Small, outcome, run, stop, uninterrupted
from tests.integration.tiny import Tiny, assert_equal_states, train

PRUNED = {"method": Sparsify}


def zeros(model):
    return {name: int((value == 0).sum()) for name, value in model.named_parameters() if value.ndim > 1}


def masks_of(callback, number):
    """Return what a round of a run has pruned, from its checkpoint."""
    record = torch.load(callback.last_good.parent / f"round_{number}.ckpt", weights_only=True)
    (state,) = record["callbacks"].values()
    (plain,) = [each for each in state["operations"] if each["kind"] == "masks"]
    return plain["pruned"]


class Settled(LightningModule):
    """Five activations, of which some do not switch: their biases are far from zero."""

    def __init__(self, scores=(0.9,), activation="ReLU"):
        super().__init__()
        self.save_hyperparameters()
        make = getattr(nn, activation)
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), make(), nn.Conv2d(4, 4, 3, padding=1), make(),
            nn.Conv2d(4, 4, 3, padding=1), make(), nn.Flatten(), nn.Linear(4 * 30, 6), make(), nn.Linear(6, 2),
        )  # fmt: skip
        self.scores = scores
        with torch.no_grad():
            self.body[3].bias.fill_(9.0)  # always ON
            self.body[5].weight.mul_(0.05)
            self.body[5].bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))  # a mixture
            self.body.eval()
            self.body[8].bias.sub_(self.body[:9](images()[0]).mean(0))  # the last one switches
            self.body.train()

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def images(count=12):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 2, 5, 6, generator=generator), torch.arange(count) % 2


def fit(model, callback, root, epochs=3, *callbacks, **options):
    data = TensorDataset(*images())
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=[callback, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, 4), DataLoader(data, 6))
    return trainer


def test_a_run_prunes_round_by_round_and_goes_back(tmp_path):
    model, callback, _ = run(tmp_path, scores=(0.9, 0.9, 0.9, 0.1), pruning={"amount": 0.25}, epochs=4, **PRUNED)
    assert [this.accepted for this in callback.rounds[:4]] == [True, True, True, False]
    assert [this.chosen for this in callback.rounds[1:4]] == [["weights"]] * 3
    first, second = (masks_of(callback, number) for number in (1, 2))
    total = sum(zeros(model).values())
    for name, bits in second.items():
        weight = model.get_parameter(name)
        mask = unpacked(bits, weight.shape)
        assert bool((weight[mask] == 0).all())
        assert bool(mask[unpacked(first[name], weight.shape)].all())  # those of the first round among them
    assert total == sum(int(unpacked(bits, model.get_parameter(n).shape).sum()) for n, bits in second.items())
    assert "% of" in str(callback.report())


def test_the_budget_of_a_round_is_a_share_of_what_is_left(tmp_path):
    model, callback, _ = run(tmp_path, pruning={"amount": 0.25, "variant": "uniform", "guard": 1e9}, epochs=3, **PRUNED)
    fed = {name: model.get_parameter(name).numel() for name in masks_of(callback, 2)}
    assert set(fed) == {f"layers.{place}.weight" for place in (0, 2, 4, 6, 8)}  # the head, layers.10, takes no part
    once = {name: size // 4 for name, size in fed.items()}
    twice = {name: once[name] + (size - once[name]) // 4 for name, size in fed.items()}
    assert {name: zeros(model)[name] for name in fed} == twice
    assert zeros(model)["layers.10.weight"] == 0
    assert list(stand_ins(model)) == []
    loaded = load_pruned(Small, callback.last_good)
    assert_equal_states(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}]
)
def test_masks_hold_through_any_optimizer(tmp_path, optimizer, options):
    probe = optimizer([nn.Parameter(torch.ones(1))])
    if options and (isinstance(probe, torch.optim.LBFGS) or probe.defaults.get("fused")):
        pytest.skip("Lightning neither clips for LBFGS nor for fused optimizers under AMP")
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(sum(zeros(pl_module).values()))

    class Other(Small):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    torch.manual_seed(3)
    _, callback, _ = run(
        tmp_path,
        Count(),
        model=Other(),
        epochs=2,
        pruning={"amount": 0.5, "exclude": ["layers.3"]},
        **PRUNED,
        **options,
    )
    (note,) = [note for note in callback.rounds[1].notes["weights"] if "pruned" in note]
    assert int(note.split()[0].replace(",", "")) > 50
    assert seen[3:] == [int(note.split()[0].replace(",", ""))] * 3


@pytest.mark.parametrize(
    "moment", [("on_train_batch_end", 2, 1), ("on_train_epoch_end", 1, None), ("on_validation_end", 2, None)]
)
@pytest.mark.parametrize("on", ["validation", "training"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, tmp_path_factory, moment, on):
    options = {"epochs": 5, "pruning": {"amount": 0.4, "on": on, "guard": 0.5}, **PRUNED}

    def model():
        torch.manual_seed(3)
        return Small((0.9, 0.9, 0.9, 0.1, 0.9))

    whole = uninterrupted(tmp_path_factory, f"sparse, {on}", lambda root: run(root, model=model(), **options))
    saver = At(*moment, lambda trainer: (trainer.save_checkpoint(tmp_path / "saved.ckpt"), stop(trainer)))
    run(tmp_path, saver, model=model(), **options)
    resumed = run(tmp_path, model=model(), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))
    accepted = [True, True, True, False] if on == "validation" else [True, True, True]
    assert [this.accepted for this in whole[1].rounds[:4]] == accepted


@pytest.mark.parametrize("activation", ["ReLU", "LeakyReLU", "PReLU"])
def test_what_does_not_switch_becomes_linear_and_no_score_moves(tmp_path, activation):
    torch.manual_seed(0)
    model = Settled(activation=activation).double()
    data, _ = images()
    data = data.double()
    entropies = measure_entropy(model, [data])
    assert [name for name, value in entropies.items() if value == 0] == ["body.4", "body.6"]
    expected = model.eval()(data)
    callback = EntropyGuidedPruningCallback("score", amount=0.5, files=Files(dirpath=tmp_path))
    fit(model.float(), callback, tmp_path, 1)  # one round: what is linear is settled when the run has ended
    assert list(stand_ins(model)) == callback.removed == ["body.4", "body.6"]
    assert [this.chosen for this in callback.rounds] == [[], ["linear"]]
    this = callback.rounds[1]
    assert (this.accepted, this.score_after, this.reason) == (
        True,
        callback.rounds[0].score_after,
        "exact, and not trained",
    )
    assert torch.allclose(model.double().eval()(data), expected, rtol=1e-9, atol=1e-9)
    loaded = load_pruned(Settled(activation=activation), callback.last_good).double().eval()
    assert torch.equal(loaded(data), model(data))
    result = collapse(loaded, data, objective="depth")
    assert torch.allclose(result.model(data), expected, rtol=1e-9, atol=1e-9)
    assert ("body.4", "body.5", "body.6") in [merge.operators for merge in result.report.merges]


def test_what_was_measured_while_it_was_trained_is_not_done_without_a_judgement(tmp_path):
    model = Settled()
    measuring = Measuring(on="training")
    fit(model, EntropyGuidedPruningCallback("score", measuring=measuring, files=Files(dirpath=tmp_path)), tmp_path, 1)
    assert list(stand_ins(model)) == []


def test_a_mixture_is_a_scale_of_one_or_zero(tmp_path):
    model = Settled()
    fit(model, EntropyGuidedPruningCallback("score", files=Files(dirpath=tmp_path)), tmp_path, 1)
    assert model.body[4].weight.tolist() == [1, 1, 1, 1]
    assert model.body[6].weight.tolist() == [1, 0, 1, 0]
    assert not model.body[6].bias.any()


def test_an_activation_without_pieces_becomes_the_closest_affine_in_a_round_of_its_own_right(tmp_path):
    """Not exact: so it is judged, and not settled at the end of the run."""
    model = Settled(activation="GELU")
    callback = EntropyGuidedPruningCallback("score", amount=0.5, files=Files(dirpath=tmp_path))
    fit(model, callback, tmp_path, 1)
    assert (len(callback.rounds), list(stand_ins(model))) == (1, [])
    model = Settled(activation="GELU")
    callback = EntropyGuidedPruningCallback("score", amount=0.5, files=Files(dirpath=tmp_path / "more"))
    fit(model, callback, tmp_path / "more", 2)
    assert list(stand_ins(model)) == ["body.4", "body.6"]
    assert any("not exactly" in note and "% explained" in note for note in callback.rounds[1].notes["weights"])


def test_a_guard_asks_for_a_margin(tmp_path):
    for guard, linear in ((1.0, ["body.4", "body.6"]), (1000.0, [])):
        model = Settled()
        files = Files(dirpath=tmp_path / str(guard))
        fit(model, EntropyGuidedPruningCallback("score", guard=guard, files=files), tmp_path, 1)
        assert list(stand_ins(model)) == linear


def test_what_is_linear_is_settled_after_a_round_was_taken_back(tmp_path):
    model = Settled(scores=(0.9, 0.1))
    callback = EntropyGuidedPruningCallback("score", tolerance=0.1, files=Files(dirpath=tmp_path))
    fit(model, callback, tmp_path, 5)
    assert [(this.chosen, this.accepted) for this in callback.rounds] == [
        ([], True), (["weights"], False), (["linear"], True),
    ]  # fmt: skip
    assert sum(zeros(model).values()) == 0
    assert list(stand_ins(model)) == ["body.4", "body.6"]


def test_what_was_trained_since_it_was_measured_is_not_settled(tmp_path):
    """Validation may end before the epoch does, and `min_epochs` trains on when pruning is over."""
    model = Settled()
    callback = EntropyGuidedPruningCallback("score", files=Files(dirpath=tmp_path))
    fit(model, callback, tmp_path, 1, val_check_interval=2)  # of three batches
    assert (len(callback.rounds), list(stand_ins(model))) == (1, [])
    model = Settled(scores=(0.9, 0.1))
    callback = EntropyGuidedPruningCallback("score", tolerance=0.1, files=Files(dirpath=tmp_path / "more"))
    fit(model, callback, tmp_path, 5, min_epochs=4)
    assert [this.accepted for this in callback.rounds] == [True, False]
    assert list(stand_ins(model)) == []


class Rereads(Settled):
    """Reads what its activation has worked on in place."""

    def __init__(self, inplace, scores=(0.9,)):
        super().__init__(scores)
        self.body[4] = nn.ReLU(inplace)

    def forward(self, x):
        for place in range(4):
            x = self.body[place](x)
        x = self.body[4](x) + 2 * x
        for place in range(5, 11):
            x = self.body[place](x)
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_that_writes_into_what_is_read_again_is_not_exact(tmp_path, inplace):
    torch.manual_seed(0)
    model = Rereads(inplace)
    with torch.no_grad():
        model.body[3].bias.fill_(-9.0)  # always OFF
    data, _ = images()
    expected = model.eval()(data)
    callback = EntropyGuidedPruningCallback("score", include="body.4", files=Files(dirpath=tmp_path))
    fit(model.train(), callback, tmp_path, 1)
    assert list(stand_ins(model)) == ([] if inplace else ["body.4"])
    torch.testing.assert_close(model.eval()(data), expected, rtol=0, atol=1e-2)  # but for batch norm's statistics
    model, callback = Rereads(inplace), EntropyGuidedPruningCallback("score", files=Files(dirpath=tmp_path / "more"))
    fit(model, callback, tmp_path / "more", 2)
    assert any("may work in place" in note for note in callback.rounds[1].notes["weights"]) == inplace


class ByHand(Small):
    """Changes its weights without an optimizer."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.01)


def test_masks_hold_before_a_model_is_judged_and_saved_whatever_has_changed_it(tmp_path):
    torch.manual_seed(3)
    model, callback, _ = run(tmp_path, model=ByHand(), epochs=2, pruning={"amount": 0.5, "guard": 1e9}, **PRUNED)
    for name, bits in masks_of(callback, 1).items():
        assert bool((model.get_parameter(name)[unpacked(bits, model.get_parameter(name).shape)] == 0).all())


def test_frozen_weights_and_parameters_without_elements_are_left_alone(tmp_path):
    torch.manual_seed(3)
    model = Small()
    model.layers[2].weight.requires_grad_(False)
    model.empty = nn.Linear(4, 0)
    run(tmp_path, model=model, epochs=2, pruning={"amount": 0.5}, **PRUNED)
    assert zeros(model)["layers.2.weight"] == 0 < zeros(model)["layers.0.weight"]


def test_a_collapsed_model_is_known_after_it_was_copied_and_saved(tmp_path):
    model = collapse(Settled().body.eval(), images()[0], objective="macs").model
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert is_collapsed(again)
    assert not is_collapsed(Settled())


def test_a_run_goes_on_after_it_was_settled(tmp_path):
    model = Settled()
    callback = EntropyGuidedPruningCallback("score", amount=0.5, files=Files(dirpath=tmp_path))
    trainer = fit(model, callback, tmp_path, 1)
    trainer.fit_loop.max_epochs = 3
    data = TensorDataset(*images())
    trainer.fit(model, DataLoader(data, 4), DataLoader(data, 6))
    assert [this.chosen for this in callback.rounds[:3]] == [[], ["linear"], ["weights"]]
    assert list(stand_ins(model))[:2] == ["body.4", "body.6"]
    assert sum(zeros(model).values()) > 0


def test_what_counts_as_removed_are_activations_and_not_rounds(tmp_path):
    removed = []

    class Note(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                removed.append((int(trainer.callback_metrics["removed"]), len(stand_ins(pl_module))))

    model, callback, trainer = run(tmp_path, Note(), pruning={"amount": 0.3}, epochs=4, **PRUNED)
    assert all(logged == there for logged, there in removed)
    assert removed[0] == (0, 0)
    assert removed[-1][0] > 0
    assert [this.chosen for this in callback.rounds[1:4]] == [["weights"]] * 3
    assert int(trainer.callback_metrics["removed"]) == len(stand_ins(model)) == len(callback.removed)


def test_sparsity_is_logged(tmp_path):
    logged = {}

    class Note(Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    model, _, _ = run(tmp_path, Note(), pruning={"amount": 0.5}, epochs=2, **PRUNED)
    weights = {name: value for name, value in model.named_parameters() if value.ndim > 1}
    for name, value in weights.items():
        assert logged[f"weight_sparsity/{name}"] == pytest.approx(float((value == 0).float().mean()))
    whole = sum(int((value == 0).sum()) for value in weights.values()) / sum(
        value.numel() for value in weights.values()
    )
    assert logged["sparsity"] == pytest.approx(whole)
    assert logged["emptied"] >= 0


@pytest.mark.parametrize("variant", ["nepenthe", "egp", "magnitude", "uniform"])
def test_a_way_is_left_from_input_to_output(tmp_path, variant):
    model, callback, _ = run(tmp_path, pruning={"amount": 0.95, "variant": variant}, epochs=6, **PRUNED)
    x = torch.randn(64, 4)
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, nn.Linear):  # what is left may be OFF: a way is a matter of weights alone
                layer.weight.abs_()
                layer.bias.abs_()
        out = model.eval().layers(x.abs())
    assert float(out.std(0).max()) > 0
    assert any("held back" in note for this in callback.rounds[1:] for note in this.notes["weights"])


def test_the_head_and_shortcuts_take_no_part(tmp_path):
    class Residual(Tiny):
        def __init__(self):
            super().__init__()
            self.shortcut = nn.Conv2d(8, 8, 1)
            self.inner, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.act5, self.act6 = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            x = self.act1(self.bn(self.conv(x)))
            x = self.act6(self.shortcut(x) + self.last(self.act5(self.inner(x)))).flatten(1)
            return self.fc4(self.act4(self.fc3(F.relu(self.fc2(self.act2(self.fc1(x)))))))

    model = Residual()
    callback = EntropyGuidedPruningCallback("val_acc", tolerance=1.0, variant="uniform", files=Files(dirpath=tmp_path))
    train(model, callback, root=tmp_path, epochs=2)
    pruned = {name for name, count in zeros(model).items() if count}
    assert pruned == {"conv.weight", "inner.weight", "last.weight", "fc1.weight", "fc2.weight", "fc3.weight"}


def test_zeros_of_an_earlier_run_stay_where_that_is_asked_for(tmp_path):
    options = {"amount": 0.3, "guard": 1e9}
    first, _, _ = run(tmp_path / "first", epochs=2, pruning=options, **PRUNED)
    pruned = zeros(first)
    assert sum(pruned.values()) > 0
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(zeros(pl_module))

    for keep in (True, False):
        again, name = copy.deepcopy(first), f"keep {keep}"
        saver = At("on_train_batch_end", 0, 1, lambda t, name=name: t.save_checkpoint(tmp_path / f"{name}.ckpt"))
        run(tmp_path / name, Count(), saver, model=again, epochs=1, pruning={**options, "keep_zeros": keep}, **PRUNED)
    assert seen[:3] == [pruned] * 3
    assert sum(seen[3].values()) < sum(pruned.values())
    seen.clear()
    run(tmp_path / "resumed", Count(), model=copy.deepcopy(first), epochs=1, pruning={**options, "keep_zeros": True},
        ckpt_path=tmp_path / "keep True.ckpt", **PRUNED)  # fmt: skip
    assert seen == [pruned]


# What is refused


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_an_amount_out_of_range_is_refused(amount):
    with pytest.raises(ValueError, match="argument `amount`"):
        EntropyGuidedPruningCallback("score", amount=amount)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="`amount` to be a number, but got '0.5'"):
        Sparsify(amount="0.5")
    with pytest.raises(ValueError, match="`variant` to be one of"):
        Sparsify(variant="lottery")
    with pytest.raises(ValueError, match="`guard` to be finite and at least 0"):
        Sparsify(guard=-1.0)
    with pytest.raises(ValueError, match="`importance` to be 'layer' with variant='uniform'"):
        Sparsify(variant="uniform", importance="neuron")
    with pytest.raises(ValueError, match=r"`sample` of Measuring to be 1.0 with Sparsify, but got 0.5"):
        EntropyGuidedPruningCallback("score", measuring=Measuring(sample=0.5))


def _masked(model):
    torch.nn.utils.prune.l1_unstructured(model.body[3], "weight", 0.5)


def _parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.body[3])


def _quantized(model):
    model.body[8] = torch.ao.nn.quantized.dynamic.Linear(120, 6)


def _collapsed(model):
    model.body = collapse(model.body.eval(), images()[0]).model


def _integer(model):
    model.body[3].weight = nn.Parameter(model.body[3].weight.char(), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_masked, r"weights without masks, but those of `body.3` .*prune.remove"),
        (_parametrized, r"parameters of their own, but those of `body.3` are parametrized"),
        (_quantized, r"not quantized, but `body.8` is a Linear"),
        (_collapsed, r"not collapsed, but `body` is"),
        (_integer, r"floating point, but `body.3.weight` is a Tensor of torch.int8"),
    ],
)
def test_a_model_whose_weights_cant_be_pruned_is_refused_as_it_was(tmp_path, change, message):
    model = Settled()
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        fit(model, EntropyGuidedPruningCallback("score", files=Files(dirpath=tmp_path / "rounds")), tmp_path, 2)
    assert_equal_states({n: v for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}, before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not (tmp_path / "rounds").exists()


class WithoutWeight(Settled):
    def __init__(self):
        super().__init__()
        self.first = nn.ReLU()

    def forward(self, x):
        return self.body(self.first(x))


def test_an_activation_without_weights(tmp_path):
    """Named it is refused; else it is left out, with a warning."""
    callback = EntropyGuidedPruningCallback("score", include=["first", "body.2"], files=Files(dirpath=tmp_path))
    with pytest.raises(ValueError, match="weights before them, which can be pruned, but `first` have none"):
        fit(WithoutWeight(), callback, tmp_path, 2)
    callback = EntropyGuidedPruningCallback("score", files=Files(dirpath=tmp_path))
    with pytest.warns(UserWarning, match="No weights are pruned before `first`"):
        fit(WithoutWeight(), callback, tmp_path, 2)
    assert callback.rounds[1].chosen == ["weights"]


def test_masks_of_another_model_are_refused():
    masks = Masks([], {}, pruned={"0.weight": torch.zeros(3, dtype=torch.uint8)})
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"shape \(4, 4\) to have 2 bytes, but got \(3,\)"):
        masks.apply(model)
    with pytest.raises(ValueError, match="to have a parameter '1.weight', of which weights were pruned"):
        Masks([], {}, pruned={"0.weight": torch.full((2,), 255, dtype=torch.uint8), "1.weight": torch.ones(1)}).apply(
            model
        )
    assert torch.equal(model[0].weight, before)
