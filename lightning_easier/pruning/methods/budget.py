r"""How many weights of each layer go in a round of unstructured pruning; pure functions of plain numbers.

A layer is what feeds one activation. With :math:`H_l` its entropy, :math:`\theta_l` its weights that are not zero, and
:math:`\zeta` the share that a round prunes,

.. math::
    I_l = H_l \cdot \operatorname{mean} |\theta_l|, \qquad
    R_l = \frac{\sum_j I_j}{I_l}, \qquad
    B_l = \Bigl\lfloor B \, \frac{e^{R_l}}{\sum_j e^{R_j}} \Bigr\rfloor, \qquad
    B = \Bigl\lfloor \zeta \sum_j |\theta_j|_0 \Bigr\rfloor.

A layer that has strictly fewer weights left than its part :math:`B_l` is emptied; it leaves the budget and the sums,
and the rest is shared again. Since :math:`e^{R_l}` is steep, that is the usual case.

Source: NEPENTHE, arXiv 2404.16890, equations 5 to 8; EGP, arXiv 2308.06619, which leaves out layers of zero entropy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Variant = Literal["nepenthe", "egp", "magnitude", "uniform"]
VARIANTS: tuple[Variant, ...] = ("nepenthe", "egp", "magnitude", "uniform")


@dataclass(frozen=True)
class LayerState:
    """What the budget depends on, of one layer.

    Attributes:
        importance: The importance :math:`I_l`, not negative.
        left: How many of its weights are not zero.

    Raises:
        ValueError: If the importance is negative or not finite, or fewer than no weights are left.
    """

    importance: float
    left: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.importance < math.inf:
            raise ValueError(f"Expected argument `importance` to be finite and not negative, but got {self.importance}")
        if self.left < 0:
            raise ValueError(f"Expected argument `left` to be 0 or more, but got {self.left}")


def total_budget(layers: Sequence[LayerState], amount: float) -> int:
    """Return how many weights a round prunes at most: a share of those that are left, rounded down.

    Args:
        layers: The layers that take part.
        amount: The share zeta, in [0, 1].

    Raises:
        ValueError: If the share is out of range.
    """
    if not 0.0 <= amount <= 1.0:
        raise ValueError(f"Expected argument `amount` to be a share in [0, 1], but got {amount}")
    return math.floor(amount * sum(layer.left for layer in layers))


def shares(importances: Sequence[float]) -> list[float]:
    """Return the part of the budget that falls to each layer; they sum up to 1, where there is a layer.

    Args:
        importances: The importance of each; one of zero has a relevance of zero.

    Example:
        >>> shares([0.5, 0.5]), [round(share, 3) for share in shares([1.0, 0.5, 0.0])]
        ([0.5, 0.5], [0.175, 0.786, 0.039])
    """
    whole = sum(importances)
    relevances = [whole / each if each > 0 else 0.0 for each in importances]
    most = max(relevances, default=0.0)
    # The most relevant first: where its relevance is beyond what a float holds, it is inf, and inf - inf no number
    weights = [1.0 if each == most else math.exp(each - most) for each in relevances]
    return [weight / sum(weights) for weight in weights]


def budgets(layers: Sequence[LayerState], amount: float, *, leaves_out_zero: bool = False) -> list[int]:
    """Return how many weights to prune of each layer: never more than are left, in all never more than the budget.

    Args:
        layers: The layers that take part.
        amount: The share zeta of their weights, in [0, 1].
        leaves_out_zero: Whether layers of zero importance are left out (EGP); else they have a relevance of zero, and
            so the least share (NEPENTHE).

    Returns:
        A number for each layer.

    Raises:
        ValueError: If the share is out of range.

    Example:
        >>> budgets([LayerState(1.0, 100), LayerState(0.5, 100)], 0.25)
        [9, 40]
        >>> budgets([LayerState(1.0, 100), LayerState(0.1, 20)], 0.5)
        [40, 20]
    """
    active = [place for place, layer in enumerate(layers) if layer.importance > 0 or not leaves_out_zero]
    budget = total_budget([layers[place] for place in active], amount)
    found = [0] * len(layers)
    while active:
        parts = [math.floor(budget * share) for share in shares([layers[place].importance for place in active])]
        emptied = [place for place, part in zip(active, parts, strict=True) if layers[place].left < part]
        if not emptied:
            for place, part in zip(active, parts, strict=True):
                found[place] = min(part, budget)  # the shares may sum up to a little more than 1
                budget -= found[place]
            break
        for place in emptied:
            found[place] = layers[place].left
            budget -= layers[place].left
        active = [place for place in active if place not in emptied]
    return found


def uniform_budgets(layers: Sequence[LayerState], amount: float) -> list[int]:
    """Return how many weights to prune of each layer: the same share of each, rounded down.

    Args:
        layers: The layers that take part.
        amount: The share, in [0, 1].

    Raises:
        ValueError: If the share is out of range.
    """
    return [total_budget([layer], amount) for layer in layers]
