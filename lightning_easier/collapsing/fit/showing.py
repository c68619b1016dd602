"""Where it shows what an operator computes: in the batch norm after it, and in the sum that it is added to."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_easier.sites.dataflow import Flow, Kind
from lightning_easier.sites.sums import Sums


class Shown(NamedTuple):
    """Where it shows what a place computes, together with all that it is added to.

    Attributes:
        module: Name of a module that is called once in a forward.
        side: Whether that is what the module is called with first, or what it returns.
        norm: Name of the batch norm that lies between the place and there; None if there is none.
    """

    module: str
    side: Literal["input", "output"]
    norm: str | None = None


def has_statistics(norm: Any) -> bool:
    """Tell whether a batch norm computes the same of each sample whatever the others are, in eval mode."""
    return norm.running_mean is not None


class AfterOperators:
    """What comes after the operators of a model.

    Args:
        flow: The flow of values through the model.
        names: The names of its modules.

    Attributes:
        norms: Name of an operator -> that of the batch norm that is all that reads it.
        totals: Name of an operator -> where the sum is seen that it, or that batch norm, is added to. What a batch norm
            without statistics multiplies with is another thing for each batch: of it there is none.
    """

    def __init__(self, flow: Flow, names: Mapping[nn.Module, str]) -> None:
        self._flow = flow
        self._names = names
        self.norms = dict(self._norms())
        self.totals = dict(self._totals())

    def _norms(self) -> Iterator[tuple[str, str]]:
        nodes = self._flow.nodes
        for node in nodes:
            if node.kind == Kind.OPERATOR and len(node.readers) == 1:
                (reader,) = node.readers
                norm = reader.module
                if reader.kind == Kind.BATCH_NORM and norm is not None and sum(n.module is norm for n in nodes) == 1:
                    yield node.name, self._names[norm]

    def _totals(self) -> Iterator[tuple[str, Shown]]:
        sums = Sums(self._flow)
        for node in self._flow.nodes:
            if node.kind == Kind.OPERATOR:
                norm = self.norms.get(node.name)
                if norm is not None and not has_statistics(node.readers[0].module):
                    continue
                seen = sums.after(node if norm is None else node.readers[0])
                if seen is not None and seen.module in self._names:
                    yield node.name, Shown(self._names[seen.module], seen.side, norm)
