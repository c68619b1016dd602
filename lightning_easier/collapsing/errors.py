"""Why something is not merged, or not even read."""

from typing import NamedTuple


class CollapseStep(NamedTuple):
    """A step of a collapse that can be left out.

    Attributes:
        kind: ``"fold"`` (a batch norm), ``"trim"`` (dead channels of one part) or ``"merge"`` (all of one chain).
        name: Of the node in the captured graph whose value comes out of it, or of the first in the part.
    """

    kind: str
    name: str


class CannotMergeError(Exception):
    """Operators that don't become one exactly; the message is the reason."""


class CaptureError(Exception):
    """A model whose data flow can't be captured; the message is the reason."""


class CollapseError(RuntimeError):
    """A collapse that can't be carried out, or whose result is not the same function; nothing was changed."""


class DifferenceError(CollapseError):
    """A result that is not the same function.

    Attributes:
        exactly: Whether that was seen in float64, and not only after rounding.
    """

    def __init__(self, message: str, exactly: bool) -> None:
        super().__init__(message)
        self.exactly = exactly


class StepError(Exception):
    """A step of a collapse that failed; the message says how.

    Attributes:
        step: Which.
    """

    def __init__(self, step: CollapseStep, message: str) -> None:
        super().__init__(message)
        self.step = step
