"""Where to cut a chain of linear steps, so that the total price of its pieces is least.

A chain of n steps is a sequence of *units*; each run of neighbouring units that has a single equal operator is a
possible piece, with a price. The cheapest cut is found by dynamic programming over the end of the last piece. Pieces
longer than :data:`WINDOW` units are found by planning what came out once more, until nothing changes, so that time and
memory grow linearly with the length of the chain.

Besides the chain as it stands its *commuted* order is planned: averages over positions move in front of operators that
treat every position alone, and such operators move to the side of a layout where they meet another.

Nothing here touches the graph, and no weights are multiplied: operators are compared by their structure.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from lightning_easier.collapse import operators
from lightning_easier.collapse.affine import ChannelAffine
from lightning_easier.collapse.chains import Chain, Element, Fork
from lightning_easier.collapse.errors import CannotMergeError
from lightning_easier.collapse.operators import channel_axis, is_pointwise, on_axis, structure, summary
from lightning_easier.collapse.prices import (
    FREE,
    LatencyTable,
    Objective,
    Price,
    Shape,
    call_of,
    count_macs,
    key_of,
    output_shape,
    total,
)
from lightning_easier.collapse.reading import Link, shape_of
from lightning_easier.report import Merge, Refusal

WINDOW = 16
"""The longest run of units that is priced as one piece in one pass."""

# A piece with this many times the multiply-accumulates is not even timed: no operator is that much more efficient.
_HOPELESS = 16
# More weights than this (8 GiB in float64) are not multiplied out whatever the objective.
_MOST_WEIGHTS = 2**30


@dataclass(frozen=True, eq=False)
class Recipe:
    """One operator that some elements become.

    Attributes:
        structure: The operator without data, in its dtype.
        build: Makes it, in float64.
        elements: What it stands for, in execution order.
        anchored: Whether the number of channels is told by weights, and not only by the example inputs.
    """

    structure: Any
    build: Callable[[], nn.Module]
    elements: Chain
    anchored: bool


@dataclass(frozen=True, eq=False)
class Kept:
    """A step that stays what it is, in this or another place.

    Attributes:
        link: The step.
        channels: The number of channels of a layout that names it, where that is another now.
        contiguous: Whether the value is to be contiguous, as that of the operator that stood here was.
    """

    link: Link
    channels: int | None = None
    contiguous: bool = False


@dataclass(frozen=True, eq=False)
class Made:
    """A new operator.

    Attributes:
        recipe: How to make it.
    """

    recipe: Recipe


@dataclass(frozen=True, eq=False)
class Split:
    """A fork that stays one.

    Attributes:
        fork: The fork.
        branches: The pieces of each branch.
    """

    fork: Fork
    branches: tuple[tuple["Piece", ...], ...]


Piece: TypeAlias = Kept | Made | Split


@dataclass(frozen=True, eq=False)
class Unit:
    """What a chain is cut into: one of its elements, or what several have become.

    Attributes:
        alone: How it stands if it is a piece of its own.
        price: What that costs.
        recipe: The single operator that it equals, if there is one.
        elements: What it stands for.
        why_not: Why there is no such operator.
        link: The link, if it is one that is not changed.
        before: Price of the elements as they stand in the model.
        branches: The cuts of a fork's branches.
        given: The same as they stand in the model.
    """

    alone: Piece
    price: Price
    recipe: Recipe | None
    elements: Chain
    why_not: str = ""
    link: Link | None = None
    before: Price = FREE
    branches: tuple["Cut", ...] = ()
    given: tuple["Cut", ...] = ()


@dataclass(frozen=True, eq=False)
class Cut:
    """A sequence of units, the shape of what the first reads, and their price."""

    units: tuple[Unit, ...]
    shape: Shape
    price: Price

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is written for the units."""
        return tuple(unit.alone for unit in self.units)


@dataclass(frozen=True, eq=False)
class Plan:
    """What becomes of a chain.

    Attributes:
        pieces: In execution order.
        merges: Those that are new.
        refusals: Neighbours that stay apart, with the reason.
    """

    pieces: tuple[Piece, ...]
    merges: tuple[Merge, ...]
    refusals: tuple[Refusal, ...]


