"""Which steps of a flow pass the shape of a value on, followed symbolically, without an example input.

Of a value the axis and the number of its neurons are known where a layer tells; all other sizes are one thing, which
has no numbers. What is not known, after a view, a permutation or a product of two values, is taken to fit at the
addition that follows, as both sides of a residual addition do. What is known to broadcast there (another number of
channels, a pooled value) does not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import instancenorm, pooling

from lightning_easier.sites.dataflow import Call, Flow, FlowNode, Kind, neuron_axis_after
from lightning_easier.sites.feeding import Constants, attribute, function_name
from lightning_easier.sites.rectifiers import GATES, RECTIFIERS, function_names

_KEEPING_MODULES: tuple[type[nn.Module], ...] = (
    *RECTIFIERS, *GATES.values(), nn.LogSigmoid, nn.LogSoftmax, nn.Softmin, nn.Threshold, nn.LayerNorm, nn.RMSNorm,
    nn.GroupNorm, instancenorm._InstanceNorm, nn.LocalResponseNorm, nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
)  # fmt: skip
NORM_FUNCTIONS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm")
# By name, as functions and methods, in place or not: their result has the shape of the first value they are given.
_KEEPING_FUNCTIONS = frozenset(
    {*function_names(GATES), *NORM_FUNCTIONS, "contiguous", "clone", "detach", "to", "type", "type_as", "float",
     "half", "bfloat16", "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
     "feature_alpha_dropout", "stochastic_depth", "logsigmoid", "log_softmax", "clamp", "clip", "abs", "neg", "sqrt",
     "rsqrt", "exp", "log", "square", "erf", "sin", "cos", "roll", "flip", "normalize", "masked_fill", "nan_to_num",
     "pow", "reciprocal", "sign", "tril", "triu", "sort", "cumsum"}
)  # fmt: skip
# Element by element; of one value and constants, the result has its shape.
_MERGING_FUNCTIONS = frozenset(
    {"add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv", "maximum", "minimum", "where",
     "addcmul", "lerp"}
)  # fmt: skip
POOL_FUNCTIONS = frozenset(
    f"{pool}_pool{dims}d" for dims in (1, 2, 3) for pool in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")
)
_SHRINKING_FUNCTIONS = POOL_FUNCTIONS | {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "prod", "logsumexp", "argmax", "select", "median"
}  # fmt: skip
POOLS: tuple[type[nn.Module], ...] = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._LPPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip


class _Sizes:
    """All sizes of a value but that of its neurons.

    Attributes:
        above: Those that they are smaller than, pooled or strided.
        axis: The axis of the neurons of the value that they were made for, as soon as a layer that reads it tells.
        width: How many neurons that has, likewise.
    """

    def __init__(self, above: frozenset["_Sizes"] = frozenset()) -> None:
        self.above = above
        self.axis: int | None = None
        self.width: int | None = None


@dataclass(frozen=True)
class _Shape:
    """The shape of a value; axis and width of the neurons are those of its sizes where they are None."""

    sizes: _Sizes
    own_axis: int | None = None
    own_width: int | None = None

    @property
    def axis(self) -> int | None:
        return self.sizes.axis if self.own_axis is None else self.own_axis

    @property
    def width(self) -> int | None:
        return self.sizes.width if self.own_width is None else self.own_width

    @property
    def smaller(self) -> frozenset[_Sizes]:
        """What a value after this one is smaller than if this step takes something away."""
        return self.sizes.above | {self.sizes}

    def is_read(self, axis: int, width: int | None) -> bool:
        """Tell whether the neurons lie on the axis that a layer reads; if nothing has told it yet, the layer does."""
        if self.axis is None:
            self.sizes.axis = axis
        if self.axis == axis and self.width is None:
            self.sizes.width = width
        return self.axis == axis

    def is_below(self, other: "_Shape") -> bool:
        return other.sizes in self.sizes.above

    def differs(self, other: "_Shape") -> bool:
        """Tell whether the numbers of neurons are known, and not the same."""
        if self.axis != other.axis or self.width is None or other.width is None:
            return False
        return self.width != other.width


class Shapes:
    """Follows shapes through a flow.

    Attributes:
        kept: Node -> the inputs that have the shape of its value, of nodes that pass their input on: norms,
            activations, dropouts, scales, additions.
        unpacked: The nodes that take an item out of the tuple that a module returned.
    """

    def __init__(self, model: nn.Module, flow: Flow, constants: Constants) -> None:
        self._model = model
        self._constants = constants
        self._shapes: dict[FlowNode, _Shape] = {}
        self.kept: dict[FlowNode, tuple[FlowNode, ...]] = {}
        self.unpacked = _unpacked(flow)
        for node in flow.nodes:
            if node not in constants:
                self._shapes[node] = self._after(node)

    def axis(self, node: FlowNode) -> int | None:
        """Return the axis of the neurons of a value; None where nothing tells."""
        shape = self._shapes.get(node)
        return None if shape is None else shape.axis

    def _after(self, node: FlowNode) -> _Shape:
        values = self._constants.values(node)
        read = [self._shapes[value] for value in values]
        name = function_name(node)
        if not values or node.kind == Kind.UNKNOWN:
            return _Shape(_Sizes())
        if node in self.unpacked:
            return self._keep(node, values) if node.item == 0 else _new(read)
        if node.kind == Kind.OTHER and name == "outputs":
            return self._keep(node, values) if values[0] is node.inputs[0] else _new(read)
        if node.kind == Kind.OPERATOR:
            return self._after_operator(node, read[0])
        if node.kind == Kind.ADD:
            return self._after_addition(node, values)
        if node.kind in (Kind.IDENTITY, Kind.BATCH_NORM, Kind.ACTIVATION, Kind.OUTPUT):
            _read_by_norm(node.module, read[0])
            return self._keep(node, values)
        if node.module is not None:
            return self._after_module(node, values)
        if name in _MERGING_FUNCTIONS:
            if len(values) == 1:
                return self._keep(node, values) if self._fits_constants(node, read[0]) else _new(read)
            joined = _joined(read)
            scaled = [value for value in values if self._shapes[value] is joined]
            if all(shape is joined or shape.is_below(joined) for shape in read) and len(scaled) == 1:
                return self._keep(node, scaled)  # by what was pooled, as a norm does that is written out
            return joined
        if name in _KEEPING_FUNCTIONS:
            return self._keep(node, values)
        if name in _SHRINKING_FUNCTIONS:
            return _Shape(_Sizes(read[0].smaller))
        if node.layout[0] == "join":
            return _concatenated(node, read)
        axis = neuron_axis_after(node.layout, read[0].axis)
        if node.layout[0] in ("permute", "swap", "move") and axis is not None:
            return _Shape(_Sizes(read[0].sizes.above), axis, read[0].width)
        return _new(read)

    def _keep(self, node: FlowNode, values: Sequence[FlowNode]) -> _Shape:
        self.kept[node] = (values[0],)
        return self._shapes[values[0]]

    def _after_operator(self, node: FlowNode, read: _Shape) -> _Shape:
        module = node.module
        if module is None:  # a class of somebody else's calls the function with what is its own
            owner = submodule(self._model, node.name.rpartition(".")[0])
            module = owner if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd) else None
        if isinstance(module, nn.Linear):
            matches = read.is_read(-1, module.in_features)
            return _Shape(read.sizes if matches else _Sizes(read.sizes.above), -1, module.out_features)
        if isinstance(module, nn.modules.conv._ConvNd):
            matches = read.is_read(1, module.in_channels)
            if matches and node.module is not None and _keeps_maps(module):
                return _Shape(read.sizes, 1, module.out_channels)
            shrinks = not module.transposed and any(step > 1 for step in module.stride)
            return _Shape(_Sizes(read.smaller if shrinks else read.sizes.above), 1, module.out_channels)
        return _Shape(_Sizes(read.sizes.above))

    def _after_addition(self, node: FlowNode, values: Sequence[FlowNode]) -> _Shape:
        shapes = [self._shapes[value] for value in values]
        first, second = shapes[0], shapes[-1]
        carried = tuple(
            value
            for value, shape, other in ((values[0], first, second), (values[-1], second, first))
            if not shape.is_below(other) and not shape.differs(other)
        )
        if len(values) != 2 or not self._fits_constants(node, first):
            return _joined(shapes)
        self.kept[node] = tuple(dict.fromkeys(carried))
        return _joined(shapes)

    def _after_module(self, node: FlowNode, values: Sequence[FlowNode]) -> _Shape:
        read = [self._shapes[value] for value in values]
        module = node.module
        if isinstance(module, _KEEPING_MODULES):
            _read_by_norm(module, read[0])
            return self._keep(node, values)
        if isinstance(module, POOLS):
            return read[0] if _keeps_positions(module) else _Shape(_Sizes(read[0].smaller))
        if isinstance(module, nn.MultiheadAttention):
            matches = read[0].is_read(-1, module.embed_dim)
            return _Shape(read[0].sizes if matches else _Sizes(), -1, module.embed_dim)
        if isinstance(module, nn.RNNBase):
            width = module.hidden_size * (2 if module.bidirectional else 1)
            read[0].is_read(-1, module.input_size)
            return _Shape(read[0].sizes, -1, width) if not getattr(module, "proj_size", 0) else _new(read)
        return _new(read)

    def _fits_constants(self, node: FlowNode, shape: _Shape) -> bool:
        """Tell whether no constant that a step reads is known to spread the one neuron of a value over several."""
        tensors = (attribute(self._model, each.name) for each in node.inputs if each.kind == Kind.CONSTANT)
        return shape.width != 1 or not any(tensor is not None and tensor.numel() > 1 for tensor in tensors)


def _new(read: Sequence[_Shape]) -> _Shape:
    """Return the shape of a value of which only this is known: it is smaller than all that each value read is."""
    above = frozenset.intersection(*(shape.sizes.above for shape in read)) if read else frozenset()
    return _Shape(_Sizes(above))


def _joined(read: Sequence[_Shape]) -> _Shape:
    """Return the shape of what is computed element by element: that of the value which nothing is larger than."""
    largest = read[0]
    for shape in read[1:]:
        if largest.is_below(shape) or (not shape.is_below(largest) and largest.width == 1 and shape.width != 1):
            largest = shape
    return largest


def _concatenated(node: FlowNode, read: Sequence[_Shape]) -> _Shape:
    """Return the shape of a concatenation, which is known if it joins neurons of values of the same sizes."""
    _, place, which = node.layout
    widths = [shape.width for shape in read]
    alike = len(which) == len(read) and all(
        shape.sizes is read[0].sizes and shape.axis == place and shape.width is not None for shape in read
    )
    if not alike:
        return _new(read)
    return _Shape(read[0].sizes, place, sum(width for width in widths if width is not None))


def _read_by_norm(module: nn.Module | None, shape: _Shape) -> None:
    """Let a norm tell where the neurons of what it reads are."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | instancenorm._InstanceNorm):
        shape.is_read(1, module.num_features)
    elif isinstance(module, nn.GroupNorm):
        shape.is_read(1, module.num_channels)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        shape.is_read(-1, module.normalized_shape[0])


