"""A method of one's own, in a few lines, has all that the loop has: rollback, resume, report, command line.

This is the how-to, too: FromTheFirst is all that its author writes. Masks and blocks have operations of their own. (For
several processes see test_processes.py.)
"""

from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import nn

from lightning_easier import EntropyPruningCallback, Method, Proposal, PruningCallback, Target, load_pruned
from lightning_easier.command import main
from lightning_easier.measure.affines import AffineFit
from lightning_easier.structure.linearize import bypass, restore, stand_ins
from lightning_easier.structure.operations import Affines, Change, Identities, Operation
from lightning_easier.structure.stand_in import StandIn
from tests.integration.interrupted import At, Small, outcome, run, stop, uninterrupted
from tests.integration.test_cli import CONFIGS, SHORT
from tests.integration.tiny import assert_equal_states


class FromTheFirst(Method):
    """Make the first activation of the model linear, then the second, ..."""

    def propose(self, model, evidence):
        proposal = Proposal()
        for place, name in enumerate(evidence.entropies):
            proposal.add(Identities([name]), rank=place)
        return proposal


@dataclass
class Masks(Operation):
    """Weights become zero."""

    kind = "test: masks"
    is_large = True
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, model):
        self.hold(model)
        return Change(notes={"weights": [f"{sum(int((mask == 0).sum()) for mask in self.masks.values())} masked"]})

    def hold(self, model):
        for name, mask in self.masks.items():
            model.get_parameter(name).data.mul_(mask)

    def undo(self, model):
        return []

    def leaving(self, model):
        return []

    @property
    def changes_parameters(self):
        return False


@dataclass(frozen=True)
class SmallestWeights(Method):
    """Mask the smallest weights of all linear layers; it removes no activation."""

    share: float = 0.25

    def propose(self, model, evidence):
        masks = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                size = layer.weight.abs()
                masks[f"{name}.weight"] = ((size == 0) | (size > size[size > 0].quantile(self.share))).float()
        proposal = Proposal()
        proposal.add(Masks([], masks), rank=0.0, name="weights")
        return proposal


@dataclass
class Skips(Operation):
    """Whole blocks become identities."""

    kind = "test: skips"

    def apply(self, model):
        lost = [parameter for name in self.names for parameter in model.get_submodule(name).parameters()]
        bypass(model, self.names)
        return Change(lost=lost)

    def undo(self, model):
        restore(model, self.names)
        return [parameter for name in self.names for parameter in model.get_submodule(name).parameters()]

    def leaving(self, model):
        return []

    @property
    def changes_parameters(self):
        return True


class Blocks(Method):
    """Skip blocks, the smallest weights first."""

    def removable(self, model):
        return {name: block for name, block in model.named_modules() if isinstance(block, Block)}

    def propose(self, model, evidence):
        proposal = Proposal()
        for name, block in self.removable(model).items():
            proposal.add(Skips([name]), rank=float(sum(p.abs().sum() for p in block.parameters())))
        return proposal


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 6), nn.ReLU())


class Deep(Small):
    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.layers = nn.Sequential(nn.Linear(4, 6), Block(), Block(), Block(), nn.Linear(6, 2))


def linear_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def zeros(model):
    return sum(int((layer.weight == 0).sum()) for layer in linear_layers(model))


@pytest.mark.parametrize(("method", "make"), [(FromTheFirst, Small), (SmallestWeights, Small), (Blocks, Deep)])
@pytest.mark.parametrize("moment", [("on_train_batch_end", 2, 1), ("on_train_epoch_end", 1, None)])
def test_a_killed_run_goes_on_and_a_bad_round_is_taken_back(tmp_path, tmp_path_factory, method, make, moment):
    options = {"epochs": 4, "method": method}

    def model():
        torch.manual_seed(3)
        return make((0.9, 0.9, 0.1))

    name = f"own method, {method.__name__}"
    whole = uninterrupted(tmp_path_factory, name, lambda root: run(root, model=model(), **options))
    saver = At(*moment, lambda trainer: (trainer.save_checkpoint(tmp_path / "saved.ckpt"), stop(trainer)))
    run(tmp_path, saver, model=model(), **options)
    resumed = run(tmp_path, model=model(), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))
    pruned, callback, _ = whole
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    good = torch.load(callback.last_good, weights_only=True)["state_dict"]
    assert_equal_states(dict(pruned.state_dict()), dict(good))


