"""Which submodules can be taken out whole, and what each of them costs."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_easier.report.tables import Report, Table, notes_table


@dataclass(frozen=True)
class CollapsibleBlock:
    """A submodule that can be taken out whole.

    Attributes:
        name: Qualified name.
        kind: Class name of the module.
        leaves: What takes its place: ``"identity"`` or ``"zeros"`` of its input's shape.
        inside: Qualified name of the innermost other block that holds it; None for an outermost one.
        macs: Its share of the model's multiply-accumulates; None where they were not counted.
        time: Its share of the model's time, measured alone; None where it was not.
    """

    name: str
    kind: str
    leaves: str
    inside: str | None
    macs: float | None = None
    time: float | None = None


@dataclass
class BlockReport(Report):
    """The submodules of a model that can be taken out whole, in execution order, an outer one before those in it.

    Attributes:
        blocks: One a submodule.
        left_out: Name -> reason, of those that seemed to be some and were not, run on the example inputs.
        notes: What else is to be known.
    """

    blocks: list[CollapsibleBlock]
    left_out: dict[str, str]
    notes: list[str]

    def tables(self) -> Iterator[Table]:
        """Yield a table with a row a block, and one of those that were left out, if some were."""
        columns = ("block", "kind", "leaves", "inside", "share of MACs", "share of time")
        rows = [
            (each.name, each.kind, each.leaves, each.inside or "-", _share(each.macs), _share(each.time))
            for each in self.blocks
        ]
        yield Table("Blocks that can be taken out" if rows else "No blocks that can be taken out", columns, rows)
        if self.left_out:
            yield Table("Left out", ("block", "why"), list(self.left_out.items()))
        yield from notes_table(self.notes)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
