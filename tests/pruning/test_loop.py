"""Tests of the loop of rounds with scripted scores: no Trainer, no model but the names of what is linear."""

import math
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_easier.pruning.loop import (
    Apply,
    Ask,
    Command,
    CutShort,
    Decided,
    Diverged,
    Evaluate,
    GoBack,
    Keep,
    PruningLoop,
    Settle,
    Stop,
    Verdict,
)
from lightning_easier.pruning.methods import Proposal
from lightning_easier.pruning.rules import Rounds, Rules, Tolerance
from lightning_easier.pruning.state import Chosen, Interruption, Measured, RunState, Snapshot
from lightning_easier.pruning.targets import Attained
from lightning_easier.report import Round
from lightning_easier.structure.masking import Masks
from lightning_easier.structure.operations import Identities

NAMES = [f"act{number}" for number in range(5)]


def proposal_of(ranks: dict[str, float]) -> Proposal:
    proposal = Proposal()
    for name, rank in ranks.items():
        proposal.add(Identities([name]), rank)
    return proposal


class GaveUpError(Exception):
    """The loop has said so."""


class Model:
    """Carries out what a loop says, as a callback does: names in the place of a model and of its checkpoint."""

    def __init__(self, loop: PruningLoop, linear: tuple[str, ...] = (), saved: tuple[str, ...] = ()) -> None:
        self.loop = loop
        self.linear = list(linear)
        self.saved = list(saved)
        self.stopped = False
        self.exact: set[str] = set()
        self.scripted: dict[frozenset[str], float | None] = {}  # what is linear -> the score that it has
        self.commands: list[Command] = []
        self.asked: list[list[str]] = []

    def choose(self, measured: Measured) -> Chosen | None:
        rules, state = self.loop.rules, self.loop.state
        assert measured.proposal is not None
        eligible = measured.proposal.eligible(NAMES, state.rejected)
        names = sorted(eligible, key=eligible.__getitem__)[: rules.how_many(len(state.removed), len(eligible))]
        self.asked.append(list(eligible))
        return Chosen(names, dict.fromkeys(names, 0.5)) if names else None

    def settle(self, measured: Measured) -> Chosen | None:
        proposal = measured.proposal or Proposal()
        left = [name for name in NAMES if name not in self.loop.state.removed]
        names = [name for name in proposal.eligible(left, self.loop.state.rejected) if name in proposal.exact]
        return Chosen(names, {}) if names else None

    def carry_out(self, commands: Any) -> None:
        state = self.loop.state
        for command in commands:
            self.commands.append(command)
            match command:
                case Evaluate():
                    assert self.loop.may_decide
                    self.evaluate(self.scripted[frozenset(self.linear)])
                case Apply(chosen):
                    self.linear += chosen.names
                    self.loop.applied(Round(chosen.names, chosen.entropies, None, None, None, 0, chosen.names))
                case Settle(chosen):
                    self.linear += chosen.names
                    self.loop.settled(Round(chosen.names, {}, None, None, None, 0, chosen.names))
                case GoBack():
                    self.linear = list(self.saved)
                    self.loop.went_back()
                case Keep(number):
                    self.saved = list(self.linear)
                    state.snapshot = Snapshot(f"{number}", state.snapshot.measured)
                case Stop():
                    self.stopped = True
                case Diverged():
                    raise GaveUpError

    def epoch(self, score: float | None) -> None:
        """One epoch with a validation; None: that has not logged the score."""
        state = self.loop.state
        state.begin_epoch()
        self.carry_out(self.loop.epoch_begins())
        self.evaluate(score)
        ask = Ask(lambda: state.score if score is not None else None, self.choose)
        commands = self.loop.epoch_ended(state.ended + 1, is_scored=score is not None, is_measured=True, ask=ask)
        self.carry_out(commands)

    def evaluate(self, score: float | None) -> None:
        """One validation of what is there."""
        state = self.loop.state
        ranks = {name: float(place) for place, name in enumerate(NAMES) if name not in self.linear}
        proposal = proposal_of(ranks)
        proposal.exact = [name for name in ranks if name in self.exact]
        state.now = Measured(ranks, proposal)
        if score is not None:
            state.score = score

    def end(self, *, is_measured: bool = False) -> None:
        state = self.loop.state
        ask = Ask(lambda: state.score, self.choose, self.settle)
        self.carry_out(self.loop.run_ended(ask, is_measured=is_measured))

    def resumed(self) -> "Model":
        """A process that has read the record of this one, and its model."""
        loop = PruningLoop(self.loop.rules, "acc", RunState.from_plain(deepcopy(self.loop.state.to_plain())))
        return Model(loop, tuple(self.linear), tuple(self.saved))


