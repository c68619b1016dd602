"""Where to cut a chain of linear steps, so that the total price of its pieces is least.

A chain of n steps is a sequence of *units*; each run of neighbouring units that has a single equal operator is a
possible piece, with a price. The cheapest cut is found by dynamic programming over the end of the last piece. Pieces
longer than :data:`WINDOW` units are found by planning what came out once more, until nothing changes, so that time and
memory grow linearly with the length of the chain.

Besides the chain as it stands its commuted order is planned (:mod:`lightning_easier.collapsing.exact.commuting`).

Nothing here touches the graph, and no weights are multiplied: operators are compared by their structure.
"""

from collections.abc import Sequence

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.operators import channel_axis
from lightning_easier.collapsing.exact.accounts import merges_of, refusals_of
from lightning_easier.collapsing.exact.chains import Chain, Fork, input_shape
from lightning_easier.collapsing.exact.commuting import commuted
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.plans import (
    Cut,
    Kept,
    Made,
    Plan,
    Split,
    Unit,
    as_given,
    operators_of,
    shapes_of,
)
from lightning_easier.collapsing.exact.prices import FREE, Price, Pricer, Shape, total
from lightning_easier.collapsing.exact.recipes import Composer, Recipe, recipe_of

WINDOW = 16
"""The longest run of units that is priced as one piece in one pass."""


