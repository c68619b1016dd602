"""Tests of compression without training."""

import contextlib
import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from tqdm import tqdm

from lightning_easier import collapse, compress, fit_chains, isolate_activations, linearize
from lightning_easier.pruning import judge, search, stages, targets
from lightning_easier.support import progress, timing
from lightning_easier.zoo import CifarResNet
from tests.clocks import Clock, jittering
from tests.collapsing.test_collapse_fit import Block, Bottleneck, Mlp, randomized


def mlps(count: int = 3) -> nn.Module:
    """Residual MLPs, of which the later ones say less: their drift is smaller."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList(Mlp() for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            for number, mlp in enumerate(self.mlps):
                x = x + mlp(x) / (1 + 3 * number)
            return x

    torch.manual_seed(0)
    return Residual().eval()


BATCHES = [torch.randn(64, 8) for _ in range(4)]
# The weights are random numbers: outputs change much with all that goes.
OPTIONS = {"objective": "macs", "max_drift": math.inf}


def test_all_goes_that_pays_where_nothing_is_asked():
    model = mlps()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, BATCHES, **OPTIONS)
    report = result.report
    assert [trial.sites for trial in report.trials] == [("mlps.2.1",), ("mlps.1.1",), ("mlps.0.1",)]
    assert all(trial.kept for trial in report.trials)
    assert [trial.drift for trial in report.trials] == sorted(trial.drift for trial in report.trials)
    assert report.before.depth == report.exact.depth == 6
    assert report.after.macs < 0.3 * report.before.macs
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(isolate_activations(model)) == 3
    x = torch.randn(16, 8)
    with torch.no_grad():
        torch.testing.assert_close(result.fitted(x), result.model(x), rtol=1e-4, atol=1e-5)
        share = (result.model(x) - model(x)).square().sum() / (model(x) - model(x).mean(0)).square().sum()
    assert share < 0.2
    text = str(report)
    assert "collapsed exactly" in text
    assert "mlps.0.0 + mlps.0.3" in text


def test_what_the_score_does_not_stand_is_taken_back():
    """A score that counts which MLPs are whole: it stands the loss of the last two.

    What is taken back is not tried again with less, those that stay may go further: to an affine, to nothing.
    """
    model, seen = mlps(), []

    def is_whole(mlp: nn.Module) -> bool:
        return isinstance(mlp, nn.Sequential) and isinstance(mlp[3], nn.Linear)

    def evaluate(candidate: nn.Module) -> float:
        assert not candidate.training
        whole = [is_whole(mlp) for mlp in candidate.mlps]
        seen.append(whole)
        return 1.0 if whole[0] else 0.5

    result = compress(model, BATCHES, evaluate=evaluate, tolerance=0.1, narrow=False, **OPTIONS)
    assert seen[:4] == [[True] * 3, [True, True, False], [True, False, False], [True, False, False]]
    assert seen.count([False] * 3) == 1
    (rejected,) = (trial for trial in result.report.trials if trial.score == 0.5)
    assert (rejected.kept, rejected.reason) == (False, "beyond the tolerance 0.1 of 1.0000")
    kept = [(trial.sites, trial.kind) for trial in result.report.trials if trial.kept]
    assert kept == [(("mlps.2.1",), "zeros"), (("mlps.1.1",), "zeros")]
    assert {trial.reason for trial in result.report.trials if trial.kind == "linear"} >= {"affine has taken its place"}
    assert {trial.reason for trial in result.report.trials if trial.kind == "affine"} >= {"zeros has taken its place"}
    assert [is_whole(mlp) for mlp in result.fitted.mlps] == [True, False, False]
    x = torch.randn(16, 8)
    with torch.no_grad():
        torch.testing.assert_close(result.fitted.mlps[0](x), model.mlps[0](x))


@pytest.mark.parametrize(("mode", "worse"), [("max", -1.0), ("min", 1.0)])
def test_it_stops_after_some_rejections_in_a_row(mode, worse):
    scores = iter([0.0, worse, worse, worse, 0.0])
    result = compress(mlps(5), BATCHES, evaluate=lambda _: next(scores), mode=mode, max_rejections=3, **OPTIONS)
    assert [trial.kept for trial in result.report.trials] == [False] * 3
    assert result.report.after.macs == result.report.before.macs


def test_a_score_that_is_nan_is_worse_than_any():
    scores = iter([0.0, float("nan")])
    result = compress(mlps(1), BATCHES, evaluate=lambda _: next(scores), **OPTIONS)
    assert [trial.kept for trial in result.report.trials] == [False]


def test_it_stops_at_a_depth():
    result = compress(mlps(4), BATCHES, target_depth=6, **OPTIONS)
    assert result.report.before.depth == 8
    assert result.report.after.depth <= 6  # one MLP goes with its skip, and then into its neighbour
    assert len(result.report.trials) < 4


def test_a_chain_that_was_taken_further_comes_back_as_it_was():
    """The affine of the last MLP is refused, so that the operator before it is back, as it was fitted."""
    fitted, states = [], []

    def evaluate(candidate: nn.Module) -> float:
        fitted.append(str(candidate.mlps[0]))
        states.append(copy.deepcopy(candidate.state_dict()))
        return 0.5 if "ChannelAffine" in fitted[-1] else 1.0

    result = compress(mlps(1), BATCHES, evaluate=evaluate, tolerance=0.1, narrow=False, **OPTIONS)
    assert "ChannelAffine" in fitted[-1]
    assert str(result.fitted.mlps[0]) == fitted[-2]
    assert all(torch.equal(value, states[-2][key]) for key, value in result.fitted.state_dict().items())
    assert [(trial.kind, trial.kept) for trial in result.report.trials] == [("linear", True), ("affine", False)]


def test_it_stops_when_it_is_fast_enough():
    with pytest.warns(UserWarning, match="the target is not reached: .* of the 1e\\+06× that was asked for"):
        whole = compress(mlps(4), BATCHES, target_speedup=1e6, **OPTIONS)
    assert len({trial.sites for trial in whole.report.trials}) == 4
    linear = linearize(nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 8), Mlp()), ["1"])
    already = compress(linear, BATCHES, target_speedup=1.2, **OPTIONS)  # an exact merge is enough
    assert already.report.trials == []
    assert already.report.ended.startswith("the target is reached")


def test_what_took_the_place_of_one_chain_goes_into_the_next():
    layers = [
        layer
        for narrow, wide in itertools.pairwise((3, 16, 16, 16, 8))
        for layer in (nn.Conv2d(narrow, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(40, 3, 12, 10)
    result = compress(model, [images], example_inputs=images[:8], target_speedup=20, max_drift=math.inf, narrow=False)
    assert result.report.after.depth < result.report.dense.depth - 2
    torch.testing.assert_close(result.model(images), result.fitted(images), rtol=1e-3, atol=1e-4)


def test_only_what_is_wanted_goes():
    result = compress(mlps(), BATCHES, include="mlps.*", exclude=["mlps.2.*"], **OPTIONS)
    assert {trial.sites for trial in result.report.trials} == {("mlps.0.1",), ("mlps.1.1",)}
    with pytest.raises(ValueError, match="`exclude`.*'x' matches none"):
        compress(mlps(), BATCHES, exclude="x", **OPTIONS)


def test_neighbouring_activations_go_one_after_the_other():
    torch.manual_seed(0)
    model = randomized(Bottleneck())
    batches = [torch.randn(16, 12, 9, 7) for _ in range(4)]
    result = compress(model, batches, objective="depth", max_drift=math.inf)
    assert {site for trial in result.report.trials if trial.kept for site in trial.sites} == {"act1", "act2"}
    assert result.report.after.depth == 1
    with torch.no_grad():
        torch.testing.assert_close(result.fitted(batches[0]), result.model(batches[0]), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_after_a_chain_computes_in_training_what_it_computes_in_eval_mode():
    """What is fitted varies less: with the old statistics training would begin with another function."""
    torch.manual_seed(0)
    model = randomized(Block())
    batches = [torch.randn(256, 6, 9, 7) for _ in range(4)]
    with torch.no_grad():  # statistics that are those of the data, as after training
        model.train()
        for module in (model.bn1, model.bn2):
            module.momentum = 1.0
        model(torch.cat(batches))
        model.eval()
    fitted = compress(model, batches, include="relu", **OPTIONS).fitted
    assert type(fitted.conv2) is not nn.Conv2d
    with torch.no_grad():
        expected = fitted(batches[0])
        trained = copy.deepcopy(fitted).train()(batches[0])
    assert float((trained - expected).norm() / expected.norm()) < 0.05
    assert fitted.bn2.weight.detach().abs().sum() < 0.95 * model.bn2.weight.detach().abs().sum()


def test_what_can_not_go_says_why():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(Block(), Block()))
    result = compress(model, [torch.randn(8, 6, 9, 7)], exclude=["0.relu", "1.relu"], **OPTIONS)
    assert result.report.trials == []
    assert set(result.report.reasons) == {"0.relu_1", "1.relu_1"}
    assert "0.relu_1" in str(result.report)


def test_a_network_by_measured_time():
    torch.manual_seed(0)
    model = randomized(CifarResNet(8))
    result = compress(model, [torch.randn(8, 3, 16, 16) for _ in range(2)], target_speedup=1e6)
    assert result.report.trials
    assert all(trial.price_after < trial.price_before < 1 for trial in result.report.trials)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": -1}, ValueError, "`tolerance` to be finite and at least 0, but got -1"),
        ({"mode": "best"}, ValueError, "`mode` to be one of"),
        ({"objective": "size"}, ValueError, "`objective` to be one of"),
        ({"target_speedup": "2"}, TypeError, "`target_speedup` to be a number, but got '2'"),
        ({"target_speedup": 0}, ValueError, "`target_speedup` to be above 0, but got 0"),
        ({"target_speedup": 1.0}, ValueError, "`target_speedup` to be above 1, .* but got 1.0"),
        ({"max_drift": -0.1}, ValueError, "`max_drift` to be finite and at least 0, but got -0.1"),
        (
            {"batches": [{"a": BATCHES[0], "b": BATCHES[0]}]},
            TypeError,
            r"got one of `a`, `b`. Pass `inputs_of=lambda batch",
        ),
        ({"max_minutes": -1}, ValueError, "`max_minutes` to be finite and at least 0, but got -1"),
        ({"batches": None}, TypeError, "`batches` to be an iterable of batches, but got"),
        ({"example_inputs": BATCHES[0][:0]}, ValueError, "`example_inputs` to hold at least one sample, but got"),
        ({"example_inputs": BATCHES[0].to("meta")}, ValueError, "`example_inputs` to hold data.*meta device"),
        ({"example_inputs": 3}, TypeError, "`example_inputs` to be a tensor, a non-empty tuple"),
        ({"evaluate": lambda _: None}, TypeError, "`evaluate` to return the score, a number, but it returned"),
        ({"evaluate": lambda _: float("nan")}, ValueError, "`evaluate` to return a finite score .* but got nan"),
        ({"target_depth": 0}, ValueError, "`target_depth` to be at least 1, but got 0"),
        ({"max_rejections": 0}, ValueError, "`max_rejections` to be at least 1, but got 0"),
        ({"batches": []}, ValueError, "`batches` to yield at least one batch"),
        ({"batches": BATCHES[0]}, TypeError, "`batches` to be an iterable of batches, but got a tensor"),
        ({"batches": [torch.randn(4, 3)]}, ValueError, "to be accepted by the forward"),
        ({"example_inputs": torch.randn(4, 3)}, ValueError, "`example_inputs` to be accepted by the forward"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        compress(mlps(1), **({"batches": BATCHES} | options))


def test_a_model_without_weights_is_named():
    with pytest.raises(ValueError, match="`model` to have weights, but .* on the meta device"):
        compress(mlps(1).to("meta"), BATCHES)


def test_outputs_of_one_axis_and_sequences_of_several_lengths():
    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = Mlp(), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mlp(x).relu()).squeeze(-1)

    torch.manual_seed(0)
    assert compress(Value().eval(), BATCHES, **OPTIONS).report.trials
    lengths = [torch.randn(8, length, 8) for length in (5, 7, 6)]
    assert compress(Value().eval(), lengths, **OPTIONS).report.trials


def test_an_evaluation_that_leaves_the_model_in_training_mode_does_no_harm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Sigmoid(), randomized(Block())).eval()
    batches = [torch.randn(16, 6, 9, 7) for _ in range(2)]
    result = compress(model, batches, evaluate=lambda each: float(each.train().training), **OPTIONS)
    assert torch.equal(result.fitted[1].running_mean, model[1].running_mean)
    assert not result.fitted.training


def test_a_slope_that_is_given_to_a_function_is_left_alone():
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.slope = nn.Linear(8, 32), nn.Linear(32, 8), nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.nn.functional.prelu(self.first(x), self.slope))

    result = compress(Sloped().eval(), BATCHES, **OPTIONS)
    assert list(result.report.reasons.values()) == ["it is called with a slope that something else holds"]


def test_a_model_of_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.a, self.b = Mlp(), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
            x = self.mlp(x).tanh()
            return {"a": self.a(x) * scale, "b": self.b(x) + shift}

    torch.manual_seed(0)
    batches = [(batch, torch.rand(64, 1), torch.zeros(64)) for batch in BATCHES]
    result = compress(Two().eval(), batches, **OPTIONS)
    (trial,) = (trial for trial in result.report.trials if trial.kept)
    assert trial.sites == ("mlp.1",)


def test_batches_that_a_forward_writes_into_stay_as_they_are():
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5).mul_(3.0))

    torch.manual_seed(0)
    batches = [batch.clone() for batch in BATCHES]
    written = compress(Normalizing().eval(), batches, **OPTIONS)
    assert all(torch.equal(batch, before) for batch, before in zip(batches, BATCHES, strict=True))
    (trial,) = written.report.trials
    torch.manual_seed(0)
    (expected,) = compress(Mlp().eval(), [(batch - 0.5) * 3.0 for batch in BATCHES], **OPTIONS).report.trials
    assert trial.explained == pytest.approx(expected.explained, abs=1e-6)


def test_what_evaluation_leaves_behind_is_undone():
    """It leaves models in training mode and in another dtype's place; what is timed and fitted is in eval mode."""

    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))

    modes = []

    class Seen(Normed):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(x)

    def evaluate(model: nn.Module) -> float:
        model.train()
        return 1.0

    torch.manual_seed(0)
    model = Seen().eval()
    result = compress(model, BATCHES, evaluate=evaluate, example_inputs=BATCHES[0][:1], **OPTIONS)
    assert modes
    assert not any(modes)
    assert not result.fitted.training
    assert result.report.ended == "nothing is left to try"


