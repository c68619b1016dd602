"""Whole blocks in a compression without training: one more rung of the ladder that chains go down."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import collapse, compress
from lightning_easier.collapsing.fit import fitting
from lightning_easier.collapsing.fit.block_fits import BlockProbe
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, priced
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.structure.stand_in import Bypass
from lightning_easier.support import timing
from lightning_easier.support.inference import relative_difference
from lightning_easier.support.timing import LatencyTable
from tests.clocks import Clock, honest, work_of


class Skip(nn.Module):
    """A block that holds its skip: it adds something, times a scale."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, width))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) * self.scale


class Branches(nn.Module):
    """Adds branches by itself, each of what a norm makes of the value."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in scales)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in scales)
        with torch.no_grad():
            for mlp, scale in zip(self.mlps, scales, strict=True):
                mlp[2].weight *= scale
                mlp[2].bias *= scale

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


def stack(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 4)).eval()


torch.manual_seed(0)
BATCHES = [torch.randn(48, 6) for _ in range(3)]
TOKENS = [torch.randn(16, 5, 8) for _ in range(3)]
GUIDED = {"objective": "macs", "evaluate": lambda _: 1.0, "narrow": False}


def test_a_block_that_does_next_to_nothing_goes_first_and_alone():
    torch.manual_seed(0)
    model = stack(Skip(), Skip(scale=1e-3), Skip())
    report = compress(model, BATCHES, max_drift=1e-4, **GUIDED).report
    (block,) = (trial for trial in report.trials if trial.kept)
    assert (block.operators, block.sites, block.kind) == (("2",), ("2.mlp.1",), "identity")
    before = report.trials[: report.trials.index(block)]
    assert all(trial.operators[0].startswith("2.") and "has taken its place" in trial.reason for trial in before)
    assert block.explained > 0.9999
    assert (block.price_before, block.price_after) == (2 * 8 * 24 * 48, 0.0)  # of the branch: the skip has no products
    assert "| 2 | identity |" in str(report)


def test_the_figures_of_the_report_are_those_of_the_models_that_are_returned():
    torch.manual_seed(0)
    model = stack(Skip(), Skip(scale=1e-2), Skip())
    scores = []

    def evaluate(model):
        scores.append(float(model(BATCHES[0]).mean()))
        return scores[-1]

    result = compress(model, BATCHES, evaluate=evaluate, tolerance=10.0, objective="macs", max_drift=1e-2)
    with torch.no_grad():
        dense, now = (torch.cat([each(x) for x in BATCHES]) for each in (model, result.fitted))
        drift = float((now - dense).square().sum() / (dense - dense.mean(0)).square().sum())
        assert relative_difference(result.model(BATCHES[0]), result.fitted(BATCHES[0])) < 1e-5
        assert float(result.fitted(BATCHES[0]).mean()) in scores
    assert result.report.drift == pytest.approx(drift, rel=1e-3)
    assert any(trial.kind == "identity" and trial.kept for trial in result.report.trials)
    assert not any(isinstance(part, Bypass) for part in result.model.modules())
    assert result.report.after.macs < result.report.exact.macs


def test_a_branch_leaves_zeros_and_a_collapse_nothing():
    torch.manual_seed(0)
    model = Branches([1.0, 1e-3, 1.0]).eval()
    result = compress(model, TOKENS, max_drift=1e-4, **GUIDED)
    assert [(t.operators, t.kind) for t in result.report.trials if t.kept] == [(("mlps.1",), "zeros")]
    assert not any(name.startswith(("mlps.1", "norms.1")) for name, _ in result.model.named_parameters())
    with torch.no_grad():
        x = TOKENS[0]
        left = model.norms[0](x), model.norms[2]
        x = x + model.mlps[0](left[0])
        torch.testing.assert_close(result.model(TOKENS[0]), x + model.mlps[2](left[1](x)), rtol=1e-4, atol=1e-5)


class Scaled(nn.Module):
    """Scales and shifts each channel, and next to nothing besides: an affine is what comes closest."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(8) + 1), nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * self.gamma + self.beta + 1e-4 * torch.tanh(self.linear(x)))


