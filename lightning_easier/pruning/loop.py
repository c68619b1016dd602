"""The loop of rounds, without a Trainer: it takes note of what happens, judges, decides, and says what is to be done.

Two moments matter. The *decision* falls when an epoch has ended and every score is known; what follows from it for the
model is carried out at the start of the next epoch. Whoever runs the loop carries out its commands in their order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_easier.pruning.rules import Rules
from lightning_easier.pruning.state import Chosen, Decision, Measured, RunState
from lightning_easier.report import Round


@dataclass(frozen=True)
class Verdict:
    """Tell how a round was judged."""

    number: int


@dataclass(frozen=True)
class CutShort:
    """Warn that a round was taken back because the end of the run has left it without a score."""

    number: int


@dataclass(frozen=True)
class Wait:
    """Train on: a round is over by its length, and has no score yet. Said once for a round."""

    number: int


@dataclass(frozen=True)
class Decided:
    """Tell what is done next, if that is all that is wanted.

    Attributes:
        chosen: What; None if nothing is.
    """

    chosen: Chosen | None


@dataclass(frozen=True)
class Keep:
    """Save the model: it is the last good one."""

    number: int


@dataclass(frozen=True)
class GoBack:
    """Bring back the last good model."""


@dataclass(frozen=True)
class Apply:
    """Carry out what was chosen: a round begins.

    Attributes:
        chosen: What was.
    """

    chosen: Chosen


@dataclass(frozen=True)
class Evaluate:
    """Run a validation of the model as it is: a decision may follow, and no training comes before."""


@dataclass(frozen=True)
class Settle:
    """Carry out what changes nothing on the data that was measured: the run has ended, and no training follows.

    Attributes:
        chosen: What was chosen.
    """

    chosen: Chosen


@dataclass(frozen=True)
class Stop:
    """Pruning is over.

    Attributes:
        why: Why; None where the last verdict has said it.
    """

    why: str | None = None


@dataclass(frozen=True)
class Diverged:
    """Give up: the score is not finite.

    Attributes:
        score: The score.
    """

    score: float


Command = Verdict | CutShort | Wait | Decided | Keep | GoBack | Apply | Evaluate | Settle | Stop | Diverged


class Ask(NamedTuple):
    """What the loop asks whoever runs it, and when it needs it only.

    Attributes:
        score: Returns the score of the structure as it is, on which all processes agree; None if there is none.
        choose: Chooses what is done next by what was measured of the last good round; None if nothing is left.
        settle: Chooses by the same what is left to be done that changes nothing; None if nothing is.
    """

    score: Callable[[], float | None]
    choose: Callable[[Measured], Chosen | None]
    settle: Callable[[Measured], Chosen | None] = lambda measured: None


class PruningLoop:
    """Judges rounds, and decides what is done next.

    What it returns are commands, one at a time: the next is asked for when the last was carried out.

    Args:
        rules: Which score is good enough, how long a round is, how much goes at once.
        monitor: Name of the score.
        state: Where a run stands that goes on; a new one by default.

    Attributes:
        state: Where the run stands.
    """

    def __init__(self, rules: Rules, monitor: str, state: RunState | None = None) -> None:
        self.rules = rules
        self.monitor = monitor
        self.state = RunState() if state is None else state
        self._waiting = 0  # how many rounds there were when it was said that one waits for its score
        self._is_over = False  # training is; rounds may follow that do not train

    @property
    def may_decide(self) -> bool:
        """Whether a decision may follow the epoch that goes on."""
        state = self.state
        is_last = self._is_over or state.epochs + 1 >= self.rules.epochs_of(len(state.rounds) - 1)
        return not state.finished and (is_last or state.rounds[-1].accepted is not None)

    def epoch_ended(self, ended: int, *, is_scored: bool, is_measured: bool, ask: Ask) -> Iterator[Command]:
        """Count an epoch; judge and decide if it was the last of its round.

        A score that was not logged in this epoch is that of other weights: the round waits for the next.

        Args:
            ended: How many epochs of the run have ended.
            is_scored: Whether the score was logged in this epoch.
            is_measured: Whether it was validated, if there is a validation.
            ask: For a score and a choice.
        """
        state = self.state
        state.ended = ended
        if state.finished:
            return
        state.epochs += 1
        number = len(state.rounds) - 1
        if number == 0 and state.rounds[0].accepted is None:
            state.dense_scores.append(state.score if is_scored else None)
        if not is_measured or state.now.entropies is None or state.epochs < self.rules.epochs_of(number):
            return
        if state.rounds[-1].accepted is not None:  # at the end of a run that goes on now
            if state.decision is None:
                yield from self._decide(ask)
            return
        score = ask.score()
        if score is not None:
            yield from self._judge(score, ask)
        elif self._waiting != len(state.rounds):
            self._waiting = len(state.rounds)
            yield Wait(number)

    def run_ended(self, ask: Ask, *, is_measured: bool = False) -> Iterator[Command]:
        """Judge a round that the end of the run has cut short; a second call does nothing more.

        Where rounds do not train, they all follow now.

        Args:
            ask: For a score and a choice.
            is_measured: Whether the model as it is was validated.
        """
        state = self.state
        if not self.rules.rounds.trains:
            yield from self._rounds_without_training(ask, is_measured)
        if len(state.rounds) > 1 and state.rounds[-1].accepted is None:
            score = ask.score()
            if score is not None:
                yield from self._judge(score, ask)
            else:
                yield from self._take_back_unscored(ask)
        if state.is_going_back:
            yield GoBack()
        if state.kept:
            yield from self._settle(ask)

    def _rounds_without_training(self, ask: Ask, is_measured: bool) -> Iterator[Command]:
        """Judge the dense network, then remove, evaluate and judge, until it is over."""
        state = self.state
        self._is_over = True
        while not state.finished:
            yield from self.epoch_begins()
            this = state.rounds[-1]
            if not (is_measured and this is state.rounds[0] and state.now.is_whole):
                yield Evaluate()
            score = ask.score()
            if (score is None and this is state.rounds[0]) or not state.now.is_whole:
                break  # what is not judged is taken back
            if this.accepted is not None:  # in a run that is taken up
                yield from self._decide(ask)
            elif score is None:
                yield from self._take_back_unscored(ask)
            else:
                yield from self._judge(score, ask)
        self._is_over = False

    def _take_back_unscored(self, ask: Ask) -> Iterator[Command]:
        """Reject a round that has no score."""
        yield from self._take_back(f"{self.monitor} was not logged in it")
        yield CutShort(len(self.state.rounds) - 1)
        yield from self._decide(ask)

    def epoch_begins(self) -> Iterator[Command]:
        """Return what was decided and not carried out."""
        if self.state.is_going_back:
            yield GoBack()
        if self.state.decision is not None and self.state.decision.chosen is not None:
            yield Apply(self.state.decision.chosen)

    def went_back(self) -> None:
        """Take note that the last good model is back."""
        state = self.state
        state.operations, state.dropped = [], []
        state.joined = [place for place in state.joined if place[3] != len(state.rounds) - 1]
        state.now = state.snapshot.measured
        state.score = state.kept[-1].score_after
        decision = state.decision
        state.decision = None if decision is None or decision.chosen is None else Decision(False, decision.chosen)

    def applied(self, this: Round, operations: Sequence[dict[str, Any]] = ()) -> None:
        """Take note that what was chosen is done: a round begins.

        Args:
            this: The round.
            operations: What was done, as plain data.
        """
        self.state.begin_round(this, operations)
        self.state.decision = None

    def settled(self, this: Round, operations: Sequence[dict[str, Any]] = ()) -> None:
        """Take note that what changes nothing is done: a round that was not trained, with the score of the last.

        Args:
            this: The round.
            operations: What was done, as plain data.
        """
        state = self.state
        score, entropies = state.kept[-1].score_after, dict(state.snapshot.measured.entropies or {})
        self.applied(this, operations)
        this.score_after, this.accepted, state.score = score, True, score
        this.reason = "exact, and not trained"
        for name in this.removed:
            entropies.pop(name, None)
        # It was not measured anew: a run that goes on does so before it decides
        state.snapshot = replace(state.snapshot, measured=replace(state.snapshot.measured, entropies=entropies))

    def _settle(self, ask: Ask) -> Iterator[Command]:
        """Do what is left that changes nothing."""
        chosen = ask.settle(self.state.snapshot.measured)
        if chosen is not None:
            yield Settle(chosen)
            yield Keep(len(self.state.rounds) - 1)

    def _judge(self, score: float, ask: Ask) -> Iterator[Command]:
        state = self.state
        if math.isfinite(score):
            self.rules.judge(state.rounds, score)
            yield Verdict(len(state.rounds) - 1)
            yield from self._decide(ask)
            return
        if len(state.rounds) > 1 and not self.rules.rounds.trains:  # no training has diverged
            yield from self._take_back(f"{self.monitor} was {score}")
            yield from self._decide(ask)
            return
        if state.snapshot.file is not None and len(state.rounds) > 1:
            yield from self._take_back(f"{self.monitor} was {score}")
            chosen = self._choose(ask)
            state.finished = chosen is None
            state.decision = Decision(True, chosen)
            yield GoBack()
        yield Diverged(score)

    def _take_back(self, reason: str) -> Iterator[Command]:
        """Reject the last round without a judgement."""
        this = self.state.rounds[-1]
        this.accepted, this.reason = False, reason
        yield Verdict(len(self.state.rounds) - 1)

    def _decide(self, ask: Ask) -> Iterator[Command]:
        """Decide what happens at the start of the next epoch."""
        state = self.state
        this, attained = state.rounds[-1], state.now.attained
        is_reached = bool(this.accepted and attained is not None and attained.is_reached)
        chosen = self._choose(ask, is_reached)
        state.finished = chosen is None and not (this.accepted and state.now.proposal is None)
        if chosen is not None or not this.accepted:
            state.decision = Decision(not this.accepted, chosen)
        yield Decided(chosen)
        if state.finished and not this.accepted:
            yield Stop()
        elif state.finished:
            yield Stop(f"the target is reached ({attained.words})" if attained and is_reached else "nothing is left")
        if not self.rules.rejections.allow_others:  # what was not chosen will not be
            state.forget_large_operations()
        if this.accepted:
            yield Keep(len(state.rounds) - 1)

    def _choose(self, ask: Ask, is_reached: bool = False) -> Chosen | None:
        """Take note of the last verdict, and choose what is done next."""
        state, now = self.state, self.state.now
        if state.rounds[-1].accepted:
            state.rejections = 0
            known = state.snapshot.measured
            # The end of the run may have come before it was measured
            measured = replace(now if now.is_whole else known, attained=now.attained or known.attained)
            state.snapshot = replace(state.snapshot, measured=measured)
            goes_on = now.is_whole and not is_reached
        else:
            state.rejections += 1
            state.rejected += state.rounds[-1].chosen
            goes_on = not self.rules.rejections.are_too_many(state.rejections)
        return ask.choose(state.snapshot.measured) if goes_on else None
