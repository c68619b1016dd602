"""How an exported file compares with the model."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_easier.report.tables import Report, Table


@dataclass(frozen=True)
class Parity:
    """How an exported file's output compares with the model's at one batch size.

    Attributes:
        batch_size: The batch size; 1 where the first input has no axes.
        max_difference: Largest absolute difference.
        relative_difference: ``‖y - y₀‖ / ‖y₀‖``.
    """

    batch_size: int
    max_difference: float
    relative_difference: float


@dataclass
class ExportReport(Report):
    """What was exported, and how it compares with the model.

    Attributes:
        path: The file.
        format: ``"onnx"`` or ``"pt2"``.
        size: Size of the file in bytes.
        parity: One comparison a batch size.
        tolerance: Relative difference up to which the file counts as equal.
    """

    path: str
    format: str
    size: int
    parity: list[Parity]
    tolerance: float

    def tables(self) -> Iterator[Table]:
        """Yield the parity figures."""
        rows = [
            (str(p.batch_size), f"{p.max_difference:.2e}", f"{p.relative_difference:.2e}", f"{self.tolerance:.0e}")
            for p in self.parity
        ]
        columns = ("batch size", "largest difference", "relative difference", "tolerance")
        yield Table(f"Export: {self.path} ({self.format}, {self.size:,} bytes)", columns, rows)
