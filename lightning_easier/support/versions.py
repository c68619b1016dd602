"""What differs between the versions of torch that are supported, in one place."""

from typing import Any


def children_of(specification: Any) -> list[Any]:
    """Return the children of a ``TreeSpec``, which were an attribute once."""
    if hasattr(specification, "children"):
        return list(specification.children())
    return list(specification.children_specs)
