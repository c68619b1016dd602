"""The data flow of a whole model: capture it, and find which linear operators are neighbours in it."""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH
from torch.fx.passes.shape_prop import ShapeProp

from lightning_easier.collapse.operators import LINEAR_OPERATORS
from lightning_easier.inference import has_hooks
from lightning_easier.linearize import IdentityStandIn
from lightning_easier.rectifiers import is_activation
from lightning_easier.tracing import InPlaceProxy, input_of, is_readable

_WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_WEIGHTED_FUNCTIONS: tuple[Any, ...] = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
)  # fmt: skip


class CaptureError(Exception):
    """A model whose data flow can't be captured; the message is the reason."""


def capture(model: nn.Module, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Capture the data flow of a model in eval mode, its layers as leaves, with the shapes met on the way.

    Parts that can't be traced stay whole, as leaves. So do modules with hooks, which a capture would lose.

    Args:
        model: The model, in eval mode. The graph module shares its layers.
        arguments: Example inputs, to run it once.

    Raises:
        CaptureError: With the reason.
    """
    try:
        graph, constants = _trace(model, len(arguments), frozenset())
    except Exception:  # whatever a user's forward raises on a proxy; the parts that do are looked for
        opaque = frozenset(module for module in model.modules() if module is not model and not is_readable(module))
        try:
            graph, constants = _trace(model, len(arguments), opaque)
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    for name, value in constants.items():
        setattr(model, name, value)
    captured = fx.GraphModule(model, graph, class_name=type(model).__name__)
    captured.eval()
    with torch.no_grad():
        ShapeProp(captured).propagate(*arguments)
    return captured


class _Root(nn.Module):
    """Calls the model like a user would; the tracer would read the class's forward of its root, not the instance's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


class _ModelTracer(fx.Tracer):
    def __init__(self, opaque: frozenset[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            m in self._opaque
            or isinstance(m, IdentityStandIn)
            or is_activation(m)
            or has_hooks(m)
            or (module_qualified_name != "model" and super().is_leaf_module(m, module_qualified_name))
        )


def _trace(model: nn.Module, inputs: int, opaque: frozenset[nn.Module]) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace a model through :class:`_Root` and name everything as it is named in the model."""
    root = _Root(model)
    before = set(vars(root))
    graph = _ModelTracer(opaque).trace(root, concrete_args=(PH,) * inputs)  # type: ignore[arg-type]
    names = _argument_names(model, inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = next(names)
        elif node.op in ("call_module", "get_attr"):
            if node.target == "model":
                raise CaptureError(f"{type(model).__name__} itself has hooks, which a capture would lose; remove them")
            node.target = str(node.target).removeprefix("model.")
    return graph, {key: value for key, value in vars(root).items() if key not in before}


def _argument_names(model: nn.Module, inputs: int) -> Iterator[str]:
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    yield from names[:inputs]
    yield from (f"input_{number}" for number in range(len(names), inputs))


def module_of(captured: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, None for anything else."""
    return captured.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_linear_operator(captured: fx.GraphModule, node: Any) -> bool:
    """Tell whether a node calls an operator that :func:`~lightning_easier.collapse.operators.compose` knows."""
    return isinstance(node, fx.Node) and type(module_of(captured, node)) in LINEAR_OPERATORS


def neighbours(captured: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield pairs of linear operators of which the second is the only reader of the first, in execution order."""
    for node in captured.graph.nodes:
        if is_linear_operator(captured, node) and len(node.users) == 1:
            (user,) = node.users
            if is_linear_operator(captured, user) and input_of(user) is node:
                yield node, user


def why_separate(captured: fx.GraphModule, first: fx.Node, second: fx.Node) -> str | None:
    """Give the reason why two nodes have to stay what they are whatever they compute; None if there is none."""
    calls = Counter(node.target for node in captured.graph.nodes if node.op == "call_module")
    tensors = Counter(
        id(parameter) for target in calls for parameter in captured.get_submodule(str(target)).parameters()
    )
    for node in captured.graph.nodes:  # a parameter may be read without its module being called
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            tensors[id(getattr(captured.get_submodule(owner), attribute))] += 1
    for node in (first, second):
        module = captured.get_submodule(str(node.target))
        if calls[node.target] > 1:
            return f"`{node.target}` is called {calls[node.target]} times"
        if has_hooks(module):
            return f"`{node.target}` has hooks, which would see something else"
        if any(tensors[id(parameter)] > 1 for parameter in module.parameters()):
            return f"`{node.target}` shares its parameters with another operator"
    return None


def why_nothing_meets(captured: fx.GraphModule, stand_in: fx.Node) -> str | None:
    """Give the reason why the removal of an activation makes no two linear operators neighbours; None if it does."""
    before = input_of(stand_in)
    while isinstance(before, fx.Node) and is_stand_in(captured, before):
        before = input_of(before)
    if not isinstance(before, fx.Node) or not is_linear_operator(captured, before):
        return f"what comes before it is {describe(captured, before)}, not one linear operator"
    readers, node = list(before.users), before
    while len(readers) == 1 and is_stand_in(captured, readers[0]):
        node = readers[0]
        readers = list(node.users)
    if len(readers) != 1:
        return f"its value has {len(readers)} readers: {', '.join(describe(captured, reader) for reader in readers)}"
    if not is_linear_operator(captured, readers[0]):
        return f"what comes behind it is {describe(captured, readers[0])}, not a linear operator"
    return None


def is_stand_in(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node calls a linearized activation."""
    return isinstance(module_of(captured, node), IdentityStandIn)


def describe(captured: fx.GraphModule, node: Any) -> str:
    """Name a node for a report."""
    if not isinstance(node, fx.Node):
        return "a constant"
    module = module_of(captured, node)
    if module is not None:
        return f"`{node.target}` ({type(module).__name__})"
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "output":
        return "the model's output"
    return f"`{getattr(node.target, '__name__', node.target)}`"


def depth(captured: fx.GraphModule) -> int:
    """Length of the longest chain of weight-carrying operators (convolutions, matrix products with weights).

    A part that was captured whole counts with all of its operators.
    """
    longest: dict[fx.Node, int] = {}
    for node in captured.graph.nodes:
        below = max((longest[parent] for parent in node.all_input_nodes), default=0)
        module = module_of(captured, node)
        if module is not None:
            below += sum(isinstance(part, _WEIGHTED) for part in module.modules())
        elif node.op == "call_function" and any(node.target is function for function in _WEIGHTED_FUNCTIONS):
            below += 1
        longest[node] = below
    return max(longest.values(), default=0)
