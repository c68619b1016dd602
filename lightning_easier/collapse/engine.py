"""Capture, simplify, plan, write, verify, round: the steps of a collapse in their order."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_easier.activations import unwrap
from lightning_easier.collapse.capture import capture
from lightning_easier.collapse.chains import Chain, Chains, Uses, depth, describe_node, is_stand_in, module_of
from lightning_easier.collapse.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapse.errors import CannotMergeError, CaptureError
from lightning_easier.collapse.operators import fold_batch_norm, in_float64
from lightning_easier.collapse.planner import Planner
from lightning_easier.collapse.plans import Plan, original_pieces
from lightning_easier.collapse.prices import OBJECTIVES, LatencyTable, Objective, Pricer
from lightning_easier.collapse.reading import BATCH_NORMS, name_of, uses_batch_statistics
from lightning_easier.collapse.verification import CoarsestDtype, in_double, why_different
from lightning_easier.collapse.writing import EQUALS, Trial, Writer
from lightning_easier.costs import (
    Latency,
    count_macs,
    count_parameters,
    measure_activation_memory,
    measure_latency,
    speed_up,
)
from lightning_easier.dataflow import is_idle_dropout
from lightning_easier.inference import (
    as_arguments,
    describe,
    device_of,
    forward,
    has_hooks,
    relative_difference,
    tensors_in,
    tolerance_for,
)
from lightning_easier.linearize import IdentityStandIn
from lightning_easier.report import CollapseReport, Merge, ModelCost, Refusal
from lightning_easier.tracing import input_of

_IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Two timings of one thing differ by about this much; less is not an improvement.
_LATENCY_MARGIN = 0.02
# How many times the error of the source's own rounding a result may differ from it
_ROUNDING_MARGIN = 10
# What is asked of a value for an assertion
_QUESTIONS = (
    "getattr", "getitem", "size", "dim", "numel", "eq", "ne", "lt", "le", "gt", "ge", "mod", "and_", "or_", "sub",
    "floordiv", "mul", "add", "sym_size",
)  # fmt: skip


class CollapseError(RuntimeError):
    """A collapse that can't be carried out, or whose result is not the same function; nothing was changed."""


@dataclass(frozen=True)
class CollapseResult:
    """A collapsed model and what was done.

    Attributes:
        model: A new module in eval mode, with parameters of its own.
        report: What was merged, what was not and why, and the cost before and after.
    """

    model: nn.Module
    report: CollapseReport