class Planner:
    """Plans chains for one objective.

    Args:
        objective: What is to be least.
        device: The device of the chains' operators.
        table: Times that were measured already.
        alone: A step or a fork's join -> a module that computes it alone, to be timed.
    """

    def __init__(
        self, objective: Objective, device: torch.device, table: LatencyTable, alone: Callable[[fx.Node], nn.Module]
    ) -> None:
        self._objective = objective
        self._device = device
        self._table = table
        self._alone = alone
        self._composed: dict[Hashable, nn.Module | str] = {}

    def plan(self, chain: Chain) -> Plan:
        """Plan one chain; the pieces are the chain's own steps where nothing is cheaper."""
        shape = _input_shape(chain)
        units = self._units(chain, shape)
        before = _as_given(units, shape)
        best = self._cheapest(units, shape)
        if best.price >= before.price:  # the cheapest is no improvement
            best = before
        merges, refusals = tuple(self._merges(best)), tuple(self._refusals(best))
        return Plan(best.pieces, merges, refusals)

    # Units

    def _units(self, chain: Chain, shape: Shape) -> list[Unit]:
        """Read the elements of a chain as units, each with the channels where its neighbours have them."""
        axis = _axis_at_start(chain)
        self._time([(element, None) for element in chain])
        units = []
        for element in chain:
            unit = self._unit_of_fork(element) if isinstance(element, Fork) else self._unit_of_link(element, axis)
            units.append(unit)
            if unit.recipe is not None and not _is_average(unit):
                axis = channel_axis(unit.recipe.structure)
            elif isinstance(element, Link) and element.moves is not None and axis is not None:
                axis = element.moves.get(axis)
        return units

    def _unit_of_link(self, link: Link, axis: int | None) -> Unit:
        operator = link.operator
        if link.operator_on is not None:  # it treats all channels alike; which they are its neighbours tell
            operator = None if axis is None else link.operator_on(axis)
        price = self._price_of_link(link)
        recipe = None if operator is None else _recipe(link, operator)
        return Unit(Kept(link), price, recipe, (link,), "", link, price)

    def _unit_of_fork(self, fork: Fork) -> Unit:
        shape = _input_shape((fork,))
        branches = [self._units(branch, shape) for branch in fork.branches]
        join = self._price_of_join(fork)
        cuts = tuple(self._cheapest(units, shape) for units in branches)
        given = tuple(_as_given(units, shape) for units in branches)
        price, before = (total(join, *(cut.price for cut in each)) for each in (cuts, given))
        recipe, why_not = self._recipe_of_fork(fork, branches, shape)
        alone = Split(fork, tuple(cut.pieces for cut in cuts))
        return Unit(alone, price, recipe, (fork,), why_not, before=before, branches=cuts, given=given)

    def _recipe_of_fork(
        self, fork: Fork, branches: Sequence[Sequence[Unit]], shape: Shape
    ) -> tuple[Recipe | None, str]:
        """Merge the branches of a fork into one operator, or say why there is none."""
        parts: list[Recipe | None] = []
        for branch, units in zip(fork.branches, branches, strict=True):
            names = " + ".join(element.name for element in branch)
            whole: Recipe | str | None = units[0].recipe if units else None
            for unit in units[1:]:
                if isinstance(whole, Recipe):
                    whole = self._compose(whole, unit.recipe) if unit.recipe else "one of them is no operator"
            if units and not isinstance(whole, Recipe):
                return None, f"the branch {names} of `{fork.name}` has no single equal: {whole or 'it is no operator'}"
            parts.append(whole if isinstance(whole, Recipe) else None)
        known = next((part for part in parts if part is not None), None)
        axis = channel_axis(known.structure) if known is not None else (1 if len(shape) > 2 else -1)
        if fork.how == "concatenate" and len(shape) > 2 and fork.axis != axis:
            return None, f"`{fork.name}` does not put channels side by side"
        dtype = fork.node.meta["tensor_meta"].dtype
        identity = _identity(shape[axis], axis, dtype, self._device)
        whole_parts = [part if part is not None else identity for part in parts]
        join: Callable[[Sequence[nn.Module]], nn.Module] = operators.add
        if fork.how == "concatenate":
            join = partial(operators.concatenate, axes=len(shape) - 2)
        try:
            joined = join([part.structure for part in whole_parts])
        except CannotMergeError as error:
            return None, str(error)
        anchored = any(part.anchored for part in whole_parts)
        return Recipe(joined, partial(_build_joined, join, whole_parts), (fork,), anchored), ""

    # Cuts

    def _cheapest(self, units: Sequence[Unit], shape: Shape) -> Cut:
        """Return the cheapest cut of the units as they stand, and of their commuted order."""
        cut = self._cut(units, shape)
        commuted = self._commuted(units, shape)
        if commuted is not None:
            other = self._cut(commuted, shape)
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
        shapes = _shapes(units, shape)
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
        made = self._price(pieces[start, end].structure, shapes[start]) if (start, end) in pieces else None
        if end - start > 1:
            assert made is not None
            return made
        return units[start].price if made is None else min(units[start].price, made)

    def _made(self, units: Sequence[Unit], recipe: Recipe, shape: Shape) -> Unit:
        price = self._price(recipe.structure, shape)
        before = total(*(unit.before for unit in units))
        return Unit(Made(recipe), price, recipe, recipe.elements, before=before)

    def _possible_pieces(self, units: Sequence[Unit], shapes: Sequence[Shape]) -> dict[tuple[int, int], Recipe]:
        """Return what runs of units could become, by first and behind the last, and see to their prices."""
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
                    if recipe.anchored and not self._is_hopeless(recipe, units[start:end], shapes[start:end]):
                        pieces[start, end] = recipe
        self._time([(recipe, shapes[start]) for (start, _), recipe in pieces.items()])
        return pieces

    def _run(self, runs: dict[tuple[int, int], Recipe], start: int, end: int) -> Recipe | None:
        """Compose a run of units from two shorter ones."""
        for middle in (end - 1, start + 1):
            if (start, middle) in runs and (middle, end) in runs:
                composed = self._compose(runs[start, middle], runs[middle, end])
                if isinstance(composed, Recipe):
                    return composed
        return None

    def _compose(self, first: Recipe, second: Recipe) -> Recipe | str:
        """Return the recipe of two in a row, or the reason why there is none."""
        key = tuple(
            (key_of(each.structure, (), self._device), each.structure.weight.requires_grad) for each in (first, second)
        )
        if key not in self._composed:  # blocks repeat
            try:
                made: Any = operators.compose(first.structure, second.structure)
                if made.weight.numel() > _MOST_WEIGHTS:
                    raise CannotMergeError(f"together they would have {made.weight.numel():,} weights")
                self._composed[key] = made
            except CannotMergeError as error:
                self._composed[key] = str(error)
        composed = self._composed[key]
        if isinstance(composed, str):
            return composed
        elements, anchored = (*first.elements, *second.elements), first.anchored or second.anchored
        return Recipe(composed, partial(_build_composed, first, second), elements, anchored)

    def _is_hopeless(self, recipe: Recipe, units: Sequence[Unit], shapes: Sequence[Shape]) -> bool:
        if self._objective == "depth":
            return False
        macs = sum(
            count_macs(unit.recipe.structure, shape) for unit, shape in zip(units, shapes, strict=False) if unit.recipe
        )
        return count_macs(recipe.structure, shapes[0]) > _HOPELESS * max(macs, prod(shapes[0]))

    # The commuted order

    def _commuted(self, units: Sequence[Unit], shape: Shape) -> list[Unit] | None:
        """Return the units with averages in front of, and layouts behind, what treats every position alone."""
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
        repriced = self._repriced(order, shape)
        last = repriced[-1]
        if isinstance(last.alone, Kept) and _is_layout(last) and last.link is not units[-1].link:
            repriced[-1] = replace(last, alone=replace(last.alone, contiguous=True))
        return repriced

    def _repriced(self, order: Sequence[Unit], shape: Shape) -> list[Unit]:
        """Price units in their new places, and tell layouts how many channels there are."""
        units: list[Unit] = []
        for unit, at in zip(order, _shapes(order, shape), strict=True):
            link = unit.link
            if isinstance(unit.alone, Split) or (link is not None and at == shape_of(link.value)):
                units.append(unit)
            elif link is None or link.carries_weight:
                assert unit.recipe is not None
                units.append(replace(unit, price=self._price(unit.recipe.structure, at)))
            elif _is_layout(unit):
                units.append(replace(unit, alone=Kept(link, _channels_at(link, at))))
            else:  # the same on fewer positions, or an average over more or fewer channels
                share = prod(at) / prod(shape_of(link.value) or ())
                price = unit.price[0] * share, unit.price[1]
                recipe = unit.recipe
                if link.averaging is not None and link.averaging.kernel is not None:
                    recipe = _recipe(link, link.averaging.kernel(at[1]))
                units.append(replace(unit, price=price, recipe=recipe))
        return units

    # Prices

    def _time(self, wanted: Sequence[tuple[Any, Shape | None]]) -> None:
        """Time what is wanted and was not timed yet: recipes at a shape, elements as they stand."""
        if self._objective != "latency":
            return
        calls: dict[Hashable, Callable[[], Callable[[], Any]]] = {}
        for what, shape in wanted:
            if isinstance(what, Recipe):
                assert shape is not None
                calls[key_of(what.structure, shape, self._device)] = partial(
                    call_of, what.structure, shape, self._device
                )
            elif isinstance(what, Link) and what.carries_weight:
                own, at = _structure(what, what.operator), _input_shape((what,))
                calls[key_of(own, at, self._device)] = partial(call_of, own, at, self._device)
            elif what.counts:
                calls[self._key_of_node(what.node)] = partial(self._call_of_node, what.node)
        self._table.measure(calls)

    def _price(self, operator: nn.Module, shape: Shape) -> Price:
        if self._objective == "latency":
            key = key_of(operator, shape, self._device)
            self._table.measure({key: partial(call_of, operator, shape, self._device)})
            return self._table.seconds[key], 1
        if self._objective == "macs":
            return float(count_macs(operator, shape)), 1
        return float(not isinstance(operator, ChannelAffine)), 1

    def _price_of_link(self, link: Link) -> Price:
        if not link.counts:
            return FREE
        if link.carries_weight:
            return self._price(_structure(link, link.operator), _input_shape((link,)))
        return self._price_of_node(link.node)

    def _price_of_join(self, fork: Fork) -> Price:
        self._time([(fork, None)])
        return self._price_of_node(fork.node)

    def _price_of_node(self, node: fx.Node) -> Price:
        if self._objective == "latency":
            self._table.measure({self._key_of_node(node): partial(self._call_of_node, node)})
            return self._table.seconds[self._key_of_node(node)], 1
        return 0.0, 1

    def _key_of_node(self, node: fx.Node) -> Hashable:
        return str(self._alone(node)), tuple(_tensors(node)), str(self._device), torch.get_num_threads()

    def _call_of_node(self, node: fx.Node) -> Callable[[], Any]:
        inputs = [torch.randn(shape, dtype=dtype, device=self._device) for shape, dtype in _tensors(node)]
        return partial(self._alone(node), *inputs)

    # The report

    def _merges(self, cut: Cut) -> Iterator[Merge]:
        for unit in cut.units:
            prices = unit.before[0], unit.price[0]
            if isinstance(unit.alone, Made):
                into = summary(unit.alone.recipe.structure)
                yield Merge(names_of(unit.elements), into, self._objective, *prices)
            elif isinstance(unit.alone, Split):
                for branch in unit.branches:
                    yield from self._merges(branch)
            elif unit.link is not None and unit.link.carries_weight and unit.price[0] != unit.before[0]:
                yield Merge(names_of(unit.elements), "the same, behind the average", self._objective, *prices)

    def _refusals(self, cut: Cut) -> Iterator[Refusal]:
        """Say of each two neighbours that stay apart why."""
        shapes = _shapes(cut.units, cut.shape)
        last: int | None = None
        for place, unit in enumerate(cut.units):
            if isinstance(unit.alone, Split):
                for branch in unit.branches:
                    yield from self._refusals(branch)
                reason = unit.why_not or self._why_it_does_not_pay([unit], unit.recipe, shapes[place:])
                yield Refusal(names_of(unit.elements), reason)
            if unit.recipe is None:
                continue
            if last is not None:
                pair = [cut.units[last], unit]
                between = [f"`{name}`" for each in cut.units[last + 1 : place] for name in names_of(each.elements)]
                assert pair[0].recipe is not None
                if between:
                    reason = f"{' and '.join(between)} between them keeps them apart"
                else:
                    composed = self._compose(pair[0].recipe, unit.recipe)
                    reason = (
                        composed
                        if isinstance(composed, str)
                        else self._why_it_does_not_pay(pair, composed, [shapes[last], shapes[place]])
                    )
                yield Refusal(names_of([*pair[0].elements, *unit.elements]), reason)
            last = place

    def _why_it_does_not_pay(self, units: Sequence[Unit], recipe: Recipe | None, shapes: Sequence[Shape]) -> str:
        assert recipe is not None
        into = summary(recipe.structure)
        if self._is_hopeless(recipe, units, shapes):
            return f"does not pay: as {into} it would take {count_macs(recipe.structure, shapes[0]):,} MACs"
        after, before = self._price(recipe.structure, shapes[0]), total(*(unit.price for unit in units))
        return f"does not pay: as {into} it would cost {self._compared(after, before)}"

    def _compared(self, after: Price, before: Price) -> str:
        unit, scale = {
            "latency": ("{:.1f} µs", 1e6), "macs": ("{:,.0f} MACs", 1), "depth": ("{:.0f} operators", 1),
        }[self._objective]  # fmt: skip
        return f"{unit.format(after[0] * scale)} instead of {unit.format(before[0] * scale)}"


