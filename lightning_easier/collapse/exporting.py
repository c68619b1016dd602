"""The torch.export way of capturing a model: its ATen operators become calls of the layers that they came from."""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lightning_easier.collapse.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapse.errors import CaptureError
from lightning_easier.collapse.guards import read_guards
from lightning_easier.collapse.reading import BATCH_NORMS, name_of

_GUARDS = "_guards_fn"  # the name that torch.export gives it
_OUTPUT = "_output"
_logger = logging.getLogger(__name__)
# Layers that are called again in the place of the one ATen operator that they became
_LAYERS: tuple[Any, ...] = (
    nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *BATCH_NORMS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip


def exported(model: nn.Module, arguments: Sequence[Tensor]) -> tuple[fx.Graph, dict[str, Any]]:
    """Export a model for inputs of any size, and call its layers again where they were called.

    Args:
        model: The model, in eval mode.
        arguments: Example inputs.

    Returns:
        The graph, and what it calls and reads besides the model's own: name -> module or tensor.

    Raises:
        CaptureError: If the graph holds what can't be written into a graph of layers; torch.export raises all kinds.
    """
    # torch.export takes a size of one for a constant
    arguments = tuple(torch.cat([x, x]) if x.ndim > 1 and x.shape[0] == 1 else x for x in arguments)
    try:
        program = _program(model, arguments, [range(x.ndim) for x in arguments])
    except Exception as error:  # sizes that it can't reason about; the number of samples is the one that matters most
        _logger.debug("torch.export can't take %s for inputs of any size: %s", type(model).__name__, error)
        program = _program(model, arguments, [range(min(x.ndim, 1)) for x in arguments])
    unlifted: Any = program.module()  # with a check that sizes are those for which what was traced holds
    graph: fx.Graph = unlifted.graph
    constants: dict[str, Any] = {}
    structure = _restore_structure(graph)
    if structure is not None:
        constants[_OUTPUT] = structure
    _drop_idle_conversions(graph)
    _call_layers(model, graph)
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            if "." in str(node.target) or not isinstance(getattr(unlifted, str(node.target)), Tensor):
                raise CaptureError(f"torch.export makes {node.target}")
            constants[str(node.target)] = getattr(unlifted, str(node.target))
    (checking,) = graph.find_nodes(op="call_module", target=_GUARDS)  # or it is not known for which sizes this holds
    guards = read_guards(unlifted.get_submodule(_GUARDS), [str(x.target) for x in checking.all_input_nodes])
    if guards.conditions:
        constants[_GUARDS] = guards
    else:
        graph.erase_node(checking)
    return graph, constants


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch.export says of sizes of one and of models that it can't export."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx.experimental")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _program(model: nn.Module, arguments: tuple[Tensor, ...], axes: Sequence[range]) -> ExportedProgram:
    """Export a model for inputs of any size along some axes of each."""
    sizes = tuple(dict.fromkeys(each, Dim.AUTO) for each in axes)
    with torch.no_grad(), _quiet():
        return torch.export.export(
            model, arguments, dynamic_shapes={"args": sizes} if _takes_any_number(model) else sizes
        )


def _takes_any_number(model: nn.Module) -> bool:
    return any(p.kind == p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


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
    return specification.type in (tuple, list, dict) and all(map(_is_plain, specification.children()))


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
        with graph.inserting_before(node):
            call = graph.create_node("call_module", name, (value,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _drop_idle_conversions(graph: fx.Graph) -> None:
    """Drop conversions to the dtype that a value has: ``x.to(y.dtype)`` was recorded with that dtype written out."""
    for node in list(graph.nodes):
        if name_of(node) in ("to", "_to_copy") and isinstance(value := node.args[0], fx.Node):
            dtypes = [getattr(each.meta.get("val"), "dtype", None) for each in (node, value)]
            if dtypes[0] is not None and dtypes[0] == dtypes[1]:
                node.replace_all_uses_with(value)
                graph.erase_node(node)


def _layer_of(node: fx.Node) -> str:
    stack: Any = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
