"""Tests of what the methods propose, and in which order."""

import math

import pytest
import torch
from torch import nn

from lightning_easier import (
    collapse,
    fit_chains,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
    restore,
)
from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.pruning.gains import Gains
from lightning_easier.pruning.methods import FitChains, Linearize, Measuring, Order, Proposal, fit
from lightning_easier.pruning.methods.fit import ChainEvidence
from lightning_easier.pruning.methods.linearize import LinearEvidence
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.structure.operations import FittedOperators, Identities
from lightning_easier.structure.stand_in import StandIn
from lightning_easier.structure.substitution import ChainFit, Substitution
from lightning_easier.support.costs import count_macs
from tests.collapsing.test_collapse_fit import Bottleneck, randomized


def test_what_has_no_affine_is_no_candidate_where_one_is_needed():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    affine = measure_affines(model, [torch.randn(8, 2)])["3"].to_plain()
    entropies = {"1": 0.1, "3": 0.2}
    for method in (Linearize(stand_in="affine"), Linearize(order=Order("linearity"))):
        found = method.propose(model, LinearEvidence(entropies, {"3": affine}, None, None))
        assert list(found.ranks) == ["3"]
    assert list(Linearize().propose(model, LinearEvidence(entropies, {}, None, None)).ranks) == ["1", "3"]


def test_what_is_proposed_has_a_name_of_its_own():
    proposal = Proposal()
    proposal.add(Identities(["a", "b"]), rank=1.0)
    assert proposal.ranks == {"a": 1.0}
    with pytest.raises(ValueError, match="`name` to be proposed once, but 'a' is there already"):
        proposal.add(Identities(["a"]), rank=2.0)
    with pytest.raises(ValueError, match="`name` to say what Identities removes"):
        proposal.add(Identities([]), rank=2.0)
    assert list(proposal.eligible(["a"], [])) == []  # b may not become linear
    assert list(proposal.eligible(["a", "b"], [])) == ["a"]
    assert list(proposal.eligible(["a", "b"], ["a"])) == []


def proposed(model: nn.Module, batches: list[torch.Tensor], most: int = 1, **options) -> Proposal:
    """Measure as the callback does, and have the method propose; so many activations may be in a chain."""
    order = Order(**{name: options.pop(name) for name in ("criterion", "gain", "mergeable_only") if name in options})
    method = (FitChains if options.pop("fit", False) else Linearize)(order=order, **options)
    sites = isolated_sites(model)
    names = [site.name for site in sites]
    worker = method.worker(Measuring())
    worker.start(model, sites)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "ACTIVATIONS_IN_A_CHAIN", most)
        worker.follow(model, names, len(batches))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    worker.finish()
    worker.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    worker.reduce()
    return worker.propose(model, names)


def fits(proposal: Proposal) -> dict[str, dict]:
    """Return the fitted operators of a proposal."""
    fitted = {name: plain for name, plain in proposal.operations.items() if plain["kind"] == "fitted"}
    return {name: plain["fits"][name] for name, plain in fitted.items()}


class Body(nn.Sequential):
    """1×1, 3×3, 1×1: one 3×3 in the place of the first two would be dearer than both."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 12, 1))


def mlps() -> nn.Module:
    """Two MLPs of other widths in a row, with a norm between that keeps them apart."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8),
        nn.Tanh(),
    ).eval()  # fmt: skip


