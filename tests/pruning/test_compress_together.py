"""What several changes do together: their order, the errors that they correct, and the batch norms at last."""

import math
from copy import deepcopy
from itertools import chain, pairwise, repeat

import pytest
import torch
from torch import nn

from lightning_easier import compress, isolate_activations
from lightning_easier.collapsing.fit import correcting
from lightning_easier.collapsing.fit.drift import change_of, drift_of, outputs_of
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.narrowing import NarrowFit
from lightning_easier.collapsing.fit.norms import MatchedNorms
from lightning_easier.pruning import mending, search, targets
from lightning_easier.pruning.search import Search
from lightning_easier.pruning.stages import REFITTING, STAGES, Clock
from lightning_easier.sites.discovery import KnownForwards
from lightning_easier.support.progress import Stages
from lightning_easier.support.timing import LatencyTable
from lightning_easier.zoo import CifarResNet


class Sum(nn.Module):
    """MLPs beside a skip. What the second computes goes against the first; the third has nothing to do with them."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)) for _ in range(3))
        first, second, third = self.mlps
        second.load_state_dict(first.state_dict())
        with torch.no_grad():
            second[2].weight *= -1.2
            third[2].weight *= 0.92

    def forward(self, value):
        return value + sum(mlp(value) for mlp in self.mlps)


def test_a_change_that_goes_against_what_is_in_place_comes_before_a_smaller_one():
    torch.manual_seed(0)
    model, batches = Sum().eval(), [torch.randn(64, 6) for _ in range(4)]
    report = compress(model, batches, objective="macs", max_drift=math.inf, include="mlps.*.1").report
    alone = {trial.sites[0]: trial.drift for trial in report.trials}
    order = list(dict.fromkeys(trial.sites[0] for trial in report.trials))
    assert alone["mlps.0.1"] < alone["mlps.2.1"] < alone["mlps.1.1"]
    assert order == ["mlps.0.1", "mlps.1.1", "mlps.2.1"]


class Saturated(nn.Module):
    """MLPs that no linear map comes near to. Either of the first two is enough for a sign; the third is beside it."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(3))
        eye = torch.eye(6)
        with torch.no_grad():
            for first, _, second in self.mlps:
                first.weight.copy_(torch.cat([eye, -eye]))
                second.weight.copy_(torch.cat([eye, eye], 1))
                first.bias.zero_()
                second.bias.fill_(-0.8)  # the mean of what is before it

    def forward(self, value):
        first, second, third = (mlp(value) for mlp in self.mlps)
        return torch.tanh(8 * (first + second)) + 0.8 * third


def test_of_two_of_which_either_is_enough_the_second_comes_after_what_adds_less_than_it():
    torch.manual_seed(0)
    model, batches = Saturated().eval(), [torch.randn(64, 6) for _ in range(4)]
    report = compress(model, batches, objective="macs", max_drift=math.inf, include="mlps.*.1").report
    alone = {trial.sites[0]: trial.drift for trial in report.trials}
    order = list(dict.fromkeys(trial.sites[0] for trial in report.trials))
    assert 3 * max(alone["mlps.0.1"], alone["mlps.1.1"]) < alone["mlps.2.1"]
    assert order.index("mlps.2.1") == 1


@pytest.mark.parametrize("widths", [(6, 64, 48, 6), (6, 64, 64, 64, 6), (6, 32, 96, 32, 96, 6)])
def test_chains_that_share_an_operator_are_not_tried_beside_each_other(widths):
    """Of two activations in a row the operator between belongs to both chains: one takes it from the other."""
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())][:-1]
    model, batches = nn.Sequential(*layers).eval(), [torch.randn(64, 6) for _ in range(4)]
    result = compress(model, batches, objective="macs", max_drift=math.inf)
    assert {site for trial in result.report.trials for site in trial.sites} <= {str(n) for n in range(1, 9, 2)}
    assert result.report.after.macs < result.report.before.macs
    with torch.no_grad():
        assert drift_of([result.model(batches[0])], [model(batches[0])]) < 1


