"""Write the nodes of a captured graph without the channels that leave."""

from typing import Any

import torch
from torch import fx, nn

from lightning_easier.collapsing.algebra.slices import without_channels, without_own_channels
from lightning_easier.collapsing.exact.dead_channels import DeadChannels
from lightning_easier.collapsing.exact.writing import EQUALS, Writer


def trim(dead: DeadChannels, node: fx.Node, writer: Writer, there: dict[str, fx.Node]) -> fx.Node:
    """Write a node anew, with what is left of it.

    Args:
        dead: What leaves.
        node: The node.
        writer: Writes into the graph.
        there: Name -> node of the graph that is written into, which may be a copy of the one that was looked at. What
            takes the place of the node is noted.

    Returns:
        What computes the node now.
    """
    now, made, stays = there[node.name], _made(dead, node), dead.stays(node)
    meta = now.meta["tensor_meta"]
    if made is not None:
        now = there[node.name] = writer.instead(now, there[dead.flow.value_of(node).name], made, meta.dtype)
    if stays is None:
        return now
    axis, sizes = dead.flow.channels[node].axis, [*meta.shape]
    sizes[axis] = int(stays.sum())
    if node in dead.flow.named:
        _name(now, axis, sizes[axis])
    now.meta["tensor_meta"] = meta._replace(shape=torch.Size(sizes))
    now.meta[EQUALS] = None  # none of the source's values has so few
    return now


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
