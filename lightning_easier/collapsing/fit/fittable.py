"""Find the chains around activations that one fitted operator could replace.

A chain is an operator, an activation and an operator, or several of these in a row, with batch norms and idle dropouts
between.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import Geometry
from lightning_easier.sites.adjacency import Adjacency
from lightning_easier.sites.dataflow import FlowNode, Kind
from lightning_easier.sites.discovery import Discovery, KnownForwards
from lightning_easier.sites.neighbourhood import Meeting
from lightning_easier.sites.rectifiers import GATES, FunctionalPReLU
from lightning_easier.structure.padding import numeric_padding

ACTIVATIONS_IN_A_CHAIN = 2
"""How many in a row a search looks at: the bodies of bottlenecks and inverted residuals have two."""


@dataclass(frozen=True)
class FittableChain:
    """What one fitted operator would replace.

    Attributes:
        sites: Names of the activations, in execution order.
        operators: Names of the operators around them.
        between: Names of what else lies between them: batch norms and idle dropouts.
        geometry: Which values of the input the fitted operator reads.
        norm: Name of the batch norm that is all that reads what the chain computes; None if there is none.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...]
    between: tuple[str, ...]
    geometry: Geometry
    norm: str | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """Names of all but the first operator, which become identities."""
        return (*self.sites, *self.between, *self.operators[1:])

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of all that something else takes the place of when an operator is put in the place of the chain."""
        return (self.operators[0], *self.after, *([] if self.norm is None else [self.norm]))


class CannotFitError(Exception):
    """No operator can take the place of a chain; the message is the reason."""


class FittableChains:
    """The chains of a model around some of its activations.

    Args:
        model: A model in eval mode, its activations isolated.
        sites: Names of the activations.
        known: What earlier looks at the same model have found out.

    Attributes:
        reasons: Site -> why it is in no chain.
    """

    def __init__(self, model: nn.Module, sites: Collection[str], known: KnownForwards | None = None) -> None:
        plan = Discovery(frozenset(GATES), known).plan(model)
        adjacency = Adjacency(model, plan)
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._norms = dict(_norms_after(plan.flow.nodes, self._names))
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
        return _chain(self._model, sites, meetings, self._names, self._norms)

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


def _norms_after(nodes: Iterable[FlowNode], names: Mapping[nn.Module, str]) -> Iterator[tuple[str, str]]:
    """Yield operators with the batch norm that is all that reads them, by name."""
    for node in nodes:
        if node.kind == Kind.OPERATOR and len(node.readers) == 1:
            (reader,) = node.readers
            norm = reader.module
            if reader.kind == Kind.BATCH_NORM and norm is not None and sum(n.module is norm for n in nodes) == 1:
                yield node.name, names[norm]


def _chain(
    model: nn.Module,
    sites: Sequence[str],
    meetings: Sequence[Meeting],
    names: Mapping[nn.Module, str],
    norms: Mapping[str, str],
) -> FittableChain:
    operators = [meetings[0].first, *(meeting.second for meeting in meetings)]
    between = [names[m] for meeting in meetings for m in (*meeting.between, *meeting.idle) if m is not None]
    modules = [model.get_submodule(name) for name in operators]
    inside = [name for name in between if name not in operators and name not in sites]
    return FittableChain(tuple(sites), tuple(operators), tuple(inside), geometry_of(modules), norms.get(operators[-1]))


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