class Residual(nn.Module):
    """A bottleneck with its skip, and an activation after both."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(12)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, value):
        inner = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(value))))))
        return self.relu3(value + self.bn3(self.conv3(inner)))


def test_bottlenecks_whose_chains_share_their_convolution_go_down_to_nothing():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12))
    model = randomized(nn.Sequential(stem, *[Residual() for _ in range(3)], nn.Flatten(), nn.Linear(1440, 4)))
    batches, options = images(16, 16), {"objective": "macs", "max_drift": math.inf, "target_speedup": 1e6}
    with pytest.warns(UserWarning, match="is not reached"):
        report = compress(model, batches, **options).report
    assert len({trial.kind for trial in report.trials}) > 2
    assert report.after.macs < 0.5 * report.before.macs


def test_the_next_is_chosen_by_what_the_model_computes_by_then_after_a_step_was_taken_back_too(monkeypatch):
    torch.manual_seed(0)
    model, batches = Sum().eval(), [torch.randn(64, 6) for _ in range(4)]
    looked_at, in_place, choose = [], [], Search.next_of
    monkeypatch.setattr(search, "change_of", lambda after, before: looked_at.append(after) or change_of(after, before))

    def next_of(self, candidates, is_over):
        looked_at.clear()
        chosen = choose(self, candidates, is_over)
        assert all(map(torch.equal, looked_at[0], outputs_of(self.model, [(batch,) for batch in batches])))
        in_place.append(len(self.steps))
        return chosen

    monkeypatch.setattr(Search, "next_of", next_of)
    scores = chain([1.0, 1.0, 0.0], repeat(1.0))  # as given, with the first, with the second, with the third
    report = compress(model, batches, evaluate=lambda _: next(scores), objective="macs", include="mlps.*.1").report
    assert in_place[:3] == [0, 1, 1]
    assert any(trial.reason is not None and trial.reason.startswith("beyond the tolerance") for trial in report.trials)


def searched(model, batches, sites):
    """A search with its first step in place, and the candidates that are left."""
    isolate_activations(model)
    found = Search(model, batches, batches[0], ChainPrices("macs", LatencyTable()), math.inf)
    with Stages(STAGES) as progress:
        candidates = found.candidates(sites, [], Clock(None, STAGES), progress)
    first = found.next_of(candidates)
    assert found.take(first) is not None
    return found, [each for each in candidates if each.choice.place.sites != first.choice.place.sites]


def test_what_comes_next_is_measured_anew_until_the_time_is_over(monkeypatch):
    torch.manual_seed(0)
    found, left = searched(Sum().eval(), [(torch.randn(64, 6),)], [f"mlps.{n}.1" for n in range(3)])
    tried, measure = [], search.try_out
    monkeypatch.setattr(search, "try_out", lambda *args: tried.append(args) or measure(*args))
    assert found.next_of(left, lambda: True) in left
    assert not tried
    assert found.next_of(left) in left
    assert tried


def test_what_overflows_beside_what_is_in_place_goes_last(monkeypatch):
    torch.manual_seed(0)
    found, left = searched(Sum().eval(), [(torch.randn(64, 6),)], [f"mlps.{n}.1" for n in range(3)])
    first = found.next_of(left, lambda: True)
    measure = search.try_out

    def overflow(model, choice, run):
        outputs = measure(model, choice, run)
        return [each * math.nan for each in outputs] if choice is first.choice else outputs

    monkeypatch.setattr(search, "try_out", overflow)
    others = [each for each in left if each is not first]
    assert found.next_of([first, *others]) in others
    assert found.next_of([*others, first]) in others


def test_changes_are_one_vector_whose_square_is_the_drift_and_of_many_values_some_are_taken():
    before = [torch.randn(40, 3), torch.randn(40, 5000), torch.arange(40)[:, None]]
    after = [each + torch.randn_like(each) if each.is_floating_point() else each + 1 for each in before]
    variance = sum(float((b - b.mean(0)).double().square().sum()) for b in before[:2])
    change = change_of(after, before)
    assert change.numel() == 40 * (3 + 1024)
    assert float(change.double().square().sum()) / variance == pytest.approx(drift_of(after, before), rel=0.02)
    assert torch.equal(change, change_of(after, before))


def randomized(model):
    """A network whose batch norms are in a state that no other has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    return model.eval()


def images(*sizes):
    """Images of a few patterns: values hang together, as in real ones."""
    patterns = torch.randn(5, 3 * 12 * 10, generator=torch.Generator().manual_seed(0))
    return [(torch.randn(size, 5) @ patterns).view(size, 3, 12, 10) for size in sizes]


