"""What a plan consists of: the units that a chain is read as, the cuts of them, and the pieces that are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from lightning_easier.collapsing.exact.chains import Chain, Element, Fork
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import shape_of
from lightning_easier.collapsing.exact.prices import FREE, Price, Shape, output_shape, total
from lightning_easier.collapsing.exact.recipes import Recipe
from lightning_easier.report import Merge, Refusal


@dataclass(frozen=True, eq=False)
class Kept:
    """A step that stays what it is, in this or another place.

    Attributes:
        link: The step.
        channels: The number of channels of a layout that names it, where that is another now.
    """

    link: Link
    channels: int | None = None


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

    @property
    def is_average(self) -> bool:
        """Whether it is an average over positions."""
        return self.link is not None and self.link.averaging is not None

    @property
    def is_layout(self) -> bool:
        """Whether it is only another view of a value."""
        return self.link is not None and not self.link.counts


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


def original_pieces(chain: Chain) -> tuple[Piece, ...]:
    """Return the pieces that a chain is made of as it stands."""
    return tuple(_as_written(element) for element in chain)


def _as_written(element: Element) -> Piece:
    if isinstance(element, Fork):
        return Split(element, tuple(original_pieces(branch) for branch in element.branches))
    return Kept(element)


def as_given(units: Sequence[Unit], shape: Shape) -> Cut:
    """Return units as they stand in the model."""
    given = tuple(
        replace(unit, alone=_as_written(unit.elements[0]), price=unit.before, branches=unit.given) for unit in units
    )
    return Cut(given, shape, total(*(unit.before for unit in given)))


def shapes_of(units: Sequence[Unit], shape: Shape) -> list[Shape]:
    """Return the shape of what each unit reads."""
    shapes = []
    for unit in units:
        shapes.append(shape)
        shape = _shape_after(unit, shape)
    return shapes


def _shape_after(unit: Unit, shape: Shape) -> Shape:
    if unit.recipe is not None and not unit.is_average:
        return output_shape(unit.recipe.structure, shape)
    if unit.link is not None and unit.link.unchanged:
        return shape
    element = unit.elements[-1]
    before, after = shape_of(element.value), tuple(shape_of(element.node) or ())
    if before is None or tuple(before) == shape:
        return after
    # The same positions with other channels
    (axis, to) = next((axis, to) for axis, to in (unit.link.moves or {}).items()  # type: ignore[union-attr]
                      if [n for i, n in enumerate(before) if i != axis % len(before)]
                      == [n for i, n in enumerate(shape) if i != axis % len(shape)])  # fmt: skip
    changed = list(after)
    changed[to] = shape[axis]
    return tuple(changed)


def operators_of(units: Sequence[Unit], shapes: Sequence[Shape]) -> Iterator[tuple[nn.Module, Shape]]:
    """Yield the operators that units equal, without data, each with the shape of what it reads."""
    for unit, shape in zip(units, shapes, strict=False):
        if unit.recipe is not None:
            yield unit.recipe.structure, shape
