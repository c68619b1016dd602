"""Make trained networks shallower and really faster, inside PyTorch Lightning."""

from lightning_easier.callbacks import EntropyPruningCallback
from lightning_easier.collapsing import CollapseError, CollapseResult, collapse
from lightning_easier.collapsing.fit.chain_fits import fit_chains
from lightning_easier.exporting import ExportError, export
from lightning_easier.measure.entropy import ActivationEntropy, activation_entropy
from lightning_easier.measure.probe import EntropyProbe, measure_affines, measure_entropy
from lightning_easier.pruning.candidates import candidates
from lightning_easier.pruning.compress import CompressResult, compress
from lightning_easier.report import CandidateReport, CollapseReport, CompressReport, ExportReport, PruningReport
from lightning_easier.sites.activations import isolate_activations
from lightning_easier.structure.checkpoint import expect_pruned, load_pruned
from lightning_easier.structure.linearize import linearize, restore

__version__ = "0.1.0"

__all__ = [
    "EntropyPruningCallback",
    "measure_entropy", "measure_affines", "fit_chains", "ActivationEntropy", "activation_entropy", "EntropyProbe",
    "isolate_activations", "candidates", "linearize", "restore", "load_pruned", "expect_pruned",
    "collapse", "CollapseResult", "CollapseError",
    "compress", "CompressResult",
    "export", "ExportError",
    "PruningReport", "CandidateReport", "CollapseReport", "CompressReport", "ExportReport",
]  # fmt: skip
