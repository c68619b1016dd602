"""The rewriting of one captured graph, step by step, and the record of it."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_easier.collapsing.algebra.operators import (
    BATCH_NORMS,
    fold_batch_norm,
    in_float64,
    uses_batch_statistics,
)
from lightning_easier.collapsing.errors import CannotMergeError, CollapseStep, StepError
from lightning_easier.collapsing.exact.capture import duplicate
from lightning_easier.collapsing.exact.chains import Chain, Chains, Uses, describe_node, is_stand_in, module_of
from lightning_easier.collapsing.exact.channels import ChannelFlow
from lightning_easier.collapsing.exact.constant_branches import constant_branches
from lightning_easier.collapsing.exact.dead_channels import DeadChannels, Part
from lightning_easier.collapsing.exact.nodes import name_of
from lightning_easier.collapsing.exact.planner import Planner
from lightning_easier.collapsing.exact.plans import Plan, original_pieces
from lightning_easier.collapsing.exact.prices import Objective, Pricer
from lightning_easier.collapsing.exact.trimming import trim
from lightning_easier.collapsing.exact.writing import EQUALS, Draft, Writer, equal_in_source
from lightning_easier.collapsing.exact.zero_branches import erase_unread, zero_branches
from lightning_easier.report import Merge, Refusal, Trimmed
from lightning_easier.sites.dataflow import OPERATORS, is_idle_dropout
from lightning_easier.sites.tracing import input_of
from lightning_easier.structure.stand_in import StandIn
from lightning_easier.support.inference import device_of, has_hooks
from lightning_easier.support.timing import MARGIN, LatencyTable, Speedup

_IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# What is asked of a value for an assertion
_QUESTIONS = (
    "getattr", "getitem", "size", "dim", "numel", "eq", "ne", "lt", "le", "gt", "ge", "mod", "and_", "or_", "sub",
    "floordiv", "mul", "add", "sym_size", "is_tensor",
)  # fmt: skip
# How many times faster a chain has to become.
_FASTER = 1 / (1 - MARGIN)


class Steps:
    """The rewriting of one captured graph, and the record of it.

    Args:
        captured: The graph.
        objective: What is to be least.
        table: Times that were measured already.
        left_out: Steps that are not to be taken, with the reason.

    Attributes:
        merges: What became one operator.
        fused: Batch norms that were folded.
        dropped: Identities that are gone.
        trimmed: Operators of which dead channels are gone.
        refusals: What was not merged, with the reason.
    """

    def __init__(
        self, captured: fx.GraphModule, objective: Objective, table: LatencyTable, left_out: Mapping[CollapseStep, str]
    ) -> None:
        self._captured = captured
        self._graph = captured.graph
        self._objective: Objective = objective
        self._table = table
        self._writer = Writer(captured)
        self._stand_ins: list[tuple[str, Any]] = []  # the name of each, and the value that it passed on
        self._left_out = left_out
        self._taken: list[tuple[str, CollapseStep]] = []  # the node whose value comes out of each
        self.merges: list[Merge] = []
        self.fused: list[str] = []
        self.dropped: list[str] = []
        self.trimmed: list[Trimmed] = []
        self.refusals: list[Refusal] = []
        self._has_dropped_zeros = False

    def simplify(self) -> None:
        """Drop what computes nothing, and fold batch norms."""
        self.drop_assertions()
        self.drop_identities()
        self.fold_batch_norms()

    def drop_assertions(self) -> None:
        """Remove what the model asserts of its values, not of its inputs; what it computes is the same without."""
        for node in reversed(list(self._graph.nodes)):
            asserts = name_of(node).startswith("_assert") and not (name_of(node) == "_assert" and _is_of_inputs(node))
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
            step = CollapseStep("fold", node.name)
            if step in self._left_out:
                self.refusals.append(Refusal((str(node.target),), self._left_out[step]))
                continue
            before = input_of(node)
            while isinstance(before, fx.Node) and is_stand_in(self._captured, before) and len(before.users) == 1:
                before = input_of(before)
            try:
                with _said_of(step):
                    fused = self._fold(before, node, batch_norm, uses)
            except CannotMergeError as error:
                self.refusals.append(Refusal((str(node.target),), str(error)))
                continue
            assert isinstance(before, fx.Node)
            self._writer.put(str(before.target), fused, before.meta["tensor_meta"].dtype)
            before.meta[EQUALS] = node.name
            self._writer.bypass(node, input_of(node))
            self.fused.append(str(node.target))
            self._taken.append((step.name, step))

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
        self._explain_what_stays_whole()

    def drop_zeros(self) -> None:
        """Remove branches of additions that are zeros whatever the input, and all that fed only them."""
        for found in zero_branches(self._captured):
            node = found.addition
            step = CollapseStep("trim", node.name)
            if step in self._left_out:
                self.refusals.append(Refusal((node.name,), self._left_out[step]))
                continue
            with _said_of(step):
                name, value = equal_in_source(node) or node.name, found.value
                if found.is_copied:
                    value = self._writer.copied(node, value)
                self._writer.bypass(node, value)
                erase_unread(self._captured, found.branch)
            self._has_dropped_zeros = True
            self._taken.append((name, step))

    def _explain_what_stays_whole(self) -> None:
        """Say of parts that were not looked into that they were not, if something could merge there."""
        for node in self._graph.nodes:
            module = module_of(self._captured, node)
            if module is None:
                continue
            kind, parts = type(module), list(module.modules())[1:]
            chains = sum(isinstance(part, OPERATORS) for part in parts) > 1 and not kind.__module__.startswith("torch.")
            if chains or any(isinstance(part, StandIn) for part in parts):
                why = "has hooks" if has_hooks(module) else "can't be traced"
                reason = f"stays whole: {kind.__name__} {why}, and torch.export can't take the model"
                self.refusals.append(Refusal((str(node.target),), reason))

    def trim(self) -> None:
        """Remove branches that are constant, and the channels that nothing needs, part by part, where that pays."""
        flow = ChannelFlow(self._captured)
        if self._drop_constant_branches(flow):
            flow = ChannelFlow(self._captured)
        kept: dict[int, str] = {}
        dead = DeadChannels(flow)
        while True:  # until all that is left of them pays
            reasons = {part: self._why_not_trimmed(dead, part) for part in dead.parts()}
            for part, reason in reasons.items():
                if reason is not None:
                    kept |= dict.fromkeys([*part.labels.tolist(), *part.carriers.tolist()], reason)
            if not any(reasons.values()):
                break
            dead = DeadChannels(flow, kept)
        self.refusals += dead.refusals()
        self.trimmed += dead.trimmed()
        steps: dict[fx.Node, CollapseStep] = {}
        for part in reasons:
            step = CollapseStep("trim", part.nodes[0].name)
            steps |= dict.fromkeys(part.nodes, step)
            names = [equal_in_source(node) for node in part.nodes if dead.stays(node) is None]
            self._taken += [(name, step) for name in names if name is not None]
        nodes = {node.name: node for node in self._graph.nodes}
        for node in flow.channels:
            if node in steps:
                with _said_of(steps[node]):
                    trim(dead, node, self._writer, nodes)

    def _drop_constant_branches(self, flow: ChannelFlow) -> bool:
        """Add a number for each channel where a branch is added that is the same whatever the input.

        Args:
            flow: The channels of the graph.

        Returns:
            Whether there was any: the graph has other values then.
        """
        gone: set[fx.Node] = set()
        for branch in constant_branches(self._captured, flow):
            node = branch.addition
            step = CollapseStep("trim", node.name)
            names = tuple(flow.names[each] for each in reversed(branch.nodes) if each in flow.names)
            if step in self._left_out:
                self.refusals.append(Refusal(names or (node.name,), self._left_out[step]))
                continue
            if gone.intersection((branch.value, node)):  # inside another
                continue
            with _said_of(step):
                name = equal_in_source(node) or node.name
                if branch.constants.any():
                    affine = branch.affine(device_of(self._captured))
                    self._writer.instead(node, branch.value, affine, node.meta["tensor_meta"].dtype)
                else:
                    self._writer.bypass(node, branch.value)
                for each in branch.nodes:
                    if not each.users:
                        self._graph.erase_node(each)
            gone.update(branch.nodes, (node,))
            self.trimmed += [
                Trimmed(flow.names[each], len(flow.channels[each].labels), 0)
                for each in reversed(branch.nodes)
                if each in flow.names and each in flow.channels
            ]
            self._taken.append((name, step))
        return bool(gone)

    def _why_not_trimmed(self, dead: DeadChannels, part: Part) -> str | None:
        """Time a part of the graph against what is left of it, interleaved; the reason if it stays, None if not."""
        step = CollapseStep("trim", part.nodes[0].name)
        if step in self._left_out:
            return self._left_out[step]
        if self._objective != "latency":
            return None
        with _said_of(step):
            device = device_of(self._captured)
            twin = duplicate(self._captured)
            writer = Writer(twin)
            there, alone = {node.name: node for node in twin.graph.nodes}, dead.only(part)
            nodes = [trim(alone, node, writer, there) for node in part.nodes]
            before, values = self._trial().part(part.nodes)
            after, _ = Draft(twin, {**self._writer.made, **writer.made}, device).part(nodes)
            metas = [node.meta["tensor_meta"] for node in values]
            key = _written(before), _written(after), tuple((meta.shape, meta.dtype) for meta in metas), str(device)
            inputs = tuple(torch.randn(meta.shape, device=device).to(meta.dtype) for meta in metas)
            return _why_not(self._table.compare(key, before, after, inputs, _FASTER))

    def merge(self) -> None:
        """Plan every chain, and carry out the plans."""
        chains = Chains(self._captured)
        device = device_of(self._captured)
        planner = Planner(Pricer(self._objective, device, self._table, self._alone()))
        plans = []
        for chain in chains:
            step = _step_of(chain)
            if step in self._left_out:
                names = tuple(element.name for element in chain if element.counts)
                self.refusals.append(Refusal(names, self._left_out[step]))
                continue
            with _said_of(step):
                plan = planner.plan(chain)
                plans.append((chain, plan, self._why_not_faster(chain, plan, device) if plan.merges else None))
        self._explain_stand_ins(chains)
        explained = {value for _, value in self._stand_ins}
        self.refusals += [Refusal((a.name, b.name), why) for a, b, why in chains.apart() if a.node not in explained]
        self.refusals += [Refusal(names, why) for names, why in chains.scattered()]
        for chain, plan, reason in plans:
            if reason is not None:
                self.refusals += [Refusal(merge.operators, reason) for merge in plan.merges]
                continue
            if plan.merges:
                with _said_of(_step_of(chain)):
                    self._writer.replace(chain, plan.pieces, chains)
                self._taken.append((_step_of(chain).name, _step_of(chain)))
            self.merges += plan.merges
            self.refusals += plan.refusals
        # What was said of a batch norm that could not be folded is superseded by what became of its chain
        known = {name for merge in self.merges for name in merge.operators}
        known.update(name for refusal in self.refusals if len(refusal.operators) > 1 for name in refusal.operators)
        kept = self._left_out.values()
        self.refusals = [
            r for r in self.refusals if len(r.operators) > 1 or r.operators[0] not in known or r.reason in kept
        ]

    def blamed(self, differences: Mapping[str, float]) -> dict[CollapseStep, str]:
        """Say of the steps that were taken what is wrong with them.

        Args:
            differences: Node of the source -> the relative difference of what has taken its place.
        """
        return {step: _why_wrong(differences[name]) for name, step in self._taken if name in differences}

    def finish(self) -> fx.GraphModule:
        """Drop what is no longer called and compile."""
        self._writer.finish()
        return self._captured

    @property
    def changed(self) -> bool:
        """Whether anything was done that makes the graph another than the model."""
        return bool(self.merges or self.fused or self.trimmed or self._stand_ins or self._has_dropped_zeros)

    def round(self, graph: fx.GraphModule | None = None) -> None:
        """Give new operators, which are in float64, the dtype of those they replace.

        Args:
            graph: A :meth:`snapshot`; the graph itself by default.
        """
        graph = self._captured if graph is None else graph
        for name, dtype in self._writer.made.items():
            if _has(graph, name):
                graph.get_submodule(name).to(dtype)

    def snapshot(self) -> fx.GraphModule:
        """Return a copy of the graph as it is now; new operators are in float64 still."""
        copied = duplicate(self._captured)
        for name in self._writer.made:  # the others are never changed
            if _has(copied, name):  # else nothing calls it any more
                copied.set_submodule(name, deepcopy(self._captured.get_submodule(name)))
        return copied

    def give_up_merges(self) -> None:
        """Say that nothing is merged, since the whole is slower."""
        reason = "timed as a whole, the model is slower with this and the other merges than without them"
        self.refusals += [Refusal(merge.operators, reason) for merge in self.merges]
        self.merges = []

    def give_up(self, model: str) -> None:
        """Say that nothing is done, since the whole is slower.

        Args:
            model: What to call the model.
        """
        self.merges, self.fused, self.dropped, self.trimmed = [], [], [], []
        reason = "the whole of the collapsed model is slower than the model itself, which is returned as it is"
        self.refusals.append(Refusal((model,), reason))

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

    def _trial(self) -> Draft:
        return Draft(self._captured, self._writer.made, device_of(self._captured))

    def _why_not_faster(self, chain: Chain, plan: Plan, device: torch.device) -> str | None:
        """Time a chain against its plan, interleaved; the reason if it is not faster, None if it is."""
        if self._objective != "latency":
            return None
        original, planned = self._trial().module(original_pieces(chain)), self._trial().module(plan.pieces)
        meta = chain[0].value.meta["tensor_meta"]
        key = _written(original), _written(planned), tuple(meta.shape), meta.dtype, str(device)
        value = torch.randn(meta.shape, dtype=meta.dtype, device=device)
        return _why_not(self._table.compare(key, original, planned, (value,), _FASTER))


def _written(graph: Any) -> Hashable:
    """Return what a graph does, whatever its nodes are called: equal chains are timed once."""
    places = {node: place for place, node in enumerate(graph.graph.nodes)}
    parts = str([*graph.named_children()])
    return parts, str(
        [
            (node.op, str(node.target), fx.map_arg((node.args, node.kwargs), lambda each: places[each]))
            for node in places
            if node.op != "placeholder"
        ]
    )


def _why_not(faster: Speedup) -> str | None:
    """Say why a plan that is so many times faster is not carried out; None if it is."""
    if faster.is_above(_FASTER):
        return None
    if faster.is_below(_FASTER):
        return f"does not pay: timed as a whole, this becomes {faster} as fast"
    return (
        f"the timings disagree on whether it pays: {faster} as fast, from pair to pair; objective='macs' decides by "
        f"the work alone, alike every time"
    )


def _step_of(chain: Chain) -> CollapseStep:
    last = chain[-1].node
    return CollapseStep("merge", equal_in_source(last) or last.name)


@contextmanager
def _said_of(step: CollapseStep) -> Iterator[None]:
    """Say of what a step raises which it was; that operators can't be merged, or memory is short, is no fault of it."""
    try:
        yield
    except (CannotMergeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StepError(
            step, f"left out, since it failed ({type(error).__name__}: {error}); please report it"
        ) from error


def _why_wrong(difference: float) -> str:
    return f"left out, since it would change what is computed by {difference:.1e} (relative); please report it"


def _is_of_inputs(node: fx.Node) -> bool:
    """Tell whether what is asserted is asserted of inputs only."""
    if node.op == "placeholder":
        return True
    asks = name_of(node) in _QUESTIONS or name_of(node) == "_assert"
    return asks and all(_is_of_inputs(other) for other in node.all_input_nodes)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
