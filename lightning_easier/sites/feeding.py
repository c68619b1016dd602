"""Which weights feed each activation: those of the linear operators that compute its input.

They are found through the flow of values, never by the order in which modules are registered: from a site back through
whatever passes neurons on (batch norm, pooling, a reshape, an addition), up to the first operator on each way.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules import instancenorm, padding, pooling

from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.dataflow import FlowNode, Kind
from lightning_easier.sites.discovery import IsolationPlan

_PASSING_KINDS = (Kind.IDENTITY, Kind.BATCH_NORM, Kind.FLATTEN, Kind.ADD)
_PASSING_MODULES: tuple[type[nn.Module], ...] = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._LPPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, instancenorm._InstanceNorm,
    nn.LocalResponseNorm, nn.Unflatten, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd, padding._CircularPadNd,
)  # fmt: skip
# By name, as functions and methods, in place or not. These pass on the first value they are given, ...
_POOLS = ("max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool")
_PASSING_FUNCTIONS = frozenset(
    {"view", "reshape", "view_as", "reshape_as", "unflatten", "flatten", "squeeze", "unsqueeze", "permute", "transpose",
     "swapaxes", "swapdims", "movedim", "moveaxis", "rearrange", "getattr", "contiguous", "clone", "expand",
     "expand_as", "t", "chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "index_select",
     "roll", "flip", "pad", "to", "type", "type_as", "float", "half", "bfloat16", "double", "mean", "amax",
     "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm", "interpolate", "pixel_shuffle",
     "pixel_unshuffle", "channel_shuffle", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
     "feature_alpha_dropout", "stochastic_depth", "_patch_merging_pad",
     *(f"{pool}{dims}d" for pool in _POOLS for dims in (1, 2, 3))}
)  # fmt: skip
# ... these all of them, ...
_JOINING_FUNCTIONS = frozenset(
    {"cat", "concat", "concatenate", "stack", "list", "outputs", "sub", "subtract", "maximum", "minimum"}
)
# ... and these the one they are given, if the others are constants.
_SCALING_FUNCTIONS = frozenset({"add", "mul", "multiply", "div", "divide", "truediv", "neg", "addcmul"})
# A tensor that is made anew, whatever the value it is asked of holds
NEW_TENSORS = frozenset(
    {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like",
     "full_like", "rand_like", "randn_like", "empty", "zeros", "ones", "full", "rand", "randn", "arange"}
)  # fmt: skip
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
_SAME_WEIGHT = frozenset({"contiguous", "to", "type_as", "clone", "detach", "float", "half", "bfloat16", "double"})


@dataclass(frozen=True)
class FeedingWeight:
    """A weight of an operator whose output reaches an activation.

    Attributes:
        name: Qualified name of the parameter, as in ``named_parameters()``. A weight that is computed from other
            tensors (parametrized, or masked by ``torch.nn.utils.prune``) has the name of the attribute that holds it,
            which ``named_parameters()`` doesn't list.
        neuron_dim: The axis of the output neurons: 0 for Linear and convolutions, 1 for transposed convolutions, the
            last for ``x @ weight`` and ``torch.addmm``. With groups, a transposed convolution has only those of one
            group on it.
        operator: Qualified name of the module that holds it, or that calls the function.
    """

    name: str
    neuron_dim: int
    operator: str


@dataclass(frozen=True)
class Feeding:
    """Which weights feed each site.

    Attributes:
        weights: Site -> the weights that feed it, in execution order, each weight at the first site that it reaches;
            empty where there are none. Every site has its entry, in execution order.
        shared: Site -> the first site that has its weights, for those whose weights all belong to earlier sites.
    """

    weights: dict[str, tuple[FeedingWeight, ...]]
    shared: dict[str, str]


def feeding_weights(model: nn.Module, plan: IsolationPlan) -> Feeding:
    """Find the weights that feed each site of a model.

    Only parameters with at least two axes count: no biases, no norms. What does not take part: shortcuts (see below),
    attention, recurrent layers, embeddings, ``nn.Bilinear``, products of two values, and weights computed inside a
    forward (standardized ones). The way back from a site ends where a forward can't be traced.

    At an addition, an operator is a *shortcut* if what it reads also goes through two operators or more into another
    branch: the 1x1 convolution that downsamples in a ResNet. Branches of equal length are no shortcuts.

    Args:
        model: The model, before or after its activations are isolated.
        plan: What was discovered in it.
    """
    weights = OperatorWeights(unwrap(model))
    reached = _operators_reached(plan)
    owners: dict[str, str] = {}
    feeding: dict[str, tuple[FeedingWeight, ...]] = {}
    shared: dict[str, str] = {}
    for site in plan.found:
        found = [weight for node in reached[site] if (weight := weights.of(node)) is not None]
        own = {weight.name: weight for weight in found if weight.name not in owners}
        feeding[site] = tuple(own.values())
        if found and not own:
            theirs = {owners[weight.name] for weight in found}
            shared[site] = next(name for name in feeding if name in theirs)
        owners |= dict.fromkeys(own, site)
    return Feeding(feeding, shared)


class Constants:
    """Tells which nodes of a flow hold the same whatever the input is."""

    def __init__(self, nodes: Iterable[FlowNode]) -> None:
        self._constant: set[FlowNode] = set()
        for node in nodes:
            computed = node.module is None and node.inputs and self._constant.issuperset(node.inputs)
            if node.kind == Kind.CONSTANT or function_name(node) in NEW_TENSORS or computed:
                self._constant.add(node)
            if not self._constant.issuperset(node.inputs[1:]):
                self._constant.difference_update(written(node))

    def __contains__(self, node: FlowNode) -> bool:
        return node in self._constant

    def values(self, node: FlowNode) -> list[FlowNode]:
        """Return the inputs of a node that depend on the model's."""
        return [parent for parent in node.inputs if parent not in self._constant]


