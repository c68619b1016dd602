"""Whether anything of a model's input still reaches its output, given which weights are zero.

No numbers are computed: what is followed from step to step is which neurons *depend on the input*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import instancenorm, pooling

from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.dataflow import Flow, FlowNode, Kind, Layout, neuron_axis_after
from lightning_easier.sites.discovery import IsolationPlan
from lightning_easier.sites.feeding import (
    NEW_TENSORS,
    Constants,
    FeedingWeight,
    OperatorWeights,
    attribute,
    function_name,
    written,
)
from lightning_easier.sites.rectifiers import GATES

_MIXING_ACTIVATIONS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *(cls for cls in GATES.values() if cls is not nn.Softmax), nn.LogSigmoid, nn.Threshold, instancenorm._InstanceNorm,
)  # fmt: skip
_POOLING_MODULES: tuple[type[nn.Module], ...] = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._LPPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
)  # fmt: skip
_POOLING_FUNCTIONS = frozenset(
    {"interpolate", *(f"{pool}_pool{dims}d" for dims in (1, 2, 3)
                      for pool in ("max", "avg", "lp", "adaptive_avg", "adaptive_max"))}
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = frozenset(
    {"contiguous", "clone", "to", "type_as", "float", "half", "bfloat16", "double", "dropout", "dropout1d", "dropout2d",
     "dropout3d", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth", "sigmoid", "tanh", "hardsigmoid",
     "hardtanh", "softsign", "logsigmoid", "clamp", "abs", "neg", "sqrt", "exp", "square", "instance_norm"}
)  # fmt: skip
# A neuron that depends on the input in one of the values does so in the result
_MERGING_FUNCTIONS = frozenset(
    {"add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "maximum", "minimum", "addcmul"}
)
_MOVING_LAYOUTS = ("permute", "swap", "move", "insert")


@dataclass(frozen=True)
class _State:
    """What of a value depends on the input.

    Attributes:
        any: Whether anything does.
        neurons: Which neurons do, ``(C,)``; None where it is not known.
        axis: The axis of the neurons.
        dims: How many axes the value has; None where it is not known.
        repeats: How each neuron became several features in a flatten: ``"each"`` has them side by side, ``"all"`` goes
            through all neurons again and again; None if each is still one.
    """

    any: bool
    neurons: Tensor | None = None
    axis: int = -1
    dims: int | None = None
    repeats: str | None = None

    @property
    def place(self) -> int:
        """The axis, counted from the last where that is known."""
        return self.axis if self.dims is None else self.axis % self.dims - self.dims

    def lies_on(self, axis: int) -> bool:
        """Tell whether an axis is that of the neurons."""
        return self.axis == axis or (self.dims is not None and self.axis % self.dims == axis % self.dims)

    @property
    def is_whole(self) -> bool:
        """Whether all of it depends on the input, whichever neurons are taken."""
        return self.any and (self.neurons is None or bool(self.neurons.all()))

    def blurred(self, keep_dims: bool = False) -> "_State":
        """Return the same without the neurons."""
        return _State(self.any, dims=self.dims if keep_dims else None)

    def features(self, count: int, axis: int) -> Tensor | None:
        """Return which of so many features on an axis depend on the input; None if that is not known."""
        if self.neurons is None:
            return None
        times, rest = divmod(count, len(self.neurons))
        if not self.lies_on(axis) or rest or (times > 1 and self.repeats is None):
            return None
        return self.neurons.repeat(times) if self.repeats == "all" else self.neurons.repeat_interleave(times)


class Paths:
    """Whether a way is left from the input of a model to its output, neuron by neuron.

    A neuron depends on the input if a weight that is not zero connects it to one that does; biases connect nothing.
    What is told is never too little: where it is not known which neurons a step connects (attention, an index, a view
    that is no flatten, a forward that can't be traced), it is taken to connect all; a kernel to connect if any of its
    numbers is not zero, though some may meet nothing but padding. Weights that cancel out are not looked for.

    Args:
        model: The model.
        plan: What was discovered in it, as it is now.
    """

    def __init__(self, model: nn.Module, plan: IsolationPlan) -> None:
        self._model = unwrap(model)
        self._plan = plan
        self._flow: Flow = plan.flow
        self._constants = Constants(plan.flow.nodes)
        self._sites = {node: name for name, (_, node) in plan.found.items()}
        self._weights = OperatorWeights(self._model)
        self._parameters = dict(self._model.named_parameters())
        outputs = _outputs(plan.flow)
        reached = self._depending({}, {}, False)
        # an output that never depends on the input says nothing
        self._outputs = [node for node in outputs if reached[node].any]

    @property
    def is_known(self) -> bool:
        """Whether a way from the input to an output can be followed, past all forwards that can't be traced."""
        reached: set[FlowNode] = set()
        for node in self._flow.nodes:
            follows = node.kind != Kind.UNKNOWN and not reached.isdisjoint(node.inputs)
            if node.kind == Kind.INPUT or follows:
                reached.add(node)
        return not reached.isdisjoint(self._outputs)

    def covers(self, site: str) -> bool:
        """Tell whether an activation lies on a way from the input to an output that can be followed.

        Args:
            site: Name of the activation.
        """
        _, start = self._plan.found[site]
        return _reaches(start, set(self._outputs), back=False) and _reaches(
            start, {node for node in self._flow.nodes if node.kind == Kind.INPUT}, back=True
        )

    def is_open(
        self,
        nonzero: Mapping[str, Tensor],
        passing: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        certain: bool = False,
    ) -> bool:
        """Tell whether every output still depends on the input, on one of several at least.

        Args:
            nonzero: Name of a parameter -> a bool tensor of its shape, True where it is not zero. A parameter that is
                not given counts as not zero anywhere, and so do those with one axis. The scales of affine stand-ins
                are read from the model.
            passing: Name of an activation -> a bool tensor of its neurons, True where it passes them on; all of them
                where it is not given.
            certain: Whether a step of which it is not known which neurons it takes (a slice, a shuffle) counts only
                where all neurons that it may take depend on the input; else it counts where one does.

        Raises:
            ValueError: If there is no such parameter, or it has another shape.
        """
        for name, mask in nonzero.items():
            known = self._parameters.get(name, attribute(self._model, name))
            if known is None:
                raise ValueError(f"Expected argument `nonzero` to hold names of parameters, but got {name!r}")
            if mask.shape != known.shape:
                raise ValueError(
                    f"Expected argument `nonzero` to hold a tensor of shape {tuple(known.shape)} for {name!r}, but got "
                    f"{tuple(mask.shape)}"
                )
        states = self._depending(nonzero, passing, certain)
        return all(states[node].any for node in self._outputs)

    def _depending(
        self, nonzero: Mapping[str, Tensor], passing: Mapping[str, Tensor], certain: bool
    ) -> dict[FlowNode, _State]:
        """Follow what depends on the input through all nodes."""
        states: dict[FlowNode, _State] = {}
        entered: dict[str, bool] = {}  # forward that can't be traced -> whether anything that enters it depends on it
        for node in self._flow.nodes:  # inputs come before what reads them
            read = self._constants.values(node)
            if node in self._constants or function_name(node) in NEW_TENSORS:
                states[node] = _State(False)
            elif node.kind == Kind.INPUT:
                states[node] = _State(True)
            elif node.kind == Kind.UNKNOWN or not node.inputs:  # which may come from anywhere
                enters = not read or any(states[parent].any for parent in read)
                entered[node.name] = entered.get(node.name, False) or enters
                states[node] = _State(entered[node.name])
            elif not read:
                states[node] = _State(False)
            elif node.kind == Kind.OPERATOR:
                states[node] = self._after_operator(node, [states[parent] for parent in read], nonzero)
            else:
                states[node] = self._after(node, states, nonzero)
            passes = passing.get(self._sites.get(node, ""))
            if passes is not None:
                states[node] = _passed(states[node], passes.cpu(), self._flow.neuron_axis(node))
            loses_neurons = states[node].any and states[node].neurons is None and not _mixes(node)
            if certain and loses_neurons and read and node.kind != Kind.UNKNOWN:
                is_whole = any(states[parent].is_whole for parent in read)
                states[node] = replace(states[node], any=is_whole)
            if any(states[parent].any for parent in node.inputs[1:]):
                states |= {target: _State(True) for target in written(node)}
        return states

    def _after(self, node: FlowNode, states: Mapping[FlowNode, _State], nonzero: Mapping[str, Tensor]) -> _State:
        """Return the state after anything but an operator."""
        read = [states[parent] for parent in self._constants.values(node)]
        name = function_name(node)
        if node.kind == Kind.ACTIVATION:
            return _blurred(read) if isinstance(node.module, _MIXING_ACTIVATIONS) else read[0]
        if node.kind == Kind.ADD or (node.kind == Kind.OTHER and name in _MERGING_FUNCTIONS):
            return self._scaled(node, _merged(read), nonzero) if name == "addcmul" else _merged(read)
        if len(read) == 1 and node.kind in (Kind.IDENTITY, Kind.BATCH_NORM, Kind.OUTPUT):
            return read[0]
        if node.kind == Kind.FLATTEN:
            return _flattened(read[0], node.layout)
        if node.layout[0] == "join":
            return _joined([states[parent] for parent in node.inputs], node.layout)
        if len(read) == 1 and node.kind == Kind.OTHER:
            return _after_one(node, read[0])
        return _blurred(read)

    def _after_operator(self, node: FlowNode, read: Sequence[_State], nonzero: Mapping[str, Tensor]) -> _State:
        weight = self._weights.of(node)
        if weight is None or len(read) != 1:
            return _blurred(read)
        state, tensor = read[0], self._tensor(weight)
        mask = nonzero.get(weight.name)
        is_conv = isinstance(node.module, nn.modules.conv._ConvNd) or (function_name(node) or "").startswith("conv")
        if not is_conv and tensor.ndim > 2:  # a stack of matrices
            return _State(state.any and (mask is None or bool(mask.any())))
        if mask is None:
            mask = torch.ones((), dtype=torch.bool).expand(tensor.shape[:2])
        elif is_conv:
            mask = mask.flatten(2).any(-1)
        mask = mask.cpu()
        if not is_conv:
            axis = -2 if node.layout == ("set", -2) else -1
            outputs = _connected(state, (mask if weight.neuron_dim == 0 else mask.T)[None], axis)
            return _State(bool(outputs.any()), outputs, axis, state.dims)
        groups = int(getattr(node.module, "groups", 1))
        if node.module is None:  # a function tells it only by what it reads
            state, groups = _in_groups(state, mask)
        mask = mask.view(groups, -1, mask.shape[1])
        outputs = _connected(state, mask if weight.neuron_dim == 0 else mask.transpose(1, 2), 1)
        return _State(bool(outputs.any()), outputs, 1, tensor.ndim)

    def _tensor(self, weight: FeedingWeight) -> Tensor:
        parameter = self._parameters.get(weight.name)
        tensor = attribute(self._model, weight.name) if parameter is None else parameter
        assert tensor is not None  # it was found in the model
        return tensor

    def _scaled(self, node: FlowNode, state: _State, nonzero: Mapping[str, Tensor]) -> _State:
        """Return the state after an affine stand-in, ``torch.addcmul(offset, value, scale)``."""
        values = self._constants.values(node)
        if len(node.inputs) != 3 or values != [node.inputs[1]] or not state.any:
            return state
        scale = self._scale(node.inputs[2], nonzero)
        if scale is None:
            return state
        return _passed(state, scale, self._flow.neuron_axis(node))

    def _scale(self, node: FlowNode, nonzero: Mapping[str, Tensor]) -> Tensor | None:
        """Return where the one vector that a node is computed from is not zero; None if it can't be told."""
        tensors: dict[str, Tensor] = {}
        queue = [node]
        while queue:
            other = queue.pop()
            queue += other.inputs
            tensor = attribute(self._model, other.name) if other.kind == Kind.CONSTANT else None
            if tensor is not None:
                tensors[other.name] = tensor
        if len(tensors) != 1:
            return None
        ((name, tensor),) = tensors.items()
        if name in nonzero:
            return nonzero[name].cpu()
        if tensor.ndim != 1 or tensor.is_meta or isinstance(tensor, DTensor):
            return None
        return tensor.detach().cpu() != 0


def _outputs(flow: Flow) -> list[FlowNode]:
    """Return the nodes of what a model returns, one for each value."""
    found: list[FlowNode] = []
    queue = [parent for node in flow.nodes[-1:] if node.kind == Kind.OUTPUT for parent in node.inputs]
    while queue:
        node = queue.pop()
        if node.kind == Kind.OTHER and function_name(node) == "outputs":
            queue += node.inputs
        else:
            found.append(node)
    return found


def _connected(state: _State, mask: Tensor, axis: int) -> Tensor:
    """Return which outputs of an operator depend on the input.

    Args:
        state: Of what it reads.
        mask: Which of its weights are not zero, ``(groups, outputs, inputs)`` of each group.
        axis: The axis it reads.
    """
    features = state.features(mask.shape[0] * mask.shape[2], axis)
    if features is None:
        return mask.any(-1).flatten() & state.any
    return (mask & features.view(mask.shape[0], 1, mask.shape[2])).any(-1).flatten()


def _in_groups(state: _State, mask: Tensor) -> tuple[_State, int]:
    """Return the number of groups of a convolution from how many neurons it reads, if that is known."""
    count, width = 0 if state.neurons is None else len(state.neurons), mask.shape[1]
    if (
        count == 0
        or not state.lies_on(1)
        or state.repeats is not None
        or count % width
        or mask.shape[0] % (count // width)
    ):
        return state.blurred(), 1
    return state, count // width


def _mixes(node: FlowNode) -> bool:
    """Tell whether a step has each of its neurons depend on all that it reads."""
    mixing = (*_MIXING_ACTIVATIONS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    return isinstance(node.module, mixing) or function_name(node) in ("layer_norm", "rms_norm", "group_norm", "softmax")


def _reaches(start: FlowNode, ends: set[FlowNode], *, back: bool) -> bool:
    """Tell whether a node is connected with others, past all forwards that can't be traced."""
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        if node in ends:
            return True
        for other in node.inputs if back else node.readers:
            if other not in seen and other.kind != Kind.UNKNOWN:
                seen.add(other)
                queue.append(other)
    return False


def _passed(state: _State, passes: Tensor, axis: int) -> _State:
    """Return the state after something that passes some neurons on, and makes zeros of the others."""
    if not state.any:
        return state
    if state.neurons is None:
        return _State(bool(passes.any()), passes, axis, state.dims)
    if len(state.neurons) != len(passes) or state.repeats is not None:
        return state if passes.any() else _State(False, dims=state.dims)
    neurons = state.neurons & passes
    return replace(state, any=bool(neurons.any()), neurons=neurons)


def _blurred(read: Sequence[_State]) -> _State:
    """Return the state of what mixes all that it reads."""
    return _State(any(state.any for state in read), dims=read[0].dims if len(read) == 1 else None)


def _after_one(node: FlowNode, state: _State) -> _State:
    """Return the state after a step that reads one value."""
    name = function_name(node)
    if isinstance(node.module, _ELEMENTWISE_MODULES) or name in _ELEMENTWISE_FUNCTIONS:
        return state
    if isinstance(node.module, _POOLING_MODULES) or name in _POOLING_FUNCTIONS:
        return state if state.lies_on(1) else state.blurred(keep_dims=True)
    if isinstance(node.module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)):
        return state.blurred(keep_dims=True)
    if name in ("layer_norm", "rms_norm", "group_norm", "local_response_norm"):
        return state.blurred(keep_dims=True)
    if node.module is None and node.layout[0] in _MOVING_LAYOUTS and name != "stack":
        return _moved(state, node.layout)
    return state.blurred()


def _merged(read: Sequence[_State]) -> _State:
    """Return the state of what reads several values element by element."""
    if len(read) == 1:
        return read[0]
    alive = [state for state in read if state.any]
    all_dims = {state.dims for state in read}
    dims = None if None in all_dims else max(state.dims or 0 for state in read)
    neurons = [state.neurons for state in alive if state.neurons is not None]
    together = {(len(state), other.place, other.repeats) for state, other in zip(neurons, alive, strict=False)}
    if not alive or len(neurons) < len(alive) or len(together) > 1:
        return _State(bool(alive), dims=dims)
    first = alive[0]
    if first.place >= 0 and len(all_dims) > 1:
        return _State(True, dims=dims)
    return _State(True, torch.stack(neurons).any(0), first.place, dims, first.repeats)


def _joined(inputs: Sequence[_State], layout: Layout) -> _State:
    """Return the state of a concatenation."""
    _, axis, which = layout
    parts = [inputs[index] for index in which]
    alive = [part for part in parts if part.any]
    dims = next((part.dims for part in parts if part.dims is not None), None)
    blurred = _State(bool(alive), dims=dims)
    if not alive or any(part.neurons is None or part.repeats is not None for part in alive):
        return blurred
    if len({part.place for part in alive}) > 1:
        return blurred
    place = alive[0].place
    if dims is not None:
        axis = axis % dims - dims
    if axis == place:
        neurons = [part.neurons for part in parts if part.neurons is not None]
        return _State(True, torch.cat(neurons), place, dims) if len(neurons) == len(parts) else blurred
    # elsewhere for sure only if both are counted from the same side
    return _merged(alive) if (axis < 0) == (place < 0) else blurred


def _flattened(state: _State, layout: Layout) -> _State:
    """Return the state after axes became one."""
    _, first, last = layout
    if state.neurons is None or state.repeats is not None:
        is_matrix = (first, last) == (1, -1)
        return state if state.repeats is not None and is_matrix else _State(state.any, dims=2 if is_matrix else None)
    axis, dims = state.axis, state.dims
    if dims is None:
        if (first, last) != (1, -1):
            return state.blurred() if neuron_axis_after(layout, axis) is None else state
        if axis not in (1, -1):
            return _State(state.any, dims=2)
        return replace(state, axis=1, dims=2, repeats="each" if axis == 1 else "all")
    axis, first, last = axis % dims, first % dims, last % dims
    after = dims - (last - first)
    if axis < first:
        return replace(state, dims=after)
    if axis > last:
        return replace(state, axis=axis - (last - first), dims=after)
    if first == last:
        return state
    if axis not in (first, last):
        return _State(state.any, dims=after)
    return replace(state, axis=first, dims=after, repeats="each" if axis == first else "all")


def _moved(state: _State, layout: Layout) -> _State:
    """Return the state after axes changed their places."""
    kind, *arguments = layout
    if kind == "permute":
        state = replace(state, dims=len(arguments[0]))
    dims = state.dims + 1 if kind == "insert" and state.dims is not None else state.dims
    if state.neurons is None or state.repeats is not None:
        return _State(state.any, dims=dims)
    axis = state.axis
    if state.dims is not None:  # count all axes from the first
        axis %= state.dims
        if kind == "permute":
            layout = (kind, tuple(place % state.dims for place in arguments[0]))
        elif kind == "insert":
            layout = (kind, arguments[0] % (state.dims + 1))
        elif kind == "move" and axis != arguments[0] % state.dims:
            return _State(state.any, dims=dims)  # it may be shifted
        else:
            layout = (kind, *(place % state.dims for place in arguments))
    after = neuron_axis_after(layout, axis)
    return _State(state.any, dims=dims) if after is None else replace(state, axis=after, dims=dims)
