"""What a forward is called with: tensors by position, and the last of them by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Arguments(tuple[Any, ...]):
    """The tensors that a forward is called with, or something for each of them; those by position first.

    A tuple that is none of these is one whose tensors are all passed by position.

    Args:
        values: The tensors.
        names: What the last of them are passed as.
        layout: In which layout of memory :func:`copies` of images ``(N, C, H, W)`` are; by default as they are.

    Example:
        >>> import torch
        >>> arguments = Arguments([torch.ones(2), torch.ones(3)], ["mask"])
        >>> len(arguments), arguments.names
        (2, ('mask',))
    """

    names: tuple[str, ...]
    layout: torch.memory_format

    def __new__(
        cls, values: Iterable[Any], names: Iterable[str] = (), layout: torch.memory_format = torch.preserve_format
    ) -> "Arguments":
        """Make the tuple."""
        arguments = super().__new__(cls, values)
        arguments.names, arguments.layout = tuple(names), layout
        return arguments


# Else torch would take them for one value, which is no tensor
pytree.register_pytree_node(
    Arguments,
    lambda arguments: (list(arguments), (arguments.names, arguments.layout)),
    lambda tensors, context: Arguments(tensors, *(context or ())),
)


def names_of(arguments: Sequence[Any]) -> tuple[str, ...]:
    """Return what the last of some arguments are passed as."""
    return arguments.names if isinstance(arguments, Arguments) else ()


def mapped(function: Callable[[Tensor], Tensor], arguments: Sequence[Tensor]) -> Arguments:
    """Make other tensors of those that a forward is called with; they are passed as these are."""
    return Arguments(map(function, arguments), names_of(arguments), layout_of(arguments))


def layout_of(arguments: Sequence[Any]) -> torch.memory_format:
    """Return in which layout of memory copies of images are."""
    return arguments.layout if isinstance(arguments, Arguments) else torch.preserve_format


def copies(arguments: Sequence[Tensor]) -> Arguments:
    """Copy arguments for a forward that may write into them."""
    layout = layout_of(arguments)
    if layout == torch.preserve_format:  # sparse tensors take no layout, not even theirs
        return mapped(lambda argument: argument.clone(), arguments)
    return mapped(lambda x: x.clone(memory_format=layout) if x.ndim == 4 else x.clone(), arguments)


def split(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return what is passed by position, and what by name."""
    names = names_of(arguments)
    positional = len(arguments) - len(names)
    return tuple(arguments[:positional]), dict(zip(names, arguments[positional:], strict=True))


def named_arguments(model: nn.Module, given: Sequence[Any]) -> list[str]:
    """Name the arguments that a forward is given, those that it collects (``*args``) by a number."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [each.name for each in parameters if each.kind in kinds]
    positional = len(split(given)[0])
    return [*names[:positional], *(f"input_{each}" for each in range(len(names), positional)), *names_of(given)]


def bound(model: nn.Module, given: Sequence[Any]) -> dict[str, Any]:
    """Return what a forward is given by the names of its parameters; what it collects is nested."""
    positional, by_name = split(given)
    return dict(inspect.signature(model.forward).bind(*positional, **by_name).arguments)


def call(model: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call a model with arguments."""
    positional, by_name = split(arguments)
    return model(*positional, **by_name)