def original_pieces(chain: Chain) -> tuple[Piece, ...]:
    """Return the pieces that a chain is made of as it stands."""
    return tuple(_as_written(element) for element in chain)


def _as_written(element: Element) -> Piece:
    if isinstance(element, Fork):
        return Split(element, tuple(original_pieces(branch) for branch in element.branches))
    return Kept(element)


def _as_given(units: Sequence[Unit], shape: Shape) -> Cut:
    """Return units as they stand in the model."""
    given = tuple(
        replace(unit, alone=_as_written(unit.elements[0]), price=unit.before, branches=unit.given) for unit in units
    )
    return Cut(given, shape, total(*(unit.before for unit in given)))


def _swapped(order: Sequence[Unit], place: int) -> list[Unit] | None:
    """Return two neighbours in the other order, where that brings what belongs together closer; else None."""
    first, second = order[place : place + 2]
    try:
        if _is_average(second):
            return _averaged_first(first, second)
        if _is_layout(second) and place + 2 < len(order):
            return _behind_the_layout(order[:place], first, second, order[place + 2])
        if _is_layout(first) and place > 0:
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


def _behind_the_layout(before: Sequence[Unit], first: Unit, second: Unit, behind: Unit) -> list[Unit] | None:
    """Let an operator on a map of one position work on the vector that a Linear reads."""
    link, operator = second.link, _movable(first)
    if operator is None or link is None or behind.recipe is None or not _is_of_one_position(link):
        return None
    if not behind.recipe.anchored:  # nothing says that it is one position at other sizes, too
        return None
    if channel_axis(operator) != 1 or channel_axis(behind.recipe.structure) != -1 or not _all_pointwise(before):
        return None
    return [second, _moved(first, -1, 1)]


