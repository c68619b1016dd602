"""Plain results, shown: tables, Markdown, JSON, figures, and what a run writes to TensorBoard."""

from lightning_easier.report.blocks import BlockReport, CollapsibleBlock
from lightning_easier.report.candidates import BlockCandidate, BlockWay, Candidate, CandidateReport, FitReport
from lightning_easier.report.collapsing import CollapseReport, Fitted, Merge, OperatorTime, Refusal, Trimmed
from lightning_easier.report.compression import CompressReport, Trial
from lightning_easier.report.costs import ModelCost
from lightning_easier.report.dashboard import log_report
from lightning_easier.report.exporting import ExportReport, Parity
from lightning_easier.report.pruning import PruningReport, Round
from lightning_easier.report.saving import check_report_path, save_report
from lightning_easier.report.tables import Report, Table

__all__ = [
    "BlockCandidate", "BlockReport", "BlockWay", "Candidate", "CandidateReport", "CollapseReport", "CollapsibleBlock",
    "CompressReport", "ExportReport", "FitReport", "Fitted", "Merge", "ModelCost", "OperatorTime", "Parity",
    "PruningReport", "Refusal", "Report", "Round", "Table", "Trial", "Trimmed",
    "check_report_path", "log_report", "save_report",
]  # fmt: skip
