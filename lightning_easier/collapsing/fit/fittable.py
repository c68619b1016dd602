"""Find the chains around activations that one fitted operator could replace.

A chain is an operator, an activation and an operator, or several of these in a row, with batch norms and idle dropouts
between.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import Fit, Geometry, Moments, fits
from lightning_easier.collapsing.fit.showing import AfterOperators, Shown
from lightning_easier.sites.adjacency import Adjacency
from lightning_easier.sites.discovery import Discovery, KnownForwards
from lightning_easier.sites.neighbourhood import Meeting
from lightning_easier.sites.rectifiers import GATES, FunctionalPReLU
from lightning_easier.structure.padding import numeric_padding

ACTIVATIONS_IN_A_CHAIN = 2
"""How many in a row a search looks at: the bodies of bottlenecks and inverted residuals have two."""
# An operator that computes so many times what a chain does takes longer, however few operators it is; the sums for it
# are gathered up to so many unknowns: others that have fewer weights are made of them, too.
_NEVER_PAYS, _MOST_IN_VAIN = 4, 1536


class Place(ABC):
    """What one operator may take the place of: a chain around activations, or a whole block.

    Attributes:
        sites: Names of the activations in it, in execution order.
        operators: The names that a report calls it by.
        geometry: Which values of its input a fitted operator reads.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...]
    geometry: Geometry

    @property
    @abstractmethod
    def key(self) -> tuple[str, ...]:
        """What tells it from all other places of the model."""

    @property
    def ladder(self) -> tuple[str, ...]:
        """What it has in common with all places of which only one can be taken, more and more going at each step."""
        return self.key

    @property
    def whole(self) -> "Place":
        """The place at whose input prices are taken."""
        return self

    @property
    @abstractmethod
    def described(self) -> str:
        """What to call it in a sentence."""

    @property
    @abstractmethod
    def told(self) -> tuple[str, ...]:
        """The names that a report gives reasons for where nothing takes its place."""

    @property
    @abstractmethod
    def replaced(self) -> tuple[str, ...]:
        """Names of all that something else takes the place of when an operator is put there."""

    @property
    @abstractmethod
    def ends(self) -> tuple[str, str]:
        """Names of the module that reads its input, and of the one that returns its output."""

    @property
    @abstractmethod
    def parts(self) -> frozenset[str]:
        """Names of all modules in it."""

    @property
    @abstractmethod
    def shown(self) -> Shown:
        """Where its error can be told, with the errors of all that it is added to."""

    def meets(self, other: "Place") -> bool:
        """Tell whether another place has a part of this one."""
        return not self.parts.isdisjoint(other.parts)

    def holds(self, other: "Place") -> bool:
        """Tell whether it holds all of another place: what is put here takes the place of what was put there."""
        return other.parts <= self.parts

    def given(self, value: Tensor) -> Tensor:
        """Return what is kept of its input until its output is there."""
        return value.detach()

    def made(self, output: Any) -> Tensor:
        """Return its output, of what its last module returns."""
        value: Tensor = output
        return value.detach()

    @abstractmethod
    def outputs(self, model: nn.Module) -> int:
        """Return how many channels its output has."""

    @abstractmethod
    def like(self, model: nn.Module) -> Tensor:
        """Return a tensor of the dtype that an operator is to have, on its device."""

    def without_fit(self, moments: Moments) -> Iterator[Fit]:
        """Yield what may take its place without a fit, and how well that represents it."""
        yield from ()

    def fits(self, model: nn.Module, moments: Moments) -> Iterator[Fit]:
        """Yield what may take its place, fitted to its sums; nothing that is not finite."""
        yield from fits(moments)

    @abstractmethod
    def timed(self, model: nn.Module) -> nn.Module:
        """Return a module of one input that costs what the place does."""

    def timed_in_its_place(self, fit: Fit) -> nn.Module | None:
        """Return a module of one input that costs what an operator does; None where nothing is left to compute."""
        return fit.operator