def _before_the_layout(before: Sequence[Unit], first: Unit, second: Unit) -> list[Unit] | None:
    """Put an operator that treats every position alone beside the operator on the other side of a layout."""
    link, operator, neighbour = first.link, _movable(second), before[-1].recipe
    if operator is None or link is None or link.moves is None or neighbour is None:
        return None
    axis = channel_axis(neighbour.structure)
    if link.moves.get(axis) != channel_axis(operator) or (_is_of_one_position(link) and _all_pointwise(before)):
        return None
    return [_moved(second, axis, max(len(shape_of(link.value) or ()) - 2, 1)), first]


def _movable(unit: Unit) -> Any:
    """Return the structure of an operator that treats every position alone; None for anything else."""
    if unit.recipe is None or _is_average(unit) or not is_pointwise(unit.recipe.structure):
        return None
    return unit.recipe.structure


def _is_average(unit: Unit) -> bool:
    return unit.link is not None and unit.link.averaging is not None


def _is_layout(unit: Unit) -> bool:
    return unit.link is not None and not unit.link.counts


def _is_of_one_position(link: Link) -> bool:
    """Tell whether a layout makes a vector of a map of one position."""
    shape = shape_of(link.value) or ()
    return len(shape) > 2 and (link.moves or {}).get(1) == -1 and prod(shape[2:]) == 1


