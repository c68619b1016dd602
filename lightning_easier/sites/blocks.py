"""Which submodules can be taken out whole, so that values of the same shapes go on along the way that is left.

There are two sorts. A *block* holds its skip: its output is its input and something added to it, ``x + f(x)``, with
norms, dropouts and activations before and after. The identity takes its place. A *branch* is the ``f`` where its
caller adds: its output reaches nothing but an addition to the value that it was computed from. Zeros take its place.

Both are read from the flow of values, without an example input: :mod:`.shapes` follows the shapes through it, and
:mod:`.block_search` finds both sorts in it. Here they become what the other wings know: names, and which lies in which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_easier.sites.activations import unwrap
from lightning_easier.sites.block_search import BlockSearch, Leaves
from lightning_easier.sites.dataflow import Call
from lightning_easier.sites.shapes import tuple_length
from lightning_easier.support.inference import evaluation_mode


@dataclass(frozen=True, eq=False)
class Block:
    """A submodule that can be taken out whole.

    Attributes:
        name: Qualified name.
        module: The module.
        leaves: What takes its place: the identity of the first tensor that it is given, or zeros of its shape.
        inside: Qualified name of the innermost other block that holds it; None for an outermost one.
        returns: None if the module returns a tensor; else the length of the tuple that it returns, the first item of
            which is the value, while nothing reads the others.
        axes: Number of axes of its input -> which of them holds the channels, from 0 on; what is not known is left out.
        axes_of_sum: The same of the sum that a branch is added to.
    """

    name: str
    module: nn.Module
    leaves: Leaves
    inside: str | None
    returns: int | None = None
    axes: Mapping[int, int] = field(default_factory=dict, repr=False)
    axes_of_sum: Mapping[int, int] = field(default_factory=dict, repr=False)


def find_blocks(model: nn.Module) -> list[Block]:
    """Find the submodules of a model that can be taken out whole.

    The model is looked at as in eval mode, and not touched; what is no block in train mode as well is left out. So is
    what is called several times, what somebody reads an inner value of, and what overwrites a value that is read
    elsewhere.

    Args:
        model: Any module; names are relative to what is inside ``torch.compile`` and parallel wrappers.

    Returns:
        The blocks in execution order, an outer one before those in it.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.
    """
    inner = unwrap(model)
    with evaluation_mode(inner):
        search = BlockSearch(inner, training=False)
        found = search.found()
        trained = (
            {(call.module, leaves) for call, leaves in BlockSearch(inner, training=True).found()} if found else set()
        )
    blocks: list[Block] = []
    open_blocks: list[tuple[Call, str]] = []
    for call, leaves in found:
        if (call.module, leaves) not in trained:
            continue
        while open_blocks and not _holds(open_blocks[-1][0], call):
            open_blocks.pop()
        inside = open_blocks[-1][1] if open_blocks else None
        axes, of_sum = search.axes(call), search.axes_of_sum(call)
        blocks.append(Block(call.name, call.module, leaves, inside, tuple_length(call), axes, of_sum))
        open_blocks.append((call, call.name))
    return blocks


def _holds(outer: Call, inner: Call) -> bool:
    return inner.name.startswith(f"{outer.name}.") or (outer.first <= inner.first and inner.end <= outer.end)
