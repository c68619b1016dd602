"""Rounds in which whole blocks go among the chains that fitted operators take the places of."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_easier import FitChains, load_pruned
from lightning_easier.collapsing.fit import block_fits
from lightning_easier.collapsing.fit.block_fits import BlockProbe
from lightning_easier.sites.blocks import Block
from lightning_easier.structure.linearize import stand_ins
from tests.integration import residual
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.tiny import assert_equal_states

BY_LINEARITY = {"blocks": True, "criterion": "linearity"}


class Net(residual.Net):
    """Three residual blocks, the second of which does next to nothing; a score an epoch."""

    def __init__(self, scores=(0.9,), **options):
        super().__init__(**options)
        torch.manual_seed(5)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        self.by_epoch = scores

    def on_validation_epoch_end(self):
        self.log("score", self.by_epoch[min(self.current_epoch, len(self.by_epoch) - 1)])


class Maps(Small):
    """A residual block of convolutions on maps of four positions, its activation after the addition."""

    class Block(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.act, self.second, self.last = nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.ReLU(inplace=True)
            self.scale = scale

        def forward(self, x):
            return self.last(x + self.scale * self.second(self.act(self.norm(self.first(x)))))

    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        torch.manual_seed(0)
        stem = [nn.Linear(4, 12), nn.Sigmoid(), nn.Unflatten(1, (3, 2, 2))]
        blocks = [self.Block(scale) for scale in (1.0, 0.05)]
        self.layers = nn.Sequential(*stem, *blocks, nn.Flatten(), nn.Linear(12, 2))


class Ranks(FitChains):
    """Keeps the ranks of each choice, and what was known of the blocks then."""

    seen: list = []  # noqa: RUF012
    ways: list = []  # noqa: RUF012
    last: dict = {}  # noqa: RUF012

    def propose(self, model, evidence):
        proposal = super().propose(model, evidence)
        self.last.clear()
        self.last.update({b["name"]: {way["kind"]: way for way in b["ways"]} for b in proposal.blocks})
        return proposal

    def select(self, ranks, count):
        self.seen.append(dict(ranks))
        self.ways.append(dict(self.last))
        return super().select(ranks, count)


class ByHand(Callback):
    """Measures itself, in float64, what the callback has to measure."""

    def __init__(self, axis):
        self.axis, self.shares = axis, []

    def on_train_epoch_end(self, trainer, pl_module):
        pairs = {}
        blocks = {n: m for n, m in pl_module.named_modules() if isinstance(m, residual.Residual | Maps.Block)}
        pl_module.eval()

        def note(module, args, output, name):
            pairs.setdefault(name, []).append((kept.pop(module), output.double()))

        kept = {}
        handles = [m.register_forward_pre_hook(lambda m, a: kept.update({m: a[0].double()})) for m in blocks.values()]
        handles += [
            m.register_forward_hook(lambda m, a, o, name=name: note(m, a, o, name)) for name, m in blocks.items()
        ]
        with torch.no_grad():
            for batch in trainer.val_dataloaders:
                pl_module(batch[0])
        for handle in handles:
            handle.remove()
        pl_module.train()
        self.shares.append({name: self.share(*map(torch.cat, zip(*calls, strict=True)))
                            for name, calls in pairs.items()})  # fmt: skip

    def share(self, x, y):
        x, y = (each.movedim(self.axis, -1).flatten(0, -2) for each in (x, y))
        return float((x - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize(("make", "axis", "least"), [(Net, -1, "blocks.1"), (Maps, 1, None)])
def test_a_block_goes_by_the_share_of_its_variance_that_its_input_does_not_explain(tmp_path, make, axis, least):
    by_hand, Ranks.seen, Ranks.ways = ByHand(axis), [], []
    model, callback, trainer = run(tmp_path, by_hand, model=make(), method=Ranks, epochs=3, pruning=BY_LINEARITY)
    assert len(by_hand.shares[0]) in (2, 3)
    assert Ranks.seen
    for ranks, ways, shares, this in zip(Ranks.seen, Ranks.ways, by_hand.shares, callback.rounds[1:], strict=False):
        assert {name: ways[name]["identity"]["unexplained"] for name in shares} == pytest.approx(shares, rel=1e-5)
        for name in shares:  # the cheapest of what represents it nearly as well as the best
            best = min(way["unexplained"] for way in ways[name].values())
            good = [way for way in ways[name].values() if way["unexplained"] <= best + 0.02]
            most = max(way["saving"] for way in good)
            assert ranks[name] in [way["unexplained"] for way in good if way["saving"] == most]
        assert this.chosen == [min(ranks, key=ranks.__getitem__)]
    assert no_hooks_on(model)
    if least is not None:
        assert callback.removed == list(stand_ins(model))
        assert callback.removed[0] == least
        assert f"{least} (the block was taken out)" in str(callback.report())
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        x = torch.randn(5, 4)
        assert torch.equal(load_pruned(make(), callback.last_good).eval()(x), model.eval()(x))


@pytest.mark.parametrize("gain", ["macs", "latency"])
def test_a_block_and_the_chain_in_it_are_ranked_by_what_they_save(tmp_path, gain):
    by_hand, Ranks.seen, Ranks.ways = ByHand(-1), [], []
    options = {"method": Ranks, "epochs": 2, "pruning": BY_LINEARITY | {"gain": gain}}
    _, callback, _ = run(tmp_path, by_hand, model=Net(), **options)
    ranks = Ranks.seen[0]
    for name, share in by_hand.shares[0].items():
        ways = Ranks.ways[0][name]
        costs = {  # where nothing is left, that is worth an eighth of the block more
            kind: way["unexplained"] / (way["saving"] + (0.125 * way["price"] if kind == "identity" else 0))
            for kind, way in ways.items()
        }
        assert ranks[name] == min(costs.values())
        assert ways["identity"]["unexplained"] == pytest.approx(share, rel=1e-5)
        if gain == "macs":  # two layers, for a batch of the validation
            assert ways["identity"]["saving"] == 2 * 6 * 6 * 6
            assert ways["linear"]["saving"] == 6 * 6 * 6
        assert 0 < ranks[name] < math.inf
    assert callback.removed == [min(ranks, key=ranks.__getitem__)]


@pytest.mark.parametrize("criterion", ["entropy", "tlc"])
def test_by_other_criteria_a_block_is_what_its_activations_are(tmp_path, criterion):
    Ranks.seen = []
    options = {"method": Ranks, "pruning": {"blocks": True, "criterion": criterion, "tolerance": 1.0}}
    _, callback, _ = run(tmp_path, model=Maps(), **options)
    first, second = Ranks.seen[:2]
    for block in ("layers.3", "layers.4"):
        inside = [first[name] for name in first if name.startswith(f"{block}.")]
        assert len(inside) == 2
        assert first[block] == pytest.approx(sum(inside))
    gone = callback.rounds[1].chosen[0]
    assert gone not in ("layers.3", "layers.4"), "an activation is less than both"
    block = gone.rpartition(".")[0]
    assert second[block] == pytest.approx(sum(second[name] for name in second if name.startswith(f"{block}.")))
    assert callback.rounds[1].accepted


class InOrder(FitChains):
    """The chain in a block, the block, then another."""

    def select(self, ranks, count):
        wanted = [name for name in ("blocks.0.relu", "blocks.0", "blocks.1") if name in ranks]
        return wanted[:1] or super().select(ranks, count)


@pytest.mark.parametrize("scores", [(0.9, 0.9, 0.1), (0.9, 0.9, 0.9, 0.1)])
def test_a_fitted_chain_goes_with_its_block_and_comes_back_with_it(tmp_path, scores):
    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == len(scores) - 2:  # the last round that is kept
                self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

        def on_train_batch_start(self, trainer, pl_module, *_):
            assert held_by(trainer) == sorted(id(p) for p in pl_module.parameters())

    kept = Keeps()
    model, callback, trainer = run(
        tmp_path, kept, model=Net(scores), method=InOrder, pruning=BY_LINEARITY, epochs=len(scores)
    )
    expected = ["blocks.0.relu", "blocks.0", "blocks.1"][: len(scores) - 1]
    assert [this.chosen for this in callback.rounds] == [[], *([name] for name in expected)]
    assert [this.accepted for this in callback.rounds] == [score > 0.5 for score in scores]
    assert callback.removed == expected[:-1]
    assert list(stand_ins(model)) == expected[-2:-1], "what was removed in a block is not there beside it"
    assert_equal_states(dict(model.state_dict()), kept.state)
    assert held_by(trainer) == sorted(id(p) for p in model.parameters())
    x = torch.randn(5, 4)
    assert torch.equal(load_pruned(Net(), callback.last_good).eval()(x), model.eval()(x))


def no_hooks_on(model):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def held_by(trainer):
    return sorted(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])


@pytest.mark.parametrize("moment", [("on_train_batch_end", 2, 1), ("on_validation_batch_end", 1, None)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, moment):
    options = {"method": InOrder, "pruning": BY_LINEARITY, "epochs": 4}
    whole = run(tmp_path / "whole", model=Net(), **options)
    assert whole[1].removed == ["blocks.0.relu", "blocks.0", "blocks.1"]
    saver = At(*moment, lambda trainer: (trainer.save_checkpoint(tmp_path / "saved.ckpt"), stop(trainer)))
    killed, _, _ = run(tmp_path, saver, model=Net(), **options)
    assert no_hooks_on(killed)
    resumed = run(tmp_path, model=Net(), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


def test_include_and_exclude_choose_blocks_too(tmp_path, caplog):
    caplog.set_level("INFO")
    for include, exclude in (("blocks.2", None), (None, ["blocks.[01]*"])):
        _, callback, _ = run(
            tmp_path / str(include), model=Net(), method=FitChains, epochs=3,
            pruning=BY_LINEARITY | {"include": include, "exclude": exclude},
        )  # fmt: skip
        assert callback.removed == ["blocks.2"]
    assert caplog.text.count("Besides, 1 of its blocks and branches may go whole.") == 1


def test_without_it_blocks_are_left_alone(tmp_path):
    _, callback, _ = run(tmp_path, model=Net(), method=FitChains, pruning={"criterion": "linearity"}, epochs=6)
    assert sorted(callback.removed) == [f"blocks.{place}.relu" for place in range(3)]
    assert sorted(FitChains().removable(Net())) == sorted(callback.removed)


def test_what_it_can_not_work_on_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`blocks` to be a bool, but got 'all'"):
        FitChains(blocks="all")
    model = Small()
    with pytest.raises(ValueError, match="`blocks` to be False for Small, which has neither a block nor a branch"):
        run(tmp_path, model=model, method=FitChains, pruning=BY_LINEARITY)
    assert not stand_ins(model)


class Writes(nn.Module):
    """relu(x) + relu(x), the first one written into its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return x + self.second(x)


