"""Tests of collapses that replace chains around activations by fitted operators."""

import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier import collapse, compress, isolate_activations, linearize
from lightning_easier.collapsing.fit import fitting, replacing
from lightning_easier.collapsing.fit.chain_hooks import ChainHooks
from lightning_easier.collapsing.fit.fit_prices import SLACK, ChainPrices, PricedFit, choose
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.placing import with_statistics
from lightning_easier.support.timing import LatencyTable
from lightning_easier.zoo import CifarResNet


class Block(nn.Module):
    """A residual block whose convolutions work on 1, 2 or 3 axes."""

    def __init__(self, axes: int = 2, channels: int = 6, stride: int = 1) -> None:
        super().__init__()
        convolution, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], getattr(nn, f"BatchNorm{axes}d")
        self.conv1, self.bn1 = convolution(channels, channels, 3, stride, 1, bias=False), norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = convolution(channels, channels, 3, 1, 1), norm(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if self.stride == 1 else F.relu(out)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with two activations between."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.norm1, self.act1 = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.middle, self.norm2, self.act2 = nn.Conv2d(4, 4, 3, 1, 1, groups=groups), nn.BatchNorm2d(4), nn.ReLU6()
        self.expand = nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.reduce(x)))
        return self.expand(self.act2(self.norm2(self.middle(x))))


class Mlp(nn.Sequential):
    """That of a transformer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))


def randomized(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not those of the start."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


def almost_linear(model: nn.Module) -> nn.Module:
    """Replace the activations by ones that are nearly linear, so that a fit has to find nearly the same function."""
    for name in isolate_activations(model):
        model.set_submodule(name, nn.LeakyReLU(1 - 1e-9))
    return model.eval()


CASES = {
    "1d": (lambda: Block(1), (16, 6, 17)),
    "2d": (Block, (16, 6, 9, 7)),
    "3d": (lambda: Block(3, 3), (16, 3, 6, 5, 4)),
    "stride": (lambda: Block(stride=2), (16, 6, 10, 8)),
    "bottleneck": (Bottleneck, (16, 12, 9, 7)),
    "grouped bottleneck": (lambda: Bottleneck(4), (16, 12, 9, 7)),
    "mlp on vectors": (Mlp, (64, 8)),
    "mlp on tokens": (Mlp, (16, 5, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fitted_operator_takes_the_place_of_a_chain(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = randomized(make())
    batches = [torch.randn(shape) for _ in range(4)]
    inner = [site for site in isolate_activations(copy.deepcopy(model)) if site != "relu_1"]
    before = copy.deepcopy(model.state_dict())
    # at depth, so that a dense operator is taken wherever it takes fewer
    result = collapse(model, batches[0], mode="fit", sites=inner, calibration=batches, objective="depth", slack=0.0)
    (fitted,) = result.report.fitted
    assert list(fitted.sites) == inner
    assert fitted.kind in ("convolution", "linear")
    assert 0.1 < fitted.explained < 1
    assert result.report.after.depth == 1
    assert not result.model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    # nothing that comes as near does it at other sizes
    other = torch.randn(shape[0] + 1, *shape[1:])
    with torch.no_grad():
        assert result.model(other).shape == model(other).shape
        target = model(other)
        share = 1 - (result.model(other) - target).square().sum() / (target - target.mean()).square().sum()
    assert share > 0.1


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("1d", "2d", "3d", "stride")])
def test_what_is_linear_already_is_found_as_it_is(name):
    """One operator of the size of the largest can be these chains exactly, up to the borders of a 3×3 that is alone."""
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = almost_linear(randomized(make())).double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(8)]
    sites = list(isolate_activations(model))
    result = collapse(model, batches[0], mode="fit", sites=sites, calibration=batches, objective="depth")
    (fitted,) = result.report.fitted
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        difference = result.model(x) - model(x)
    if len(shape) == 4:  # the middle pads with zeros what the first would have made of zeros
        difference = difference[:, :, 1:-1, 1:-1]
        assert fitted.explained > 0.85
    else:
        assert fitted.explained == pytest.approx(1.0, abs=1e-6)
        assert difference.abs().max() < 1e-5


def test_the_skip_of_a_residual_block_goes_with_it():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(*[Block() for _ in range(3)]))
    batches = [torch.randn(16, 6, 9, 7) for _ in range(4)]
    result = collapse(model, batches[0], mode="fit", sites=["0.relu", "2.relu"], calibration=batches, objective="macs")
    assert [this.operators for this in result.report.fitted] == [("0.conv1", "0.conv2"), ("2.conv1", "2.conv2")]
    assert result.report.before.depth == 6
    assert result.report.after.depth == 4
    assert result.report.after.macs < 0.7 * result.report.before.macs
    convolutions = [module for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 4
    added = [node for node in result.model.graph.nodes if node.op == "call_function"]
    assert len(added) == 1  # of the block that stays


def test_a_network_keeps_most_of_its_function():
    torch.manual_seed(0)
    model = randomized(CifarResNet(20))
    batches = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    sites = [f"layer{stage}.{block}.relu1" for stage in (1, 2, 3) for block in (0, 1, 2)]
    result = collapse(model, batches[0], mode="fit", sites=sites, calibration=batches, objective="macs", slack=0.0)
    assert len(result.report.fitted) == 9
    assert result.report.after.depth < result.report.before.depth
    text = str(result.report)
    assert "variance explained" in text
    assert "layer2.0.conv1 + layer2.0.conv2" in text


def test_an_operator_that_is_cheaper_is_taken_where_it_is_nearly_as_good():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    with torch.no_grad():  # only the middle tap counts
        centre = model[0].weight[:, :, 1:2, 1:2].clone()
        model[0].weight.mul_(0.05)[:, :, 1:2, 1:2] = centre
    batches = [torch.randn(16, 8, 9, 9) for _ in range(4)]
    options = {"mode": "fit", "sites": ["1"], "calibration": batches, "objective": "macs"}
    kinds = {s: collapse(model, batches[0], slack=s, **options).report.fitted[0].kind for s in (0.0, 0.02, 2.0)}
    assert kinds == {0.0: "convolution", 0.02: "pointwise", 2.0: "affine"}


@pytest.mark.parametrize(("slack", "price"), [(0.0, 30.0), (0.01, 30.0), (SLACK, 20.0), (0.5, 10.0)])
def test_the_cheapest_is_taken_of_those_within_the_slack(slack, price):
    chain = FittableChains(Rows(1), ["mlps.0.1"]).in_rows()[0]
    choices = [PricedFit(chain, None, *each) for each in ((0.0, 99.0, 30.0), (SLACK, 99.0, 20.0), (0.3, 99.0, 10.0))]
    assert choose(choices, ChainPrices("macs", LatencyTable()), slack).price_after == price
    assert [each.represents_chain() for each in choices] == [True, True, False]
    options = inspect.signature(collapse).parameters, inspect.signature(compress).parameters
    assert [each["slack"].default for each in options] == [SLACK, SLACK]


def test_a_second_collapse_prices_with_what_was_measured():
    torch.manual_seed(0)
    model = randomized(Mlp())
    batches = [torch.randn(64, 8) for _ in range(2)]
    result = collapse(model, batches[0], mode="fit", sites=["1"], calibration=batches)
    for this in result.report.fitted:
        assert this.price_after < this.price_before < 1


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x, self.weight)))


class Reads(nn.Module):
    """Asks the second operator for more than what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x))) / self.second.out_features


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        return self.second(hidden) + hidden[:, :4]


