"""Callbacks: when to operate on the model, and on which activation. They hold no algebra."""

from lightning_easier.callbacks.entropy_pruning import EntropyPruningCallback

__all__ = ["EntropyPruningCallback"]
