"""Tables of text, and what can be shown as some: as Markdown, a dict, JSON, or with rich."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_easier.report.figures import Draw, new_figure
from lightning_easier.report.layout import lay_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """Render as a GitHub Markdown table under its title."""
        lines = [f"**{self.title}**", "", _row(self.columns), _row(["---"] * len(self.columns))]
        return "\n".join(lines + [_row(row) for row in self.rows])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render with rich, where it is installed: ``rich.print(table)``.

        It fits into the width of the terminal, or of 80 letters in a pipe: numbers never break, and names are shortened
        in the middle. The Markdown has all of them whole.
        """
        from rich.table import Table as RichTable
        from rich.text import Text

        for number, columns in enumerate(lay_out(self.columns, self.rows, options.max_width)):
            title = self.title if number == 0 else f"{self.title} (the other columns)"
            rendered = RichTable(title=Text(title), title_justify="left")
            for column in columns:
                justify: Any = "right" if column.is_numbers else "left"
                rendered.add_column(Text("\n".join(column.title)), no_wrap=True, overflow="fold", justify=justify)
            for row in range(len(self.rows)):
                rendered.add_row(*(Text("\n".join(column.cells[row])) for column in columns))
            yield rendered


class Report:
    """Base of the reports: subclasses are dataclasses that say what their tables are."""

    def tables(self) -> Iterator[Table]:
        """Yield the tables of the report."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass

    def to_json(self) -> str:
        """Return JSON; a number that is not finite is ``null`` in it."""
        return json.dumps(_without_infinities(self.to_dict()), indent=2, default=str, allow_nan=False)

    def to_markdown(self) -> str:
        """Render every table as Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables()) + "\n"

    def figure(self) -> "Figure":
        """Draw it; ``report.figure().savefig("report.svg")`` writes PNG, SVG or PDF.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed: ``pip install 'lightning-easier[figures]'``.
            ValueError: If the report has nothing to draw.
        """
        panels = list(self.panels().values())
        if not panels:
            raise ValueError(f"{type(self).__name__} has nothing to draw: print it, or save it to a file ending in .md")
        return new_figure(panels)

    def panels(self) -> dict[str, tuple[Draw, float]]:
        """Return what a figure is made of: name -> what draws it, and its height in inches; nothing by default."""
        return {}

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render with rich, where it is installed: ``rich.print(report)``."""
        yield from self.tables()


def notes_table(notes: Sequence[str]) -> Iterator[Table]:
    """Yield a table of notes, if there are any."""
    if notes:
        yield Table("Notes", ("",), [(note,) for note in notes])


def number(value: float | None) -> str:
    """Write a score or an entropy; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def _without_infinities(value: Any) -> Any:
    """Put None in the place of numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
