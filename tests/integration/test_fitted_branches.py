"""Rounds in which branches of additions go, and operators take the places of whole blocks."""

import logging
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import FitChains, collapse, load_pruned
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.stand_in import Bypass, InPlaceOfBlock
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.tiny import assert_equal_states
from tests.integration.transformer import Transformer

BY_LINEARITY = {"blocks": True, "criterion": "linearity"}


class Seen(FitChains):
    """Keeps what it has proposed."""

    proposals: list = []  # noqa: RUF012

    def propose(self, model, evidence):
        self.proposals.append(super().propose(model, evidence))
        return self.proposals[-1]


class ByHand(Callback):
    """Measures itself, in float64, what zeros in the place of each branch would change of the sum after it."""

    def __init__(self):
        self.shares = {}

    def on_train_epoch_end(self, trainer, pl_module):
        if self.shares:
            return
        outputs, sums, handles = {}, {}, []

        def keep(found, name, value):
            found.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).double())

        pl_module.eval()
        for place, layer in enumerate(pl_module.layers):
            for name, branch in (("attention", layer.attention), ("mlp", layer.mlp)):
                full = f"layers.{place}.{name}"
                handles.append(branch.register_forward_hook(lambda m, a, o, full=full: keep(outputs, full, o)))
            attention, mlp = f"layers.{place}.attention", f"layers.{place}.mlp"
            handles.append(layer.norm2.register_forward_pre_hook(lambda m, a, full=attention: keep(sums, full, a)))
            handles.append(layer.register_forward_hook(lambda m, a, o, full=mlp: keep(sums, full, o)))
        with torch.no_grad():
            for batch in trainer.val_dataloaders:
                pl_module(batch[0])
        for handle in handles:
            handle.remove()
        pl_module.train()
        for name, computed in outputs.items():
            f, total = (torch.cat(each).flatten(0, -2) for each in (computed, sums[name]))
            self.shares[name] = float(f.square().sum() / (total - total.mean(0)).square().sum())


@pytest.mark.parametrize("torchs", [False, True])
def test_a_branch_is_compared_with_the_sum_that_it_is_added_to(tmp_path, torchs):
    Seen.proposals, by_hand = [], ByHand()
    _, callback, _ = run(tmp_path, by_hand, model=Transformer(torchs=torchs), method=Seen, pruning=BY_LINEARITY)
    first = Seen.proposals[0]
    ways = {block["name"]: {way["kind"]: way for way in block["ways"]} for block in first.blocks}
    zeros = {name: kinds["zeros"]["unexplained"] for name, kinds in ways.items() if "zeros" in kinds}
    assert zeros == pytest.approx(by_hand.shares, rel=1e-4)
    assert set(ways) - set(zeros) == {"layers.0", "layers.1"}
    for block in first.blocks:  # the cheapest of those that represent it nearly as well as the best
        name, kinds = block["name"], ways[block["name"]]
        assert set(kinds) - {"zeros", "identity"} == {"linear", "low-rank", "affine"}
        assert first.ranks[name] == kinds[block["chosen"]]["unexplained"]
        least = min(way["unexplained"] for way in kinds.values())
        good = [way for way in kinds.values() if way["unexplained"] <= least + 0.02]
        assert kinds[block["chosen"]]["saving"] == max(way["saving"] for way in good)
    assert callback.rounds[1].chosen == [min(first.ranks, key=first.ranks.__getitem__)]


class Outputs(Callback):
    """What the model computes in eval mode right before an operation and right after it."""

    def __init__(self, x):
        self.x, self.before, self.after = x, None, None

    def on_train_epoch_end(self, trainer, pl_module):
        self.before = self.before if trainer.current_epoch else self.of(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.after = self.of(pl_module)
            held = sorted(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])
            assert held == sorted(id(p) for p in pl_module.parameters())

    def of(self, model):
        with torch.no_grad():
            output = model.eval()(self.x)
        model.train()
        return output


def linear_mlp(matrix):
    """Return an MLP whose activation is never off, so that it multiplies by a matrix."""
    width = len(matrix)
    mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    with torch.no_grad():
        mlp[0].weight.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
        mlp[0].bias.fill_(9.0)
        mlp[2].weight.copy_(torch.cat([matrix, -matrix], 1) / 2)
    return mlp


