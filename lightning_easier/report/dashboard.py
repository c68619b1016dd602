"""What a run shows in TensorBoard beyond scalars: one chart of all entropies, events, score by removals."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

ENTROPY_TAG = "entropy"
SCORE_TAG = "score_by_removed"
EVENT_TAG = "pruning/events"


def entropy_key(name: str) -> str:
    """Return the tag under which the entropy of an activation is logged."""
    return f"{ENTROPY_TAG}/{name}"


class Dashboard:
    """Write layout, events and the score against the number removed to every TensorBoard logger; others get nothing.

    Args:
        loggers: The Trainer's loggers.
        monitor: Name of the monitored score.
    """

    def __init__(self, loggers: Iterable[Logger], monitor: str) -> None:
        self._monitor = monitor
        self._writers: list[Any] = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]

    def write_layout(self, charts: Mapping[str, str]) -> None:
        """Write the one custom-scalars layout of the run (a writer takes it once).

        Args:
            charts: Title -> regular expression of the tags, of what a method logs besides.
        """
        layout = {
            "Pruning": {
                "Entropy of every activation [bit]": ["Multiline", [f"^{ENTROPY_TAG}/.*$"]],
                **{title: ["Multiline", [tags]] for title, tags in charts.items()},
                "Number removed": ["Multiline", ["^removed$"]],
                f"{self._monitor} against the number removed": ["Multiline", [f"^{SCORE_TAG}/.*$"]],
            }
        }
        for writer in self._writers:
            writer.add_custom_scalars(layout)

    def write_score(self, score: float, removed: int) -> None:
        """Write the score of a structure, at the number removed from it as the step."""
        for writer in self._writers:
            writer.add_scalar(f"{SCORE_TAG}/{self._monitor}", score, removed)

    def write_event(self, text: str, step: int) -> None:
        """Write a readable event (Markdown) at a global step."""
        for writer in self._writers:
            writer.add_text(EVENT_TAG, text, step)
            writer.flush()
