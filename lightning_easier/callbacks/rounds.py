"""Rounds in a Trainer: the loop says what is to be done, and here it is carried out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer

from lightning_easier.callbacks import files, surgery, telling, wiring
from lightning_easier.callbacks.agreement import from_rank_zero
from lightning_easier.callbacks.recipe import plateaus, put_plateaus, reset_patience
from lightning_easier.callbacks.run import Run
from lightning_easier.callbacks.scores import REMOVED_KEY
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
    Settle,
    Stop,
    Verdict,
    Wait,
)
from lightning_easier.pruning.methods import Method, Proposal
from lightning_easier.pruning.state import Chosen, Measured, Place, Position
from lightning_easier.report import Round
from lightning_easier.structure.operations import from_plain


def begin_epoch(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Carry out what was decided, once, and distil where that is wanted."""
    if not run.settings.dry_run:
        obey(run, trainer, pl_module, run.loop.epoch_begins())
    run.holding.begin(trainer, pl_module, [*run.state.held, *run.state.operations])
    if run.added is not None and not run.state.finished:
        run.added.start(pl_module, [name for name in run.candidates or () if name not in run.state.removed])
    elif run.added is not None:
        run.added.stop()
    if run.teacher is not None and run.state.chosen_by_now:
        path, dense = run.state.path_of(files.round_file(0)), run.state.rounds[:1]
        use = "checkpoint of the dense round", "be distilled from it"
        run.teacher.start(
            pl_module,
            run.sites(pl_module),
            run.state.removed,
            lambda: run.files.find(trainer, path, run.settings.state_key, dense, *use)[1],
        )
    elif run.teacher is not None:
        run.teacher.stop()


def end_epoch(
    run: Run, trainer: Trainer, pl_module: LightningModule, not_called: Sequence[str], ended: int, is_scored: bool
) -> None:
    """Count an epoch, and judge and decide if it was the last of its round.

    Args:
        run: The run.
        trainer: The Trainer.
        pl_module: The model.
        not_called: Activations that were not called in training.
        ended: How many epochs have ended.
        is_scored: Whether the score was logged in this one.
    """
    is_measured = run.state.validations.seen_this_epoch or not trainer.enable_validation
    ask = _ask(run, trainer, not_called, is_scored)
    commands = run.loop.epoch_ended(ended, is_scored=is_scored, is_measured=is_measured, ask=ask)
    obey(run, trainer, pl_module, commands)


