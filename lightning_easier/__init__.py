"""Make trained networks shallower and really faster, inside PyTorch Lightning."""

from lightning_easier.activations import isolate_activations
from lightning_easier.callbacks import EntropyPruningCallback
from lightning_easier.candidates import candidates
from lightning_easier.chain_fits import measure_fits
from lightning_easier.checkpoint import expect_pruned, load_pruned
from lightning_easier.collapse import CollapseError, CollapseResult, collapse
from lightning_easier.compress import CompressResult, compress
from lightning_easier.entropy import ActivationEntropy, activation_entropy
from lightning_easier.export import ExportError, export
from lightning_easier.linearize import linearize, restore
from lightning_easier.probe import EntropyProbe, measure_affines, measure_entropy
from lightning_easier.report import CandidateReport, CollapseReport, CompressReport, ExportReport, PruningReport

__version__ = "0.1.0"

__all__ = [
    "EntropyPruningCallback",
    "measure_entropy", "measure_affines", "measure_fits", "ActivationEntropy", "activation_entropy", "EntropyProbe",
    "isolate_activations", "candidates", "linearize", "restore", "load_pruned", "expect_pruned",
    "collapse", "CollapseResult", "CollapseError",
    "compress", "CompressResult",
    "export", "ExportError",
    "PruningReport", "CandidateReport", "CollapseReport", "CompressReport", "ExportReport",
]  # fmt: skip