def collapse(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    mode: Literal["exact", "fit"] = "exact",
    objective: Objective = "latency",
    sites: Sequence[str] | None = None,
    calibration: Any = None,
    latencies: LatencyTable | None = None,
) -> CollapseResult:
    """Turn what is linear in a row into the cheapest equal operators, exactly.

    The model is taken as in eval mode: identities and dropouts go, batch norms are folded into the operator before
    them. Only a batch norm that is in training mode inside a model in eval mode stays as it is. Chains of linear steps
    (operators, affines, average pooling, layouts; additions, differences and concatenations of linear branches of one
    value) are cut into pieces, each of which becomes one operator, so that the total price is least. A plan that does
    not beat what is there is not carried out.

    Args:
        model: Any module that ``torch.fx`` or ``torch.export`` can trace, in part at least; it is not changed.
        example_inputs: A tensor, or the tuple of the forward's positional arguments, on the model's device. Prices and
            costs are those at this shape.
        mode: ``"exact"``: the same function. ``"fit"`` is not supported yet.
        objective: ``"latency"`` (measured on the inputs' device), ``"macs"`` (between equals, fewer operations), or
            ``"depth"`` (fewer operations). What does not improve it is not done.
        sites: For ``mode="fit"`` only.
        calibration: For ``mode="fit"`` only.
        latencies: Times of operators; pass one table to several calls, and what was timed once is not timed again.

    Returns:
        The collapsed model, an ordinary module in eval mode, and a report.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If ``mode``, ``objective`` or another argument has a value that is not supported, the model does not
            accept ``example_inputs``, or its outputs can't be compared.
        CollapseError: If the model can't be captured, or the result differs from it on the example inputs (in
            float64, or after rounding); the message names the first operator where it does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_easier import linearize
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> result = collapse(linearize(model, ["1"]), torch.randn(4, 8), objective="macs")
        >>> result.model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    if mode != "exact":
        raise ValueError(
            f"Expected argument `mode` to be 'exact', but got {mode!r}; least-squares replacements ('fit') are not "
            f"supported yet"
        )
    if sites is not None or calibration is not None:
        raise ValueError("Expected arguments `sites` and `calibration` to be None: they belong to mode='fit'")
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected argument `objective` to be one of {OBJECTIVES}, but got {objective!r}")
    arguments = as_arguments(example_inputs)
    model = unwrap(model)
    device = arguments[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _collapse(model, arguments, objective, LatencyTable() if latencies is None else latencies)


def _collapse(
    model: nn.Module, arguments: Sequence[Tensor], objective: Objective, latencies: LatencyTable
) -> CollapseResult:
    """Collapse a model after its arguments were checked; everything runs on a copy."""
    original, source = model, _in_eval_mode(model)
    with torch.no_grad():
        expected = forward(source, _copies(arguments), "example_inputs")
        _check_comparable(expected, source)
        _check_repeatable(model, source, expected, arguments)
    try:
        captured = capture(source, _copies(arguments))
    except CaptureError as error:
        raise CollapseError(
            f"The data flow of {type(model).__name__} can't be captured: {error}. Collapse the part of the model that "
            f"torch.fx or torch.export can trace."
        ) from error
    before = fx.GraphModule(captured, deepcopy(captured.graph))
    depth_before = depth(captured)

    steps = _Steps(captured, objective, latencies)
    steps.drop_assertions()
    steps.drop_identities()
    steps.fold_batch_norms()
    steps.drop_stand_ins()
    steps.merge()
    collapsed = steps.finish()

    exactly, rounding = _verified(source, before, captured, arguments, expected)
    steps.round()
    with torch.no_grad():
        output = collapsed(*_copies(arguments))
    difference = relative_difference(output, expected)
    # What the source loses by its own rounding, the result may lose, too
    tolerance = max(tolerance_for(expected), _ROUNDING_MARGIN * rounding)
    if not difference <= tolerance or _dtypes(output) != _dtypes(expected):
        raise CollapseError(_message(model, difference, tolerance, None))

    result: nn.Module = collapsed
    model = deepcopy(source)
    with torch.no_grad():
        arguments = _copies(arguments)  # timing may write into them again and again
        latency = measure_latency({"before": model, "after": collapsed}, arguments)
        if objective == "latency" and _is_slower(latency["before"], latency["after"]):
            result, steps = deepcopy(model), _nothing_done(steps, model)
            latency["after"], difference, exactly = latency["before"], 0.0, 0.0
        report = CollapseReport(
            merges=steps.merges,
            fused=steps.fused,
            dropped=steps.dropped,
            refusals=steps.refusals,
            before=_cost(model, arguments, depth_before, latency["before"]),
            after=_cost(result, arguments, depth(collapsed) if result is collapsed else depth_before, latency["after"]),
            relative_difference=difference,
            relative_difference_float64=exactly,
        )
    for name, module in result.named_modules():
        if uses_batch_statistics(module):  # it has counted the runs above
            module.load_state_dict(original.get_submodule(name).state_dict())
    for node in collapsed.graph.nodes:
        node.meta.clear()  # shapes are those of the example inputs only
    return CollapseResult(result, report)


def _in_eval_mode(model: nn.Module) -> nn.Module:
    """Copy a model for eval mode; batch norms that were left in training mode in a model in eval mode stay in it."""
    source = deepcopy(model)
    kept = [module for module in source.modules() if uses_batch_statistics(module) and not model.training]
    source.eval()
    for module in kept:
        module.train()
    return source


def _cost(model: nn.Module, arguments: Sequence[Tensor], depth: int, latency: Latency) -> ModelCost:
    macs, memory = count_macs(model, arguments), measure_activation_memory(model, arguments)
    return ModelCost(depth, count_parameters(model), macs, memory, latency)


def _verified(
    source: nn.Module, before: fx.GraphModule, collapsed: fx.GraphModule, arguments: Sequence[Tensor], expected: Any
) -> tuple[float | None, float]:
    """Compare a collapsed model with its source in float64; None for a model that does not run in float64.

    Returns:
        The relative difference, and that of the source's output in its own dtype from that in float64.

    Raises:
        CollapseError: If they differ; it names the first operator where they do.
    """
    twins = in_double((source, before, collapsed), arguments)
    if twins is None:
        return None, 0.0
    (source, before, collapsed), arguments = twins  # type: ignore[assignment]
    coarsest = CoarsestDtype()
    try:
        with torch.no_grad(), coarsest:
            exact, output = source(*_copies(arguments)), collapsed(*_copies(arguments))
    except Exception:  # dtypes that are written out in its forward, or asserted there
        return None, 0.0
    difference = relative_difference(output, exact)
    if not difference <= coarsest.tolerance:  # some models convert to float32 inside
        where = why_different(before, collapsed, arguments)
        raise CollapseError(_message(source, difference, coarsest.tolerance, where))
    return difference, relative_difference(expected, exact)


def _dtypes(output: Any) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors_in(output)]


def _check_repeatable(model: nn.Module, source: nn.Module, expected: Any, arguments: Sequence[Tensor]) -> None:
    """Refuse a forward that leaves something behind or draws random numbers.

    Args:
        model: The model, which was not run.
        source: Its copy, which was run once.
        expected: What that returned.
        arguments: Its arguments.

    Raises:
        CollapseError: With the reason.
    """
    name = type(model).__name__
    before, after = dict(model.named_buffers()), dict(source.named_buffers())
    counted = {
        id(buffer) for module in source.modules() if uses_batch_statistics(module) for buffer in module.buffers()
    }
    changed = [
        key
        for key, buffer in after.items()
        if id(buffer) not in counted and (key not in before or not torch.equal(before[key], buffer))
    ]
    if changed:
        raise CollapseError(f"The forward of {name} writes to the buffer {changed[0]!r}, which a collapse would lose")
    again = source(*_copies(arguments))
    if relative_difference(again, expected) > 0:
        raise CollapseError(f"The output of {name} differs from call to call on the same inputs, so that a collapsed "
                            f"model can't be compared with it")  # fmt: skip


def _copies(arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy arguments for a forward that may write into them."""
    return tuple(argument.clone() for argument in arguments)


