"""Compare a collapsed model with its source in float64, and find where they part."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapse.chains import describe_node
from lightning_easier.collapse.writing import EQUALS
from lightning_easier.inference import relative_difference

_TOLERANCE = 1e-9


def in_double(
    models: Sequence[nn.Module], arguments: Sequence[Tensor]
) -> tuple[list[nn.Module], tuple[Tensor, ...]] | None:
    """Copy models that share layers, and their arguments, to float64; None on a device that has none.

    Args:
        models: The models; they are not changed.
        arguments: Tensors; those of integers stay.
    """
    try:
        twins = [model.double() for model in deepcopy(list(models))]
        return twins, tuple(x.double() if x.is_floating_point() else x for x in arguments)
    except Exception:  # a device without float64, or a module that refuses the cast
        return None


def why_different(source: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor]) -> str | None:
    """Name the first operator of a collapsed graph whose value differs from that in its source.

    Args:
        source: The graph as it was captured.
        collapsed: The graph as it is now.
        arguments: The inputs.
    """
    reference = _Values(source)
    comparison = _Comparison(collapsed, reference.values)
    with torch.no_grad():
        reference.run(*(argument.clone() for argument in arguments))
        comparison.run(*(argument.clone() for argument in arguments))
    return comparison.first


class _Values(fx.Interpreter):
    """Keeps the value of every node, as it was when it was computed."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.clone()
        return result


class _Comparison(fx.Interpreter):
    """Compares the value of every node with that of the node that it stands for."""

    def __init__(self, module: fx.GraphModule, reference: dict[str, Tensor]) -> None:
        super().__init__(module)
        self._reference = reference
        self.first: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = n.meta.get(EQUALS, n.name)
        expected = self._reference.get(name) if name is not None else None
        if self.first is None and isinstance(result, Tensor) and expected is not None:
            with torch.no_grad():
                if not relative_difference(result, expected) <= _TOLERANCE:
                    self.first = describe_node(self.module, n)  # type: ignore[arg-type]
        return result
