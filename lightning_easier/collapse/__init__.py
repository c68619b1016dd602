"""Merge the linear operators that have become neighbours."""

from lightning_easier.collapse.engine import CollapseError, CollapseResult, collapse

__all__ = ["CollapseError", "CollapseResult", "collapse"]