def test_a_fall_of_just_the_tolerance_is_kept():
    scores = itertools.chain([0.9], itertools.repeat(0.89))
    result = compress(mlps(1), BATCHES, evaluate=lambda _: next(scores), tolerance=0.01, **OPTIONS)
    assert all(trial.score == 0.89 for trial in result.report.trials)
    assert any(trial.kept for trial in result.report.trials)


def test_a_target_that_is_not_reached_is_said():
    model, is_left = nn.Sequential(Mlp(), nn.Linear(8, 512)), "What is left can't be replaced, or would save nothing"
    told = "nothing is left to try.*, and the target is not reached: .* of the 9×"
    raise_it = "Raise `tolerance` or `max_drift`, or include more activations"
    for options, remedy in (({}, is_left), ({"include": ["0.*"]}, raise_it), ({"max_drift": 1e-9}, raise_it)):
        with pytest.warns(UserWarning, match=f"{told}.*{remedy}"):
            result = compress(model, BATCHES, target_speedup=9, **{**OPTIONS, **options})
    assert "the target is not reached" in str(result.report)
    scores = iter([0.0, *[-1.0] * 9])
    with pytest.warns(UserWarning, match="2 in a row were taken back, and the target is not reached.*Raise `tol"):
        compress(mlps(5), BATCHES, evaluate=lambda _: next(scores), target_depth=1, max_rejections=2, **OPTIONS)


