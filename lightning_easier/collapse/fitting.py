"""Replace chains around activations that are not linear by single operators, fitted to what the chains compute.

The fitted operator takes the place of the first in the chain; all that is behind it becomes an identity, so that the
forward of the model stays as it is written, and an exact collapse takes the identities out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier.activations import replace_activation
from lightning_easier.collapse.fit_prices import ChainPrices, Choice, choose, priced
from lightning_easier.collapse.fittable import CannotFitError, Chains, FitChain
from lightning_easier.collapse.least_squares import Moments, fits
from lightning_easier.inference import copies, evaluation_mode
from lightning_easier.substitution import Absorbed

# Positions of the calibration data that are used: as many for each unknown, and more where that is cheap.
_POSITIONS_FOR_EACH_UNKNOWN, _ENOUGH_POSITIONS, _WORK = 14, 2**17, 2**26
# Of one chain: a convolution, a separable, a pointwise one, three of low rank, and an affine.
MOST_FITS = 7


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
                model(*copies(arguments))
            except _EndOfChainError:
                continue
            raise CannotFitError("the model's forward does not call it")


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
            model(*copies(arguments))
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
    for chain, advance in in_steps(rows, len(batches) + MOST_FITS, "Fitting"):
        try:
            choice = choose(fit_chain(model, chain, batches, arguments, prices, advance), prices, slack)
            replace(model, choice, arguments)
            choices.append(choice)
        except CannotFitError as error:
            chains.reasons.update(dict.fromkeys(chain.sites, str(error)))
    return choices, chains.reasons


def in_steps(
    chains: Sequence[FitChain], steps: int, description: str
) -> Iterator[tuple[FitChain, Callable[[], object]]]:
    """Yield chains with what is to be called behind each step, of which a chain has so many at most.

    One progress bar shows the steps of all chains; those that a chain does without are taken when it is done.
    """
    with tqdm(total=len(chains) * steps, desc=description, leave=False, disable=None) as bar:
        for number, chain in enumerate(chains, 1):
            bar.set_postfix_str(" + ".join(chain.operators), refresh=False)
            yield chain, bar.update
            bar.update(number * steps - bar.n)
