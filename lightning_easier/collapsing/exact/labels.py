"""Which channels leave together: each has a label, and what leaves together has one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_easier.collapsing.algebra.slices import Connections


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        axis: Where they are.
        labels: ``(channels,)``: the number of each. Those of one number leave together.
        constants: ``(channels,)``, in float64: what each is whatever the input, NaN where that depends.
    """

    axis: int
    labels: Tensor
    constants: Tensor


@dataclass(frozen=True, eq=False)
class Operated:
    """A call of an operator that reads channels and writes others.

    Attributes:
        node: The call.
        name: For a report.
        value: What it reads.
        operator: The operator.
        connections: Which of its outputs read which of its inputs.
        reads: The channels of that; None where they are not known, and have to stay.
    """

    node: fx.Node
    name: str
    value: fx.Node
    operator: Any
    connections: Connections
    reads: Channels | None


class Labels:
    """Gives out labels, joins those that leave together, and knows why some have to stay."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._kept: list[tuple[Tensor, str]] = []

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int) -> Tensor:
        """Return so many labels that nothing has yet."""
        first = len(self)
        self._parents += range(first, first + count)
        return torch.arange(first, first + count)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Let channels leave together, one by one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self._root(a), self._root(b)
            self._parents[max(a, b)] = min(a, b)

    def keep(self, labels: Tensor, reason: str) -> None:
        """Note why channels have to stay; of several reasons the first is told."""
        self._kept.append((labels, reason))

    def roots(self) -> Tensor:
        """Return for each label the one of all that leave with it."""
        return torch.tensor([self._root(label) for label in range(len(self))], dtype=torch.long)

    def kept(self) -> dict[int, str]:
        """Return which of these have to stay, and why."""
        roots, kept = self.roots(), dict[int, str]()
        for labels, reason in self._kept:
            for label in roots[labels].unique().tolist():
                kept.setdefault(label, reason)
        return kept

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label
