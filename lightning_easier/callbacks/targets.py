"""How fast or how shallow a run should make its network, and whether it is there: one answer for all processes."""

from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_easier.callbacks.network import copied
from lightning_easier.collapsing import CollapseError
from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.pruning.targets import Attained, Target, attained
from lightning_easier.report import CollapseReport
from lightning_easier.support.timing import LatencyTable


@dataclass
class TargetCheck:
    """Asks whether the target of a run is reached.

    Args:
        target: What is to be reached; None for nothing: what the network costs is told all the same.
        objective: What a collapse makes least.

    Attributes:
        report: What the collapse has merged for the last answer; None where another process has asked, or none has.
    """

    target: Target | None
    objective: Objective
    report: CollapseReport | None = field(default=None, init=False, repr=False)
    _table: LatencyTable = field(default_factory=LatencyTable, repr=False)

    def attained(
        self, trainer: Trainer, found: tuple[nn.Module, tuple[Tensor, ...]] | None, has_removed: bool
    ) -> Attained | None:
        """Tell how fast and how shallow the network is; every process has to call this.

        Args:
            trainer: The Trainer.
            found: The network and example inputs; that of rank 0 counts, None if none was called there.
            has_removed: Whether something was removed.

        Returns:
            The answer; None where nothing was removed, so that there is nothing to ask.

        Raises:
            MisconfigurationException: If the network can't be priced.
        """
        told: Attained | str | None = None
        self.report = None
        if trainer.is_global_zero and found is None:
            told = "no module that holds all activations was called in the validation, with tensors in their places"
        elif trainer.is_global_zero and found is not None and has_removed:
            network, inputs = found
            try:
                told, self.report = attained(copied(network), inputs, self.target, self.objective, self._table)
            except Exception as error:  # whatever it is: the other processes wait for an answer
                told = f"{type(error).__name__}: {error}" if not isinstance(error, CollapseError) else str(error)
        told = trainer.strategy.broadcast(told)
        if isinstance(told, str):
            raise MisconfigurationException(
                f"Expected argument `target` to be None, and `costs` of Measuring to be False: the network can't be "
                f"priced, since {told}"
            )
        return told
