"""The start of a run: its activations are found, and what it needs around the user's objects is put there."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_easier.callbacks import optimizers, surgery, telling, wiring
from lightning_easier.callbacks.recipe import InitialRecipe
from lightning_easier.callbacks.run import Run
from lightning_easier.sites.activations import planned_sites
from lightning_easier.sites.discovery import looked_at_once
from lightning_easier.structure.checkpoint import restructure_on_load
from lightning_easier.structure.linearize import brought_back, stand_ins


def set_up(run: Run, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Isolate the activations before weights are loaded and the strategy wraps the model."""
    run.is_active = not trainer.fast_dev_run  # type: ignore[attr-defined]
    run.around.close()  # what a setup that failed has left
    run.candidates = run.entropies = run.listed = None
    stop_measuring(run)
    run.measurement.structure_changed()
    run.stage = stage
    run.was_pruned = bool(stand_ins(pl_module))
    if stage == TrainerFn.FITTING and (trainer.current_epoch == 0 or not run.of_trainer.is_(trainer)):
        run.begin_anew(trainer)  # else a Trainer goes on
    for undo in (run.files.release, run.scores.release, run.holding.end, run.measurement.detach):
        run.around.callback(undo)
    if run.teacher is not None:
        run.around.callback(run.teacher.stop)
    if run.added is not None:
        run.around.callback(run.added.stop)
    # A model that is built in `setup` or `configure_model` is looked at when it is whole, in on_fit_start.
    if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
        discover(run, trainer, pl_module)
    run.around.callback(restructure_on_load(pl_module).remove)
    run.around.callback(run.files.stop_watching_loading, trainer)
    run.files.watch_loading(trainer, pl_module)
    if stage == TrainerFn.FITTING:
        run.around.callback(optimizers.stop_building_as_the_first, pl_module)
        optimizers.build_as_the_first(pl_module, lambda: run.state.linear_by_now, lambda: run.state.joined)


def begin_fit(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Isolate the activations of a model that was not whole before, and keep the recipe as it is at the start."""
    is_late = run.candidates is None
    if is_late:
        discover(run, trainer, pl_module)
    if run.is_taken_up and (is_late or run.was_pruned):  # what a block has inside is not seen while the block is gone
        with brought_back(pl_module, {name for this in run.state.rounds for name in this.removed}):
            _choose(run, pl_module)
    optimizers.stop_building_as_the_first(pl_module)
    wiring.check_optimizers(trainer)
    if run.teacher is not None:
        run.teacher.check(trainer, pl_module)
    if run.added is not None:
        run.added.check(trainer, pl_module)
    run.recipe = InitialRecipe(trainer)
    wiring.forget_compiled_code(pl_module)


def discover(run: Run, trainer: Trainer, pl_module: LightningModule) -> None:
    """Find and isolate the activations; check globs and wiring before anything is changed."""
    with looked_at_once():
        settings, method = run.settings, run.settings.method
        found, axes = _choose(run, pl_module), settings.measuring.axes
        chosen = run.candidates or []
        if axes:
            sites = [*(site.name for site in planned_sites(pl_module, method.kinds_of_gates)), *stand_ins(pl_module)]
            wiring.check_axes(sites, axes)
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if is_fitting:
            live = {name: found[name] for name in chosen if name in found}
            method.check(pl_module, list(live), named=settings.include is not None)
            wiring.check_strategy_lets_parameters_change(trainer, method.needs_whole_parameters)
            only_validation = method.needs_eval_mode or not settings.rules.rounds.trains
            wiring.check(trainer, live, settings.measuring.on, settings.files.dirpath, only_validation=only_validation)
            if settings.prices_network or method.looks_at_operators:
                wiring.check_network_can_be_priced(trainer, settings.prices_network)
        if run.is_active:
            if method.looks_at_operators and (is_fitting or settings.dry_run):
                telling.warn_of_norms_to_split(pl_module)
            run.measurement.look(pl_module)
            if is_fitting:
                surgery.check_marks_are_saved(pl_module, [name for name in chosen if name in found])


def _choose(run: Run, pl_module: LightningModule) -> dict[str, nn.Module]:
    """Choose what may be removed; return what the method can remove that is in the model still, by name."""
    settings, method = run.settings, run.settings.method
    found = method.removable(pl_module)
    known = [*found, *stand_ins(pl_module)]
    run.candidates = wiring.check_names(type(pl_module).__name__, method, known, settings.include, settings.exclude)
    run.method_names = known
    return found


def stop_measuring(run: Run) -> None:
    """Take all hooks away; what was counted is lost."""
    run.measurement.stop()
    run.measurement.stop_watching()