OPTIONS = {"objective": "macs", "max_drift": math.inf, "include": "*.relu1"}


def without_matching_on_the_way(monkeypatch):
    """Have the search leave the batch norms as they are."""
    monkeypatch.setattr(MatchedNorms, "run", lambda self, run, kept=None: run())
    monkeypatch.setattr(MatchedNorms, "match", lambda self, wanted, kept: outputs_of(self._model, self._batches))


def test_batch_norms_are_matched_at_last_and_what_is_returned_computes_so(monkeypatch):
    torch.manual_seed(0)
    model, batches, looks = randomized(CifarResNet(14)), images(64, 64, 64), []
    without_matching_on_the_way(monkeypatch)
    monkeypatch.setattr(mending, "refit_kept", lambda *_: None)
    compare = targets.compare
    monkeypatch.setattr(targets, "compare", lambda *args, **options: looks.append(1) or compare(*args, **options))
    matched = compress(model, batches, **OPTIONS)
    assert len(looks) == 1  # values alone have changed since the last timing
    (note,) = [note for note in matched.report.notes if "batch norm" in note]
    assert f"{matched.report.drift:.2%}" in note
    (value,) = images(16)
    with torch.no_grad():
        torch.testing.assert_close(matched.model(value), matched.fitted(value), rtol=1e-3, atol=1e-3)
    dense = outputs_of(model, [(each,) for each in batches])
    assert matched.report.drift == pytest.approx(
        drift_of(outputs_of(matched.fitted, [(each,) for each in batches]), dense), rel=1e-4
    )

    monkeypatch.setattr(mending, "match_norms", lambda *_: None)
    plain = compress(model, batches, **OPTIONS)
    assert [trial.sites for trial in plain.report.trials] == [trial.sites for trial in matched.report.trials]
    assert matched.report.drift < plain.report.drift
    assert not any("batch norm" in note for note in plain.report.notes)


def test_batch_norms_stay_as_the_search_left_them_where_the_score_falls_with_others(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mending, "refit_kept", lambda *_: None)
    without_matching_on_the_way(monkeypatch)
    model, batches, left = randomized(CifarResNet(8)), images(64, 64, 64), []
    match = mending.match_norms

    def matching(candidate, *others):
        left.append(deepcopy(candidate.state_dict()))
        return match(candidate, *others)

    monkeypatch.setattr(mending, "match_norms", matching)
    only = {**OPTIONS, "include": "layer1.*.relu1"}
    result = compress(model, batches, evaluate=lambda _: 0.9 if left else 1.0, tolerance=0.5, **only)
    assert result.report.score_after == 1.0
    assert any(trial.kept for trial in result.report.trials)
    assert all(torch.equal(value, left[0][name]) for name, value in result.fitted.state_dict().items())
    assert not any("batch norm" in note for note in result.report.notes)
    left.clear()
    moved = compress(model, batches, evaluate=lambda _: 1.0, tolerance=0.5, **only)
    assert any(not torch.equal(value, left[0][name]) for name, value in moved.fitted.state_dict().items())


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_trial_that_is_taken_back_leaves_the_batch_norms_bit_for_bit(is_moved):
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(8)), images(64, 64, 64)
    before, seen = deepcopy(model.state_dict()), []

    def evaluate(candidate):
        seen.append(candidate.get_submodule("layer3.0.bn2").bias.detach().clone())
        if is_moved:  # from a GPU and back, as a Trainer does, which leaves other buffers there
            candidate._apply(torch.clone)
        return float(len(seen) == 1)

    result = compress(model, batches, evaluate=evaluate, max_rejections=2, **OPTIONS)
    assert len(result.report.trials) >= 2
    assert not any(torch.equal(each, seen[0]) for each in seen[1:3])  # they were matched while it was tried
    assert not any(trial.kept for trial in result.report.trials)
    assert all(torch.equal(value, before[name]) for name, value in result.fitted.state_dict().items())