def _keeps_maps(conv: nn.modules.conv._ConvNd) -> bool:
    """Tell whether a convolution has as many positions in its output as in its input, whatever their number."""
    if conv.transposed or any(step != 1 for step in conv.stride):
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same" or all(size == 1 for size in conv.kernel_size)
    return all(
        2 * padding == spread * (size - 1)
        for padding, spread, size in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )


def _keeps_positions(pool: Any) -> bool:
    """Tell whether a pooling has as many positions in its output as in its input, whatever their number."""
    if not isinstance(pool, pooling._MaxPoolNd | pooling._AvgPoolNd):
        return False

    def all_are(value: Any, wanted: Any) -> bool:
        return bool(value == wanted) if isinstance(value, int) else all(each == wanted for each in value)

    like: Any = pool
    size = like.kernel_size if isinstance(like.kernel_size, int) else like.kernel_size[0]
    is_odd = size % 2 == 1 and all_are(like.kernel_size, size)
    is_dense = all_are(like.stride, 1) and all_are(getattr(like, "dilation", 1), 1)
    return is_odd and is_dense and all_are(like.padding, size // 2)


def _unpacked(flow: Flow) -> set[FlowNode]:
    """Return the nodes that take an item out of the tuple that a module returned."""
    place = {node: index for index, node in enumerate(flow.nodes)}
    found: set[FlowNode] = set()
    for call in flow.calls:
        assert call.output is not None
        after = [node for node in call.output.readers if node.item is not None and place[node] >= call.end]
        if call.returns or tuple_length(call):
            found.update(after)
    return found


def tuple_length(call: Call) -> int | None:
    """Return the length of the tuple that a module returns; None for one value.

    Of a forward that can't be traced, its caller tells it if it takes the tuple apart.
    """
    assert call.output is not None
    if call.output.kind != Kind.UNKNOWN or call.returns is not None:
        return call.returns
    items = [node.item for node in call.output.readers]
    return len(items) if len(items) > 1 and items == list(range(len(items))) else None


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return a submodule by its qualified name; None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
