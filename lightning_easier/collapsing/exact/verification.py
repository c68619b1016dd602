"""Can a model be compared with what it becomes; is what it became equal, and if not, where do they part?"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_easier.collapsing.algebra.operators import uses_batch_statistics
from lightning_easier.collapsing.errors import CollapseError, DifferenceError
from lightning_easier.collapsing.exact.chains import describe_node
from lightning_easier.collapsing.exact.writing import equal_in_source
from lightning_easier.support.calls import call, copies, mapped
from lightning_easier.support.inference import (
    TOLERANCES,
    describe,
    full_float32,
    relative_difference,
    tensors_in,
    tolerance_for,
)

# How many times the error of the source's own rounding a result may differ from it
_ROUNDING_MARGIN = 10


def check_comparable(output: Any, model: nn.Module) -> None:
    """Refuse outputs that a collapse could not be verified on."""
    leaves = pytree.tree_leaves(output)
    strange = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | bool | str | None)]
    if strange or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"Expected argument `model` to return tensors, or tuples, lists or dicts of them, but "
            f"{type(model).__name__} returns {describe(strange[0] if strange else output)}, which can't be compared. "
            f"{_remedy(strange)}"
        )
    if not any(bool(leaf.isfinite().any()) for leaf in leaves if isinstance(leaf, Tensor)):
        raise ValueError(
            f"Expected argument `example_inputs` to give finite outputs, but {type(model).__name__} returns none, so "
            f"that the collapsed model can't be compared with it"
        )


def _remedy(strange: Sequence[Any]) -> str:
    if strange and type(strange[0]).__name__.endswith("Cache"):  # of transformers, which generate with it
        return "Have it return none: `model.config.use_cache = False`."
    return "Wrap it in a module that returns its tensors."


def check_repeatable(model: nn.Module, source: nn.Module, expected: Any, arguments: Sequence[Tensor]) -> None:
    """Refuse a forward that leaves something behind or draws random numbers.

    Args:
        model: The model, which was not run.
        source: Its copy, which was run once.
        expected: What that returned.
        arguments: Its arguments.

    Raises:
        CollapseError: With the reason.
    """
    name = type(model).__name__
    before, after = dict(model.named_buffers()), dict(source.named_buffers())
    counted = {
        id(buffer) for module in source.modules() if uses_batch_statistics(module) for buffer in module.buffers()
    }
    changed = [
        key
        for key, buffer in after.items()
        if id(buffer) not in counted and (key not in before or not _are_equal(before[key], buffer))
    ]
    if changed:
        raise CollapseError(f"The forward of {name} writes to the buffer {changed[0]!r}, which a collapse would lose")
    again = call(source, copies(arguments))
    if relative_difference(again, expected) > 0:
        raise CollapseError(f"The output of {name} differs from call to call on the same inputs, so that a collapsed "
                            f"model can't be compared with it")  # fmt: skip


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Tell whether two buffers hold the same values, NaN in the same places."""
    if torch.equal(first, second):
        return True
    is_alike = first.shape == second.shape and first.is_floating_point() and second.is_floating_point()
    return is_alike and bool(((first == second) | (first.isnan() & second.isnan())).all())


@full_float32()
def verify_in_float64(
    source: nn.Module, before: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor], expected: Any
) -> tuple[float | None, float]:
    """Compare a collapsed model with its source in float64; None for a model that does not run in float64.

    Returns:
        The relative difference, and that of the source's output in its own dtype from that in float64.

    Raises:
        DifferenceError: If they differ; it names the first operator where they do.
        CollapseError: If they write otherwise into their inputs.
    """
    twins = in_float64((source, collapsed), arguments)
    if twins is None:
        return None, 0.0
    (source, collapsed), arguments = twins  # type: ignore[assignment]
    coarsest = _CoarsestDtype()
    read, read_too = copies(arguments), copies(arguments)
    try:
        with torch.no_grad(), coarsest:
            exact, output = call(source, read), call(collapsed, read_too)
    except Exception:  # dtypes that are written out in its forward, or asserted there
        return None, 0.0
    difference = relative_difference(output, exact)
    if not difference <= coarsest.tolerance:  # some models convert to float32 inside
        where = _why_different(before, collapsed, arguments)
        raise DifferenceError(_message(type(source).__name__, difference, coarsest.tolerance, where), exactly=True)
    if not relative_difference(read_too, read) <= coarsest.tolerance:
        raise CollapseError(
            f"The collapsed model writes into its inputs otherwise than {type(source).__name__}; report it"
        )
    if not any(bool(tensor.any()) for tensor in tensors_in(exact)):  # a head of zeros hides what comes before it
        where = _why_different(before, collapsed, arguments)
        if where is not None:
            message = _message(type(source).__name__, float("inf"), coarsest.tolerance, where)
            raise DifferenceError(message, exactly=True)
    return difference, relative_difference(expected, exact)