def test_an_affine_takes_the_place_of_a_block_that_is_nearly_one():
    torch.manual_seed(0)
    result = compress(stack(Skip(), Scaled()), BATCHES, max_drift=1e-4, exclude=["2.linear"], **GUIDED)
    kept = [(trial.operators, trial.kind) for trial in result.report.trials if trial.kept]
    assert kept == [(("2",), "affine")]
    with torch.no_grad():
        assert relative_difference(result.model(BATCHES[0]), result.fitted(BATCHES[0])) < 1e-5


class Maps(nn.Module):
    """A block of maps: a convolution is what comes closest, with the skip in it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.act, self.second = nn.LeakyReLU(0.97), nn.Conv2d(12, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


def test_a_convolution_takes_the_place_of_a_block_of_maps_with_its_skip():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Maps(), nn.Flatten(), nn.Linear(4 * 6 * 5, 3)).eval()
    batches = [torch.randn(24, 3, 8, 7) for _ in range(3)]
    result = compress(model, batches, max_drift=2e-2, **GUIDED)
    kept = [trial for trial in result.report.trials if trial.kept]
    assert [(trial.operators, trial.kind) for trial in kept] == [(("1",), "convolution")]
    assert str(result.fitted[1]) == "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    with torch.no_grad():
        assert relative_difference(result.fitted(batches[0]), model(batches[0])) < 0.1


class Wide(nn.Module):
    """A block whose chain a Linear may take the place of, before the block goes altogether."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * self.mlp(x).tanh()


def test_a_block_takes_the_place_of_what_was_put_in_it_and_gives_it_back_when_it_is_taken_back():
    torch.manual_seed(0)
    model = stack(Wide(), Skip())
    every = compress(model, BATCHES, tolerance=0.0, **GUIDED).report.trials
    first, block = (
        next(t for t in every if t.kind == kind and "1.mlp.1" in t.sites) for kind in ("linear", "identity")
    )
    assert first.operators == ("1.mlp.0", "1.mlp.2")
    assert block.operators == ("1",)
    assert first.reason == "identity has taken its place"
    assert block.kept

    def evaluate(model):  # the block is missed, what is in it is not
        return float(not isinstance(model[1], Bypass))

    result = compress(model, BATCHES, evaluate=evaluate, objective="macs", max_rejections=9, narrow=False)
    first = next(trial for trial in result.report.trials if trial.operators == ("1.mlp.0", "1.mlp.2"))
    block = next(trial for trial in result.report.trials if trial.operators == ("1",) and trial.kind == "identity")
    assert (first.kept, block.kept) == (True, False)
    assert type(result.fitted[1]) is Wide
    assert result.fitted[1].mlp[0].out_features == 8
    with torch.no_grad():
        assert relative_difference(result.model(BATCHES[0]), result.fitted(BATCHES[0])) < 1e-5


@pytest.mark.parametrize(("options", "blocks"), [
    ({}, {"1", "2"}), ({"include": ["2.*"]}, {"2"}), ({"exclude": ["2.mlp.1"]}, {"1"}),
    ({"include": ["1.*", "2.*"]}, {"1", "2"}),
])  # fmt: skip
def test_a_block_may_go_where_all_activations_in_it_may(options, blocks):
    torch.manual_seed(0)
    model = stack(Skip(scale=1e-3), Skip(scale=1e-3))
    report = compress(model, BATCHES, max_drift=math.inf, **options, **GUIDED).report
    assert {trial.operators[0] for trial in report.trials if trial.kind == "identity"} == blocks


