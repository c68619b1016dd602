"""Progress bars, on a terminal alone: over batches, over named steps, and over stages with one time left for all."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

from tqdm import tqdm

_Item = TypeVar("_Item")

_TOTAL = 100.0
# The stages count in other units each: what is told is their share.
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def over(items: Iterable[_Item], description: str, of: object = None, most: int | None = None) -> Iterator[_Item]:
    """Yield items, and show a bar when they take more than a second.

    Args:
        items: The items.
        description: What to call it.
        of: What they are made of, one by one, if that is not what they are in themselves: its length is their number.
        most: How many of it are made at most.
    """
    total = None
    with suppress(Exception):  # a loader over a stream has a length that raises
        total = len(items if of is None else of)  # type: ignore[arg-type]
    if most is not None:
        total = most if total is None else min(total, most)
    with tqdm(iter(items), desc=description, total=total, leave=False, delay=1, disable=None) as bar:
        yield from bar


class Steps:
    """A bar over a few steps that may take seconds each; it shows the name of the one that has begun.

    Args:
        description: What to call it.
        count: How many steps there are.
    """

    def __init__(self, description: str, count: int) -> None:
        self._bar = tqdm(total=count, desc=description, leave=False, disable=None)
        self._has_begun = False

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, name: str) -> None:
        """Begin a step; the one before it is over."""
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(int(self._has_begun))
        self._bar.refresh()
        self._has_begun = True


class Stages:
    """One progress bar over several stages. It only ever moves on, and never past the end of a stage that is not over.

    Args:
        shares: Name of each stage -> its share of the whole, in order; they add up to 1.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        ends, end = {}, 0.0
        for name, share in shares.items():
            ends[name] = (end, end := end + share)
        self._ends = ends
        self._begin, self._end = 0.0, 0.0
        self._steps, self._units, self._timed, self._done = 1, 1, 1, 0
        self._bar = tqdm(
            total=_TOTAL, bar_format=_FORMAT, desc=next(iter(shares)), leave=False, smoothing=0, miniters=0,
            disable=None,
        )  # fmt: skip

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._move_to(1.0)
        self._bar.close()

    def begin(self, name: str, steps: int = 1, units: int = 1, timed: int = 1) -> None:
        """Begin a stage; those before it are over.

        Args:
            name: Its name.
            steps: How many steps it has.
            units: How many units each of them has, at most.
            timed: How many of them a timing takes.
        """
        self._begin, self._end = self._ends[name]
        self._steps, self._units, self._timed, self._done = steps, units, timed, 0
        self._move_to(self._begin)
        self._bar.set_description_str(name)

    def name(self, what: str) -> None:
        """Show what it is at."""
        self._bar.set_postfix_str(what)

    def advance(self, units: float = 1) -> None:
        """Tell of some units, of whichever steps."""
        self._move_to(min(self._now + self._width * units / self._units, self._end))

    def tell(self, share: float) -> None:
        """Tell of a share of a timing."""
        self.advance(share * self._timed)

    def finish(self) -> None:
        """Tell that a step is done; the units that it did without are taken."""
        self._done += 1
        self._move_to(self._begin + self._done * self._width)

    @property
    def _now(self) -> float:
        return self._bar.n / _TOTAL

    @property
    def _width(self) -> float:
        """Share of the whole that a step is."""
        return (self._end - self._begin) / max(self._steps, 1)

    def _move_to(self, place: float) -> None:
        self._bar.update(max(0.0, min(_TOTAL * place, _TOTAL) - self._bar.n))  # of nothing draws the time left anew
