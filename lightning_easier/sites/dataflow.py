"""What flows from where to where: the steps of one recorded forward, and the flow of a whole model made of them.

A :class:`Step` is plain data: it outlives the graph it was read from, and is pickled with the model. The
:class:`Flow` strings the steps of all forwards together, one node for each operator, norm, activation or function that
a value passes. Shapes are not known; what is followed instead is the *neuron axis*: which axis holds the channels.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class Kind(StrEnum):
    """What a step does to a value, as far as linear operators and their neighbours are concerned."""

    INPUT = "input"
    CONSTANT = "constant"
    MODULE = "module"
    OPERATOR = "operator"
    BATCH_NORM = "batch norm"
    IDENTITY = "identity"
    FLATTEN = "flatten"
    ADD = "addition"
    ACTIVATION = "activation"
    OTHER = "other"
    OUTPUT = "output"
    UNKNOWN = "unknown"


# What becomes of the neuron axis: ("keep",), ("set", axis), ("permute", axes), ("swap", axis, axis),
# ("move", from, to), ("flatten", first, last), ("insert", axis), ("pick", places) for an index of slices and Nones,
# ("join", axis, which) for a concatenation of these inputs, or ("lose",) where only what reads the value can tell.
Layout = tuple[Any, ...]
_KEEP: Layout = ("keep",)
_LOSE: Layout = ("lose",)

OPERATORS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_IDENTITIES = (nn.Identity, nn.modules.dropout._DropoutNd)  # in eval mode
_NEURON_AXIS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (
        nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm,
    ),
    -1: (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase),
}  # fmt: skip
NORMS_AND_OPERATORS: tuple[type[nn.Module], ...] = tuple(
    kind for kinds in _NEURON_AXIS.values() for kind in kinds if kind is not nn.Embedding
)
_NEURON_AXIS_OF_FUNCTION: dict[Any, int] = {
    torch.conv1d: 1, torch.conv2d: 1, torch.conv3d: 1, torch.conv_transpose1d: 1, torch.conv_transpose2d: 1,
    torch.conv_transpose3d: 1, F.batch_norm: 1, F.group_norm: 1, F.instance_norm: 1, F.linear: -1, F.layer_norm: -1,
    F.rms_norm: -1, torch.matmul: -1, operator.matmul: -1, torch.bmm: -1, torch.addmm: -1, torch.baddbmm: -1,
    F.embedding: -1,
    F.scaled_dot_product_attention: -1, F.multi_head_attention_forward: -1,
}  # fmt: skip
OPERATOR_FUNCTIONS: tuple[Any, ...] = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d, torch.matmul, operator.matmul, torch.addmm,
)  # fmt: skip
_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
_DROPOUTS: tuple[Any, ...] = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
)  # fmt: skip
# What is asked of a value without reading its numbers
_QUESTIONS = ("size", "dim", "numel", "ndimension", "stride", "is_contiguous")
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")


@dataclass(frozen=True)
class Step:
    """One thing that a forward does.

    Attributes:
        kind: What it does.
        name: The child that is called (relative to the module), the argument, the parameter, or the function.
        inputs: The steps whose values it reads, by number, argument by argument: one for a value, several for a list
            of values, none for a constant.
        keywords: Those that are passed to a child by keyword.
        layout: What becomes of the neuron axis.
        item: Which item of a sequence it takes, if it takes one.
        returns: Of an output: None if one value is returned, the length of a tuple whose first item is a value, else 0.
        scaled: Of an addition: the place among its inputs of the value that it multiplies by ``alpha``, if it does.
    """

    kind: Kind
    name: str
    inputs: tuple[tuple[int, ...], ...] = ()
    keywords: tuple[tuple[str, tuple[int, ...]], ...] = ()
    layout: Layout = _KEEP
    item: int | None = None
    returns: int | None = None
    scaled: int | None = None


def read_steps(graph: fx.Graph) -> tuple[Step, ...]:
    """Read the steps of a recorded forward."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    constants: set[fx.Node] = set()
    for node in graph.nodes:  # parameters, and what is computed from them alone
        computed = node.op in ("call_function", "call_method") and node.all_input_nodes
        if node.op == "get_attr" or (computed and constants.issuperset(node.all_input_nodes)):
            constants.add(node)
    return tuple(_read_step(node, number, constants) for node in graph.nodes)


