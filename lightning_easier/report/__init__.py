"""Plain results, shown: tables, Markdown, JSON, figures, and what a run writes to TensorBoard."""

from lightning_easier.report.results import (
    Candidate,
    CandidateReport,
    CollapseReport,
    CompressReport,
    ExportReport,
    Fitted,
    Merge,
    ModelCost,
    Parity,
    PruningReport,
    Refusal,
    Report,
    Round,
    Table,
    Trial,
)

__all__ = [
    "Candidate", "CandidateReport", "CollapseReport", "CompressReport", "ExportReport", "Fitted", "Merge", "ModelCost",
    "Parity", "PruningReport", "Refusal", "Report", "Round", "Table", "Trial",
]  # fmt: skip
