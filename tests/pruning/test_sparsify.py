"""Which weights of which layers go, told by hand-made evidence: no Trainer, no data."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_easier.measure.affines import AffineFit
from lightning_easier.measure.moments import Moments
from lightning_easier.measure.switching import States
from lightning_easier.pruning.methods.layers import Layer, PathGuard, left_of, smallest
from lightning_easier.pruning.methods.sparsify import SparseEvidence, Sparsify, Switching, whole_weights
from lightning_easier.sites.activations import isolated_sites, plan_isolation
from lightning_easier.sites.feeding import FeedingWeight
from lightning_easier.sites.paths import Paths
from lightning_easier.structure.masking import packed, unpacked
from lightning_easier.structure.operations import from_plain


def layer(values, entropies, name="act", **others):
    weight = FeedingWeight(f"{name}.weight", others.get("neuron_dim", 0), name)
    return Layer(name, (torch.tensor(entropies, dtype=torch.float64),), (weight,), (torch.as_tensor(values),))


def states(on, off):
    return States(torch.tensor(on), torch.tensor(off), -1)


def evidence(model, switching):
    entropies = {name: float(each.entropies.mean()) for name, each in switching.items()}
    return SparseEvidence(entropies, switching, whole_weights(model))


def pruned_by(method, model, switching):
    plain = method.propose(model, evidence(model, switching)).operations["weights"]
    masks = from_plain(plain).pruned
    return {name: unpacked(bits, model.get_parameter(name).shape) for name, bits in masks.items()}


FIRST = [[0.1, -0.2], [0.3, 0.0]]  # a mean of 0.2 over three weights
SECOND = [[1.0, -2.0], [0.0, 3.0]]  # a mean of 2


def test_importance_is_entropy_times_the_mean_magnitude_of_what_is_left():
    first, second = layer(FIRST, [0.5, 0.0], "a"), layer(SECOND, [0.1, 0.3], "b")
    assert (first.left, second.left) == (3, 3)
    assert (first.mean, second.mean) == pytest.approx((0.2, 2.0))
    nepenthe, egp = Sparsify(), Sparsify(variant="egp")
    assert [nepenthe._importance(each) for each in (first, second)] == pytest.approx([0.5 * 0.2, 0.2 * 2.0])
    assert [egp._importance(each) for each in (first, second)] == pytest.approx([0.25 * 0.2, 0.2 * 2.0])
    by_neuron = Sparsify(importance="neuron")
    assert by_neuron._importance(first) == pytest.approx(0.5 * 0.15)
    assert by_neuron._importance(second) == pytest.approx(0.1 * 1.5 + 0.3 * 3.0)
    flattened = layer(FIRST, [0.5, 0.5, 0.5, 0.5], "c")  # its rows are not the neurons: all have the same mean
    assert by_neuron._importance(flattened) == pytest.approx(4 * 0.5 * 0.2)
    transposed = layer(np.array(FIRST).T, [0.5, 0.0], "d", neuron_dim=1)
    assert by_neuron._importance(transposed) == pytest.approx(0.5 * 0.15)


def test_how_many_go_of_each_layer():
    generator = torch.Generator().manual_seed(0)
    many = [
        layer(torch.randn(20, 5, generator=generator) * scale, [0.5], name) for scale, name in ((0.1, "a"), (1, "b"))
    ]
    ratio = many[0].mean / many[1].mean
    relevance = torch.tensor([(1 + ratio) / ratio, 1 + ratio])
    assert 0.99 < float(relevance.softmax(0)[0]) < 1
    assert Sparsify(0.5).counts(many)[0] == math.floor(100 * float(relevance.softmax(0)[0]))
    assert Sparsify(0.5, "uniform").counts(many) == [50, 50]
    together = torch.cat([each.magnitudes for each in many])
    threshold = together.sort().values[99]
    assert Sparsify(0.5, "magnitude").counts(many) == [int((each.magnitudes <= threshold).sum()) for each in many]
    settled = [many[0], layer(torch.ones(10, 10), [0.0], "c")]
    assert Sparsify(0.5, "egp").counts(settled) == [50, 0]
    # 100 weights are the budget; the first has as many and nearly all of the share
    assert Sparsify(0.5).counts(settled)[1] == math.floor(100 * float(torch.tensor([1.0, 0.0]).softmax(0)[1]))
    assert Sparsify(0.5).counts([settled[1]]) == [0]
    assert Sparsify(0.5).counts([]) == []


def test_the_smallest_go_and_ties_go_by_place():
    one = layer([[0.5, -0.1], [0.0, 0.1], [0.1, -0.7]], [0.5, 0.5, 0.5], "a")
    (left,) = one.left_after(2).values()
    assert left.tolist() == [[True, False], [False, False], [True, True]]
    assert smallest([one, layer([[0.05, 9.0]], [1.0], "b")], 0.5) == [2, 1]
    assert smallest([], 0.5) == []


def test_two_weights_of_one_layer_are_ranked_together():
    weights = (FeedingWeight("a.weight", 0, "a"), FeedingWeight("b.weight", 0, "b"))
    both = Layer("act", (torch.ones(1),), weights, (torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 3.0]])))
    left = left_of([both], [2])
    assert {name: each.tolist() for name, each in left.items()} == {
        "a.weight": [[False, True]],
        "b.weight": [[False, True]],
    }


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.up, self.down = nn.Linear(4, 4), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        y = self.linear(x)
        return self.head(torch.cat([self.up(y), self.down(-y)], -1))


def test_a_weight_that_feeds_two_activations_is_pruned_once_and_not_if_its_owner_is_excluded():
    model = Shared()
    isolated_sites(model)
    switching = {name: Switching(states([5] * 4, [5] * 4)) for name in ("up", "down")}
    masks = pruned_by(Sparsify(0.5), model, switching)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"linear.weight": 8}
    proposal = Sparsify(0.5).propose(model, evidence(model, {"down": switching["down"]}))
    assert proposal.operations == {}


def chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    isolated_sites(model)
    return model


def test_what_would_cut_every_way_is_held_back_and_no_more_than_that():
    model = chain()
    guard = PathGuard(Paths(model, plan_isolation(model)), {})
    layers = [
        Layer(name, (torch.ones(4),), (FeedingWeight(weight, 0, ""),), (model.get_parameter(weight),))
        for name, weight in (("1", "0.weight"), ("3", "2.weight"))
    ]
    assert guard.hold_back(layers, [6, 5]) == ([6, 5], [])
    kept, said = guard.hold_back(layers, [12, 5])
    assert kept[1] == 5
    paths = Paths(model, plan_isolation(model))
    assert paths.is_open(left_of(layers, kept))
    assert not paths.is_open(left_of(layers, [kept[0] + 1, 5]))
    assert said == [f"{12 - kept[0]} held back before `1`: else no way would be left from input to output"]
    kept, _ = guard.hold_back(layers, [12, 16])
    assert paths.is_open(left_of(layers, kept))
    assert not paths.is_open(left_of(layers, [kept[0] + 1, kept[1]]))
    assert not paths.is_open(left_of(layers, [kept[0], kept[1] + 1]))


def test_nothing_is_pruned_where_no_way_is_left_already():
    model = chain()
    nn.init.zeros_(model[2].weight)
    switching = {name: Switching(states([5] * 4, [5] * 4)) for name in ("1", "3")}
    with pytest.warns(UserWarning, match="no output of the model depends on its input"):
        assert Sparsify(0.5).propose(model, evidence(model, switching)).operations == {}


def test_an_activation_of_which_all_neurons_are_off_stays_where_it_is_the_only_way():
    model = chain()
    switching = {"1": Switching(states([0] * 4, [9] * 4)), "3": Switching(states([9] * 4, [0] * 4))}
    proposal = Sparsify(0.5).propose(model, evidence(model, switching))
    assert proposal.linear("linear") == ["3"]
    assert proposal.exact == ["linear"]
    trained = replace(evidence(model, switching), is_of_the_model=False)  # its weights were others
    assert Sparsify(0.5).propose(model, trained).exact == []
    switching = {"1": Switching(states([0, 0, 9, 9], [9, 9, 0, 0])), "3": Switching(states([9] * 4, [0] * 4))}
    proposal = Sparsify(0.5).propose(model, evidence(model, switching))
    assert proposal.linear("linear") == ["1", "3"]
    assert proposal.operations["linear"]["affines"]["1"]["scale"].tolist() == [0, 0, 1, 1]


def test_a_guard_counts_deviations_from_zero():
    on = states([9, 9], [0, 0])
    near = Moments(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]), -1)
    seen = Switching(on, near)
    assert [seen.is_settled(guard) for guard in (0.0, 1.0, 1.1)] == [True, True, False]
    assert not Switching(on).is_settled(1.0)  # not measured
    assert not Switching(states([9, 1], [0, 1]), near).is_settled(0.0)
    dead = Switching(states([0, 0], [0, 0]), Moments(torch.zeros(2), torch.zeros(2), -1))
    assert dead.is_settled(3.0)


def test_what_is_not_exact_is_proposed_but_not_to_be_done_at_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    isolated_sites(model)
    closest = AffineFit(torch.ones(4).double(), torch.zeros(4).double(), -1, 0.98)
    settled = Switching(states([9] * 4, [0] * 4), None, closest)
    switching = {"1": settled, "3": Switching(states([5] * 4, [5] * 4))}
    proposal = Sparsify(0.5).propose(model, evidence(model, switching))
    assert (proposal.linear("weights"), "linear" in proposal.operations, proposal.exact) == (["1"], False, [])
    assert any("not exactly: 98.0% explained" in note for note in proposal.operations["weights"]["said"])
    proposal = Sparsify(0.5).propose(model, evidence(model, {"1": settled}))  # nothing is left to prune
    assert (proposal.linear("linear"), proposal.exact) == (["1"], [])


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 3, 1)])
def test_masks_are_packed_and_unpacked(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(unpacked(packed(mask), torch.Size(shape)), mask)


class Slices(nn.Module):
    """Reads some neurons only, in ways that the flow does not tell."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.act = how, nn.Linear(4, 8), nn.ReLU()
        self.second, self.last = nn.Linear(3 if how == "slice" else 8, 6), nn.ReLU()
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.act(self.first(x))
        if self.how == "slice":
            x = x[:, 2:5]
        elif self.how == "shuffle":
            x = x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        else:
            halves = x.chunk(2, 1)
            x = torch.cat([halves[1], halves[0]], 1)
        return self.head(self.last(self.second(x)))


