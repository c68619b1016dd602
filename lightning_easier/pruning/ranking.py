"""What each removal would cost and save: the order in which activations become linear.

Nothing here knows a Trainer. A criterion tells how much a removal changes, a gain what it saves; the rank is the one
per the other, the lowest first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_easier.collapsing.algebra.least_squares import Fit
from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.collapsing.fit.fit_prices import PricedFit
from lightning_easier.pruning.candidates import candidates
from lightning_easier.pruning.gains import GAINS, Gain, Gains, ShapeProbe
from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.discovery import Discovery
from lightning_easier.sites.rectifiers import as_gates
from lightning_easier.structure.operations import Affines, FittedOperators, Identities, Operation
from lightning_easier.structure.stand_in import STAND_INS
from lightning_easier.structure.substitution import ChainFit, Substitution
from lightning_easier.support.arguments import check_bool, check_choice
from lightning_easier.support.inference import evaluation_mode

Criterion = Literal["entropy", "linearity"]
CRITERIA: tuple[Criterion, ...] = ("entropy", "linearity")
# Bodies of bottlenecks and inverted residuals have two.
ACTIVATIONS_IN_A_CHAIN = 2
# An operator that explains so much less of the variance than the best one does not stand for the chain.
_SLACK = 0.02
# So many names are read in one line.
_LISTED = 8


@dataclass
class Ranked:
    """Activations in the light of a criterion; plain data.

    Attributes:
        ranks: Name -> rank of those that may become linear, in execution order; the lowest goes first.
        fits: Name -> the operator that takes the place of its chain, as plain data.
    """

    ranks: dict[str, float] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)


class Outlook(NamedTuple):
    """Which of some activations save something when they become linear, each alone."""

    useful: list[str]
    idle: list[str]
    unknown: list[str]


class _Option(NamedTuple):
    """One way to remove an activation."""

    fit: ChainFit | None
    cost: float
    gain: float


@dataclass(frozen=True)
class Ranking:
    """The rules by which activations are ranked; arguments as for :class:`~lightning_easier.EntropyPruningCallback`.

    Raises:
        ValueError: If an argument has a value that is not supported.
    """

    criterion: Criterion = "entropy"
    gain: Gain | None = None
    candidates: Literal["all", "mergeable"] = "all"
    collapse: Literal["exact", "fit"] = "exact"
    stand_in: Literal["identity", "affine"] = "identity"
    shift_padding: bool = True
    gates: Sequence[str] = ()
    trainable: bool = False

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        if self.gain is not None:
            check_choice("gain", self.gain, GAINS)
        check_choice("candidates", self.candidates, ("all", "mergeable"))
        check_choice("collapse", self.collapse, ("exact", "fit"))
        check_choice("stand_in", self.stand_in, STAND_INS)
        check_bool("trainable", self.trainable)
        if self.trainable and self.stand_in == "identity" and self.collapse == "exact":
            raise ValueError(
                f"Expected argument `trainable` to be False with stand_in={self.stand_in!r}, but got "
                f"{self.trainable}: an identity has nothing to train. Pass stand_in='affine'."
            )

    @property
    def prices_by(self) -> Gain | None:
        """What savings are measured in; None where none are. A fitted operator has to save something in any case."""
        return "macs" if self.gain is None and self.collapse == "fit" else self.gain

    @property
    def is_free(self) -> bool:
        """Whether nothing has to be measured besides what is measured anyway."""
        return not self.needs_chains and not self.needs_shapes and self.candidates == "all"

    @property
    def needs_affines(self) -> bool:
        """Whether the affine that comes closest to each activation has to be measured."""
        return self.stand_in == "affine" or self.criterion == "linearity"

    @property
    def needs_whole_parameters(self) -> tuple[str, str] | None:
        """What is done to parameters for which they must not be sharded, and the remedy; None if nothing is."""
        if self.trainable:
            return "train affines", "Pass trainable=False"
        if self.collapse == "fit":
            return "fit operators", "Pass collapse='exact', or fit a gathered model with `compress`"
        return None

    @property
    def needs_chains(self) -> bool:
        """Whether what the chains around activations compute has to be measured."""
        return self.collapse == "fit"

    @property
    def needs_shapes(self) -> bool:
        """Whether the shapes that the operators around activations read have to be noted."""
        return self.gain is not None

    def rank(
        self,
        model: nn.Module,
        entropies: Mapping[str, float],
        affines: Mapping[str, Mapping[str, Any]],
        chains: ChainProbe | None,
        shapes: ShapeProbe | None,
        gains: Gains | None,
    ) -> Ranked:
        """Rank activations.

        Args:
            model: The model.
            entropies: Name -> entropy in bits.
            affines: Name -> the affine that comes closest, as plain data.
            chains: What was measured of the chains around them.
            shapes: The shapes of what the operators around them read.
            gains: Tells what is saved, in the unit of :attr:`prices_by`.
        """
        options = self._fitted(entropies, chains, gains) if self.collapse == "fit" and chains is not None else {}
        wanted = [name for name in entropies if name not in options]
        if self.needs_affines:  # one that would not be finite is not there
            wanted = [name for name in wanted if name in affines]
        mergeable = self._mergeable(model, wanted) if self.candidates == "mergeable" else set(wanted)
        for name in wanted:
            if name in mergeable:
                cost = entropies[name] if self.criterion == "entropy" else 1.0 - float(affines[name]["explained"])
                options[name] = _Option(None, cost, self._saved_exactly(model, name, shapes, gains))
        ranked = Ranked()
        for name in entropies:
            option = options.get(name)
            if option is None or (self.candidates == "mergeable" and self.gain is not None and option.gain <= 0):
                continue
            ranked.ranks[name] = _rank(option) if self.gain is not None else option.cost
            if option.fit is not None:
                ranked.fits[name] = option.fit.to_plain()
        return ranked

    def operations(
        self, names: Sequence[str], ranked: Ranked, affines: Mapping[str, Mapping[str, Any]]
    ) -> list[Operation]:
        """Return what makes activations linear.

        Args:
            names: The activations, which don't take parts of one chain.
            ranked: What :meth:`rank` returned.
            affines: Name -> the affine that comes closest, as plain data; needed where that is what is wanted.
        """
        fits = {name: ranked.fits[name] for name in names if name in ranked.fits}
        others = [name for name in names if name not in fits]
        made: list[Operation] = [FittedOperators(list(fits), fits)] if fits else []
        if others and self.stand_in == "affine":
            measured = {name: dict(affines[name]) for name in others}
            made.append(Affines(others, measured, self.shift_padding, self.trainable))
        elif others:
            made.append(Identities(others, shift_padding=self.shift_padding))
        return made

    def outlook(self, model: nn.Module, ranked: Ranked, names: Sequence[str]) -> "Outlook":
        """Tell which removals save something, as far as that is known without further timing.

        With a gain or fitted operators that was measured; else the structure tells what merges nothing.

        Args:
            model: The model.
            ranked: What :meth:`rank` returned for it.
            names: The activations that may become linear.
        """
        unknown: set[str] = set()
        if self.gain is None and self.collapse == "exact":
            found = candidates(model, gates=self.gates, shift_padding=self.shift_padding).candidates
            useful = {each.name for each in found if each.merges}
            with evaluation_mode(model):
                unknown = {*Discovery(as_gates(self.gates)).plan(unwrap(model)).inside}
        else:
            useful = {part for name, fit in ranked.fits.items() for part in _parts(name, fit)}
            if self.gain is not None:
                useful |= {name for name, rank in ranked.ranks.items() if rank < math.inf}
        idle = [name for name in names if name not in useful | unknown]
        return Outlook([n for n in names if n in useful], idle, [n for n in names if n in unknown - useful])

    def told(self, outlook: "Outlook", device: str) -> str:
        """Say how many removals would save something, and which option leaves out the others.

        Args:
            outlook: What :meth:`outlook` returned.
            device: What a latency was measured on.
        """
        useful, idle, unknown = outlook.useful, outlook.idle, outlook.unknown
        if self.gain is not None:
            does = f"save {f'time on {device}' if self.gain == 'latency' else 'multiply-accumulates'}"
        elif self.collapse == "fit":
            does = "let one fitted operator that saves multiply-accumulates take the place of a chain"
        else:
            does = "let a collapse merge something"
        count = len(useful) + len(idle) + len(unknown)
        told = f"Of {count} activations that may become linear, {len(useful)} would, each alone, {does}."
        if unknown:
            told += f" Of {_listed(unknown)} that can't be told: their forward can't be traced."
            told += " They are left out." if self.candidates == "mergeable" else ""
        if idle and self.candidates == "mergeable":
            told += f" The others are left out: {_listed(idle)}."
        elif idle:
            told += (
                f" The others would not, and fewer layers are not less time: {_listed(idle)}. Pass "
                f"candidates='mergeable' to leave them out."
            )
        if self.gain is None:
            told += " Whether that saves time was not measured: pass gain='latency' to go by what each removal saves."
        return told

    def _mergeable(self, model: nn.Module, names: Iterable[str]) -> set[str]:
        """Return those of some activations whose removal lets an exact collapse merge something."""
        if self.collapse == "fit":  # what has a chain is ranked already
            return set()
        report = candidates(model, gates=self.gates, shift_padding=self.shift_padding)
        return {each.name for each in report.candidates if each.merges} & set(names)

    def _fitted(self, entropies: Mapping[str, float], chains: ChainProbe, gains: Gains | None) -> dict[str, _Option]:
        """Return the best way to put one operator in the place of a chain that begins with each activation.

        What goes with a second activation in a row does so where the first alone saves nothing, or, by linearity, where
        that costs less for what it saves.
        """
        options: dict[str, _Option] = {}
        for chain, fitted, shape in chains.fitted():  # the shorter ones first
            name = chain.sites[0]
            if not {*chain.sites} <= entropies.keys() or gains is None or shape is None:
                continue
            ways = []
            cost = sum(entropies[site] for site in chain.sites)
            for choice in chains.price(chain, fitted, shape, gains.prices):
                moved = chains.chain_fit(chain, choice.fit)
                if moved is not None and choice.saving > 0:
                    ways.append((choice, _Option(moved, self._cost(cost, choice.fit), choice.saving)))
            best = self._best(ways)
            if best is None:
                reason = "no operator that can move into the first of its chain saves anything"
                chains.reasons.setdefault(name, reason)
            elif name not in options or (self._weighs_savings and _rank(best) < _rank(options[name])):
                options[name] = best
        for name in options:
            chains.reasons.pop(name, None)
        return options

    @property
    def _weighs_savings(self) -> bool:
        """Whether options for one activation are compared by their cost for what they save."""
        return self.criterion == "linearity" and self.gain is not None

    def _cost(self, entropy: float, fit: Fit) -> float:
        return entropy if self.criterion == "entropy" else 1.0 - fit.explained

    def _best(self, ways: Sequence[tuple[PricedFit, _Option]]) -> _Option | None:
        """Choose among the operators for one chain that save something; None if none stands for it.

        Entropy does not tell how well an operator represents a chain, and without a gain nothing weighs that against
        what it saves: the cheapest is taken of those that represent it nearly as well as the best.
        """
        if self._weighs_savings:
            return min((option for _, option in ways), key=_rank, default=None)
        good = [option for choice, option in ways if choice.shortfall <= _SLACK]
        return max(good, key=lambda option: option.gain, default=None)

    def _saved_exactly(self, model: nn.Module, name: str, shapes: ShapeProbe | None, gains: Gains | None) -> float:
        """Return what is saved if an activation becomes linear and an exact collapse follows."""
        if gains is None or shapes is None or name not in shapes.meetings or name not in shapes.shapes:
            return 0.0
        return gains.of_merge(shapes.meetings[name], model.get_submodule(name), shapes.shapes[name])


def apart(names: Iterable[str], fits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Leave out activations that go with an earlier one's chain, or whose chain would then be another."""
    taken: set[str] = set()
    chosen = []
    for name in names:
        parts = {name}
        if name in fits:
            parts |= _parts(name, fits[name])
        if not taken & parts:
            chosen.append(name)
            taken |= parts
    return chosen


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more


def _parts(name: str, plain: Mapping[str, Any]) -> set[str]:
    """Return an activation and all that goes with its chain."""
    fit = ChainFit.from_plain(plain)
    return {name, *Substitution(fit.form, fit.tensors).names(name)}


def _rank(option: _Option) -> float:
    return option.cost / option.gain if option.gain > 0 else math.inf