class Hooked(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("make", "site", "shape", "reason"),
    [
        (Functional, "relu", (32, 4), "one of them is a function, not a module"),
        (Reads, "act", (32, 4), "does not run with an operator in its place"),
        (Tied, "act", (32, 4), "shares its parameters"),
        (TwoReaders, "act", (32, 4), "has 2 readers"),
        (Hooked, "act", (32, 4), "has hooks"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 1)),
         "1", (8, 4, 6, 6), "pads by something else than zeros"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 1)),
         "1", (8, 4, 6, 6), "no operator is fitted for Conv2d and ConvTranspose2d"),
        (lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 16, 1)),
         "1", (8, 4, 6, 6),
         "does not pay: what represents it nearly as well as the best takes 18,432 MACs instead of 11,520 MACs"),
    ],
)  # fmt: skip
def test_what_is_not_replaced_says_why_and_stays(make, site, shape, reason):
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randn(shape) for _ in range(3)]
    options = {"sites": [site], "calibration": batches, "objective": "macs", "slack": 0.0}
    result = collapse(model, batches[0], mode="fit", **options)
    assert result.report.fitted == []
    assert any(site in refusal.operators and reason in refusal.reason for refusal in result.report.refusals)
    with torch.no_grad():
        torch.testing.assert_close(result.model(batches[0]), model(batches[0]))


