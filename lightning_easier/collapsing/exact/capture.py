"""Capture the data flow of a whole model as a graph whose nodes call its layers.

``torch.fx`` records the calls of layers as they are. What its symbolic values can't pass (questions about shapes, say)
goes through ``torch.export``, whose ATen operators become calls of the layers again that they came from. What neither
passes stays whole, as a leaf.
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from lightning_easier.collapsing.algebra.affine import AFFINES
from lightning_easier.collapsing.algebra.operators import uses_batch_statistics
from lightning_easier.collapsing.errors import CaptureError
from lightning_easier.collapsing.exact.guards import SizeGuards
from lightning_easier.collapsing.exact.nodes import ALIASES, NUMBER, WRITES
from lightning_easier.collapsing.exact.signatures import numbers, restore_arguments
from lightning_easier.collapsing.exact.torch_export import GUARDS, Attempt, attempts, export_layers
from lightning_easier.sites.rectifiers import is_activation
from lightning_easier.sites.tracing import RecordingProxy, is_readable, modes
from lightning_easier.sites.watching import hooked
from lightning_easier.structure.stand_in import BlockStandIn, StandIn
from lightning_easier.support.calls import Arguments, call, copies, mapped, named_arguments, names_of
from lightning_easier.support.inference import has_hooks, relative_difference, tolerance_for
from lightning_easier.support.programs import quiet, remedy_for
from lightning_easier.support.storage import first_line

_logger = logging.getLogger(__name__)
_WRITES_INTO_A_CONSTANT = (
    "its forward makes a tensor and writes into it, which torch.fx would record as one tensor for all calls; make it "
    "of an input (`x.new_zeros(...)`), or put its parts together (`torch.cat`)"
)


def capture(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Capture the data flow of a model in eval mode, its layers as leaves, with the shapes met on the way.

    Parts that can't be traced stay whole, as leaves. So do modules with hooks, which a capture would lose.

    Args:
        model: The model, in eval mode. The graph module shares its layers.
        arguments: Example inputs, to run it once.

    Raises:
        CaptureError: With the reason.
    """
    return _captured(model, arguments, _first_that_holds)


