"""Turn what is linear in a row into the cheapest equal operators."""

from lightning_easier.collapsing.engine import CollapseResult, collapse
from lightning_easier.collapsing.errors import CollapseError
from lightning_easier.support.timing import LatencyTable

__all__ = ["CollapseError", "CollapseResult", "LatencyTable", "collapse"]
