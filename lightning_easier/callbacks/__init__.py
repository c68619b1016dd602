"""Callbacks: when to operate on the model, and on which activation. They hold no algebra."""

from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.callbacks.entropy_guided_pruning import EntropyGuidedPruningCallback
from lightning_easier.callbacks.entropy_pruning import EntropyPruningCallback
from lightning_easier.callbacks.files import Files
from lightning_easier.callbacks.optimal_transport import OptimalTransportCallback
from lightning_easier.callbacks.pruning import PruningCallback

__all__ = [
    "Distillation", "EntropyGuidedPruningCallback", "EntropyPruningCallback", "Files", "OptimalTransportCallback",
    "PruningCallback",
]  # fmt: skip
