"""What the report says of a cut: what became one, and why the rest did not."""

from collections.abc import Iterator, Sequence

from lightning_easier.collapsing.algebra.operators import summary
from lightning_easier.collapsing.exact.chains import Element, Fork
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.plans import Cut, Made, Split, Unit, operators_of, shapes_of
from lightning_easier.collapsing.exact.prices import Objective, Pricer, Shape, macs_at, total
from lightning_easier.collapsing.exact.recipes import Composer, Recipe
from lightning_easier.report import Merge, Refusal


def merges_of(cut: Cut, objective: Objective) -> Iterator[Merge]:
    """Yield what became one operator, or another of less work.

    Args:
        cut: The cut that was chosen.
        objective: What its prices are of.
    """
    for unit in cut.units:
        prices = unit.before[0], unit.price[0]
        if isinstance(unit.alone, Made):
            into = summary(unit.alone.recipe.structure)
            yield Merge(_names_of(unit.elements), into, objective, *prices)
        elif isinstance(unit.alone, Split):
            for branch in unit.branches:
                yield from merges_of(branch, objective)
        elif unit.link is not None and unit.link.carries_weight and unit.price[0] != unit.before[0]:
            yield Merge(_names_of(unit.elements), "the same, after the average", objective, *prices)


def refusals_of(cut: Cut, pricer: Pricer, composer: Composer) -> Iterator[Refusal]:
    """Say of each two neighbours that stay apart why.

    Args:
        cut: The cut that was chosen.
        pricer: What its prices are from.
        composer: What its recipes are from.
    """
    shapes = shapes_of(cut.units, cut.shape)
    last: int | None = None
    for place, unit in enumerate(cut.units):
        if isinstance(unit.alone, Split):
            for branch in unit.branches:
                yield from refusals_of(branch, pricer, composer)
            reason = unit.why_not or _why_it_does_not_pay([unit], unit.recipe, shapes[place:], pricer)
            yield Refusal(_names_of(unit.elements), reason)
        if unit.recipe is None:
            continue
        if last is not None:
            pair = [cut.units[last], unit]
            between = cut.units[last + 1 : place]
            assert pair[0].recipe is not None
            if between:
                reason = "; ".join(_why_it_keeps_apart(each) for each in between)
            else:
                composed = composer.compose(pair[0].recipe, unit.recipe)
                reason = (
                    composed
                    if isinstance(composed, str)
                    else _why_it_does_not_pay(pair, composed, [shapes[last], shapes[place]], pricer)
                )
            yield Refusal((*_short_names_of(pair[0]), *_short_names_of(unit)), reason)
        last = place


def _why_it_keeps_apart(unit: Unit) -> str:
    """Say of what is between two operators why neither passes it."""
    name = f"`{'` and `'.join(_names_of(unit.elements))}`"
    if unit.is_average:
        return f"{name} between them averages over positions, and neither treats every position alone"
    if unit.is_layout:
        return f"{name} between them puts the channels, or the positions, where neither can follow"
    return f"{name} between them is not one operator"


def _why_it_does_not_pay(units: Sequence[Unit], recipe: Recipe | None, shapes: Sequence[Shape], pricer: Pricer) -> str:
    assert recipe is not None
    into = summary(recipe.structure)
    if pricer.is_hopeless(recipe.structure, shapes[0], operators_of(units, shapes)):
        return f"does not pay: as {into} it would take {macs_at(recipe.structure, shapes[0]):,} MACs"
    after, before = pricer.price(recipe.structure, shapes[0]), total(*(unit.price for unit in units))
    return f"does not pay: as {into} it would cost {pricer.compared(after, before)}"


def _short_names_of(unit: Unit) -> tuple[str, ...]:
    """Return the names of a unit's elements; of one that is new only that which it goes by."""
    names = _names_of(unit.elements)
    if not isinstance(unit.alone, Made):
        return names
    own = [element.name for element in unit.elements if isinstance(element, Link) and element.carries_weight]
    return tuple(own[:1]) or names[:1]


def _names_of(elements: Sequence[Element]) -> tuple[str, ...]:
    """Return the names of elements, those inside forks included, for a report."""
    names: list[str] = []
    for element in elements:
        if isinstance(element, Fork):
            names += [name for branch in element.branches for name in _names_of(branch)]
        names.append(element.name)
    return tuple(names)
