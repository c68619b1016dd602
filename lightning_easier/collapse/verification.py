"""Compare a collapsed model with its source in float64, and find where they part."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_easier.collapse.chains import describe_node
from lightning_easier.collapse.writing import EQUALS
from lightning_easier.inference import TOLERANCES, relative_difference, tolerance_for


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


class CoarsestDtype(TorchDispatchMode):
    """Follows the dtypes that a forward computes in.

    Attributes:
        tolerance: The relative difference that rounding explains at the coarsest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tolerance = TOLERANCES[torch.float64]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tolerance = max(self.tolerance, tolerance_for(result))
        return result


def why_different(source: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor]) -> str | None:
    """Name the first operator of a collapsed graph whose value differs from that in its source; None if none is found.

    Args:
        source: The graph as it was captured.
        collapsed: The graph as it is now.
        arguments: The inputs.
    """
    reference = _Values(source)
    comparison = _Comparison(collapsed, reference.values)
    try:
        with torch.no_grad():
            reference.run(*(argument.clone() for argument in arguments))
            comparison.run(*(argument.clone() for argument in arguments))
    except Exception:  # the source asserts its own dtype, say
        return None
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
                if not relative_difference(result, expected) <= TOLERANCES[torch.float64]:
                    self.first = describe_node(self.module, n)  # type: ignore[arg-type]
        return result
