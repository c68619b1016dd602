r"""Choose the channels that an operator can do without, and refit it on those that stay.

With :math:`H = U^\top U + \Lambda` of the patches of what the operator reads and :math:`W` its least-squares solution,
leaving out the taps :math:`c` of a channel, with all others fitted again, adds

.. math:: \mathrm{Tr}\left(W_c^\top \left[(H^{-1})_{cc}\right]^{-1} W_c\right)

to the residual. The channel that adds least goes, then the next: after each, the inverse and the solution without it
follow from a Schur complement. Source: Hassibi and Stork, Optimal Brain Surgeon (1993), there for single weights; for
groups of columns as in Kurtic et al. (arXiv 2302.04089).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_easier.collapsing.algebra.least_squares import Moments, Sums, best_solution

# As a share of the variance of each column.
_RIDGE = 1e-4
# Columns that vary less than this share of their mean square are constant.
_CONSTANT = 1e-10
# Of the channels that are left, so many go before what the others would add is computed again. Which of the cheapest
# these are is found one by one: of two alike, either may go, not both.
_PART, _NEAR = 1 / 32, 2


class Narrowed(NamedTuple):
    """An operator that reads fewer channels.

    Attributes:
        channels: Which it reads still, ascending, shape ``(C',)``.
        weight: Of the operator, shape ``(O, C', *kernel)``; ``(O, C')`` for vectors and tokens.
        bias: Of the operator, shape ``(O,)``.
        explained: Share of the variance of the targets that it explains on positions held out.
        mean: Of each channel of its output, shape ``(O,)``.
        variance: Of each channel of its output, shape ``(O,)``.
    """

    channels: Tensor
    weight: Tensor
    bias: Tensor
    explained: float
    mean: Tensor
    variance: Tensor


def narrowed(moments: Moments, counts: Sequence[int], importance: Tensor) -> Iterator[Narrowed]:
    """Yield operators that read fewer and fewer channels, each in closed form.

    Args:
        moments: The sums over what the operator reads, and what it is to compute.
        counts: How many channels are left, in descending order.
        importance: What an error of each output channel is multiplied with where channels are chosen, shape ``(O,)``.
    """
    geometry = moments.geometry
    elimination = _Elimination.of(moments.fitted, geometry.taps, importance)
    for count in counts:
        elimination = elimination.down_to(count)
        channels = elimination.left
        columns = _columns(channels, geometry.taps)
        columns = torch.cat([columns, columns.new_tensor([geometry.unknowns - 1])])
        part = Moments(geometry, moments.fitted.part(columns), moments.held_out.part(columns))
        whole = best_solution(part)
        weight = whole[:-1].T.reshape(-1, count, *geometry.kernel)
        explained = part.held_out.explained(whole)
        yield Narrowed(channels, weight, whole[-1], explained, *part.fitted.statistics(whole))


def _columns(channels: Tensor, taps: int) -> Tensor:
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


@dataclass(frozen=True)
class _Elimination:
    """What is left of the channels.

    Attributes:
        left: Their numbers, ascending, shape ``(C,)``.
        taps: Of each.
        inverse: Of the matrix of their sums, shape ``(C * taps, C * taps)``.
        solution: Their weights, shape ``(C * taps, O)``.
    """

    left: Tensor
    taps: int
    inverse: Tensor
    solution: Tensor

    @classmethod
    def of(cls, sums: Sums, taps: int, importance: Tensor) -> "_Elimination":
        """Begin with all channels; a mean is left to the bias."""
        mean = sums.gram[-1, :-1] / sums.gram[-1, -1]
        squares = sums.gram.diagonal()[:-1]
        matrix = sums.gram[:-1, :-1] - sums.gram[-1, :-1, None] * mean
        variance = matrix.diagonal().clone()
        varies = variance > _CONSTANT * squares
        scale = torch.where(varies, variance.clamp(min=0).rsqrt(), 0.0)
        matrix *= scale
        matrix *= scale[:, None]
        right = (sums.cross[:-1] - mean[:, None] * sums.cross[-1]) * importance * scale[:, None]
        matrix.diagonal().add_(torch.where(varies, _RIDGE, 1.0))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:  # sums in half the digits
            matrix.diagonal().mul_(1 + _RIDGE**0.5)
            factor = torch.linalg.cholesky(matrix)
        left = torch.arange(len(mean) // taps, device=mean.device)
        return cls(left, taps, torch.cholesky_inverse(factor), torch.cholesky_solve(right, factor))

    def down_to(self, count: int) -> "_Elimination":
        """Leave out channels until so many are left."""
        found = self
        while (left := len(found.left)) > count:
            found = found._without(found._cheapest(min(left - count, max(1, int(left * _PART)))))
        return found

    def _cheapest(self, count: int) -> Tensor:
        """Return the places of those that add least, each found beside those before it, as a mask."""
        costs = self._costs()
        mask = torch.zeros_like(costs, dtype=torch.bool)
        near = costs.topk(min(_NEAR * count, len(costs)), largest=False).indices
        if count == 1:
            near = near[:1]
        else:
            columns = _columns(near, self.taps)
            # what is outside of them changes nothing among them
            part = _Elimination(near, self.taps, self.inverse[columns][:, columns], self.solution[columns])
            for _ in range(count):
                one = torch.zeros(len(part.left), dtype=torch.bool, device=mask.device)
                one[part._costs().argmin()] = True
                part = part._without(one)
            near = near[~torch.isin(near, part.left)]
        mask[near] = True
        return mask

    def _costs(self) -> Tensor:
        """Return what leaving each out adds to the residual, shape ``(C,)``."""
        split = (len(self.left), self.taps)
        blocks = self.inverse.unflatten(1, split).unflatten(0, split).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        own = self.solution.unflatten(0, split)
        return (own * torch.linalg.solve(blocks, own)).sum((1, 2))

    def _without(self, gone: Tensor) -> "_Elimination":
        """Leave out channels at some places, a mask ``(C,)``."""
        places = torch.arange(len(gone), device=gone.device)
        rest, out = (_columns(places[mask], self.taps) for mask in (~gone, gone))
        beside = self.inverse[out]
        across = beside[:, rest]
        solved = torch.linalg.solve(beside[:, out], across)
        inverse = self.inverse[rest][:, rest].addmm_(across.T, solved, alpha=-1)
        solution = self.solution[rest] - solved.T @ self.solution[out]
        return _Elimination(self.left[~gone], self.taps, inverse, solution)
