"""What is seen of a structure while a Trainer runs: entropies, proposals, scores, how near it is to the target."""

import math
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_easier.callbacks import files, private, rounds, starting, wiring
from lightning_easier.callbacks.run import Run
from lightning_easier.callbacks.scores import REMOVED_KEY
from lightning_easier.pruning.methods import Proposal
from lightning_easier.pruning.state import BestCheckpoint, Measured
from lightning_easier.report.dashboard import entropy_key
from lightning_easier.structure.linearize import stand_ins

LEAST_ENTROPY_KEY = "H_min"
ROUND_KEY = "round"
REMAINING_KEY = "remaining"
COST_KEYS = ("depth", "speedup")
COST_CHARTS = {"Depth of the collapsed network": "^depth$", "Times faster than the dense network": "^speedup$"}


def begin_validation(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Start to count."""
    if run.candidates is None:  # a model that is built in `setup`, validated alone
        starting.discover(run, trainer, pl_module)
    settings, measurement = run.settings, run.measurement
    run.holding.once()
    run.scores.mark(trainer, settings.monitor, "validation")
    if measurement.is_counting:  # training batches are counted, these are not
        measurement.pause(True)
    elif settings.measuring.on == "validation" or trainer.state.fn != TrainerFn.FITTING:
        measurement.start(pl_module)
        if run.may_decide(trainer):
            batches = wiring.validation_batches(trainer) * trainer.world_size
            measurement.follow(pl_module, run.candidates or (), batches)
    if _asks_for_target(run, trainer):
        measurement.follow_network(pl_module, run.sites(pl_module))


def end_validation_epoch(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Take note of what was measured, and log it."""
    state = run.state
    if trainer.state.fn == TrainerFn.FITTING:
        state.validations.seen = state.validations.seen_this_epoch = True
    if run.measurement.is_counting:
        finish_counting(run, trainer, pl_module)
        log_entropies(run, trainer, pl_module)
    if run.target is not None and _asks_for_target(run, trainer):
        attained = run.target.attained(trainer, run.measurement.network, bool(state.chosen_by_now))
        state.now = replace(state.now, asked=True, attained=attained)
        if attained is not None:
            state.rounds[-1].costs = dict(attained.costs)
            logged = {name: attained.costs[name] for name in COST_KEYS if name in attained.costs}
            _log(trainer, pl_module, logged)
    log_progress(run, trainer, pl_module)


def end_validation(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Keep the score of the structure as it is, and the best model so far."""
    run.measurement.pause(False)
    state, settings = run.state, run.settings
    if trainer.state.fn != TrainerFn.FITTING:
        if settings.dry_run and run.entropies is not None:
            measured = Measured(run.entropies, run.proposal)
            rounds.list_candidates(run, pl_module, rounds.choose(run, trainer, measured, []))
        return
    state.validations.at = trainer.fit_loop.epoch_loop.total_batch_idx
    is_new = run.scores.is_new(trainer, settings.monitor, "validation")  # perhaps it is logged by rank 0 only
    state.validations.have_score = trainer.strategy.broadcast(is_new)
    if state.validations.have_score:
        state.validations.scored_this_epoch = True
        run.note_score(trainer)
        keep_best(run, trainer, pl_module)


def _asks_for_target(run: Run, trainer: Trainer) -> bool:
    """Tell whether this validation is the one that finds out whether the structure as it is has reached the target."""
    is_fitting = trainer.state.fn == TrainerFn.FITTING
    return is_fitting and run.target is not None and not run.state.now.asked and run.may_decide(trainer)


def count_training(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Count training batches, from where an interrupted epoch has left it."""
    run.measurement.start(pl_module)
    run.measurement.follow(pl_module, run.candidates or (), 1)
    interruption = run.state.interruption
    if interruption.counts is not None:
        run.measurement.load_counts(interruption.counts, trainer.is_global_zero)
        run.state.interruption = replace(interruption, counts=None)


def end_training_epoch(run: Run, trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Take note of what was measured on training batches, if it was, and log it.

    Returns:
        The activations that training has not called.
    """
    if run.state.interruption.counts is not None:  # Lightning repeats the hook, which was cut off
        count_training(run, trainer, pl_module)
    if run.measurement.is_counting:
        finish_counting(run, trainer, pl_module)
        log_entropies(run, trainer, pl_module)
    if not trainer.enable_validation:
        log_progress(run, trainer, pl_module)
    not_called = run.measurement.not_called or run.state.interruption.not_called or []
    run.measurement.stop_watching()
    return not_called


def finish_counting(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Take note of the entropies, and of what the method would do if a decision may follow."""
    state, settings = run.state, run.settings
    run.entropies = run.measurement.finish(pl_module, state.snapshot.measured.entropies or {})
    proposal = None
    if settings.method.is_cheap or settings.measuring.on == "training" or run.may_decide(trainer):
        proposal = run.measurement.propose(trainer, pl_module, run.candidates or [], run.method_names)
    run.proposal = proposal or Proposal()
    if trainer.state.fn == TrainerFn.FITTING:
        state.now = replace(state.now, entropies=run.entropies, proposal=proposal)
        state.rounds[-1].measured[state.ended] = dict(run.entropies)  # a run that is taken up may be an epoch ahead


def log_entropies(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Log the entropy of every activation, and the least of those that may become linear."""
    entropies = run.entropies or {}
    _log(trainer, pl_module, {entropy_key(name): value for name, value in entropies.items()})
    _log(trainer, pl_module, run.measurement.metrics(pl_module))
    prunable = [value for name, value in entropies.items() if name in (run.candidates or ())]
    if prunable:
        _log(trainer, pl_module, {LEAST_ENTROPY_KEY: min(prunable)}, prog_bar=True)


def log_progress(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Log the number removed, the round, and how many activations are left that are not linear."""
    progress = {REMOVED_KEY: float(run.number_removed(trainer, pl_module))}
    if trainer.state.fn == TrainerFn.FITTING:
        progress[ROUND_KEY] = float(len(run.state.rounds) - 1)
        gone = [*stand_ins(pl_module)]
        left = [name for name in run.state.activations if not any(f"{name}.".startswith(f"{part}.") for part in gone)]
        _log(trainer, pl_module, {REMAINING_KEY: float(len(left))})
    _log(trainer, pl_module, progress, prog_bar=True)


def _log(trainer: Trainer, pl_module: LightningModule, values: dict[str, float], prog_bar: bool = False) -> None:
    """Log what all processes have alike: Lightning would average each value, in two sums with a barrier before each.

    ``rank_zero_only`` is what has it leave that out; it is logged on every process all the same, for its callbacks.
    """
    are_several = trainer.world_size > 1  # then `sync_dist` is what keeps Lightning from advising it
    with private.logged_in_place(pl_module):
        pl_module.log_dict(values, prog_bar=prog_bar, sync_dist=are_several, rank_zero_only=are_several)


def note_score_of_epoch(run: Run, trainer: Trainer, pl_module: LightningModule) -> bool:
    """Take note of the score at the end of a training epoch; tell whether this epoch has logged it."""
    state, monitor = run.state, run.settings.monitor
    from_validation = state.validations.have_score or state.validations.scored_this_epoch
    if run.resumed_inside == trainer.current_epoch and not from_validation:
        state.score = None  # of an epoch that this process has not seen whole
    else:
        if state.validations.seen or not trainer.enable_validation:
            wiring.check_monitor(trainer, monitor, state.score)
        run.note_score(trainer)
    if not state.validations.have_score or not trainer.enable_validation:
        keep_best(run, trainer, pl_module)
    return state.validations.scored_this_epoch or run.scores.is_new(trainer, monitor, "epoch")


def keep_best(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Save the model if no other with as many linear activations had a better score."""
    settings, state = run.settings, run.state
    if not settings.files.best_per_depth or state.finished or settings.dry_run:
        return
    score = trainer.strategy.broadcast(state.score)
    removed = run.number_removed(trainer, pl_module)
    best = state.best.get(str(removed))
    is_better = settings.rules.tolerance.is_better
    if score is not None and math.isfinite(score) and (best is None or is_better(score, best.score)):
        now = BestCheckpoint(score, files.best_file(removed))
        with state.recording(best={**state.best, str(removed): now}):
            run.files.save(trainer, run.best_checkpoints[removed])


def watch_training(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Count or watch the training that begins now."""
    if run.state.finished:
        return
    if run.settings.measuring.on == "training":
        count_training(run, trainer, pl_module)
    elif not wiring.is_compiled(pl_module):  # hooks would cost it a compilation
        run.measurement.watch(trainer, pl_module, run.state.interruption.not_called)
