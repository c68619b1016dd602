"""Take back what a target does not need: steps go by drift per saving, and the last may save far more than is missing.

What is measured decides. What a step saves is only used to leave out what can't be enough.
"""

from collections.abc import Iterator, Sequence

from lightning_easier.pruning.judge import Judge
from lightning_easier.pruning.rules import Rejections
from lightning_easier.pruning.search import FittedCandidate, Search, Taken
from lightning_easier.pruning.stages import Clock
from lightning_easier.pruning.targets import Look, TargetWatch
from lightning_easier.support.progress import Stages


class Unneeded:
    """Takes steps back, that of the largest drift first, or puts what changes less in their places.

    Args:
        search: The search, which is over.
        candidates: What may take places.
        judge: Tells whether a model is still good enough.
        watch: Tells whether the target is reached.
        look: The last look at the model.
        score: Of the model; None if it was not evaluated.
        most: How many attempts to do without a step may be in vain, and how many to put something else in its place:
            each takes a collapse, and timings.
        clock: Tells whether the time is over.
        progress: Is told of each step.

    Attributes:
        look: The last look at a model that has reached the target, which is what the model of the search is.
        score: Of that model; None if it was not evaluated.
    """

    def __init__(
        self,
        search: Search,
        candidates: Sequence[FittedCandidate],
        judge: Judge,
        watch: TargetWatch,
        look: Look,
        score: float | None,
        most: Rejections,
        clock: Clock,
        progress: Stages,
    ) -> None:
        self.look = look
        self.score = score
        self._search, self._candidates, self._judge, self._watch = search, candidates, judge, watch
        self._most, self._clock, self._progress = most, clock, progress
        self._in_vain = {"removed": 0, "replaced": 0}

    def take_back(self) -> None:
        """Take back what is not needed, each step once."""
        for step in sorted(self._search.steps, key=lambda step: -step.trial.drift):
            for less in self._less_than(step):
                if self._clock.is_over() or not self._watch.is_passed(self.look):
                    return
                if self._most.are_too_many(self._in_vain["removed" if less is None else "replaced"]):
                    continue
                saving = 0.0 if less is None else less.choice.saving
                is_enough = self._watch.may_do_with(self.look, self._search.saved, step.saving - saving)
                if is_enough and self._search.is_uncovered(step) and self._is_replaced(step, less):
                    break
            self._progress.finish()

    def _less_than(self, step: Taken) -> Iterator[FittedCandidate | None]:
        """Yield nothing, and what changes less than a step, there or where nothing has gone, in the order of drift."""
        yield None
        others = [each.place for each in self._search.steps if each is not step]
        for candidate in sorted(self._candidates, key=lambda each: each.drift):
            place = candidate.choice.place
            if candidate.drift < step.trial.drift and not any(place.meets(o) or o.meets(place) for o in others):
                yield candidate

    def _is_replaced(self, step: Taken, less: FittedCandidate | None) -> bool:
        """Put something less in the place of a step if the target is reached with it; tell whether it is."""
        search = self._search
        number = search.leave_out(step)
        trial = None if less is None else search.take(less)
        if less is not None and trial is None:
            search.put_back(step, number)
            return False
        score = self._judge.score(search.model)
        reason = self._judge.why_not(score, search.drift_seen)
        look = None
        if reason is None:
            found = self._watch.look_if_enough(search.model, search.saved)
            if isinstance(found, str):
                reason = f"it changes less, but is not enough for the target: {found}"
            else:
                look = found
        if trial is not None:
            trial.score = score
        if look is None:
            if trial is not None:
                search.undo(str(reason))
            search.put_back(step, number)
            self._in_vain["removed" if less is None else "replaced"] += 1
            return False
        step.trial.kept = False
        instead = "without it" if less is None else f"with {less.choice.fit.kind} in its place"
        step.trial.reason = f"not needed for the target: {look.attained.words}, {instead}"
        self.look, self.score = look, score
        return True
