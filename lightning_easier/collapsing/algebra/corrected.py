r"""Least squares whose targets correct the errors of what was fitted before.

With :math:`T` what a place computes on the inputs that it gets by now, and :math:`T + E` what it would have to compute
for the error to be gone, the targets are :math:`T + \alpha E`. The sums for any :math:`\alpha` follow from those for 0
and 1, and so does the best: solutions are linear in the targets, and what a solution leaves of :math:`T + E` on the
positions held out is a parabola in :math:`\alpha`. A correction that does not generalize gets a small one.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_easier.collapsing.algebra.least_squares import (
    AS_GOOD,
    CALM,
    Geometry,
    Moments,
    Sums,
    regular_solution,
    solutions,
)

RIDGES_OF_STEPS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges that are tried for what is added to an operator, as a share of the mean square of each column."""


class Step(NamedTuple):
    """What is added to an operator.

    Attributes:
        weight: The columns, shape ``(K, O)``, float64; the last row is the offset.
        left: Share of the squared error that it leaves on the positions held out.
    """

    weight: Tensor
    left: float


def step_against(errors: Moments) -> Step:
    r"""Return what has to be added to an operator, for the error to be gone that shows after it.

    .. math:: \min_D \|U D - E\|^2 + \|\Lambda^{1/2} D\|^2

    The ridge draws towards the operator as it is, and what is found is shortened to what takes most of the error on the
    positions held out: to nothing where it takes none. A channel that is zero but for a few positions tells nothing,
    and may get a weight of thousands, with which training that brings it to life is lost: the weights of what hardly
    varies stay as they are where that halves the largest step and leaves hardly more of the error.

    Args:
        errors: The sums over what goes into the operator, and over what is missing to what should come out.
    """
    fitted, held_out = errors.fitted, errors.held_out
    best, ridge_of_best = Step(torch.zeros_like(fitted.cross), 1.0), 0.0
    for ridge, weight in solutions(fitted, RIDGES_OF_STEPS):
        step = _shortened(weight, held_out)
        if step.left < best.left:
            best, ridge_of_best = step, ridge
    for _, weight in solutions(fitted, (ridge_of_best,), CALM):
        calm = _shortened(weight, held_out)
        halves = 2 * calm.weight[:-1].abs().max() <= best.weight[:-1].abs().max()
        return calm if halves and calm.left <= (1 + AS_GOOD) * best.left else best
    return best


def _shortened(step: Tensor, held_out: Sums) -> Step:
    """Return as much of a step as takes most of the error on the positions held out."""
    before = float(held_out.squares.sum())
    size = float((step * (held_out.gram @ step)).sum())
    gain = float((step * held_out.cross).sum())
    share = min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0
    left = (before - 2 * share * gain + share**2 * size) / before if before > 0 else 1.0
    return Step(share * step, max(left, 0.0))


class CorrectedMoments:
    """The sums of one place, for targets with and without a correction.

    Args:
        geometry: What an output position reads.
        outputs: Channels of the output.
        device: Where the sums are.

    Attributes:
        moments: Those for the targets as they are, with all of the correction, and for that alone, beside each other.
    """

    def __init__(self, geometry: Geometry, outputs: int, device: torch.device) -> None:
        self._outputs = outputs
        self._axis = 1 if geometry.kernel else -1
        self.moments = Moments.of(geometry, 3 * outputs, device)

    def add(self, value: Tensor, target: Tensor, error: Tensor, positions: int) -> None:
        """Add one batch.

        Args:
            value: What goes into the place, as for :meth:`Moments.add`.
            target: What comes out of it.
            error: What is missing to what should, of its shape.
            positions: How many positions are used at most.
        """
        self.moments.add(value, torch.cat([target, target + error, error], self._axis), positions)

    def mixed(self) -> tuple[Moments, float]:
        """Return the sums for the targets that are corrected as far as that generalizes, and how far that is."""
        fitted, held_out = self.moments.fitted, self.moments.held_out
        share = self._share(fitted, held_out) if self.moments.why_no_fit() is None else 0.0
        mixed = replace(self.moments, fitted=self._mix(fitted, share), held_out=self._mix(held_out, share))
        return mixed, share

    def _share(self, fitted: Sums, held_out: Sums) -> float:
        plain, whole, _ = self._parts(regular_solution(fitted))
        _, cross, _ = self._parts(held_out.cross)
        step = whole - plain
        size = float((step * (held_out.gram @ step)).sum())
        gain = float((step * (cross - held_out.gram @ plain)).sum())
        return min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0

    def _mix(self, sums: Sums, share: float) -> Sums:
        plain, whole, _ = self._parts(sums.cross)
        squares, of_whole, of_error = self._parts(sums.squares)
        between = (squares + of_whole - of_error) / 2
        mixed = (1 - share) ** 2 * squares + share**2 * of_whole + 2 * share * (1 - share) * between
        return Sums(sums.gram, torch.lerp(plain, whole, share), mixed)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what belongs to the targets without correction, to those with all of it, and to the error."""
        plain, whole, error = values.split(self._outputs, -1)
        return plain, whole, error
