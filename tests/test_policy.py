"""Tests of the rules of a run, which need no Trainer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easier.callbacks.policy import Policy, mode_in_name
from lightning_easier.callbacks.state import PruningState
from lightning_easier.pruning.ranking import Ranked
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


@given(
    mode=st.sampled_from(["min", "max"]),
    reference=st.sampled_from(["dense", "best"]),
    scores=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    tolerance=st.integers(0, 10),
)
def test_a_round_is_judged_against_the_dense_score_or_the_best_that_was_kept(mode, reference, scores, tolerance):
    """Integers, so that the test's own arithmetic is exact."""
    sign = 1 if mode == "max" else -1
    state = judged(Policy(mode, tolerance, on_reject="next", reference=reference), *map(float, scores))
    kept = {0: scores[0]}  # number of the round -> its score
    for number, score in list(enumerate(scores))[1:]:
        best = max(sign * each for each in kept.values()) if reference == "best" else sign * scores[0]
        this = state.rounds[number]
        assert this.reference == sign * best
        assert this.reference_round == min(n for n, each in kept.items() if sign * each == best)
        assert this.accepted == (best - sign * score <= tolerance)
        if this.accepted:
            kept[number] = score
    dense = state.rounds[0]
    assert (dense.accepted, dense.reference, dense.reference_round) == (True, None, None)


def test_a_round_without_a_score_is_no_reference():
    policy = Policy("min", 1.0, on_reject="next", reference="best")
    state = judged(policy, 5.0)
    state.begin_round(Round(["act1"], {}, None, None, False, 1, reason="no score"))
    state.begin_round(Round(["act2"], {}, None, None, None, 2))
    policy.judge(state, 5.5)
    assert (state.rounds[-1].reference, state.rounds[-1].reference_round) == (5.0, 0)


@pytest.mark.parametrize(
    ("mode", "scores", "rise", "still_learning"),
    [
        ("max", [0.2, 0.5, 0.625], 0.125, True),
        ("max", [0.2, 0.5, 0.6], 0.1, False),  # the tolerance itself
        ("max", [0.2, 0.6, 0.5], -0.1, False),
        ("max", [0.25, None, 0.75], 0.25, True),  # not logged in every epoch
        ("max", [0.25, None, None, None, 0.5, None], 0.0625, False),
        ("min", [1.0, 0.5], 0.5, True),
        ("min", [0.5, 1.0], -0.5, False),
        ("max", [0.5], None, False),
        ("max", [None, 0.5], None, False),
        ("max", [], None, False),
    ],
)
def test_a_dense_network_that_still_gets_better_by_more_than_the_tolerance_an_epoch(mode, scores, rise, still_learning):
    policy, state = Policy(mode, 0.1), PruningState(dense_scores=scores)
    state.rounds[0].score_after = next((score for score in reversed(scores) if score is not None), None)
    assert policy.rise_per_epoch(state) == pytest.approx(rise)
    assert policy.is_still_learning(state) is still_learning


@pytest.mark.parametrize(
    ("mode", "scores", "first"),
    [
        ("max", [0.24, 0.87, 0.9], 1),
        ("max", [0.8, 0.85, 0.95], 2),
        ("max", [0.8, 0.9, 0.7], None),  # by the tolerance itself
        ("min", [2.0, 1.95, 0.5], 2),
        ("min", [2.0, 2.1], None),
    ],
)
def test_the_first_round_that_is_better_than_the_dense_one_by_more_than_the_tolerance(mode, scores, first):
    policy = Policy(mode, 0.1)
    told = [n for n in range(1, len(scores)) if policy.is_first_to_overtake(judged(policy, *scores[: n + 1]))]
    assert told == ([] if first is None else [first])


LOW = [
    "loss", "val_loss", "valLoss", "val/loss_epoch", "valid.rmse", "BCELoss", "focalloss", "perplexity", "top1_error",
    "val_loss/dataloader_idx_0", "cross_entropy", "WER",
]  # fmt: skip
HIGH = [
    "acc", "val_acc", "val/Accuracy", "MulticlassAccuracy", "auroc", "mAP", "f1", "val_f1score", "val_top5_acc", "mIoU",
    "val_acc/dataloader_idx_1",
]  # fmt: skip
UNSURE = [
    "score", "scripted", "neg_loss", "negative_mse", "1-acc", "acc_drop", "loss_reduction", "error_of_acc", "glossy",
    "account", "entropy/relu",
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "mode"), [(LOW, "min"), (HIGH, "max"), (UNSURE, None)], ids=["low", "high", "unsure"]
)
def test_what_the_name_of_a_score_says_of_its_mode(names, mode):
    assert {name: mode_in_name(name) for name in names} == dict.fromkeys(names, mode)
