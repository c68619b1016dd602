"""Capture, simplify, merge, verify: the steps of a collapse in their order."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_easier.activations import unwrap
from lightning_easier.collapse import chains
from lightning_easier.collapse.operators import CannotMergeError, compose, fold_batch_norm
from lightning_easier.collapse.planner import OBJECTIVES, Objective, pays, prices
from lightning_easier.costs import count_macs, count_parameters, measure_latency
from lightning_easier.dataflow import is_idle_dropout
from lightning_easier.inference import (
    as_arguments,
    describe,
    evaluation_mode,
    forward,
    relative_difference,
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
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
) -> CollapseResult:
    """Merge the linear operators of a model that are neighbours into one, exactly.

    The model is taken as in eval mode: identities and dropouts go, batch norms are folded into the operator before
    them, and where two linear operators meet, the two become one if that is exact and pays.

    Args:
        model: Any module that ``torch.fx`` can trace, in part at least; it is not changed.
        example_inputs: A tensor, or the tuple of the forward's positional arguments, on the model's device. Prices and
            costs are those at this shape.
        mode: ``"exact"``: the same function. ``"fit"`` is not supported yet.
        objective: ``"latency"`` (measured on the inputs' device), ``"macs"``, or ``"depth"``. A merge that does not
            improve it is not made; ``"depth"`` always does.
        sites: For ``mode="fit"`` only.
        calibration: For ``mode="fit"`` only.

    Returns:
        The collapsed model, an ordinary module in eval mode, and a report.

    Raises:
        TypeError: If ``model`` is not a Module, or ``example_inputs`` are not tensors.
        ValueError: If ``mode``, ``objective`` or another argument has a value that is not supported, the model does not
            accept ``example_inputs``, or its outputs can't be compared.
        CollapseError: If the model can't be captured, or the result differs from it on the example inputs.

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
    with evaluation_mode(model):
        expected = forward(model, arguments, "example_inputs")
    _check_comparable(expected, model)

    source = deepcopy(model).eval()
    try:
        captured = chains.capture(source, arguments)
    except chains.CaptureError as error:
        raise CollapseError(
            f"The data flow of {type(model).__name__} can't be captured: {error}. Collapse the part of the model that "
            f"can be traced by torch.fx."
        ) from error
    depth_before = chains.depth(captured)
    macs_before = count_macs(captured, arguments)
    parameters_before = count_parameters(model)

    steps = _Steps(captured, objective)
    steps.drop_identities()
    steps.fold_batch_norms()
    steps.drop_stand_ins()
    steps.merge_neighbours()
    collapsed = steps.finish()

    with torch.no_grad():
        difference = relative_difference(collapsed(*arguments), expected)
    tolerance = tolerance_for(expected)
    if not difference <= tolerance:
        raise CollapseError(
            f"The collapsed model differs from {type(model).__name__} by {difference:.1e} (relative) on the example "
            f"inputs, more than the {tolerance:.0e} that rounding explains. Its forward does something that torch.fx "
            f"does not record; please report it."
        )
    with evaluation_mode(model):
        latency = measure_latency({"before": model, "after": collapsed}, arguments)
    report = CollapseReport(
        merges=steps.merges,
        fused=steps.fused,
        dropped=steps.dropped,
        refusals=steps.refusals,
        before=ModelCost(depth_before, parameters_before, macs_before, latency["before"]),
        after=ModelCost(
            chains.depth(collapsed), count_parameters(collapsed), count_macs(collapsed, arguments), latency["after"]
        ),
        relative_difference=difference,
    )
    return CollapseResult(collapsed, report)


class _Steps:
    """The rewriting of one captured graph, and the record of it."""

    def __init__(self, captured: fx.GraphModule, objective: Objective) -> None:
        self._captured = captured
        self._graph = captured.graph
        self._objective = objective
        self.merges: list[Merge] = []
        self.fused: list[str] = []
        self.dropped: list[str] = []
        self.refusals: list[Refusal] = []

    def drop_identities(self) -> None:
        """Remove what computes the identity in eval mode."""
        for node in list(self._graph.nodes):
            module = chains.module_of(self._captured, node)
            if type(module) in _IDENTITIES and not chains.has_hooks(module):  # type: ignore[arg-type]
                self._bypass(node)
                self.dropped.append(str(node.target))
            elif is_idle_dropout(node):
                self._bypass(node)

    def fold_batch_norms(self) -> None:
        """Fold each batch norm into the convolution or Linear before it."""
        for node in list(self._graph.nodes):
            batch_norm: Any = chains.module_of(self._captured, node)
            if type(batch_norm) not in _BATCH_NORMS:
                continue
            before = input_of(node)
            while isinstance(before, fx.Node) and chains.is_stand_in(self._captured, before) and len(before.users) == 1:
                before = input_of(before)
            try:
                fused = self._fold(before, node, batch_norm)
            except CannotMergeError as error:
                self.refusals.append(Refusal((str(node.target),), str(error)))
                continue
            self._captured.set_submodule(str(before.target), fused)
            self._bypass(node)
            self.fused.append(str(node.target))

    def _fold(self, before: Any, node: fx.Node, batch_norm: Any) -> nn.Module:
        operator: Any = chains.module_of(self._captured, before) if isinstance(before, fx.Node) else None
        if type(operator) not in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS):
            raise CannotMergeError(f"what comes before this batch norm is {chains.describe(self._captured, before)}")
        if len(before.users) > 1:
            readers = ", ".join(chains.describe(self._captured, user) for user in before.users)
            raise CannotMergeError(f"the operator before this batch norm has {len(before.users)} readers: {readers}")
        if isinstance(operator, nn.Linear) and len(before.meta["tensor_meta"].shape) != 2:
            raise CannotMergeError("its channel axis is not that of the Linear before it")
        reason = chains.why_separate(self._captured, before, node)
        if reason is not None:
            raise CannotMergeError(reason)
        return fold_batch_norm(operator, batch_norm)

    def drop_stand_ins(self) -> None:
        """Remove the stand-ins, and say of each whose removal brings nothing together why."""
        nodes = [
            node for node in self._graph.nodes if isinstance(chains.module_of(self._captured, node), IdentityStandIn)
        ]
        for node in nodes:
            reason = chains.why_nothing_meets(self._captured, node)
            if reason is not None:
                self.refusals.append(Refusal((str(node.target),), f"nothing to merge: {reason}"))
        for node in nodes:
            if not chains.has_hooks(self._captured.get_submodule(str(node.target))):
                self._bypass(node)

    def merge_neighbours(self) -> None:
        """Merge pair after pair, from the input on, until no pair is left that can be merged and pays."""
        refused: set[tuple[fx.Node, fx.Node]] = set()
        origins: dict[str, tuple[str, ...]] = {}
        while pair := next((pair for pair in chains.neighbours(self._captured) if pair not in refused), None):
            first, second = pair
            names = tuple(name for node in pair for name in origins.get(str(node.target), (str(node.target),)))
            operators = tuple(self._captured.get_submodule(str(node.target)) for node in pair)
            reason = chains.why_separate(self._captured, first, second)
            try:
                if reason is not None:
                    raise CannotMergeError(reason)
                merged = compose(*operators)
                shape = first.all_input_nodes[0].meta["tensor_meta"].shape
                before, after = prices(self._objective, operators, merged, shape)  # type: ignore[arg-type]
                merge = Merge(names, _summary(merged), self._objective, before, after)
                if not pays(self._objective, before, after):
                    raise CannotMergeError(f"does not pay: as {_summary(merged)} it would cost {_compare(merge)}")
            except CannotMergeError as error:
                refused.add(pair)
                self.refusals.append(Refusal(names, str(error)))
                continue
            self._captured.set_submodule(str(first.target), merged)
            self._bypass(second)
            first.meta["tensor_meta"] = second.meta["tensor_meta"]
            origins[str(first.target)] = names
            self.merges.append(merge)
            # A pair that was refused is another one now
            refused = {other for other in refused if first not in other}

    def finish(self) -> fx.GraphModule:
        """Drop what is no longer called and compile."""
        self._graph.lint()
        self._captured.delete_all_unused_submodules()
        self._captured.recompile()
        for node in self._graph.nodes:
            node.meta.clear()  # shapes are those of the example inputs only
        return self._captured

    def _bypass(self, node: fx.Node) -> None:
        node.replace_all_uses_with(input_of(node))
        self._graph.erase_node(node)


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


def _summary(operator: nn.Module) -> str:
    if isinstance(operator, nn.Linear):
        return f"Linear {operator.in_features}→{operator.out_features}"
    assert isinstance(operator, _CONVOLUTIONS)
    kernel = "×".join(map(str, operator.kernel_size))
    groups = f", {operator.groups} groups" if operator.groups > 1 else ""
    return f"{type(operator).__name__} {kernel} {operator.in_channels}→{operator.out_channels}{groups}"


def _compare(merge: Merge) -> str:
    units: Mapping[str, str] = {"latency": "{:.1f} µs", "macs": "{:,.0f} MACs", "depth": "{:.0f} operators"}
    unit, scale = units[merge.objective], 1e6 if merge.objective == "latency" else 1
    return f"{unit.format(merge.price_after * scale)} instead of {unit.format(merge.price_before * scale)}"
