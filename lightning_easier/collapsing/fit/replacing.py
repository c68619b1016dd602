"""Replace the chains around given activations, one after the other, each by the operator that is worth its place."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

from torch import Tensor, nn
from tqdm import tqdm

from lightning_easier.collapsing.fit.correcting import beginnings_of, gather_alone
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, choose
from lightning_easier.collapsing.fit.fittable import CannotFitError, FittableChain, FittableChains
from lightning_easier.collapsing.fit.fitting import MOST_FITS, fit_to
from lightning_easier.collapsing.fit.norms import match_norms
from lightning_easier.collapsing.fit.placing import replace
from lightning_easier.collapsing.fit.refitting import MOST_REFITS, refit_kept


def replace_chains(
    model: nn.Module,
    sites: Sequence[str],
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    prices: ChainPrices,
    slack: float,
) -> tuple[list[PricedFit], dict[str, str]]:
    """Replace the chains around activations in place, one after the other: each corrects the errors of those before it.

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
    chains = FittableChains(model, sites, by_depth=prices.objective == "depth")
    dense = deepcopy(model)
    dense_begun = cache(lambda: beginnings_of(dense, batches))  # where anything is replaced
    choices: list[PricedFit] = []
    rows = chains.in_rows()

    def fit_alone(chain: FittableChain) -> list[PricedFit]:  # its sums are not kept beside those of the next
        before = dense_begun() if choices else None
        gathered = gather_alone(model, before, chain, batches, arguments, advance=progress.advance)
        return fit_to(model, chain, gathered, prices, progress.advance)

    # the refits are one step more
    with Progress(len(rows) + 1, max(len(batches) + MOST_FITS, MOST_REFITS), "Fitting") as progress:
        for chain in rows:
            progress.name(chain)
            try:
                choice = choose(fit_alone(chain), prices, slack)
                replace(model, choice, arguments)
                choices.append(choice)
            except CannotFitError as error:
                chains.reasons.update(dict.fromkeys(chain.sites, str(error)))
            progress.finish()
        if len(choices) > 1:  # one chain alone is fitted to what it computes, and the rest stays as it is
            refit_kept(model, dense_begun(), batches, advance=progress.advance)
        progress.finish()
    if choices:
        match_norms(model, dense, batches)
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
