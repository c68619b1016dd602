"""What lies around an activation, and which linear operators would meet if it were linear."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_easier.sites.dataflow import FlowNode, Kind

# What is linear in eval mode and stays between two operators until a collapse folds or merges it.
_TRANSPARENT = (Kind.IDENTITY, Kind.BATCH_NORM, Kind.FLATTEN, Kind.ADD)


@dataclass(frozen=True)
class Meeting:
    """Two linear operators of which the second would be all that reads the first.

    Attributes:
        first: Qualified name of the operator before the activation.
        second: Qualified name of the operator after it.
        through: What stays between them: ``"batch norm"``, ``"flatten"``, ``"addition"``.
        between: The modules between them, identities and the activation aside; None for a function.
        idle: The modules between them that compute the identity in eval mode.
        operators: The two modules; None for a function (``F.linear``).
    """

    first: str
    second: str
    through: tuple[str, ...]
    between: tuple[nn.Module | None, ...]
    idle: tuple[nn.Module, ...]
    operators: tuple[nn.Module | None, nn.Module | None]


@dataclass(frozen=True)
class Neighbourhood:
    """Where an activation lies among the linear operators.

    Attributes:
        before: Qualified names of the operators before it, through what is linear in eval mode.
        after: Qualified names of the operators after it.
        meetings: Which of them would meet if it were linear.
        reason: Why none would; None if some do.
        batch_norm: Qualified name of the batch norm right before it, identities aside; None if there is none.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    meetings: tuple[Meeting, ...]
    reason: str | None
    batch_norm: str | None = None


def neighbourhood(site: FlowNode, calls: Mapping[nn.Module | None, int], inside: str | None = None) -> Neighbourhood:
    """Look around an activation.

    Args:
        site: Its node in the flow.
        calls: How often each module is called in one forward of the model.
        inside: The forward it lies in that can't be traced, if there is one; a collapse keeps all of that as it is.
    """
    before = [node for node in _reached(site, back=True) if node.kind == Kind.OPERATOR]
    after = [node for node in _reached(site, back=False) if node.kind == Kind.OPERATOR]
    several = [node for node in (site, *before, *after) if node.module is not None and calls[node.module] > 1]
    meetings: list[Meeting] = []
    reason: str | None
    if inside is not None:
        reason = f"it lies in {inside}"
    elif several:
        reason = f"`{several[0].name}` is called {calls[several[0].module]} times"
    else:
        meetings = [meeting for node in before if (meeting := _meeting(node, site)) is not None]
        reason = None if meetings else _why_none_meets(site, before, after)
    # what lies before a second call may be something else
    batch_norm = _batch_norm_before(site) if site.module is None or calls[site.module] == 1 else None
    return Neighbourhood(_names(before), _names(after), tuple(meetings), reason, batch_norm)


def _batch_norm_before(site: FlowNode) -> str | None:
    """Return the name of the batch norm that an activation reads; None for one whose scale and shift have no module."""
    node = site
    while node is site or node.kind == Kind.IDENTITY:
        if len(node.inputs) != 1:
            return None
        node = node.inputs[0]
    if node.kind != Kind.BATCH_NORM:
        return None
    if node.module is not None:
        return node.name
    # A batch norm of somebody else's class calls the function with what is its own.
    caller = node.name.rpartition(".")[0]
    own = {f"{caller}.{parameter}" for parameter in ("weight", "bias")}
    return caller if own <= {read.name for read in node.inputs} else None


def _reached(site: FlowNode, *, back: bool) -> Iterator[FlowNode]:
    """Yield what is met first in one direction, through what is transparent."""
    seen, queue = {site}, [site]
    while queue:
        node = queue.pop(0)
        for other in node.inputs if back else node.readers:
            if other in seen:
                continue
            seen.add(other)
            if other.kind in _TRANSPARENT:
                queue.append(other)
            else:
                yield other


def _meeting(first: FlowNode, site: FlowNode) -> Meeting | None:
    """Follow a value from an operator to the next, as long as there is one reader."""
    between: list[FlowNode] = []
    idle: list[nn.Module] = []
    node, passed = first, False
    while len(node.readers) == 1:
        node = node.readers[0]
        passed |= node is site
        if node.kind == Kind.OPERATOR and passed:
            kinds = tuple(dict.fromkeys(str(other.kind) for other in between))
            modules = tuple(other.module for other in between)
            return Meeting(first.name, node.name, kinds, modules, tuple(idle), (first.module, node.module))
        if node.kind in _TRANSPARENT and node.kind != Kind.IDENTITY:
            between.append(node)
        elif node.kind == Kind.IDENTITY and node.module is not None:
            idle.append(node.module)
        elif node.kind != Kind.IDENTITY and node is not site:
            return None
    return None


def _why_none_meets(site: FlowNode, before: list[FlowNode], after: list[FlowNode]) -> str:
    if not before:
        return f"what comes before it is {_listing(_reached(site, back=True))}, not a linear operator"
    if not after:
        return f"what comes after it is {_listing(_reached(site, back=False))}, not a linear operator"
    node = before[0]
    while len(node.readers) == 1:
        node = node.readers[0]
        if node.kind not in _TRANSPARENT and node is not site:
            return f"what comes after it is {_describe(node)}, not a linear operator"
    whose = "its value" if node is site else f"the value of {_describe(node)}"
    return f"{whose} has {len(node.readers)} readers: {_listing(iter(node.readers))}"


def _listing(nodes: Iterator[FlowNode]) -> str:
    return ", ".join(_describe(node) for node in nodes) or "nothing"


def _describe(node: FlowNode) -> str:
    if node.kind == Kind.UNKNOWN:
        return node.name
    if node.kind in (Kind.INPUT, Kind.OUTPUT):
        return f"the model's {node.kind}"
    return f"`{node.name}` ({type(node.module).__name__ if node.module is not None else 'function'})"


def _names(nodes: list[FlowNode]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.name for node in nodes))
