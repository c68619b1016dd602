"""How operators are made: one of a step, of several in a row or in parallel, or of one whose channels move.

Making a recipe multiplies no weights: it composes the operators' structures, and keeps what builds the operator itself.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_easier.collapsing.algebra import operators
from lightning_easier.collapsing.algebra.affine import ChannelAffine, ElementAffine
from lightning_easier.collapsing.algebra.operators import channel_axis, channels, flattened, on_axis
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.chains import Chain, Fork
from lightning_easier.collapsing.exact.links import Link, structure_of
from lightning_easier.collapsing.exact.prices import Shape, key_of

# More weights than this (half a GiB in float64) and than before are not multiplied out whatever the objective.
_MOST_WEIGHTS = 2**26


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


class Composer:
    """Makes one recipe of several; what was composed once is not composed again.

    Args:
        device: The device of the operators.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._composed: dict[Hashable, nn.Module | str] = {}

    def compose(self, first: Recipe, second: Recipe) -> Recipe | str:
        """Return the recipe of two in a row, or the reason why there is none."""
        key = tuple(
            (key_of(each.structure, (), self._device), each.structure.weight.requires_grad) for each in (first, second)
        )
        if key not in self._composed:  # blocks repeat
            try:
                made: Any = operators.compose(first.structure, second.structure)
                if made.weight.numel() > max(
                    _MOST_WEIGHTS, *(each.structure.weight.numel() for each in (first, second))
                ):
                    raise CannotMergeError(f"together they would have {made.weight.numel():,} weights")
                self._composed[key] = made
            except CannotMergeError as error:
                self._composed[key] = str(error)
        composed = self._composed[key]
        if isinstance(composed, str):
            return composed
        elements, anchored = (*first.elements, *second.elements), first.anchored or second.anchored
        return Recipe(composed, partial(_build_composed, first, second), elements, anchored)

    def join(self, fork: Fork, branches: Sequence[Recipe | None], shape: Shape) -> Recipe | str:
        """Return the recipe of branches in parallel, or the reason why there is none.

        Args:
            fork: The fork.
            branches: The recipe of each branch; None for the value itself.
            shape: Of what they read.
        """
        known = next((branch for branch in branches if branch is not None), None)
        axis = channel_axis(known.structure) if known is not None else (1 if len(shape) > 2 else -1)
        if fork.how == "concatenate" and len(shape) > 2 and fork.axis != axis:
            return f"`{fork.name}` does not put channels side by side"
        dtype = fork.node.meta["tensor_meta"].dtype
        parts: list[Recipe] = []
        for branch, factor in zip(branches, fork.factors, strict=True):
            count = shape[axis] if branch is None else channels(branch.structure)[1]
            scale = _scale(factor, count, axis, dtype, self._device)
            part: Recipe | str = scale
            if branch is not None:
                part = branch if factor == 1 else self.compose(branch, scale)
            if isinstance(part, str):
                return part
            parts.append(part)
        join: Callable[[Sequence[nn.Module]], nn.Module] = operators.add
        if fork.how == "concatenate":
            join = partial(operators.concatenate, axes=len(shape) - 2)
        try:
            joined = join([part.structure for part in parts])
        except CannotMergeError as error:
            return str(error)
        anchored = any(part.anchored for part in parts)
        return Recipe(joined, partial(_build_joined, join, parts), (fork,), anchored)


def recipe_of(link: Link, operator: nn.Module) -> Recipe:
    """Return the recipe of a step.

    Args:
        link: The step.
        operator: The operator that it equals.
    """
    told = isinstance(operator, ChannelAffine) and link.operator_on is None
    anchored = link.carries_weight or told or isinstance(operator, ElementAffine)
    return Recipe(structure_of(link, operator), partial(operators.in_float64, operator), (link,), anchored)


def moved(recipe: Recipe, axis: int, axes: int) -> Recipe:
    """Return the recipe of an operator for another place of the channels; the same where they are there already.

    Args:
        recipe: Of an operator that treats every position alone.
        axis: Of the channels (1 or -1).
        axes: The number of axes of positions.
    """
    made = on_axis(recipe.structure, axis, axes)
    if made is recipe.structure:
        return recipe
    if isinstance(recipe.build, partial) and recipe.build.func is _build_on_axis:  # one that was moved before
        recipe = recipe.build.args[0]
    return Recipe(made, partial(_build_on_axis, recipe, axis, axes), recipe.elements, recipe.anchored)


def after_flatten(recipe: Recipe, shape: Shape) -> Recipe:
    """Return the recipe of an affine for flattened samples.

    Args:
        recipe: Of a channel affine or an element affine.
        shape: Of one sample.
    """
    made = flattened(recipe.structure, shape)
    return Recipe(made, partial(_build_flattened, recipe, shape), recipe.elements, recipe.anchored)


def _scale(factor: float, count: int, axis: int, dtype: torch.dtype, device: torch.device) -> Recipe:
    """Return the recipe of a product of all channels and a number."""

    def build() -> nn.Module:
        made = ChannelAffine(count, axis, bias=False, dtype=torch.float64, device=device).requires_grad_(False)
        made.weight.fill_(factor)
        return made.eval()

    made = ChannelAffine(count, axis, bias=False, dtype=dtype, device="meta").eval().requires_grad_(False)
    return Recipe(made, build, (), False)


def _build_composed(first: Recipe, second: Recipe) -> nn.Module:
    return operators.compose(first.build(), second.build())


def _build_joined(join: Callable[[Sequence[nn.Module]], nn.Module], parts: Sequence[Recipe]) -> nn.Module:
    return join([part.build() for part in parts])


def _build_on_axis(recipe: Recipe, axis: int, axes: int) -> nn.Module:
    return on_axis(recipe.build(), axis, axes)


def _build_flattened(recipe: Recipe, shape: Shape) -> nn.Module:
    return flattened(recipe.build(), shape)