class Adds(nn.Module):
    """x + f(x), a tuple where that is asked for."""

    def __init__(self, returns=False):
        super().__init__()
        self.second, self.returns = nn.Linear(4, 4), returns

    def forward(self, x, *_):
        y = x + self.second(x)
        return (y, None) if self.returns else y


def shares_of(block, *batches):
    model = nn.Sequential(block)
    (found,) = [Block("0", block, "identity", None, 2 if getattr(block, "returns", False) else None, {3: 2})]
    probe = BlockProbe(model, [found], [])
    probe.attach()
    for batch in batches:
        block(batch.clone())
    probe.detach()
    return probe


def by_hand(x, y):
    x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    return float((x - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [Writes, Adds, lambda: Adds(returns=True)])
def test_what_goes_into_a_block_is_what_it_was_before_the_block_wrote_to_it(make, mode):
    torch.manual_seed(0)
    block, x = make(), torch.randn(5, 3, 4) + 1000 * (make is Adds)
    with mode():
        probe = shares_of(block, x[:2], x[2:2], x[2:])
        y = block(x.clone())
    ((_, share, shape),) = probe.measured()
    assert share == pytest.approx(by_hand(x, y[0] if isinstance(y, tuple) else y), rel=1e-5)
    assert shape == (2, 3, 4)


def test_samples_that_are_not_finite_are_left_out():
    torch.manual_seed(0)
    block, x = Adds(), torch.randn(6, 3, 4)
    x[1, 0, 0], x[4, 2, 1] = torch.nan, torch.inf
    with torch.no_grad():
        probe = shares_of(block, x[:4], x[4:])
        good = x[[0, 2, 3, 5]]
        ((_, share, _),) = probe.measured()
        assert share == pytest.approx(by_hand(good, block(good)), rel=1e-5)
        assert probe.left_out == (2, 6)
        assert not list(shares_of(block, x[[1, 4]]).measured()), "nothing is left"


def test_a_constant_is_explained_or_not_at_all():
    block = Adds()
    nn.init.constant_(block.second.weight, 0.0)
    nn.init.constant_(block.second.bias, 0.0)
    x = torch.ones(3, 2, 4)
    with torch.no_grad():
        ((_, share, _),) = shares_of(block, x).measured()
        assert share == 0
        nn.init.constant_(block.second.bias, 1.0)
        ((_, share, _),) = shares_of(block, x).measured()
        assert share == math.inf


def test_sums_of_all_processes_are_those_of_the_whole(monkeypatch):
    """One of the processes has no batch."""
    torch.manual_seed(0)
    block, x = Adds().double(), torch.randn(6, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        parts = [shares_of(block, *batches) for batches in ([x[:2]], [x[2:]], [])]
        (whole,) = shares_of(block, x).measured()
    of_all = [[each for seen in part._seen.values() for each in vars(seen.sums).values()] for part in parts]
    monkeypatch.setattr(block_fits, "gather_from_processes", lambda tensors: of_all)
    for part in parts:
        part.reduce()
    for part in parts[:2]:
        ((_, share, _),) = part.measured()
        assert share == pytest.approx(whole[1], rel=1e-12)
    assert not list(parts[2].measured()), "it does not know how the block is called"