def started(rules: Rules) -> Model:
    return Model(PruningLoop(rules, "acc"))


RULES = st.builds(
    Rules,
    tolerance=st.builds(Tolerance, amount=st.integers(0, 4), mode=st.sampled_from(["min", "max"])),
    rounds=st.builds(
        Rounds,
        max_rejections=st.integers(1, 3),
        epochs=st.integers(1, 3),
        removals=st.integers(1, 2),
        max_removals=st.none() | st.integers(1, 4),
        warmup_epochs=st.integers(0, 2),
        reference=st.sampled_from(["dense", "best"]),
    ),
)
SCORES = st.lists(st.none() | st.integers(0, 10).map(float) | st.sampled_from([math.nan, math.inf]), max_size=25)


@given(rules=RULES, scores=SCORES, interrupted_after=st.sets(st.integers(0, 24)))
def test_any_run_leaves_the_last_good_model_and_goes_on_from_anywhere(rules, scores, interrupted_after):
    """Whatever the scores are, and wherever the run is taken up anew."""
    one, other = started(rules), started(rules)
    gave_up = False
    for number, score in enumerate(scores):
        if one.stopped or gave_up:
            break
        for model in (one, other):
            try:
                model.epoch(score)
            except GaveUpError:
                gave_up = True
                assert score is not None
                assert not math.isfinite(score)
        if number in interrupted_after:
            other = other.resumed()
        assert one.loop.state == other.loop.state
        assert (one.linear, one.saved) == (other.linear, other.saved)
    if not gave_up and one.loop.state.score is not None and math.isfinite(one.loop.state.score):
        one.end()
    state = one.loop.state
    if one.stopped and not gave_up:
        assert state.finished
        one.end()
        assert state.decision is None or not state.decision.go_back
    # What is linear is what the record says, and of each name only what no rejection has taken back
    judged = [this for this in state.rounds if this.accepted is not None]
    if all(this.accepted is not None for this in state.rounds) and not state.is_going_back:
        assert one.linear == state.removed == one.saved
    assert not set(state.rejected) & set(state.removed)
    tried = [name for this in state.rounds for name in this.chosen]
    assert len(tried) == len(set(tried))  # nothing is tried again after it was taken back
    assert rules.rounds.max_removals is None or len(state.removed) <= rules.rounds.max_removals
    # Kept are those within the tolerance, by plain arithmetic
    sign = 1 if rules.tolerance.mode == "max" else -1
    kept = [judged[0].score_after] if judged else []
    in_a_row = 0
    for this in judged[1:]:
        if this.score_after is not None:
            best = max(sign * each for each in kept) if rules.rounds.reference == "best" else sign * kept[0]
            assert this.accepted == (best - sign * this.score_after <= rules.tolerance.amount)
        if this.accepted:
            kept.append(this.score_after)
        in_a_row = 0 if this.accepted else in_a_row + 1
        assert in_a_row <= rules.rejections.most


def kinds(model: Model) -> list[str]:
    found = [type(command).__name__ for command in model.commands if not isinstance(command, Decided)]
    model.commands.clear()
    return found


def test_the_commands_of_a_run():
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=2, epochs=2)))
    model.epoch(0.5)
    assert kinds(model) == []
    model.epoch(0.9)
    assert kinds(model) == ["Verdict", "Keep"]
    model.epoch(0.1)
    assert kinds(model) == ["Apply"]
    model.epoch(0.85)
    assert kinds(model) == ["Verdict", "Keep"]
    model.epoch(0.9)
    model.epoch(None)
    assert kinds(model) == ["Apply", "Wait"]
    model.epoch(None)
    assert kinds(model) == []  # said once
    model.epoch(0.1)
    assert kinds(model) == ["Verdict"]
    assert model.linear == ["act0", "act1"]  # until the next epoch begins
    model.epoch(0.1)
    assert model.linear == ["act0", "act2"]
    model.epoch(0.1)
    assert kinds(model) == ["GoBack", "Apply", "Verdict", "Stop"]
    model.end()
    assert kinds(model) == ["GoBack"]
    assert model.linear == ["act0"]
    model.end()
    assert kinds(model) == []