def written(node: FlowNode) -> list[FlowNode]:
    """Return the nodes whose values a step writes to: what a function in place is given, and what that is a view of."""
    name = node.name.rpartition(".")[2]
    found: list[FlowNode] = []
    if function_name(node) is not None and (name.endswith("_") or name in _IN_PLACE or name == "setitem"):
        found += node.inputs[:1]
        while found and function_name(found[-1]) in _PASSING_FUNCTIONS and found[-1].inputs:
            found.append(found[-1].inputs[0])
    return found


def function_name(node: FlowNode) -> str | None:
    """Return the name of the function or method that a node calls, without the mark of one in place; None for others.

    ``add_`` and ``iadd`` are ``add``.
    """
    if node.module is not None or node.kind in (Kind.INPUT, Kind.UNKNOWN, Kind.OUTPUT, Kind.CONSTANT):
        return None
    name = node.name.rpartition(".")[2]
    return _IN_PLACE.get(name, name.removesuffix("_"))


# The operators, and other ends, on the ways back from a value; with each whether it is *settled*: read by something
# else, too, so that no addition after that tells whether it is a shortcut.
_Ends = dict[FlowNode, bool]


def _operators_reached(plan: IsolationPlan) -> dict[str, list[FlowNode]]:
    """Return site -> the operators met first on the ways back from it, from all of its calls, in execution order."""
    nodes = plan.flow.nodes
    place = {node: index for index, node in enumerate(nodes)}
    constants = Constants(nodes)
    sites = {module: name for name, (module, _) in plan.found.items()}
    ends: dict[FlowNode, _Ends] = {}
    reached: dict[str, set[FlowNode]] = {name: set() for name in plan.found}
    for node in nodes:  # inputs come before what reads them
        if node in constants:
            ends[node] = {}
            continue
        passed = _passed_on(node, constants)
        branches = [_seen_by_reader(parent, ends[parent]) for parent in passed]
        if len(branches) > 1 and (node.kind == Kind.ADD or function_name(node) == "sub"):
            branches = _without_shortcuts(branches, place)
        ends[node] = _joined(branches) if passed else {node: False}
        if node.kind == Kind.ACTIVATION and node.module in sites:
            for parent in node.inputs[:1]:
                reached[sites[node.module]] |= ends[parent].keys()
    return {
        name: sorted((node for node in found if node.kind == Kind.OPERATOR), key=place.__getitem__)
        for name, found in reached.items()
    }


def _passed_on(node: FlowNode, constants: Constants) -> list[FlowNode]:
    """Return the inputs whose neurons a node passes on."""
    values = constants.values(node)
    if node.kind in _PASSING_KINDS:
        return values if node.kind == Kind.ADD else values[:1]
    if node.kind != Kind.OTHER:
        return []
    if node.module is not None:
        return values[:1] if isinstance(node.module, _PASSING_MODULES) else []
    name = function_name(node)
    if name in _JOINING_FUNCTIONS or (name in _SCALING_FUNCTIONS and len(values) == 1):
        return values
    return values[:1] if name in _PASSING_FUNCTIONS else []


def _seen_by_reader(node: FlowNode, ends: _Ends) -> _Ends:
    return dict.fromkeys(ends, True) if len(node.readers) > 1 else ends


def _joined(branches: list[_Ends]) -> _Ends:
    joined: _Ends = {}
    for branch in branches:
        for end, is_settled in branch.items():
            joined[end] = joined.get(end, True) and is_settled
    return joined


