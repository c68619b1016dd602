"""What a round is judged against, what happens where there is no score, and what is said before the first removal."""

import logging
import math
import re
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_easier import EntropyPruningCallback
from lightning_easier.structure.linearize import stand_ins
from tests.integration.interrupted import BATCHES, At, Small, outcome, run, stop, uninterrupted
from tests.integration.tiny import assert_equal_states
from tests.settings import callback as callback_of


class Sparse(Small):
    """Logs its score in some epochs only."""

    def __init__(self, epochs, scores=(0.9,), by="validation"):
        super().__init__(scores)
        self.epochs, self.by = epochs, by

    def on_validation_epoch_end(self):
        if self.by == "validation" and self.current_epoch in self.epochs:
            super().on_validation_epoch_end()

    def training_step(self, batch, batch_idx):
        if self.by == "training" and self.current_epoch in self.epochs:
            self.log("score", self.scores[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def events_of(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    events = accumulator.Tensors("pruning/events/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in events]


def told(caplog, beginning):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(beginning)]


@contextmanager
def no_warning_of(message):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message)
        yield


def sparse(*epochs):
    """Make a model of the same weights each time."""
    torch.manual_seed(3)
    return Sparse({*epochs})


class StopsAt(EarlyStopping):
    """Stops at the end of one epoch."""

    def __init__(self, epoch):
        super().__init__("val_loss", patience=10**6)
        self.epoch = epoch

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop |= trainer.current_epoch == self.epoch and not trainer.sanity_checking


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [((), {"epochs": 3}), ((), {"epochs": 9, "max_steps": 2 * BATCHES + 1}), ((StopsAt(2),), {"epochs": 9})],
    ids=["the last epoch", "steps", "early stopping"],
)
def test_a_round_that_the_run_ends_without_a_score_is_taken_back_aloud(tmp_path, caplog, callbacks, options):
    logger = TensorBoardLogger(tmp_path, "tb", "")
    with (
        caplog.at_level(logging.INFO),
        pytest.warns(
            UserWarning, match="Round 2 is taken back without a judgement: .* before 'score' was logged .*max_epochs"
        ),
    ):
        model, callback, _ = run(tmp_path, *callbacks, model=Sparse({0, 1}), logger=logger, **options)
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    last = callback.rounds[-1]
    assert (last.score_after, last.reference, last.reason) == (None, None, "score was not logged in it")
    assert sorted(stand_ins(model)) == callback.rounds[1].removed == callback.removed
    assert "| - | - | taken back: score was not logged in it |" in str(callback.report())
    assert "taken back: score was not logged in it" in events_of(tmp_path / "tb")[-1]
    (line,) = told(caplog, "Round 2")
    assert line.endswith("no score: score was not logged in it.")


@pytest.mark.parametrize("by", ["validation", "training"])
@pytest.mark.parametrize("epochs_per_round", [1, 2])
def test_a_round_waits_for_a_score_of_its_own_weights(tmp_path, by, epochs_per_round):
    """A score of every other epoch: rounds of two epochs wait for it once, rounds of one each time."""
    scores = tuple(0.9 + epoch / 100 for epoch in range(9))
    pruning = {"epochs": epochs_per_round, "warmup_epochs": 2 - epochs_per_round}
    with pytest.warns(UserWarning, match="Round .* goes on, since epoch 1, .* has no 'score'") as noted:
        _, callback, _ = run(tmp_path, model=Sparse({0, 2, 4, 6, 8}, scores, by), pruning=pruning, epochs=9)
    assert [this.epoch for this in callback.rounds] == [0, 3, 5, 7]
    assert [this.score_after for this in callback.rounds] == pytest.approx([0.92, 0.94, 0.96, 0.98])
    waited = [str(each.message)[:7] for each in noted if "goes on" in str(each.message)]
    assert waited == [f"Round {number}" for number in range(4 if epochs_per_round == 1 else 1)]


@pytest.mark.parametrize(
    "moment", [("on_train_batch_end", 1), ("on_validation_end", None), ("on_train_epoch_end", None)]
)
def test_a_run_that_waits_for_a_score_is_resumed_alike(tmp_path, tmp_path_factory, moment):
    """Judged on an old score, the resumed run would differ: it does not know that score."""
    options = {"pruning": {"epochs": 2}, "epochs": 5}
    whole = uninterrupted(tmp_path_factory, "sparse scores", lambda root: run(root, model=sparse(0, 2, 4), **options))

    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        stop(trainer)

    run(tmp_path, At(moment[0], 1, moment[1], save), model=sparse(0, 2, 4), **options)
    resumed = run(tmp_path, model=sparse(0, 2, 4), ckpt_path=tmp_path / "saved.ckpt", **options)
    assert_equal_states(outcome(*resumed), outcome(*whole))
    assert [this.epoch for this in resumed[1].rounds] == [0, 3]


def test_a_score_that_is_not_a_number_is_told_in_the_report(tmp_path):
    noted = []

    def noting(**options):
        noted.append(callback_of(**options))
        return noted[0]

    with pytest.raises(ValueError, match="finite, but got nan in epoch 1"):
        run(tmp_path, scores=(0.9, math.nan), kind=noting)
    assert "| - | - | taken back: score was nan |" in str(noted[0].report())


@pytest.mark.parametrize("epoch", [1, 0])
def test_an_interruption_by_hand_says_what_was_not_judged(tmp_path, epoch):
    def interrupt(trainer):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    match = r"Round 1 was interrupted before it was judged: \['layers.*last good model is .*round_0\.ckpt"
    expected = pytest.warns(UserWarning, match=match) if epoch == 1 else no_warning_of("Round")
    try:
        with expected, pytest.raises(SystemExit):
            run(tmp_path, At("on_train_batch_end", epoch, 1, interrupt))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
@pytest.mark.parametrize(("reference", "accepted"), [("dense", [True, True, True]), ("best", [True, True, False])])
def test_the_reference_is_the_dense_score_or_the_best_that_was_kept(tmp_path, mode, sign, reference, accepted):
    scores = tuple(sign * score for score in (0.24, 0.87, 0.64))
    pruning = {"reference": reference, "mode": mode}
    _, callback, _ = run(tmp_path, scores=scores, pruning=pruning, epochs=3)
    assert [this.accepted for this in callback.rounds] == accepted
    assert callback.rounds[-1].reference == pytest.approx(sign * (0.24 if reference == "dense" else 0.87))
    shown = f"| {sign * 0.24:.4f} (dense) |" if reference == "dense" else f"| {sign * 0.87:.4f} (round 1) |"
    assert shown in callback.report().event(2)


LEARNING = "The dense score, score .* the network was still learning"


@pytest.mark.parametrize(
    ("scores", "pruning", "match"),
    [
        (
            (0.1, 0.4, 0.8),
            {"epochs": 3},
            "better by 0.4000 an epoch .*tolerance of 0.2.*`warmup_epochs`, or pass",
        ),
        (
            (0.1, 0.4, 0.8),
            {"epochs": 3, "reference": "best"},
            "0.4000 an epoch .*`warmup_epochs`, or take a trained",
        ),
        ((0.8, 0.4, 0.1), {"epochs": 3, "mode": "min"}, "better by 0.3000 an epoch"),
        ((0.24, 0.87, 0.9), {}, "score 0.2400, is exceeded by the 0.8700 of round 1"),
    ],
)
def test_a_dense_network_that_is_still_learning_is_a_bad_reference(tmp_path, scores, pruning, match):
    with pytest.warns(UserWarning, match=LEARNING) as noted:
        run(tmp_path, scores=scores, pruning=pruning)
    (message,) = [str(each.message) for each in noted if "still learning" in str(each.message)]
    assert re.search(match, message)


@pytest.mark.parametrize(
    ("scores", "pruning"),
    [
        ((0.1, 0.7, 0.8), {"epochs": 3}),
        ((0.1, 0.4, 0.8), {"epochs": 3, "mode": "min"}),
        ((0.24, 0.87, 0.9), {"reference": "best"}),
        ((0.8, 0.9, 0.95), {}),
    ],
)
def test_a_dense_network_that_has_learned_is_not_warned_of(tmp_path, scores, pruning):
    with no_warning_of(LEARNING):
        run(tmp_path, scores=scores, pruning=pruning)


@pytest.mark.parametrize(
    "moment", [("on_train_batch_end", 1), ("on_validation_end", None), ("on_train_epoch_end", None)]
)
def test_a_resumed_dense_round_knows_how_it_has_learned(tmp_path, moment):
    options = {"scores": (0.1, 0.4, 0.8), "pruning": {"epochs": 3}, "epochs": 3}

    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        stop(trainer)

    run(tmp_path, At(moment[0], 1, moment[1], save), **options)
    with pytest.warns(UserWarning, match=LEARNING):
        _, callback, _ = run(tmp_path, ckpt_path=tmp_path / "saved.ckpt", **options)
    assert callback.state_dict()["dense_scores"] == pytest.approx([0.1, 0.4, 0.8])


class Skips(Small):
    """Two of its four rectifiers stand before an addition."""

    def __init__(self, scores=(0.9,)):
        super().__init__(scores)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.more = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(self.layers(self.norm(x))) + x
        return self.head(self.second(self.more(x)) + x)


class Untraced(Skips):
    """Nobody can tell what lies around its rectifiers but those inside its parts."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


MERGE = "let a collapse merge something."
IDLE = (
    "The others would not, and fewer layers are not less time: `first`, `second`. Pass Order(mergeable_only=True) to "
    "leave "
)
TIME = "Whether that saves time was not measured: pass Order(gain='latency') to go by what each removal saves."


@pytest.mark.parametrize(
    ("kind", "pruning", "counts", "messages"),
    [
        (Small, {}, (5, 5), [MERGE, TIME]),
        (Skips, {}, (4, 2), [MERGE, f"{IDLE}them out.", TIME]),
        (Skips, {"mergeable_only": True}, (4, 2), [MERGE, "The others are left out: `first`, `second`.", TIME]),
        (Skips, {"gain": "macs"}, (4, 2), ["save multiply-accumulates.", f"{IDLE}them out."]),
        (Skips, {"fit": True}, (4, 2), ["let one fitted operator that saves multiply-accumulates take the place "
                                              "of a chain.", f"{IDLE}them out.", TIME]),
        (Untraced, {}, (4, 0), [MERGE, "Of `layers.1`, `first`, `second`, `more.1` that can't be told: their forward "
                                       "can't be traced.", TIME]),
    ],
)  # fmt: skip
def test_what_the_removals_would_save_is_said_once_before_the_first(tmp_path, caplog, kind, pruning, counts, messages):
    with caplog.at_level(logging.INFO):
        _, callback, _ = run(tmp_path, model=kind(), pruning=pruning, epochs=3)
    assert len(callback.rounds) == 3
    count, useful = counts
    beginning = f"Of {count} activations that may become linear, {useful} would, each alone,"
    (message,) = told(caplog, "Of ")
    order = [record.getMessage()[:7] for record in caplog.records]
    assert order.index("Round 0") < order.index(message[:7]) < order.index("Round 1")
    assert message == " ".join([beginning, *messages])


def test_a_run_in_which_no_removal_saves_anything_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="Of 2 activations that may become linear, 0 would"):
        run(tmp_path, model=Skips(), pruning={"include": ["first", "second"]}, epochs=2)


@pytest.mark.parametrize(("monitor", "mode", "other"), [("val_loss", "max", "min"), ("val_acc", "min", "max")])
def test_a_mode_that_does_not_go_with_the_name_of_the_score_is_warned_of(monitor, mode, other):
    with pytest.warns(UserWarning, match=f"`monitor` '{monitor}' reads as if .* mode='{mode}' .*Pass mode='{other}'"):
        EntropyPruningCallback(monitor, mode=mode)
    with no_warning_of("Argument `monitor`"):
        EntropyPruningCallback(monitor, mode=other)
        EntropyPruningCallback("score", mode=mode)
