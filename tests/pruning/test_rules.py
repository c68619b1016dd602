"""Tests of the rules of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easier.pruning.rules import Rejections, Rounds, Rules, Tolerance, mode_in_name
from lightning_easier.report import Round


def judged(rules: Rules, *scores: float) -> list[Round]:
    """Return the rounds that ended with these scores, the dense one first."""
    rounds: list[Round] = []
    for number, score in enumerate(scores):
        rounds.append(Round([f"act{number}"] if number else [], {}, None, None, None, number))
        rules.judge(rounds, score)
    return rounds


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
    rounds = judged(Rules(Tolerance(tolerance, mode)), dense, score)
    assert [this.accepted for this in rounds] == [True, exact <= tolerance]


def test_the_edge_of_the_tolerance_is_within_it():
    assert judged(Rules(Tolerance(0.1)), 0.9, 0.8)[-1].accepted
    assert not judged(Rules(Tolerance(0.1)), 0.9, 0.799)[-1].accepted


def test_a_fall_is_from_the_dense_score_and_not_from_the_last():
    assert [this.accepted for this in judged(Rules(Tolerance(0.1)), 0.9, 0.85, 0.79)] == [True, True, False]


def test_rejections_in_a_row_have_a_bound():
    assert [Rejections(2).are_too_many(count) for count in (1, 2, 3)] == [False, True, True]
    assert not Rules().rejections.allow_others
    assert Rules(rounds=Rounds(max_rejections=2)).rejections.allow_others


@pytest.mark.parametrize(
    ("options", "removed", "eligible", "count"),
    [
        ({}, 0, 5, 1),
        ({"removals": 3}, 0, 5, 3),
        ({"removals": 3}, 0, 2, 2),
        ({"removals": 3, "max_removals": 4}, 2, 5, 2),
        ({"max_removals": 4}, 4, 5, 0),
        ({"max_removals": 4}, 5, 5, 0),
        ({}, 3, 0, 0),
    ],
)
def test_how_many_become_linear_next(options, removed, eligible, count):
    assert Rules(rounds=Rounds(**options)).how_many(removed, eligible) == count


def test_the_first_round_has_the_warmup():
    rules = Rules(rounds=Rounds(epochs=2, warmup_epochs=3))
    assert [rules.epochs_of(number) for number in range(3)] == [5, 2, 2]


@given(
    mode=st.sampled_from(["min", "max"]),
    reference=st.sampled_from(["dense", "best"]),
    scores=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    tolerance=st.integers(0, 10),
)
def test_a_round_is_judged_against_the_dense_score_or_the_best_that_was_kept(mode, reference, scores, tolerance):
    """Integers, so that the test's own arithmetic is exact."""
    sign = 1 if mode == "max" else -1
    rounds = judged(Rules(Tolerance(tolerance, mode), Rounds(reference=reference)), *map(float, scores))
    kept = {0: scores[0]}  # number of the round -> its score
    for number, score in list(enumerate(scores))[1:]:
        best = max(sign * each for each in kept.values()) if reference == "best" else sign * scores[0]
        this = rounds[number]
        assert this.reference == sign * best
        assert this.reference_round == min(n for n, each in kept.items() if sign * each == best)
        assert this.accepted == (best - sign * score <= tolerance)
        if this.accepted:
            kept[number] = score
    dense = rounds[0]
    assert (dense.accepted, dense.reference, dense.reference_round) == (True, None, None)


def test_a_round_without_a_score_is_no_reference():
    rules = Rules(Tolerance(1.0, "min"), Rounds(reference="best"))
    rounds = judged(rules, 5.0)
    rounds.append(Round(["act1"], {}, None, None, False, 1, reason="no score"))
    rounds.append(Round(["act2"], {}, None, None, None, 2))
    rules.judge(rounds, 5.5)
    assert (rounds[-1].reference, rounds[-1].reference_round) == (5.0, 0)


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
    rules, last = Rules(Tolerance(0.1, mode)), next((score for score in reversed(scores) if score is not None), None)
    assert rules.rise_per_epoch(scores) == pytest.approx(rise)
    assert rules.is_still_learning([Round([], {}, None, last, True, 0)], scores) is still_learning


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
    rules = Rules(Tolerance(0.1, mode))
    told = [n for n in range(1, len(scores)) if rules.is_first_to_overtake(judged(rules, *scores[: n + 1]))]
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
