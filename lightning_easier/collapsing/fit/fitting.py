"""Replace chains around activations that are not linear by single operators, fitted to what the chains compute.

The fitted operator takes the place of the first in the chain; all that is after it becomes an identity (see
:mod:`~lightning_easier.collapsing.fit.placing`), so that the forward of the model stays as it is written, and an exact
collapse takes the identities out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier.collapsing.algebra.least_squares import NOT_FINITE, Moments, fits
from lightning_easier.collapsing.fit.chain_hooks import ChainHooks
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, choose, priced
from lightning_easier.collapsing.fit.fittable import CannotFitError, FittableChain, FittableChains, Place
from lightning_easier.collapsing.fit.placing import replace
from lightning_easier.support.calibration import tell_left_out
from lightning_easier.support.inference import copies, evaluation_mode

# Positions of the calibration data that are used: as many for each unknown, and more where that is cheap.
_POSITIONS_FOR_EACH_UNKNOWN, _ENOUGH_POSITIONS, _WORK = 14, 2**17, 2**26
# Of one chain: a convolution, a separable, a pointwise one, three of low rank, and an affine.
MOST_FITS = 7
# Of the sums that are gathered in one run over the data.
_MOST_BYTES = 2**30


class _EndOfChainError(BaseException):
    """Ends a forward of which all that is wanted has been seen; no forward catches it."""


def positions_wanted(place: Place) -> int:
    """Return how many positions of the calibration data are enough for a fit."""
    unknowns = place.geometry.unknowns
    return max(_POSITIONS_FOR_EACH_UNKNOWN * unknowns, min(_ENOUGH_POSITIONS, _WORK // unknowns))


def _nothing() -> None: ...


class Gathered(NamedTuple):
    """What was summed up of one place.

    Attributes:
        moments: The sums.
        shape: Of what goes into the place at the example inputs.
        ran: Which of the watched modules ran before the place had ended, in any batch: where they are still what they
            were, so are the sums.
    """

    moments: Moments
    shape: torch.Size
    ran: frozenset[str]


def gather(
    model: nn.Module,
    places: Iterable[Place],
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    watched: Iterable[str] = (),
    advance: Callable[[], object] = _nothing,
) -> Iterator[tuple[Place, Gathered | None]]:
    """Sum up what goes into each of some places and what comes out, in one run over the data for as many as fit.

    Args:
        model: The model, in eval mode; whatever is done to it between two places has to be undone before the next.
        places: The places.
        batches: The forward's positional arguments, for each batch.
        arguments: Example inputs.
        watched: Names of modules of which is said whether they ran.
        advance: What is called after each batch, for each place.

    Yields:
        Each place, and its sums; None if the forward does not get there.
    """
    watched = tuple(watched)
    for group in _groups(model, places):
        moments: dict[Place, Moments] = {}
        shapes: dict[Place, torch.Size] = {}

        def add(
            place: Place,
            value: Tensor,
            output: Tensor,
            moments: dict[Place, Moments] = moments,
            shapes: dict[Place, torch.Size] = shapes,
        ) -> None:
            if place not in moments:
                axis = 1 if place.geometry.kernel else -1
                moments[place] = Moments.of(place.geometry, output.shape[axis], output.device)
                shapes[place] = value.shape
            moments[place].add(value, output, -(-positions_wanted(place) // len(batches)))
            advance()

        reached = _run_up_to(model, group, batches, add, watched)
        if [x.shape for x in arguments] != [x.shape for x in batches[0]]:
            shapes = _shapes_of_inputs(model, list(reached), arguments)
        for place in group:
            is_reached = place in reached and place in shapes
            sums = moments.pop(place, None)  # not kept beside those of the next
            yield place, Gathered(sums, shapes[place], reached[place]) if is_reached and sums is not None else None


def _groups(model: nn.Module, places: Iterable[Place]) -> Iterator[list[Place]]:
    """Put places together whose sums fit into memory beside each other; each is in a group, however large it is."""
    group: list[Place] = []
    taken = 0
    for place in places:
        columns = place.geometry.unknowns
        needed = 2 * 8 * columns * (columns + place.outputs(model))  # what is fitted and what is held out, in float64
        if group and taken + needed > _MOST_BYTES:
            yield group
            group, taken = [], 0
        group.append(place)
        taken += needed
    if group:
        yield group


def _shapes_of_inputs(
    model: nn.Module, places: Sequence[Place], arguments: Sequence[Tensor]
) -> dict[Place, torch.Size]:
    """Return the shapes of what goes into places."""
    shapes: dict[Place, torch.Size] = {}

    def note(place: Place, value: Tensor, _: Tensor) -> None:
        shapes[place] = value.shape

    _run_up_to(model, places, [tuple(arguments)], note)
    return shapes


def _run_up_to(
    model: nn.Module,
    places: Sequence[Place],
    batches: Iterable[tuple[Tensor, ...]],
    see: Callable[[Place, Tensor, Tensor], None],
    watched: Iterable[str] = (),
) -> dict[Place, frozenset[str]]:
    """Run a model up to the end of the last of some places, and show what goes into each and what comes out.

    Returns:
        For each place that the forward gets to in all batches: which of the watched modules ran before it had ended.
    """
    running: set[str] = set()  # and what ran, in this batch
    ran: dict[Place, set[str]] = {place: set() for place in places}
    missing: set[Place] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda module, arguments: running.add(name)

    def end(place: Place, value: Tensor, output: Tensor) -> None:
        if place not in missing:  # it was called before
            return
        missing.remove(place)
        ran[place] |= running
        see(place, value, output)
        if not missing:
            raise _EndOfChainError

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for name in watched:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note(name)).remove)
        hooks = [ChainHooks(model, place, partial(end, place)) for place in places]
        for each in hooks:
            stack.callback(each.detach)
            each.attach()
        for arguments in batches:
            missing.update(ran)
            running.clear()
            for each in hooks:
                each.forget()
            try:
                model(*copies(arguments))
            except _EndOfChainError:
                continue
            for place in missing:
                del ran[place]
            missing.clear()
            if not ran:
                break
    return {place: frozenset(names) for place, names in ran.items()}


def fit_to(
    model: nn.Module,
    place: Place,
    gathered: Gathered | None,
    prices: ChainPrices,
    advance: Callable[[], object] = _nothing,
) -> list[PricedFit]:
    """Fit and price every operator for a place whose sums are known.

    Args:
        model: The model, in eval mode; it is not changed.
        place: The place.
        gathered: Its sums, as :func:`gather` yields them.
        prices: Tells what modules cost.
        advance: What is called after each fit.

    Raises:
        CannotFitError: If there are none, or too few values went into them.
    """
    if gathered is None:
        raise CannotFitError("the model's forward does not call it")
    moments = gathered.moments
    tell_left_out(int(moments.left_out), moments.samples, f"the calibration data of {place.described}")
    reason = moments.why_no_fit()
    if reason is not None:
        raise CannotFitError(reason)
    fitted = [*place.without_fit(moments)]
    for fit in fits(moments):
        fitted.append(fit)
        advance()
    if not fitted:
        raise CannotFitError(NOT_FINITE)
    return priced(model, place, fitted, gathered.shape, prices)


def replace_chains(
    model: nn.Module,
    sites: Sequence[str],
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> tuple[list[PricedFit], dict[str, str]]:
    """Replace the chains around activations in place, one after the other: each is fitted to what the last has left.

    Args:
        model: A model in eval mode, its activations isolated.
        sites: Names of the activations.
        batches: Calibration data: the forward's positional arguments, for each batch.
        arguments: Example inputs, at whose shapes operators are priced.
        prices: Tells what modules cost.
        slack: How much less of the variance than the best an operator may explain to be chosen.

    Returns:
        What was chosen, and site -> why nothing takes the place of its chain.
    """
    chains = FittableChains(model, sites)
    choices = []
    rows = chains.in_rows()

    def fit_alone(chain: FittableChain) -> list[PricedFit]:  # its sums are not kept beside those of the next
        ((_, gathered),) = gather(model, [chain], batches, arguments, advance=progress.advance)
        return fit_to(model, chain, gathered, prices, progress.advance)

    with Progress(len(rows), len(batches) + MOST_FITS, "Fitting") as progress:
        for chain in rows:
            progress.name(chain)
            try:
                choice = choose(fit_alone(chain), prices, slack)
                replace(model, choice, arguments)
                choices.append(choice)
            except CannotFitError as error:
                chains.reasons.update(dict.fromkeys(chain.sites, str(error)))
            progress.finish()
    return choices, chains.reasons


class Progress:
    """One progress bar for all chains, whose total is known from the start.

    Args:
        chains: How many chains there are.
        steps: How many steps each takes at most: a batch, a fit.
        description: What is done.
    """

    def __init__(self, chains: int, steps: int, description: str) -> None:
        self._bar = tqdm(total=chains * steps, desc=description, leave=False, disable=None)
        self._steps = steps
        self._done = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Tell of a step, of whichever chain."""
        self._bar.update()

    def name(self, chain: FittableChain) -> None:
        """Show which chain it is at."""
        self._bar.set_postfix_str(" + ".join(chain.operators), refresh=False)

    def finish(self) -> None:
        """Tell that a chain is done; the steps that it did without are taken."""
        self._done += 1
        self._bar.update(max(0, self._done * self._steps - self._bar.n))