@full_float32()
def verify_rounded(
    collapsed: nn.Module, arguments: Sequence[Tensor], expected: Any, rounding: float, name: str
) -> float:
    """Compare a collapsed model with its source in the model's own dtype.

    Args:
        collapsed: The model.
        arguments: Its inputs.
        expected: The output of the source.
        rounding: The relative difference of that from the exact one.
        name: What to call the model.

    Returns:
        The relative difference.

    Raises:
        DifferenceError: If they differ.
    """
    try:
        with torch.no_grad():
            output = call(collapsed, copies(arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise DifferenceError(
            f"The collapsed model fails where {name} does not: {error}; please report it", exactly=False
        ) from error
    difference = relative_difference(output, expected)
    # What the source loses by its own rounding, the result may lose, too
    tolerance = max(tolerance_for(expected), _ROUNDING_MARGIN * rounding)
    dtypes = [[tensor.dtype for tensor in tensors_in(each)] for each in (output, expected)]
    if not difference <= tolerance or dtypes[0] != dtypes[1]:
        raise DifferenceError(_message(name, difference, tolerance, None), exactly=False)
    return difference


@full_float32()
def differences(
    source: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor], exactly: bool
) -> dict[str, float]:
    """Compare each operator of a collapsed graph alone with what it stands for, on the values in its source.

    Args:
        source: The graph as it was captured.
        collapsed: The graph as it is now.
        arguments: The inputs.
        exactly: Whether to do so in float64.

    Returns:
        Node of the source -> the relative difference of what has its value now, where that is more than rounding
        explains; inf where it fails.
    """
    if exactly:
        twins = in_float64((source, collapsed), arguments)
        if twins is None:
            return {}
        (source, collapsed), arguments = twins  # type: ignore[assignment]
    reference = _Values(source)
    comparison = _Alone(collapsed, reference.values)
    try:
        with torch.no_grad():
            reference.run(*copies(arguments))
            comparison.run(*copies(arguments))
    except Exception:  # a source that asserts its own dtype, say
        return {}
    return comparison.differences


def in_float64(
    models: Sequence[nn.Module], arguments: Sequence[Tensor]
) -> tuple[list[nn.Module], tuple[Tensor, ...]] | None:
    """Copy models that share layers, and their arguments, to float64, dtypes that are written out too; None without it.

    Args:
        models: The models; they are not changed.
        arguments: Tensors; those of integers stay.
    """
    try:
        twins = [_converted(model.double()) for model in deepcopy(list(models))]
        return twins, mapped(lambda x: x.double() if x.is_floating_point() else x, arguments)
    except Exception:  # a device without float64, or a module that refuses the cast
        return None


def _converted(model: nn.Module) -> nn.Module:
    """Let a graph convert to float64 where it converts to float32: torch.export writes the dtype out that it met."""
    if isinstance(model, fx.GraphModule):

        def change(argument: Any) -> Any:
            return torch.float64 if argument is torch.float32 else argument

        for node in model.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(change, (node.args, node.kwargs))
        model.recompile()
    return model


class _CoarsestDtype(TorchDispatchMode):
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


def _why_different(before: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor]) -> str | None:
    """Name the first operator of a collapsed graph whose value differs from that in its source; None if none is found.

    Args:
        before: The graph as it was captured, in its own dtype.
        collapsed: The graph as it is now, in float64.
        arguments: The inputs, in float64.
    """
    twins = in_float64((before,), arguments)
    if twins is None:
        return None
    reference = _Values(twins[0][0])  # type: ignore[arg-type]
    comparison = _Comparison(collapsed, reference.values)
    try:
        with torch.no_grad():
            reference.run(*copies(arguments))
            comparison.run(*copies(arguments))
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
        expected = self._reference.get(equal_in_source(n) or "")
        if self.first is None and isinstance(result, Tensor) and expected is not None:
            with torch.no_grad():
                if not relative_difference(result, expected) <= TOLERANCES[torch.float64]:
                    self.first = describe_node(self.module, n)  # type: ignore[arg-type]
        return result


class _Alone(fx.Interpreter):
    """Compares what nodes compute of the values in the source; a difference is not passed on."""

    def __init__(self, module: fx.GraphModule, reference: dict[str, Tensor]) -> None:
        super().__init__(module)
        self._reference = reference
        self.differences: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        name = equal_in_source(n) or ""
        expected = self._reference.get(name)
        try:
            result = super().run_node(n)
        except Exception:  # what it reads, or itself, is not what it should be
            result = None
        if expected is None:
            return result
        difference = float("inf") if result is None else relative_difference(result, expected)
        if difference <= tolerance_for(expected):
            return result  # it may share its memory with others
        self.differences[name] = difference
        return expected.clone()


def _message(name: str, difference: float, tolerance: float, where: str | None) -> str:
    return (
        f"The collapsed model differs from {name} by {difference:.1e} (relative) on the example "
        f"inputs, more than the {tolerance:.0e} that rounding explains"
        + (f"; the first difference is in {where}" if where else "")
        + ". Its forward may do something that a capture does not record, or a merge is wrong; please report it."
    )