def capture_at(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Capture a model as :func:`capture` does, for what is looked at only: it may hold for these sizes alone.

    ``torch.export`` takes half of the time then, or a quarter, and nothing is run at other sizes.

    Args:
        model: The model, in eval mode. The graph module shares its layers.
        arguments: Example inputs, to run it once.

    Raises:
        CaptureError: With the reason.
    """
    return _captured(model, arguments, _at_these_sizes)


def _captured(
    model: nn.Module,
    arguments: Sequence[Tensor],
    exported: Callable[[nn.Module, Sequence[Tensor]], fx.GraphModule],
) -> fx.GraphModule:
    """Capture a model: with ``torch.fx``, else by an export, else with what can't be traced as leaves."""
    try:
        return _traced(model, arguments, frozenset())
    except Exception as error:  # whatever a user's forward raises on a proxy
        reason = error
    if not any(has_hooks(module) or uses_batch_statistics(module) for module in model.modules()):
        try:
            return exported(model, arguments)
        except Exception as error:  # whatever it raises there; what can't be traced is looked for instead
            _logger.debug("torch.export can't capture %s: %s", type(model).__name__, error)
            if not isinstance(reason, CaptureError):
                reason = CaptureError(_both(reason, error))
    with hooked():
        opaque = frozenset(module for module in model.modules() if module is not model and not is_readable(module))
    try:
        return _traced(model, arguments, opaque)
    except Exception as error:
        raise CaptureError(_said(reason)) from error


def _both(traced: Exception, exported: Exception) -> str:
    """Say why neither way has passed; what has a remedy is the reason."""
    remedy = remedy_for(exported)
    return f"{_said(exported)}. {remedy}" if remedy else f"{_said(traced)} (torch.fx); {_said(exported)} (torch.export)"


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if isinstance(error, CaptureError) else first_line(error)


def _traced(model: nn.Module, arguments: Sequence[Tensor], opaque: frozenset[nn.Module]) -> fx.GraphModule:
    """Record a model with ``torch.fx``; numbers that are left to their defaults stay arguments where they can."""
    names = numbers(model, arguments)
    if names:
        try:
            return _with_shapes(model, *_trace(model, arguments, opaque, names), arguments)
        except Exception as error:  # its control flow depends on one, say
            _logger.debug("%s can't be recorded for any %s: %s", type(model).__name__, names, error)
    return _with_shapes(model, *_trace(model, arguments, opaque, []), arguments)


def _first_that_holds(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Export a model for as many sizes as possible, of the number of samples above all."""
    reason: Exception = CaptureError("torch.export can't take it")
    for attempt in attempts(arguments):
        try:
            captured = _exported(model, attempt, arguments)
        except CaptureError:
            raise
        except Exception as error:  # sizes that it can't reason about, a guard that the example does not pass
            _logger.debug("torch.export can't take %s with sizes %s: %s", type(model).__name__, attempt.free, error)
            reason = error
        else:
            return _for_more_samples(captured, model, attempt, arguments)
    raise reason


def _at_these_sizes(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Export a model for the sizes of the example alone."""
    graph, constants = export_layers(model, attempts(arguments)[-1])
    with quiet():
        return _with_shapes(model, graph, constants, copies(arguments))


def _exported(model: nn.Module, attempt: Attempt, arguments: Sequence[Tensor]) -> fx.GraphModule:
    graph, constants = export_layers(model, attempt)
    with quiet():
        captured = _with_shapes(model, graph, constants, copies(arguments))
        _check_smallest_sizes(captured, model, arguments)
    return captured


def _for_more_samples(
    captured: fx.GraphModule, model: nn.Module, attempt: Attempt, arguments: Sequence[Tensor]
) -> fx.GraphModule:
    """Export a model once more where what was captured refuses numbers of samples that its own forward takes."""
    refused = _refused_samples(captured, model, arguments)
    for again in _other_attempts(captured, attempt, refused, arguments):
        try:
            other = _exported(model, again, arguments)
        except Exception as error:  # then what there is has to do
            _logger.debug("torch.export can't take %s with sizes %s: %s", type(model).__name__, again.free, error)
            continue
        still = _refused_samples(other, model, arguments)
        if len(still) < len(refused):
            captured, refused = other, still
        if not refused:
            break
    return captured


def _other_attempts(
    captured: fx.GraphModule, attempt: Attempt, refused: Sequence[Sequence[Tensor]], arguments: Sequence[Tensor]
) -> Iterator[Attempt]:
    """List what to try where numbers of samples are refused, as the guards tell."""
    fail = [_guards_of(captured).axes_that_fail(*inputs) for inputs in refused]
    others = {(place, axis) for each in fail for place, axis in each if axis > 0}
    if others:  # an axis that is fixed is no part of a condition
        free = [{axis for axis in axes if (place, axis) not in others} for place, axes in enumerate(attempt.free)]
        yield attempt._replace(free=tuple(map(frozenset, free)))
        yield attempt._replace(free=tuple(axes & {0} for axes in attempt.free))
    if any(len(inputs[0]) > 1 for inputs in refused):
        yield attempts(arguments)[0]._replace(reads_code=True)


def _refused_samples(captured: fx.GraphModule, model: nn.Module, arguments: Sequence[Tensor]) -> list[Arguments]:
    """List inputs with another number of samples that a model takes and what was captured of it refuses."""
    if not arguments[0].ndim or not len(arguments[0]):
        return []
    samples = len(arguments[0])
    refused = []
    for number in {1, samples + 1} - {samples}:
        places = torch.arange(number) % samples
        inputs = mapped(partial(_rows, samples=samples, places=places), arguments)
        if _outputs(model, inputs) is not None and _outputs(captured, inputs) is None:
            refused.append(inputs)
    return refused


def _rows(value: Tensor, samples: int, places: Tensor) -> Tensor:
    """Return some rows of what has one for each sample; anything else as it is."""
    return value.index_select(0, places.to(value.device)) if value.ndim and len(value) == samples else value


def _guards_of(captured: fx.GraphModule) -> SizeGuards:
    guards: SizeGuards = captured.get_submodule(GUARDS)  # type: ignore[assignment]
    return guards


def _check_smallest_sizes(captured: fx.GraphModule, model: nn.Module, arguments: Sequence[Tensor]) -> None:
    """Refuse sizes of one, and no samples, where they take another way than the one recorded.

    ``torch.export`` assumes that every size is two at least.

    Raises:
        AssertionError: If the example itself has such a size.
    """
    guards = _guards_of(captured)
    for axis in range(max(x.ndim for x in arguments)):
        sizes = {x.shape[axis] for x in arguments if x.ndim > axis}
        for size, number in product(sizes, (1,) if axis else (1, 0)):
            # inputs that have a size in common have it in common at one, too
            which = [x.ndim > axis and x.shape[axis] == size for x in arguments]
            inputs = Arguments(
                (x.narrow(axis, 0, min(size, number)) if at else x for x, at in zip(arguments, which, strict=True)),
                names_of(arguments),
            )
            if _is_equal(captured, model, inputs):
                continue
            named = [name for name, at in zip(guards.inputs, which, strict=True) if at]
            guards.add([f"{name}.size()[{axis}] != {number}" for name in named])
    guards(*arguments)


def _is_equal(captured: nn.Module, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Tell whether a captured graph does with inputs what its model does; one that refuses them is not wrong."""
    expected = _outputs(model, inputs)
    output = None if expected is None else _outputs(captured, inputs)
    return output is None or relative_difference(output, expected) <= tolerance_for(expected)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call a model without gradients on copies of inputs; None if it, or a guard, refuses them."""
    try:
        with torch.no_grad():
            return call(model, copies(inputs))
    except Exception:  # whatever a forward raises
        return None


def duplicate(captured: fx.GraphModule) -> fx.GraphModule:
    """Copy a captured graph, which shares its layers with the copy, with what was noted of its values."""
    modes_before = {module: module.training for module in captured.modules()}
    twin = fx.GraphModule(captured, deepcopy(captured.graph), class_name=type(captured).__name__)
    instead = dict(zip(captured.graph.nodes, twin.graph.nodes, strict=True))
    for node in twin.graph.nodes:
        if ALIASES in node.meta:
            node.meta[ALIASES] = [instead[other] for other in node.meta[ALIASES] if other in instead]
    twin.eval()  # the rooms that it makes for names with dots
    for module, training in modes_before.items():
        module.training = training
    return twin


def _note_shapes(captured: fx.GraphModule, arguments: Sequence[Tensor]) -> None:
    """Note in the nodes of a graph what there is to know of their values, at these inputs."""
    with torch.no_grad():
        _Shapes(captured).propagate(*arguments)


def _with_shapes(
    model: nn.Module, graph: fx.Graph, constants: dict[str, Any], arguments: Sequence[Tensor]
) -> fx.GraphModule:
    root = nn.Module()  # not the model itself: a Sequential would call what is added to it
    root._modules, root._parameters, root._buffers = (
        dict(model._modules), dict(model._parameters), dict(model._buffers),
    )  # fmt: skip
    for name, value in constants.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            root.register_buffer(name, value, persistent=False)
        else:
            setattr(root, name, value)
    restore_arguments(graph, model, arguments)
    modes_before = {module: module.training for module in model.modules()}
    captured = fx.GraphModule(root, graph, class_name=type(model).__name__)
    captured.eval()  # the rooms that it makes for names with dots
    for module, training in modes_before.items():
        module.training = training
    made = [value for value in constants.values() if isinstance(value, Tensor)]
    versions = [value._version for value in made]
    _note_shapes(captured, arguments)
    if [value._version for value in made] != versions:
        raise CaptureError(_WRITES_INTO_A_CONSTANT)
    return captured


class _Shapes(ShapeProp):
    """Notes in the ``meta`` of the nodes shapes, sizes, and which inputs a value shares its memory with."""

    def run_node(self, n: fx.Node) -> Any:
        before = _versions(n, self.env)
        result = super().run_node(n)
        n.meta[WRITES] = _versions(n, self.env) != before
        if isinstance(result, int):
            n.meta[NUMBER] = result
        memory = _memory(result)
        n.meta[ALIASES] = [other for other in n.all_input_nodes if memory & _memory(self.env.get(other))]
        return result


def _versions(node: fx.Node, env: dict[fx.Node, Any]) -> list[int]:
    leaves = [leaf for other in node.all_input_nodes for leaf in pytree.tree_leaves(env.get(other))]
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _memory(value: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.numel()}


class _Root(nn.Module):
    """Calls the model like a user would; the tracer would read the class's forward of its root, not the instance's.

    Args:
        model: The model.
        names: What the last of the arguments are called.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *args: Any) -> Any:
        positional = len(args) - len(self.names)
        return self.model(*args[:positional], **dict(zip(self.names, args[positional:], strict=True)))


class _ModelTracer(fx.Tracer):
    # Without arguments, so that a graph that remembers its tracer can be unpickled
    def __init__(self, opaque: frozenset[nn.Module] = frozenset()) -> None:
        super().__init__()
        self._opaque = opaque
        self._modes = modes()
        self._constants: list[tuple[Tensor, int]] = []
        self.asks_for_type = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return RecordingProxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if modes() != self._modes:
            raise CaptureError("it changes the autograd or autocast mode inside its forward")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            self._constants.append((a, a._version))
        if isinstance(a, dict) and type(a) is not dict:  # torch.fx would make it a plain one
            if type(a) is not OrderedDict:
                raise CaptureError(f"it makes a {type(a).__name__}")
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)

    def writes_into_a_constant(self) -> bool:
        """Tell whether a tensor was written into after it was recorded that it is read."""
        return any(constant._version != version for constant, version in self._constants)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._opaque or isinstance(m, StandIn) or is_activation(m) or has_hooks(m):
            return not isinstance(m, BlockStandIn)  # what a block leaves is no module
        if type(m) in AFFINES:  # as an operator, which merges
            return True
        if any(isinstance(part, StandIn) for part in m.modules()):  # torch's own layers too, a transformer's
            return False
        return module_qualified_name != "model" and super().is_leaf_module(m, module_qualified_name)


def _trace(
    model: nn.Module, given: Sequence[Tensor], opaque: frozenset[nn.Module], numbers: Sequence[str]
) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace a model through :class:`_Root` and name everything as it is named in the model.

    Args:
        model: The model.
        given: What it is called with.
        opaque: Modules that are not looked into.
        numbers: Arguments besides that are not left to their defaults.
    """
    root = _Root(model, [*names_of(given), *numbers])
    before = set(vars(root))
    tracer = _ModelTracer(opaque)
    graph = tracer.trace(root, concrete_args=(PH,) * (len(given) + len(numbers)))  # type: ignore[arg-type]
    if tracer.asks_for_type:  # a symbolic value is no tensor
        raise CaptureError("its control flow depends on the type of a value")
    if tracer.writes_into_a_constant():
        raise CaptureError(_WRITES_INTO_A_CONSTANT)
    names = iter([*named_arguments(model, given), *numbers])
    parameters = inspect.signature(model.forward).parameters
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = next(names)
            if node.target in numbers:
                node.args = (parameters[node.target].default,)
        elif node.op in ("call_module", "get_attr"):
            if node.target == "model":
                raise CaptureError(f"{type(model).__name__} itself has hooks, which a capture would lose; remove them")
            node.target = str(node.target).removeprefix("model.")
    return graph, {key: value for key, value in vars(root).items() if key not in before}
