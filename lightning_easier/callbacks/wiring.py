"""What has to hold around the callback: the strategy, the other callbacks, the data, compiled code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn

from lightning_easier.rectifiers import FunctionalPReLU


def check(trainer: Trainer, candidates: Mapping[str, nn.Module], measure_on: str, dirpath: str | None) -> None:
    """Refuse what pruning does not go with, before anything is changed.

    Args:
        trainer: The Trainer, before it starts.
        candidates: Name -> module of the activations that may become linear.
        measure_on: Which batches the entropy is measured on.
        dirpath: Folder of the rounds' checkpoints.

    Raises:
        MisconfigurationException: With the reason and the remedy.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"EntropyPruningCallback does not support {type(trainer.strategy).__name__} yet: it shards the model "
            f"that would be changed. Use DDP or one device."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise MisconfigurationException(
                f"EntropyPruningCallback does not go with {type(callback).__name__}, which keeps a second model "
                f"that would stay unpruned. Remove one of the two."
            )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "EntropyPruningCallback does not support strategies that spawn or fork processes yet: the weights "
            "would come back into a model of the old structure. Use strategy='ddp' in a script, or torchrun."
        )
    with_parameters = [
        name
        for name, module in candidates.items()
        if isinstance(module, FunctionalPReLU) or next(module.parameters(), None) is not None
    ]
    if with_parameters and trainer.world_size > 1:
        raise MisconfigurationException(
            f"EntropyPruningCallback can't remove {with_parameters} under {trainer.world_size} processes yet: they "
            f"have parameters, which the wrapped model would miss. Pass them as `exclude`."
        )
    if dirpath is not None and Path(dirpath).exists() and not Path(dirpath).is_dir():
        raise MisconfigurationException(f"Expected argument `dirpath` to be a folder, but {dirpath} is a file")
    if measure_on == "validation" and not trainer.enable_validation:
        raise MisconfigurationException(
            f"EntropyPruningCallback measures on validation batches, but the run has none (limit_val_batches="
            f"{trainer.limit_val_batches}). Add a validation loader and step, or pass measure_on='training'."
        )


def is_compiled(pl_module: LightningModule) -> bool:
    """Tell whether the module or a part of it is compiled, by the user or handed to the Trainer so."""
    handed_over = getattr(pl_module, "_compiler_ctx", None) is not None
    return handed_over or any(
        isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in pl_module.modules()
    )


def forget_compiled_code(pl_module: LightningModule) -> None:
    """Have compiled code made anew: it neither sees hooks that were added since, nor misses those that are gone."""
    if is_compiled(pl_module):
        torch._dynamo.reset()