def test_the_report_says_what_was_done(tmp_path):
    model, callback, _ = run(tmp_path, method=FromTheFirst, epochs=4)
    assert callback.removed == list(stand_ins(model)) == ["layers.1", "layers.3", "layers.5"]
    assert all(f"{callback.rounds[n].entropies[name]:.4f}" in str(callback.report()) for n, name in [(1, "layers.1")])
    loaded = load_pruned(Small, callback.last_good).eval()
    data = torch.randn(5, 4)
    assert torch.equal(loaded(data), model.eval()(data))
    model, callback, _ = run(tmp_path / "blocks", model=Deep(), method=Blocks, epochs=4)
    assert len(callback.removed) == 3
    assert [type(block).__name__ for block in model.layers] == ["Linear", *["BlockStandIn"] * 3, "Linear"]
    loaded = load_pruned(Deep, callback.last_good).eval()
    assert torch.equal(loaded(data), model.eval()(data))
    model, callback, _ = run(tmp_path / "masks", method=SmallestWeights, epochs=2)
    assert (callback.removed, callback.rounds[1].chosen) == ([], ["weights"])
    (note,) = callback.rounds[1].notes["weights"]
    assert f"| 1 | weights ({note}) | - |" in str(callback.report())
    assert zeros(model) == int(note.split()[0]) > 0.2 * sum(layer.weight.numel() for layer in linear_layers(model))