def test_runs_are_compared_with_norms_as_the_last_match_left_them():
    torch.manual_seed(0)
    dense, batches = randomized(CifarResNet(8)), [(each,) for each in images(64, 64)]
    model = deepcopy(dense)
    norms = MatchedNorms(model, dense, batches)
    with torch.no_grad():
        model.layer1[0].conv2.weight *= 0.5
    plain, wanted = outputs_of(model, batches), outputs_of(dense, batches)

    def run():
        return norms.run(lambda: outputs_of(model, batches))

    assert drift_of(run(), wanted) < drift_of(plain, wanted)  # matched on the way
    assert all(map(torch.equal, outputs_of(model, batches), plain))
    norms.match(plain, {})  # nothing is nearer to that than it is
    assert all(map(torch.equal, outputs_of(model, batches), plain))
    assert all(map(torch.equal, run(), plain))
    norms.restore()
    assert drift_of(run(), wanted) < drift_of(plain, wanted)
    norms.match(wanted, {})
    assert drift_of(outputs_of(model, batches), wanted) < drift_of(plain, wanted)


def test_a_step_is_left_out_and_put_back_with_the_batch_norms_that_belong_to_it():
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(14)), [(each,) for each in images(64, 64, 64)]
    dense = model
    isolate_activations(dense)
    found = Search(dense, batches, batches[0], ChainPrices("macs", LatencyTable()), math.inf)
    with Stages(STAGES) as progress:
        candidates = found.candidates(["layer1.0.relu1", "layer2.1.relu1"], [], Clock(None, STAGES), progress)
    for name in ("layer1.0.relu1", "layer2.1.relu1"):
        assert found.take(next(each for each in candidates if each.choice.place.sites == (name,))) is not None
    both, drift = deepcopy(found.model.state_dict()), found.drift
    assert found.drift_seen == pytest.approx(drift, rel=1e-5)
    first, second = found.steps
    number = found.leave_out(first)
    alone = deepcopy(found.model.state_dict())
    given = dense.layer1[1].bn2.state_dict()
    assert all(torch.equal(alone[f"layer1.1.bn2.{each}"], value) for each, value in given.items())
    assert not torch.equal(alone["layer3.1.bn2.running_mean"], both["layer3.1.bn2.running_mean"])
    found.put_back(first, number)
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, both[name], rtol=1e-4, atol=1e-4)
    for step in (second, first):
        found.leave_out(step)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in found.model.state_dict().items())
    assert found.drift_seen == found.drift == 0


def test_a_narrower_chain_changes_as_much_in_place_as_it_did_when_it_was_tried():
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(8)), [(each,) for each in images(250)]
    isolate_activations(model)
    found = Search(model, batches, batches[0], ChainPrices("macs", LatencyTable()), math.inf, narrows=True)
    with Stages(STAGES) as progress:
        candidates = found.candidates(["layer1.0.relu1"], [], Clock(None, STAGES), progress)
    narrower = [each for each in candidates if isinstance(each.choice.fit, NarrowFit)]
    assert narrower
    for candidate in narrower:
        assert found.take(candidate) is not None
        assert found.drift_seen == pytest.approx(candidate.drift, rel=1e-3)  # as it was when it was tried
        found.undo("it was tried")