def _all_pointwise(units: Sequence[Unit]) -> bool:
    """Tell whether all operators since the last average treat every position alone."""
    for unit in reversed(units):
        if _is_average(unit):
            return True
        if unit.recipe is None or not is_pointwise(unit.recipe.structure):
            return _is_layout(unit)
    return True


def _moved(unit: Unit, axis: int, axes: int) -> Unit:
    """Write a unit for another place of the channels."""
    recipe = unit.recipe
    assert recipe is not None
    made = on_axis(recipe.structure, axis, axes)
    if made is recipe.structure:
        return unit
    moved = Recipe(made, partial(_build_on_axis, recipe, axis, axes), recipe.elements, recipe.anchored)
    return Unit(Made(moved), unit.price, moved, unit.elements, before=unit.before)


def _shapes(units: Sequence[Unit], shape: Shape) -> list[Shape]:
    """Return the shape of what each unit reads."""
    shapes = []
    for unit in units:
        shapes.append(shape)
        shape = _shape_behind(unit, shape)
    return shapes


def _shape_behind(unit: Unit, shape: Shape) -> Shape:
    if unit.recipe is not None and not _is_average(unit):
        return output_shape(unit.recipe.structure, shape)
    element = unit.elements[-1]
    before, behind = shape_of(element.value), tuple(shape_of(element.node) or ())
    if before is None or tuple(before) == shape:
        return behind
    # The same positions with other channels
    (axis, to) = next((axis, to) for axis, to in (unit.link.moves or {}).items()  # type: ignore[union-attr]
                      if [n for i, n in enumerate(before) if i != axis % len(before)]
                      == [n for i, n in enumerate(shape) if i != axis % len(shape)])  # fmt: skip
    changed = list(behind)
    changed[to] = shape[axis]
    return tuple(changed)