MAPS = [torch.randn(16, 12, 9, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
VECTORS = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_entropies_rank_by_themselves():
    model = mlps()
    assert proposed(model, VECTORS).ranks == measure_entropy(model, VECTORS)
    assert Linearize().is_cheap


def test_linearity_is_what_the_affine_leaves_unexplained():
    model = mlps()
    affines = measure_affines(model, VECTORS)
    assert proposed(model, VECTORS, criterion="linearity").ranks == pytest.approx(
        {name: 1 - fit.explained for name, fit in affines.items()}
    )


def test_an_operator_that_saves_nothing_is_not_fitted():
    torch.manual_seed(0)
    model = Body().eval()
    assert fit_chains(model, MAPS)["1"].kind == "convolution"  # what explains most
    result = proposed(model, MAPS, fit=True, criterion="linearity")
    assert "1" not in fits(result)
    left_out = proposed(model, MAPS, fit=True, criterion="linearity", mergeable_only=True)
    assert "1" not in left_out.ranks
    weighed = proposed(model, MAPS, fit=True, criterion="linearity", gain="macs")
    assert fits(weighed)["1"]["kind"] == "pointwise"  # explains less, and saves the 3×3


def inverted(expansion: int = 6) -> nn.Module:
    """The bodies of two inverted residuals, as MobileNetV2 has them, with a Tanh between that keeps them apart."""
    torch.manual_seed(0)

    def body(channels: int) -> list[nn.Module]:
        wide = channels * expansion
        return [
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        ]  # fmt: skip

    return randomized(nn.Sequential(*body(12), nn.Tanh(), *body(12)))


def test_the_body_of_an_inverted_residual_goes_as_one():
    model = inverted()
    for options in ({}, {"criterion": "linearity"}, {"criterion": "linearity", "gain": "macs"}):
        result = proposed(model, MAPS, most=2, fit=True, **options)
        for first, second in (("2", "5"), ("11", "14")):
            chain_fit = ChainFit.from_plain(fits(result)[first])
            assert second in Substitution(chain_fit.form, chain_fit.tensors).names(first)
    result = proposed(model, MAPS, most=2, fit=True)
    found = {name: ChainFit.from_plain(plain) for name, plain in fits(result).items()}
    with torch.no_grad():
        before = model(MAPS[0])
        linearize(model, ["2"], stand_in="fitted", statistics=found)
        kept = [place for place in range(8) if not isinstance(model[place], nn.Identity | StandIn)]
        assert kept == [0, 7]  # the operator that has moved in, and the batch norm after
        assert model[0].kernel_size == (3, 3)
        linear = collapse(model[:8], MAPS[0], objective="macs").model
        torch.testing.assert_close(linear(MAPS[0]), model[:8](MAPS[0]), rtol=1e-4, atol=1e-5)
        assert len(list(linear.parameters())) == 2
        restore(model)
        torch.testing.assert_close(model(MAPS[0]), before)


def test_what_goes_with_another_is_not_chosen_beside_it():
    proposal = proposed(inverted(), MAPS, most=2, fit=True)
    assert proposal.disjoint(["2", "5", "11", "14"]) == ["2", "11"]
    assert proposal.disjoint(["5", "2"]) == ["5"]


def test_a_rank_is_the_cost_per_multiply_accumulate_saved():
    model = mlps()
    dense = proposed(model, VECTORS, fit=True, criterion="linearity")
    result = proposed(model, VECTORS, fit=True, criterion="linearity", gain="macs")
    assert result.ranks.keys() == {"1", "5"}
    for name, width in (("1", 64), ("5", 16)):
        fitted = fits(result)[name]
        after = {"linear": 8 * 8, "affine": 0}[fitted["kind"]] * 64
        saved = count_macs(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)), (VECTORS[0],)) - after
        assert result.ranks[name] == pytest.approx((1 - fitted["explained"]) / saved)
    assert dense.ranks["1"] == pytest.approx(1 - fits(dense)["1"]["explained"])
    by_entropy = proposed(model, VECTORS, fit=True, gain="macs")
    assert {fit["kind"] for fit in fits(by_entropy).values()} == {"linear"}  # entropy would not tell a bad affine


def test_exact_merges_are_priced_as_a_collapse_makes_them():
    torch.manual_seed(0)
    model = randomized(Bottleneck())
    result = proposed(model, MAPS, gain="macs")
    entropies = measure_entropy(model, MAPS)
    # 1×1 and 3×3 merge into a 3×3 of twelve channels, which is dearer; so do 3×3 and 1×1
    assert result.ranks == {"act1": math.inf, "act2": math.inf}
    model = mlps()
    entropies = measure_entropy(model, VECTORS)
    result = proposed(model, VECTORS, gain="macs", mergeable_only=True)
    assert result.ranks == pytest.approx(
        {"1": entropies["1"] / ((2 * 8 * 64 - 64) * 64), "5": entropies["5"] / ((2 * 8 * 16 - 64) * 64)}
    )


def test_what_merges_nothing_saves_no_time():
    """Two 3×3 would become a 5×5 with more work: the activation's own time, and a GELU takes its time, is no saving."""
    torch.manual_seed(0)
    pair = [nn.Conv2d(64, 64, 3), nn.GELU(), nn.Conv2d(64, 64, 3)]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)]
    model = nn.Sequential(*pair, *head).eval()
    batches = [torch.randn(8, 64, 24, 24)]
    found = proposed(model, batches, gain="latency", mergeable_only=True)
    assert list(found.ranks) == ["6"]


def test_a_price_leaves_the_generators_of_a_run_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batches = [torch.randn(64, 8)]
    before = torch.get_rng_state()
    for options in ({"gain": "latency"}, {"gain": "macs", "fit": True}):
        assert proposed(model, batches, **options).ranks
    assert torch.equal(torch.get_rng_state(), before)


def test_why_nothing_is_fitted_is_told():
    model = Body().eval()
    chains = ChainProbe(model, list(isolate_activations(model)), 1)
    chains.attach()
    with torch.no_grad():
        model(torch.randn(32, 12, 8, 8))
    chains.detach()
    entropies = dict.fromkeys(isolate_activations(model), 0.5)
    with pytest.warns(UserWarning, match="No operator can take the place of a chain: .*saves anything"):
        FitChains().propose(model, ChainEvidence(entropies, {}, None, Gains("macs", True), chains))
    assert "no operator that can move into the first of its chain saves anything" in chains.reasons.values()


def test_chains_that_share_an_operator_do_not_go_together():
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)]
    )
    proposal = Proposal()
    for name, chain_fit in fit_chains(model, [torch.randn(64, 6)]).items():
        proposal.add(FittedOperators([name], {name: chain_fit.to_plain()}), 0.5)
    assert proposal.disjoint(["3", "1", "5"]) == ["3"]
    assert proposal.disjoint(["1", "3", "5"]) == ["1", "5"]


@pytest.mark.parametrize("options", [{"stand_in": "affine"}, {"shift_padding": False}])
def test_options_of_what_lies_in_no_chain_are_refused_where_that_is_not_removed(options):
    assert FitChains(**options) == FitChains(**options)
    with pytest.raises(ValueError, match=r"`stand_in`, `trainable` and `shift_padding` to be left out with Order\("):
        FitChains(order=Order(mergeable_only=True), **options)
