"""NEPENTHE and EGP: unstructured pruning, steered by entropy until whole layers stop switching and become linear.

A round makes the smallest weights zero and holds them so while training goes on. How many go of each layer is told by
the entropy of the activation that it feeds (:mod:`lightning_easier.pruning.methods.budget`). An activation of which no
neuron switches any more is linear on what was measured, neuron by neuron, and an affine takes its place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_easier.measure.affines import AffineFit
from lightning_easier.measure.entropy import entropy_of_counts
from lightning_easier.measure.moments import Moments
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.measure.switching import States, SwitchedAffine, has_pieces, switched_affine
from lightning_easier.pruning.methods.base import Evidence, Measuring, Method, Proposal, Worker
from lightning_easier.pruning.methods.budget import (
    VARIANTS,
    LayerState,
    Variant,
    budgets,
    uniform_budgets,
)
from lightning_easier.pruning.methods.layers import Layer, PathGuard, left_of, smallest
from lightning_easier.pruning.methods.weights import check_weights_can_be_pruned, why_computed
from lightning_easier.sites.activations import ActivationSite, plan_isolation, unwrap
from lightning_easier.sites.dataflow import FlowNode, Kind
from lightning_easier.sites.discovery import IsolationPlan
from lightning_easier.sites.feeding import feeding_weights
from lightning_easier.sites.paths import Paths
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.masking import Masks, Switched, packed
from lightning_easier.structure.operations import Operation
from lightning_easier.support.arguments import check_bool, check_choice, check_non_negative, check_share
from lightning_easier.support.processes import reshard

Importance = Literal["layer", "neuron"]
IMPORTANCES: tuple[Importance, ...] = ("layer", "neuron")
WEIGHTS = "weights"
"""What a round of pruning is called in a report."""
LINEAR = "linear"
"""What is called so: activations become linear, and no weight is pruned."""
SPARSITY_KEY = "sparsity"
"""Tag of the share of zeros among all weights."""
WEIGHT_SPARSITY_KEY = "weight_sparsity"
"""What the tag of each weight begins with; MLflow's folders can't hold ``sparsity`` beside ``sparsity/<weight>``."""


@dataclass(frozen=True)
class Switching:
    """What was seen of the neurons of one activation.

    Attributes:
        states: How often they were ON and OFF.
        moments: Mean and deviation of their pre-activations; None where they were not measured.
        closest: The affine that comes closest; None where it was not measured.
    """

    states: States
    moments: Moments | None = None
    closest: AffineFit | None = None

    @property
    def entropies(self) -> Tensor:
        """Entropy of each neuron in bits."""
        return entropy_of_counts(self.states.on, self.states.off).cpu()

    def is_settled(self, guard: float) -> bool:
        """Tell whether no neuron switches, and none is nearer to zero than so many standard deviations."""
        if bool(((self.states.on > 0) & (self.states.off > 0)).any()):
            return False
        if guard == 0:
            return True
        moments = self.moments
        return moments is not None and bool((moments.mean.abs() >= guard * moments.deviation).all())


@dataclass(frozen=True)
class SparseEvidence(Evidence):
    """What was measured of a model, besides the entropies.

    Attributes:
        switching: Name -> what its neurons did.
        weights: Parameter name -> values, of all that have two axes or more, whole where they are sharded.
        is_of_the_model: Whether that was seen of the model as it is; while it was trained it was another.
    """

    switching: Mapping[str, Switching]
    weights: Mapping[str, Tensor]
    is_of_the_model: bool = True


@dataclass(frozen=True)
class Sparsify(Method):
    """Prune weights by magnitude, as many of each layer as entropy tells, until layers become linear.

    Layers are the weights that feed an activation, found through the data flow; shortcuts, heads and attention do not
    take part, nor do frozen weights. Weights that are zero count as pruned.

    Args:
        amount: Share of the weights left in these layers that a round prunes, in (0, 1).
        variant: How many go of each layer: ``"nepenthe"`` and ``"egp"`` by the entropy of its activation,
            ``"magnitude"`` the smallest of all layers together, ``"uniform"`` the same share of each.
        guard: How many standard deviations the mean pre-activation of a neuron has to be away from zero before the
            activation becomes linear. A neuron that was OFF on all that was measured may be ON on other data; at 0 that
            is left to the score.
        keep_zeros: Whether weights of these layers that are zero when a run begins stay so from its first round on, as
            those that an earlier run has pruned.
        importance: Whether entropy weighs the magnitudes ``"layer"`` by layer, or ``"neuron"`` by neuron
            (the sum over neurons i of H_i times the mean of their magnitudes): the paper can be read both ways.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range, or does not go with another.

    Note:
        NEPENTHE takes the mean entropy of the neurons that do switch, EGP of all. Published code replaces no layer;
        here activations that do not switch become linear, which is exact for ReLU, LeakyReLU and PReLU on the data that
        was measured. For others the affine that comes closest is taken, and the report says how close.

    Source: NEPENTHE, arXiv 2404.16890; EGP, arXiv 2308.06619.
    """

    amount: float = 0.5
    variant: Variant = "nepenthe"
    guard: float = 0.0
    importance: Importance = "layer"
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        check_share("amount", self.amount)
        if self.amount == 1:
            raise ValueError(
                f"Expected argument `amount` to be in (0, 1), but got {self.amount}: all weights of the layers would go"
            )
        check_choice("variant", self.variant, VARIANTS)
        check_non_negative("guard", self.guard)
        check_choice("importance", self.importance, IMPORTANCES)
        check_bool("keep_zeros", self.keep_zeros)
        if self.importance == "neuron" and not self.is_by_entropy:
            raise ValueError(
                f"Expected argument `importance` to be 'layer' with variant={self.variant!r}, which does not ask for "
                f"it, but got {self.importance!r}"
            )

    @property
    def is_by_entropy(self) -> bool:
        """Whether entropy tells how many weights go."""
        return self.variant in ("nepenthe", "egp")

    @property
    def is_cheap(self) -> bool:
        """No: what feeds what is looked for."""
        return False

    @property
    def looks_at_operators(self) -> bool:
        """No: they may be sharded."""
        return False

    @property
    def charts(self) -> dict[str, str]:
        """Those of zeros and of emptied layers."""
        return {
            "Zeros among the weights": f"^({SPARSITY_KEY}|{WEIGHT_SPARSITY_KEY}/.*)$",
            "Layers emptied": "^emptied$",
        }

    def worker(self, measuring: Measuring) -> Worker:
        """Return who measures for it in a run.

        Raises:
            ValueError: If only a sample is counted.
        """
        if measuring.sample < 1:
            raise ValueError(
                f"Expected argument `sample` of Measuring to be 1.0 with Sparsify, but got {measuring.sample}: an "
                f"activation is linear where no neuron switches on any sample"
            )
        return SparseWorker(self, measuring)

    def check(self, model: nn.Module, names: Sequence[str], *, named: bool) -> None:
        """Refuse a model of which no weights can be pruned."""
        check_weights_can_be_pruned(unwrap(model), names, named=named)

    def held_from_the_start(self, model: nn.Module, names: Sequence[str]) -> list[Operation]:
        """Return masks of the weights that are zero, if they are to stay so."""
        if not self.keep_zeros:
            return []
        inner = unwrap(model)
        feeding, whole = feeding_weights(inner, plan_isolation(inner)).weights, whole_weights(inner)
        weights = [weight.name for site in names for weight in feeding.get(site, ())]
        pruned = {name: packed(whole[name] == 0) for name in weights if bool((whole[name] == 0).any())}
        return [Masks([], {}, pruned=pruned)] if pruned else []

    def propose(self, model: nn.Module, evidence: SparseEvidence) -> Proposal:
        """Propose to prune weights together with what has become linear, and the latter alone."""
        plan = plan_isolation(model)
        guard = PathGuard(Paths(unwrap(model), plan), {name: values != 0 for name, values in evidence.weights.items()})
        settled = guard.passing(self._settled(plan, evidence))
        exact = {name: each for name, each in settled.items() if each.is_exact}
        layers = _layers(unwrap(model), plan, evidence)
        pruned, said = self._pruned(guard, layers, evidence.weights)
        linear = {**exact, **settled}
        says = {name: _said_of(name, each, evidence.switching[name]) for name, each in linear.items()}
        proposal = Proposal()
        if pruned:
            masks = Masks(list(linear), _plain(linear), said=[*said, *says.values()], called=WEIGHTS, pruned=pruned)
            proposal.add(masks, 0.0, WEIGHTS)
            linear = exact
        if linear:
            switched = Switched(list(linear), _plain(linear), said=[says[name] for name in linear], called=LINEAR)
            proposal.add(switched, 1.0, LINEAR)
            is_exact = evidence.is_of_the_model and linear.keys() == exact.keys()
            proposal.exact = [LINEAR] if is_exact else []
        return proposal

    def _settled(self, plan: IsolationPlan, evidence: SparseEvidence) -> dict[str, SwitchedAffine]:
        """Return what takes the places of activations whose neurons do not switch."""
        found = {}
        for site in plan.sites:
            seen = evidence.switching.get(site.name)
            if site.name in evidence.entropies and seen is not None and seen.is_settled(self.guard):
                affine = switched_affine(site.module, seen.states.on > 0, seen.states.dim, seen.closest)
                if affine is not None:
                    _, node = plan.found[site.name]
                    is_exact = affine.is_exact and not _writes_into_what_is_read(site.module, node)
                    found[site.name] = affine._replace(is_exact=is_exact)
        return found

    def _pruned(
        self, guard: PathGuard, layers: Sequence[Layer], weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Return which weights to prune, as bits, and what to say of it; nothing where nothing goes."""
        counts = self.counts(layers)
        kept, held = guard.hold_back(layers, counts)
        if not any(kept):
            return {}, []
        masks = {name: ~left for name, left in left_of(layers, kept).items()}
        pruned, size = sum(kept), sum(value.numel() for value in weights.values())
        zeros = pruned + sum(int((value == 0).sum()) for value in weights.values())
        said = [f"{pruned:,} of them pruned, {zeros / size:.1%} of all {size:,} are zero"]
        emptied = [f"`{layer.name}`" for layer, count in zip(layers, kept, strict=True) if 0 < layer.left == count]
        said += [f"none is left before {', '.join(emptied)}"] if emptied else []
        return {name: packed(mask) for name, mask in masks.items()}, said + held

    def counts(self, layers: Sequence[Layer]) -> list[int]:
        """Return how many weights go of each layer."""
        if self.variant == "magnitude":
            return smallest(layers, self.amount)
        states = [LayerState(self._importance(layer), layer.left) for layer in layers]
        if self.variant == "uniform":
            return uniform_budgets(states, self.amount)
        if not any(state.importance > 0 for state in states):  # all layers are linear, or empty
            return [0] * len(layers)
        return budgets(states, self.amount, leaves_out_zero=self.variant == "egp")

    def _importance(self, layer: Layer) -> float:
        if not self.is_by_entropy or layer.left == 0:
            return 0.0
        importance = self._entropy(layer) * layer.mean
        if self.importance == "neuron":
            means = [layer.mean_of_neurons(len(entropies)) for entropies in layer.entropies]
            products = [entropies * mean for entropies, mean in zip(layer.entropies, means, strict=True)]
            importance = float(torch.cat(products).sum())
        return importance if math.isfinite(importance) else 0.0  # the score will say that training has diverged

    def _entropy(self, layer: Layer) -> float:
        """Return the entropy of a layer: the mean over its neurons, with NEPENTHE over those that do switch."""
        neurons = torch.cat(list(layer.entropies))
        if self.variant == "nepenthe":
            neurons = neurons[neurons > 0]
        return float(neurons.mean()) if len(neurons) else 0.0