def _channels_at(link: Link, shape: Shape) -> int | None:
    """Return the number of channels that a layout gets where it gets another shape than in the model."""
    then = shape_of(link.value) or ()
    return next((now for now, before in zip(shape, then, strict=True) if now != before), None)


def _axis_at_start(chain: Chain) -> int | None:
    """Return the axis of the channels where a chain begins, as its first operator with an axis has them there."""
    now: dict[int, int | None] = {1: 1, -1: -1}  # axis at the start -> the same axis here
    for element in chain:
        if isinstance(element, Fork):
            axes = [axis for branch in element.branches if (axis := _axis_at_start(branch)) is not None]
        else:
            fixed = element.operator is not None and _recipe(element, element.operator).anchored
            axes = [channel_axis(element.operator)] if fixed else []  # type: ignore[arg-type]
        if axes:
            return next((start for start, here in now.items() if here == axes[0]), None)
        if isinstance(element, Link) and element.moves is not None:
            moves = element.moves
            now = {start: None if here is None else moves.get(here) for start, here in now.items()}
    return None


def _input_shape(chain: Chain) -> Shape:
    return tuple(shape_of(chain[0].value) or ())


def names_of(elements: Sequence[Element]) -> tuple[str, ...]:
    """Return the names of elements, those inside forks included, for a report."""
    names: list[str] = []
    for element in elements:
        if isinstance(element, Fork):
            names += [name for branch in element.branches for name in names_of(branch)]
        names.append(element.name)
    return tuple(names)


def _tensors(node: fx.Node) -> list[tuple[Shape, torch.dtype]]:
    metas = [value.meta["tensor_meta"] for value in node.all_input_nodes if value.op != "get_attr" and shape_of(value)]
    return [(tuple(meta.shape), meta.dtype) for meta in metas]


def _recipe(link: Link, operator: nn.Module) -> Recipe:
    anchored = link.carries_weight or (isinstance(operator, ChannelAffine) and link.operator_on is None)
    return Recipe(_structure(link, operator), partial(operators.in_float64, operator), (link,), anchored)


def _structure(link: Link, operator: Any) -> nn.Module:
    """Return an operator without data, in the dtype that it has in the model."""
    return structure(operator).to(dtype=link.node.meta["tensor_meta"].dtype)


def _identity(count: int, axis: int, dtype: torch.dtype, device: torch.device) -> Recipe:
    def build() -> nn.Module:
        made = ChannelAffine(count, axis, bias=False, dtype=torch.float64, device=device)
        return made.eval().requires_grad_(False)

    made = ChannelAffine(count, axis, bias=False, dtype=dtype, device="meta").eval().requires_grad_(False)
    return Recipe(made, build, (), False)


def _build_composed(first: Recipe, second: Recipe) -> nn.Module:
    return operators.compose(first.build(), second.build())


def _build_joined(join: Callable[[Sequence[nn.Module]], nn.Module], parts: Sequence[Recipe]) -> nn.Module:
    return join([part.build() for part in parts])


def _build_on_axis(recipe: Recipe, axis: int, axes: int) -> nn.Module:
    return on_axis(recipe.build(), axis, axes)