@pytest.mark.parametrize("how", ["slice", "shuffle", "chunk"])
@pytest.mark.parametrize("amount", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("variant", ["nepenthe", "egp", "magnitude", "uniform"])
def test_a_way_is_left_whichever_neurons_are_read(how, amount, variant):
    torch.manual_seed(0)
    model = Slices(how)
    isolated_sites(model)
    switching = {"act": Switching(states([5] * 8, [5] * 8)), "last": Switching(states([5] * 6, [4] * 6))}
    for name, mask in pruned_by(Sparsify(amount, variant), model, switching).items():
        model.get_parameter(name).data.masked_fill_(mask, 0.0)
    for parameter in model.parameters():
        parameter.data.abs_()
    assert float(model(torch.rand(20, 4)).std(0).max()) > 0


class Beside(nn.Module):
    """Has a network that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.beside = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)


def test_a_layer_that_the_forward_does_not_reach_is_not_emptied():
    model = Beside()
    isolated_sites(model)
    switching = {"net.1": Switching(states([5] * 8, [5] * 8)), "beside.1": Switching(states([1] * 8, [99] * 8))}
    proposal = Sparsify(0.6).propose(model, evidence(model, switching))
    assert any("1 held back before `beside.1`" in note for note in proposal.operations["weights"]["said"])
    assert int(pruned_by(Sparsify(0.6), model, switching)["beside.0.weight"].sum()) == 31
