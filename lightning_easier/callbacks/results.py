"""What a user may ask a pruning callback for."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_easier.callbacks.run import Run, Settings
from lightning_easier.report import PruningReport, Report, Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Results:
    """What a run has come to, as far as it has gone."""

    _run: Run

    @property
    def settings(self) -> Settings:
        """What was asked for."""
        return self._run.settings

    @property
    def rounds(self) -> list[Round]:
        """The rounds so far, the dense one first."""
        return list(self._run.state.rounds)

    @property
    def removed(self) -> list[str]:
        """The activations that are linear by now, in the order of their removal."""
        return self._run.state.removed

    @property
    def entropies(self) -> dict[str, float] | None:
        """Name -> entropy in bits as measured last, in ``trainer.validate`` too; None before."""
        return None if self._run.entropies is None else dict(self._run.entropies)

    @property
    def last_good(self) -> Path | None:
        """Checkpoint of the last round that was kept; None before the first was judged."""
        return self._run.last_good

    @property
    def best_checkpoints(self) -> dict[int, Path]:
        """Number removed -> checkpoint with the best score, if ``best_per_depth``."""
        return self._run.best_checkpoints

    @property
    def listed(self) -> Report | None:
        """What a dry run has listed: what could be removed, and what is known of it."""
        return self._run.listed

    def report(self) -> PruningReport:
        """Return what the run did, round by round."""
        return self._run.report

    def figure(self) -> "Figure":
        """Draw what the run did: entropies, rounds and scores; ``pruning.figure().savefig("run.svg")`` keeps it.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed: ``pip install 'lightning-easier[figures]'``.
            ValueError: If nothing was measured yet.
        """
        return self._run.report.figure()