def test_models_of_several_inputs_are_calibrated_with_all_of_them():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mlp(x + y)

    torch.manual_seed(0)
    batches = [(torch.randn(64, 8), torch.randn(64, 8), torch.zeros(64)) for _ in range(3)]
    result = collapse(Two().eval(), batches[0][:2], mode="fit", sites=["mlp.1"], calibration=batches, objective="macs")
    assert len(result.report.fitted) == 1
    with pytest.raises(TypeError, match="first 2 elements are the input tensors"):
        collapse(Two().eval(), batches[0][:2], mode="fit", sites=["mlp.1"], calibration=[torch.randn(64, 8)])


BATCH = torch.randn(8, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibration": None}, ValueError, "`calibration` to hold batches, which mode='fit' fits to, but got None"),
        ({"calibration": BATCH}, TypeError, "`calibration` to be an iterable of batches, but got a tensor"),
        ({"calibration": []}, ValueError, "`calibration` to yield at least one batch"),
        ({"calibration": [BATCH[:, :3]]}, ValueError, "`calibration` to be accepted by the forward of Mlp"),
        ({"sites": None}, TypeError, "`sites` to be a sequence of names of activations, but got None"),
        ({"sites": "1"}, TypeError, "`sites` to be a sequence of names of activations, but got '1'"),
        ({"sites": ["2"]}, ValueError, r"activations that are not linear, but got '2', not one of \['1'\]"),
        ({"slack": -1}, ValueError, "`slack` to be finite and at least 0, but got -1"),
        ({"mode": "best"}, ValueError, r"`mode` to be one of \('exact', 'fit'\), but got 'best'"),
        ({"mode": "exact"}, ValueError, "they belong to mode='fit'"),
    ],
)
def test_bad_arguments_are_named_and_the_model_is_as_it_was(options, error, message):
    model = Mlp()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        collapse(model, BATCH, **({"mode": "fit", "sites": ["1"], "calibration": [BATCH]} | options))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_site_that_is_linear_already_is_an_error():
    with pytest.raises(ValueError, match="not linear, but got '1'"):
        collapse(linearize(Mlp(), ["1"]), BATCH, mode="fit", sites=["1"], calibration=[BATCH])


def test_one_bar_moves_inside_a_chain_and_ends_full(monkeypatch):
    bars = []

    class Bar(replacing.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO(), "delay": 0})
            self.seen = [self.n]
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

    monkeypatch.setattr(replacing, "tqdm", Bar)
    torch.manual_seed(0)
    model = randomized(nn.Sequential(Mlp(), nn.LayerNorm(8), Mlp()))
    batches = [torch.randn(64, 8) for _ in range(5)]
    sites = ["0.1", "2.1"]
    result = collapse(model, batches[0], mode="fit", sites=sites, calibration=batches, objective="depth", slack=0.0)
    assert len(result.report.fitted) == 2
    (bar,) = bars
    assert bar.seen[-1] == bar.total
    assert bar.seen == sorted(bar.seen)
    assert {*range(6)} <= {*bar.seen}
    assert bar.total // 2 in bar.seen


@pytest.mark.parametrize("offset", [None, torch.randn(6, dtype=torch.float64)])
def test_a_batch_norm_of_other_statistics_computes_the_same(offset):
    torch.manual_seed(0)
    norm = randomized(nn.Sequential(nn.BatchNorm2d(6)))[0].double()
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    mean, variance = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    other = with_statistics(norm, mean, variance, offset)
    lacking = x if offset is None else x - offset.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(other(lacking), norm(x))
    assert torch.equal(other.running_mean, mean)
    assert torch.equal(other.running_var, variance)


