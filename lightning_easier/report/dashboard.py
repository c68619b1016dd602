"""What a run shows in its loggers beyond scalars: pictures, texts, and in TensorBoard charts of several curves.

Every logger gets the same under the same names. Scalars go through ``log_metrics``; pictures and texts where a logger
has a place for them: TensorBoard's *Images* and *Text*, the media of Weights & Biases, MLflow's artifacts, and the
folder of a CSVLogger. In the last two the newest is kept.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_easier.report.figures import can_draw, new_figure, save_figure
from lightning_easier.support.storage import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_easier.report.pruning import PruningReport
    from lightning_easier.report.tables import Report

ENTROPY_TAG = "entropy"
SCORE_TAG = "score_by_removed"
LATENCY_TAG = "score_by_latency"
LATENCY_CHART = {"Score against the microseconds of one call": f"^{LATENCY_TAG}/.*$"}
PAGE = "pruning"
EVENT_TAG = f"{PAGE}/events"
ROUNDS_TAG = f"{PAGE}/rounds"


def entropy_key(name: str) -> str:
    """Return the tag under which the entropy of an activation is logged."""
    return f"{ENTROPY_TAG}/{name}"


class Dashboard:
    """Write layout, rounds and reports to loggers; only the first process does.

    Args:
        loggers: The Trainer's loggers.
        monitor: Name of the monitored score.
    """

    def __init__(self, loggers: Iterable[Logger], monitor: str) -> None:
        self._monitor = monitor
        self._loggers = list(loggers) if getattr(rank_zero_only, "rank", 0) == 0 else []
        self._pages = [page for logger in self._loggers for page in _pages_of(logger)]

    def write_layout(self, charts: Mapping[str, str]) -> None:
        """Write the one custom-scalars layout of the run to TensorBoard (a writer takes it once).

        Args:
            charts: Title -> regular expression of the tags, of what a method logs besides.
        """
        layout = {
            "Pruning": {
                "Entropy of every activation [bit]": ["Multiline", [f"^{ENTROPY_TAG}/.*$"]],
                **{title: ["Multiline", [tags]] for title, tags in charts.items()},
                "Number removed": ["Multiline", ["^removed$"]],
                "Activations left": ["Multiline", ["^remaining$"]],
                f"{self._monitor} against the number removed": ["Multiline", [f"^{SCORE_TAG}/.*$"]],
            }
        }
        for logger in self._loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)

    def write_score(self, score: float, removed: int) -> None:
        """Write the score of a structure, at the number removed from it as the step."""
        self._log(f"{SCORE_TAG}/{self._monitor}", score, removed)

    def write_score_by_latency(self, score: float, latency: float) -> None:
        """Write the score of a structure, at the microseconds of one call as the step.

        Args:
            score: The score.
            latency: In seconds.
        """
        self._log(f"{LATENCY_TAG}/{self._monitor}", score, round(latency * 1e6))

    def write_round(self, report: "PruningReport", number: int, step: int) -> None:
        """Write a round as a readable event (Markdown), the table of all rounds, and the pictures of the run.

        Args:
            report: Of the run so far.
            number: Of the round.
            step: The global step.
        """
        for page in self._pages:
            page.write_text(EVENT_TAG, report.event(number), step)
        self.write_report(report, PAGE, "rounds", step)

    def write_report(self, report: "Report", group: str, name: str, step: int) -> None:
        """Write a report as Markdown, and its pictures one by one.

        Args:
            report: The report.
            group: What the names of text and pictures begin with.
            name: Of the text.
            step: The global step.
        """
        for page in self._pages:
            page.write_text(f"{group}/{name}", report.to_markdown(), step)
        panels = report.panels() if self._pages else {}
        if panels and not can_draw():
            rank_zero_info("Loggers get no pictures without matplotlib: `pip install 'lightning-easier[figures]'`.")
            panels = {}
        for title, panel in panels.items():
            figure = new_figure([panel])
            for page in self._pages:
                page.write_picture(f"{group}/{title}", figure, step)

    def _log(self, tag: str, value: float, step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics({tag: value}, step)


def log_report(loggers: Iterable[Logger], name: str, report: "Report", step: int = 0) -> None:
    """Write a report and its pictures to loggers, beside what a run has logged: ``log_report(trainer.loggers, ...)``.

    Args:
        loggers: The loggers; those without a place for texts and pictures get nothing.
        name: What to call it: the text is ``<name>/report``, a picture ``<name>/operators`` for example.
        report: What :func:`~lightning_easier.collapse`, :func:`~lightning_easier.compress` or a callback returns.
        step: Of the logger's axis.

    Raises:
        ValueError: If the name is empty.
    """
    if not name:
        raise ValueError(f"Expected argument `name` to be what the report is called in the loggers, but got {name!r}")
    Dashboard(loggers, "").write_report(report, name, "report", step)


class _Page(Protocol):
    """Where a logger shows texts and pictures."""

    def write_text(self, tag: str, text: str, step: int) -> None: ...

    def write_picture(self, tag: str, figure: "Figure", step: int) -> None: ...


def _pages_of(logger: Logger) -> list[_Page]:
    """Return the page of a logger, if it has one."""
    kinds: list[tuple[type, type[Any]]] = [
        (TensorBoardLogger, _TensorBoardPage), (WandbLogger, _WandbPage), (MLFlowLogger, _MLFlowPage),
        (CSVLogger, _Folder),
    ]  # fmt: skip
    return [page(logger) for kind, page in kinds if isinstance(logger, kind)][:1]


class _TensorBoardPage:
    def __init__(self, logger: TensorBoardLogger) -> None:
        self._writer = logger.experiment

    def write_text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)
        self._writer.flush()

    def write_picture(self, tag: str, figure: "Figure", step: int) -> None:
        self._writer.add_image(tag, _pixels(figure), step, dataformats="HWC")
        self._writer.flush()


class _WandbPage:
    def __init__(self, logger: WandbLogger) -> None:
        self._logger = logger

    def write_text(self, tag: str, text: str, step: int) -> None:
        self._logger.log_text(tag, columns=["step", "text"], data=[[step, text]], step=step)  # type: ignore[list-item]

    def write_picture(self, tag: str, figure: "Figure", step: int) -> None:
        self._logger.log_image(tag, [_pixels(figure)], step)


class _MLFlowPage:
    def __init__(self, logger: MLFlowLogger) -> None:
        self._logger = logger

    def write_text(self, tag: str, text: str, step: int) -> None:
        self._logger.experiment.log_text(self._logger.run_id, text, f"{tag}.md")

    def write_picture(self, tag: str, figure: "Figure", step: int) -> None:
        self._logger.experiment.log_figure(self._logger.run_id, figure, f"{tag}.png")


class _Folder:
    """Files beside the table of a CSVLogger."""

    def __init__(self, logger: CSVLogger) -> None:
        self._logger = logger

    def write_text(self, tag: str, text: str, step: int) -> None:
        with replacing(self._file(f"{tag}.md")) as new:
            new.write_text(text, encoding="utf-8")

    def write_picture(self, tag: str, figure: "Figure", step: int) -> None:
        save_figure(figure, self._file(f"{tag}.png"))

    def _file(self, name: str) -> Path:
        return Path(self._logger.log_dir) / name


def _pixels(figure: "Figure") -> Any:
    """Return the picture as an array of (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
