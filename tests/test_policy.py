"""Tests of the rules of a run, which need no Trainer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easier.callbacks.policy import Policy
from lightning_easier.callbacks.ranking import Ranked
from lightning_easier.callbacks.state import PruningState
from lightning_easier.report import Round


def judged(policy: Policy, *scores: float) -> PruningState:
    """Return the state after rounds that ended with these scores, the dense one first."""
    state = PruningState()
    for number, score in enumerate(scores):
        if number:
            state.begin_round(Round([f"act{number}"], {}, None, None, None, number))
        state.entropies, state.ranked = {"act9": 0.5}, Ranked({"act9": 0.5})
        policy.judge(state, score)
        policy.settle(state)
    return state


@given(
    mode=st.sampled_from(["min", "max"]),
    dense=st.floats(-100, 100, width=16),
    fall=st.floats(-5, 5, width=16),
    tolerance=st.floats(0, 4, width=16),
)
def test_a_round_is_kept_if_its_score_is_within_the_tolerance_of_the_dense_one(mode, dense, fall, tolerance):
    score = dense - fall if mode == "max" else dense + fall
    exact = dense - score if mode == "max" else score - dense
    if abs(exact - tolerance) < 1e-4:
        return
    state = judged(Policy(mode, tolerance), dense, score)
    assert [this.accepted for this in state.rounds] == [True, exact <= tolerance]


def test_the_edge_of_the_tolerance_is_within_it():
    assert judged(Policy("max", 0.1), 0.9, 0.8).rounds[-1].accepted
    assert not judged(Policy("max", 0.1), 0.9, 0.799).rounds[-1].accepted


def test_a_fall_is_from_the_dense_score_and_not_from_the_last():
    state = judged(Policy("max", 0.1), 0.9, 0.85, 0.79)
    assert [this.accepted for this in state.rounds] == [True, True, False]


def test_what_was_taken_back_is_not_tried_again_and_rejections_in_a_row_have_a_bound():
    policy = Policy("max", 0.1, on_reject="next", max_rejections=2)
    state = judged(policy, 0.9, 0.1)
    assert policy.eligible(state, {"act1": 0.1, "act2": 0.2, "other": 0.3}, ["act1", "act2"]) == {"act2": 0.2}
    assert state.rejections == 1
    assert judged(policy, 0.9, 0.1, 0.9).rejections == 0
    last = judged(policy, 0.9, 0.1)
    last.begin_round(Round(["act2"], {}, None, None, None, 2))
    policy.judge(last, 0.1)
    assert not policy.settle(last)
    assert last.rejected == ["act1", "act2"]


def test_a_run_that_stops_on_a_rejection_tries_nothing_else():
    policy = Policy("max", 0.1)
    state = judged(policy, 0.9)
    state.begin_round(Round(["act1"], {}, None, None, None, 1))
    policy.judge(state, 0.1)
    assert not policy.settle(state)


def test_entropies_of_a_rejected_round_do_not_replace_those_of_the_last_good_one():
    policy = Policy("max", 0.1, on_reject="next")
    state = judged(policy, 0.9)
    state.begin_round(Round(["act1"], {}, None, None, None, 1))
    state.entropies = {"act9": 0.1}
    policy.judge(state, 0.1)
    assert policy.settle(state)
    assert state.entropies_of_last_good == {"act9": 0.5}
    assert state.ranked_of_last_good.ranks == {"act9": 0.5}


@pytest.mark.parametrize(
    ("options", "removed", "eligible", "count"),
    [
        ({}, 0, 5, 1),
        ({"removals_per_round": 3}, 0, 5, 3),
        ({"removals_per_round": 3}, 0, 2, 2),
        ({"removals_per_round": 3, "max_removals": 4}, 2, 5, 2),
        ({"max_removals": 4}, 4, 5, 0),
        ({"max_removals": 4}, 5, 5, 0),
        ({}, 3, 0, 0),
    ],
)
def test_how_many_become_linear_next(options, removed, eligible, count):
    assert Policy(**options).how_many(removed, eligible) == count


def test_the_first_round_has_the_warmup():
    policy, state = Policy(epochs_per_round=2, warmup_epochs=3), PruningState()
    assert policy.epochs_of_round(state) == 5
    state.begin_round(Round(["act1"], {}, None, None, None, 1))
    assert policy.epochs_of_round(state) == 2
