"""One progress bar for work in several stages, with a time left from the first to the last."""

from collections.abc import Mapping

from tqdm import tqdm

_TOTAL = 100.0
# The stages count in other units each: what is told is their share.
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


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
