"""One linear step in the data flow: what a node of a captured graph is read as."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapsing.algebra.operators import structure


@dataclass(frozen=True, eq=False)
class Averaging:
    """An average over positions, each channel alone.

    Attributes:
        weighs_evenly: Whether the weights of each average add up to one, so that an offset passes unchanged.
        kernel: Channels -> the convolution that it equals; None where there is none for every input size.
    """

    weighs_evenly: bool
    kernel: Callable[[int], nn.Module] | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """One linear step in the data flow.

    Attributes:
        node: The node that computes it.
        value: The node that it reads.
        name: For a report.
        operator: The operator that it equals, if it is one.
        averaging: Said of an average over positions.
        moves: Where it puts the channels: axis before -> axis after (1 or -1).
        counts: Whether it is an operation of its own, and not only another view of a value.
        unchanged: Whether it leaves every number in its place: a copy, a conversion.
        selects: Whether it copies channels and positions, between zeros perhaps: a slice, a padding.
        keeps_samples: Whether the first axis holds the samples after it at every size.
        operator_on: Axis of the channels -> the operator, where it fits both: a number, or one for each element.
    """

    node: fx.Node
    value: fx.Node
    name: str
    operator: nn.Module | None = None
    averaging: Averaging | None = None
    moves: dict[int, int] | None = None
    counts: bool = True
    unchanged: bool = False
    selects: bool = False
    keeps_samples: bool = True
    operator_on: Callable[[int], nn.Module] | None = None

    @property
    def carries_weight(self) -> bool:
        """Whether it is a convolution or a product with a matrix as it stands."""
        linear = isinstance(self.operator, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
        return linear and self.averaging is None and not self.selects


def structure_of(link: Link, operator: Any) -> nn.Module:
    """Return an operator without data, in the dtype that it has in the model."""
    return structure(operator).to(dtype=link.node.meta["tensor_meta"].dtype)
