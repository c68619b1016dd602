"""The commuted order of units: averages in front of what treats every position alone, and that on one side of layouts.

Averages over positions move in front of operators that treat every position alone, which then work on fewer; such
operators move to the side of a layout where they meet another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lightning_easier.collapsing.algebra.affine import AFFINES
from lightning_easier.collapsing.algebra.operators import channel_axis, channels, is_pointwise
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import shape_of
from lightning_easier.collapsing.exact.plans import Kept, Made, Split, Unit, shapes_of
from lightning_easier.collapsing.exact.prices import Pricer, Shape
from lightning_easier.collapsing.exact.recipes import Recipe, after_flatten, moved, recipe_of


def commuted(units: Sequence[Unit], shape: Shape, pricer: Pricer) -> list[Unit] | None:
    """Return the units with averages in front of, and layouts after, what treats every position alone.

    Args:
        units: The units as they stand.
        shape: Of what the first reads.
        pricer: Prices them in their new places.

    Returns:
        The units in the other order, priced; None if it is the same.
    """
    order = _Order(units)
    changed = False
    place = 0
    while place + 1 < len(order.units):
        following = order.pass_layouts(place)
        if following is None and (swapped := _swapped(order.units, place, order.before(place))) is not None:
            order.replace(place, swapped)
            following = max(place - 1, 0)
        changed |= following is not None
        place = place + 1 if following is None else following
    if not changed:
        return None
    return _repriced(order.units, shape, pricer)


@dataclass(frozen=True)
class _Before:
    """What is known of the units before a place.

    Attributes:
        axis: Where the last operator's channels are now, layouts since then followed; None if that is not known.
        all_pointwise: Whether all operators since the last average treat every position alone.
        layouts: How many layouts at their end may be passed by what treats every position alone.
    """

    axis: int | None = None
    all_pointwise: bool = True
    layouts: int = 0

    def then(self, unit: Unit) -> "_Before":
        """Return what is known after one more unit."""
        is_pointwise_operator = unit.recipe is not None and is_pointwise(unit.recipe.structure)
        all_pointwise = unit.is_average or (self.all_pointwise if is_pointwise_operator else unit.is_layout)
        if not unit.is_layout or unit.link is None:
            return _Before(None if unit.recipe is None else channel_axis(unit.recipe.structure), all_pointwise)
        axis = None if self.axis is None else (unit.link.moves or {}).get(self.axis)
        return _Before(axis, all_pointwise, self.layouts + 1 if self.lets_pass(unit.link) else 0)

    def lets_pass(self, layout: Link) -> bool:
        """Tell whether operators after a layout move in front of it, and not those before it to its other side."""
        return not (_is_of_one_position(layout) and self.all_pointwise)


class _Order:
    """Units in an order that changes, and what is known before each place.

    An operator passes all layouts before it at once: passing them one by one, many alternate with many operators, would
    take the square of their number.

    Attributes:
        units: In their order.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self._known = [_Before()]

    def before(self, place: int) -> _Before:
        """Return what is known of the units before a place."""
        while len(self._known) <= place:
            self._known.append(self._known[-1].then(self.units[len(self._known) - 1]))
        return self._known[place]

    def replace(self, place: int, pair: Sequence[Unit]) -> None:
        """Put two units in the place of two."""
        self.units[place : place + 2] = pair
        del self._known[place + 1 :]

    def pass_layouts(self, place: int) -> int | None:
        """Put the operator after a place in front of all layouts before it; return where to go on, None if it can't."""
        unit, here = self.units[place + 1], self.before(place + 1)
        operator = _movable(unit)
        if operator is None or not here.layouts or here.axis != channel_axis(operator):
            return None
        start = place + 1 - here.layouts
        before, first = self.before(start), self.units[start].link
        if before.axis is None or first is None:
            return None
        try:
            moved = _moved(unit, before.axis, max(len(shape_of(first.value) or ()) - 2, 1))
        except CannotMergeError:  # it may pass some of them
            return None
        del self.units[place + 1], self._known[place + 2 :]
        self.units.insert(start, moved)
        self._known.insert(start + 1, before.then(moved))  # its channels are where the last operator's were
        return max(start - 1, 0) if here.layouts == 1 else place + 1


def _repriced(order: Sequence[Unit], shape: Shape, pricer: Pricer) -> list[Unit]:
    """Price units in their new places, and tell layouts how many channels there are."""
    units: list[Unit] = []
    for unit, at in zip(order, shapes_of(order, shape), strict=True):
        link = unit.link
        if isinstance(unit.alone, Split) or (link is not None and at == shape_of(link.value)):
            units.append(unit)
        elif link is None or link.carries_weight:
            assert unit.recipe is not None
            units.append(replace(unit, price=pricer.price(unit.recipe.structure, at)))
        elif unit.is_layout:
            units.append(replace(unit, alone=Kept(link, _channels_at(link, at))))
        else:  # the same on fewer positions, or an average over more or fewer channels
            share = prod(at) / prod(shape_of(link.value) or ())
            price = unit.price[0] * share, unit.price[1]
            recipe = unit.recipe
            if link.averaging is not None and link.averaging.kernel is not None:
                recipe = recipe_of(link, link.averaging.kernel(at[1]))
            units.append(replace(unit, price=price, recipe=recipe))
    return units


