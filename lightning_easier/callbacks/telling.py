"""What a run says: verdicts, warnings, and what a user may do about it."""

from difflib import get_close_matches

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer

from lightning_easier.callbacks import wiring
from lightning_easier.callbacks.run import Run
from lightning_easier.pruning.methods import Proposal
from lightning_easier.pruning.rules import Tolerance, mode_in_name
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.norms import norms_to_split


def warn_of_norms_to_split(pl_module: LightningModule) -> None:
    """Warn of batch norms that compute the activation after them, too: no chain is found through one of them."""
    norms = norms_to_split(pl_module)
    if norms:
        rank_zero_warn(
            f"{len(norms)} modules, such as {norms[0]!r}, are a batch norm and what follows it in one (as timm's "
            f"BatchNormAct2d): nothing can be fitted or merged through them, and what is around their activations "
            f"stays. Split them at the end of `__init__` of {type(pl_module).__name__}, when its weights are loaded: "
            f"`from lightning_easier.structure.norms import split_norms`, `split_norms(self)`."
        )


def warn_of_a_mode(monitor: str, tolerance: Tolerance) -> None:
    """Warn if the name of a score suggests the other mode."""
    mode, usual = tolerance.mode, mode_in_name(monitor)
    if usual not in (None, mode):
        rank_zero_warn(
            f"Argument `monitor` {monitor!r} reads as if a {'lower' if usual == 'min' else 'higher'} value were "
            f"better, but mode={mode!r} takes a {'higher' if usual == 'min' else 'lower'} one for better: every round "
            f"that does worse would be kept. Pass mode={usual!r} if the name is right."
        )


def warn_of_an_unknown_score(trainer: Trainer, monitor: str) -> None:
    """Warn if the validation of the sanity check has logged no such score. A training step may, so it is no error."""
    logged = sorted(trainer.callback_metrics)
    if logged and monitor not in logged:
        alike = get_close_matches(monitor, logged, 1)
        rank_zero_warn(
            f"Argument `monitor` {monitor!r} is not among {logged}, which the validation of the sanity check has "
            f"logged{f': did you mean {alike[0]!r}?' if alike else '.'} Unless training logs it, the run will end with "
            f"an error after its first epoch."
        )


def tell_verdict(run: Run, trainer: Trainer, pl_module: LightningModule, number: int) -> None:
    """Say how a round was judged, and once whether the reference is a weak one, and what may save something."""
    state, report = run.state, run.report
    this = state.rounds[number]
    if run.dashboard is not None:
        if this.score_after is not None:
            run.dashboard.write_score(this.score_after, run.number_removed(trainer, pl_module))
        _tell_costs(run, trainer, number)
        run.dashboard.write_round(report, number, trainer.global_step)
    rank_zero_info(report.line(number, run.settings.rules.tolerance.amount))
    _warn_of_a_weak_reference(run)
    if number == 0 and state.now.proposal is not None:
        _tell_outlook(run, trainer, pl_module, state.now.proposal)


def _tell_costs(run: Run, trainer: Trainer, number: int) -> None:
    """Write what the network costs without what was removed, beside the dense one, if it was collapsed to see."""
    this, dense, dashboard = run.state.rounds[number], run.state.rounds[0], run.dashboard
    if dashboard is None or "latency" not in this.costs:
        return
    is_first = not any("latency" in each.costs for each in run.state.rounds[:number])
    if is_first and dense.score_after is not None:
        dashboard.write_score_by_latency(dense.score_after, this.costs["dense_latency"])
    if this.score_after is not None:
        dashboard.write_score_by_latency(this.score_after, this.costs["latency"])
    if run.target is not None and run.target.report is not None:
        dashboard.write_report(run.target.report, "collapse", "report", trainer.global_step)


def tell_settled(run: Run, trainer: Trainer, number: int) -> None:
    """Say what was done when the run had ended, since it changes nothing on what was measured."""
    if run.dashboard is not None:
        run.dashboard.write_round(run.report, number, trainer.global_step)
    rank_zero_info(run.report.line(number, run.settings.rules.tolerance.amount))


def _warn_of_a_weak_reference(run: Run) -> None:
    """Warn if the dense network had not learned enough when its score became the reference."""
    rounds, rules = run.state.rounds, run.settings.rules
    dense, is_dense = rounds[0].score_after, rules.rounds.reference == "dense"
    is_still_learning = rules.is_still_learning(rounds, run.state.dense_scores)
    if len(rounds) == 1 and is_still_learning:
        rise = rules.rise_per_epoch(run.state.dense_scores)
        so = f"still got better by {rise:.4f} an epoch at the end of its round"
    elif is_dense and not is_still_learning and rules.is_first_to_overtake(rounds):
        so = f"is exceeded by the {rounds[-1].score_after:.4f} of round {len(rounds) - 1}"
    else:
        return
    if rules.rounds.trains:
        longer = "Raise `warmup_epochs`,"
        longer += " or pass Rounds(reference='best')," if is_dense else ""
    else:
        longer = "Train longer,"
    rank_zero_warn(
        f"The dense score, {run.settings.monitor} {dense:.4f}, {so}, more than the tolerance of "
        f"{rules.tolerance.amount:g}: the network was still learning. Judged against it, rounds may lose more than the "
        f"tolerance of what the network can reach. {longer} or take a trained network."
    )


