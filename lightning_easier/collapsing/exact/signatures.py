"""What the forward of a captured graph takes: what its model takes, as far as a graph can.

The arguments that the example leaves out have defaults. A number may stay an argument, if the forward can be recorded
without asking for its value. Of any other the default was recorded: it stays an argument that takes its default only.
An argument that the example gives keeps its default, too, and yet takes tensors only: a tensor was recorded.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_easier.collapsing.exact.guards import is_tensor
from lightning_easier.support.calls import named_arguments, names_of, split
from lightning_easier.support.inference import describe

FIXED = "fixed"
"""Key in the ``meta`` of a placeholder: its argument takes nothing but its default."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


def numbers(model: nn.Module, given: Sequence[Any]) -> list[str]:
    """Name the arguments that have a number for a default, and are not given."""
    kept = [each for each in _kept(model, given) if each.kind is not each.POSITIONAL_ONLY]
    return [each.name for each in kept if type(each.default) in (int, float)]


def lost_arguments(model: nn.Module, given: Sequence[Any]) -> list[str]:
    """Name the arguments that a model can do without and a captured graph does not take; what it collects has stars."""
    kept = _kept(model, given)
    lost = [each.name for each in _left_out(model, given) if each not in kept]
    parameters = {each.name: each for each in _parameters(model)}
    positional = sum(each.kind in _POSITIONAL for each in parameters.values())
    for each in parameters.values():
        if each.kind is each.VAR_POSITIONAL and len(split(given)[0]) <= positional:
            lost.append(f"*{each.name}")
        elif each.kind is each.VAR_KEYWORD and all(name in parameters for name in names_of(given)):
            lost.append(f"**{each.name}")
    return lost


def fixed_arguments(captured: fx.GraphModule) -> dict[str, Any]:
    """Return the arguments that take their defaults only, with these."""
    return {
        str(node.target): node.args[0] for node in captured.graph.find_nodes(op="placeholder") if FIXED in node.meta
    }


def restore_arguments(graph: fx.Graph, model: nn.Module, arguments: Sequence[Tensor]) -> None:
    """Let a graph take what its model takes, in the same order; what was recorded of an optional argument is asserted.

    Args:
        graph: The graph; it takes the given arguments, and numbers that stay arguments.
        model: The model.
        arguments: What the example gives.
    """
    given = len(arguments)
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    last = list(placeholders.values())[given - 1]
    conditions = _tensors(list(placeholders.values())[:given], model, arguments)
    for each in _kept(model, arguments):
        node = placeholders.get(each.name)
        if node is None:
            with graph.inserting_after(last):
                node = graph.placeholder(each.name, default_value=each.default)
            node.meta[FIXED] = True
            message = (
                f"Expected argument `{each.name}` to be {each.default!r}, its default, with which this model was "
                f"collapsed. Collapse the model with another `{each.name}` among `example_inputs`, or call the model "
                f"that was collapsed."
            )
            # `is` could not be recorded again, which unpickling does
            conditions.append((operator.eq, (node, each.default), message))
        elif node is not last:
            last.append(node)
        last = node
    for function, operands, message in reversed(conditions):
        with graph.inserting_after(last):
            holds = graph.call_function(function, operands)
        with graph.inserting_after(holds):
            graph.call_function(torch._assert, (holds, message))


def _tensors(
    placeholders: Sequence[fx.Node], model: nn.Module, arguments: Sequence[Tensor]
) -> list[tuple[Callable[..., Any], tuple[Any, ...], str]]:
    """Give placeholders the defaults of their arguments; that those are tensors is a condition then.

    Returns:
        A function each, what to call it with, and what to say where the result is false.
    """
    parameters = {each.name: each for each in _parameters(model) if each.kind not in _COLLECTING}
    may_be_left_out = [_has_default(parameters.get(str(node.target))) for node in placeholders]
    conditions: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = []
    for number, (node, value) in enumerate(zip(placeholders, arguments, strict=True)):
        if not may_be_left_out[number]:
            continue
        each = parameters[str(node.target)]
        if all(may_be_left_out[number:]):  # None in the place of what a graph can't hold: it is refused, too
            node.args = (each.default if _is_plain(each.default) else None,)
        message = (
            f"Expected argument `{each.name}` to be a tensor: this model was collapsed with {describe(value)} for it. "
            f"Pass one, or collapse the model without `{each.name}` among `example_inputs`."
        )
        conditions.append((is_tensor, (node,), message))
    return conditions


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _has_default(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is not parameter.empty


def _left_out(model: nn.Module, given: Sequence[Any]) -> list[inspect.Parameter]:
    """List the arguments with defaults that are not given."""
    names = named_arguments(model, given)
    return [each for each in _parameters(model) if each.kind not in _COLLECTING and each.name not in names]


def _kept(model: nn.Module, given: Sequence[Any]) -> list[inspect.Parameter]:
    """List those of them that a graph can take, up to the first that it can't: what follows would move to its place."""
    collects = any(each.kind is each.VAR_POSITIONAL for each in _parameters(model))
    kept = []
    for each in _left_out(model, given):
        # A graph takes none by name only; where a forward collects arguments, one more of those would be taken for it
        if not _is_plain(each.default) or (collects and each.kind is each.KEYWORD_ONLY):
            break
        kept.append(each)
    return kept


def _is_plain(default: Any) -> bool:
    """Tell whether a graph can hold a default, and compare with it."""
    if isinstance(default, tuple):
        return type(default) is tuple and all(_is_plain(each) for each in default)
    return default is None or (type(default) in _PLAIN and not (isinstance(default, float) and math.isnan(default)))