@dataclass(frozen=True)
class FittableChain(Place):
    """A chain that one fitted operator would replace.

    Attributes:
        sites: Names of the activations, in execution order.
        operators: Names of the operators around them.
        between: Names of what else lies between them: batch norms and idle dropouts.
        geometry: Which values of the input the fitted operator reads.
        norm: Name of the batch norm that is all that reads what the chain computes; None if there is none.
        total: Where the sum is seen that the chain, or that norm, is added to; None if there is none.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...]
    between: tuple[str, ...]
    geometry: Geometry
    norm: str | None = None
    total: Shown | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """Names of all but the first operator, which become identities."""
        return (*self.sites, *self.between, *self.operators[1:])

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of all that something else takes the place of when an operator is put in the place of the chain."""
        return (self.operators[0], *self.after, *([] if self.norm is None else [self.norm]))

    @property
    def key(self) -> tuple[str, ...]:
        """The activations."""
        return self.sites

    @property
    def described(self) -> str:
        """What to call it in a sentence."""
        return f"the chain around {self.sites[0]!r}"

    @property
    def told(self) -> tuple[str, ...]:
        """The activations."""
        return self.sites

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the first and the last operator."""
        return self.operators[0], self.operators[-1]

    @property
    def shown(self) -> Shown:
        """In the sum that it is added to, else in what its last operator returns."""
        return self.total or Shown(self.operators[-1], "output")

    @property
    def parts(self) -> frozenset[str]:
        """Names of all modules in it."""
        return frozenset(self.replaced)

    def meets(self, other: Place) -> bool:
        """Tell whether another place has a part of this one; chains may have operators in common."""
        if isinstance(other, FittableChain):
            return not {*self.sites}.isdisjoint(other.sites)
        return super().meets(other)

    def holds(self, other: Place) -> bool:
        """Tell whether it holds all of another place."""
        if isinstance(other, FittableChain):
            return {*other.sites} <= {*self.sites}
        return super().holds(other)

    def outputs(self, model: nn.Module) -> int:
        """Return how many channels its output has."""
        weight: Tensor = model.get_submodule(self.operators[-1]).weight  # type: ignore[assignment]
        return len(weight)

    def like(self, model: nn.Module) -> Tensor:
        """Return the weight of its first operator."""
        weight: Tensor = model.get_submodule(self.operators[0]).weight  # type: ignore[assignment]
        return weight

    def timed(self, model: nn.Module) -> nn.Module:
        """Return its operators and activations in a row: in a collapse the batch norms between are folded."""
        row = [name for pair in zip(self.operators, self.sites, strict=False) for name in pair]
        return nn.Sequential(*(model.get_submodule(name) for name in (*row, self.operators[-1])))


class CannotFitError(Exception):
    """No operator can take the place of a chain; the message is the reason."""


class FittableChains:
    """The chains of a model around some of its activations.

    Args:
        model: A model in eval mode, its activations isolated.
        sites: Names of the activations.
        known: What earlier looks at the same model have found out.
        by_depth: Whether the number of operators counts, however many weights they have.

    Attributes:
        reasons: Site -> why it is in no chain.
    """

    def __init__(
        self, model: nn.Module, sites: Collection[str], known: KnownForwards | None = None, by_depth: bool = False
    ) -> None:
        plan = Discovery(frozenset(GATES), known).plan(model)
        adjacency = Adjacency(model, plan)
        self._model, self._by_depth = model, by_depth
        self._names = {module: name for name, module in model.named_modules()}
        self._after = AfterOperators(plan.flow, self._names)
        self._meetings: dict[str, Meeting] = {}
        self.reasons: dict[str, str] = {}
        for site in plan.sites:
            if site.name not in sites:
                continue
            around = site.neighbourhood
            if isinstance(site.module, FunctionalPReLU):
                self.reasons[site.name] = "it is called with a slope that something else holds"
                continue
            if len(around.meetings) != 1:
                self.reasons[site.name] = around.reason or "several operators would meet there"
                continue
            (meeting,) = around.meetings
            reason = adjacency.why_apart(meeting)
            if reason is None:
                self._meetings[site.name] = meeting
            else:
                self.reasons[site.name] = reason

    @property
    def meetings(self) -> dict[str, Meeting]:
        """Site -> the two operators that would meet there, for those that nothing else keeps apart."""
        return dict(self._meetings)

    def in_rows(self) -> list[FittableChain]:
        """Return the chains in execution order, as long as they are: all that lies in a row is one."""
        return self._made(_runs(self._meetings))

    def in_windows(self, most: int) -> list[FittableChain]:
        """Return the chains around so many activations in a row at most, each alone first."""
        runs = list(_runs(self._meetings))
        windows = [run[i : i + size] for size in range(1, most + 1) for run in runs for i in range(len(run) - size + 1)]
        return self._made(windows)

    def around(self, sites: Sequence[str]) -> FittableChain:
        """Return the one chain around activations that lie in a row.

        Raises:
            CannotFitError: If there is none, with the reason.
        """
        for site in sites:
            if site not in self._meetings:
                raise CannotFitError(self.reasons.get(site, "it is gone"))
        meetings = [self._meetings[site] for site in sites]
        if any(before.second != after.first for before, after in pairwise(meetings)):
            raise CannotFitError("its activations lie in a row no more")
        return _chain(self._model, sites, meetings, self._names, self._after, self._by_depth)

    def _made(self, runs: Iterable[list[str]]) -> list[FittableChain]:
        chains: list[FittableChain] = []
        failed: dict[str, str] = {}
        for run in runs:
            try:
                chains.append(self.around(run))
            except CannotFitError as error:
                failed.update(dict.fromkeys(run, str(error)))
        for chain in chains:  # one may be in another chain
            for site in chain.sites:
                failed.pop(site, None)
        self.reasons.update(failed)
        return chains


def _runs(meetings: dict[str, Meeting]) -> Iterator[list[str]]:
    """Yield the sites that lie in a row, each the operator after it in common with the next."""
    by_first = {meeting.first: site for site, meeting in meetings.items()}
    after = {meeting.second for meeting in meetings.values()}
    for site, meeting in meetings.items():
        if meeting.first in after:
            continue
        run = [site]
        while (following := by_first.get(meetings[run[-1]].second)) is not None:
            run.append(following)
        yield run


def _chain(
    model: nn.Module,
    sites: Sequence[str],
    meetings: Sequence[Meeting],
    names: Mapping[nn.Module, str],
    after: AfterOperators,
    by_depth: bool,
) -> FittableChain:
    operators = [meetings[0].first, *(meeting.second for meeting in meetings)]
    between = [names[m] for meeting in meetings for m in (*meeting.between, *meeting.idle) if m is not None]
    modules = [model.get_submodule(name) for name in operators]
    inside = [name for name in between if name not in operators and name not in sites]
    norm, total = after.norms.get(operators[-1]), after.totals.get(operators[-1])
    geometry = geometry_of(modules) if by_depth else _worth_its_sums(modules)
    return FittableChain(tuple(sites), tuple(operators), tuple(inside), geometry, norm, total)


def _worth_its_sums(operators: Sequence[nn.Module]) -> Geometry:
    """Return what an operator reads in the place of several: the middle tap alone where all taps would never pay.

    A depthwise convolution, or one of groups, computes little. One of all channels in its place may compute many times
    what the chain does, and the sums for it are over all pairs of values that it reads: minutes for a place late in a
    MobileNetV2.

    Raises:
        CannotFitError: As for :func:`geometry_of`.
    """
    geometry = geometry_of(operators)
    if all(getattr(operator, "groups", 1) == 1 for operator in operators):
        return geometry
    convolutions: list[Any] = list(operators)
    products, positions = 0, 1  # for each position of the result
    for convolution in reversed(convolutions):
        products += convolution.weight.numel() * positions
        positions *= prod(convolution.stride)
    most = geometry.channels * geometry.taps * len(convolutions[-1].weight)
    never_pays = most > _NEVER_PAYS * products
    return geometry.one_tap or geometry if never_pays and geometry.unknowns > _MOST_IN_VAIN else geometry


def geometry_of(operators: Sequence[nn.Module]) -> Geometry:
    """Return what an operator reads that is to take the place of several in a row.

    Its kernel is the largest of theirs where it can lie in the middle of what they read together, else all of that.

    Raises:
        CannotFitError: If they are not of one kind.
    """
    if all(type(operator) is nn.Linear for operator in operators):
        return Geometry(operators[0].in_features)  # type: ignore[arg-type]
    kinds = {type(operator) for operator in operators}
    if len(kinds) != 1 or not kinds <= {*CONVOLUTIONS}:
        raise CannotFitError(f"no operator is fitted for {' and '.join(sorted(kind.__name__ for kind in kinds))}")
    convolutions: list[Any] = list(operators)
    axes = len(convolutions[0].kernel_size)
    reach, padding, stride, largest = [1] * axes, [0] * axes, [1] * axes, [1] * axes
    for convolution in convolutions:
        numbers = numeric_padding(convolution)
        if numbers is None or (any(numbers) and convolution.padding_mode != "zeros"):
            raise CannotFitError("one of them pads by something else than zeros on both sides")
        for axis in range(axes):
            size = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) + 1
            reach[axis] += (size - 1) * stride[axis]
            padding[axis] += numbers[axis] * stride[axis]
            stride[axis] *= convolution.stride[axis]
            largest[axis] = max(largest[axis], size)
    for axis in range(axes):
        beside, uneven = divmod(reach[axis] - largest[axis], 2)
        if uneven or padding[axis] < beside:
            largest[axis] = reach[axis]
        else:
            padding[axis] -= beside
    return Geometry(convolutions[0].in_channels, tuple(largest), tuple(stride), tuple(padding))
