"""A run that is taken up again: what a checkpoint carries beside the model, and what has to be made up for.

Lightning does not run again what an interruption has cut off between two of its hooks: a validation, the end of an
epoch, the start of the next.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isinf
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer

from lightning_easier.callbacks import files, observing, rounds, surgery, wiring
from lightning_easier.callbacks.run import Run
from lightning_easier.callbacks.scores import REMOVED_KEY
from lightning_easier.pruning.loop import PruningLoop
from lightning_easier.pruning.state import Interruption, RunState
from lightning_easier.report.dashboard import LATENCY_CHART, Dashboard
from lightning_easier.structure.inventory import activations_of, check_activations
from lightning_easier.structure.linearize import stand_ins


def to_plain(run: Run, state: RunState) -> dict[str, Any]:
    """Return where a run stands as plain data, and what it was judged on."""
    return {"monitor": run.settings.monitor, "mode": run.settings.rules.tolerance.mode, **state.to_plain()}


def read(run: Run, plain: Mapping[str, Any]) -> None:
    """Take up a run where its checkpoint left it; the structure comes with the model's own state dict.

    Raises:
        MisconfigurationException: If the run was judged on another score.
        ValueError: If it is not the record of a run.
    """
    state = RunState.from_plain({key: value for key, value in plain.items() if key not in ("monitor", "mode")})
    judged_on = (plain.get("monitor"), plain.get("mode"))
    now = (run.settings.monitor, run.settings.rules.tolerance.mode)
    if judged_on != now:
        raise MisconfigurationException(
            f"Expected arguments `monitor` and `mode` to be {judged_on}, those of the run that is resumed, but got "
            f"{now}: its rounds can't be compared on another score."
        )
    run.loop = PruningLoop(run.settings.rules, run.settings.monitor, state)
    run.is_taken_up = state.folder is not None  # else it had not begun: a finder's, saved before the fit


def add_this_moment(run: Run, trainer: Trainer, record: dict[str, Any]) -> None:
    """Add to the record of a run counts and calls so far, and whether a validation is still to come.

    Args:
        run: The run.
        trainer: The Trainer.
        record: What :func:`to_plain` has returned for a checkpoint that is being saved: it may be as large as the
            model, so it is not made again.
    """
    run.note_score(trainer)
    state, measurement = run.state, run.measurement
    then = state.interruption  # what was loaded and not made up for yet stays as it is
    counts = then.counts
    if run.settings.measuring.on == "training" and measurement.has_counts:
        counts = measurement.save_counts()
    interruption = Interruption(
        validation_due=then.validation_due or wiring.validation_is_due(trainer, state.validations.at),
        epoch_end_begun=wiring.epoch_end_has_begun(trainer),
        not_called=then.not_called if measurement.not_called is None else measurement.not_called,
        counts=counts,
    )
    record |= {"score": state.score, "interruption": asdict(interruption)}


def begin(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Begin a run, or take one up and make up for what an interruption has cut off."""
    run.files.stop_watching_loading(trainer)
    _check_training_is_over(run, trainer)
    run.dashboard = Dashboard(trainer.loggers, run.settings.monitor)
    costs = observing.COST_CHARTS | LATENCY_CHART if run.settings.prices_network else {}
    run.dashboard.write_layout({**run.settings.method.charts, **costs})
    run.scores.have_early_stopping_wait(trainer)
    _check_structure(run, pl_module)
    _claim_folder(run, trainer, pl_module)
    if not run.is_taken_up and len(run.state.rounds) == 1:
        _begin_first_round(run, trainer, pl_module)
    run.is_taken_up = True
    _stop_if_over(run, trainer, pl_module)
    _make_up_for_validation(run, trainer)
    if trainer.current_epoch > run.state.ended:
        _make_up_for_end_of_epoch(run, trainer, pl_module)
    run.resumed_inside = trainer.current_epoch if trainer.fit_loop.restarted_mid_epoch else -1
    if trainer.fit_loop.restarted_mid_epoch and not trainer.fit_loop.done:  # it skips the start of an epoch
        rounds.begin_epoch(run, trainer, pl_module)
        observing.watch_training(run, trainer, pl_module)


