"""The torch.export way of capturing a model: its ATen operators become calls of the layers that they came from."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.errors import CaptureError
from lightning_easier.collapsing.exact.guards import SizeGuards, read_guards
from lightning_easier.collapsing.exact.nodes import bind
from lightning_easier.support.calls import Arguments, mapped, named_arguments, names_of
from lightning_easier.support.programs import export_program, quiet
from lightning_easier.support.versions import children_of

GUARDS = "_guards_fn"
"""The name of what checks sizes; later versions of torch give it to a check of their own."""
_OUTPUT = "_output"
_LONGEST_SIZE = 256
"""Terms of a size, in numbers, symbols and operations. Networks of plain strides stay below 200."""
_LIMITS_OF_KERNELS = (65535, 880801)
"""Samples that cuDNN's batch norm takes at most, in eval mode and in training."""
# Layers that are called again in the place of the one ATen operator that they became
_LAYERS: tuple[Any, ...] = (
    nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *BATCH_NORMS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip


class Attempt(NamedTuple):
    """One way to export a model.

    Attributes:
        inputs: The example inputs to export it with.
        free: For each input, the axes that may have any size.
        reads_code: Whether torch.export reads the Python of the forward instead of running it (``strict``). That is
            slower and takes fewer models, but it passes on a size that runs through ``len``, ``int`` or ``math``.
    """

    inputs: Arguments
    free: tuple[frozenset[int], ...]
    reads_code: bool = False


def attempts(arguments: Sequence[Tensor]) -> list[Attempt]:
    """List the ways to export a model, those that leave the most sizes free first.

    Args:
        arguments: Example inputs.
    """
    # A size of one is taken for a constant
    doubled = mapped(lambda x: torch.cat([x, x]) if x.ndim > 1 and x.shape[0] == 1 else x, arguments)
    given = Arguments(arguments, names_of(arguments))
    differ = any(x is not y for x, y in zip(doubled, arguments, strict=True))
    made = [
        Attempt(inputs, tuple(frozenset(range(min(x.ndim, most))) for x in inputs))
        for inputs in (doubled, given)[: 1 + differ]
        for most in (max(x.ndim for x in inputs), 1)
    ]
    return [*made, Attempt(given, (frozenset(),) * len(arguments))]


def export_layers(model: nn.Module, attempt: Attempt) -> tuple[fx.Graph, dict[str, Any]]:
    """Export a model, and call its layers again where they were called.

    Args:
        model: The model, in eval mode.
        attempt: With which inputs, and for which sizes.

    Returns:
        A graph, and what it calls and reads besides the model's own (name -> module or tensor). It names the sizes for
        which it holds.

    Raises:
        Exception: Whatever torch.export raises, or :class:`CaptureError`.
    """
    return _as_layers(model, _program(model, attempt), named_arguments(model, attempt.inputs))


def _program(model: nn.Module, attempt: Attempt) -> ExportedProgram:
    sizes = [dict.fromkeys(sorted(axes), Dim.AUTO) for axes in attempt.free]
    # with gradients, so that it is seen where a forward turns them off
    with torch.enable_grad(), quiet(), _fewer_questions():
        return export_program(model, attempt.inputs, sizes, reads_code=attempt.reads_code)


def _as_layers(model: nn.Module, program: ExportedProgram, names: Sequence[str]) -> tuple[fx.Graph, dict[str, Any]]:
    unlifted: Any = program.module()
    graph: fx.Graph = unlifted.graph
    constants: dict[str, Any] = {}
    structure = _restore_structure(graph)
    if structure is not None:
        constants[_OUTPUT] = structure
    _drop_regions_without_gradient(unlifted)
    _call_layers(model, graph)
    _follow_device(graph)
    own = {name for kind in (model.named_parameters, model.named_buffers) for name, _ in kind(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            if "." in str(node.target) or not isinstance(getattr(unlifted, str(node.target)), Tensor):
                raise CaptureError(f"torch.export makes {node.target}")
            constants[str(node.target)] = getattr(unlifted, str(node.target))
    constants[GUARDS] = _check_sizes(graph, names)
    return _named_without_tracer(graph, names), constants


def _check_sizes(graph: fx.Graph, names: Sequence[str]) -> SizeGuards:
    """Have a graph check the sizes it is called with first, by what can be pickled."""
    for check in graph.find_nodes(op="call_module", target=GUARDS):  # that of torch itself, which not every version has
        graph.erase_node(check)
    inputs = list(graph.find_nodes(op="placeholder"))
    with graph.inserting_after(inputs[-1]):
        graph.create_node("call_module", GUARDS, tuple(inputs))
    return read_guards({name: node.meta["val"] for name, node in zip(names, inputs, strict=True)})


def _named_without_tracer(graph: fx.Graph, names: Sequence[str]) -> fx.Graph:
    """Copy a graph with its inputs as they are called in the forward, where torch.export has small letters only.

    Its tracer is left out: torch 2.10 can't make that of torch.export again to load a saved model.
    """
    copied = fx.Graph()
    inputs = {}
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        inputs[node] = copied.create_node("placeholder", name, node.args, name=name)
        inputs[node].meta = dict(node.meta)
    copied.output(copied.graph_copy(graph, inputs))
    return copied


@contextmanager
def _fewer_questions() -> Iterator[None]:
    """Give up an export whose sizes are long expressions of the free ones, and leave out what no value depends on.

    A patch embedding inside a network rounds a size up, and the next one rounds what it gets up again: sympy then takes
    minutes for what is asked of such a size, and seconds with fewer free axes. On a GPU, a batch norm asks for its
    number of samples to choose a kernel: as a condition, that would keep the result from being exported for any batch.

    Raises:
        RuntimeError: Where torch asks for a size of more than :data:`_LONGEST_SIZE` terms.
    """
    original = ShapeEnv.evaluate_expr
    short: set[sympy.Basic] = set()

    def evaluate(self: ShapeEnv, size: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        if isinstance(size, sympy.Le) and size.rhs in _LIMITS_OF_KERNELS:
            return sympy.true
        if size not in short:
            if sum(1 for _ in islice(sympy.preorder_traversal(size), _LONGEST_SIZE + 1)) > _LONGEST_SIZE:
                raise RuntimeError(f"a size inside it is an expression of more than {_LONGEST_SIZE} terms")
            short.add(size)
        return original(self, size, *args, **kwargs)

    setattr(ShapeEnv, "evaluate_expr", evaluate)  # noqa: B010  # mypy takes no other function for a method
    try:
        yield
    finally:
        setattr(ShapeEnv, "evaluate_expr", original)  # noqa: B010


def _restore_structure(graph: fx.Graph) -> nn.Module | None:
    """Take plain arguments, and return what the model returns, without the flattening of an exported program.

    Returns:
        What the graph calls to make an OrderedDict, say, or a class of transformers; a graph knows plain ones only.
    """
    specification: Any = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: isinstance(leaf, fx.Node) or leaf is None)
    graph.set_codegen(CodeGen())
    if _is_plain(specification):
        output.args = (pytree.tree_unflatten(values, specification),)
        return None
    with graph.inserting_before(output):
        output.args = (graph.create_node("call_module", _OUTPUT, tuple(values)),)
    return _Output(specification)


class _Output(nn.Module):
    """Puts values into the structure that a model returns."""

    def __init__(self, specification: pytree.TreeSpec) -> None:
        super().__init__()
        self.specification = specification

    def forward(self, *values: Any) -> Any:
        return pytree.tree_unflatten(values, self.specification)


def _is_plain(specification: Any) -> bool:
    if specification.is_leaf():
        return True
    return specification.type in (tuple, list, dict) and all(map(_is_plain, children_of(specification)))


def _call_layers(model: nn.Module, graph: fx.Graph) -> None:
    """Call a layer in the place of the one operator that it became."""
    came_from = {node: _layer_of(node) for node in graph.nodes if node.op == "call_function"}
    counts = Counter(came_from.values())
    for node, name in came_from.items():
        try:
            layer = model.get_submodule(name) if name else None
        except AttributeError:  # the second call of a layer goes by another name
            continue
        value = node.args[0] if node.args else None
        if counts[name] > 1 or type(layer) not in _LAYERS or not isinstance(value, fx.Node):
            continue
        if type(layer) in TRANSPOSED_CONVOLUTIONS and _asks_for_size(node, layer):
            continue
        with graph.inserting_before(node):
            call = graph.create_node("call_module", name, (value,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _asks_for_size(node: fx.Node, layer: Any) -> bool:
    """Tell whether a transposed convolution was called for an output size that is not its own."""
    own = list(layer.output_padding)
    given = bind(node, "input weight bias stride padding output_padding groups dilation")
    return list(given.get("output_padding", [0] * len(own))) != own


def _drop_regions_without_gradient(unlifted: fx.GraphModule) -> None:
    """Write out what runs without gradients, where nothing in it has one: positions, masks.

    Raises:
        CaptureError: If something in it would have one; the result would train it.
    """
    graph = unlifted.graph
    regions = [node for node in graph.nodes if "set_grad_enabled" in getattr(node.target, "__name__", "")]
    depends: set[fx.Node] = set()  # on a parameter or an input
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder" or value.requires_grad or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    for node in regions:
        _, inside, *values = node.args
        if not isinstance(inside, fx.Node) or not depends.isdisjoint(node.all_input_nodes):
            raise CaptureError("it turns gradients off inside its forward")
        region: Any = getattr(unlifted, str(inside.target)).graph
        places = dict(zip(region.find_nodes(op="placeholder"), values, strict=True))
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(region, places)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        graph.erase_node(inside)


def _follow_device(graph: fx.Graph) -> None:
    """Make new tensors where the input is, and not on the device that was written out."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    if first is None or not isinstance(first.meta.get("val"), Tensor):
        return
    made = [node for node in graph.nodes if node.kwargs.get("device") == first.meta["val"].device]
    if made:
        with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
            device = graph.call_function(getattr, (first, "device"))
        for node in made:
            node.kwargs = {**node.kwargs, "device": device}


def _layer_of(node: fx.Node) -> str:
    stack: Any = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
