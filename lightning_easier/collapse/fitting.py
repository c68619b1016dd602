"""Replace chains around activations that are not linear by single operators, fitted to what the chains compute.

A chain is an operator, an activation and an operator, or several of these in a row, with batch norms and idle dropouts
between. The fitted operator takes the place of the first; all that is behind it in the chain becomes an identity, so
that the forward of the model stays as it is written, and an exact collapse takes the identities out.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier.activations import replace_activation
from lightning_easier.adjacency import Adjacency
from lightning_easier.collapse.convolutions import CONVOLUTIONS
from lightning_easier.collapse.least_squares import Fit, Geometry, Moments, fits
from lightning_easier.collapse.prices import LatencyTable, Objective
from lightning_easier.costs import count_macs
from lightning_easier.dataflow import FlowNode, Kind
from lightning_easier.discovery import Discovery
from lightning_easier.inference import evaluation_mode
from lightning_easier.neighbourhood import Meeting
from lightning_easier.padding import numeric_padding
from lightning_easier.rectifiers import GATES, FunctionalPReLU
from lightning_easier.substitution import Absorbed

# Positions of the calibration data that are used: as many for each unknown, and more where that is cheap.
_POSITIONS_FOR_EACH_UNKNOWN, _ENOUGH_POSITIONS, _WORK = 14, 2**17, 2**26
# Of one chain: a convolution, a separable, a pointwise one, three of low rank, and an affine.
_MOST_FITS = 7


@dataclass(frozen=True)
class FitChain:
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
    def behind(self) -> tuple[str, ...]:
        """Names of all but the first operator, which become identities."""
        return (*self.sites, *self.between, *self.operators[1:])


class CannotFitError(Exception):
    """No operator can take the place of a chain; the message is the reason."""


class Chains:
    """The chains of a model around some of its activations.

    Args:
        model: A model in eval mode, its activations isolated.
        sites: Names of the activations.

    Attributes:
        reasons: Site -> why it is in no chain.
    """

    def __init__(self, model: nn.Module, sites: Collection[str]) -> None:
        plan = Discovery(frozenset(GATES)).plan(model)
        adjacency = Adjacency(model, plan)
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._norms = dict(_norms_behind(plan.flow.nodes, self._names))
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

    def in_rows(self) -> list[FitChain]:
        """Return the chains in execution order, as long as they are: all that lies in a row is one."""
        return self._made(_runs(self._meetings))

    def in_windows(self, most: int) -> list[FitChain]:
        """Return the chains around so many activations in a row at most, each alone first."""
        runs = list(_runs(self._meetings))
        windows = [run[i : i + size] for size in range(1, most + 1) for run in runs for i in range(len(run) - size + 1)]
        return self._made(windows)

    def around(self, sites: Sequence[str]) -> FitChain:
        """Return the one chain around activations that lie in a row.

        Raises:
            CannotFitError: If there is none, with the reason.
        """
        for site in sites:
            if site not in self._meetings:
                raise CannotFitError(self.reasons.get(site, "it is gone"))
        meetings = [self._meetings[site] for site in sites]
        if any(before.second != behind.first for before, behind in pairwise(meetings)):
            raise CannotFitError("its activations lie in a row no more")
        return _chain(self._model, sites, meetings, self._names, self._norms)

    def _made(self, runs: Iterable[list[str]]) -> list[FitChain]:
        chains: list[FitChain] = []
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
    """Yield the sites that lie in a row, each the operator behind it in common with the next."""
    by_first = {meeting.first: site for site, meeting in meetings.items()}
    behind = {meeting.second for meeting in meetings.values()}
    for site, meeting in meetings.items():
        if meeting.first in behind:
            continue
        run = [site]
        while (following := by_first.get(meetings[run[-1]].second)) is not None:
            run.append(following)
        yield run


def _norms_behind(nodes: Iterable[FlowNode], names: Mapping[nn.Module, str]) -> Iterator[tuple[str, str]]:
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
) -> FitChain:
    operators = [meetings[0].first, *(meeting.second for meeting in meetings)]
    between = [names[m] for meeting in meetings for m in (*meeting.between, *meeting.idle) if m is not None]
    modules = [model.get_submodule(name) for name in operators]
    inside = [name for name in between if name not in operators and name not in sites]
    return FitChain(tuple(sites), tuple(operators), tuple(inside), geometry_of(modules), norms.get(operators[-1]))


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


class _EndOfChainError(BaseException):
    """Ends a forward of which all that is wanted has been seen; no forward catches it."""


def positions_wanted(chain: FitChain) -> int:
    """Return how many positions of the calibration data are enough for a fit."""
    unknowns = chain.geometry.unknowns
    return max(_POSITIONS_FOR_EACH_UNKNOWN * unknowns, min(_ENOUGH_POSITIONS, _WORK // unknowns))


def _nothing() -> None: ...


def gather(
    model: nn.Module,
    chain: FitChain,
    batches: Sequence[tuple[Tensor, ...]],
    advance: Callable[[], object] = _nothing,
) -> tuple[Moments, torch.Size]:
    """Run a model up to the end of a chain, and sum up what goes in and what comes out.

    Args:
        model: The model, in eval mode.
        chain: The chain.
        batches: The forward's positional arguments, for each batch.
        advance: What is called behind each batch.

    Returns:
        The sums, and the shape of what goes in, of the first batch.

    Raises:
        CannotFitError: If the forward does not get there.
    """
    moments: list[Moments] = []
    shapes: list[torch.Size] = []
    positions = -(-positions_wanted(chain) // len(batches))

    def add(value: Tensor, output: Tensor) -> None:
        if not moments:
            axis = 1 if chain.geometry.kernel else -1
            moments.append(Moments.of(chain.geometry, output.shape[axis], output.device))
            shapes.append(value.shape)
        moments[0].add(value, output, positions)
        advance()

    _run_up_to(model, chain, batches, add)
    return moments[0], shapes[0]


def _shape_of_input(model: nn.Module, chain: FitChain, arguments: Sequence[Tensor]) -> torch.Size:
    """Return the shape of what goes into a chain."""
    shapes: list[torch.Size] = []
    _run_up_to(model, chain, [tuple(arguments)], lambda value, _: shapes.append(value.shape))
    return shapes[0]


def _run_up_to(
    model: nn.Module,
    chain: FitChain,
    batches: Iterable[tuple[Tensor, ...]],
    see: Callable[[Tensor, Tensor], None],
) -> None:
    """Run a model up to the end of a chain, and show what goes in and what comes out.

    Raises:
        CannotFitError: If the forward does not get there.
    """
    inputs: list[Tensor] = []

    def begin(module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        inputs[:] = [*arguments, *keywords.values()][:1]

    def end(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        (value,) = inputs
        see(value, output)
        raise _EndOfChainError

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        first, last = (model.get_submodule(chain.operators[place]) for place in (0, -1))
        stack.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(last.register_forward_hook(end).remove)
        for arguments in batches:
            try:
                model(*arguments)
            except _EndOfChainError:
                continue
            raise CannotFitError("the model's forward does not call it")


class ChainPrices:
    """Tells what chains and fitted operators cost.

    Args:
        objective: What is to be least.
        table: Times that were measured already.
    """

    def __init__(self, objective: Objective, table: LatencyTable) -> None:
        self.objective: Objective = objective
        self._table = table

    def of(self, modules: dict[str, nn.Module], shape: torch.Size, like: Tensor) -> dict[str, float]:
        """Return what modules cost at the shape of their input, those that were not timed yet timed together.

        Args:
            modules: The modules by name.
            shape: Of the input.
            like: A tensor of the dtype, on the device.
        """
        value = torch.randn(shape, dtype=like.dtype, device=like.device)
        modules = {name: deepcopy(module).to(value).eval() for name, module in modules.items()}
        if self.objective == "depth":
            return {name: float(_depth(module)) for name, module in modules.items()}
        if self.objective == "macs":
            return {name: float(count_macs(module, (value,))) for name, module in modules.items()}
        keys: dict[str, Hashable] = {
            name: (str(module), tuple(shape), str(like.dtype), str(like.device), torch.get_num_threads())
            for name, module in modules.items()
        }
        self._table.measure({keys[name]: partial(partial, module, value) for name, module in modules.items()})
        return {name: self._table.seconds[key] for name, key in keys.items()}

    def compared(self, after: float, before: float) -> str:
        """Say in words what something would cost beside what it costs."""
        if self.objective == "latency":
            return f"{after * 1e6:.1f} µs instead of {before * 1e6:.1f} µs"
        return f"{after:,.0f} {'MACs' if self.objective == 'macs' else 'operators'} instead of {before:,.0f}"


def _depth(module: nn.Module) -> int:
    return sum(type(part) in (nn.Linear, *CONVOLUTIONS) for part in module.modules())


@dataclass(frozen=True)
class Choice:
    """An operator that may take the place of a chain.

    Attributes:
        chain: The chain.
        fit: The operator, and how well it represents the chain.
        shortfall: How much less of the variance it explains than the operator that explains most.
        price_before: Of the chain, in the unit of the objective.
        price_after: Of the operator.
    """

    chain: FitChain
    fit: Fit
    shortfall: float
    price_before: float
    price_after: float

    @property
    def saving(self) -> float:
        """What it saves, in the unit of the objective."""
        return self.price_before - self.price_after


def priced(
    model: nn.Module, chain: FitChain, candidates: Sequence[Fit], shape: torch.Size, prices: ChainPrices
) -> list[Choice]:
    """Tell what each operator would cost in the place of a chain whose input has a shape."""
    most = max(fit.explained for fit in candidates)
    # in a collapse the batch norms between are folded
    parts = [model.get_submodule(name) for name in _in_a_row(chain)]
    weight: Tensor = parts[0].weight  # type: ignore[assignment]
    wanted = {"": nn.Sequential(*parts), **{str(number): fit.operator for number, fit in enumerate(candidates)}}
    costs = prices.of(wanted, shape, weight)
    return [
        Choice(chain, fit, most - fit.explained, costs[""], costs[str(number)]) for number, fit in enumerate(candidates)
    ]


def choose(choices: Sequence[Choice], prices: ChainPrices, slack: float) -> Choice:
    """Choose the cheapest operator that represents a chain nearly as well as the best.

    Args:
        choices: What may take the place of the chain.
        prices: Tells what modules cost.
        slack: How much less of the variance than the best it may explain.

    Raises:
        CannotFitError: If it is not cheaper than the chain.
    """
    best = min((each for each in choices if each.shortfall <= slack), key=lambda each: each.price_after)
    if best.saving <= 0:
        compared = prices.compared(best.price_after, best.price_before)
        raise CannotFitError(f"does not pay: the cheapest takes {compared}")
    return best


def _in_a_row(chain: FitChain) -> Iterator[str]:
    for operator, site in zip(chain.operators, chain.sites, strict=False):
        yield operator
        yield site
    yield chain.operators[-1]


def replace(model: nn.Module, choice: Choice, arguments: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Put an operator in the place of a chain, in place.

    Args:
        model: The model, in eval mode.
        choice: The operator.
        arguments: Example inputs, for a forward that shows whether the model still runs.

    Returns:
        What was there before, by name; :func:`put` brings it back.

    Raises:
        CannotFitError: If it does not, since its forward reads more of the operators than what they compute; the model
            is as it was.
    """
    chain = choice.chain
    first: Any = model.get_submodule(chain.operators[0])
    new: dict[str, nn.Module] = {chain.operators[0]: deepcopy(choice.fit.operator).to(first.weight).eval()}
    new.update({name: Absorbed().eval() for name in chain.behind})
    if chain.norm is not None:
        new[chain.norm] = with_statistics(model.get_submodule(chain.norm), choice.fit.mean, choice.fit.variance)
    old = {name: model.get_submodule(name) for name in new}
    put(model, new)
    try:
        with torch.no_grad():
            model(*arguments)
    except Exception as error:  # whatever the user's forward raises
        put(model, old)
        raise CannotFitError(f"the model does not run with an operator in its place: {error}") from error
    return old