class Rows(nn.Module):
    """Residual MLPs one after the other, and blocks that count how often each was run."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(Mlp() for _ in range(depth))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            self.runs += 1
            x = x + mlp(x)
        return x


def gathered(model: nn.Module, chains, batches, arguments=None, **options):
    return dict(fitting.gather(model, chains, batches, arguments or batches[0], **options))


def tensors_of(one) -> list[Tensor]:
    return [t for sums in (one.moments.fitted, one.moments.held_out) for t in (sums.gram, sums.cross, sums.squares)]


@pytest.mark.parametrize("model", [Rows(4), nn.Sequential(Bottleneck(), nn.ReLU(), Bottleneck())], ids=["mlp", "conv"])
def test_one_run_sums_up_for_all_chains_what_a_run_for_each_does(monkeypatch, model):
    model = randomized(model)
    sites = list(isolate_activations(model))
    shape = (9, 5, 8) if isinstance(model, Rows) else (9, 12, 5, 4)
    batches = [(torch.randn(shape),) for _ in range(3)]
    chains = FittableChains(model, sites).in_windows(2)
    together = gathered(model, chains, batches)
    apart = [gathered(model, [chain], batches)[chain] for chain in chains]
    monkeypatch.setattr(fitting, "_MOST_BYTES", 0)  # each in a run of its own
    assert len(chains) > 3
    for other in (apart, [*gathered(model, chains, batches).values()]):
        for chain, one in zip(chains, other, strict=True):
            assert together[chain].shape == one.shape
            assert all(torch.equal(*pair) for pair in zip(tensors_of(together[chain]), tensors_of(one), strict=True))


@pytest.mark.parametrize("depth", [4, 8])
def test_the_sums_of_all_chains_take_one_run_over_the_data(monkeypatch, depth):
    model = Rows(depth).eval()
    chains = FittableChains(model, list(isolate_activations(model))).in_windows(2)
    assert len(chains) == depth
    model.runs = 0
    gathered(model, chains, [(torch.randn(9, 8),)] * 3)
    assert model.runs == 3 * depth
    model.runs = 0
    gathered(model, chains, [(torch.randn(9, 8),)] * 3, [torch.randn(1, 8)])  # examples of another shape besides
    assert model.runs == 4 * depth
    model.runs = 0
    gathered(model, chains[:2], [(torch.randn(9, 8),)] * 3)  # no further than the last of them
    assert model.runs == 3 * 2
    monkeypatch.setattr(fitting, "_MOST_BYTES", 2 * 2 * 8 * 9 * (9 + 8))  # two at a time
    model.runs = 0
    gathered(model, chains, [(torch.randn(9, 8),)] * 3)
    assert model.runs == 3 * sum(range(2, depth + 1, 2))


def test_a_chain_that_is_not_reached_leaves_the_others_their_sums():
    class Second(Rows):
        def forward(self, x: Tensor) -> Tensor:
            x = self.mlps[0](x)
            return self.mlps[2](x if x.shape[0] > 4 else self.mlps[1](x))

    model = Second(3).eval()
    chains = FittableChains(Rows(3), [f"mlps.{i}.1" for i in range(3)]).in_windows(1)
    batches = [(torch.randn(4, 8),), (torch.randn(8, 8),), (torch.randn(4, 8),)]
    first, second, third = (gathered(model, chains, batches)[chain] for chain in chains)
    assert second is None
    assert first.moments.fitted.positions + first.moments.held_out.positions == 16
    assert third.moments.fitted.positions + third.moments.held_out.positions == 16


def test_what_ran_before_a_chain_had_ended_is_told():
    model = Rows(3).eval()
    chains = FittableChains(model, list(isolate_activations(model))).in_windows(1)
    watched = ["mlps.0.0", "mlps.1.0", "mlps.1.3", "mlps.2.1"]
    ran = [one.ran for one in gathered(model, chains, [(torch.randn(9, 8),)] * 2, watched=watched).values()]
    assert ran == [{"mlps.0.0"}, {"mlps.0.0", "mlps.1.0", "mlps.1.3"}, {*watched}]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_pass_through_a_chain_is_told_once_as_it_ends():
    model = Rows(2).eval()
    (chain,) = FittableChains(model, ["mlps.0.1"]).in_windows(1)
    passes: list[tuple[Tensor, Tensor]] = []
    hooks = ChainHooks(model, chain, lambda *each: passes.append(each))
    hooks.attach()
    hooks.attach()  # once is enough
    x, mlp = torch.randn(5, 8), model.mlps[0]
    y = mlp(x)
    assert [[torch.equal(a, b) for a, b in zip(each, (x, y), strict=True)] for each in passes] == [[True, True]]
    assert not any(value.requires_grad for value in passes[0])
    mlp[3](torch.randn(5, 32))  # its end alone is no pass, nor is what was left in the middle
    mlp[0](torch.randn(2, 8))
    hooks.forget()
    mlp[3](torch.randn(2, 32))
    copy.deepcopy(model)(x)  # nor is a pass through a copy
    assert len(passes) == 1
    mlp[0](input=torch.randn(2, 8))  # by name
    mlp[3](torch.randn(2, 32))
    assert [len(value) for value in passes[1]] == [2, 2]
    hooks.detach()
    model(x)
    assert len(passes) == 2


def test_a_copy_that_a_forward_runs_is_not_taken_for_a_chain():
    class Copies(Rows):
        def forward(self, x: Tensor) -> Tensor:
            copy.deepcopy(self.mlps[0])(torch.zeros(3, 8))
            return self.mlps[0](x)

    model = Copies(1).eval()
    batches = [(torch.randn(9, 8),) for _ in range(3)]
    (found,) = gathered(model, FittableChains(Rows(1), ["mlps.0.1"]).in_windows(1), batches).values()
    assert found.moments.samples == 27
    assert found.shape == (9, 8)
