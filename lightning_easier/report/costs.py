"""What models cost, beside the dense network that they come from."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_easier.report.tables import Table, number
from lightning_easier.support.costs import price_in_words
from lightning_easier.support.timing import Latency, speed_up


@dataclass(frozen=True)
class ModelCost:
    """What a model costs at the shape of the example inputs.

    Attributes:
        depth: Longest chain of weight-carrying operators.
        parameters: Numbers in all parameters.
        macs: Multiply-accumulates of one call; None for a model that does not run while its operators are counted.
        activation_memory: Most bytes that the values of one call take at a time, without parameters and inputs; None
            as above.
        latency: Measured time of one call, in seconds.
    """

    depth: int
    parameters: int
    macs: int | None
    activation_memory: int | None
    latency: Latency


def costs_table(
    title: str, costs: Mapping[str, ModelCost], dense: ModelCost, scores: Mapping[str, float | None] | None = None
) -> Table:
    """Return what models cost, one a row, beside the dense network that all of them come from."""
    columns = ["", "depth", "parameters", "MACs", "fewer", "activation memory", "latency [ms]", "faster"]
    rows = []
    for name, cost in {"dense, batch norms folded": dense, **costs}.items():
        row = [
            name, str(cost.depth), f"{cost.parameters:,}", _count(cost.macs), _ratio(dense.macs, cost.macs),
            _bytes(cost.activation_memory), f"{cost.latency.median * 1e3:.3f} ± {cost.latency.spread * 1e3:.3f}",
            "-" if cost is dense else str(speed_up(dense.latency, cost.latency)),
        ]  # fmt: skip
        if scores is not None:
            row.append(number(scores["dense" if cost is dense else name]))
        rows.append(row)
    return Table(title, [*columns, "score"] if scores is not None else columns, rows)


def prices_in_words(before: float, after: float, objective: str) -> str:
    """Write what something cost before and costs after, in the unit of an objective; seconds in microseconds."""
    return f"{price_in_words(before, objective)} → {price_in_words(after, objective)}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "not counted"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _count(count: int | None) -> str:
    return "not counted" if count is None else f"{count:,}"


def _ratio(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{before / after:.2f}×" if after else "-"