def _tell_outlook(run: Run, trainer: Trainer, pl_module: LightningModule, proposal: Proposal) -> None:
    """Say before the first removal how many would save something; nothing is timed for it."""
    if not trainer.is_global_zero or not wiring.can_tell_what_merges(trainer):
        return
    names = [name for name in run.state.now.entropies or {} if name in (run.candidates or ())]
    found = run.settings.method.outlook(pl_module, proposal, names, str(pl_module.device)) if names else None
    if found is not None:
        (rank_zero_info if found.is_promising else rank_zero_warn)(found.words)


def warn_of_a_missed_target(run: Run) -> None:
    """Say what the last good model has reached instead of the target."""
    attained = run.state.snapshot.measured.attained
    if attained is not None and attained.is_reached:
        return
    what = attained.words if attained is not None else "nothing was removed"
    remedy = "let more go (`include`, `max_removals`, `max_rejections`, another `method`)"
    if any(this.accepted is False for this in run.state.rounds):
        remedy = f"Raise `tolerance` or `max_epochs`, or {remedy}"
    elif run.state.finished:
        remedy = "Nothing was taken back, nothing is left: let more go (`include`, `max_removals`, another `method`)"
    else:
        remedy = f"Raise `max_epochs`, or {remedy}"
    rank_zero_warn(f"The run is over, and its target is not reached: {what}. {remedy}.")


def warn_that_nothing_was_pruned(run: Run) -> None:
    """Say that the run was too short for its first round."""
    rules = run.settings.rules
    length = f"{rules.epochs_of(0)} epochs" if rules.rounds.trains else "the whole of it"
    rank_zero_warn(
        f"Nothing was pruned: the run ended before its first round, {length} with a validation at the end that logs "
        f"{run.settings.monitor!r}."
    )


def warn_of_what_is_unjudged(run: Run) -> None:
    """Say that the model of an interrupted run holds removals that nobody has judged, or that were rejected."""
    state, number = run.state, len(run.state.rounds) - 1
    this = state.rounds[-1]
    if number > 0 and (this.accepted is None or state.is_going_back):
        moment = "taken back" if state.is_going_back else "judged"
        rank_zero_warn(
            f"Round {number} was interrupted before it was {moment}: {this.chosen} are removed from the model as it "
            f"is. The last good model is {run.last_good}; with a checkpoint of the run as `ckpt_path` the round goes "
            f"on."
        )


def explain_failure(run: Run, pl_module: LightningModule, exception: BaseException) -> None:
    """Add a note to an error that a step or a forward has raised since it reads something of what was taken out."""
    linear = stand_ins(pl_module)
    asked = getattr(exception, "obj", None)  # of an AttributeError
    names = [name for name, stand_in in linear.items() if stand_in is asked]
    if not names and any(f"'{type(stand_in).__name__}'" in str(exception) for stand_in in linear.values()):
        names = [name for name in run.state.rounds[-1].chosen if name in linear] or list(linear)
    if names:
        exception.add_note(
            f"{names} were taken out of the model by {run.settings.method}: a step of the LightningModule, or a "
            f"forward, reads something of them that what took their place has not. Leave them alone: pass "
            f"exclude={names}."
        )


def cut_short(run: Run, number: int) -> str:
    """Say that a round was taken back because the end of the run has left it without a score."""
    return (
        f"Round {number} is taken back without a judgement: the run ended before {run.settings.monitor!r} was logged "
        f"for the model without {run.state.rounds[number].chosen}. Log it in every validation, and have the run end "
        f"with one: raise `max_epochs` or `max_steps`, or the patience of EarlyStopping."
    )


def waiting(run: Run, number: int) -> str:
    """Say that a round goes on until it has a score."""
    monitor = run.settings.monitor
    return (
        f"Round {number} goes on, since epoch {run.state.ended - 1}, which was to end it, has no {monitor!r}: it ends "
        f"with the next epoch that has one. Log it in every validation, or choose `epochs` and `warmup_epochs` of the "
        f"rounds so that they end where it is logged."
    )


def diverged(run: Run, trainer: Trainer, score: float) -> str:
    """Say that the score is not finite."""
    return (
        f"Expected the score of argument `monitor` {run.settings.monitor!r} to be finite, but got {score} in epoch "
        f"{trainer.current_epoch}. The training has diverged: lower the learning rate. The last good model is "
        f"{run.last_good or 'an earlier checkpoint'}."
    )
