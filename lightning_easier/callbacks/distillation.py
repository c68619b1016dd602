r"""Train a pruned network on what the dense one says besides the labels.

With the logits :math:`z` of the network, :math:`z'` of the dense one, a temperature :math:`T` and a weight :math:`w`,
the loss of a training step becomes

.. math:: (1 - w) L + w T^2\, \mathrm{KL}(\mathrm{softmax}(z'/T) \,\|\, \mathrm{softmax}(z/T)),

the divergence averaged over the batch (Hinton et al., "Distilling the knowledge in a neural network", arXiv
1503.02531).
"""

from collections.abc import Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.callbacks.network import copied, holders, notice_calls
from lightning_easier.checkpoint import read_checkpoint
from lightning_easier.linearize import restore

LOSS_KEY = "distill_loss"


class Distillation:
    """Adds the divergence from a dense network to the loss of a LightningModule's training steps.

    Args:
        weight: Share of the divergence in the loss, in (0, 1].
        temperature: By which logits are divided.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        self._weight = weight
        self._temperature = temperature
        self._pl_module: LightningModule | None = None
        self._order: list[str] = []
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []  # of this step
        self._handles: list[RemovableHandle] = []
        self._teacher: LightningModule | None = None

    @staticmethod
    def check(trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it does not go with.

        Raises:
            MisconfigurationException: If the module optimizes by hand, or parameters are sharded.
        """
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "Expected argument `distill` to be False with manual optimization: the loss is the module's own "
                "business there. Distil in its training_step."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"Expected argument `distill` to be False under {type(trainer.strategy).__name__}, which shards the "
                f"parameters that the dense network would be copied from. Use DDP."
            )

    def start(self, pl_module: LightningModule, sites: Iterable[str], removed: list[str], dense: Path | None) -> None:
        """Distil from now on; a second call changes nothing.

        Args:
            pl_module: The module, some of whose activations have become linear.
            sites: Names of all activations, those that are linear among them.
            removed: Names of those that have become so in this run.
            dense: Checkpoint of the dense model.

        Raises:
            FileNotFoundError: If it is gone.
        """
        if self._pl_module is not None:
            return
        sites = list(sites)
        self._teacher = _dense(pl_module, removed, dense)
        self._pl_module, self._order = pl_module, holders(pl_module, sites)
        self._handles = notice_calls(pl_module, sites, self._note)
        step = pl_module.training_step

        @wraps(step)
        def step_with_teacher(*args: Any, **kwargs: Any) -> Any:
            self._calls = []
            return self._added(pl_module, step(*args, **kwargs))

        step_with_teacher.instead_of = vars(pl_module).get("training_step")  # type: ignore[attr-defined]
        pl_module.training_step = step_with_teacher  # type: ignore[method-assign]

    def stop(self) -> None:
        """Leave the module as it was; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._pl_module is not None:
            now: Any = vars(self._pl_module).pop("training_step")
            if now.instead_of is not None:
                self._pl_module.training_step = now.instead_of  # type: ignore[method-assign]
        self._pl_module = self._teacher = None
        self._calls = []

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._pl_module is not None and self._pl_module.training:
            self._calls.append((name, args, kwargs, output))

    def _added(self, pl_module: LightningModule, result: Any) -> Any:
        """Add the divergence to what a training step has returned."""
        calls, self._calls = self._calls, []
        if result is None:  # the step is skipped
            return None
        outermost = next((name for name in self._order if any(name == called for called, *_ in calls)), None)
        if outermost is None:
            raise MisconfigurationException(
                f"EntropyPruningCallback distils, but the training step of {type(pl_module).__name__} called none of "
                f"{[name or 'its forward' for name in self._order]}. Call the network as a module, or pass "
                f"distill=False."
            )
        assert self._teacher is not None
        teacher = self._teacher.get_submodule(outermost)
        terms = [self._divergence(teacher, *call) for name, *call in calls if name == outermost]
        term = torch.stack(terms).mean()
        pl_module.log(LOSS_KEY, term.detach())
        if isinstance(result, Mapping):
            return {**result, "loss": self._mixed(result["loss"], term)}
        return self._mixed(result, term)

    def _mixed(self, loss: Tensor, term: Tensor) -> Tensor:
        return (1 - self._weight) * loss + self._weight * term

    def _divergence(self, teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        with torch.no_grad():
            wanted = _logits(teacher.eval()(*args, **kwargs))
        got, temperature = _logits(output), self._temperature
        with torch.autocast(got.device.type, enabled=False):
            student, dense = ((z.float() / temperature).log_softmax(1) for z in (got, wanted))
            divergence = F.kl_div(student, dense, reduction="none", log_target=True).sum(1).mean()
        return temperature**2 * divergence


def _dense(pl_module: LightningModule, removed: list[str], path: Path | None) -> LightningModule:
    """Copy a module with the structure and the weights of its dense round."""
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"EntropyPruningCallback distils from the dense model of this run, but its checkpoint {path} is gone. Put "
            f"it back, or pass distill=False."
        )
    teacher = copied(pl_module)
    assert isinstance(teacher, LightningModule)
    restore(teacher, removed)
    state = read_checkpoint(path, argument="dirpath", weights_only=False)["state_dict"]
    teacher.load_state_dict(state)
    return teacher.requires_grad_(False).eval()


def _logits(output: Any) -> Tensor:
    """Return the logits in what a network has returned.

    Raises:
        MisconfigurationException: If there are none.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise MisconfigurationException(
            f"EntropyPruningCallback distils logits of shape (N, classes, *), a tensor or the `logits` of an output, "
            f"but the network returned {type(output).__name__}. Pass distill=False."
        )
    return found