def _check_training_is_over(run: Run, trainer: Trainer) -> None:
    """Refuse to train on where rounds that do not train have begun.

    Raises:
        MisconfigurationException: If the run has epochs left.
    """
    state = run.state
    begun = state.rounds[0].accepted is not None and not state.finished
    if begun and not run.settings.rules.rounds.trains and not trainer.fit_loop.done:
        raise MisconfigurationException(
            f"Expected the Trainer's `max_epochs` to be {trainer.current_epoch} or less, but got {trainer.max_epochs}: "
            f"the training of the run was over when this checkpoint was saved, and what goes after it was going. "
            f"Resume with as many epochs, or take a checkpoint that was saved before to train on."
        )


def _check_structure(run: Run, pl_module: LightningModule) -> None:
    """Find out whether the model is that of the run."""
    state = run.state
    if run.is_taken_up:
        surgery.check_is_linear(pl_module, state.linear_by_now)
        check_activations(pl_module, state.activations)
    else:
        state.activations = activations_of(pl_module, run.settings.method.kinds_of_gates)
    chosen = None if state.decision is None else state.decision.chosen
    pending = [name for plain in (chosen.operations if chosen is not None else ()) for name in plain["names"]]
    others = [name for name in pending if name in run.method_names and name not in (run.candidates or ())]
    if others:
        rank_zero_warn(
            f"{others} will be removed next, though `include` and `exclude` leave them out now: that was decided "
            f"before the run was saved. To have it otherwise, take an earlier checkpoint."
        )
    own = {name for this in state.rounds for name in this.removed}
    given = len(stand_ins(pl_module).keys() - own)
    if given > 0:
        rank_zero_info(f"{given} activations are linear from the start; they stay so and are not judged.")


def _claim_folder(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Have a folder for the checkpoints, see which are there, and bring back what is known of the scores."""
    settings, state = run.settings, run.state
    key, dry_run = settings.state_key, settings.dry_run
    state.folder = run.files.claim(trainer, settings.files.dirpath, state, key, writes=not dry_run)
    if run.is_taken_up:
        state.best = run.files.still_best(trainer, state.folder, key, state.best)
    scores = {
        REMOVED_KEY: float(run.number_removed(trainer, pl_module))
    }  # Lightning knows nothing of these after an interruption
    if state.score is not None and state.validations.have_score:
        scores[settings.monitor] = state.score
    run.scores.put(trainer, scores)
    is_kept = state.snapshot.file == files.round_file(len(state.rounds) - 1)
    if run.is_taken_up and state.rounds[-1].accepted and not is_kept and not dry_run:
        rounds.keep(run, trainer)  # that has failed, and the run was saved on the exception


def _begin_first_round(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    first = run.settings.rules.epochs_of(0)
    goes_on = isinf(first) or wiring.check_length(trainer, pl_module, int(first))
    if not goes_on and not run.settings.dry_run:
        rank_zero_warn("Nothing will be pruned: the run ends with its dense round. Raise `max_epochs`.")
    run.state.ended = run.state.rounds[0].epoch = trainer.current_epoch
    held = run.settings.method.held_from_the_start(pl_module, run.candidates or [])
    run.state.held = [operation.to_plain() for operation in held]


def _stop_if_over(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    state = run.state
    if run.settings.dry_run and state.decision is not None:  # that of the run whose checkpoint this is
        rounds.list_candidates(run, pl_module, state.decision.chosen)
        trainer.should_stop = True
    elif state.finished:
        trainer.should_stop = True
        rank_zero_info("Pruning was over when this run was saved; remove the pruning callback to train on.")


def _make_up_for_validation(run: Run, trainer: Trainer) -> None:
    state = run.state
    if state.interruption.validation_due:
        state.interruption = replace(state.interruption, validation_due=False)
        wiring.run_validation(trainer, max(trainer.current_epoch - state.ended, 0))


def _make_up_for_end_of_epoch(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Judge and decide at the end of an epoch that Lightning has skipped."""
    state = run.state
    if state.interruption.counts is not None:
        observing.count_training(run, trainer, pl_module)
        observing.finish_counting(run, trainer, pl_module)
    if not (state.validations.have_score or state.validations.scored_this_epoch):
        state.score = None  # what an epoch of training has logged is not in a checkpoint
    if not state.interruption.epoch_end_begun:
        wiring.check_early_stopping(trainer, pl_module)
    is_scored = state.validations.scored_this_epoch or not trainer.enable_validation
    not_called = state.interruption.not_called or []
    rounds.end_epoch(run, trainer, pl_module, not_called, trainer.current_epoch, is_scored)
    state.begin_epoch()