def test_what_was_measured_after_a_rejected_round_does_not_count():
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=2)))
    model.epoch(0.9)
    model.epoch(0.1)
    assert model.asked == [NAMES, NAMES[1:]]  # by what was measured before the first was made linear
    assert model.loop.state.snapshot.measured.entropies == {name: float(n) for n, name in enumerate(NAMES)}


@pytest.mark.parametrize(("score", "expected"), [(0.85, ["Verdict", "Keep"]), (0.1, ["Verdict", "Stop", "GoBack"])])
def test_a_round_that_the_end_of_the_run_cuts_short_is_judged_by_what_there_is(score, expected):
    model = started(Rules(Tolerance(0.1), Rounds(epochs=2)))
    for each in (0.9, 0.9, score):
        model.epoch(each)
    kinds(model)
    model.end()
    assert kinds(model) == expected
    assert model.linear == (["act0"] if score == 0.85 else [])


def test_a_round_that_the_end_of_the_run_leaves_without_a_score_is_taken_back():
    model = started(Rules(Tolerance(0.1), Rounds(epochs=2)))
    for each in (0.9, 0.9, None):
        model.epoch(each)
    model.end()
    assert kinds(model)[-4:] == ["Verdict", "CutShort", "Stop", "GoBack"]
    assert CutShort(1) not in model.commands
    assert model.loop.state.rounds[1].reason == "acc was not logged in it"
    assert model.linear == []


def test_a_score_that_is_not_finite_has_the_last_good_model_come_back_first():
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=2)))
    model.epoch(0.9)
    kinds(model)
    with pytest.raises(GaveUpError):
        model.epoch(math.nan)
    assert kinds(model) == ["Apply", "Verdict", "GoBack", "Diverged"]
    assert model.linear == []
    assert model.loop.state.decision.chosen.names == ["act1"]  # what a run that is taken up goes on with
    dense = started(Rules())
    with pytest.raises(GaveUpError):
        dense.epoch(math.inf)
    assert kinds(dense) == ["Diverged"]


def test_a_run_ends_where_its_target_is_reached():
    model = started(Rules(Tolerance(0.1)))
    model.epoch(0.9)
    state = model.loop.state
    state.begin_epoch()
    model.carry_out(model.loop.epoch_begins())
    state.now, state.score = (
        Measured({"act1": 0.5}, proposal=proposal_of({"act1": 0.5}), attained=Attained(True, "fast")),
        0.9,
    )
    ask = Ask(lambda: 0.9, model.choose)
    model.carry_out(model.loop.epoch_ended(2, is_scored=True, is_measured=True, ask=ask))
    assert Stop("the target is reached (fast)") in model.commands
    assert model.commands[-1] == Keep(1)
    assert state.finished
    assert len(model.asked) == 1


def test_a_verdict_is_told_before_the_next_is_chosen():
    """A user's `select` may look at the rounds, and reads the verdict above its own output."""
    model = started(Rules(Tolerance(0.1)))
    seen = []
    ask = Ask(lambda: 0.9, lambda measured: seen.append(list(model.commands)))
    model.loop.state.now = Measured({"act0": 0.5}, proposal=proposal_of({"act0": 0.5}))
    model.carry_out(model.loop.epoch_ended(1, is_scored=True, is_measured=True, ask=ask))
    assert seen == [[Verdict(0)]]
    assert [type(command) for command in model.commands] == [Verdict, Decided, Stop, Keep]


def test_a_record_is_plain_data_and_comes_back_whole(tmp_path):
    proposal = proposal_of({"act0": 0.1})
    fit = {"kind": "fitted", "names": ["act1"], "fits": {"act1": {"tensors": {"weight": torch.ones(2)}}}}
    proposal.ranks["act1"], proposal.operations["act1"] = 0.5, fit
    measured = Measured({"act0": 0.1, "act1": 0.5}, proposal, True, Attained(False, "no"))
    state = RunState(
        rounds=[Round([], {}, None, 0.9, True, 0), Round(["act0"], {"act0": 0.1}, 0.9, None, None, 3)],
        now=measured,
        snapshot=Snapshot("round_0.ckpt", measured, {"acc": 0.9}, [{"number": 0, "rates": [0.1]}]),
        interruption=Interruption(True, True, ["act1"], {"act1": {"on": 3}}),
        folder="rounds",
    )
    path = tmp_path / "record.pt"
    torch.save(state.to_plain(), path)
    again = RunState.from_plain(torch.load(path, weights_only=True))
    assert asdict(again).keys() == asdict(state).keys()
    assert (again.rounds, again.interruption, again.folder) == (state.rounds, state.interruption, state.folder)
    assert isinstance(again.now.proposal, Proposal)
    assert isinstance(again.snapshot.measured.attained, Attained)
    assert again.snapshot.scores == {"acc": 0.9}
    torch.testing.assert_close(again.now.proposal.operations["act1"]["fits"], fit["fits"])
    kept = again.now.without_large_operations().proposal
    assert (kept.ranks, list(kept.operations)) == (proposal.ranks, ["act0"])
    assert list(kept.eligible(["act0", "act1"], [])) == ["act0"]