class Moved(nn.Module):
    """Two blocks and a norm between: what the first adds the norm can make up for."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 7 * 5, 3)
        with torch.no_grad():
            for conv in (self.first[0], self.first[2]):
                conv.weight.copy_(torch.eye(4)[:, :, None, None])
                conv.bias.zero_()
            self.first[0].bias.fill_(20.0)  # never off
            self.second[2].weight *= 0.8

    def forward(self, value):
        value = self.norm(value + self.first(value))
        return self.head((value + self.second(value)).flatten(1))


def test_what_batch_norms_make_up_for_is_not_held_against_a_candidate(monkeypatch):
    torch.manual_seed(0)
    model, batches = Moved(), [torch.randn(256, 4, 7, 5)]
    with torch.no_grad():
        for _ in range(100):
            model(batches[0])
    model.eval()

    def trials():
        report = compress(model, batches, objective="macs", evaluate=lambda _: 1.0).report
        return [trial for trial in report.trials if trial.operators == ("first",) and trial.kind == "zeros"]

    (gone,) = trials()
    assert gone.kept
    assert gone.drift < 1e-6
    monkeypatch.setattr(MatchedNorms, "run", lambda self, run, kept=None: run())
    assert all(trial.drift > 0.05 for trial in trials())


def test_errors_that_are_corrected_leave_less_drift(monkeypatch):
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(14)), images(64, 64, 64)
    without_matching_on_the_way(monkeypatch)
    monkeypatch.setattr(mending, "refit_kept", lambda *_: None)
    corrected = compress(model, batches, **OPTIONS).report
    monkeypatch.setattr(correcting, "gather_corrected", lambda *_: None)
    plain = compress(deepcopy(model), batches, **OPTIONS).report
    assert corrected.drift < 0.9 * plain.drift


@pytest.mark.parametrize(("sizes", "looked_at"), [((300, 300, 300), 2), ((300, 100), 2), ((600, 300), 1)])
def test_errors_are_looked_at_in_as_many_samples_as_tell_enough(sizes, looked_at):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model, batches, seen = deepcopy(dense), [(torch.randn(size, 2, 6, 5),) for size in sizes], []
    with torch.no_grad():
        model[0].weight *= 0.9
    place = FittableChains(model, ["2"], KnownForwards()).around(["2"])
    before = correcting.beginnings_of(dense, batches)
    gathered = correcting.gather_corrected(model, before, place, batches, batches[0], advance=lambda: seen.append(1))
    assert gathered is not None
    assert len(seen) == looked_at
    assert gathered.moments.samples == sum(sizes[:looked_at])
    assert gathered.moments.positions == 30 * sum(sizes[:looked_at])  # all that there are


FIRST = {**OPTIONS, "include": "layer1.0.relu1"}


def test_operators_that_stay_are_refitted_and_what_is_returned_computes_so(monkeypatch):
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(8)), images(64, 64, 64)
    before = deepcopy(model.state_dict())
    monkeypatch.setattr(mending, "match_norms", lambda *_: None)
    refitted = compress(model, batches, **FIRST)
    (note,) = [note for note in refitted.report.notes if "refitted" in note]
    assert "`layer2.0.conv1`" in note
    assert f"{refitted.report.drift:.2%}" in note
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(refitted.fitted.conv1.weight, model.conv1.weight)
    assert not torch.equal(refitted.fitted.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    (value,) = images(16)
    with torch.no_grad():
        torch.testing.assert_close(refitted.model(value), refitted.fitted(value), rtol=1e-3, atol=1e-3)
    dense, now = (outputs_of(each, [(batch,) for batch in batches]) for each in (model, refitted.fitted))
    assert refitted.report.drift == pytest.approx(drift_of(now, dense), rel=1e-4)
    monkeypatch.setattr(mending, "refit_kept", lambda *_: None)
    plain = compress(model, batches, **FIRST).report
    assert [trial.sites for trial in plain.trials] == [trial.sites for trial in refitted.report.trials]
    assert refitted.report.drift < 0.9 * plain.drift


def test_operators_stay_as_they_were_where_the_score_falls_with_others():
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(8)), images(64, 64, 64)
    given = model.layer2[0].conv1.weight.detach().clone()

    def evaluate(candidate):
        return float(torch.equal(candidate.get_submodule("layer2.0.conv1").weight, given))

    result = compress(model, batches, evaluate=evaluate, tolerance=0.5, **FIRST)
    assert result.report.score_after == 1.0
    assert torch.equal(result.fitted.layer2[0].conv1.weight, given)
    assert not any("refitted" in note for note in result.report.notes)


def test_no_more_is_refitted_when_the_time_is_over(monkeypatch):
    torch.manual_seed(0)
    model, batches, begun, stages = randomized(CifarResNet(8)), images(64, 64, 64), [], []
    monkeypatch.setattr(mending, "refit_kept", lambda *_: begun.append("refits"))
    monkeypatch.setattr(mending, "match_norms", lambda *_: begun.append("norms"))
    monkeypatch.setattr(Clock, "begin", lambda _, stage: stages.append(stage))
    monkeypatch.setattr(Clock, "is_over", lambda _: stages[-1] == REFITTING)
    assert compress(model, batches, max_minutes=30, **FIRST).report.trials
    assert not begun


def test_what_the_dense_network_returns_is_kept_no_longer_than_something_is_fitted(monkeypatch):
    seen: list[bool] = []
    refit = mending.refit_kept
    monkeypatch.setattr(mending, "refit_kept", lambda *given: seen.append(given[1].outputs != []) or refit(*given))
    monkeypatch.setattr(mending.Mending, "_match_norms", lambda self: seen.append("dense" in vars(self._search)))
    torch.manual_seed(0)
    compress(randomized(CifarResNet(8)), images(32, 32), **OPTIONS)
    assert seen == [True, False]
