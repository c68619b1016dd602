"""What is added to the loss that a LightningModule's training steps return, without the module knowing of it.

The step is wrapped on the instance. Several may be added: each is put around those that are there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import update_wrapper
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_easier.callbacks import wiring
from lightning_easier.pruning.methods import Regularizer


class AddedLoss(ABC):
    """Adds something to the loss of a LightningModule's training steps, from :meth:`attach` to :meth:`detach`."""

    without: str
    """The argument of the callback that asks for it, and its value that does not, for errors."""
    in_step: bool
    """Whether a step goes on whose loss it is added to."""

    def __init__(self) -> None:
        self.pl_module: LightningModule | None = None
        self.in_step = False

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it does not go with.

        Raises:
            MisconfigurationException: If the module optimizes by hand.
        """
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"Expected argument {self.without} with manual optimization: the loss is the module's "
                f"own business there. Add it in its training_step."
            )

    def attach(self, pl_module: LightningModule) -> None:
        """Put it around the module's training step."""
        self.pl_module = pl_module
        pl_module.training_step = _StepWithAddedLoss(pl_module, self)  # type: ignore[method-assign]
        wiring.forget_compiled_code(pl_module)

    def detach(self) -> None:
        """Leave the module as it was; a second call does nothing."""
        own: dict[str, Any] = {} if self.pl_module is None else vars(self.pl_module)
        now = own.get("training_step")
        if isinstance(now, _StepWithAddedLoss) and now.added is self:  # else somebody has put another around it
            del own["training_step"]
            if now.instead_of is not None:
                own["training_step"] = now.instead_of
        self.pl_module = None

    @abstractmethod
    def begin_step(self) -> None:
        """Forget what the last step has left."""

    @abstractmethod
    def added_to(self, loss: Tensor) -> Tensor:
        """Return the loss with what is added to it."""

    def end_step(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of what a step has left, also when it has failed."""

    def run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and add to the loss in what it returns."""
        if self.pl_module is None:  # what somebody else has put around it calls it still
            return step(*args, **kwargs)
        self.in_step = True
        self.begin_step()
        try:
            result = step(*args, **kwargs)
            self.in_step = False
            if result is None:  # the step is skipped
                return None
            if not isinstance(result, Mapping):
                return self.added_to(result)
            # Lightning names a loss that is missing
            loss = result.get("loss")
            return {**result, "loss": self.added_to(loss)} if loss is not None else result
        finally:
            self.in_step = False
            self.end_step()


class AddedTerm(AddedLoss):
    """Adds the regularizer of a method.

    Args:
        regularizer: The regularizer.
    """

    without = "`weight` to be 0"

    def __init__(self, regularizer: Regularizer) -> None:
        self._regularizer = regularizer
        super().__init__()
        self._has_added = False

    @property
    def in_step(self) -> bool:
        """Whether a step goes on."""
        return self._regularizer.in_step

    @in_step.setter
    def in_step(self, value: bool) -> None:
        self._regularizer.in_step = value

    def start(self, pl_module: LightningModule, names: Sequence[str]) -> None:
        """Add it from now on, for what may be removed of a module as it is."""
        self._regularizer.attach(pl_module, names)
        if self.pl_module is None:
            self.attach(pl_module)
        else:
            wiring.forget_compiled_code(pl_module)

    def stop(self) -> None:
        """Leave the module as it was; a second call does nothing."""
        self._regularizer.detach()
        self.detach()

    def begin_step(self) -> None:
        """Forget what the last step has left."""
        assert self.pl_module is not None
        self._regularizer.begin_step(wiring.batches_trained(self.pl_module.trainer))

    def end_step(self) -> None:
        """Let go of what is left of a step that has failed."""
        self._regularizer.term()

    def added_to(self, loss: Tensor) -> Tensor:
        """Add the term."""
        assert self.pl_module is not None
        found = self._regularizer.term()
        if found is None:
            if not self._has_added:
                self._has_added = True  # said once
                rank_zero_warn(
                    f"Nothing is added to the loss for {self._regularizer.key}: the training step of "
                    f"{type(self.pl_module).__name__} has called none of what it watches with gradients on. Call the "
                    f"blocks as modules, and where they are checkpointed, with use_reentrant=False."
                )
            return loss
        self._has_added = True
        term, logged = found
        self.pl_module.log(self._regularizer.key, logged)
        return loss + term


class _StepWithAddedLoss:
    """A module's training step inside another one; a copy of the module, or a pickle, has a step of its own alone.

    Args:
        pl_module: The module.
        added: What is added to its loss.
    """

    def __init__(self, pl_module: LightningModule, added: AddedLoss) -> None:
        step = pl_module.training_step
        self.instead_of = vars(pl_module).get("training_step")
        update_wrapper(self, step)
        # Lightning looks one wrapper deep for what a step takes, and there may have been one before.
        self.__wrapped__ = getattr(step, "__wrapped__", step)
        self.added = added
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.added.run(self._step, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self._step, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._step,)


def _same(step: Any) -> Any:
    return step
