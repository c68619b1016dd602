"""Inner channels as steps of a compression: taken where they are enough, undone bit for bit, and before an operator."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import compress
from lightning_easier.collapsing.fit.norms import MatchedNorms
from lightning_easier.pruning import mending
from lightning_easier.support import timing
from lightning_easier.zoo import CifarResNet
from tests.clocks import Clock, honest
from tests.collapsing.test_collapse_fit import randomized
from tests.pruning.test_compress_targets import Sum

torch.manual_seed(0)
BATCHES = [torch.randn(96, 6) for _ in range(3)]
IMAGES = [torch.randn(16, 3, 8, 6) for _ in range(2)]


def half_needed() -> nn.Module:
    """An MLP of which every channel is there twice: half of them are enough, and no Linear is."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[8:] = parameter[:8]
        model[0].weight *= 3
    return model


def block() -> nn.Module:
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3),
        )
    )  # fmt: skip


def close_to(model: nn.Module, inputs: Tensor, most: float):
    """Score how near a model is to another."""
    wanted = model(inputs).detach()

    def evaluate(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(inputs) - wanted).square().mean() < most * wanted.var())

    return evaluate


def test_half_of_the_channels_go_where_the_others_are_enough():
    model = half_needed()
    state = deepcopy(model.state_dict())
    result = compress(model, BATCHES, evaluate=close_to(model, BATCHES[0], 1e-6), tolerance=0.5, objective="macs")
    (trial,) = (each for each in result.report.trials if each.kept)
    assert (trial.sites, trial.operators, trial.kind) == (("1",), ("0", "2"), "1/2 of the channels")
    assert (trial.price_before, trial.price_after) == (96 * 2 * 16 * 6, 96 * 2 * 8 * 6)
    assert trial.explained > 1 - 1e-6
    assert "1/2 of the channels" in str(result.report)
    assert result.report.after.macs == result.report.before.macs / 2
    for each in (result.model, result.fitted):
        torch.testing.assert_close(each(BATCHES[1]), model(BATCHES[1]), rtol=1e-4, atol=1e-4)
        assert not each.training
    assert [type(module) for module in result.fitted] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (result.fitted[0].out_features, result.fitted[2].in_features) == (8, 8)
    result.fitted.train()(BATCHES[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in result.fitted.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [half_needed, block])
def test_what_is_rejected_is_undone_bit_for_bit(make):
    model = make()
    batches = BATCHES if make is half_needed else IMAGES
    scores = iter([1.0])
    result = compress(model, batches, evaluate=lambda _: next(scores, 0.0), tolerance=0.1, objective="macs")
    first = result.report.trials[0]
    assert first.kind.endswith("of the channels")
    assert not any(trial.kept for trial in result.report.trials)
    assert all(torch.equal(value, result.fitted.state_dict()[key]) for key, value in model.state_dict().items())
    assert str(result.fitted) == str(model)


def test_an_operator_takes_the_place_of_a_narrower_chain_which_comes_back_when_that_is_rejected():
    narrower = []

    def evaluate(candidate: nn.Module) -> float:
        if isinstance(candidate[3], nn.Conv2d):
            narrower.append(deepcopy(candidate))
            return 1.0
        return 0.0

    model = block()
    result = compress(model, IMAGES, evaluate=evaluate, tolerance=0.1, objective="macs", exclude=[])
    kinds = [trial.kind for trial in result.report.trials]
    assert kinds[0].endswith("of the channels")
    last, rejected = result.report.trials[-2:]
    assert (last.kept, rejected.kept) == (True, False)
    assert not rejected.kind.endswith("of the channels")
    assert (last.price_before, rejected.price_before) == (last.price_before,) * 2  # of the chain as it was
    width = result.fitted[0].out_channels
    assert last.kind == {6: "3/4", 4: "1/2", 2: "1/4"}[width] + " of the channels"
    assert [result.fitted[1].num_features, result.fitted[3].in_channels] == [width, width]
    wanted = narrower[-1].state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in result.fitted[0].state_dict(prefix="0.").items())
    assert all(torch.equal(value, wanted[key]) for key, value in result.fitted[3].state_dict(prefix="3.").items())