@pytest.mark.parametrize("version", [None, 0, 2, 4, "3"])
def test_a_record_of_another_version_is_refused_by_that_name(version):
    plain = RunState().to_plain() | {"version": version}
    with pytest.raises(ValueError, match=rf"of version 3, but got {version}.*load_pruned"):
        RunState.from_plain(plain)


def test_a_round_that_is_kept_has_rejections_count_from_zero():
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=2)))
    for score in (0.9, 0.1, 0.9, 0.1):
        model.epoch(score)
    assert [this.accepted for this in model.loop.state.rounds] == [True, False, True, False]
    assert not model.stopped
    model.epoch(0.1)
    assert model.stopped


def test_what_is_known_after_going_back_is_what_was_known_of_the_last_good_round():
    model = started(Rules(Tolerance(0.1)))
    model.epoch(0.9)
    model.epoch(0.8)
    state = model.loop.state
    state.joined, state.dropped, state.operations = (
        [["act0", 0, 0, 1], ["act1", 0, 1, 2]],
        [[0]],
        [{"kind": "identity"}],
    )
    model.epoch(0.1)
    assert state.joined == [["act0", 0, 0, 1], ["act1", 0, 1, 2]]
    good = state.snapshot.measured
    assert state.now != good
    model.end()
    assert state.now == good
    assert (state.score, state.joined, state.dropped, state.operations) == (0.8, [["act0", 0, 0, 1]], [], [])


def test_a_run_that_dies_while_it_goes_back_from_nan_knows_that_it_has_to():
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=2)))
    model.epoch(0.9)
    state = model.loop.state
    state.begin_epoch()
    model.carry_out(model.loop.epoch_begins())
    state.now, state.score = Measured({"act1": 0.5}, proposal=proposal_of({"act1": 0.5})), math.nan
    ask = Ask(lambda: math.nan, model.choose)
    for command in model.loop.epoch_ended(2, is_scored=True, is_measured=True, ask=ask):
        if isinstance(command, GoBack):
            break
    assert model.resumed().loop.state.is_going_back
    assert state.linear_by_now == ["act0"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("joined", [["act0", 0, 0]]),
        ("held", [{"kind": "fitted"}]),
        ("rounds", []),
        ("epochs", True),
        ("rejected", None),
    ],
)
def test_a_record_that_no_run_has_left_is_refused_when_it_is_read(part, value):
    RunState.from_plain(RunState().to_plain())
    with pytest.raises(ValueError, match="record of a pruning run, but it has another form"):
        RunState.from_plain(RunState().to_plain() | {part: value})


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=8), st.sets(st.sampled_from(NAMES)), st.integers(1, 3))
def test_what_changes_nothing_is_done_when_the_run_has_ended(scores, exact, rejections):
    model = started(Rules(Tolerance(0.1), Rounds(max_rejections=rejections)))
    model.exact = exact
    for score in scores:
        if not model.stopped:
            model.epoch(score)
    model.end()
    state, number = model.loop.state, len(model.loop.state.rounds)
    assert model.linear == model.saved == state.removed
    rejected = {name for this in state.rounds if this.accepted is False for name in this.chosen}
    assert exact - rejected <= set(state.removed)
    settled = [command for command in model.commands if isinstance(command, Settle)]
    assert len(settled) <= 1
    if settled:
        this = state.rounds[-1]
        assert (this.accepted, this.reason) == (True, "exact, and not trained")
        assert this.score_after == state.score == [each for each in state.rounds[:-1] if each.accepted][-1].score_after
        assert state.decision is None
        assert isinstance(model.commands[-1], Keep)
    model.end()
    assert len(state.rounds) == number
    again = model.resumed()
    again.end()
    assert len(again.loop.state.rounds) == number