def sequential_steps(targets: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of a forward that calls its children one after the other."""
    calls = [Step(Kind.MODULE, target, ((index,),)) for index, target in enumerate(targets)]
    return (Step(Kind.INPUT, "input"), *calls, Step(Kind.OUTPUT, "output", ((len(calls),),)))


def separate_steps(targets: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of a module without a forward, whose children are called by something else, each on its own."""
    calls = [Step(Kind.MODULE, target, ((0,),)) for target in targets]
    outputs = tuple((index + 1,) for index in range(len(calls)))
    return (Step(Kind.INPUT, "input"), *calls, Step(Kind.OUTPUT, "output", outputs, returns=0))


def encoder_layer_steps(layer: nn.TransformerEncoderLayer, *, has_module: bool) -> tuple[Step, ...]:
    """Return the steps of torch's transformer layer, whose forward asks too many questions to be traced.

    Args:
        layer: The layer.
        has_module: Whether its activation is a module; it may be a function.
    """
    steps = [Step(Kind.INPUT, "src")]

    def call(*targets: str) -> None:
        for target in targets:
            kind = Kind.OTHER if target == "activation" and not has_module else Kind.MODULE
            steps.append(Step(kind, target, ((len(steps) - 1,),)))

    def residual(norm: str, *targets: str) -> None:
        before = len(steps) - 1
        call(*((norm,) if layer.norm_first else ()), *targets)
        steps.append(Step(Kind.ADD, "add", ((before,), (len(steps) - 1,))))
        call(*(() if layer.norm_first else (norm,)))

    residual("norm1", "self_attn", "dropout1")
    residual("norm2", "linear1", "activation", "dropout", "linear2", "dropout2")
    return (*steps, Step(Kind.OUTPUT, "output", ((len(steps) - 1,),)))


def _read_step(node: fx.Node, number: dict[fx.Node, int], constants: set[fx.Node]) -> Step:
    if node.op == "call_module":
        keywords = tuple((key, _numbers(value, number)) for key, value in node.kwargs.items())
        return Step(Kind.MODULE, str(node.target), tuple(_numbers(value, number) for value in node.args), keywords)
    inputs = tuple((number[parent],) for parent in node.all_input_nodes)
    kinds = {"placeholder": Kind.INPUT, "get_attr": Kind.CONSTANT, "output": Kind.OUTPUT}
    if node.op in kinds:
        returns = _returned(node.args[0]) if node.op == "output" else None
        return Step(kinds[node.op], str(node.target), inputs, returns=returns)
    method = str(node.target) if node.op == "call_method" else ""
    if method in _QUESTIONS or (node.target is getattr and node.args[1] in _ATTRIBUTES):
        return Step(Kind.CONSTANT, method or str(node.args[1]))
    name = method or getattr(node.target, "__name__", str(node.target))
    item = node.args[1] if node.target is operator.getitem and type(node.args[1]) is int else None
    kind = _kind_of_function(node, method, constants)
    scaled = _scaled(node) if kind == Kind.ADD else None
    return Step(kind, name, inputs, layout=_layout(node, name), item=item, scaled=scaled)


def _scaled(node: fx.Node) -> int | None:
    """Return the place among the inputs of an addition of what it multiplies: the second value, by `alpha`."""
    alpha = node.args[1] if len(node.args) > 2 else node.kwargs.get("alpha", 1)  # (input, alpha, other) of old
    other = node.kwargs.get("other", node.args[-1] if node.args else None)
    if not isinstance(other, fx.Node) or (isinstance(alpha, int | float) and abs(alpha) == 1):
        return None
    return node.all_input_nodes.index(other)


def _returned(output: Any) -> int | None:
    """Describe what a forward returns, see :class:`Step`."""
    if isinstance(output, fx.Node):
        return None
    return len(output) if isinstance(output, tuple | list) and output and isinstance(output[0], fx.Node) else 0


def _numbers(argument: Any, number: dict[fx.Node, int]) -> tuple[int, ...]:
    """Number the nodes in an argument, which may be a list or a dict of them."""
    found: list[int] = []
    fx.node.map_arg(argument, lambda node: found.append(number[node]))
    return tuple(found)


def _kind_of_function(node: fx.Node, method: str, constants: set[fx.Node]) -> Kind:
    values = [value for value in node.all_input_nodes if value not in constants]
    if method in ("add", "add_") or _is_one_of(node, _ADDITIONS):
        return Kind.ADD if len(values) > 1 else Kind.OTHER
    if _is_one_of(node, OPERATOR_FUNCTIONS) or method == "matmul":
        return Kind.OPERATOR if len(values) == 1 else Kind.OTHER
    if node.target is F.batch_norm:
        return Kind.BATCH_NORM
    if is_idle_dropout(node):
        return Kind.IDENTITY
    if method == "flatten" or node.target is torch.flatten or _makes_vectors(node, method):
        return Kind.FLATTEN
    return Kind.OTHER


def _layout(node: fx.Node, name: str) -> Layout:
    if node.op == "call_function":
        axis = next((axis for fn, axis in _NEURON_AXIS_OF_FUNCTION.items() if node.target is fn), None)
        if axis is not None:
            return ("set", _of_product(node) if name == "matmul" else axis)
    elif name in ("matmul", "bmm"):
        return ("set", -1)
    arguments: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    whole = all(isinstance(argument, int) for argument in arguments)
    if name == "permute":
        axes = arguments[0] if arguments and isinstance(arguments[0], tuple | list) else arguments
        return ("permute", tuple(axes)) if all(isinstance(axis, int) for axis in axes) else _LOSE
    if name in ("transpose", "transpose_", "swapaxes", "swapdims"):
        return ("swap", *arguments) if whole else _LOSE
    if name in ("movedim", "moveaxis"):
        return ("move", *arguments) if whole else _LOSE
    if name == "getattr" and node.args[1] in ("mT", "T"):
        return ("swap", -2, -1)
    if name == "flatten":
        ends = (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
        return ("flatten", *ends) if all(isinstance(axis, int) for axis in ends) else _LOSE
    if name in ("unsqueeze", "stack"):
        place = _argument(node, 1, "dim", 0)
        return ("insert", place) if isinstance(place, int) else _LOSE
    if _makes_vectors(node, name):
        return ("flatten", 1, -1)
    if name in ("view", "reshape", "unflatten", "rearrange", "squeeze", "view_as", "reshape_as"):
        return _LOSE
    if name in ("cat", "concat", "concatenate"):
        return _join(node)
    if name == "einsum":
        return _einsum(node)
    if name == "getitem" and isinstance(node.args[1], tuple):
        return _pick(node.args[1])
    return _KEEP


def _join(node: fx.Node) -> Layout:
    """Return the axis of a concatenation, and which of the inputs is joined at each place."""
    joined, place = node.args[0] if node.args else node.kwargs.get("tensors"), _argument(node, 1, "dim", 0)
    inputs = node.all_input_nodes
    if not isinstance(joined, tuple | list) or not isinstance(place, int) or not set(inputs).issuperset(joined):
        return _KEEP
    return ("join", place, tuple(inputs.index(value) for value in joined))


def _of_product(node: fx.Node) -> int:
    """Return the axis of the rows where a weight stands on the left of a product, that of the columns elsewhere."""
    left = node.args[0]
    return -2 if isinstance(left, fx.Node) and left.op == "get_attr" else -1


def _einsum(node: fx.Node) -> Layout:
    """Return the axis of the one index that a weight brings in."""
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return _LOSE
    read, _, made = equation.replace(" ", "").partition("->")
    values, *weights = read.split(",")
    new = [index for index in made if index not in values]
    return ("set", made.index(new[0])) if len(weights) == 1 and len(new) == 1 else _LOSE


def _pick(key: tuple[Any, ...]) -> Layout:
    """Return where each axis goes under an index of whole slices and new axes."""
    if not any(part is None for part in key):
        return _KEEP
    if not all(part is None or isinstance(part, slice) for part in key):
        return _LOSE
    return ("pick", tuple(place for place, part in enumerate(key) if part is not None))


def is_idle_dropout(node: fx.Node) -> bool:
    """Tell whether a node calls a functional dropout that is off, as in eval mode."""
    return _is_one_of(node, _DROPOUTS) and _argument(node, 2, "training", True) is False


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _makes_vectors(node: fx.Node, name: str) -> bool:
    """Tell whether a view or reshape leaves the batch axis and one other."""
    if name not in ("view", "reshape") and getattr(node.target, "__name__", "") != "reshape":
        return False
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    return len(sizes) == 2


def _is_one_of(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    return node.op == "call_function" and any(node.target is function for function in functions)


def neuron_axis_after(layout: Layout, axis: int | None) -> int | None:
    """Return the neuron axis of a step's value, from that of its input."""
    match layout:
        case ("set", int(there)):
            return there
        case ("lose",):
            return None
        case ("flatten", 1, -1):
            return 1  # vectors: the axes 1 and -1 are one
        case ("flatten", first, last):
            return axis if (axis == 1 and first >= 2) or (axis == -1 and last >= 0) else None
        case ("permute", axes) if axis is not None and -len(axes) <= axis < len(axes):
            place = [a % len(axes) for a in axes].index(axis % len(axes))
            return -1 if place == len(axes) - 1 else place
        case ("swap", first, second) if axis is not None:
            if axis in (first, second):
                return second if axis == first else first
            return axis if (axis < 0) == (first < 0) == (second < 0) else None  # else it takes the number of axes
        case ("move", source, target) if axis == source:
            return int(target)
        case ("insert", place) if axis is not None:
            if axis >= 0:
                return axis + 1 if 0 <= place <= axis else axis
            return axis - 1 if place == -1 else axis
        case ("pick", places) if axis is not None and -len(places) <= axis < len(places):
            return int(places[axis])
        case ("keep",) | ("join", _, _):
            return axis
    return None


def _likely_axis_after(layout: Layout, axis: int | None) -> int | None:
    """Return the neuron axis after a swap that names one side by its distance from the end, for three axes."""
    if layout[0] == "swap" and axis is not None:
        after = neuron_axis_after(("swap", layout[1] % 3, layout[2] % 3), axis % 3)
        return -1 if after == 2 else after
    return axis


@dataclass
class FlowNode:
    """What one value went through last.

    Attributes:
        kind: What made it.
        name: Qualified name of the module, or of the module that calls the function, and the function's.
        inputs: The nodes it came from.
        axis: The neuron axis, None where only what reads it can tell.
        earlier_axis: The neuron axis before it was lost.
        layout: What became of that axis.
        module: The module that made it, if one did.
        item: Which item of a sequence it is, if it was taken from one by its place.
        scaled: The place among its inputs of the value that an addition multiplies by ``alpha``, if it does.
    """

    kind: Kind
    name: str
    inputs: tuple["FlowNode", ...] = ()
    axis: int | None = None
    earlier_axis: int | None = None
    layout: Layout = _KEEP
    module: nn.Module | None = None
    item: int | None = None
    scaled: int | None = None
    readers: list["FlowNode"] = field(default_factory=list, repr=False)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(eq=False)
class Call:
    """One call of a module that is no activation: which nodes of the flow it made, from which values.

    Attributes:
        name: Qualified name of the module.
        module: The module.
        inputs: The values among its arguments, those by position first.
        first: The number of the first node that it made, as far as it made any.
        end: The number of the first node that was made after it.
        output: What came out.
        returns: None if that is what the module returns, or if its forward can't be traced; the length of a tuple that
            has it in the first place; 0 for anything else.
    """

    name: str
    module: nn.Module
    inputs: tuple[FlowNode, ...]
    first: int
    end: int = 0
    output: FlowNode | None = None
    returns: int | None = None


class Flow:
    """The flow of values through a whole model.

    Attributes:
        nodes: What the values pass, in execution order.
        calls: The calls of modules, in execution order, an outer one before those that it makes.
    """

    def __init__(self) -> None:
        self.nodes: list[FlowNode] = []
        self.calls: list[Call] = []

    def add(
        self,
        kind: Kind,
        name: str,
        inputs: Sequence[FlowNode] = (),
        layout: Layout = _KEEP,
        module: nn.Module | None = None,
        item: int | None = None,
        scaled: int | None = None,
    ) -> FlowNode:
        """Add a node after others."""
        known = next((node.axis for node in inputs if node.axis is not None), None)
        axis = neuron_axis_after(layout, known)
        earlier = next((node.earlier_axis for node in inputs if node.earlier_axis is not None), None)
        earlier = _likely_axis_after(layout, earlier)
        before = earlier if axis is None else axis
        node = FlowNode(kind, name, tuple(inputs), axis, before, layout, module, item, scaled)
        for parent in inputs:
            parent.readers.append(node)
        self.nodes.append(node)
        return node

    def add_leaf(self, module: nn.Module, name: str, inputs: Sequence[FlowNode]) -> FlowNode:
        """Add a layer that is not looked into."""
        layout: Layout = _KEEP
        for axis, classes in _NEURON_AXIS.items():
            if isinstance(module, classes):
                layout = ("set", axis)
        if isinstance(module, nn.Flatten):
            layout = ("flatten", module.start_dim, module.end_dim)
        elif isinstance(module, nn.Unflatten):
            layout = _LOSE
        return self.add(_kind_of_module(module), name, inputs, layout, module)

    def neuron_axis(self, node: FlowNode) -> int:
        """Return the neuron axis at a node; where the way there does not tell it, the next to read it does.

        Where neither does, it is taken to be what it was before a reshape hid it.
        """
        if node.axis is not None:
            return node.axis
        seen, queue = {node}, [node]
        while queue:
            for reader in queue.pop(0).readers:
                if reader.layout[0] == "set":
                    return int(reader.layout[1])
                if reader.layout[0] in ("keep", "join") and reader not in seen:
                    seen.add(reader)
                    queue.append(reader)
        return 1 if node.earlier_axis is None else node.earlier_axis


def _kind_of_module(module: nn.Module) -> Kind:
    if isinstance(module, OPERATORS):
        return Kind.OPERATOR
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return Kind.BATCH_NORM
    if isinstance(module, _IDENTITIES) or getattr(module, "computes_identity", False):
        return Kind.IDENTITY
    return Kind.FLATTEN if isinstance(module, nn.Flatten) else Kind.OTHER
