"""Turn what is linear in a row into the cheapest equal operators."""

from lightning_easier.collapse.engine import CollapseResult, collapse
from lightning_easier.collapse.errors import CollapseError
from lightning_easier.timing import LatencyTable

__all__ = ["CollapseError", "CollapseResult", "LatencyTable", "collapse"]