def conclude(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Leave a model that was judged; a second call does nothing."""
    if run.settings.dry_run and run.listed is not None:
        return
    if len(run.state.rounds) > 1 and run.state.rounds[-1].accepted is None:
        run.note_score(trainer)
    is_measured = run.state.validations.at == wiring.batches_trained(trainer)
    obey(run, trainer, pl_module, run.loop.run_ended(_ask(run, trainer), is_measured=is_measured))


def _ask(run: Run, trainer: Trainer, not_called: Sequence[str] = (), is_scored: bool = True) -> Ask:
    """Have the loop ask all processes, which may hold values of their own: rank 0 decides."""
    return Ask(
        lambda: trainer.strategy.broadcast(run.state.score if is_scored else None),
        lambda measured: choose(run, trainer, measured, not_called),
        lambda measured: _left_to_settle(run, trainer, measured),
    )


def obey(run: Run, trainer: Trainer, pl_module: LightningModule, commands: Iterable[Command]) -> None:
    """Do what the loop says, in its order."""
    dry_run = run.settings.dry_run
    for command in commands:
        match command:
            case Verdict(number):
                telling.tell_verdict(run, trainer, pl_module, number)
            case CutShort(number):
                rank_zero_warn(telling.cut_short(run, number))
            case Wait(number):
                rank_zero_warn(telling.waiting(run, number))
            case Decided(chosen) if dry_run:
                list_candidates(run, pl_module, chosen)
                trainer.should_stop = True
                return
            case Stop(why):
                trainer.should_stop = True
                if why is not None and not dry_run:
                    rank_zero_info(f"Removed were {run.state.number_removed}, and {why}: pruning is over.")
            case Keep() if not dry_run:
                keep(run, trainer)
            case GoBack():
                _go_back(run, trainer, pl_module)
            case Apply(chosen):
                _apply(run, trainer, pl_module, chosen)
            case Evaluate():
                wiring.run_validation(trainer, 0)
            case Settle(chosen) if not dry_run:
                _settle(run, trainer, pl_module, chosen)
            case Diverged(score):
                raise ValueError(telling.diverged(run, trainer, score))


def choose(run: Run, trainer: Trainer, measured: Measured, not_called: Iterable[str]) -> Chosen | None:
    """Choose from what was proposed; None if nothing is left. Some activations were not called in training."""
    proposal, state, rules = measured.proposal or Proposal(), run.state, run.settings.rules
    candidates = [name for name in run.candidates or () if name not in state.removed]
    eligible = proposal.eligible(candidates, state.rejected)
    unused = [  # by no process
        name
        for name in eligible
        if trainer.strategy.reduce_boolean_decision(any(n in not_called for n in proposal.linear(name)), all=True)
    ]
    if unused:
        rank_zero_warn(
            f"Training does not call {unused}, which validation calls: they are left alone. Does `training_step` call "
            f"other methods than the model's forward?"
        )
        eligible = {name: rank for name, rank in eligible.items() if name not in unused}
    count = rules.how_many(len(state.chosen_by_now), len(eligible))
    names: list[str] = []
    if count > 0:
        names = from_rank_zero(trainer, lambda: _selected(run.settings.method, eligible, count))
    names = proposal.disjoint(names)
    if not names:
        return None
    entropies = measured.entropies or {}
    operations = [proposal.operations[name] for name in names]
    return Chosen(names, {name: entropies[name] for name in names if name in entropies}, operations)


def _selected(method: Method, eligible: dict[str, float], count: int) -> list[str]:
    """Have the method choose among what may be removed.

    Raises:
        ValueError: If it chooses something else.
    """
    selected: Any = method.select(eligible, count)
    names = [selected] if isinstance(selected, str) or not isinstance(selected, Iterable) else list(selected)
    if any(not isinstance(name, str) or name not in eligible for name in names):
        raise ValueError(f"Expected `select` to choose among {list(eligible)}, but it returned {selected!r}")
    return list(dict.fromkeys(names))[:count]


def list_candidates(run: Run, pl_module: LightningModule, chosen: Chosen | None) -> None:
    """Say what would be done."""
    entropies = run.entropies or run.state.snapshot.measured.entropies
    known = run.state.now.proposal or run.proposal  # a run that is taken up has the first alone
    run.listed = run.settings.method.listed(pl_module, entropies, known)
    names = "nothing" if chosen is None else ", ".join(f"`{name}`" for name in chosen.names)
    rank_zero_info(f"{run.listed}\nDry run: {names} would be removed next. The model was not changed.")


def _left_to_settle(run: Run, trainer: Trainer, measured: Measured) -> Chosen | None:
    """Return what is left that changes nothing on the data that was measured; None if nothing is."""
    proposal, state = measured.proposal or Proposal(), run.state
    if state.good_at != wiring.batches_trained(trainer):  # what was measured is not what is there
        return None
    candidates = [name for name in run.candidates or () if name not in state.removed]
    names = proposal.disjoint(
        [name for name in proposal.eligible(candidates, state.rejected) if name in proposal.exact]
    )
    return Chosen(names, {}, [proposal.operations[name] for name in names]) if names else None


def _apply(run: Run, trainer: Trainer, pl_module: LightningModule, chosen: Chosen) -> None:
    """Carry out operations: a round begins."""
    run.state.snapshot = replace(run.state.snapshot, plateaus=plateaus(trainer))
    carried = _carry_out(run, trainer, pl_module, chosen)
    assert run.recipe is not None
    run.recipe.restart(trainer, run.settings.rules.rounds.restart)
    reset_patience(trainer)
    run.loop.applied(carried.round, chosen.operations)
    _take_note(run, carried)
    run.scores.forget(trainer)
    run.scores.put(trainer, {REMOVED_KEY: float(run.number_removed(trainer, pl_module))})


def _settle(run: Run, trainer: Trainer, pl_module: LightningModule, chosen: Chosen) -> None:
    """Carry out what changes nothing; no training follows."""
    carried = _carry_out(run, trainer, pl_module, chosen)
    run.loop.settled(carried.round, chosen.operations)
    _take_note(run, carried)
    run.scores.put(trainer, {REMOVED_KEY: float(run.number_removed(trainer, pl_module))})
    telling.tell_settled(run, trainer, len(run.state.rounds) - 1)


class _Carried(NamedTuple):
    """A round that has begun, and where parameters were, and are, in the optimizers."""

    round: Round
    dropped: list[Position]
    joined: list[Place]


def _take_note(run: Run, carried: _Carried) -> None:
    state = run.state
    state.dropped = carried.dropped
    state.joined += [[*place, len(state.rounds) - 1] for place in carried.joined]


def _carry_out(run: Run, trainer: Trainer, pl_module: LightningModule, chosen: Chosen) -> _Carried:
    """Carry out operations on model and optimizers."""
    before = run.state.kept[-1].score_after
    operations = [from_plain(plain) for plain in chosen.operations]
    linear = [name for operation in operations for name in operation.names]
    changes_parameters = any(operation.changes_parameters for operation in operations)
    wiring.check_optimizers_let_parameters_change(trainer, pl_module, linear, changes_parameters)
    notes, dropped, joined = surgery.carry_out(trainer, pl_module, operations)
    for name, operation in zip(chosen.names, operations, strict=True):
        others = [f"`{other}`" for other in operation.names if other != name]
        if name in operation.names and others:
            notes.setdefault(name, []).append(f"together with {' and '.join(others)}")
    counted = sum(operation.removes for operation in operations)
    epoch = trainer.current_epoch
    this = Round(linear, chosen.entropies, before, None, None, epoch, chosen.names, notes, counted=counted)
    return _Carried(this, dropped, joined)


def keep(run: Run, trainer: Trainer) -> None:
    """Save the state of a round that was kept on disk, where it costs no device memory.

    Each round has a file of its own: a run that is taken up at an older checkpoint still finds the one it needs.
    """
    state = run.state
    run.holding.once()
    trained = wiring.batches_trained(trainer)
    state.good_at = trained if state.validations.at == trained else -1
    file, scores = files.round_file(len(state.rounds) - 1), run.scores.all(trainer)
    with state.recording(snapshot=replace(state.snapshot, file=file, scores=scores)):
        assert run.last_good is not None
        run.files.save(trainer, run.last_good)


def _go_back(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Bring back structure, weights, optimizers and schedulers of the last good round."""
    state = run.state
    path, checkpoint = run.files.find(trainer, run.last_good, run.settings.state_key, state.kept)
    operations = [from_plain(plain) for plain in state.operations]
    surgery.go_back(trainer, pl_module, operations, state.dropped, path, checkpoint, run.files.load)
    surgery.check_is_linear(pl_module, state.removed)
    put_plateaus(trainer, state.snapshot.plateaus)
    run.measurement.structure_changed()
    run.loop.went_back()
    run.holding.begin(trainer, pl_module, state.held)
    state.good_at = wiring.batches_trained(trainer) if state.good_at >= 0 else -1
    run.scores.forget(trainer)
    run.scores.put(trainer, state.snapshot.scores)
    for logger in trainer.loggers:
        logger.log_metrics({REMOVED_KEY: float(run.number_removed(trainer, pl_module))}, trainer.global_step)
    rank_zero_info(f"Went back to the last good model, {path}, with {state.number_removed} removed.")