def is_adjustable(norm: Any) -> bool:
    """Tell whether a batch norm has statistics, and a scale and an offset that can make up for others."""
    return norm.running_mean is not None and norm.weight is not None and norm.bias is not None


def with_statistics(norm: Any, mean: Tensor, variance: Tensor, offset: Tensor | None = None) -> nn.Module:
    """Copy a batch norm for values of other statistics; in eval mode it computes the same.

    What is fitted varies less than what it was fitted to. In training mode a batch norm would scale that up again, and
    training would begin with another function than the one that was fitted.

    Args:
        norm: The batch norm.
        mean: Of its input from now on, shape ``(C,)``.
        variance: Of its input from now on, shape ``(C,)``.
        offset: What its input lacks from now on, shape ``(C,)``; the batch norm makes up for it.
    """
    copied = deepcopy(norm)
    if not is_adjustable(norm):
        return copied
    mean, variance = mean.to(norm.running_mean), variance.to(norm.running_var)
    shift = torch.zeros_like(mean) if offset is None else offset.to(mean)
    with torch.no_grad():
        before, after = (value + norm.eps for value in (norm.running_var, variance))
        copied.bias += norm.weight * (mean + shift - norm.running_mean) / before.sqrt()
        copied.weight *= (after / before).sqrt()
        copied.running_mean.copy_(mean)
        copied.running_var.copy_(variance)
    return copied


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules under their names."""
    for name, module in modules.items():
        replace_activation(model, name, module)


def fit_chain(
    model: nn.Module,
    chain: FitChain,
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    advance: Callable[[], object] = _nothing,
) -> list[Choice]:
    """Fit and price every operator that may take the place of a chain; the model is not changed.

    Args:
        model: A model in eval mode, its activations isolated.
        chain: The chain.
        batches: Calibration data: the forward's positional arguments, for each batch.
        arguments: Example inputs, at whose shapes operators are priced.
        prices: Tells what modules cost.
        advance: What is called behind each batch, and behind each fit.

    Raises:
        CannotFitError: If the forward does not get there.
    """
    moments, _ = gather(model, chain, batches, advance)
    reason = moments.why_no_fit()
    if reason is not None:
        raise CannotFitError(reason)
    fitted = []
    for fit in fits(moments):
        fitted.append(fit)
        advance()
    return priced(model, chain, fitted, _shape_of_input(model, chain, arguments), prices)


def fit_chains(
    model: nn.Module,
    sites: Sequence[str],
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> tuple[list[Choice], dict[str, str]]:
    """Replace the chains around activations in place, one after the other: each is fitted to what the last has left.

    Args:
        model: A model in eval mode, its activations isolated.
        sites: Names of the activations.
        batches: As for :func:`fit_chain`.
        arguments: As for :func:`fit_chain`.
        prices: As for :func:`fit_chain`.
        slack: How much less of the variance than the best an operator may explain to be chosen.

    Returns:
        What was chosen, and site -> why nothing takes the place of its chain.
    """
    chains = Chains(model, sites)
    choices = []
    rows = chains.in_rows()
    for chain, advance in _in_steps(rows, len(batches) + _MOST_FITS, "Fitting"):
        try:
            choice = choose(fit_chain(model, chain, batches, arguments, prices, advance), prices, slack)
            replace(model, choice, arguments)
            choices.append(choice)
        except CannotFitError as error:
            chains.reasons.update(dict.fromkeys(chain.sites, str(error)))
    return choices, chains.reasons


def _in_steps(
    chains: Sequence[FitChain], steps: int, description: str
) -> Iterator[tuple[FitChain, Callable[[], object]]]:
    """Yield chains with what is to be called behind each step, of which a chain has so many at most.

    One progress bar shows the steps of all chains; those that a chain does without are taken when it is done.
    """
    with tqdm(total=len(chains) * steps, desc=description, leave=False, delay=1, disable=None) as bar:
        for number, chain in enumerate(chains, 1):
            bar.set_postfix_str(" + ".join(chain.operators), refresh=False)
            yield chain, bar.update
            bar.update(number * steps - bar.n)