def test_an_operator_that_a_forward_can_not_live_with_does_not_end_its_chain():
    class ReadsFirst(nn.Module):
        """Asks the first operator for what only a convolution has."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Conv2d(4, 32, 3, padding=1), nn.ReLU()
            self.second = nn.Conv2d(32, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x))) / len(self.first.kernel_size)

    torch.manual_seed(0)
    batches = [torch.randn(8, 4, 8, 8) for _ in range(3)]
    trials = compress(ReadsFirst().eval(), batches, target_depth=1, **OPTIONS).report.trials
    assert trials
    assert {trial.kind for trial in trials} <= {"convolution", "pointwise"}


def test_without_a_score_drift_bounds_what_goes(monkeypatch):
    model = mlps(4)
    free = compress(model, BATCHES, **OPTIONS).report
    monkeypatch.setattr(judge, "MAX_DRIFT", free.drift / 2)
    bounded = compress(model, BATCHES, objective="macs")
    assert 0 < bounded.report.drift <= free.drift / 2
    with torch.no_grad():
        outputs, dense = torch.cat([bounded.fitted(x) for x in BATCHES]), torch.cat([model(x) for x in BATCHES])
    changed = float((outputs - dense).square().sum() / (dense - dense.mean(0)).square().sum())
    assert changed == pytest.approx(bounded.report.drift, rel=1e-3)
    taken_back = [trial for trial in bounded.report.trials if trial.reason is not None and "max_drift" in trial.reason]
    assert taken_back
    assert bounded.report.ended.startswith(
        f"nothing is left to try within the {free.drift / 2:.0%} of `max_drift`; pass `evaluate`"
    )
    assert f"{bounded.report.drift:.2%} of the variance of the outputs has changed" in str(bounded.report)


def test_drift_bounds_what_goes_beside_a_score_only_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(judge, "MAX_DRIFT", 1e-9)
    model = mlps(4)
    alone = compress(model, BATCHES, evaluate=lambda _: 1.0, objective="macs").report
    assert alone.drift > 1e-9
    bound = alone.drift / 2
    both = compress(model, BATCHES, evaluate=lambda _: 1.0, objective="macs", max_drift=bound).report
    assert 0 < both.drift <= bound
    assert any(f"beyond the {bound:.2%} of `max_drift`" in str(trial.reason) for trial in both.trials)


def at_a_pace(monkeypatch, seconds, **target):
    """Compress within two minutes, where so many seconds pass between two looks at the clock."""
    moments = iter(range(0, 10**6, seconds))
    monkeypatch.setattr(stages, "monotonic", lambda: next(moments))
    return compress(mlps(4), BATCHES, max_minutes=2.0, **target, **OPTIONS).report


def test_it_ends_when_its_minutes_are_over(monkeypatch):
    """Half of the time is for the search, so that what it finds can still be tried, and the end is for the costs."""
    report = at_a_pace(monkeypatch, 23)  # a chain and its block are looked at in the first minute, up to 80 % tried
    assert [trial.kept for trial in report.trials] == [True]
    assert list(report.reasons.values()) == ["the time of `max_minutes` was over before it was looked at"] * (3 + 3)
    assert "mlps.0" not in report.reasons  # a block does not wait for all chains
    assert report.ended == "the time for trials is over, 80 % of the 2 minutes of `max_minutes`"
    assert at_a_pace(monkeypatch, 1).ended == "nothing is left to try"


def test_minutes_that_end_before_a_target_is_reached_are_what_to_raise(monkeypatch):
    over = "the time for trials is over, 80 % of the 2 minutes of `max_minutes`, and the target is not reached"
    with pytest.warns(UserWarning, match=f"Compression ended since {over}.*Raise `max_minutes`"):
        at_a_pace(monkeypatch, 23, target_depth=1)


@pytest.mark.parametrize(("seconds", "chains"), [(70, 0), (40, 1)])
def test_minutes_that_are_too_few_to_try_anything_are_named(monkeypatch, seconds, chains):
    ended = f"nothing was tried: {chains} of 8 chains around activations and blocks were looked at within the 2 minutes"
    with pytest.warns(UserWarning, match=f"Compression ended since {ended}.*Raise `max_minutes`"):
        report = at_a_pace(monkeypatch, seconds)
    assert report.ended == f"{ended} of `max_minutes`"
    assert report.trials == []
    assert "few samples, 5 of the compressed model" in report.notes[-1]
    assert len(report.speedup.ratios) == 5


def test_a_depth_is_looked_for_before_anything_is_timed(monkeypatch):
    looks = []
    compare = targets.compare
    monkeypatch.setattr(targets, "compare", lambda *args: looks.append(args) or compare(*args))
    report = compress(mlps(4), BATCHES, target_depth=5, **OPTIONS).report
    assert sum(trial.kept for trial in report.trials) == 2
    assert report.after.depth == 5
    assert len(looks) == 1


@pytest.mark.parametrize("target", [None, 3])
def test_what_is_the_same_is_timed_once(monkeypatch, target):
    """Nothing is removed and nothing merges: as given, dense, collapsed and compressed are one network."""
    timed = []
    monkeypatch.setattr(timing, "stopwatch", lambda call: timed.append(call) or (lambda runs: 1.0))
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 8))
    context = pytest.warns(UserWarning, match="is not reached") if target else contextlib.nullcontext()
    with context:
        report = compress(model, BATCHES, include=[], target_speedup=target, objective="macs").report
    assert len(timed) == 1
    assert report.before == report.dense == report.exact == report.after
    assert {*report.speedup.ratios} == {1.0}


class Bars:
    """Every progress bar that is shown once the data are read, what it says, and when by the counting clock."""

    def __init__(self, monkeypatch, clock) -> None:
        self.shown, self.seen = [], []
        begin, update = tqdm.__init__, tqdm.update

        def init(bar, *args, **options):
            is_shown = not options.get("disable") and options.get("desc") != "Reading"
            options.update(disable=not is_shown, file=io.StringIO(), delay=0)
            begin(bar, *args, **options)
            if is_shown:
                self.shown.append(bar)
                self.seen.append((clock.now, bar.n, bar.total, bar.desc))

        def updated(bar, n=1):
            update(bar, n)
            if not bar.disable:
                self.seen.append((clock.now, bar.n, bar.total, bar.desc))

        monkeypatch.setattr(tqdm, "__init__", init)
        monkeypatch.setattr(tqdm, "update", updated)


@pytest.mark.parametrize("options", [{}, {"target_speedup": 1.2}, {"target_depth": 4}, {"max_minutes": 1e-9}])
def test_one_bar_tells_the_time_left_from_the_first_to_the_last_second(monkeypatch, options):
    clock = Clock(jittering(0.3))
    monkeypatch.setattr(timing, "stopwatch", clock)
    bars = Bars(monkeypatch, clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a minute too few
        compress(mlps(3), BATCHES, max_drift=10.0, **options)
    (_,) = bars.shown
    times, places, totals, names = zip(*bars.seen, strict=True)
    assert list(places) == sorted(places)
    assert {*totals} == {places[-1]}  # never past its end, and there at last
    assert len({name for name in names if name}) == 5
    silent = [later - earlier for earlier, later in itertools.pairwise([0.0, *times, clock.now])]
    assert max(silent) < 0.1 < clock.now


def test_what_it_will_take_is_known_from_the_start(monkeypatch):
    """The bar knows its total before the first chain, and is shown at once."""
    bars = []
    monkeypatch.setattr(
        progress, "tqdm", lambda *given, **options: bars.append(options) or tqdm(*given, **options | {"disable": True})
    )
    compress(mlps(3), BATCHES, **OPTIONS)
    reading, bar = bars
    assert (reading["desc"], reading["total"]) == ("Reading", len(BATCHES))
    assert bar["total"] > 0
    assert bar.get("delay", 0) == 0


def test_all_chains_are_fitted_in_one_run_and_again_only_where_what_comes_before_has_changed(monkeypatch):
    runs, looks = [], []
    gather, alone, around = search.gather, search.gather_alone, search.FittableChains.around

    def counted(model, chains, *args):
        runs.append([chain.sites for chain in chains])
        yield from gather(model, chains, *args)

    def counted_alone(model, dense, place, *args):
        runs.append([place.sites])
        return alone(model, dense, place, *args)

    monkeypatch.setattr(search, "gather", counted)
    monkeypatch.setattr(search, "gather_alone", counted_alone)
    monkeypatch.setattr(search.FittableChains, "around", lambda *args: looks.append(args[1]) or around(*args))
    report = compress(mlps(4), BATCHES, **OPTIONS).report
    chains = [(f"mlps.{number}.1",) for number in range(4)]
    assert [trial.sites for trial in report.trials] == chains[::-1]  # nothing that goes lies before the next
    both = [chain for chain in chains for _ in range(2)]  # each chain, and then the branch that it is
    assert runs == [both]

    runs.clear()
    model = mlps(4)
    for number, mlp in enumerate(model.mlps):  # now the first says least
        mlp[3].weight.data *= 0.1 ** (3 - number)
    report = compress(model, BATCHES, **OPTIONS).report
    assert [trial.sites for trial in report.trials] == chains
    assert runs == [both, *([chain] for chain in chains[1:])]


def test_a_fit_that_is_used_again_is_the_one_that_would_be_made(monkeypatch):
    torch.manual_seed(1)
    model = randomized(CifarResNet(8))
    images = [torch.randn(24, 3, 12, 12) for _ in range(3)]
    options = {
        **OPTIONS,
        "evaluate": lambda model: float(model(images[0]).detach().mean()),
        "tolerance": 1e-2,
        "max_rejections": 5,
    }
    once = compress(model, images, **options)
    monkeypatch.setattr(search.Search, "_in_place", lambda self, names: {"": nn.Identity()})  # nothing is what it was
    again = compress(model, images, **options)
    assert len({trial.kept for trial in once.report.trials}) == 2
    assert [vars(trial) for trial in once.report.trials] == [vars(trial) for trial in again.report.trials]
    for key, value in once.fitted.state_dict().items():
        assert torch.equal(value, again.fitted.state_dict()[key])


def test_a_run_that_fitted_is_compared_with_its_dense_network():
    """Two MLPs are gone, and nothing is left to merge: what that has saved is told all the same."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 64), nn.ReLU(),
                          nn.Linear(64, 8)).eval()  # fmt: skip
    model = copy.deepcopy(dense)
    fits = fit_chains(model, BATCHES, include=["1", "5"])
    linearize(model, ["1", "5"], stand_in="fitted", statistics=fits)
    report = collapse(model, BATCHES[0], objective="macs").report
    assert report.dense.macs == collapse(dense, BATCHES[0], objective="macs").report.before.macs == 64 * 4 * 8 * 64
    assert report.after.macs == 64 * 2 * 8 * 8
    assert report.dense.depth == 4
    assert report.after.depth == 2
    assert report.speedup.median > 2
    assert "16.00×" in str(report)


def test_a_model_with_masks_is_compressed_and_keeps_them():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    batches = [torch.randn(64, 4) for _ in range(4)]
    model(batches[0])
    result = compress(model, batches, objective="macs", max_drift=math.inf)
    assert result.model(batches[0]).shape == (64, 2)
    assert prune.is_pruned(model[0])
