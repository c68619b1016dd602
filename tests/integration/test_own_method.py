"""A method of one's own, in a few lines, has all that the loop has: rollback, resume, report, processes, command line.

This is the how-to, too: the two classes below are all that their author writes.
"""

from dataclasses import dataclass, field

import pytest
import torch
import yaml
from torch import nn

from lightning_easier import Method, Proposal, load_pruned
from lightning_easier.cli import main
from lightning_easier.structure.linearize import bypass, restore, stand_ins
from lightning_easier.structure.operations import Change, Identities, Operation
from tests.integration.interrupted import At, Small, outcome, run, stop
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
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, model):
        for name, mask in self.masks.items():
            model.get_parameter(name).data.mul_(mask)
        return Change(notes={"weights": [f"{sum(int((mask == 0).sum()) for mask in self.masks.values())} masked"]})

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
        masks = {
            f"{name}.weight": (layer.weight.abs() > layer.weight.abs().quantile(self.share)).float()
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
        }
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


@pytest.mark.parametrize(("method", "make"), [(FromTheFirst, Small), (SmallestWeights, Small), (Blocks, Deep)])
@pytest.mark.parametrize("moment", [("on_train_batch_end", 2, 1), ("on_train_epoch_end", 1, None)])
def test_a_killed_run_goes_on_and_a_bad_round_is_taken_back(tmp_path, method, make, moment):
    options = {"epochs": 4, "method": method}

    def model():
        torch.manual_seed(3)
        return make((0.9, 0.9, 0.1))

    whole = run(tmp_path / "whole", model=model(), **options)
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
    assert [type(block).__name__ for block in model.layers] == ["Linear", *["IdentityStandIn"] * 3, "Linear"]
    loaded = load_pruned(Deep, callback.last_good).eval()
    assert torch.equal(loaded(data), model.eval()(data))
    model, callback, _ = run(tmp_path / "masks", method=SmallestWeights, epochs=2)
    assert (callback.removed, callback.rounds[1].chosen) == ([], ["weights"])
    (note,) = callback.rounds[1].notes["weights"]
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    assert int(note.split()[0]) == pytest.approx(0.25 * weights, rel=0.1)
    assert f"| 1 | weights ({note}) | - |" in str(callback.report())


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