class Attention(nn.Module):
    """Calls attention with one value three times and a mask, and adds the first of what it returns."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.attention.out_proj.weight *= scale

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, key_padding_mask=mask, need_weights=False)
        return self.head(x + y)


def test_a_block_without_activations_that_is_called_with_a_mask_goes_by_its_name():
    torch.manual_seed(0)
    model = Attention(1e-3).eval()
    batches = [(x, torch.rand(16, 5) > 0.8) for x in TOKENS]
    for _, mask in batches:
        mask[:, 0] = False
    options = {"example_inputs": batches[0], "max_drift": 1e-3, **GUIDED}
    result = compress(model, batches, **options)
    assert [(t.operators, t.sites, t.kind) for t in result.report.trials if t.kept] == [(("attention",), (), "zeros")]
    with torch.no_grad():
        torch.testing.assert_close(result.model(*batches[0]), model.head(batches[0][0]), rtol=1e-4, atol=1e-5)
    assert compress(model, batches, exclude=["attention"], **options).report.trials == []


def test_an_operator_in_the_place_of_a_block_is_called_as_the_block_is():
    torch.manual_seed(0)
    model = Attention(1.0).eval()
    batches = [(x, torch.zeros(16, 5, dtype=torch.bool)) for x in TOKENS]
    result = compress(model, batches, example_inputs=batches[0], objective="macs", max_drift=math.inf)
    (trial,) = result.report.trials
    assert trial.kind in ("linear", "low-rank")
    with torch.no_grad():
        expected = result.fitted(*batches[0])
        assert relative_difference(result.model(*batches[0]), expected) < 1e-5


def test_the_model_to_train_on_trains_is_copied_and_loaded():
    torch.manual_seed(0)
    result = compress(stack(Skip(), Skip(scale=1e-3), Skip()), BATCHES, max_drift=1e-4, **GUIDED)
    fitted = result.fitted
    before = {key: value.clone() for key, value in fitted.state_dict().items()}
    fitted.train()
    optimizer = torch.optim.SGD(fitted.parameters(), lr=0.1)
    fitted(BATCHES[0]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fitted.parameters())
    optimizer.step()
    twin = copy.deepcopy(fitted)
    twin.load_state_dict(before)
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    with torch.no_grad():
        assert relative_difference(loaded.eval()(BATCHES[0]), result.model(BATCHES[0])) < 1e-5
        again = collapse(fitted.eval(), BATCHES[0], objective="macs")
        assert relative_difference(again.model(BATCHES[0]), fitted(BATCHES[0])) < 1e-5
    assert again.report.taken_out == ["2"]
    assert not any(isinstance(part, Bypass) for part in again.model.modules())


class Writes(nn.Module):
    """A block that begins with an activation that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.linear = nn.LeakyReLU(0.5, inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return x + 1e-4 * self.linear(x)


def test_what_a_block_makes_of_its_input_is_measured_though_it_writes_into_it():
    torch.manual_seed(0)
    report = compress(stack(Skip(), Writes()), BATCHES, max_drift=math.inf, **GUIDED).report
    for trial in report.trials:
        if trial.operators == ("2",):
            assert trial.explained < 0.99


class Cached(nn.Module):
    """Calls a branch with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = Remembers(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(x, Cache()))


class Cache:
    """Holds what was computed before."""


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return torch.tanh(self.linear(x))


def test_a_block_that_is_called_with_a_cache_stays_and_says_why():
    model = Cached().eval()
    block = Block("branch", model.branch, "zeros", None)
    assert fittable_blocks(model, [block], [], TOKENS[:1]) == (
        [],
        {"branch": "it is called with a Cache, which it may change"},
    )
    assert not model.branch._forward_hooks


@pytest.fixture
def encoder(monkeypatch):
    """A model with a layer of torch that runs fused, and what the honest clock tells that it takes."""
    monkeypatch.setattr(timing, "stopwatch", Clock(honest))
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        return model, work_of(lambda: model(TOKENS[0]))


def test_a_block_that_runs_fused_is_priced_fused_though_chains_in_it_were_tried(encoder):
    """A chain in it that is put back leaves no trace: else it would cost more than the whole network."""
    model, whole = encoder
    report = compress(model, TOKENS, max_drift=math.inf).report
    chain, *blocks = report.trials
    assert chain.sites == ("0.activation",)
    assert blocks
    assert all(0.5 * whole < block.price_before < whole for block in blocks)


def test_a_block_that_runs_fused_is_priced_fused_though_hooks_watch_it(encoder):
    """Any hook turns the fused path off; those that only count are not timed."""
    model, whole = encoder
    probe = BlockProbe(model, find_blocks(model), ["0.activation"])
    probe.attach()
    with torch.no_grad():
        model(TOKENS[0])
    (choices,) = probe.choices()
    for each in probe.priced(choices, ChainPrices("latency", LatencyTable())):
        assert 0.5 * whole < each.price_before < whole
    watched = compress(model, TOKENS, max_drift=math.inf, include=[])
    assert watched.report.before.latency.median == pytest.approx(whole)


class Logarithm(nn.Module):
    """A block adds something to values that are zero at times, which has no logarithm without it."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.block = nn.ReLU(), Positive()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act(x)).log()


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * self.second(self.act(self.first(x))).square() + 1e-3


def test_what_makes_outputs_infinite_is_not_put_in_place_whatever_drift_is_allowed():
    torch.manual_seed(0)
    result = compress(Logarithm().eval(), BATCHES, max_drift=math.inf, exclude=["act"], **GUIDED)
    assert all(trial.kind != "identity" for trial in result.report.trials)
    assert math.isfinite(result.report.drift)
    with torch.no_grad():
        assert result.model(BATCHES[0]).isfinite().all()


@pytest.mark.parametrize(("mode", "score"), [("max", math.inf), ("min", -math.inf), ("max", math.nan)])
def test_a_score_that_is_not_finite_is_no_better_than_any(mode, score):
    torch.manual_seed(0)
    model = stack(Skip(), Skip(scale=1e-3))
    scores = iter([1.0, *[score] * 9])
    trials = compress(model, BATCHES, evaluate=lambda _: next(scores), mode=mode, objective="macs").report.trials
    assert trials
    assert not any(trial.kept for trial in trials)
    assert {trial.reason for trial in trials} == {f"the score of the model with it is not finite: {score}"}


def test_a_fit_of_which_is_not_known_what_it_explains_does_not_stand_in_the_way_of_others(monkeypatch):
    """Of not-a-number nothing is more or less."""

    def some_unknown(model, place, fits, *others):
        fits = [dataclasses.replace(fit, explained=math.nan) if fit.kind == "identity" else fit for fit in fits]
        return priced(model, place, fits, *others)

    monkeypatch.setattr(fitting, "priced", some_unknown)
    torch.manual_seed(0)
    report = compress(stack(Skip(), Skip(scale=1e-3)), BATCHES, objective="macs", max_drift=math.inf).report
    assert report.trials
    assert all(math.isfinite(trial.explained) for trial in report.trials)


class Mixing(nn.Module):
    """A block that nothing but a Linear comes near, which costs as much."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def test_what_slack_rules_out_is_said_with_what_to_do():
    torch.manual_seed(0)
    model = stack(Mixing())
    reason = compress(model, BATCHES, objective="macs").report.reasons["1"]
    assert reason.startswith("does not pay: what represents it nearly as well as the best takes ")
    assert "explains " in reason
    assert reason.endswith(
        "less of its variance than the best, more than the 2.0% of `slack`. Raise `slack`, or pass `evaluate` or a "
        "target to `compress`, which then tries it"
    )
    raised = compress(model, BATCHES, objective="macs", max_drift=math.inf, slack=1.0).report
    assert [trial.operators for trial in raised.trials] == [("1",)]
    assert "1" not in raised.reasons


class Activated(nn.Module):
    """A block with an activation after the addition; its body is one chain, or is more than that."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 32), nn.LeakyReLU(0.8), nn.Linear(32, 8)
        nn.init.normal_(self.second.weight)
        self.gate = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) if gated else None
        self.last = nn.LeakyReLU(0.9)

    def forward(self, x: Tensor) -> Tensor:
        made = self.second(self.act(self.first(x)))
        return self.last(x + (made if self.gate is None else self.gate(made) * made))


