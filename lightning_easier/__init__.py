"""Make trained networks shallower and really faster, inside PyTorch Lightning."""

from lightning_easier.callbacks import (
    Distillation,
    EntropyGuidedPruningCallback,
    EntropyPruningCallback,
    Files,
    OptimalTransportCallback,
    PruningCallback,
)
from lightning_easier.collapsing import CollapseError, CollapseResult, collapse
from lightning_easier.collapsing.fit.chain_fits import fit_chains
from lightning_easier.exporting import ExportError, export
from lightning_easier.measure.entropy import ActivationEntropy, activation_entropy
from lightning_easier.measure.probe import EntropyProbe, measure_affines, measure_entropy, measure_error_likelihood
from lightning_easier.measure.transport import SlicedWasserstein, sliced_wasserstein
from lightning_easier.pruning.candidates import candidates
from lightning_easier.pruning.collapsible import collapsible_blocks
from lightning_easier.pruning.compress import CompressResult, compress
from lightning_easier.pruning.finetuning import Finetuning
from lightning_easier.pruning.methods import (
    FitChains,
    Linearize,
    Measuring,
    Method,
    Order,
    Proposal,
    Regularizer,
    RemoveBlocks,
    Sparsify,
)
from lightning_easier.pruning.rules import Rounds
from lightning_easier.pruning.targets import Target
from lightning_easier.report import (
    BlockReport,
    CandidateReport,
    CollapseReport,
    CompressReport,
    ExportReport,
    PruningReport,
)
from lightning_easier.sites.activations import isolate_activations
from lightning_easier.structure.checkpoint import load_pruned, restore_structure_on_load
from lightning_easier.structure.linearize import linearize, restore
from lightning_easier.structure.masking import Masks
from lightning_easier.structure.operations import (
    Affines,
    FittedBlocks,
    FittedOperators,
    Identities,
    Operation,
    TakenOut,
)

__version__ = "0.1.0"

__all__ = [
    "EntropyPruningCallback", "EntropyGuidedPruningCallback", "OptimalTransportCallback", "PruningCallback",
    "Linearize", "FitChains", "Sparsify", "RemoveBlocks", "Order",
    "Rounds", "Measuring", "Target", "Distillation", "Files",
    "Method", "Proposal", "Regularizer",
    "Operation", "Identities", "Affines", "FittedOperators", "FittedBlocks", "Masks", "TakenOut",
    "measure_entropy", "measure_affines", "measure_error_likelihood", "fit_chains",
    "ActivationEntropy", "activation_entropy", "EntropyProbe",
    "SlicedWasserstein", "sliced_wasserstein",
    "isolate_activations", "candidates", "collapsible_blocks", "linearize", "restore",
    "load_pruned", "restore_structure_on_load",
    "collapse", "CollapseResult", "CollapseError",
    "compress", "CompressResult", "Finetuning",
    "export", "ExportError",
    "PruningReport", "CandidateReport", "BlockReport", "CollapseReport", "CompressReport", "ExportReport",
]  # fmt: skip
