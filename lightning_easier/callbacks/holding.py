"""Operations that have to hold what they did, while an optimizer changes the parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_easier.structure.operations import from_plain, kind_of


class Holding:
    """Calls operations after every step of an optimizer."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._hold: Callable[..., None] | None = None

    def begin(self, trainer: Trainer, pl_module: LightningModule, operations: Iterable[Mapping[str, Any]]) -> None:
        """Have these operations hold, and no others.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            operations: The operations as plain data, those that hold nothing among them.
        """
        self.end()
        held = [from_plain(plain) for plain in operations if kind_of(plain).holds()]
        if not held:
            return

        def hold(*_: Any) -> None:
            for operation in held:
                operation.hold(pl_module)

        self._hold = hold
        self._handles = [optimizer.register_step_post_hook(hold) for optimizer in trainer.optimizers]

    def once(self) -> None:
        """Have them hold before what is judged or saved: not only optimizers change parameters."""
        if self._hold is not None:
            self._hold()

    def end(self) -> None:
        """Let go; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hold = [], None
