"""The commuted order of units: averages in front of what treats every position alone, and that on one side of layouts.

Averages over positions move in front of operators that treat every position alone, which then work on fewer; such
operators move to the side of a layout where they meet another.
"""

from collections.abc import Sequence
from dataclasses import replace
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
    order = list(units)
    changed = False
    place = 0
    while place + 1 < len(order):
        swapped = _swapped(order, place)
        if swapped is None:
            place += 1
        else:
            order[place : place + 2] = swapped
            changed, place = True, max(place - 1, 0)
    if not changed:
        return None
    return _repriced(order, shape, pricer)


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


def _swapped(order: Sequence[Unit], place: int) -> list[Unit] | None:
    """Return two neighbours in the other order, where that brings what belongs together closer; else None."""
    first, second = order[place : place + 2]
    if first.link is not None and first.link.unchanged:
        return [second, first] if second.recipe is not None else None
    try:
        if second.is_average:
            return _averaged_first(first, second)
        if second.is_layout and place + 2 < len(order):
            return _after_the_layout(order[:place], first, second, order[place + 2])
        if first.is_layout and place > 0:
            return _before_the_layout(order[:place], first, second)
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


def _after_the_layout(before: Sequence[Unit], first: Unit, second: Unit, after: Unit) -> list[Unit] | None:
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
    if operator is None or not _is_of_one_position(link) or channel_axis(operator) != 1 or not _all_pointwise(before):
        return None
    return [second, _moved(first, -1, 1)]


def _before_the_layout(before: Sequence[Unit], first: Unit, second: Unit) -> list[Unit] | None:
    """Put an operator that treats every position alone beside the operator on the other side of a layout."""
    link, operator = first.link, _movable(second)
    if operator is None or link is None or (_is_of_one_position(link) and _all_pointwise(before)):
        return None
    axis = _axis_before(before, link, channel_axis(operator))
    if axis is None:
        return None
    return [_moved(second, axis, max(len(shape_of(link.value) or ()) - 2, 1)), first]


def _axis_before(before: Sequence[Unit], layout: Link, axis: int) -> int | None:
    """Return where a layout takes its channels from, if an operator put them there, through other layouts perhaps."""
    starts = {
        place: place for place in (1, -1) if (layout.moves or {}).get(place) == axis
    }  # axis here -> at the layout
    for unit in reversed(before):
        if not unit.is_layout or unit.link is None:
            found = None if unit.recipe is None else channel_axis(unit.recipe.structure)
            return starts.get(found) if found is not None else None
        moves = unit.link.moves or {}
        starts = {place: starts[moves[place]] for place in (1, -1) if moves.get(place) in starts}
    return None


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


def _all_pointwise(units: Sequence[Unit]) -> bool:
    """Tell whether all operators since the last average treat every position alone."""
    for unit in reversed(units):
        if unit.is_average:
            return True
        if unit.recipe is None or not is_pointwise(unit.recipe.structure):
            return unit.is_layout
    return True


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
