"""Which linear map does a node of a captured graph compute?

A :class:`Link` is the answer: the operator that it equals, or what it does to the positions (averages them) or to the
place of the channels (a layout). Modules, functions, methods and the ATen operators of ``torch.export`` are read alike.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_easier.collapsing.algebra import convolutions
from lightning_easier.collapsing.algebra.affine import AFFINES, ChannelAffine, ElementAffine
from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, with_tensors
from lightning_easier.collapsing.algebra.operators import as_affine, structure
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.nodes import (
    IN_PLACE,
    bind,
    call_alone,
    changes_its_input,
    is_number_of_samples,
    is_shared,
    is_view,
    name_of,
    shape_of,
)
from lightning_easier.structure.stand_in import AffineStandIn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_POOLS_BY_NAME = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_POOLS_BY_NAME = {f"avg_pool{axes}d": kind for axes, kind in enumerate(_AVERAGE_POOLS, 1)}
_CONVOLUTIONS_BY_NAME = {
    **{f"conv{axes}d": kind for axes, kind in enumerate(CONVOLUTIONS, 1)},
    **{f"conv_transpose{axes}d": kind for axes, kind in enumerate(TRANSPOSED_CONVOLUTIONS, 1)},
}
_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_PERMUTATIONS = ("permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis")
_RESHAPES = ("flatten", "view", "reshape")
_COPIES = ("contiguous", "clone")
_CONVERSIONS = ("to", "type_as")
_MATRIX_PRODUCTS = {
    "linear": "value weight bias", "matmul": "value weight", "mm": "value weight", "addmm": "bias value weight",
}  # fmt: skip
_AFFINE = {"multiply": "mul", "subtract": "sub", "truediv": "div", "divide": "div", "true_divide": "div"}


_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Averaging:
    """An average over positions, each channel alone.

    Attributes:
        weighs_evenly: Whether the weights of each average add up to one, so that an offset passes unchanged.
        kernel: Channels -> the convolution that it equals; None where there is none for every input size.
    """

    weighs_evenly: bool
    kernel: Callable[[int], nn.Module] | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """One linear step in the data flow.

    Attributes:
        node: The node that computes it.
        value: The node that it reads.
        name: For a report.
        operator: The operator that it equals, if it is one.
        averaging: Said of an average over positions.
        moves: Where it puts the channels: axis before -> axis behind (1 or -1).
        counts: Whether it is an operation of its own, and not only another view of a value.
        unchanged: Whether it leaves every number in its place: a copy, a conversion.
        selects: Whether it copies channels and positions, between zeros perhaps: a slice, a padding.
        keeps_samples: Whether the first axis holds the samples behind it at every size.
        operator_on: Axis of the channels -> the operator, where it fits both: a number, or one for each element.
    """

    node: fx.Node
    value: fx.Node
    name: str
    operator: nn.Module | None = None
    averaging: Averaging | None = None
    moves: dict[int, int] | None = None
    counts: bool = True
    unchanged: bool = False
    selects: bool = False
    keeps_samples: bool = True
    operator_on: Callable[[int], nn.Module] | None = None

    @property
    def carries_weight(self) -> bool:
        """Whether it is a convolution or a product with a matrix as it stands."""
        linear = isinstance(self.operator, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
        return linear and self.averaging is None and not self.selects


def uses_batch_statistics(module: nn.Module) -> bool:
    """Tell whether a module is a batch norm in training mode, which normalises each batch by its own statistics."""
    return isinstance(module, BATCH_NORMS) and module.training


def structure_of(link: Link, operator: Any) -> nn.Module:
    """Return an operator without data, in the dtype that it has in the model."""
    return structure(operator).to(dtype=link.node.meta["tensor_meta"].dtype)


class Reader:
    """Reads the nodes of one captured graph.

    Args:
        captured: The graph, with the shapes met on the way.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured

    def read(self, node: fx.Node) -> Link | None:
        """Return the linear step that a node is, None if it is none."""
        if not shape_of(node):  # a single number has no channels
            return None
        try:
            link = self._read_module(node) if node.op == "call_module" else self._read_function(node)
        except (CannotMergeError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            # an argument that is not what it is in all other calls: another library's spelling is no error of ours
            _logger.debug("%s is not read as a linear step: %s", node.format_node(), error)
            return None
        if link is None or not shape_of(link.value) or not _is_floating(node, link.value):
            return None
        return None if changes_its_input(self._captured, node) and is_shared(link.value) else link

    def _read_module(self, node: fx.Node) -> Link | None:
        module: Any = self._captured.get_submodule(str(node.target))
        value = (*node.args, *node.kwargs.values())[0]
        if len(node.args) + len(node.kwargs) != 1 or not isinstance(value, fx.Node):
            return None  # an output_size, say
        before = shape_of(value)
        if before is None:
            return None
        name, kind = str(node.target), type(module)
        if kind in (nn.Linear, *AFFINES):
            return Link(node, value, name, module)
        if kind is AffineStandIn and module.dim % len(before) in (1, len(before) - 1):
            axis = -1 if module.dim % len(before) == len(before) - 1 else 1
            made = ChannelAffine(len(module.weight), axis, device="meta")
            made = with_tensors(made, module.weight, module.bias, module.weight.dtype)
            return Link(node, value, name, made.eval().requires_grad_(module.mark.trainable))
        if kind in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
            convolutions.padding_of(module)  # or it is not read
            return Link(node, value, name, module) if len(before) == len(module.kernel_size) + 2 else None
        if kind in BATCH_NORMS and not module.training:
            return Link(node, value, name, as_affine(deepcopy(module).double(), 1 if len(before) > 2 else -1))
        if kind in _AVERAGE_POOLS:
            return self._pool(node, value, name, module)
        if kind in _ADAPTIVE_POOLS:
            batched = len(before) == 2 + _ADAPTIVE_POOLS.index(kind) + 1
            return Link(node, value, name, averaging=Averaging(True), moves={1: 1}) if batched else None
        if kind is nn.Flatten:
            return self._reshaped(node, value, name)
        if kind in _ZERO_PADS and getattr(module, "value", 0) == 0:
            return self._with_zeros(node, value, name, module.padding)
        return None

    def _read_function(self, node: fx.Node) -> Link | None:
        name = name_of(node)
        name = IN_PLACE.get(name, name)
        plain = name.removesuffix("_")
        plain = _AFFINE.get(plain, plain)
        if plain in ("mul", "add", "sub", "div", "neg"):
            return self._affine(node, plain)
        if name in _CONVOLUTIONS_BY_NAME:
            return self._convolution(node, name)
        if name in ("linear", "matmul", "mm", "addmm"):
            return self._linear(node, name)
        if name == "batch_norm":
            return self._batch_norm(node)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        value = node.args[0]
        if name in _POOLS_BY_NAME:
            given = bind(node, "input kernel_size stride padding ceil_mode count_include_pad divisor_override")
            del given["input"]
            return self._pool(node, value, node.name, _POOLS_BY_NAME[name](**given))
        if name in _ADAPTIVE_POOLS_BY_NAME:
            batched = len(shape_of(value) or ()) == 3 + _ADAPTIVE_POOLS_BY_NAME.index(name)
            return Link(node, value, node.name, averaging=Averaging(True), moves={1: 1}) if batched else None
        if name == "mean":
            return self._mean(node, value)
        if name in _PERMUTATIONS:
            return self._permuted(node, value)
        if name in _RESHAPES:
            return self._reshaped(node, value, node.name)
        if name in _COPIES or (name in _CONVERSIONS and isinstance(node.args[1], fx.Node)):
            return self._unchanged(node, value)
        if name in ("getitem", "slice"):
            return self._picked(node, value, name)
        if name in ("pad", "constant_pad_nd"):
            return self._padded(node, value)
        return None

    def _affine(self, node: fx.Node, name: str) -> Link | None:
        """Read a product, sum, difference or quotient of a value and constants."""
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") or node.kwargs.get("out") is not None:
            return None
        arguments: list[Any] = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
        if name == "neg":
            arguments.append(-1.0)
        constants = [self._constant(argument) for argument in arguments]
        if len(arguments) != 2 or (constants[0] is None) == (constants[1] is None):
            return None
        reversed_ = constants[0] is not None
        constant, value = constants[0 if reversed_ else 1], arguments[1 if reversed_ else 0]
        shape = shape_of(value)
        if shape is None or shape != shape_of(node) or (reversed_ and name == "div"):
            return None
        dtype = value.meta["tensor_meta"].dtype
        trainable = isinstance(constant, Tensor) and constant.requires_grad
        if isinstance(constant, Tensor):
            if constant.dtype != dtype and constant.ndim > 0:
                return None
            if constant.numel() == 1 and constant.ndim <= len(shape):
                constant = constant.reshape(())
        else:
            constant = torch.tensor(float(constant), dtype=dtype, device=self._device())

        def make(axis: int, vector: Tensor) -> nn.Module:
            vector = vector.double()  # a quotient is not to be rounded twice
            ones = torch.ones_like(vector)
            scale, offset = {
                "mul": (vector, None), "neg": (vector, None), "div": (1 / vector, None), "add": (ones, vector),
                "sub": (-ones, vector) if reversed_ else (ones, -vector),
            }[name]  # fmt: skip
            made: nn.Module
            if vector.ndim == 1:
                made = ChannelAffine(len(vector), axis, device="meta")
            else:
                made = ElementAffine(vector.shape, axis, device="meta")
            return with_tensors(made, scale, offset, torch.float64).eval().requires_grad_(trainable)

        constant = constant.detach()
        if not bool(constant.isfinite().all()):  # a mask
            return None
        axis, vector = _as_channels(constant, shape)
        if axis is not None:
            return Link(node, value, node.name, make(axis, vector))
        for_each = constant.ndim > 0 and tuple(constant.shape) in (tuple(shape[1:]), (1, *shape[1:]))
        if constant.ndim > 0 and not for_each:
            return None

        def on(axis: int) -> nn.Module:
            return make(axis, constant.reshape(shape[1:]) if for_each else constant.expand(shape[axis]))

        return Link(node, value, node.name, on(1 if len(shape) > 2 else -1), operator_on=on)

    def _convolution(self, node: fx.Node, name: str) -> Link | None:
        kind = _CONVOLUTIONS_BY_NAME[name]
        transposed = kind in TRANSPOSED_CONVOLUTIONS
        names = "input weight bias stride padding dilation groups"
        given = bind(node, "input weight bias stride padding output_padding groups dilation" if transposed else names)
        value, weight = given.pop("input"), self._tensor(given.pop("weight"))
        bias = self._tensor(given.pop("bias", None))
        if weight is None or weight.ndim != len(shape_of(value) or ()):
            return None
        if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(given)):
            return None  # a stride, say, that depends on the size of the input
        if not transposed:
            made = convolutions.make_convolution(weight, bias, weight.dtype, **given)
            convolutions.padding_of(made)  # or it is not read
        else:
            made = convolutions.make_transposed_convolution(weight, bias, weight.dtype, **given)
        return Link(node, value, node.name, made.eval().requires_grad_(weight.requires_grad))

    def _linear(self, node: fx.Node, name: str) -> Link | None:
        given = bind(node, _MATRIX_PRODUCTS[name])
        value, weight, bias = given["value"], self._tensor(given["weight"]), self._tensor(given.get("bias"))
        if weight is None or weight.ndim != 2 or not isinstance(value, fx.Node):
            return None
        matrix = weight if name == "linear" else weight.T
        if name == "addmm":
            if bias is None or bias.shape != matrix.shape[:1]:
                return None
            # not rounded before the merge
            matrix, bias = matrix.double() * given.get("alpha", 1), bias.double() * given.get("beta", 1)
        made = nn.Linear(1, 1, bias is not None, device="meta")
        made.out_features, made.in_features = matrix.shape
        made = with_tensors(made, matrix, bias, matrix.dtype)
        return Link(node, value, node.name, made.eval().requires_grad_(weight.requires_grad))

    def _batch_norm(self, node: fx.Node) -> Link | None:
        names = "input running_mean running_var weight bias training momentum eps"
        if (
            isinstance(node.target, torch._ops.OpOverload) or node.target is torch.batch_norm
        ):  # not torch.nn.functional's
            names = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
        given = bind(node, names)
        if given.get("training", False) is not False or given.get("running_mean") is None:
            return None
        value = given["input"]
        tensors: dict[str, Any] = {
            key: self._tensor(given.get(key)) for key in ("running_mean", "running_var", "weight", "bias")
        }
        made = nn.BatchNorm1d(len(tensors["running_mean"]), eps=given.get("eps", 1e-5), device="meta")
        made.running_mean, made.running_var = tensors["running_mean"], tensors["running_var"]
        made.weight = nn.Parameter(_or(tensors["weight"], torch.ones_like, tensors["running_mean"]))
        made.bias = nn.Parameter(_or(tensors["bias"], torch.zeros_like, tensors["running_mean"]))
        return Link(
            node, value, node.name, as_affine(made.eval().double(), 1 if len(shape_of(value) or ()) > 2 else -1)
        )

    def _pool(self, node: fx.Node, value: fx.Node, name: str, pool: Any) -> Link | None:
        shape, axes = shape_of(value), _AVERAGE_POOLS.index(type(pool)) + 1
        if shape is None or len(shape) != axes + 2:
            return None
        kernel, padding = _as_tuple(pool.kernel_size, axes), _as_tuple(pool.padding, axes)
        stride = _as_tuple(kernel if pool.stride in (None, ()) else pool.stride, axes)
        divisor = getattr(pool, "divisor_override", None)
        weighs_evenly = divisor is None and not (any(padding) and pool.count_include_pad)
        device = self._device()

        def as_convolution(channels: int) -> nn.Module:
            share = 1 / (divisor or prod(kernel))
            weight = torch.full((channels, 1, *kernel), share, dtype=torch.float64, device=device)
            made = convolutions.make_convolution(
                weight, None, torch.float64, stride=stride, padding=padding, groups=channels
            )
            return made.eval().requires_grad_(False)

        is_one = not pool.ceil_mode and (pool.count_include_pad or not any(padding))
        averaging = Averaging(weighs_evenly, as_convolution if is_one else None)
        operator = as_convolution(shape[1]) if is_one else None
        return Link(node, value, name, operator, averaging, {1: 1})

    def _mean(self, node: fx.Node, value: fx.Node) -> Link | None:
        given, shape = bind(node, "input dim keepdim dtype"), shape_of(value)
        if shape is None or given.get("dtype") is not None or given.get("dim") is None:
            return None
        dims = {dim % len(shape) for dim in _as_tuple(given["dim"], 1)}
        if 0 in dims or not dims:
            return None
        rank = len(shape) if given.get("keepdim", False) else len(shape) - len(dims)
        moves = {}
        if 1 not in dims and rank in (2, len(shape)):
            moves[1] = 1 if rank > 2 else -1
        if len(shape) - 1 not in dims:
            moves[-1] = -1
        return Link(node, value, node.name, averaging=Averaging(True), moves=moves)

    def _permuted(self, node: fx.Node, value: fx.Node) -> Link | None:
        shape = shape_of(value)
        assert shape is not None
        distinct = torch.empty(tuple(range(2, 2 + len(shape))), device="meta")
        behind = [size - 2 for size in call_alone(node, distinct).shape]  # output axis -> input axis
        moves = {}
        for axis in (1, -1):
            place = behind.index(axis % len(shape))
            if place == len(shape) - 1:
                moves[axis] = -1
            elif place == 1:
                moves[axis] = 1
        if behind[0] != 0:
            return None
        return Link(node, value, node.name, moves=moves, counts=False)

    def _reshaped(self, node: fx.Node, value: fx.Node, name: str) -> Link | None:
        """Read a reshape that leaves the channels where they are, or a map of one position that becomes a vector."""
        before, behind = shape_of(value), shape_of(node)
        assert before is not None
        assert behind is not None
        if len(before) < 2 or len(behind) < 2 or set(node.kwargs) - {"start_dim", "end_dim"}:
            return None
        if node.meta["tensor_meta"].dtype != value.meta["tensor_meta"].dtype:  # its bytes are read as something else
            return None
        keeps = self._keeps_samples(node, value)
        moves = {}
        if keeps and before[:2] == behind[:2] and len(before) > 2:
            moves[1] = 1 if len(behind) > 2 else -1
        if before[-1] == behind[-1]:
            moves[-1] = -1
        if not moves and not (keeps and len(behind) == 2):
            return None
        return Link(node, value, name, moves=moves, counts=False, keeps_samples=keeps)

    def _keeps_samples(self, node: fx.Node, value: fx.Node) -> bool:
        """Tell whether the first axis holds the samples behind a reshape, whatever their size."""
        if node.op == "call_module":
            return bool(self._captured.get_submodule(str(node.target)).start_dim == 1)
        if name_of(node) == "flatten":
            return bind(node, "input start_dim end_dim").get("start_dim", 0) == 1
        sizes = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        if isinstance(sizes[0], fx.Node):
            return is_number_of_samples(sizes[0])
        # view(-1, C) of maps that have one position at every size
        channels = (shape_of(value) or (0, 0))[1]
        return [*sizes] == [-1, channels] and self._is_averaged(value)

    def _is_averaged(self, value: fx.Node) -> bool:
        """Tell whether a value is an average over all positions, so that there is one at every size."""
        if value.op == "call_module":
            module = self._captured.get_submodule(str(value.target))
            size = getattr(module, "output_size", None) if type(module) in _ADAPTIVE_POOLS else None
        elif name_of(value) in _ADAPTIVE_POOLS_BY_NAME:
            size = bind(value, "input output_size").get("output_size")
        elif name_of(value) == "mean":
            rank, given = len(shape_of(value) or ()), bind(value, "input dim keepdim")
            dims = {dim % rank for dim in _as_tuple(given.get("dim", ()), 1)} if given.get("keepdim") else set()
            return dims == set(range(2, rank))
        else:
            return False
        return size is not None and set(_as_tuple(size, 1)) == {1}

    def _unchanged(self, node: fx.Node, value: fx.Node) -> Link | None:
        """Read a copy, and a conversion to a dtype that the value has; a dtype that is written out is left alone."""
        metas = [each.meta["tensor_meta"] for each in (node, value)]
        if metas[0].dtype != metas[1].dtype or len(metas[0].shape) < 2:
            return None
        return Link(node, value, node.name, moves={1: 1, -1: -1}, counts=False, unchanged=True)

    def _picked(self, node: fx.Node, value: fx.Node, name: str) -> Link | None:
        """Read ``x[:, :, ::2, ::2]``, a convolution of one tap."""
        shape = shape_of(value)
        if shape is None or len(shape) not in (3, 4, 5):
            return None
        key: Any = node.args[1]
        if name == "slice":
            given = bind(node, "input dim start end step")
            key = [slice(None)] * len(shape)
            key[given["dim"]] = slice(given.get("start"), given.get("end"), given.get("step"))
        key = key if isinstance(key, tuple | list) else (key,)
        key = [*key, *[slice(None)] * (len(shape) - len(key))]
        steps = []
        for part, size in zip(key, shape, strict=True):
            ends = (None, torch.iinfo(torch.int64).max)
            if not isinstance(part, slice) or part.start not in (None, 0) or part.stop not in ends or size < 1:
                return None
            steps.append(1 if part.step is None else part.step)
        if any(step != 1 for step in steps[:2]) or any(step < 1 for step in steps[2:]):
            return None
        return Link(node, value, node.name, self._selection(value, shape[1], stride=tuple(steps[2:])), selects=True)

    def _padded(self, node: fx.Node, value: fx.Node) -> Link | None:
        given = bind(node, "input pad mode value" if name_of(node) == "pad" else "input pad value")
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
            return None
        return self._with_zeros(node, value, node.name, given["pad"])

    def _with_zeros(self, node: fx.Node, value: fx.Node, name: str, pad: Any) -> Link | None:
        """Read zeros beside the channels and around the map, a convolution of one tap."""
        shape = shape_of(value)
        if shape is None or len(shape) not in (3, 4, 5):
            return None
        sides = [(0, 0)] * len(shape)
        for axis in range(len(pad) // 2):
            sides[-1 - axis] = (pad[2 * axis], pad[2 * axis + 1])
        if sides[0] != (0, 0) or any(low != high or low < 0 for low, high in sides[2:]) or min(sides[1]) < 0:
            return None
        padding = tuple(low for low, _ in sides[2:])
        return Link(node, value, name, self._selection(value, shape[1], sides[1], padding=padding), selects=True)

    def _selection(self, value: fx.Node, channels: int, beside: tuple[int, int] = (0, 0), **geometry: Any) -> nn.Module:
        """Make a convolution of one tap that copies channels, with channels of zeros beside them."""
        dtype, device = value.meta["tensor_meta"].dtype, self._device()
        taps = [1] * (len(value.meta["tensor_meta"].shape) - 2)
        if any(beside):
            weight = torch.eye(channels, dtype=dtype, device=device)
            weight = F.pad(weight, (0, 0, *beside)).view(-1, channels, *taps)
        else:
            weight = torch.ones(channels, 1, *taps, dtype=dtype, device=device)
            geometry["groups"] = channels
        made = convolutions.make_convolution(weight, None, dtype, **geometry)
        return made.eval().requires_grad_(False)

    def _tensor(self, argument: Any) -> Tensor | None:
        """Return a parameter or a buffer, or a view of one; None where None was given.

        Raises:
            CannotMergeError: For what is computed.
        """
        found = None if argument is None else self._constant(argument)
        if argument is not None and not isinstance(found, Tensor):
            raise CannotMergeError("its weight or bias is computed")
        return found

    def _constant(self, argument: Any) -> Any:
        """Return a number, a parameter or a buffer, or a view of one; None for anything else."""
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return float(argument)
        if not isinstance(argument, fx.Node):
            return None
        if argument.op == "get_attr":
            owner, _, attribute = str(argument.target).rpartition(".")
            found = getattr(self._captured.get_submodule(owner), attribute)
            return found if isinstance(found, Tensor) and found.is_floating_point() else None
        if is_view(argument):
            whole = self._constant(argument.args[0])
            if isinstance(whole, Tensor):
                return call_alone(argument, whole)
        return None

    def _device(self) -> torch.device:
        parameter = next(self._captured.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


def _as_channels(constant: Tensor, shape: torch.Size) -> tuple[int | None, Tensor]:
    """Return the channel axis (1 or -1) along which a constant varies, and its values there."""
    rank = len(shape)
    sizes = [1] * (rank - constant.ndim) + list(constant.shape)
    varied = [axis for axis, size in enumerate(sizes) if size > 1]
    if len(sizes) != rank or len(varied) != 1:
        return None, constant
    (axis,) = varied
    if axis == rank - 1:
        return -1, constant.reshape(-1)
    return (1, constant.reshape(-1)) if axis == 1 else (None, constant)


def _is_floating(*nodes: fx.Node) -> bool:
    return all(node.meta["tensor_meta"].dtype.is_floating_point for node in nodes)


def _as_tuple(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) if len(value) != 1 else tuple(value) * axes


def _or(tensor: Tensor | None, otherwise: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    return otherwise(like) if tensor is None else tensor
