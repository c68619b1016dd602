"""Which channels may leave a captured graph, so that it computes the same: those that nothing is left to read.

An operator can do without a channel that it reads where its weights for it are zero, where the channel is a constant
that goes into the bias, or where another constant channel carries it (:mod:`~.algebra.slices`). All other readers need
theirs. So a channel is *dead* if no operator needs it whose own outputs are not all dead; the largest set of such
channels is found by beginning with all, and putting back what is needed until nothing changes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from lightning_easier.collapsing.algebra.slices import Selection, keeps_constants
from lightning_easier.collapsing.exact.channels import ChannelFlow
from lightning_easier.collapsing.exact.labels import Operated
from lightning_easier.report import Refusal, Trimmed


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a graph that channels leave together: from the operators that write them to those that read them.

    An operator that reads those of one part may write those of the next; a grouped one is in the middle of its part.

    Attributes:
        nodes: In execution order.
        labels: What leaves.
        carriers: The constant channels that stay and carry some of these.
    """

    nodes: tuple[fx.Node, ...]
    labels: Tensor
    carriers: Tensor


class DeadChannels:
    """Finds the channels that leave.

    Args:
        flow: The channels of a graph.
        kept: Label -> why it stays, besides what the flow knows.

    Attributes:
        flow: The same.
        leaves: ``(labels,)``: what leaves.
    """

    def __init__(self, flow: ChannelFlow, kept: dict[int, str] | None = None) -> None:
        self.flow = flow
        self._why = {**(kept or {}), **flow.kept}
        self._readers = [_Reader(each) for each in flow.operators.values()]
        self._carriers = torch.full((flow.labels,), -1)
        while True:
            self._carriers.fill_(-1)
            self.leaves = self._unneeded()
            self._carriers = self._carried()
            if bool((self._carriers >= 0).any()):
                self.leaves = self._unneeded()
            back = self._put_back()
            if not back:
                break
            self._why.update(back)

    def selection(self, node: fx.Node) -> Selection | None:
        """Return which channels of an operator stay; None for what is no operator."""
        reader = next((each for each in self._readers if each.call.node is node), None)
        if reader is None:
            return None
        inputs, reads = self._stays(reader), reader.call.reads
        outputs = ~self.leaves[self.flow.channels[node].labels]
        carriers = torch.full_like(inputs, -1, dtype=torch.long)
        if reads is not None:
            size = reader.inputs_of_a_group
            places = {(label, place // size): place for place, label in enumerate(reads.labels.tolist())}
            carried = ~inputs & (self._carriers[reads.labels] >= 0) & (not reader.keeps_constants)
            for place in carried.nonzero().flatten().tolist():
                carriers[place] = places.get((int(self._carriers[reads.labels[place]]), place // size), -1)
        return Selection(inputs, outputs, reader.constants, carriers)

    def stays(self, node: fx.Node) -> Tensor | None:
        """Return which channels of a value stay; None where all do."""
        channels = self.flow.channels.get(node)
        if channels is None or not bool(self.leaves[channels.labels].any()):
            return None
        return ~self.leaves[channels.labels]

    def parts(self) -> list[Part]:
        """List the parts of the graph that channels leave, in execution order."""
        place = {node: number for number, node in enumerate(self.flow.graph.nodes)}
        parent: dict[fx.Node, fx.Node] = {}

        def root(node: fx.Node) -> fx.Node:
            while parent.setdefault(node, node) is not node:
                node = parent[node]
            return node

        for node in self.flow.channels:
            if self.stays(node) is None:
                continue
            for user in node.users:
                if user in self.flow.channels and not self._ends_at(user):
                    parent[root(user)] = root(node)
        found: dict[fx.Node, dict[fx.Node, None]] = defaultdict(dict)
        for node in self.flow.channels:
            if self.stays(node) is not None:
                found[root(node)] |= {node: None, **{user: None for user in node.users if user in self.flow.channels}}
        parts = [tuple(sorted(nodes, key=place.__getitem__)) for nodes in found.values()]
        return [self._part(nodes, root) for nodes in sorted(parts, key=lambda nodes: place[nodes[0]])]

    def _ends_at(self, reader: fx.Node) -> bool:
        """Tell whether a part ends at what reads its channels: an operator that mixes all of them."""
        operated = self.flow.operators.get(reader)
        return operated is not None and len(operated.connections.nonzero) == 1

    def _part(self, nodes: tuple[fx.Node, ...], root: Callable[[fx.Node], fx.Node]) -> Part:
        own = [node for node in nodes if self.stays(node) is not None and root(node) is root(nodes[0])]
        labels = torch.cat([self.flow.channels[node].labels for node in own])
        labels = labels[self.leaves[labels]].unique()
        carriers = self._carriers[labels]
        return Part(nodes, labels, carriers[carriers >= 0].unique())

    def only(self, part: Part) -> "DeadChannels":
        """Return the same where nothing but the channels of one part leaves."""
        alone = copy(self)
        alone.leaves = torch.zeros_like(self.leaves)
        alone.leaves[part.labels] = True
        return alone

    def trimmed(self) -> list[Trimmed]:
        """List the operators whose outputs become fewer."""
        stays = {each.name: self.stays(node) for node, each in self.flow.operators.items()}
        return [Trimmed(name, len(each), int(each.sum())) for name, each in stays.items() if each is not None]

    def refusals(self) -> Iterator[Refusal]:
        """Yield why constant channels stay, operator by operator."""
        constant, written = torch.zeros(2, self.flow.labels, dtype=torch.bool)
        for node, channels in self.flow.channels.items():
            found = channels.labels[channels.constants.isfinite()]
            constant[found] = True
            written[found] |= node in self.flow.names
        stays = ~self.leaves
        stays[self._carriers[self._carriers >= 0]] = False
        if not (constant & stays).any():
            return
        needed: dict[int, str] = {}
        for reader in self._readers:
            reads = reader.call.reads
            if reads is not None:
                for place in (~self._released(reader) & constant[reads.labels]).nonzero().flatten().tolist():
                    needed.setdefault(int(reads.labels[place]), reader.why_needed(place))
        whys: dict[tuple[str, str], int] = {}
        for node, name in self.flow.names.items():
            own = self.flow.channels[node]
            dead = own.constants.isfinite() | (constant & ~written)[own.labels]
            labels = own.labels[dead & stays[own.labels]].tolist()
            reasons = Counter(self._why.get(label) or needed.get(label, "they are needed") for label in labels)
            for reason, count in reasons.items():
                whys[name, f"of its {len(own.labels)} channels are dead, but stay: {reason}"] = count
        yield from (Refusal((name,), f"{count} {said}") for (name, said), count in whys.items())

    # ---- the largest set -----------------------------------------------------------

    def _unneeded(self) -> Tensor:
        """Begin with all channels, and put back what is needed."""
        self.leaves = torch.ones(self.flow.labels, dtype=torch.bool)
        self.leaves[list(self._why)] = False
        self.leaves[self._carriers[self._carriers >= 0]] = False
        changes = True
        while changes:
            changes = False
            for reader in reversed(self._readers):
                reads = reader.call.reads
                if reads is None:
                    continue
                needed = reads.labels[~self._released(reader) & (self._carriers[reads.labels] < 0)]
                if bool(self.leaves[needed].any()):
                    self.leaves[needed] = False
                    changes = True
        return self.leaves

    def _released(self, reader: "_Reader") -> Tensor:
        """Tell which inputs an operator can do without, given the outputs that stay."""
        stays = ~self.leaves[self.flow.channels[reader.call.node].labels]
        return reader.released(stays)

    def _stays(self, reader: "_Reader") -> Tensor:
        reads = reader.call.reads
        return torch.ones(reader.inputs, dtype=torch.bool) if reads is None else ~self.leaves[reads.labels]

    def _carried(self) -> Tensor:
        """Let one constant channel carry others that the same operators need, because they pad with zeros."""
        needs: dict[int, list[tuple[int, int]]] = defaultdict(list)  # label -> operators and groups
        sizes: dict[int, float] = {}  # label -> the least of what it is there
        never = set(self._why)
        for number, reader in enumerate(self._readers):
            reads = reader.call.reads
            if reads is None:
                continue
            needed = ~self._released(reader)
            constant = reads.constants.isfinite() & reader.is_finite
            never.update(reads.labels[needed & ~constant].tolist())
            for place in (needed & constant).nonzero().flatten().tolist():
                label, size = int(reads.labels[place]), abs(float(reads.constants[place]))
                needs[label].append((number, place // reader.inputs_of_a_group))
                sizes[label] = min(sizes.get(label, size), size)
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for label, readers in needs.items():
            if label not in never:
                alike[tuple(readers)].append(label)
        carriers = torch.full((self.flow.labels,), -1)
        for labels_ in alike.values():
            largest = max(labels_, key=sizes.__getitem__)
            others = [label for label in labels_ if label != largest]
            carriers[others] = largest
        return carriers

    def _put_back(self) -> dict[int, str]:
        """List what has to stay for an operator to be one: a channel at least, and as many in every group."""
        back: dict[int, str] = {}
        for reader in self._readers:
            outputs = self.flow.channels[reader.call.node].labels.view(reader.groups, -1)
            inputs = None if reader.call.reads is None else reader.call.reads.labels.view(reader.groups, -1)
            reads, writes = self._stays(reader).view(reader.groups, -1).sum(1), (~self.leaves[outputs]).sum(1)
            staying = (reads > 0) | (writes > 0)
            if not staying.any():
                staying[0] = True
            reason = "one channel has to stay"
            if reader.groups > 1:
                reason = f"the groups of `{reader.call.name}` would not have equally many"
            for labels, counts in ((inputs, reads), (outputs, writes)):
                wanted = max(1, int(counts[staying].max()))
                for group in staying.nonzero().flatten().tolist() if labels is not None else ():
                    gone = labels[group][self.leaves[labels[group]]]  # type: ignore[index]
                    back.update(dict.fromkeys(gone[: wanted - int(counts[group])].tolist(), reason))
        return back


class _Reader:
    """An operator, as far as its weights tell what it needs.

    Args:
        call: Its call.
    """

    def __init__(self, call: Operated) -> None:
        self.call = call
        self.keeps_constants = keeps_constants(call.operator)
        self._nonzero = call.connections.nonzero
        self.groups, _, self.inputs_of_a_group = self._nonzero.shape
        self.inputs = self.groups * self.inputs_of_a_group
        self.is_finite = bool(call.connections.finite.all())

    @cached_property
    def constants(self) -> Tensor:
        """What each input is whatever the input of the model, NaN where that depends."""
        if self.call.reads is None:
            return torch.full((self.inputs,), torch.nan, dtype=torch.float64)
        return self.call.reads.constants

    @cached_property
    def _absorbed(self) -> Tensor:
        """Whether each input is a constant that the bias can take."""
        if not self.is_finite:
            return torch.zeros(self.inputs, dtype=torch.bool)
        return self.constants.isfinite() if self.keeps_constants else self.constants == 0

    def released(self, outputs: Tensor) -> Tensor:
        """Tell which inputs it can do without, given the outputs that stay."""
        stays = outputs.view(self.groups, -1)
        if self.groups == 1:
            needed = self._nonzero[0][stays[0]].any(0)
        else:
            needed = (self._nonzero & stays[:, :, None]).any(1).view(-1)
        return ~needed | self._absorbed

    def why_needed(self, place: int) -> str:
        """Say of a channel, which is constant somewhere, why it can't do without."""
        name = self.call.name
        if not self.constants[place].isfinite():
            return f"what `{name}` reads of them depends on the input: something else is added, or padded with zeros"
        if not self.is_finite:
            return f"weights of `{name}` are not finite"
        return f"`{name}` pads them with zeros, and they are constant, but not zero"
