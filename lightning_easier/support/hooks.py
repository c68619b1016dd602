"""Hooks that belong to one model: a copy of it, or a pickle, does not inherit what they count or notice."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Generic, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch.fx import Proxy

T = TypeVar("T")


def _ignore(module: nn.Module, *_: Any) -> None:
    """Do nothing."""


def _ignoring() -> Callable[..., None]:
    return _ignore


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module of one input is called with, by position or by name; None if it is called with nothing."""
    return next(iter((*args, *kwargs.values())), None)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first tensor that a module is called with, by position or by name; None if there is none.

    While a forward is traced, that is what stands for one.
    """
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | Proxy)), None)


class HookOfOneModel:
    """A forward hook or pre-hook whose owner is somewhere else; in a copy of the module there is one that does nothing.

    A closure would be shared with the copy, whose calls would then be counted as the model's own, and can't be pickled.

    Args:
        call: What the hook does; it takes what such a hook takes.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> None:
        """Do it."""
        self._call(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _ignore

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _ignoring, ()


def is_of_one_model(hook: Any) -> bool:
    """Tell whether a hook is one that only counts or notices, or what a copy has of it."""
    return isinstance(hook, HookOfOneModel) or hook is _ignore


def remove_hooks_of_one_model(model: nn.Module) -> None:
    """Take away the hooks that only count or notice, before a copy is timed: the fused layers of torch run without any.

    Args:
        model: A copy, which nobody counts in.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_of_one_model(hook)]:
                del hooks[key]


class Remembered(Generic[T]):
    """Knows one object again without keeping it alive; a copy of this, or a pickle, knows none.

    Args:
        it: The object; none by default.
    """

    def __init__(self, it: T | None = None) -> None:
        self._it: Callable[[], T | None] = (lambda: None) if it is None else ref(it)

    def is_(self, other: T) -> bool:
        """Tell whether an object is that one."""
        return self._it() is other

    def __reduce__(self) -> tuple[type["Remembered[T]"], tuple[()]]:
        return type(self), ()


class Undone(ExitStack):
    """Undoes what was put around objects of others, the last first; a copy of this, or a pickle, undoes nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Undone":
        return type(self)()

    def __reduce__(self) -> tuple[type["Undone"], tuple[()]]:
        return type(self), ()