def test_it_is_asked_for_on_the_command_line(tmp_path):
    here = f"{__name__}.FromTheFirst"
    given = [f"--config={CONFIGS / 'digits.yaml'}", *SHORT, f"--trainer.default_root_dir={tmp_path}",
             "--trainer.callbacks=lightning_easier.PruningCallback", f"--trainer.callbacks.method={here}",
             "--trainer.callbacks.monitor=val_acc", "--trainer.callbacks.tolerance=1.0"]  # fmt: skip
    main(["fit", *given])
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    (block,) = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    assert block["init_args"]["method"]["class_path"] == here
    main(["fit", f"--config={saved}", "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'again'}"])
    again = yaml.safe_load((tmp_path / "again" / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert again["trainer"]["callbacks"] == [block]
    record = torch.load(saved.parent / "entropy_pruning" / "round_1.ckpt", weights_only=True)
    assert len(record["callbacks"]["PruningCallback"]["rounds"]) == 2


def test_masks_hold_as_long_as_their_rounds_do(tmp_path):
    """Those of kept rounds after every step and after a resume; those of a round that was taken back no longer."""
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(zeros(pl_module))

    options = {"method": SmallestWeights, "scores": (0.9, 0.9, 0.9, 0.1, 0.9), "pruning": {"max_rejections": 2}}
    model, callback, trainer = run(tmp_path, Count(), epochs=4, **options)
    masked = list(accumulate(int(this.notes["weights"][0].split()[0]) for this in callback.rounds[1:]))
    assert seen[3:12] == [count for count in masked for _ in range(3)]
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]
    assert zeros(model) == masked[1]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    seen.clear()
    run(tmp_path / "more", Count(), epochs=5, ckpt_path=tmp_path / "rounds" / "round_1.ckpt", **options)
    assert seen[0] == masked[1]  # round 2, which begins


class Nested(Method):
    """Removes an activation, then the block around it."""

    def removable(self, model):
        blocks = {name: block for name, block in model.named_modules() if isinstance(block, Block)}
        return super().removable(model) | blocks

    def propose(self, model, evidence):
        proposal = Proposal()
        for rank, name in enumerate(["layers.1.1", "layers.1", "layers.2"]):
            if name in dict(model.named_modules()) and not isinstance(model.get_submodule(name), StandIn):
                proposal.add((Skips if rank else Identities)([name]), rank)
        return proposal


def test_what_was_removed_inside_a_block_goes_with_it_and_comes_back_with_it(tmp_path):
    model = Deep((0.9, 0.9, 0.9, 0.1))
    _, callback, _ = run(tmp_path, model=model, method=Nested, epochs=4)
    assert [this.chosen for this in callback.rounds] == [[], ["layers.1.1"], ["layers.1"], ["layers.2"]]
    assert [this.accepted for this in callback.rounds] == [True, True, True, False]
    assert list(stand_ins(model)) == ["layers.1"]
    again = Deep()
    _, callback, _ = run(tmp_path / "more", model=again, method=Nested, epochs=4,
                         ckpt_path=tmp_path / "rounds" / "round_2.ckpt")  # fmt: skip
    assert list(stand_ins(again)) == ["layers.1", "layers.2"]
    assert callback.removed == ["layers.1.1", "layers.1", "layers.2"]
    taken_back = Deep((0.9, 0.9, 0.1))
    _, callback, _ = run(tmp_path / "back", model=taken_back, method=Nested, epochs=3)
    assert list(stand_ins(taken_back)) == ["layers.1.1"]
    proposal = Proposal()
    for name in ("layers.1.1", "layers.1", "layers.2", "layers.20"):
        proposal.add(Skips([name]), 0.0)
    assert proposal.disjoint(["layers.1.1", "layers.1", "layers.2", "layers.20"]) == [
        "layers.1.1",
        "layers.2",
        "layers.20",
    ]


class NestedAffines(Nested):
    """The activation becomes an affine that is trained; then its block goes, and takes what has joined with it."""

    def propose(self, model, evidence):
        proposal = super().propose(model, evidence)
        if "layers.1.1" in proposal.operations:
            affine = AffineFit(torch.ones(6), torch.zeros(6), 1, 0.5).to_plain()
            proposal.operations["layers.1.1"] = Affines(
                ["layers.1.1"], {"layers.1.1": affine}, trainable=True
            ).to_plain()
        return proposal


def test_what_had_joined_inside_a_block_goes_with_it(tmp_path):
    def model():
        torch.manual_seed(3)
        return Deep((0.9, 0.9, 0.9, 0.1))

    options = {"method": NestedAffines, "epochs": 4}
    whole = run(tmp_path / "whole", model=model(), **options)
    assert [this.accepted for this in whole[1].rounds] == [True, True, True, False]
    saver = At(
        "on_train_batch_end", 2, 1, lambda trainer: (trainer.save_checkpoint(tmp_path / "s.ckpt"), stop(trainer))
    )
    run(tmp_path, saver, model=model(), **options)
    resumed = run(tmp_path, model=model(), ckpt_path=tmp_path / "s.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))


@dataclass
class Fails(Operation):
    """Says that something has joined that is not there."""

    kind = "test: fails"

    def apply(self, model):
        return Change(joined=["nowhere"])

    def undo(self, model):
        return []

    def leaving(self, model):
        return []

    @property
    def changes_parameters(self):
        return True


def test_where_an_operation_fails_the_structure_is_as_it_was(tmp_path):
    class Both(Method):
        def propose(self, model, evidence):
            proposal = proposal_of(Identities(["layers.3"]))
            proposal.add(Fails([]), 1.0, name="fails")
            return proposal

    model = Small()
    with pytest.raises(ValueError, match=r"`joined` to be modules of the model, but got \['nowhere'\]"):
        run(tmp_path, model=model, method=Both, pruning={"removals": 2})
    assert stand_ins(model) == {}


@dataclass
class Adapts(Operation):
    """A module gets parameters, which join the optimizer."""

    kind = "test: adapts"

    def apply(self, model):
        model.adapter.weight = nn.Parameter(torch.ones(2))
        return Change(joined=["adapter"])

    def undo(self, model):
        model.adapter.weight = None
        return []

    def leaving(self, model):
        return [model.adapter.weight]

    @property
    def changes_parameters(self):
        return True


class AdaptsFirst(FromTheFirst):
    def propose(self, model, evidence):
        proposal = super().propose(model, evidence)
        if model.adapter.weight is None:
            proposal.add(Adapts([]), -1.0, name="adapter")
        return proposal


class Adapted(Small):
    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.adapter = nn.Module()
        self.adapter.register_parameter("weight", None)

    def forward(self, x):
        x = super().forward(x)
        return x if self.adapter.weight is None else x * self.adapter.weight

    def on_load_checkpoint(self, checkpoint):
        if "adapter.weight" in checkpoint["state_dict"] and self.adapter.weight is None:
            self.adapter.weight = nn.Parameter(torch.ones(2))


def test_parameters_that_have_joined_stay_when_a_later_round_is_taken_back(tmp_path):
    options = {"method": AdaptsFirst, "epochs": 4, "pruning": {"max_rejections": 2}}
    scores = (0.9, 0.9, 0.1, 0.9)
    whole = run(tmp_path / "whole", model=Adapted(scores), **options)
    saver = At(
        "on_train_batch_end", 3, 1, lambda trainer: (trainer.save_checkpoint(tmp_path / "s.ckpt"), stop(trainer))
    )
    run(tmp_path, saver, model=Adapted(scores), **options)
    record = torch.load(tmp_path / "s.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    assert [place[0] for place in record["joined"] if place[0] == "adapter"] == ["adapter"]
    assert [this.chosen for this in whole[1].rounds][:2] == [[], ["adapter"]]
    assert [this.accepted for this in whole[1].rounds] == [True, True, False, True]
    held = {id(p) for group in whole[2].optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in whole[0].parameters()}


@pytest.mark.parametrize(
    ("propose", "error", "message"),
    [
        (lambda: None, TypeError, "`propose` of Wrong to return a Proposal, but got None"),
        (lambda: proposal_of(Identities(["layers.100"])), ValueError, "'layers.100' removes .* none of .*'layers.1'"),
        (lambda: proposal_of(Skips(["layers"])), ValueError, "`removable` returns, but 'layers' removes"),
        (lambda: proposal_of(Unnamed(["layers.1"])), TypeError, "Unnamed to have a class attribute `kind` of its own"),
    ],
)
def test_what_is_wrong_with_a_method_is_said(tmp_path, propose, error, message):
    class Wrong(Method):
        def propose(self, model, evidence):
            return propose()

    with pytest.raises(error, match=message):
        run(tmp_path, method=Wrong)


class Unnamed(Identities):
    pass


def proposal_of(operation):
    proposal = Proposal()
    proposal.add(operation, 0.0)
    return proposal


def test_what_counts_is_what_was_removed(tmp_path):
    """Not what became linear, which is nothing for masks, and may be several at once."""

    class Pairs(Method):
        def propose(self, model, evidence):
            first, second, *_ = [*evidence.entropies, None, None]
            return proposal_of(Identities([first, second])) if second else Proposal()

    _, callback, trainer = run(tmp_path, method=Pairs, pruning={"max_removals": 1}, epochs=4)
    assert callback.removed == ["layers.1", "layers.3"]
    assert "| layers.1 (together with `layers.3`) |" in str(callback.report())
    assert trainer.callback_metrics["removed"] == 1
    _, callback, trainer = run(tmp_path / "masks", method=SmallestWeights, pruning={"max_removals": 2}, epochs=5)
    assert len(callback.rounds) == 3
    assert trainer.callback_metrics["removed"] == 2
    _, callback, trainer = run(tmp_path / "taught", method=SmallestWeights, pruning={"distill": True}, epochs=2)
    assert "distill_loss" in trainer.callback_metrics


def test_an_activation_that_is_linear_is_not_removed_again(tmp_path):
    class Insists(Method):
        def propose(self, model, evidence):
            return proposal_of(Identities(["layers.3"]))

    _, callback, _ = run(tmp_path, method=Insists, epochs=4)
    assert callback.removed == ["layers.3"]


def test_easiers_callback_names_the_one_that_takes_any_method():
    with pytest.raises(
        TypeError, match="`method` to be a Linearize or a FitChains, .*; PruningCallback takes any method"
    ):
        EntropyPruningCallback("score", method=FromTheFirst())
    for group in ("rounds", "measuring", "target", "distillation", "files"):
        with pytest.raises(TypeError, match=f"`{group}` to be a .*, but got 3"):
            PruningCallback(FromTheFirst(), "score", **{group: 3})
    with pytest.raises(TypeError, match="`include` to hold name globs, but got {'layers': 1}"):
        PruningCallback(FromTheFirst(), "score", include={"layers": 1})
    with pytest.raises(ValueError, match="`speedup` and `depth` of a Target not both to be None"):
        Target()