def _swapped(order: Sequence[Unit], place: int, before: _Before) -> list[Unit] | None:
    """Return two neighbours in the other order, where that brings what belongs together closer; else None."""
    first, second = order[place : place + 2]
    if first.link is not None and first.link.unchanged:
        return [second, first] if second.recipe is not None else None
    try:
        if second.is_average:
            return _averaged_first(first, second)
        if second.is_layout and place + 2 < len(order):
            return _after_the_layout(before, first, second, order[place + 2])
        if first.is_layout:
            return _before_the_layout(before, first, second)
    except CannotMergeError:  # more axes than there are convolutions for
        pass
    return None


def _averaged_first(first: Unit, second: Unit) -> list[Unit] | None:
    """Put an average in front of an operator that treats every position alone; None where they don't commute."""
    link, operator = second.link, _movable(first)
    if operator is None or link is None or link.averaging is None or link.moves is None:
        return None
    axis = link.moves.get(channel_axis(operator))
    if axis is None or (operator.bias is not None and not link.averaging.weighs_evenly):
        return None
    return [second, _moved(first, axis, max(len(shape_of(link.node) or ()) - 2, 1))]


def _after_the_layout(before: _Before, first: Unit, second: Unit, after: Unit) -> list[Unit] | None:
    """Let an operator on a map of one position, or an affine, work on the vector that a Linear reads."""
    link, operator = second.link, _movable(first)
    if link is None or first.recipe is None or after.recipe is None or channel_axis(after.recipe.structure) != -1:
        return None
    if not after.recipe.anchored:  # nothing says that there are as many positions at other sizes, too
        return None
    if _flattens(link) and isinstance(first.recipe.structure, AFFINES):
        sample = list(shape_of(link.value) or ())[1:]
        channel = channel_axis(first.recipe.structure)
        sample[0 if channel == 1 else -1] = channels(first.recipe.structure)[1]  # what changed them may be after now
        return [second, _written(first, after_flatten(first.recipe, tuple(sample)))]
    if operator is None or not _is_of_one_position(link) or channel_axis(operator) != 1 or not before.all_pointwise:
        return None
    return [second, _moved(first, -1, 1)]


def _before_the_layout(before: _Before, first: Unit, second: Unit) -> list[Unit] | None:
    """Put an operator that treats every position alone beside the operator on the other side of a layout."""
    link, operator = first.link, _movable(second)
    if operator is None or link is None or before.axis is None or not before.lets_pass(link):
        return None
    if (link.moves or {}).get(before.axis) != channel_axis(operator):  # no operator put its channels there
        return None
    return [_moved(second, before.axis, max(len(shape_of(link.value) or ()) - 2, 1)), first]


def _movable(unit: Unit) -> Any:
    """Return the structure of an operator that treats every position alone; None for anything else."""
    if unit.recipe is None or unit.is_average or not is_pointwise(unit.recipe.structure):
        return None
    return unit.recipe.structure


def _is_of_one_position(link: Link) -> bool:
    """Tell whether a layout makes a vector of a map of one position."""
    shape = shape_of(link.value) or ()
    return len(shape) > 2 and (link.moves or {}).get(1) == -1 and prod(shape[2:]) == 1


def _flattens(link: Link) -> bool:
    """Tell whether a layout makes a vector of each sample."""
    before, after = shape_of(link.value) or (), shape_of(link.node) or ()
    return len(before) > 2 and len(after) == 2 and before[0] == after[0]


def _moved(unit: Unit, axis: int, axes: int) -> Unit:
    """Write a unit for another place of the channels."""
    assert unit.recipe is not None
    recipe = moved(unit.recipe, axis, axes)
    if recipe is unit.recipe and _fits_anywhere(unit):
        return unit
    if not recipe.anchored:
        raise CannotMergeError("nothing but the example tells its channels")
    return _written(unit, recipe)


def _fits_anywhere(unit: Unit) -> bool:
    """Tell whether what a unit is written as does not depend on the number of axes."""
    if unit.link is None:
        return isinstance(unit.alone, Made)
    return unit.link.carries_weight or unit.link.operator_on is not None


def _written(unit: Unit, recipe: Recipe) -> Unit:
    return Unit(Made(recipe), unit.price, recipe, unit.elements, before=unit.before)


def _channels_at(link: Link, shape: Shape) -> int | None:
    """Return the number of channels that a layout gets where it gets another shape than in the model."""
    then = shape_of(link.value) or ()
    return next((now for now, before in zip(shape, then, strict=True) if now != before), None)