def _without_shortcuts(branches: list[_Ends], place: dict[FlowNode, int]) -> list[_Ends]:
    """Leave out the operators of each branch from whose input a longer way leads to the end of another."""

    def is_shortcut(node: FlowNode, others: list[_Ends]) -> bool:
        ends = {end for other in others for end in other if end is not node}
        return node.kind == Kind.OPERATOR and _leads_past(node, ends, place)

    return [
        {
            end: is_settled
            for end, is_settled in branch.items()
            if is_settled or not is_shortcut(end, branches[:index] + branches[index + 1 :])
        }
        for index, branch in enumerate(branches)
    ]


def _leads_past(operator: FlowNode, ends: set[FlowNode], place: dict[FlowNode, int]) -> bool:
    """Tell whether a way past an operator, from what it reads to one of these ends, has more operators than one."""
    sources = _sources(operator)
    earliest = min((place[node] for node in sources), default=0)
    queue = [(end, 0) for end in ends]  # each with the number of operators from there to the end, two at most
    seen = set(queue)
    while queue:
        node, count = queue.pop()
        if node is operator or place[node] < earliest:
            continue
        if count > 1 and node in sources:
            return True
        for parent in node.inputs:
            step = parent, min(count + _is_operator(node), 2)
            if step not in seen:
                seen.add(step)
                queue.append(step)
    return False


def _sources(operator: FlowNode) -> set[FlowNode]:
    """Return what an operator reads, and what that was before it was pooled, normed or reshaped."""
    sources: set[FlowNode] = set()
    queue = list(operator.inputs)
    while queue:
        node = queue.pop()
        if node.kind == Kind.CONSTANT or node in sources:
            continue
        sources.add(node)
        passes = node.kind in _PASSING_KINDS or isinstance(node.module, _PASSING_MODULES)
        if passes or function_name(node) in _PASSING_FUNCTIONS:
            queue += node.inputs
    return sources


def _is_operator(node: FlowNode) -> bool:
    """Tell whether a step counts towards the length of a way."""
    has_matrix = node.module is not None and any(parameter.ndim > 1 for parameter in node.module.parameters())
    return node.kind in (Kind.OPERATOR, Kind.UNKNOWN) or has_matrix


class OperatorWeights:
    """Finds the weights of operators in a model, each under its first name.

    Args:
        model: The model, unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(self, node: FlowNode) -> FeedingWeight | None:
        """Return the weight of an operator; None for one that has none of its own."""
        if node.module is None:
            return self._of_function(node)
        if isinstance(node.module, nn.Bilinear):
            return None
        weight = node.module._parameters.get("weight")  # computed otherwise, as by a parametrization
        name = f"{node.name}.weight" if weight is None else self._names.get(id(weight), f"{node.name}.weight")
        return FeedingWeight(name, int(getattr(node.module, "transposed", False)), node.name)

    def _of_function(self, node: FlowNode) -> FeedingWeight | None:
        for constant in node.inputs:
            way = _way_to_constant(constant)
            tensor = None if way is None else attribute(self._model, way[-1].name)
            name = None if tensor is None else self._names.get(id(tensor))
            if way is None or tensor is None or name is None or tensor.ndim < 2:
                continue
            dim = neuron_dim_of_function(node, tensor.ndim)
            if any(step.layout[0] != "keep" for step in way[:-1]) and tensor.ndim != 2:
                continue  # axes that change places, of which there are more than two
            is_transposed = sum(step.layout[0] != "keep" or function_name(step) == "t" for step in way[:-1]) % 2
            return FeedingWeight(name, 1 - dim if is_transposed else dim, node.name.rpartition(".")[0])
        return None


def neuron_dim_of_function(node: FlowNode, dims: int) -> int:
    """Return the axis of the output neurons of the weight that a function is given, one with so many axes."""
    name = function_name(node) or ""
    if name.startswith("conv"):
        return int(name.startswith("conv_transpose"))
    if name == "linear" or node.layout == ("set", -2):
        return dims - 2 if name != "linear" else 0
    return dims - 1


def _way_to_constant(node: FlowNode) -> list[FlowNode] | None:
    """Return the steps from a value back to the one tensor it holds, transposed at most; None if it is another."""
    way = [node]
    while node.kind != Kind.CONSTANT:
        name = function_name(node)
        turns = node.layout[0] in ("swap", "permute") or name == "t"
        if len(node.inputs) != 1 or not (turns or name in _SAME_WEIGHT):
            return None
        node = node.inputs[0]
        way.append(node)
    return way


def attribute(model: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of a qualified name; None if there is none."""
    owner, _, last = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), last, None)
    except AttributeError:  # a question that was asked of a value, such as its size
        return None
    return value if isinstance(value, Tensor) else None
