"""How a table fits into a width: numbers stay whole, names lose their middle, prose breaks at spaces."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_FRAME = 3  # what a column takes besides its text: a line, and a space on both sides
_LEAST = 16  # so much of a name or of prose is still worth reading
# How much of what is left of a name is its end: names mostly differ there; where they don't, the beginning tells more
_TAILS = (2 / 3, 1 / 2, 1 / 3, 1 / 6)

_PLUS = "\u00a0+"  # a space that nothing breaks at

_NUMBER = re.compile(r"[(\[]?[-+±~]?\d[\d.,]*(e[-+]?\d+)?([–/]\d[\d.,]*)?[×%)\],;:]*")
_NUMBERS = re.compile(r"-|not counted|nan|-?inf|[-+±~]?\d[\d.,]*(e[-+]?\d+)?(\D.{0,48})?")


@dataclass(frozen=True)
class Column:
    """A column of a table that was laid out.

    Attributes:
        title: Its lines.
        cells: The lines of each cell.
        is_numbers: Whether it holds numbers, which are written flush right.
    """

    title: list[str]
    cells: list[list[str]]
    is_numbers: bool


def shorten(text: str, width: int, tail: float = _TAILS[0]) -> str:
    """Leave out the middle of a word, so that it has no more letters than that.

    Args:
        text: The word; a number stays as it is.
        width: How many letters.
        tail: Share of the letters left that are the end of the word.

    Example:
        >>> shorten("model.layer1.0.downsample.1", 16)
        'model…wnsample.1'
    """
    if len(text) <= width or _NUMBER.fullmatch(text):
        return text
    end = max(round((width - 1) * tail), 1)
    return f"{text[: max(width - 1 - end, 0)]}…{text[-end:]}"


def shorten_all(names: Sequence[str], width: int) -> list[str]:
    """Leave out the middle of names; where two would look the same, they are longer.

    Args:
        names: The names.
        width: How many letters, if they are enough.
    """
    enough, tail = _distinct(set(names), width)
    return [shorten(name, enough, tail) for name in names]


def lay_out(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[Column]]:
    """Fit a table into a width.

    Args:
        titles: Of the columns.
        rows: The cells of each row.
        width: How many letters there is room for, the lines between the columns among them.

    Returns:
        The tables that it becomes, one below the other: where not even the numbers have room, columns move to a further
        one, which begins with the first column again.
    """
    columns = [
        _Measured.of(title, [row[place] for row in rows], is_first=place == 0) for place, title in enumerate(titles)
    ]
    parts = _split(columns, width - 1)
    return [[column.fit(given) for column, given in zip(part, _widths(part, width - 1), strict=True)] for part in parts]


@dataclass(frozen=True)
class _Measured:
    """A column, and what room it needs at the least and at the most."""

    title: str
    texts: Sequence[str]
    is_numbers: bool
    least: int
    most: int
    tail: float

    @classmethod
    def of(cls, title: str, texts: Sequence[str], *, is_first: bool) -> "_Measured":
        is_numbers = not is_first and bool(texts) and all(_NUMBERS.fullmatch(text) for text in texts)
        cells = max((len(text) for text in texts), default=0)
        whole = [word for text in (title, *texts) for word in text.split() if _NUMBER.fullmatch(word)]
        least = max((len(word) for word in [*title.split(), *whole]), default=1)
        least, tail = max(least, cells if is_numbers else min(cells, _LEAST)), _TAILS[0]
        if not is_numbers:
            least, tail = _distinct({word for text in texts for word in text.split()}, least)
        return cls(title, texts, is_numbers, least, max(cells, len(title), least), tail)

    def fit(self, width: int) -> Column:
        cells = [_lines(text, width, self.tail) for text in self.texts]
        return Column(_lines(self.title, width, self.tail), cells, self.is_numbers)


def _distinct(words: set[str], least: int) -> tuple[int, float]:
    """Return the least width at which no two words look the same, and how much of each is its end then."""
    for width in range(least, max(map(len, words), default=0)):
        for tail in _TAILS:
            if len({shorten(word, width, tail) for word in words}) == len(words):
                return width, tail
    return max([least, *map(len, words)]), _TAILS[0]


def _lines(text: str, width: int, tail: float) -> list[str]:
    """Break a text at its spaces, but not before a plus."""
    words = " ".join(text.split()).replace(" + ", f"{_PLUS} ").split(" ")
    shortened = [
        shorten(word.removesuffix(_PLUS), width - (2 if word.endswith(_PLUS) else 0), tail)
        + (_PLUS if word.endswith(_PLUS) else "")
        for word in words
    ]
    lines = textwrap.wrap(" ".join(shortened), width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_PLUS, " +") for line in lines] or [""]


def _split(columns: Sequence[_Measured], width: int) -> list[list[_Measured]]:
    first, *others = columns
    parts = [[first]]
    for column in others:
        if _room_for([*parts[-1], column]) > width and len(parts[-1]) > 1:
            parts.append([first])
        parts[-1].append(column)
    return parts


def _room_for(columns: Sequence[_Measured]) -> int:
    return sum(column.least + _FRAME for column in columns)


def _widths(columns: Sequence[_Measured], width: int) -> list[int]:
    """Give every column what it needs, and what is left to those that could use it, the narrowest first."""
    given = [column.least for column in columns]
    left = width - _room_for(columns)
    wishing = {place for place, column in enumerate(columns) if column.most > column.least}
    while left > 0 and wishing:
        narrowest = min(wishing, key=lambda place: (given[place], place))
        given[narrowest] += 1
        left -= 1
        if given[narrowest] == columns[narrowest].most:
            wishing.remove(narrowest)
    return given
