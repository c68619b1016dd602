"""Turn what is linear in a row into the cheapest equal operators."""

from lightning_easier.collapse.engine import CollapseError, CollapseResult, collapse
from lightning_easier.collapse.prices import LatencyTable

__all__ = ["CollapseError", "CollapseResult", "LatencyTable", "collapse"]
