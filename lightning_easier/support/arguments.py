"""Checks of arguments that name the argument and the value."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def as_globs(argument: str, value: Iterable[str] | str | None) -> list[str] | None:
    """Take one glob for a list of one."""
    if value is None or isinstance(value, str):
        return [value] if value is not None else None
    if (
        not isinstance(value, Iterable)
        or isinstance(value, Mapping)
        or not all(isinstance(glob, str) for glob in value)
    ):
        raise TypeError(f"Expected argument `{argument}` to hold name globs, but got {value!r}")
    return list(value)


def as_axes(argument: str, value: Mapping[str, int] | None) -> dict[str, int]:
    """Take nothing for an empty mapping from name globs to axes."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"Expected argument `{argument}` to map name globs to axes, but got {value!r}")
    for glob, axis in (value or {}).items():
        if not isinstance(glob, str) or isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"Expected argument `{argument}` to map name globs to axes, but got {value!r}")
    return dict(value or {})


def check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """Require one of several values."""
    if value not in choices:
        raise ValueError(f"Expected argument `{argument}` to be one of {choices}, but got {value!r}")


def check_instance(argument: str, value: Any, kind: Any) -> None:
    """Require an instance of a class, or of one of a union."""
    if not isinstance(value, kind):
        name = kind.__name__ if isinstance(kind, type) else kind.__args__[0].__name__
        raise TypeError(f"Expected argument `{argument}` to be a {name}, but got {value!r}")


def check_integer(argument: str, value: Any, least: int) -> None:
    """Require an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{argument}` to be an integer, but got {value!r}")
    if value < least:
        raise ValueError(f"Expected argument `{argument}` to be at least {least}, but got {value}")


def check_bool(argument: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected argument `{argument}` to be a bool, but got {value!r}")


def check_share(argument: str, value: Any) -> None:
    """Require a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{argument}` to be a number, but got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"Expected argument `{argument}` to be above 0 and at most 1, but got {value}")


def check_positive(argument: str, value: Any) -> None:
    """Require a finite number above 0."""
    check_non_negative(argument, value)
    if value == 0:
        raise ValueError(f"Expected argument `{argument}` to be above 0, but got {value}")


def check_non_negative(argument: str, value: Any) -> None:
    """Require a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{argument}` to be a number, but got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"Expected argument `{argument}` to be finite and at least 0, but got {value}")
