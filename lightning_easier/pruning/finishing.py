"""What is done at last to all that is left of a network: each is kept if the score is no worse with it, else undone."""

from collections.abc import Callable
from typing import Protocol

from lightning_easier.pruning.judge import Judge
from lightning_easier.pruning.search import Search
from lightning_easier.pruning.targets import Look, TargetWatch


class Undoable(Protocol):
    """Something that has changed values of a network, and can give them back."""

    def undo(self) -> None:
        """Give all values back."""


class Finishing:
    """Judges what changes values and no structure, one after the other.

    Args:
        search: The search, which is over.
        judge: Tells the score.
        watch: Looks at the network.
        look: The last look at it.
        score: Of it; None if it was not evaluated.

    Attributes:
        look: The last look at the network as it is.
        score: Of that.
        drift: Of that.
        notes: What was kept, in words.
    """

    def __init__(self, search: Search, judge: Judge, watch: TargetWatch, look: Look, score: float | None) -> None:
        self.look = look
        self.score = score
        self.drift = search.drift
        self.notes: list[str] = []
        self._search, self._judge, self._watch = search, judge, watch

    def keep_or_undo(self, done: Undoable, words: Callable[[float, float], str]) -> None:
        """Keep what was done if the score is no worse, else undo it.

        Args:
            done: What can undo it.
            words: Says what was done, given the drift before and after.
        """
        search = self._search
        score = self._judge.score(search.model)
        if not self._judge.is_no_worse(score, self.score):
            done.undo()
            return
        before, self.drift, self.score = self.drift, search.drift, score
        self.notes.append(words(before, self.drift))
        self.look = self._watch.look_again(search.model, search.saved, self.look)
