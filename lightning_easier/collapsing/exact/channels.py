"""Follow every channel through a captured graph: which leave only together, which are constant, what may be cut.

A *channel* of a value is a place along the axis that an operator has written. What treats each channel alone passes it
on: in all of these values it is one channel, and leaves all or none of them. So do the channels that an addition adds.
A *constant* is what all numbers of a channel are whatever the input, at every size; inputs are taken to be finite.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.algebra.slices import OPERATORS, Connections, constant_outputs
from lightning_easier.collapsing.exact.chains import Uses, describe_node, is_question, module_of
from lightning_easier.collapsing.exact.labels import Channels, Labels, Operated
from lightning_easier.collapsing.exact.links import Link
from lightning_easier.collapsing.exact.nodes import (
    ALIASES,
    bind,
    call_alone,
    changes_its_input,
    is_shared,
    name_of,
    shape_of,
)
from lightning_easier.collapsing.exact.reading import Reader
from lightning_easier.collapsing.exact.rules.rule import Call
from lightning_easier.sites.rectifiers import FunctionalPReLU, is_activation
from lightning_easier.structure.stand_in import AffineStandIn
from lightning_easier.support.inference import has_hooks

# What treats every number alone, and has no others
_ELEMENTWISE = (
    nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink,
    nn.LogSigmoid, nn.Threshold,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = frozenset(
    [
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "celu",
        "celu_",
        "selu",
        "selu_",
        "gelu",
        "silu",
        "silu_",
        "mish",
        "mish_",
        "hardswish",
        "hardswish_",
        "softplus",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "hardsigmoid",
        "hardsigmoid_",
        "hardtanh",
        "hardtanh_",
        "softsign",
        "abs",
        "clamp",
        "clamp_",
        "clamp_min",
        "clamp_max",
        "clip",
        "square",
        "sqrt",
        "exp",
        "erf",
        "logsigmoid",
        "log_sigmoid",
        "threshold",
    ]
)
_FOR_EACH_CHANNEL = (nn.PReLU, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_MAX_POOLS_BY_NAME = {f"{kind}max_pool{axes}d": axes for kind in ("", "adaptive_") for axes in (1, 2, 3)}
_RESIZED = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
_RESIZED_BY_NAME = ("interpolate", "upsample_nearest", "upsample_linear", "upsample_bilinear", "upsample_trilinear")
_COPIES = ("contiguous", "clone", "detach", "to", "_to_copy", "float", "double", "half", "bfloat16", "type_as", "alias")
_BINARY: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("add", "add_", "iadd"), torch.add),
    **dict.fromkeys(("sub", "sub_", "isub", "subtract"), torch.sub),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), torch.mul), "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip
_CONCATENATIONS = ("cat", "concat", "concatenate")
_VIEWS = ("view", "reshape")

_logger = logging.getLogger(__name__)


class ChannelFlow:
    """The channels of all values in a captured graph.

    Args:
        captured: The graph, with the shapes met on the way.

    Attributes:
        graph: Its graph.
        channels: Node -> its channels; those of other nodes are not known, and stay.
        operators: Node -> the operator that it calls, where that may change.
        names: Node -> what a report calls it, for all that call operators.
        for_each: Node -> what it reads, and a module that computes it and has a number for each channel.
        named: Layouts that name the number of channels.
        kept: Label -> why it can't leave.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self.graph = captured.graph
        self._reader = Reader(captured)
        self._uses = Uses(captured)
        self._labels = Labels()
        self.channels: dict[fx.Node, Channels] = {}
        self.operators: dict[fx.Node, Operated] = {}
        self.names: dict[fx.Node, str] = {}
        self.for_each: dict[fx.Node, tuple[fx.Node, nn.Module]] = {}
        self.named: set[fx.Node] = set()
        spoiled = self._spoiled()
        with torch.no_grad():
            for node in captured.graph.nodes:
                found = self._read(node)
                if found is not None and node in spoiled:
                    self._labels.keep(found.labels, "something writes into a value of theirs that is read besides")
                    found = Channels(found.axis, found.labels, torch.full_like(found.constants, torch.nan))
                if found is not None:
                    self.channels[node] = found
        self._finish()

    @property
    def labels(self) -> int:
        """How many labels there are."""
        return len(self._labels)

    def value_of(self, node: fx.Node) -> fx.Node:
        """Return what an operator, or what has a number for each channel, reads."""
        return self.operators[node].value if node in self.operators else self.for_each[node][0]

    def _finish(self) -> None:
        """Give what leaves together one label."""
        roots = self._labels.roots()
        self.channels = {
            node: Channels(each.axis, roots[each.labels], each.constants) for node, each in self.channels.items()
        }
        self.operators = {
            node: replace(each, reads=None if each.reads is None else self.channels[each.value])
            for node, each in self.operators.items()
        }
        self.kept = self._labels.kept()

    def _spoiled(self) -> set[fx.Node]:
        """List the values that something writes into while something else reads them, under this or another name."""
        spoiled: set[fx.Node] = set()
        for node in self._captured.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or not changes_its_input(self._captured, node):
                continue
            first = node.args[:1] if name_of(node) and "out" not in node.kwargs else node.all_input_nodes
            if type(module_of(self._captured, node)) is AffineStandIn:
                continue
            for value in first:
                if isinstance(value, fx.Node) and is_shared(value):
                    spoiled |= _same_memory(value)
        return spoiled

    def _read(self, node: fx.Node) -> Channels | None:
        """Follow the channels through one node; those that it does anything else with have to stay."""
        if is_question(node) or self._asks_otherwise(node):
            return None
        values = [value for value in node.all_input_nodes if value in self.channels]
        try:
            found = self._passed_on(node, values)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            # an argument that is not what it is in all other calls, as where linear steps are read
            _logger.debug("the channels of %s are not followed: %s", node.format_node(), error)
            found = None
        if found is None:
            for value in values:
                self._labels.keep(self.channels[value].labels, self._said_of(node))
        return found

    def _said_of(self, node: fx.Node) -> str:
        reader = describe_node(self._captured, node)
        if node.op == "output":
            return f"{reader} has them"
        module = module_of(self._captured, node)
        if module is not None and has_hooks(module):
            return f"{reader} has hooks, which would see something else"
        return f"{reader} reads them, and is not known to treat each channel alone"

    def _asks_otherwise(self, node: fx.Node) -> bool:
        """Tell whether a node asks a value for what does not depend on its channels."""
        name = name_of(node)
        value = node.args[0] if node.args else None
        channels = self.channels.get(value) if isinstance(value, fx.Node) else None
        if channels is None or not isinstance(value, fx.Node):
            return False
        rank = len(shape_of(value) or ())
        if name in ("size", "sym_size") and len(node.args) == 2 and isinstance(node.args[1], int):
            return node.args[1] % rank != channels.axis
        if (name == "getattr" and node.args[1] == "shape") or (name == "size" and len(node.args) == 1):
            asked = [user.args[1] if name_of(user) == "getitem" else None for user in node.users]
            return all(isinstance(axis, int) and bool(axis % rank != channels.axis) for axis in asked)
        return name == "dim" or (name == "getattr" and str(node.args[1]) == "ndim")

    def _passed_on(self, node: fx.Node, values: Sequence[fx.Node]) -> Channels | None:
        """Return the channels of a node's value; None where those that it reads have to stay."""
        module = module_of(self._captured, node)
        if module is not None and (has_hooks(module) or "forward" in vars(module)):
            return None
        if not _is_of_numbers(node) or not all(map(_is_of_numbers, values)):
            return None
        link = self._reader.read(node)
        operated = self._operated(node, module, link)
        if operated is not None:
            return operated
        name, of_functions = name_of(node), node.op in ("call_function", "call_method")
        if of_functions and name == "zeros_like":
            return self._zeros(node)
        if not values:
            return None
        if of_functions and name in _CONCATENATIONS:
            return self._concatenated(node)
        if (of_functions and name == "prelu") or type(module) is FunctionalPReLU:
            return self._sloped(node)
        if len(values) == 1 and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            return self._norm_of_zeros(node, module, values[0])
        if len(values) == 1 and (type(module) in _FOR_EACH_CHANNEL or self._is_elementwise(node, module)):
            return self._of_each(node, module, values[0])
        if len(values) == 1 and (type(module) in (*_MAX_POOLS, *_RESIZED) or self._is_pooled(node)):
            return self._with_positions(node, module, values[0])
        if _is_idle_depth(node) and node.args[:1] == tuple(values):
            return self.channels[values[0]]
        if of_functions and name in _COPIES and node.args[:1] == tuple(values):
            return self.channels[values[0]]
        if link is not None and link.value in self.channels:
            return self._linear(node, link)
        return self._combined(node, values) if of_functions and name in _BINARY else None

    def _zeros(self, node: fx.Node) -> Channels | None:
        """Read zeros, as a branch that was taken out leaves; their channels are where an operator reads them."""
        shape = shape_of(node) or ()
        if len(shape) < 2:
            return None
        readers = [module_of(self._captured, user) for user in node.users]
        kinds = (*CONVOLUTIONS, *BATCH_NORMS, nn.GroupNorm)
        axis = 1 if any(type(reader) in kinds for reader in readers) else len(shape) - 1
        made = Channels(axis, self._labels.new(shape[axis]), torch.zeros(shape[axis], dtype=torch.float64))
        self._labels.keep(made.labels, "they are zeros, which no operator makes")
        return made

    def _norm_of_zeros(self, node: fx.Node, module: nn.Module, value: fx.Node) -> Channels | None:
        """Read a norm of each sample: of zeros it makes its offset, of anything else nothing is known."""
        channels, rank = self.channels[value], len(shape_of(value) or ())
        axis = 1 if isinstance(module, nn.GroupNorm) else rank - 1
        if bool((channels.constants != 0).any()) or channels.axis != axis:
            return None
        if not isinstance(module, nn.GroupNorm) and len(module.normalized_shape) != 1:  # type: ignore[arg-type]
            return None  # its offset is not one for each channel
        count, offset = len(channels.labels), getattr(module, "bias", None)
        made = torch.zeros(count, dtype=torch.float64) if offset is None else offset.detach().cpu().double()
        if not bool(made.isfinite().all()):
            return None
        self._labels.keep(channels.labels, self._said_of(node))
        labels = self._labels.new(len(made))
        self._labels.keep(labels, "they are what a norm makes of zeros")
        return Channels(axis, labels, made)

    def _operated(self, node: fx.Node, module: nn.Module | None, link: Link | None) -> Channels | None:
        """Read an operator: it ends the channels that it reads, and writes new ones."""
        operator, value = module, (next(iter(node.all_input_nodes), None) if module is not None else None)
        if type(module) not in OPERATORS:
            if link is None or not link.carries_weight:
                return None
            operator, value = link.operator, link.value
        assert operator is not None
        shape = shape_of(value)
        if value is None or not shape or (len(node.all_input_nodes) > 1 and module is not None):
            return None
        axes = 0 if isinstance(operator, nn.Linear) else len(operator.kernel_size)  # type: ignore[arg-type]
        if len(shape) < 2 or (axes and len(shape) != axes + 2):
            return None  # one sample, without its axis
        axis = 1 if axes else len(shape) - 1
        reads = self.channels.get(value)
        if reads is not None and reads.axis != axis:
            self._labels.keep(reads.labels, self._said_of(node))
            reads = None
        given = torch.full((shape[axis],), torch.nan, dtype=torch.float64) if reads is None else reads.constants
        connections = Connections.of(operator)
        constants = constant_outputs(operator, connections, given)
        written = Channels(axis, self._labels.new(len(constants)), constants)
        reason = self._uses.why_separate(node)
        self.names[node] = name = str(node.target) if module is not None else node.name
        if reason is None:
            self.operators[node] = Operated(node, name, value, operator, connections, reads)
            return written
        for each in (reads, written):
            if each is not None:
                self._labels.keep(each.labels, reason)
        return written

    def _is_elementwise(self, node: fx.Node, module: nn.Module | None) -> bool:
        if len(node.all_input_nodes) != 1:
            return False
        if module is not None:
            return type(module) in _ELEMENTWISE or is_activation(module)
        return name_of(node) in _ELEMENTWISE_FUNCTIONS

    def _is_pooled(self, node: fx.Node) -> bool:
        name = name_of(node)
        return name in _MAX_POOLS_BY_NAME or name.startswith(_RESIZED_BY_NAME)

    def _of_each(self, node: fx.Node, module: nn.Module | None, value: fx.Node) -> Channels | None:
        """Pass channels through what treats each number, or each channel, alone."""
        channels, rank = self.channels[value], len(shape_of(value) or ())
        if module is None and node.args[:1] != (value,):
            return None
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            pass
        elif module is not None and any(True for _ in module.parameters()):
            if type(module) not in _FOR_EACH_CHANNEL or channels.axis != 1:
                return None
            if not isinstance(module, nn.PReLU) and rank != _axes_of(module) + 2:
                return None  # one sample, without its axis
            reason = self._uses.why_separate(node)
            if reason is not None:
                self._labels.keep(channels.labels, reason)
            self.for_each[node] = value, module
        elif type(module) in _FOR_EACH_CHANNEL and (channels.axis != 1 or rank != _axes_of(module) + 2):
            return None
        call: Callable[[Tensor], Tensor]
        if module is not None:
            call = deepcopy(module).cpu().double()
        else:

            def call(numbers: Tensor) -> Tensor:
                return call_alone(node, numbers)

        shape = [1] * channels.axis + [-1] + [2] * (rank - channels.axis - 1)
        numbers = channels.constants.view([1] * channels.axis + [-1] + [1] * (rank - channels.axis - 1))
        numbers = numbers.expand([len(channels.constants) if size == -1 else size for size in shape]).clone()
        made = call(numbers).movedim(channels.axis, 0).flatten(1)
        return self._with_constants(channels, made[:, 0])

    def _sloped(self, node: fx.Node) -> Channels | None:
        """Read ``torch.nn.functional.prelu`` of constant slopes as the module."""
        given = bind(node, "input weight")
        value, slopes = given.get("input"), Call(self._captured, node).constant(given.get("weight"))
        if not isinstance(value, fx.Node) or value not in self.channels or not isinstance(slopes, Tensor):
            return None
        module = nn.PReLU(slopes.numel(), device="meta").eval()
        module.weight = nn.Parameter(slopes.detach().reshape(-1), slopes.requires_grad)
        return self._of_each(node, module, value)

    def _with_constants(self, channels: Channels, constants: Tensor) -> Channels:
        constants = constants.masked_fill(channels.constants.isnan() | ~constants.isfinite(), torch.nan)
        return Channels(channels.axis, channels.labels, constants)

    def _with_positions(self, node: fx.Node, module: nn.Module | None, value: fx.Node) -> Channels | None:
        """Pass channels through a pooling by maxima, or what resizes maps: it has no number that is not there."""
        channels, rank = self.channels[value], len(shape_of(value) or ())
        after = shape_of(node)
        if channels.axis != 1 or after is None or len(after) != rank or after[1] != len(channels.labels):
            return None
        axes = _MAX_POOLS_BY_NAME.get(name_of(node)) or (_axes_of(module) if type(module) in _MAX_POOLS else None)
        if axes is not None and rank != axes + 2:
            return None  # one sample, without its axis
        arguments = bind(node, "input kernel_size stride padding dilation")
        padding, dilation = (
            arguments.get(key, getattr(module, key, default)) for key, default in (("padding", 0), ("dilation", 1))
        )
        if padding not in (0, (0,) * (rank - 2)) and dilation not in (1, (1,) * (rank - 2)):
            return self._with_constants(channels, torch.full_like(channels.constants, torch.nan))
        return channels

    def _linear(self, node: fx.Node, link: Link) -> Channels | None:
        """Pass channels through a linear step that is no operator: an affine, a layout, an average, a selection."""
        channels, before, after = self.channels[link.value], shape_of(link.value), shape_of(node)
        assert before is not None
        assert after is not None
        if link.unchanged:
            return channels
        if link.averaging is not None:
            axis = self._moved(link, channels.axis, len(before))
            constants = channels.constants
            if not link.averaging.weighs_evenly:
                constants = constants.masked_fill(constants != 0, torch.nan)
            return None if axis is None else Channels(axis, channels.labels, constants)
        if link.selects:
            selection: Any = link.operator
            if channels.axis != 1 or selection.groups != len(channels.labels) or before[1] != after[1]:
                return None
            passes = not any(selection.padding)
            constants = channels.constants if passes else channels.constants.masked_fill(
                channels.constants != 0, torch.nan
            )  # fmt: skip
            return Channels(1, channels.labels, constants)
        if link.operator is None:
            return self._laid_out(node, link)
        return self._scaled(node, link)

    def _moved(self, link: Link, axis: int, rank: int) -> int | None:
        """Return where a layout puts the axis of the channels."""
        after, moves = len(shape_of(link.node) or ()), link.moves or {}
        places = [moves[end] % after for end in (1, -1) if end % rank == axis and end in moves]
        return places[0] if places else None

    def _laid_out(self, node: fx.Node, link: Link) -> Channels | None:
        channels, before, after = self.channels[link.value], shape_of(link.value), shape_of(node)
        assert before is not None
        assert after is not None
        axis = self._moved(link, channels.axis, len(before))
        if link.keeps_samples and len(after) == 2 and channels.axis == 1:
            times, axis = prod(before[2:]), 1
        elif axis is None or after[axis] != len(channels.labels):
            return None
        else:
            times = 1
        if name_of(node) in _VIEWS:
            sizes = _sizes(node)
            if len(sizes) != len(after) or not isinstance(sizes[axis], int):
                return None
            if sizes[axis] != -1:
                self.named.add(node)
        return Channels(axis, channels.labels.repeat_interleave(times), channels.constants.repeat_interleave(times))

    def _scaled(self, node: fx.Node, link: Link) -> Channels | None:
        """Pass channels through an affine."""
        channels, rank = self.channels[link.value], len(shape_of(link.value) or ())
        affine: Any = link.operator if link.operator_on is None else link.operator_on(1 if channels.axis == 1 else -1)
        if not isinstance(affine, ChannelAffine) or affine.dim % rank != channels.axis:
            return None
        if link.operator_on is None:
            reason = self._uses.why_separate(node)
            if reason is not None:
                self._labels.keep(channels.labels, reason)
            self.for_each[node] = link.value, affine
        scale = affine.weight.detach().cpu().double()
        offset = torch.zeros_like(scale) if affine.bias is None else affine.bias.detach().cpu().double()
        made = torch.where(scale == 0, offset, channels.constants * scale + offset)
        return Channels(channels.axis, channels.labels, made.masked_fill(~made.isfinite(), torch.nan))

    def _concatenated(self, node: fx.Node) -> Channels | None:
        values: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        rank = len(shape_of(node) or ())
        if not isinstance(axis, int) or not isinstance(values, list | tuple) or "out" in node.kwargs:
            return None
        axis %= rank
        parts = [self.channels.get(value) for value in values]
        if any(part is not None and part.axis != axis for part in parts):
            return None
        known = [part or self._of_others(value, axis) for part, value in zip(parts, values, strict=True)]
        return Channels(
            axis, torch.cat([part.labels for part in known]), torch.cat([part.constants for part in known])
        )  # fmt: skip

    def _of_others(self, value: fx.Node, axis: int) -> Channels:
        """Return channels that nothing is known of, and that stay."""
        size = (shape_of(value) or ())[axis]
        made = Channels(axis, self._labels.new(size), torch.full((size,), torch.nan, dtype=torch.float64))
        self._labels.keep(made.labels, f"{describe_node(self._captured, value)} has them")
        return made

    def _combined(self, node: fx.Node, values: Sequence[fx.Node]) -> Channels | None:
        """Pass channels through a sum, say: what it adds are channels that leave together."""
        operands = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
        if len(operands) != 2 or set(node.kwargs) - {"input", "other", "alpha"}:
            return None
        first, second = (self.channels.get(value) if isinstance(value, fx.Node) else None for value in operands)
        if first is None or second is None:
            return None
        ranks = {len(shape_of(value) or ()) for value in (*operands, node)}
        if first.axis != second.axis or len(first.labels) != len(second.labels) or len(ranks) != 1:
            return None
        self._labels.join(first.labels, second.labels)
        alpha: Any = node.kwargs.get("alpha", 1)
        kind = _BINARY[name_of(node)]
        made = kind(first.constants, second.constants * alpha)
        if kind is torch.mul:
            made[(first.constants == 0) | (second.constants == 0)] = 0.0
        return Channels(first.axis, first.labels, made.masked_fill(~made.isfinite(), torch.nan))


def _is_of_numbers(node: fx.Node) -> bool:
    """Tell whether a node's value is one tensor of floating point."""
    meta = node.meta.get("tensor_meta")
    return shape_of(node) is not None and meta is not None and meta.dtype.is_floating_point


def _axes_of(module: nn.Module | None) -> int:
    """Return the number of spatial axes that the name of a class tells."""
    return int(type(module).__name__[-2])


def _sizes(node: fx.Node) -> Sequence[Any]:
    """Return the sizes that a view or a reshape names."""
    sizes: Any = node.args[1:]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes


def _same_memory(value: fx.Node) -> set[fx.Node]:
    """List the nodes whose values share memory with one."""
    found, queue = {value}, [value]
    while queue:
        node = queue.pop()
        others: Iterable[fx.Node] = (
            *node.meta.get(ALIASES, ()), *(user for user in node.users if node in user.meta.get(ALIASES, ())),
        )  # fmt: skip
        for other in others:
            if other not in found:
                found.add(other)
                queue.append(other)
    return found


def _is_idle_depth(node: fx.Node) -> bool:
    """Tell whether a node calls torchvision's stochastic depth as in eval mode."""
    is_called = node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth"
    return is_called and bind(node, "input p mode training").get("training", True) is False