def test_a_run_that_goes_on_after_it_was_settled_measures_before_it_decides():
    model = started(Rules(Tolerance(0.1), Rounds()))
    model.exact = {"act4"}
    model.epoch(0.9)
    model.end()
    assert model.linear == ["act4"]
    model.epoch(0.9)
    model.epoch(0.1)
    assert [(this.chosen, this.accepted) for this in model.loop.state.rounds] == [
        ([], True), (["act4"], True), (["act0"], False),
    ]  # fmt: skip
    model.end()
    assert model.linear == ["act4"]


def test_a_later_operation_holds_what_an_earlier_one_does_if_it_says_so():
    first, second, other = (
        Masks([], {}, pruned={name: torch.zeros(1, dtype=torch.uint8) for name in names})
        for names in (["a"], ["a", "b"], ["c"])
    )
    state = RunState()
    for operation in (first, second, other):
        state.begin_round(Round([], {}, None, None, None, 0), [operation.to_plain()])
    assert [sorted(plain["pruned"]) for plain in state.held] == [["a", "b"]]
    state.begin_round(Round([], {}, None, None, None, 0))
    assert [sorted(plain["pruned"]) for plain in state.held] == [["a", "b"], ["c"]]


class Scripted(dict[frozenset[str], float | None]):
    """A score for each structure, drawn when it is asked for."""

    def __init__(self, scores: list[float | None]) -> None:
        super().__init__()
        self.scores = scores

    def __missing__(self, linear: frozenset[str]) -> float | None:
        seed = hash(tuple(sorted(linear)))
        return self.scores[seed % len(self.scores)] if linear else 5.0


AT_ONCE = st.builds(
    Rules,
    tolerance=st.builds(Tolerance, amount=st.integers(0, 4), mode=st.sampled_from(["min", "max"])),
    rounds=st.builds(
        Rounds,
        epochs=st.just(0),
        max_rejections=st.integers(1, 3),
        removals=st.integers(1, 2),
        max_removals=st.none() | st.integers(1, 4),
        reference=st.sampled_from(["dense", "best"]),
    ),
)


class KilledError(Exception):
    """Between two commands."""


@given(AT_ONCE, st.lists(st.none() | st.integers(0, 10).map(float) | st.just(math.nan), min_size=1), st.integers(0, 3))
def test_rounds_that_do_not_train_follow_the_training(rules, scores, epochs):
    model = started(rules)
    model.scripted = Scripted(scores)
    for _ in range(epochs):
        model.epoch(5.0)
        assert not model.commands, "while it is trained nothing is judged"
    model.end(is_measured=epochs > 0)
    state = model.loop.state
    assert (Evaluate() in model.commands[:1]) == (epochs == 0)
    assert model.linear == model.saved == [name for this in state.kept for name in this.removed if this.accepted]
    assert state.finished or any("not logged" in (this.reason or "") for this in state.rounds)
    for before, this in zip(state.rounds, state.rounds[1:], strict=False):
        assert this.accepted is not None
        if this.accepted:
            assert rules.tolerance.allows(this.score_after, this.reference)
        elif this.score_after is not None:
            assert not rules.tolerance.allows(this.score_after, this.reference)
        assert before.accepted is not None
    commands = list(model.commands)
    model.end()
    assert model.commands == commands or not state.finished, "a second call does nothing"

    place = len(commands) // 2  # killed between two commands, and taken up from what was saved last
    killed = started(rules)
    killed.scripted = model.scripted
    for _ in range(epochs):
        killed.epoch(5.0)
    saved = killed.resumed()

    class Dying(list[Command]):
        def append(self, command: Command) -> None:
            if len(self) == place:
                raise KilledError
            super().append(command)

    killed.commands = Dying()
    original = killed.carry_out

    def carry_out(commands: Any) -> None:
        nonlocal saved

        def watched() -> Any:
            nonlocal saved
            for command in commands:
                yield command
                if isinstance(command, Keep):  # the state is saved with the model
                    saved = killed.resumed()

        original(watched())

    killed.carry_out = carry_out  # type: ignore[method-assign]
    with suppress(KilledError):
        killed.end(is_measured=epochs > 0)
    saved.scripted = model.scripted
    saved.end()
    if all(score is not None for score in scores):
        assert saved.linear == model.linear
        assert [asdict(this) for this in saved.loop.state.rounds] == [asdict(this) for this in state.rounds]


@pytest.mark.parametrize("given", [{"warmup_epochs": 1}, {"restart": "optimizer"}])
def test_what_has_no_effect_on_rounds_that_do_not_train_is_refused(given):
    with pytest.raises(ValueError, match="left out with epochs=0"):
        Rounds(epochs=0, **given)