def _message(model: nn.Module, difference: float, tolerance: float, where: str | None) -> str:
    return (
        f"The collapsed model differs from {type(model).__name__} by {difference:.1e} (relative) on the example "
        f"inputs, more than the {tolerance:.0e} that rounding explains"
        + (f"; the first difference is in {where}" if where else "")
        + ". Its forward may do something that a capture does not record, or a merge is wrong; please report it."
    )


def _is_slower(before: Latency, after: Latency) -> bool:
    """Tell whether a model is slower than another beyond what noise explains."""
    _, _, third = speed_up(before, after)
    return third < 1 - _LATENCY_MARGIN


def _nothing_done(steps: "_Steps", model: nn.Module) -> "_Steps":
    steps.merges, steps.fused, steps.dropped = [], [], []
    reason = "the whole of the collapsed model is slower than the model itself, which is returned as it is"
    steps.refusals = [*steps.refusals, Refusal((type(model).__name__,), reason)]
    return steps


class _Steps:
    """The rewriting of one captured graph, and the record of it."""

    def __init__(self, captured: fx.GraphModule, objective: Objective, table: LatencyTable) -> None:
        self._captured = captured
        self._graph = captured.graph
        self._objective: Objective = objective
        self._table = table
        self._writer = Writer(captured)
        self._stand_ins: list[tuple[str, Any]] = []  # the name of each, and the value that it passed on
        self._timed: dict[Any, str | None] = {}
        self.merges: list[Merge] = []
        self.fused: list[str] = []
        self.dropped: list[str] = []
        self.refusals: list[Refusal] = []

    def drop_assertions(self) -> None:
        """Remove what the model asserts of its values; what it computes is the same without."""
        for node in reversed(list(self._graph.nodes)):
            asserts = name_of(node).startswith("_assert")
            about = name_of(node) in _QUESTIONS and "tensor_meta" not in node.meta
            if not node.users and (asserts or about):
                self._graph.erase_node(node)

    def drop_identities(self) -> None:
        """Remove what computes the identity in eval mode."""
        for node in list(self._graph.nodes):
            module = module_of(self._captured, node)
            if (
                module is not None
                and type(module) in _IDENTITIES
                and not (has_hooks(module) or "forward" in vars(module))
            ):
                self._writer.bypass(node, input_of(node))
                self.dropped.append(str(node.target))
            elif is_idle_dropout(node) or (name_of(node) == "dropout" and node.args[2:3] == (False,)):
                self._writer.bypass(node, input_of(node))

    def fold_batch_norms(self) -> None:
        """Fold each batch norm into the convolution or Linear before it."""
        uses = Uses(self._captured)
        for node in list(self._graph.nodes):
            batch_norm: Any = module_of(self._captured, node)
            if type(batch_norm) not in BATCH_NORMS:
                continue
            before = input_of(node)
            while isinstance(before, fx.Node) and is_stand_in(self._captured, before) and len(before.users) == 1:
                before = input_of(before)
            try:
                fused = self._fold(before, node, batch_norm, uses)
            except CannotMergeError as error:
                self.refusals.append(Refusal((str(node.target),), str(error)))
                continue
            assert isinstance(before, fx.Node)
            self._writer.put(str(before.target), fused, before.meta["tensor_meta"].dtype)
            before.meta[EQUALS] = node.name
            self._writer.bypass(node, input_of(node))
            self.fused.append(str(node.target))

    def _fold(self, before: Any, node: fx.Node, batch_norm: Any, uses: Uses) -> nn.Module:
        if uses_batch_statistics(batch_norm):
            raise CannotMergeError(
                "this batch norm is in training mode: it normalises each batch by its own statistics"
            )
        operator: Any = module_of(self._captured, before) if isinstance(before, fx.Node) else None
        if type(operator) not in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
            raise CannotMergeError(f"what comes before this batch norm is {describe_node(self._captured, before)}")
        if len(before.users) > 1:
            readers = ", ".join(describe_node(self._captured, user) for user in before.users)
            raise CannotMergeError(f"the operator before this batch norm has {len(before.users)} readers: {readers}")
        if isinstance(operator, nn.Linear) and len(before.meta["tensor_meta"].shape) != 2:
            raise CannotMergeError("its channel axis is not that of the Linear before it")
        for each in (before, node):
            reason = uses.why_separate(each)
            if reason is not None:
                raise CannotMergeError(reason)
        return fold_batch_norm(in_float64(operator), deepcopy(batch_norm).double())

    def drop_stand_ins(self) -> None:
        """Remove the stand-ins of activations that are linear."""
        for node in list(self._graph.nodes):
            if is_stand_in(self._captured, node):
                name, value = str(node.target), input_of(node)
                if has_hooks(self._captured.get_submodule(name)):
                    self.refusals.append(Refusal((name,), f"`{name}` has hooks, which would see something else"))
                    continue
                self._writer.bypass(node, value)
                self._stand_ins.append((name, value))
        self._explain_those_inside()

    def _explain_those_inside(self) -> None:
        for node in self._graph.nodes:
            module = module_of(self._captured, node)
            for name, part in () if module is None else module.named_modules(prefix=str(node.target)):
                if isinstance(part, IdentityStandIn) and part is not module:
                    kind = type(module).__name__
                    reason = f"nothing is known of what is inside `{node.target}` ({kind}), which can't be traced"
                    self.refusals.append(Refusal((name,), reason))

    def merge(self) -> None:
        """Plan every chain, and carry out the plans."""
        chains = Chains(self._captured)
        device = device_of(self._captured)
        planner = Planner(Pricer(self._objective, device, self._table, self._alone()))
        plans = [(chain, planner.plan(chain)) for chain in chains]
        self._explain_stand_ins(chains)
        explained = {value for _, value in self._stand_ins}
        self.refusals += [Refusal((a.name, b.name), why) for a, b, why in chains.apart() if a.node not in explained]
        reasons = [self._why_not_faster(chain, plan, device) if plan.merges else None for chain, plan in plans]
        for (chain, plan), reason in zip(plans, reasons, strict=True):
            if reason is not None:
                self.refusals += [Refusal(merge.operators, reason) for merge in plan.merges]
                continue
            if plan.merges:
                self._writer.replace(chain, plan.pieces, chains)
            self.merges += plan.merges
            self.refusals += plan.refusals
        # What was said of a batch norm that could not be folded is superseded by what became of its chain
        known = {name for merge in self.merges for name in merge.operators}
        known.update(name for refusal in self.refusals if len(refusal.operators) > 1 for name in refusal.operators)
        self.refusals = [r for r in self.refusals if len(r.operators) > 1 or r.operators[0] not in known]

    def finish(self) -> fx.GraphModule:
        """Drop what is no longer called and compile."""
        self._writer.finish()
        return self._captured

    def round(self) -> None:
        """Give new operators, which are in float64, the dtype of those they replace."""
        for name, dtype in self._writer.made.items():
            if _has(self._captured, name):
                self._captured.get_submodule(name).to(dtype)

    def _explain_stand_ins(self, chains: Chains) -> None:
        for name, value in self._stand_ins:
            reason = chains.why_nothing_meets(value)
            if reason is not None:
                self.refusals.append(Refusal((name,), f"nothing to merge: {reason}"))

    def _alone(self) -> Any:
        known: dict[fx.Node, nn.Module] = {}

        def alone(node: fx.Node) -> nn.Module:
            if node not in known:
                known[node] = self._trial().alone(node)
            return known[node]

        return alone

    def _trial(self) -> Trial:
        return Trial(self._captured, self._writer.made, device_of(self._captured))

    def _why_not_faster(self, chain: Chain, plan: Plan, device: torch.device) -> str | None:
        """Time a chain against its plan, interleaved; the reason if it is not faster, None if it is."""
        if self._objective != "latency":
            return None
        original, planned = self._trial().module(original_pieces(chain)), self._trial().module(plan.pieces)
        meta = chain[0].value.meta["tensor_meta"]
        key = str(original), str(planned), tuple(meta.shape), meta.dtype
        if key not in self._timed:
            value = torch.randn(meta.shape, dtype=meta.dtype, device=device)
            latency = measure_latency({"original": original, "planned": planned}, (value,))
            before, after = (latency[name].median * 1e6 for name in ("original", "planned"))
            is_faster = speed_up(latency["original"], latency["planned"])[1] > 1 / (1 - _LATENCY_MARGIN)
            reason = f"does not pay: timed as a whole, the chain takes {after:.1f} µs instead of {before:.1f} µs"
            self._timed[key] = None if is_faster else reason
        return self._timed[key]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_comparable(output: Any, model: nn.Module) -> None:
    """Refuse outputs that a collapse could not be verified on."""
    leaves = pytree.tree_leaves(output)
    strange = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | bool | str | None)]
    if strange or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"Expected argument `model` to return tensors, or tuples, lists or dicts of them, but "
            f"{type(model).__name__} returns {describe(strange[0] if strange else output)}, which can't be compared. "
            f"Wrap it in a module that returns its tensors."
        )
    if not any(bool(leaf.isfinite().any()) for leaf in leaves if isinstance(leaf, Tensor)):
        raise ValueError(
            f"Expected argument `example_inputs` to give finite outputs, but {type(model).__name__} returns none, so "
            f"that the collapsed model can't be compared with it"
        )
