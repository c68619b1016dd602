"""What may be done to a model, and in which order: each method is a frozen config that a user writes."""

from lightning_easier.pruning.methods.base import Evidence, Measuring, Method, Proposal, Regularizer, Worker
from lightning_easier.pruning.methods.blocks import RemoveBlocks
from lightning_easier.pruning.methods.fit import FitChains
from lightning_easier.pruning.methods.linearize import Linearize, Order
from lightning_easier.pruning.methods.sparsify import Sparsify

__all__ = [
    "Evidence", "FitChains", "Linearize", "Measuring", "Method", "Order", "Proposal", "Regularizer", "RemoveBlocks",
    "Sparsify", "Worker",
]  # fmt: skip