class Planner:
    """Plans chains for one objective.

    Args:
        pricer: Prices what a chain consists of, and what it could become.
    """

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._composer = Composer(pricer.device)

    def plan(self, chain: Chain) -> Plan:
        """Plan one chain; the pieces are the chain's own steps where nothing is cheaper."""
        shape = input_shape(chain)
        units = self._units(chain, shape)
        before = as_given(units, shape)
        best = self._cheapest(units, shape)
        if best.price >= before.price:  # the cheapest is no improvement
            best = before
        merges = tuple(merges_of(best, self._pricer.objective))
        refusals = tuple(refusals_of(best, self._pricer, self._composer))
        return Plan(best.pieces, merges, refusals)

    # Units

    def _units(self, chain: Chain, shape: Shape, around: int | None = None) -> list[Unit]:
        """Read the elements of a chain as units, each with the channels where its neighbours have them.

        Args:
            chain: The chain.
            shape: Of what it reads.
            around: The axis of the channels in what the chain is a branch of.
        """
        axis = _axis_at_start(chain) or around
        self._pricer.time_elements(chain)
        units = []
        for element in chain:
            unit = self._unit_of_fork(element, axis) if isinstance(element, Fork) else self._unit_of_link(element, axis)
            units.append(unit)
            if unit.recipe is not None and not unit.is_average:
                axis = channel_axis(unit.recipe.structure)
            elif isinstance(element, Link) and element.moves is not None and axis is not None:
                axis = element.moves.get(axis)
        return units

    def _unit_of_link(self, link: Link, axis: int | None) -> Unit:
        operator = link.operator
        if axis is not None and link.operator_on is not None:  # which axis is the channels' its neighbours tell
            operator = link.operator_on(axis)
        elif isinstance(operator, ChannelAffine) and link.operator_on is not None:
            operator = None
        price = self._pricer.price_of_link(link)
        recipe = None if operator is None else recipe_of(link, operator)
        return Unit(Kept(link), price, recipe, (link,), "", link, price)

    def _unit_of_fork(self, fork: Fork, axis: int | None) -> Unit:
        shape = input_shape((fork,))
        branches = [self._units(branch, shape, axis) for branch in fork.branches]
        join = self._pricer.price_of_join(fork)
        cuts = tuple(self._cheapest(units, shape) for units in branches)
        given = tuple(as_given(units, shape) for units in branches)
        price, before = (total(join, *(cut.price for cut in each)) for each in (cuts, given))
        made = self._recipe_of_fork(fork, branches, shape)
        recipe, why_not = (None, made) if isinstance(made, str) else (made, "")
        alone = Split(fork, tuple(cut.pieces for cut in cuts))
        return Unit(alone, price, recipe, (fork,), why_not, before=before, branches=cuts, given=given)

    def _recipe_of_fork(self, fork: Fork, branches: Sequence[Sequence[Unit]], shape: Shape) -> Recipe | str:
        """Merge the branches of a fork into one operator, or say why there is none."""
        parts: list[Recipe | None] = []
        for branch, read in zip(fork.branches, branches, strict=True):
            units = [unit for unit in read if unit.link is None or not unit.link.unchanged]
            names = " + ".join(element.name for element in branch)
            whole: Recipe | str | None = units[0].recipe if units else None
            for unit in units[1:]:
                if isinstance(whole, Recipe):
                    whole = self._composer.compose(whole, unit.recipe) if unit.recipe else "one of them is no operator"
            if units and not isinstance(whole, Recipe):
                return f"the branch {names} of `{fork.name}` has no single equal: {whole or 'it is no operator'}"
            parts.append(whole if isinstance(whole, Recipe) else None)
        return self._composer.join(fork, parts, shape)

    # Cuts

    def _cheapest(self, units: Sequence[Unit], shape: Shape) -> Cut:
        """Return the cheapest cut of the units as they stand, and of their commuted order."""
        cut = self._cut(units, shape)
        order = commuted(units, shape, self._pricer)
        if order is not None:
            other = self._cut(order, shape)
            if other.price < cut.price:
                return other
        return cut

    def _cut(self, units: Sequence[Unit], shape: Shape) -> Cut:
        """Cut again and again, until no piece of what came out is worth merging with another."""
        cut = self._cut_once(units, shape)
        while len(units) > WINDOW and len(cut.units) < len(units):
            units = cut.units
            cut = self._cut_once(units, shape)
        return cut

    def _cut_once(self, units: Sequence[Unit], shape: Shape) -> Cut:
        shapes = shapes_of(units, shape)
        pieces = self._possible_pieces(units, shapes)
        # best[end]: the price of the cheapest cut of the units before `end`, and where its last piece begins
        best: list[tuple[Price, int]] = [(FREE, 0)]
        for end in range(1, len(units) + 1):
            best.append(
                min(
                    (total(best[start][0], self._price_of_piece(units, shapes, pieces, start, end)), start)
                    for start in range(max(0, end - WINDOW), end)
                    if start == end - 1 or (start, end) in pieces
                )
            )
        cut: list[Unit] = []
        end = len(units)
        while end:
            start = best[end][1]
            if end - start > 1 or best[end][0] < total(best[start][0], units[start].price):
                cut.append(self._made(units[start:end], pieces[start, end], shapes[start]))
            else:
                cut.append(units[start])
            end = start
        return Cut(tuple(reversed(cut)), shape, best[-1][0])

    def _price_of_piece(
        self,
        units: Sequence[Unit],
        shapes: Sequence[Shape],
        pieces: dict[tuple[int, int], Recipe],
        start: int,
        end: int,
    ) -> Price:
        made = self._pricer.price(pieces[start, end].structure, shapes[start]) if (start, end) in pieces else None
        if end - start > 1:
            assert made is not None
            return made
        return units[start].price if made is None else min(units[start].price, made)

    def _made(self, units: Sequence[Unit], recipe: Recipe, shape: Shape) -> Unit:
        price = self._pricer.price(recipe.structure, shape)
        before = total(*(unit.before for unit in units))
        return Unit(Made(recipe), price, recipe, recipe.elements, before=before)

    def _possible_pieces(self, units: Sequence[Unit], shapes: Sequence[Shape]) -> dict[tuple[int, int], Recipe]:
        """Return what runs of units could become, by first and after the last, and see to their prices."""
        pieces: dict[tuple[int, int], Recipe] = {}
        runs: dict[tuple[int, int], Recipe] = {}
        for end in range(1, len(units) + 1):
            last = units[end - 1]
            if last.recipe is None:
                continue
            runs[end - 1, end] = last.recipe
            if isinstance(last.alone, Split) and last.recipe.anchored:  # all by itself a fork may become one operator
                pieces[end - 1, end] = last.recipe
            for start in range(end - 2, max(-1, end - 1 - WINDOW), -1):
                if units[start].recipe is None:
                    break
                recipe = self._run(runs, start, end)
                if recipe is not None:
                    runs[start, end] = recipe
                    instead_of = operators_of(units[start:end], shapes[start:end])
                    if recipe.anchored and not self._pricer.is_hopeless(recipe.structure, shapes[start], instead_of):
                        pieces[start, end] = recipe
        self._pricer.time_operators((recipe.structure, shapes[start]) for (start, _), recipe in pieces.items())
        return pieces

    def _run(self, runs: dict[tuple[int, int], Recipe], start: int, end: int) -> Recipe | None:
        """Compose a run of units from two shorter ones."""
        for middle in (end - 1, start + 1):
            if (start, middle) in runs and (middle, end) in runs:
                composed = self._composer.compose(runs[start, middle], runs[middle, end])
                if isinstance(composed, Recipe):
                    return composed
        return None


def _axis_at_start(chain: Chain) -> int | None:
    """Return the axis of the channels where a chain begins, as its first operator with an axis has them there."""
    now: dict[int, int | None] = {1: 1, -1: -1}  # axis at the start -> the same axis here
    for element in chain:
        if isinstance(element, Fork):
            axes = [axis for branch in element.branches if (axis := _axis_at_start(branch)) is not None]
        else:
            operator = element.operator if element.operator_on is None else None
            axes = [channel_axis(operator)] if operator is not None and recipe_of(element, operator).anchored else []
        if axes:
            return next((start for start, here in now.items() if here == axes[0]), None)
        if isinstance(element, Link) and element.moves is not None:
            moves = element.moves
            now = {start: None if here is None else moves.get(here) for start, here in now.items()}
    return None