def _layers(model: nn.Module, plan: IsolationPlan, evidence: SparseEvidence) -> list[Layer]:
    """Return the layers that take part."""
    feeding = feeding_weights(model, plan)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    readers: dict[str, list[str]] = {}
    for name in evidence.entropies:
        readers.setdefault(feeding.shared.get(name, name), []).append(name)
    layers = []
    for first, names in readers.items():
        weights = tuple(weight for weight in feeding.weights.get(first, ()) if weight.name not in frozen)
        if not weights or first not in evidence.entropies:  # nothing is pruned before what a user has excluded
            continue
        for weight in weights:
            if weight.name not in evidence.weights:  # somebody has parametrized it since the run began
                raise ValueError(why_computed(model, weight.operator))
        entropies = tuple(evidence.switching[name].entropies for name in names)
        layers.append(Layer(first, entropies, weights, tuple(evidence.weights[weight.name] for weight in weights)))
    return layers


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameter name -> values, of all that have two axes or more; every process has to call this.

    Those that are sharded are put together on the CPU, one after the other.
    """
    reshard(model)
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return {name: each.full_tensor().cpu() if isinstance(each, DTensor) else each for name, each in values.items()}


def _zeros(value: Tensor) -> Tensor:
    """Return how many elements are zero, of all processes together where it is sharded."""
    count = (value.detach() == 0).sum()
    return count.full_tensor() if isinstance(count, DTensor) else count


def _writes_into_what_is_read(activation: nn.Module, node: FlowNode) -> bool:
    """Tell whether an activation may work in place on a value that something else reads, which a stand-in does not."""
    if not getattr(activation, "inplace", False):
        return False
    if not node.readers:  # then it is called for what it writes
        return True
    while len(node.inputs) == 1:
        (node,) = node.inputs
        if len(node.readers) != 1:
            return True
        if node.kind in (Kind.OPERATOR, Kind.BATCH_NORM, Kind.ADD):  # they make a value of their own
            return False
        if node.kind != Kind.IDENTITY:  # perhaps a view
            return True
    return True


def _said_of(name: str, switched: SwitchedAffine, seen: Switching) -> str:
    on, neurons = int((seen.states.on > 0).sum()), len(seen.states.on)
    exactly = "" if switched.is_exact else f", not exactly: {switched.affine.explained:.1%} explained"
    if not switched.is_exact and seen.closest is None:  # no affine was needed
        exactly = ", not exactly: it may work in place on what something else reads"
    return f"`{name}` linear: {on} of {neurons} neurons ON, {neurons - on} OFF{exactly}"


def _plain(linear: Mapping[str, SwitchedAffine]) -> dict[str, dict[str, Any]]:
    return {name: each.affine.to_plain() for name, each in linear.items()}


class SparseWorker(Worker):
    """Counts the states of neurons, and the sums by which a margin, or an affine that is not exact, is told.

    Args:
        method: The method.
        measuring: What is measured on.
    """

    method: Sparsify

    def __init__(self, method: Sparsify, measuring: Measuring) -> None:
        super().__init__(method, measuring)
        self.switching: dict[str, Switching] = {}
        self.weights: dict[str, Tensor] = {}
        self._model: nn.Module | None = None

    def start(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        """Count from zero."""
        axes = self._measuring.axes
        self._affines = self.method.guard > 0 or not all(has_pieces(site.module, site.axis(axes)) for site in sites)
        super().start(model, sites)

    def follow(self, model: nn.Module, names: Sequence[str], batches: int) -> None:
        """Remember whose weights are looked at."""
        self._model = model

    def take(self, probe: EntropyProbe) -> None:
        """Take note of counts and entropies."""
        closest, moments = (probe.affines(), probe.moments()) if self._affines else ({}, {})
        states = probe.states()
        super().take(probe)
        self.switching = {
            name: Switching(states[name], moments.get(name), closest.get(name)) for name in self.entropies
        }

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the share of zeros of each weight and of all, and how many activations do not switch."""
        weights = {name: value for name, value in unwrap(model).named_parameters() if value.ndim > 1 and value.numel()}
        if not weights:
            return {}
        zeros = torch.stack([_zeros(value) for value in weights.values()]).tolist()  # one synchronisation
        found = {
            f"{WEIGHT_SPARSITY_KEY}/{name}": count / value.numel()
            for count, (name, value) in zip(zeros, weights.items(), strict=True)
        }
        found[SPARSITY_KEY] = sum(zeros) / sum(value.numel() for value in weights.values())
        found["emptied"] = float(len(stand_ins(model)) + sum(entropy == 0 for entropy in self.entropies.values()))
        return found

    def reduce(self) -> None:
        """Put together the weights that are sharded; every process has to call this."""
        if self._model is not None:
            self.weights = whole_weights(unwrap(self._model))

    def propose(self, model: nn.Module, names: Sequence[str]) -> Proposal:
        """Have the method propose by what was measured last."""
        is_of_the_model = self._measuring.on == "validation"
        return self.method.propose(
            model, SparseEvidence(self._among(names), self.switching, self.weights, is_of_the_model)
        )

    def forget(self) -> None:
        """Let go of the weights."""
        self._model, self.weights = None, {}
