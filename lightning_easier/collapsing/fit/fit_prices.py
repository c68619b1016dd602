"""What chains and the operators fitted to them cost, and which operator is worth its place."""

import math
from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import NOT_FINITE, Fit
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.collapsing.fit.fittable import CannotFitError, Place
from lightning_easier.support.costs import count_macs, price_in_words
from lightning_easier.support.hooks import remove_hooks_of_one_model
from lightning_easier.support.inference import random_like
from lightning_easier.support.timing import LatencyTable

SLACK = 0.02
"""An operator that explains so much less of the variance than the best one does not stand for the chain."""
# A share of the price of a block: what goes with it.
_WORTH_OF_NOTHING = 0.125


class ChainPrices:
    """Tells what chains and fitted operators cost.

    Args:
        objective: What is to be least.
        table: Times that were measured already.
    """

    def __init__(self, objective: Objective, table: LatencyTable) -> None:
        self.objective: Objective = objective
        self._table = table
        self._macs: dict[tuple[str, torch.Size] | None, float] = {}

    def of(self, modules: dict[str, nn.Module], shape: torch.Size, like: Tensor) -> dict[str, float]:
        """Return what modules cost at the shape of their input, those that were not timed yet timed together.

        Args:
            modules: The modules by name.
            shape: Of the input.
            like: A tensor of the dtype, on the device.
        """
        if self.objective == "depth":
            return {name: float(_depth(module)) for name, module in modules.items()}
        if self.objective == "macs":
            return {name: self._macs_of(module, shape, like) for name, module in modules.items()}
        where = tuple(shape), str(like.dtype), str(like.device), torch.get_num_threads()
        keys: dict[str, Hashable] = {name: (str(module), *where) for name, module in modules.items()}
        missing = {key: modules[name] for name, key in keys.items() if key not in self._table.seconds}
        if missing:  # weights are copied for what is timed alone
            value = random_like(like, shape)
            copied = {key: _alone(module, value) for key, module in missing.items()}
            calls = {key: partial(partial, module, value) for key, module in copied.items()}
            self._table.measure(calls, like.device)
        return {name: self._table.seconds[key] for name, key in keys.items()}

    def _macs_of(self, module: nn.Module, shape: torch.Size, like: Tensor) -> float:
        """Count once for modules of torch that are called alike; what the user wrote may compute anything."""
        key = (str(module), shape) if all(map(_says_what_it_is, module.modules())) else None
        if key in self._macs:
            return self._macs[key]
        macs = float(count_macs(_alone(module, like), (random_like(like, shape),)))
        if key is not None:
            self._macs[key] = macs
        return macs

    def compared(self, after: float, before: float) -> str:
        """Say in words what something would cost beside what it costs."""
        return f"{price_in_words(after, self.objective)} instead of {price_in_words(before, self.objective)}"


def _alone(module: nn.Module, like: Tensor) -> nn.Module:
    """Return a copy as it runs outside of its model."""
    copied = deepcopy(module).to(like).eval()
    remove_hooks_of_one_model(copied)
    return copied


def _says_what_it_is(part: nn.Module) -> bool:
    """Tell whether modules with the same words compute the same: attention does not say which axis is the batch."""
    return type(part).__module__.startswith("torch.nn.") and not isinstance(part, nn.MultiheadAttention)


def _depth(module: nn.Module) -> int:
    return sum(type(part) in (nn.Linear, *CONVOLUTIONS) for part in module.modules())


@dataclass(frozen=True)
class PricedFit:
    """An operator that may take the place of a chain, or of a block.

    Attributes:
        place: The chain, or the block.
        fit: The operator, and how well it represents the chain.
        shortfall: How much less of the variance it explains than the operator that explains most.
        price_before: Of the chain, in the unit of the objective.
        price_after: Of the operator.
    """

    place: Place
    fit: Fit
    shortfall: float
    price_before: float
    price_after: float

    @property
    def saving(self) -> float:
        """What it saves, in the unit of the objective."""
        return self.price_before - self.price_after

    @property
    def worth(self) -> float:
        """What it saves, and something besides where nothing is left in its place, which no price tells of.

        An addition goes with a block then, and perhaps a norm; and what costs no more is not as good.
        """
        leaves_nothing = self.place.timed_in_its_place(self.fit) is None
        return self.saving + _WORTH_OF_NOTHING * self.price_before if leaves_nothing else self.saving

    def represents_chain(self, slack: float = SLACK) -> bool:
        """Tell whether it represents the chain nearly as well as the best does.

        Args:
            slack: How much less of the variance than the best it may explain.
        """
        return self.shortfall <= slack


def priced(
    model: nn.Module, place: Place, candidates: Sequence[Fit], shape: torch.Size, prices: ChainPrices
) -> list[PricedFit]:
    """Tell what each operator would cost in a place whose input has a shape.

    Raises:
        CannotFitError: If of none is known what it explains.
    """
    candidates = [fit for fit in candidates if math.isfinite(fit.explained)]
    if not candidates:
        raise CannotFitError(NOT_FINITE)
    most = max(fit.explained for fit in candidates)
    timed = {str(number): place.timed_in_its_place(fit) for number, fit in enumerate(candidates)}
    wanted = {"": place.timed(model), **{name: module for name, module in timed.items() if module is not None}}
    costs = prices.of(wanted, shape, place.like(model))
    return [
        PricedFit(place, fit, most - fit.explained, costs[""], costs.get(str(number), 0.0))
        for number, fit in enumerate(candidates)
    ]


def choose(choices: Sequence[PricedFit], prices: ChainPrices, slack: float) -> PricedFit:
    """Choose the cheapest operator that represents a chain nearly as well as the best.

    Args:
        choices: What may take the place of the chain.
        prices: Tells what modules cost.
        slack: How much less of the variance than the best it may explain.

    Raises:
        CannotFitError: If none does, or it is not cheaper than the chain.
    """
    good = [each for each in choices if each.represents_chain(slack)]
    if not good:
        raise CannotFitError(
            f"nothing that may take its place explains as much of its variance as the best operator, but for the "
            f"{slack:.1%} of `slack`"
        )
    best = min(good, key=lambda each: each.price_after)
    if best.saving > 0:
        return best
    compared = prices.compared(best.price_after, best.price_before)
    cheaper = [each for each in choices if each.worth > 0 and not each.represents_chain(slack)]
    if not cheaper:
        raise CannotFitError(f"does not pay: the cheapest takes {compared}")
    nearest = min(cheaper, key=lambda each: each.shortfall)
    raise CannotFitError(
        f"does not pay: what represents it nearly as well as the best takes {compared}, and {nearest.fit.kind}, which "
        f"is cheaper, explains {nearest.shortfall:.1%} less of its variance than the best, more than the {slack:.1%} "
        f"of `slack`. Raise `slack`, or pass `evaluate` or a target to `compress`, which then tries it"
    )