MATRICES = {
    "zeros": torch.zeros(4, 4),
    "affine": torch.tensor([1.0, 2.0, -1.0, 0.5]).diag(),
    "low-rank": torch.tensor([[1.0], [-2.0], [0.5], [1.0]]) @ torch.tensor([[0.5, 1.0, 2.0, -1.0]]),
    "linear": torch.tensor([[1.0, 2, 0, 0], [0, 1, -1, 0], [2, 0, 1, 1], [0, 3, 0, -1]]),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_what_takes_the_place_of_a_branch_computes_what_it_did(tmp_path, kind):
    def model(lr=0.0):
        made = Transformer(lr=lr)
        made.layers[0].mlp = linear_mlp(MATRICES[kind])
        if kind == "zeros":
            nn.init.zeros_(made.layers[0].mlp[2].bias)
        return made.double()

    x = torch.randn(7, 4, dtype=torch.float64)
    outputs = Outputs(x)
    options = {"method": FitChains, "epochs": 2, "precision": "64-true"}
    pruned, callback, _ = run(
        tmp_path, outputs, model=model(), pruning=BY_LINEARITY | {"include": "layers.0.mlp"}, **options
    )
    assert callback.removed == ["layers.0.mlp"]
    said = "the branch was taken out" if kind == "zeros" else f"{kind} in place of the block, 100.0% explained"
    assert callback.rounds[1].notes == {"layers.0.mlp": [said]}
    torch.testing.assert_close(outputs.after, outputs.before, atol=1e-6, rtol=1e-6)
    pruned.eval()
    loaded = load_pruned(model(), callback.last_good).eval()
    assert torch.equal(loaded(x), pruned(x))
    assert loaded.state_dict().keys() == pruned.state_dict().keys()
    result = collapse(pruned, x, objective="macs")
    torch.testing.assert_close(result.model(x), pruned(x))
    assert not stand_ins(result.model)
    assert not any(isinstance(part, Bypass | InPlaceOfBlock) for part in result.model.modules())
    saved = {"zeros": 76, "affine": 68, "low-rank": 64, "linear": 56}[kind]  # of 76
    assert number_of(result.model) <= number_of(model()) - saved
    trained, callback, trainer = run(
        tmp_path / "trained", model=model(0.01), pruning=BY_LINEARITY | {"include": "layers.0.mlp"}, **options
    )
    if kind != "zeros":
        (stand_in,) = stand_ins(trained).values()
        assert all(trainer.optimizers[0].state[p]["step"] == 3 for p in stand_in.parameters()), "it was trained"


def number_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Images(Small):
    """A residual block as torchvision's, on maps of 3 × 4 × 5, whose activations are never off."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.relu = nn.ReLU(inplace=True)
            self.conv2, self.bn2 = nn.Conv2d(6, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
            with torch.no_grad():
                self.conv2.weight *= torch.tensor([0.0, 1.0, 0.0]).outer(torch.tensor([0.0, 1.0, 0.0]))
                self.bn1.bias.fill_(20.0)
                self.bn2.bias.fill_(40.0)

        def forward(self, x):
            identity = x
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += identity
            return self.relu(out)

    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        torch.manual_seed(0)
        stem = [nn.Linear(4, 60), nn.Sigmoid(), nn.Unflatten(1, (3, 4, 5))]
        self.layers = nn.Sequential(*stem, self.Block(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(12, 2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_convolution_takes_the_place_of_a_residual_block_and_its_skip(tmp_path):
    x = torch.randn(3, 4, dtype=torch.float64)
    outputs = Outputs(x)
    options = {"pruning": BY_LINEARITY | {"gain": "macs", "include": "layers.3"}, "precision": "64-true"}
    model, callback, _ = run(tmp_path, outputs, model=Images().double(), method=FitChains, epochs=2, **options)
    assert callback.rounds[1].notes == {"layers.3": ["convolution in place of the block, 100.0% explained"]}
    torch.testing.assert_close(outputs.after, outputs.before, atol=1e-6, rtol=1e-6)
    model.eval()
    assert torch.equal(load_pruned(Images().double(), callback.last_good).eval()(x), model(x))
    result = collapse(model, x)
    torch.testing.assert_close(result.model(x), model(x))
    assert not stand_ins(result.model)


class InOrder(FitChains):
    """A branch, then the block around it, then a branch of the next."""

    def select(self, ranks, count):
        wanted = [name for name in ("layers.0.mlp", "layers.0", "layers.1.attention") if name in ranks]
        return wanted[:1] or super().select(ranks, count)


def held_by(trainer):
    return sorted(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])


@pytest.mark.parametrize("scores", [(0.9, 0.1), (0.9, 0.9, 0.1), (0.9, 0.9, 0.9, 0.1)])
def test_an_operator_comes_back_with_the_block_around_it(tmp_path, scores):
    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == len(scores) - 2:  # the last round that is kept
                self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

        def on_train_batch_start(self, trainer, pl_module, *_):
            assert held_by(trainer) == sorted(id(p) for p in pl_module.parameters())

    kept = Keeps()
    model, callback, trainer = run(
        tmp_path, kept, model=Transformer(scores), method=InOrder, pruning=BY_LINEARITY, epochs=len(scores)
    )
    expected = ["layers.0.mlp", "layers.0", "layers.1.attention"][: len(scores) - 1]
    assert [this.chosen for this in callback.rounds] == [[], *([name] for name in expected)]
    assert [this.accepted for this in callback.rounds] == [score > 0.5 for score in scores]
    assert callback.removed == expected[:-1]
    assert list(stand_ins(model)) == expected[-2:-1]
    assert_equal_states(dict(model.state_dict()), kept.state)
    assert held_by(trainer) == sorted(id(p) for p in model.parameters())
    if len(scores) > 2:
        x = torch.randn(5, 4)
        assert torch.equal(load_pruned(Transformer(), callback.last_good).eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("scores", "moment"),
    [
        ((0.9, 0.9, 0.9, 0.9), ("on_validation_batch_end", 1, None)),
        ((0.9, 0.9, 0.1, 0.9), ("on_train_batch_end", 2, 1)),  # the block comes back, with the operator in it
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, scores, moment):
    options = {"method": InOrder, "pruning": BY_LINEARITY | {"max_rejections": 2}, "epochs": 4}
    whole = run(tmp_path / "whole", model=Transformer(scores), **options)
    assert [this.accepted for this in whole[1].rounds[:3]] == [True, True, scores[2] > 0.5]
    assert whole[1].rounds[2].chosen == ["layers.0"]
    saver = At(*moment, lambda trainer: (trainer.save_checkpoint(tmp_path / "saved.ckpt"), stop(trainer)))
    run(tmp_path, saver, model=Transformer(scores), **options)
    resumed = run(tmp_path, model=Transformer(scores), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_a_model_whose_blocks_had_something_gone_inside_takes_up_every_earlier_round(tmp_path):
    """As it is in a notebook, where a run leaves its model."""
    options = {"method": InOrder, "pruning": BY_LINEARITY | {"include": "layers.0*"}, "epochs": 4}
    after_each = ModelCheckpoint(tmp_path / "epochs", save_top_k=-1, filename="{epoch}")
    model, callback, trainer = run(tmp_path, after_each, model=Transformer(), **options)
    assert callback.removed == ["layers.0.mlp", "layers.0"]
    whole = outcome(model, callback, trainer)
    x = torch.randn(5, 4)
    for number in range(3):
        path = tmp_path / "rounds" / f"round_{number}.ckpt"
        expected = load_pruned(Transformer(), path).eval()(x)
        assert torch.equal(load_pruned(deepcopy(model), path).eval()(x), expected)
        validated = deepcopy(model)
        trainer.validate(validated, DataLoader(TensorDataset(x, torch.zeros(5).long())), path, verbose=False)
        assert torch.equal(validated.eval()(x), expected)
    resumed = run(tmp_path, model=deepcopy(model), ckpt_path=tmp_path / "epochs" / "epoch=0.ckpt", **options)
    assert_equal_states(outcome(*resumed), whole)


def test_what_goes_in_one_round_does_not_overlap(tmp_path):
    _, callback, _ = run(
        tmp_path, model=Transformer(), method=FitChains, epochs=2, pruning=BY_LINEARITY | {"removals": 8}
    )
    chosen = callback.rounds[1].chosen
    assert len(chosen) > 1
    assert not any(name.startswith(f"{other}.") for name in chosen for other in chosen)


def test_include_and_exclude_choose_branches_by_their_names(tmp_path):
    for include, exclude in (("layers.1.attention", None), (None, ["layers.0*", "layers.1", "layers.1.mlp*"])):
        _, callback, _ = run(
            tmp_path / str(include), model=Transformer(), method=FitChains, epochs=3,
            pruning=BY_LINEARITY | {"include": include, "exclude": exclude},
        )  # fmt: skip
        assert callback.removed == ["layers.1.attention"]


def test_by_entropy_a_branch_is_what_its_activations_are_and_none_is_left_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, callback, _ = run(tmp_path, model=Transformer(), method=FitChains, pruning={"blocks": True, "dry_run": True})
    rows = {each.name: each for each in callback.listed.blocks}
    assert list(rows) == [f"layers.{place}{name}" for place in (0, 1) for name in ("", ".attention", ".mlp")]
    for place in (0, 1):
        attention = rows[f"layers.{place}.attention"]
        assert attention.chosen is None
        assert attention.reason == "no activation was measured in it, which tells what it is worth"
        assert rows[f"layers.{place}.mlp"].chosen is not None
    assert [each.name for each in callback.listed.candidates] == ["layers.0.mlp.1", "layers.1.mlp.1"]
    assert "| layers.0.attention | Attention | layers.0 | - | zeros (" in caplog.text
    assert "no activation was measured in it" in caplog.text


class Wide(Transformer):
    """The attention of one layer is scaled before it is added."""

    class Scaled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.scale = layer, nn.Parameter(torch.full((4,), 0.3))

        def forward(self, x):
            x = x + self.scale * self.layer.attention(self.layer.norm1(x))
            return x + self.layer.mlp(self.layer.norm2(x))

    def __init__(self, **options):
        super().__init__(**options)
        self.layers[1] = self.Scaled(self.layers[1])


def test_a_dry_run_lists_blocks_what_would_take_their_places_and_why_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = Wide()
    pruning = BY_LINEARITY | {"gain": "macs", "dry_run": True}
    _, callback, _ = run(tmp_path, model=model, method=FitChains, pruning=pruning)
    rows = {each.name: each for each in callback.listed.blocks}
    assert rows["layers.0"].inside is None
    assert rows["layers.0.mlp"].inside == "layers.0"
    assert (
        rows["layers.1.layer.attention"].reason
        == "it is scaled, its axes are exchanged, or something else is done to it, before it is added"
    )
    assert rows["layers.1.layer.attention"].ways == ()
    mlp = {way.kind: way for way in rows["layers.0.mlp"].ways}
    macs = 6 * 3 * 2 * 4 * 8  # batch, tokens, two layers
    assert (mlp["zeros"].saving, mlp["linear"].saving) == (macs, macs - 6 * 3 * 4 * 4)
    assert mlp["linear"].price == macs
    text = str(callback.listed)
    assert text in caplog.text
    assert "**Blocks and branches that may go whole**" in text
    assert "| layers.0.mlp | Sequential | layers.0 |" in text
    assert f"saves {macs:,} MACs, 100%)" in text
    assert "| layers.1.layer.attention | Attention | layers.1 | - | - | it is scaled" in text
    assert callback.listed.to_dict()["blocks"][0]["ways"][0]["objective"] == "macs"
    assert not stand_ins(model)


def test_an_operator_in_the_place_of_a_frozen_block_is_not_trained(tmp_path):
    model = Transformer()
    model.layers[0].mlp.requires_grad_(False)
    model, _, trainer = run(
        tmp_path, model=model, method=FitChains, epochs=2, pruning=BY_LINEARITY | {"include": "layers.0.mlp"}
    )
    (stand_in,) = stand_ins(model).values()
    own = list(stand_in.parameters())
    assert own
    assert not any(p.requires_grad for p in own)
    assert not {id(p) for p in own} & set(held_by(trainer))
