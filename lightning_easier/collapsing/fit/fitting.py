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

from lightning_easier.collapsing.algebra.least_squares import NOT_FINITE, Moments
from lightning_easier.collapsing.fit.chain_hooks import ChainHooks
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, priced
from lightning_easier.collapsing.fit.fittable import CannotFitError, Place
from lightning_easier.support.calibration import tell_left_out
from lightning_easier.support.calls import call, copies
from lightning_easier.support.inference import evaluation_mode

# Positions of the calibration data that are used: as many for each unknown, and more where that is cheap.
_POSITIONS_FOR_EACH_UNKNOWN, _ENOUGH_POSITIONS, _WORK = 14, 2**16, 2**25
# Of one chain: a convolution, a separable, a pointwise one, three of low rank, and an affine.
MOST_FITS = 7
# Of the sums that are gathered in one run over the data.
_MOST_BYTES = 2**30


class _EndOfChainError(BaseException):
    """Ends a forward of which all that is wanted has been seen; no forward catches it."""


def is_known(moments: Moments, place: Place) -> bool:
    """Tell whether there are enough positions for a fit; more are used where that is cheap."""
    return moments.positions >= _POSITIONS_FOR_EACH_UNKNOWN * place.geometry.unknowns


def positions_wanted(place: Place) -> int:
    """Return how many positions of the calibration data are used for a fit, if there are so many."""
    unknowns = place.geometry.unknowns
    return max(_POSITIONS_FOR_EACH_UNKNOWN * unknowns, min(_ENOUGH_POSITIONS, _WORK // unknowns))


def _nothing() -> None: ...


class Gathered(NamedTuple):
    """What was summed up of one place.

    Attributes:
        moments: The sums.
        shape: Of what goes into the place at the example inputs: into all of it, whatever the sums are over.
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
    enough: int | None = None,
) -> Iterator[tuple[Place, Gathered | None]]:
    """Sum up what goes into each of some places and what comes out, in one run over the data for as many as fit.

    Args:
        model: The model, in eval mode; whatever is done to it between two places has to be undone before the next.
        places: The places.
        batches: The forward's positional arguments, for each batch.
        arguments: Example inputs.
        watched: Names of modules of which is said whether they ran.
        advance: What is called after each batch, for each place.
        enough: So many of the batches are looked at, and more as long as there are too few positions in them; all of
            them by default.

    Yields:
        Each place, and its sums; None if the forward does not get there.
    """
    watched = tuple(watched)
    fewest = len(batches) if enough is None else enough
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
            moments[place].add(value, output, -(-positions_wanted(place) // fewest))
            advance()

        def needed(moments: dict[Place, Moments] = moments) -> Iterator[tuple[Tensor, ...]]:
            yield from batches[:fewest]
            for batch in batches[fewest:]:
                if all(is_known(sums, place) for place, sums in moments.items()):
                    return
                yield batch

        reached = _run_up_to(model, group, needed(), add, watched)
        wholes = list(dict.fromkeys(place.whole for place in reached))
        if [x.shape for x in arguments] != [x.shape for x in batches[0]] or not shapes.keys() >= {*wholes}:
            shapes = shapes_of_inputs(model, wholes, arguments)
        for place in group:
            is_reached = place in reached and place.whole in shapes
            sums = moments.pop(place, None)  # not kept beside those of the next
            found = Gathered(sums, shapes[place.whole], reached[place]) if is_reached and sums is not None else None
            yield place, found


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


def shapes_of_inputs(model: nn.Module, places: Sequence[Place], arguments: Sequence[Tensor]) -> dict[Place, torch.Size]:
    """Return the shapes of what goes into places."""
    shapes: dict[Place, torch.Size] = {}

    def note(place: Place, value: Tensor, _: Tensor) -> None:
        shapes[place] = value.shape

    _run_up_to(model, places, [arguments], note)
    return shapes


def _run_up_to(
    model: nn.Module,
    places: Sequence[Place],
    batches: Iterable[Sequence[Tensor]],
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
                call(model, copies(arguments))
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
    for fit in place.fits(model, moments):
        fitted.append(fit)
        advance()
    if not fitted:
        raise CannotFitError(NOT_FINITE)
    return priced(model, place, fitted, gathered.shape, prices)