@pytest.mark.parametrize("gated", [False, True])
def test_an_operator_takes_the_place_of_a_block_with_a_last_activation_only_where_no_chain_is_all_else(
    gated, monkeypatch
):
    of = ChainPrices.of

    def with_additions(self, modules, shape, like):  # what goes with a block besides, in seconds
        costs = of(self, modules, shape, like)
        return costs | {"": costs[""] + 1000.0 * any(type(part) is Activated for part in modules[""].modules())}

    monkeypatch.setattr(ChainPrices, "of", with_additions)
    torch.manual_seed(0)
    report = compress(stack(Activated(gated), Skip()), BATCHES, **GUIDED).report
    kinds = {trial.kind for trial in report.trials if trial.operators == ("1",)}
    assert bool(kinds - {"identity"}) == gated
    if not gated:
        assert any(trial.operators == ("1.first", "1.second") for trial in report.trials)


def test_blocks_that_only_an_identity_could_stand_for_stay_where_nothing_tells_how_good_it_has_to_be():
    torch.manual_seed(0)
    model = stack(Activated(gated=False), Activated(gated=False))
    report = compress(model, BATCHES, objective="macs", max_drift=0.1).report
    assert all(trial.kind == "linear" for trial in report.trials)
    assert "slack" in report.reasons["1"]
