"""EASIER: the activation that matters least becomes linear.

Each gets a rank, the lowest goes first. By default that is its entropy; a criterion tells how much a removal changes, a
gain what it saves, and the rank is the one per the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_easier.measure.affines import AffineFit
from lightning_easier.measure.moments import Moments, batch_norms_before, error_likelihood, moments_after
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.measure.switching import States, has_pieces, switched_affine
from lightning_easier.pruning.candidates import candidates
from lightning_easier.pruning.gains import GAINS, Gain, Gains, ShapeProbe
from lightning_easier.pruning.methods.base import Evidence, Measuring, Method, Outlook, Proposal, Worker
from lightning_easier.report import CandidateReport
from lightning_easier.sites.activations import ActivationSite, unwrap
from lightning_easier.sites.discovery import Discovery
from lightning_easier.sites.rectifiers import as_gates
from lightning_easier.structure.operations import Affines, Identities, Operation
from lightning_easier.structure.stand_in import STAND_INS
from lightning_easier.support.arguments import check_bool, check_choice
from lightning_easier.support.inference import evaluation_mode

Criterion = Literal["entropy", "linearity", "tlc"]
CRITERIA: tuple[Criterion, ...] = ("entropy", "linearity", "tlc")
# So many names are read in one line.
_LISTED = 8


@dataclass(frozen=True)
class Order:
    """In which order activations become linear.

    Args:
        criterion: What tells how much a removal costs: ``"entropy"`` (EASIER); ``"linearity"``, the share of
            variance that the best linear operator does not explain: of a chain where one takes its place, else that of
            the activation, by the affine for each channel; or ``"tlc"`` (TLC), how likely a channel is to switch, by
            scale and shift of the batch norm right before the activation, and where there is none by mean and deviation
            of the pre-activation, see :func:`~lightning_easier.measure_error_likelihood`.
        gain: Rank by the criterion per second (``"latency"``, measured on rank 0's device) or per multiply-accumulate
            (``"macs"``) that the removal saves; what saves nothing goes last. By the criterion alone by default.
        mergeable_only: Whether to leave out activations whose removal merges nothing, and with a ``gain`` those whose
            removal saves nothing.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value that is not supported.

    Note:
        TLC tries layers and removes the one that raises the loss on a batch least. Here the likelihood ranks them.

    Source: EASIER, arXiv 2404.18949; TLC, arXiv 2412.15077.
    """

    criterion: Criterion = "entropy"
    gain: Gain | None = None
    mergeable_only: bool = False

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        if self.gain is not None:
            check_choice("gain", self.gain, GAINS)
        check_bool("mergeable_only", self.mergeable_only)


class Option(NamedTuple):
    """One way to remove an activation.

    Attributes:
        operation: What does it.
        cost: How much it changes.
        gain: What it saves.
    """

    operation: Operation
    cost: float
    gain: float

    @property
    def rank(self) -> float:
        """The cost for what is saved."""
        return self.cost / self.gain if self.gain > 0 else math.inf


@dataclass(frozen=True)
class LinearEvidence(Evidence):
    """What was measured of a model, besides the entropies.

    Attributes:
        affines: Name -> the affine that comes closest, as plain data, if it is needed.
        shapes: The shapes of what the operators around the activations read, if they are needed.
        gains: Tells what is saved; None where nothing is priced.
        states: Name -> how often its channels were ON and OFF, if that is needed.
        moments: Name -> mean and deviation of its pre-activation, if they are needed.
    """

    affines: Mapping[str, Mapping[str, Any]]
    shapes: ShapeProbe | None
    gains: Gains | None
    states: Mapping[str, States] = field(default_factory=dict, kw_only=True)
    moments: Mapping[str, Moments] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Linearize(Method):
    """Make the activation that matters least linear (EASIER).

    Args:
        stand_in: What takes the place of an activation: the identity (EASIER), or the affine that comes closest to it,
            a scale and an offset for each channel, measured in the same pass as the entropies. It is as linear, and
            keeps more of the accuracy. Or ``"on_off"``, for each channel what the activation is on the side of zero
            where its pre-activation lies more often (NEPENTHE, TLC): for ReLU the identity or zero. It is exact for
            channels that do not switch. With ``Order(criterion="tlc")`` the side is that of their mean. On a side where
            the activation is no line through zero (GELU, ...), the affine that comes closest takes its place.
        trainable: Whether scales and offsets of affines are trained. They join the parameter group of what is trained
            right before them in the model, the batch norm or the operator in front.
        shift_padding: Whether the padding of a convolution after a removed activation moves to the one before it, where
            the two would meet: training goes on with the very function that a collapse merges exactly. See
            :func:`~lightning_easier.linearize`.
        gates: Whether activations that bound their output (sigmoid, tanh, ...) may become linear too: all, or those
            named, see :func:`~lightning_easier.isolate_activations`.
        order: Which goes first.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value that is not supported, or does not go with another.

    Source: EASIER, arXiv 2404.18949; NEPENTHE, arXiv 2404.16890, and TLC, arXiv 2412.15077, for ``"on_off"``.
    """

    stand_in: Literal["identity", "affine", "on_off"] = "identity"
    trainable: bool = False
    shift_padding: bool = True
    gates: bool | list[str] = False
    order: Order = Order()

    def __post_init__(self) -> None:
        check_choice("stand_in", self.stand_in, (*STAND_INS, "on_off"))
        check_bool("trainable", self.trainable)
        check_bool("shift_padding", self.shift_padding)
        as_gates(self.gates)
        if not isinstance(self.order, Order):
            raise TypeError(f"Expected argument `order` to be an Order, but got {self.order!r}")
        if self.trainable and self.stand_in == "identity":
            raise ValueError(
                f"Expected argument `trainable` to be False with stand_in={self.stand_in!r}, but got "
                f"{self.trainable}: an identity has nothing to train. Pass stand_in='affine'."
            )

    def worker(self, measuring: Measuring) -> Worker:
        """Return who measures for it in a run."""
        return LinearWorker(self, measuring)

    @property
    def kinds_of_gates(self) -> list[str]:
        """Which bounded activations count."""
        return sorted(as_gates(self.gates))

    @property
    def prices_by(self) -> Gain | None:
        """What savings are measured in; None where none are."""
        return self.order.gain

    @property
    def objective(self) -> Gain:
        """What the network is collapsed for when it is asked whether it has reached a target."""
        return self.order.gain or "latency"

    @property
    def is_cheap(self) -> bool:
        """Whether nothing has to be measured or looked at besides what is measured anyway."""
        return self.order.gain is None and not self.order.mergeable_only

    @property
    def needs_moments(self) -> bool:
        """Whether mean and deviation of each pre-activation have to be known."""
        return self.order.criterion == "tlc"

    @property
    def needs_states(self) -> bool:
        """Whether it has to be known how often each channel was ON and OFF."""
        return self.stand_in == "on_off" and not self.needs_moments

    def needs_affine_of(self, site: ActivationSite, axis: int) -> bool:
        """Tell whether the affine that comes closest to an activation has to be measured.

        Args:
            site: The activation.
            axis: The axis of its neurons.
        """
        if self.stand_in == "on_off" and not has_pieces(site.module, axis):
            return True
        return self.stand_in == "affine" or self.order.criterion == "linearity"

    @property
    def needs_whole_parameters(self) -> tuple[str, str] | None:
        """Trained affines do, and batch norms and slopes that are read on rank 0."""
        if self.trainable:
            return "train affines", "Pass trainable=False"
        if self.needs_moments:
            return "read batch norms for Order(criterion='tlc')", "Pass another criterion"
        return ("read slopes for stand_in='on_off'", "Pass stand_in='affine'") if self.stand_in == "on_off" else None

    def propose(self, model: nn.Module, evidence: LinearEvidence) -> Proposal:
        """Rank the activations."""
        options = self.options(model, evidence)
        weighs = self.order.gain is not None
        proposal = Proposal()
        others = [name for name in options if name not in evidence.entropies]
        for name in (*evidence.entropies, *others):
            option = options.get(name)
            if option is None or (self.order.mergeable_only and weighs and option.gain <= 0):
                continue
            proposal.add(option.operation, option.rank if weighs else option.cost)
        return proposal

    def options(self, model: nn.Module, evidence: LinearEvidence) -> dict[str, Option]:
        """Return how each activation may be removed."""
        return self.stand_ins(model, evidence, list(evidence.entropies))

    def stand_ins(self, model: nn.Module, evidence: LinearEvidence, names: Sequence[str]) -> dict[str, Option]:
        """Return how some activations may be removed by putting something in their places."""
        if self.order.mergeable_only:
            found = self.list_candidates(model, None).candidates
            mergeable = {each.name for each in found if each.merges}
            names = [name for name in names if name in mergeable]
        options = {}
        for name in names:
            operation, cost = self._operation(model, name, evidence), self.cost(name, evidence)
            if operation is not None and cost is not None:
                options[name] = Option(operation, cost, self._saved(model, name, evidence))
        return options

    def _operation(self, model: nn.Module, name: str, evidence: LinearEvidence) -> Operation | None:
        """Return what puts a stand-in in the place of an activation; None where its numbers would not be finite."""
        if self.stand_in == "identity":
            return Identities([name], shift_padding=self.shift_padding)
        affine = evidence.affines.get(name)
        if self.stand_in == "on_off":
            affine = self._on_off(model.get_submodule(name), name, evidence)
        if affine is None:
            return None
        return Affines([name], {name: dict(affine)}, self.shift_padding, self.trainable)

    def _on_off(self, activation: nn.Module, name: str, evidence: LinearEvidence) -> Mapping[str, Any] | None:
        """Return what an activation is on the side where each channel mostly lies, as plain data."""
        sides, closest = self._sides(name, evidence), evidence.affines.get(name)
        if sides is None:
            return None
        made = switched_affine(activation, *sides, None if closest is None else AffineFit(**closest))
        return (
            made.affine.to_plain() if made is not None and made.affine.is_finite_in(made.affine.scale.dtype) else None
        )

    def _sides(self, name: str, evidence: LinearEvidence) -> tuple[Tensor, int] | None:
        """Tell which channels count as ON, and their axis; None where that is not known."""
        if self.needs_moments:
            moments = evidence.moments.get(name)
            return None if moments is None else (moments.mean > 0, moments.dim)
        states = evidence.states.get(name)
        return None if states is None else (states.on > states.off, states.dim)

    def cost(self, name: str, evidence: LinearEvidence) -> float | None:
        """Return how much is changed if something takes the place of an activation alone; None if that is not known."""
        if self.order.criterion == "entropy":
            return evidence.entropies[name]
        if self.order.criterion == "tlc":
            return error_likelihood(evidence.moments[name]) if name in evidence.moments else None
        return 1.0 - float(evidence.affines[name]["explained"]) if name in evidence.affines else None

    def _saved(self, model: nn.Module, name: str, evidence: LinearEvidence) -> float:
        """Return what is saved if an activation becomes linear and an exact collapse follows."""
        shapes, gains = evidence.shapes, evidence.gains
        if gains is None or shapes is None or name not in shapes.meetings or name not in shapes.shapes:
            return 0.0
        return gains.of_merge(shapes.meetings[name], model.get_submodule(name), shapes.shapes[name])

    def list_candidates(self, model: nn.Module, entropies: Mapping[str, float] | None) -> CandidateReport:
        """List what may be removed."""
        return candidates(model, entropies, gates=self.gates, shift_padding=self.shift_padding)

    def outlook(self, model: nn.Module, proposal: Proposal, names: Sequence[str], device: str) -> Outlook:
        """Say how many removals would save something, and which option leaves out the others."""
        useful, unknown = self._useful(model, proposal)
        useful, unknown = useful & {*names}, (unknown - useful) & {*names}
        idle = [name for name in names if name not in useful | unknown]
        words = f"Of {len(names)} activations that may become linear, {len(useful)} would, each alone, "
        words += f"{self._does(device)}."
        if unknown:
            words += f" Of {_listed([n for n in names if n in unknown])} that can't be told: their forward can't be"
            words += f" traced.{' They are left out.' if self.order.mergeable_only else ''}"
        if idle and self.order.mergeable_only:
            words += f" The others are left out: {_listed(idle)}."
        elif idle:
            words += (
                f" The others would not, and fewer layers are not less time: {_listed(idle)}. Pass "
                f"Order(mergeable_only=True) to leave them out."
            )
        if self.order.gain is None:
            words += (
                " Whether that saves time was not measured: pass Order(gain='latency') to go by what each removal "
                "saves."
            )
        return Outlook(words, bool(useful or unknown))

    def _does(self, device: str) -> str:
        """Say what a removal that is of use does."""
        if self.order.gain is None:
            return "let a collapse merge something"
        return f"save {f'time on {device}' if self.order.gain == 'latency' else 'multiply-accumulates'}"

    def _useful(self, model: nn.Module, proposal: Proposal) -> tuple[set[str], set[str]]:
        """Tell which removals are of use, and of which that is not known; nothing is timed for it."""
        if self.order.gain is not None:
            return {name for name, rank in proposal.ranks.items() if rank < math.inf}, set()
        useful = {each.name for each in self.list_candidates(model, None).candidates if each.merges}
        with evaluation_mode(model):
            return useful, {*Discovery(as_gates(self.gates)).plan(unwrap(model)).inside}


class LinearWorker(Worker):
    """Measures entropies, affines, and the shapes by which removals are priced.

    Args:
        method: The method.
        measuring: What is measured on.
    """

    method: Linearize

    def __init__(self, method: Linearize, measuring: Measuring) -> None:
        super().__init__(method, measuring)
        self.gains = None if method.prices_by is None else Gains(method.prices_by, method.shift_padding)
        self.shapes: ShapeProbe | None = None
        self._needs_affines = False
        self._norms: dict[str, _BatchNorm] = {}  # activation -> the batch norm that tells its moments
        self._forget_counts()

    def _forget_counts(self) -> None:
        self.affines: dict[str, dict[str, Any]] = {}
        self.states: dict[str, States] = {}
        self.moments: dict[str, Moments] = {}

    def start(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        """Count from zero; what takes more than counts is measured only where an activation needs it."""
        axes, method = self._measuring.axes, self.method
        self._norms = batch_norms_before(model, sites, axes) if method.needs_moments else {}
        self._needs_affines = any(method.needs_affine_of(site, site.axis(axes)) for site in sites)
        lacks_moments = method.needs_moments and any(site.name not in self._norms for site in sites)
        self._affines = self._needs_affines or lacks_moments
        super().start(model, sites)

    def follow(self, model: nn.Module, names: Sequence[str], batches: int) -> None:
        """Note the shapes by which removals are priced."""
        if self.method.order.gain is not None:
            self.shapes = ShapeProbe(model, names)
            self.shapes.attach()

    def finish(self, known: Any = None) -> dict[str, float]:
        """Stop counting and return the entropies."""
        self._forget_counts()
        return super().finish(known)

    def take(self, probe: EntropyProbe) -> None:
        """Take note of affines, moments, states and entropies."""
        if self._needs_affines:
            self.affines = {name: fit.to_plain() for name, fit in probe.affines().items()}
        if self.method.needs_moments and self._affines:
            self.moments = probe.moments()
        if self.method.needs_states:
            self.states = probe.states()
        super().take(probe)

    def propose(self, model: nn.Module, names: Sequence[str]) -> Proposal:
        """Have the method propose by what was measured last."""
        return self.method.propose(model, LinearEvidence(self._among(names), **self.evidence()))

    def evidence(self) -> dict[str, Any]:
        """Return what was measured besides the entropies, by the names that :class:`LinearEvidence` has for it."""
        after_norms = {name: moments_after(norm) for name, norm in self._norms.items()}
        moments = self.moments | {name: each for name, each in after_norms.items() if each.is_finite}
        return {
            "affines": self.affines, "shapes": self.shapes, "gains": self.gains, "states": self.states,
            "moments": moments,
        }  # fmt: skip

    def detach(self) -> None:
        """Take all hooks away; what was counted stays."""
        super().detach()
        if self.shapes is not None:
            self.shapes.detach()

    def forget(self) -> None:
        """Forget the shapes."""
        if self.shapes is not None:
            self.shapes.detach()
        self.shapes = None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more