def test_after_an_operator_no_channels_are_tried():
    """A quarter of the channels costs less than one convolution of that size, but is no step after it."""
    report = compress(block(), IMAGES, evaluate=lambda _: 1.0, objective="macs").report
    kinds = [trial.kind for trial in report.trials]
    assert any(kind.endswith("of the channels") for kind in kinds)
    first = next(place for place, kind in enumerate(kinds) if not kind.endswith("of the channels"))
    assert not any(kind.endswith("of the channels") for kind in kinds[first:])
    assert all(trial.reason == f"{kinds[place + 1]} has taken its place"
               for place, trial in enumerate(report.trials[:-1]))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"evaluate": lambda _: 1.0, "narrow": False},
        {"target_depth": 1},
        {"evaluate": lambda _: 1.0, "objective": "depth"},
        {"slack": 0.5},
    ],
)
def test_channels_stay_where_they_are_not_to_go_or_would_not_help(options):
    options = {"objective": "macs", "max_drift": 10.0, **options}
    trials = compress(half_needed(), BATCHES, **options).report.trials
    assert trials
    assert not any("channels" in trial.kind for trial in trials)


def test_narrow_is_a_bool():
    with pytest.raises(TypeError, match="`narrow` to be a bool, but got 'yes'"):
        compress(half_needed(), BATCHES, narrow="yes")


def test_channels_are_enough_for_a_target_and_take_the_place_of_what_passes_it(monkeypatch):
    """The small MLP changes least, and goes as a whole; with a quarter of it the target is reached, too."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    torch.manual_seed(0)
    batches = [torch.randn(64, 32) for _ in range(6)]
    report = compress(Sum([512, 1024], [0.02, 0.5]).eval(), batches, target_speedup=2.2, max_drift=10.0).report
    kept = {(trial.operators[0], trial.kind) for trial in report.trials if trial.kept}
    assert kept == {("mlps.0.0", "1/4 of the channels"), ("mlps.1.0", "1/2 of the channels")}
    (needless,) = (trial for trial in report.trials if trial.operators == ("mlps.0",))
    assert needless.kind == "zeros"
    assert needless.reason.endswith("of the 2.2× that was asked for, with 1/4 of the channels in its place")
    assert report.speedup.median > 2.2


def test_batch_norms_are_matched_by_the_channels_that_are_left(monkeypatch):
    """Two blocks in a row: the first changes what the second reads."""
    torch.manual_seed(0)
    model = nn.Sequential(block(), nn.ReLU(), block()).eval()
    seen = []
    match = mending.match_norms
    monkeypatch.setattr(mending, "match_norms", lambda *args: seen.append(args[3]) or match(*args))

    def evaluate(candidate: nn.Module) -> float:
        return float(sum(isinstance(module, nn.Conv2d) for module in candidate.modules()) == 4)

    result = compress(
        model, IMAGES, evaluate=evaluate, tolerance=0.5, objective="macs", include=["0.2", "2.2"], max_rejections=9
    )
    (channels,) = seen
    assert {*channels} == {"0.1", "2.1"}
    norm, before = result.fitted[2][1], model[2][1]
    assert norm.num_features == len(channels["2.1"]) < before.num_features
    with torch.no_grad():
        torch.testing.assert_close(result.model(IMAGES[0]), result.fitted(IMAGES[0]), rtol=1e-4, atol=1e-4)


def test_before_something_else_takes_a_place_the_model_runs_up_to_there(monkeypatch):
    model, matched, beyond = CifarResNet(8).eval(), [], []
    own = MatchedNorms.match_alike

    def watched(self: MatchedNorms, *given: object) -> None:
        handle = self._model.get_submodule("linear").register_forward_hook(lambda *_: beyond.append(1))
        own(self, *given)
        handle.remove()
        matched.append(1)

    monkeypatch.setattr(MatchedNorms, "match_alike", watched)
    report = compress(model, [torch.randn(8, 3, 32, 32)], evaluate=lambda _: 1.0, objective="macs").report
    assert sum("has taken its place" in str(trial.reason) for trial in report.trials) == len(matched) > 0
    assert not beyond
