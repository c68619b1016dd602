"""What differs between the versions of torch that are supported, in one place."""

from inspect import signature
from typing import Any

import torch
from torch.export import ExportedProgram

SAYS_SIZES = "check_guards" in signature(ExportedProgram.module).parameters
"""Whether torch.export says for which sizes what it recorded holds; without, a capture could be wrong for others."""


def why_sizes_are_unknown() -> str:
    """Say why nothing is captured by torch.export where :data:`SAYS_SIZES` is false, and what to do."""
    return (
        f"torch.export of torch {torch.__version__} does not say for which sizes what it records holds, "
        f"which a later torch does (2.10, for example)"
    )


def children_of(specification: Any) -> list[Any]:
    """Return the children of a ``TreeSpec``, which were an attribute once."""
    if hasattr(specification, "children"):
        return list(specification.children())
    return list(specification.children_specs)
