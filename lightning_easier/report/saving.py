"""Reports as files: a table as text, Markdown, JSON, or a picture, by the suffix."""

from importlib.util import find_spec
from pathlib import Path

from lightning_easier.report.figures import can_draw, save_figure
from lightning_easier.report.tables import Report
from lightning_easier.support.storage import check_writable, replacing

_TEXTS = (".md", ".json", ".txt")
_PICTURES = (".png", ".svg", ".pdf")
_WIDTH = 160  # letters of a table in a text file


def check_report_path(argument: str, path: str | Path, *, pictures: bool = True) -> None:
    """Refuse a file that a report can't be written to, before there is one.

    Args:
        argument: What the path was given as, for errors.
        path: The file.
        pictures: Whether the report can be drawn.

    Raises:
        ValueError: If its suffix is none that is known, or of a picture of a report that has none, or it is a folder.
        ModuleNotFoundError: If what writes such files is not installed.
        OSError: If the file can't be written.
    """
    path, suffixes = Path(path), _TEXTS + _PICTURES if pictures else _TEXTS
    if path.suffix not in suffixes:
        why = ": the report has nothing to draw" if path.suffix in _PICTURES else ""
        raise ValueError(
            f"Expected argument `{argument}` to end in one of {', '.join(suffixes)}, but got {str(path)!r}{why}"
        )
    check_writable(argument, path)
    if path.suffix in _PICTURES and not can_draw():
        raise ModuleNotFoundError(
            "Figures need matplotlib: `pip install 'lightning-easier[figures]'`, or take a file ending in .md",
            name="matplotlib",
        )
    if path.suffix == ".txt" and find_spec("rich") is None:
        raise ModuleNotFoundError(
            "Tables as text need rich: `pip install 'lightning-easier[cli]'`, or take a file ending in .md", name="rich"
        )


def save_report(report: Report, path: str | Path) -> None:
    """Write a report to a file, whole or not at all.

    Args:
        report: The report.
        path: Its suffix tells the format: ``.md`` (tables as Markdown), ``.json`` (all there is), ``.txt`` (tables as
            on a terminal of 160 columns), ``.png``, ``.svg`` or ``.pdf`` (its figure).

    Raises:
        ValueError: If the suffix is none of these, ``path`` is a folder, or the report has nothing to draw.
        ModuleNotFoundError: If what writes such files is not installed.
        OSError: If the file can't be written; one that was there is as it was.
    """
    check_report_path("path", path)
    path = Path(path)
    if path.suffix in _PICTURES:
        save_figure(report.figure(), path)
        return
    with replacing(path) as new:
        new.write_text(_as_text(report, path.suffix), encoding="utf-8")


def _as_text(report: Report, suffix: str) -> str:
    if suffix == ".json":
        return report.to_json() + "\n"
    if suffix == ".md":
        return report.to_markdown()
    from rich.console import Console

    console = Console(width=_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(report)
    return captured.get()
