"""Write a part of a captured graph without the channels that leave it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_easier.collapsing.algebra.slices import without_channels, without_own_channels
from lightning_easier.collapsing.exact.dead_channels import DeadChannels
from lightning_easier.collapsing.exact.writing import EQUALS, Writer


def trim(dead: DeadChannels, nodes: Sequence[fx.Node], writer: Writer, there: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Write the nodes of a part anew, with what is left of them.

    Args:
        dead: What leaves.
        nodes: The nodes, in execution order.
        writer: Writes into the graph.
        there: Name -> node of the graph that is written into, which may be a copy of the one that was looked at.

    Returns:
        What computes the nodes now.
    """
    now = {node: there[node.name] for node in nodes}
    for node in nodes:
        stays, meta = dead.stays(node), now[node].meta["tensor_meta"]
        made = _made(dead, node)
        if made is not None:
            value = dead.flow.value_of(node)
            now[node] = writer.instead(now[node], now.get(value, there[value.name]), made, meta.dtype)
        if stays is None:
            continue
        axis, left = dead.flow.channels[node].axis, int(stays.sum())
        if node in dead.flow.named:
            _name(now[node], dead.flow.named[node], left)
        sizes = [*meta.shape]
        sizes[axis] = left
        now[node].meta["tensor_meta"] = meta._replace(shape=torch.Size(sizes))
        now[node].meta[EQUALS] = None  # none of the source's values has so few
    return [now[node] for node in nodes]


def _made(dead: DeadChannels, node: fx.Node) -> nn.Module | None:
    """Make what a node calls with fewer channels; None where it need not change."""
    selection, stays = dead.selection(node), dead.stays(node)
    if selection is not None and not selection.is_whole:
        return without_channels(dead.flow.operators[node].operator, selection)
    if node in dead.flow.for_each and stays is not None:
        return without_own_channels(dead.flow.for_each[node][1], stays)
    return None


def _name(node: fx.Node, axis: int, channels: int) -> None:
    """Let a view or a reshape name another number of channels."""
    sizes: Any = node.args[1:]
    whole = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
    changed = list(sizes[0] if whole else sizes)
    changed[axis] = channels
    node.args = (node.args[0], changed) if whole else (node.args[0], *changed)
