"""EASIER's loop inside a Trainer: measure, make the least important activation linear, train on, judge.

Two moments matter. The *decision* falls at the end of a training epoch, when validation is over and every score is
known, and before ModelCheckpoint saves: a checkpoint pairs the score with the structure it belongs to, and holds the
decision. The *operation* follows at the start of the next epoch (or when a run is taken up again).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_easier.callbacks import files, optimizers, surgery, wiring
from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.callbacks.measuring import Measurement
from lightning_easier.callbacks.recipe import (
    RESTARTS,
    InitialRecipe,
    LoggedScores,
    Restart,
    plateaus,
    put_plateaus,
    reset_patience,
)
from lightning_easier.callbacks.targets import Targets
from lightning_easier.pruning.candidates import candidates
from lightning_easier.pruning.criteria import lowest_entropy
from lightning_easier.pruning.loop import (
    Apply,
    Ask,
    Command,
    CutShort,
    Decided,
    Diverged,
    GoBack,
    Keep,
    PruningLoop,
    Stop,
    Verdict,
    Wait,
)
from lightning_easier.pruning.ranking import Ranked, Ranking, apart
from lightning_easier.pruning.rules import Rejections, Rules, Tolerance, mode_in_name
from lightning_easier.pruning.state import BestCheckpoint, Interruption, Measured, Removal, RunState
from lightning_easier.report import CandidateReport, PruningReport, Round
from lightning_easier.report.dashboard import Dashboard, entropy_key
from lightning_easier.sites.activations import planned_sites
from lightning_easier.sites.rectifiers import as_gates
from lightning_easier.structure.checkpoint import restructure_on_load, warn_if_rejected
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.operations import from_plain
from lightning_easier.support.arguments import (
    as_axes,
    as_globs,
    check_bool,
    check_choice,
    check_positive,
    check_share,
)
from lightning_easier.support.hooks import Remembered, Undone

REMOVED_KEY = "removed"
LEAST_ENTROPY_KEY = "H_min"
ROUND_KEY = "round"


class EntropyPruningCallback(Callback):
    """Make the activations of lowest entropy linear, round by round, while the score allows.

    The first round trains the dense model for ``warmup_epochs + epochs_per_round`` epochs; its score is the reference.
    Every further round starts by making activations linear, trains for ``epochs_per_round`` epochs, and is judged on
    the validation that ends it. If the score has fallen by more than ``tolerance`` from the dense score, structure,
    weights, optimizer and schedulers go back to those of the last good round, and the run stops, or the next candidate
    is tried. It stops as well when nothing is left to remove, or ``max_removals`` is reached. A round whose score is
    not logged in its last epoch goes on until it is. A round that the end of the run cuts short is judged on its last
    score, and taken back if it has none.

    A run that was killed goes on from any of its checkpoints (``ckpt_path``) as if it had not been, from the middle of
    an epoch too if the training loader can (``state_dict`` and ``load_state_dict``).

    Logged: ``entropy/<activation>`` in bits for every activation that is not linear yet; ``removed``, the number that
    are linear; ``H_min``, the least entropy of those that may become so; ``round``. In TensorBoard, besides, one chart
    of all entropies, the score against the number removed, and an event per round. When an activation has become
    linear, all logged values are NaN until they are logged again: they are of another model.

    The model of every round that was kept is a checkpoint ``round_<number>.ckpt`` in ``dirpath``, the last of them
    :attr:`last_good`; :func:`~lightning_easier.load_pruned` loads it.

    Args:
        monitor: Name of the score, logged in a validation or training step or at the end of validation. (What is logged
            in the module's ``on_train_epoch_end`` comes too late.)
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below the reference, in the score's own unit.
        epochs_per_round: Training epochs between two removals.
        removals_per_round: How many activations become linear at once.
        max_removals: How many may become linear in this run; no limit by default.
        warmup_epochs: Epochs before the dense round.
        include: Name globs of the activations that may become linear; all by default.
        exclude: Name globs of those that may not; they are not measured either.
        measure_on: Which batches the entropy is measured on.
        neuron_dim: Axis of the neurons by name glob, where the one found is not the one wanted.
        gates: Whether activations that bound their output (sigmoid, tanh, ...) may become linear too: all, or those
            named, see :func:`~lightning_easier.isolate_activations`.
        shift_padding: Whether the padding of a convolution behind a removed activation moves to the one before it,
            where the two would meet: training goes on with the very function that a collapse merges exactly. See
            :func:`~lightning_easier.linearize`.
        dirpath: Folder of the rounds' checkpoints; ``entropy_pruning`` in the logger's folder by default. All processes
            have to reach it. A new run does not write where another has or is about to: its folder ends in ``-v1``,
            ``-v2``, ... A run that is resumed goes on in the folder where its checkpoints are. What lies there is read
            as plain data, see `Security` in docs/supported.md.
        restart: What begins anew with every removal: nothing, the learning-rate schedules and with them the
            hyperparameters of the optimizers, or the optimizers with their moments too (EASIER).
        on_reject: Whether the run stops when a round was taken back, or tries the next candidate. What was taken back
            is not tried again.
        max_rejections: How many rounds in a row may be taken back before the run stops.
        reference: What a round is judged against: the dense score, or the best score of any round that was kept, the
            dense one among them. The latter suits a network that goes on learning after its first round.
        best_per_depth: Whether the best checkpoint for each number of linear activations is kept in ``dirpath`` as
            ``best_removed_<number>.ckpt``, see :attr:`best_checkpoints`.
        sample: Share of the samples of each batch that is counted, in (0, 1], for a smaller overhead.
        dry_run: Only list what would be done: the run stops where the first decision falls, and :attr:`candidates`
            holds the list. With ``trainer.validate`` it needs no training.
        stand_in: What takes the place of an activation: the identity (EASIER), or the affine that comes closest to it,
            a scale and an offset for each channel, measured in the same pass as the entropies. It is as linear, and
            keeps more of the accuracy.
        trainable: Whether scales and offsets of affines are trained. They join the parameter group of what is trained
            right before them in the model, the batch norm or the operator in front.
        collapse: ``"exact"``: an activation becomes linear, and :func:`~lightning_easier.collapse` merges its
            neighbours after the run. ``"fit"``: where it lies between two operators, one cheaper operator fitted to
            what the chain computes takes their place at once. It moves into the first of them, whose parameters stay
            the same objects; what is behind becomes identities, and a batch norm behind the chain stays and, where it
            has a scale and an offset, is adjusted. Two activations in a row, as in the bodies of bottlenecks and
            inverted residuals, go as one where the first alone saves nothing. Chains are measured in the last
            validation of a round; other activations get the ``stand_in``.
        criterion: What tells how much a removal costs: ``"entropy"`` (EASIER), or ``"linearity"``, the share of
            variance that the best linear operator does not explain: with ``collapse="fit"`` that of the chain, else
            that of the activation, by the affine for each channel.
        gain: Rank by the criterion per second (``"latency"``, measured on rank 0's device) or per multiply-accumulate
            (``"macs"``) that the removal saves; what saves nothing goes last. By the criterion alone by default.
        candidates: ``"mergeable"``: leave out activations whose removal merges nothing, and with a ``gain`` those whose
            removal saves nothing.
        target_speedup: The run is over when the collapsed network is measured to be so many times faster than the dense
            one with its batch norms folded, in turn, on a batch of the validation; above 1. The tolerance guards it
            still.
        target_depth: The run is over when the collapsed network has no more operators than so many behind each other.
            Both are asked for once in each round, in the validation that it is judged on; a run that ends without says
            what it has reached.
        distill: Whether the rounds with removals are trained on the logits of the dense network, too. Its weights are
            those at the end of the dense round, whose checkpoint is read. The network is the outermost module that
            holds all activations and that ``training_step`` calls, with gradients; it returns logits
            ``(N, classes, *)``, or an object or mapping with ``logits``. Logged as ``distill_loss``. See
            :mod:`lightning_easier.callbacks.distillation`.
        distill_weight: Share ``w`` of that in the loss, in (0, 1].
        distill_temperature: ``T``, by which logits are divided for it.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range.
        MisconfigurationException: When training starts, if there is no activation or a glob matches none, if there is
            nothing to measure on, the run is too short for one round, or a strategy or another callback does not go
            with it; after the first epoch, if ``monitor`` was not logged; in training, if a step gives nothing to
            distil.
        FileNotFoundError: If the checkpoint of a round that was kept is needed and gone.
        RuntimeError: After an operation, if the processes do not hold the same model.
        OSError: If a checkpoint can't be written; those that were there before are whole.
        ValueError: If a run is resumed from a record of another form, with a module of other activations, or needs a
            checkpoint that can't be read safely.

    Source: EASIER, arXiv 2404.18949. ``distill``: Hinton et al., arXiv 1503.02531.

    Note:
        EASIER restarts optimizer and schedule every round; here both go on unless told otherwise. The patience of
        EarlyStopping begins anew with every removal. A model that comes with linear activations keeps them; the score
        of this run's first round is the reference. The Trainer's ``min_epochs`` keeps it training when pruning is over,
        without judging what follows.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = EntropyPruningCallback(monitor="val_acc", mode="max", tolerance=0.01)
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        epochs_per_round: int = 1,
        removals_per_round: int = 1,
        max_removals: int | None = None,
        warmup_epochs: int = 0,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        measure_on: Literal["validation", "training"] = "validation",
        neuron_dim: dict[str, int] | None = None,
        gates: bool | list[str] = False,
        shift_padding: bool = True,
        dirpath: str | None = None,
        restart: Literal["none", "schedule", "optimizer"] = "none",
        on_reject: Literal["stop", "next"] = "stop",
        max_rejections: int = 3,
        best_per_depth: bool = False,
        sample: float = 1.0,
        dry_run: bool = False,
        stand_in: Literal["identity", "affine"] = "identity",
        trainable: bool = False,
        collapse: Literal["exact", "fit"] = "exact",
        criterion: Literal["entropy", "linearity"] = "entropy",
        gain: Literal["latency", "macs"] | None = None,
        candidates: Literal["all", "mergeable"] = "all",
        target_speedup: float | None = None,
        target_depth: int | None = None,
        distill: bool = False,
        distill_weight: float = 0.5,
        distill_temperature: float = 4.0,
        reference: Literal["dense", "best"] = "dense",
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"Expected argument `monitor` to be the name of a logged score, but got {monitor!r}")
        check_choice("measure_on", measure_on, ("validation", "training"))
        self.monitor = monitor
        check_choice("on_reject", on_reject, ("stop", "next"))
        rejections = Rejections(max_rejections)
        self.rules = Rules(
            Tolerance(tolerance, mode),
            rejections if on_reject == "next" else Rejections(1),
            epochs_per_round=epochs_per_round,
            removals_per_round=removals_per_round,
            max_removals=max_removals,
            warmup_epochs=warmup_epochs,
            reference=reference,
        )
        usual = mode_in_name(monitor)
        if usual not in (None, mode):
            rank_zero_warn(
                f"Argument `monitor` {monitor!r} reads as if a {'lower' if usual == 'min' else 'higher'} value were "
                f"better, but mode={mode!r} takes a {'higher' if usual == 'min' else 'lower'} one for better: every "
                f"round that does worse would be kept. Pass mode={usual!r} if the name is right."
            )
        self.include = as_globs("include", include)
        self.exclude = as_globs("exclude", exclude)
        self.measure_on = measure_on
        self.neuron_dim = as_axes("neuron_dim", neuron_dim)
        self.gates = sorted(as_gates(gates))
        for argument, value in (("shift_padding", shift_padding), ("best_per_depth", best_per_depth)):
            check_bool(argument, value)
        check_bool("dry_run", dry_run)
        self.shift_padding = shift_padding
        if dirpath is not None and (not isinstance(dirpath, str | Path) or not str(dirpath)):
            raise TypeError(f"Expected argument `dirpath` to be a path, but got {dirpath!r}")
        self.dirpath = None if dirpath is None else str(dirpath)
        check_choice("restart", restart, RESTARTS)
        check_share("sample", sample)
        self.restart: Restart = restart
        self.best_per_depth = best_per_depth
        self.sample = sample
        self.dry_run = dry_run
        self.ranking = Ranking(criterion, gain, candidates, collapse, stand_in, shift_padding, self.gates, trainable)
        if self.ranking.needs_chains and measure_on != "validation":
            raise ValueError(
                f"Expected argument `measure_on` to be 'validation' with collapse='fit', but got {measure_on!r}: what "
                f"is fitted has to compute what the chain computes in eval mode"
            )
        self._targets = Targets(target_speedup, target_depth, self.ranking.gain or "latency")
        check_bool("distill", distill)
        check_share("distill_weight", distill_weight)
        check_positive("distill_temperature", distill_temperature)
        self.distill = distill

        self._loop = PruningLoop(self.rules, monitor)
        self._taken_up = False  # whether the state is that of a checkpoint
        self._state_of = Remembered[Trainer]()  # the Trainer that it is of
        self._candidates: list[str] | None = None  # None: the activations were not looked for yet
        self._measured: dict[str, float] | None = None  # the entropies, whatever was validated
        self._ranked = Ranked()  # and the order
        self._listed: CandidateReport | None = None
        self._active = False
        self._stage: str | None = None  # of the Trainer, while it runs
        self._around = Undone()  # the objects of the user
        self._measurement = Measurement(self.gates, self.exclude or (), self.neuron_dim, sample, self.ranking)
        self._distillation = Distillation(distill_weight, distill_temperature)
        self._dashboard: Dashboard | None = None
        self._recipe: InitialRecipe | None = None
        self._scores = LoggedScores()
        self._files = files.RunFiles()
        self._resumed_inside = -1  # the epoch that a checkpoint was saved in the middle of

    @property
    def _state(self) -> RunState:
        """Where the run stands."""
        return self._loop.state

    # What a user may ask for

    @property
    def rounds(self) -> list[Round]:
        """The rounds so far, the dense one first."""
        return list(self._state.rounds)

    @property
    def removed(self) -> list[str]:
        """The activations that are linear by now, in the order of their removal."""
        return self._state.removed

    @property
    def entropies(self) -> dict[str, float] | None:
        """Name -> entropy in bits as measured last, in ``trainer.validate`` too; None before."""
        return None if self._measured is None else dict(self._measured)

    @property
    def last_good(self) -> Path | None:
        """Checkpoint of the last round that was kept; None before the first was judged."""
        return self._state.path_of(self._state.snapshot.file)

    @property
    def best_checkpoints(self) -> dict[int, Path]:
        """Number of linear activations -> checkpoint with the best score, if ``best_per_depth``."""
        paths = {number: self._state.path_of(best.file) for number, best in self._state.best.items()}
        return {int(number): path for number, path in paths.items() if path is not None}

    @property
    def candidates(self) -> CandidateReport | None:
        """What a dry run has listed: activations, their entropies, and what each removal would merge."""
        return self._listed

    def report(self) -> PruningReport:
        """Return what the run did, round by round."""
        return PruningReport(self.monitor, self.rounds)

    def select(self, ranks: Mapping[str, float], count: int) -> list[str]:
        """Choose the activations that become linear next; override for another criterion.

        Args:
            ranks: Name -> rank of the candidates, in execution order, the same on all processes: their entropy in bits,
                or what ``criterion`` and ``gain`` make of it.
            count: How many to choose at most.
        """
        return lowest_entropy(ranks, count)

    # Start and end of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Isolate the activations before weights are loaded and the strategy wraps the model."""
        twins = [callback for callback in trainer.callbacks if isinstance(callback, EntropyPruningCallback)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise MisconfigurationException(
                f"Expected one EntropyPruningCallback in the Trainer, but got {len(twins)}; give one of them all globs"
            )
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._around.close()  # what a setup that failed has left
        self._candidates = self._measured = self._listed = None
        self._measurement.stop()
        self._measurement.stop_watching()
        self._measurement.structure_changed()
        self._stage = stage
        if stage == TrainerFn.FITTING and (trainer.current_epoch == 0 or not self._state_of.is_(trainer)):
            self._loop, self._taken_up = PruningLoop(self.rules, self.monitor), False  # else a Trainer goes on
            self._state_of = Remembered(trainer)
            self._files.release()
            self._files = files.RunFiles()
        for undo in (self._files.release, self._scores.release, self._distillation.stop, self._measurement.detach):
            self._around.callback(undo)
        # A model that is built in `setup` or `configure_model` is looked at when it is whole, in on_fit_start.
        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
            self._discover(trainer, pl_module)
        self._around.callback(restructure_on_load(pl_module).remove)
        self._around.callback(self._files.load_as_ever, trainer)
        self._files.watch_loading(trainer, pl_module)
        if stage == TrainerFn.FITTING:
            self._around.callback(optimizers.build_as_ever, pl_module)
            optimizers.build_as_the_first(pl_module, lambda: self._state.linear_by_now, lambda: self._state.joined)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Isolate the activations of a model that was not whole before, and keep the recipe as it is at the start."""
        if self._candidates is None:
            self._discover(trainer, pl_module)
        optimizers.build_as_ever(pl_module)
        wiring.check_optimizers(trainer)
        if self.distill:
            self._distillation.check(trainer, pl_module)
        self._recipe = InitialRecipe(trainer)
        wiring.forget_compiled_code(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring what a resumed run has left undone to its end, and say so when there was nothing to train on."""
        if not self._active:
            return
        self._conclude(trainer, pl_module)
        if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0 and trainer.max_epochs:
            raise MisconfigurationException(
                "EntropyPruningCallback needs training batches, but the training loader yielded none. Check its "
                "dataset and batch size (`drop_last` drops an incomplete batch)."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._measurement.stop()
        self._measurement.stop_watching()
        self._around.close()
        self._stage = self._recipe = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; what was counted stays, for a checkpoint that is saved on the exception."""
        if isinstance(exception, KeyboardInterrupt) and self._stage == TrainerFn.FITTING:
            self._tell_what_is_unjudged()
        self._around.close()

    def _tell_what_is_unjudged(self) -> None:
        """Say that the model of an interrupted run holds removals that nobody has judged, or that were rejected."""
        this = self._state.rounds[-1]
        if this.removed and (this.accepted is None or self._state.is_going_back):
            moment = "taken back" if self._state.is_going_back else "judged"
            rank_zero_warn(
                f"Round {len(self._state.rounds) - 1} was interrupted before it was {moment}: {this.removed} are "
                f"linear in the model as it is. The last good model is {self.last_good}; with a checkpoint of the run "
                f"as `ckpt_path` the round goes on."
            )

    def _discover(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and isolate the activations; check globs and wiring before anything is changed."""
        sites = {site.name: site.module for site in planned_sites(pl_module, self.gates)}
        known = [*sites, *stand_ins(pl_module)]
        chosen = wiring.check_names(type(pl_module).__name__, known, self.include, self.exclude, self.neuron_dim)
        if trainer.state.fn == TrainerFn.FITTING:
            live = {name: sites[name] for name in chosen if name in sites}
            wiring.check(trainer, live, self.measure_on, self.dirpath)
            wiring.check_strategy_lets_parameters_change(trainer, self.ranking.needs_whole_parameters)
            if self._targets.are_given or not self.ranking.is_free:
                wiring.check_network_can_be_priced(trainer, self._targets.are_given)
        self._candidates = chosen
        if self._active:
            self._measurement.look(pl_module)
            if trainer.state.fn == TrainerFn.FITTING:
                surgery.check_marks_are_saved(pl_module, [name for name in chosen if name in sites])

    # Measuring

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        if not self._active or trainer.sanity_checking:
            return
        if self._candidates is None:  # a model that is built in `setup`, validated alone
            self._discover(trainer, pl_module)
        self._scores.mark(trainer, self.monitor, "validation")
        if self._measurement.is_counting:  # training batches are counted, these are not
            self._measurement.pause(True)
        elif self.measure_on == "validation" or trainer.state.fn != TrainerFn.FITTING:
            self._measurement.start(pl_module)
            if not self.ranking.is_free and self._may_decide(trainer):
                batches = wiring.validation_batches(trainer) * trainer.world_size
                self._measurement.follow_chains(pl_module, self._candidates or (), batches)
        if self._asks_for_targets(trainer):
            self._measurement.follow_network(pl_module, self._sites(pl_module))

    def _sites(self, pl_module: LightningModule) -> list[str]:
        """Return the names of all activations, those that are linear among them."""
        return list(dict.fromkeys([*(self._candidates or ()), *stand_ins(pl_module)]))

    def _may_decide(self, trainer: Trainer) -> bool:
        """Tell whether a decision may follow this validation."""
        return self._loop.may_decide if trainer.state.fn == TrainerFn.FITTING else self.dry_run

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the entropies, the number removed, and the round."""
        if not self._active or trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._state.validated = self._state.validated_this_epoch = True
        if self._measurement.is_counting:
            self._finish_measuring(trainer, pl_module)
            self._log_entropies(trainer, pl_module)
        if self._asks_for_targets(trainer):
            attained = self._targets.attained(trainer, self._measurement.network, self.removed)
            self._state.now = replace(self._state.now, asked=True, attained=attained)
        self._log_progress(trainer, pl_module)

    def _asks_for_targets(self, trainer: Trainer) -> bool:
        """Tell whether this validation is the one that finds out whether the structure as it is has reached them."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        return is_fitting and self._targets.are_given and not self._state.now.asked and self._may_decide(trainer)

    def _finish_measuring(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of entropies and affines, and of the order if a decision may follow."""
        state = self._state
        self._measured = self._measurement.finish(pl_module, state.snapshot.measured.entropies or {})
        ranked = None
        if self.ranking.is_free or self.measure_on == "training" or self._may_decide(trainer):
            ranked = self._measurement.rank(trainer, pl_module, self._measured, self._candidates or ())
        self._ranked = ranked or Ranked()
        if trainer.state.fn == TrainerFn.FITTING:
            affines = self._measurement.affines
            state.now = replace(state.now, entropies=self._measured, affines=affines, ranked=ranked)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score of the structure as it is, and the best model so far."""
        if not self._active or trainer.sanity_checking:
            return
        self._measurement.pause(False)
        if trainer.state.fn != TrainerFn.FITTING:
            if self.dry_run and self._measured is not None:
                self._list(trainer, pl_module, self._choose(trainer, self._as_validated(), []))
            return
        self._state.validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        is_new = self._scores.is_new(trainer, self.monitor, "validation")  # perhaps it is logged by rank 0 only
        self._state.score_comes_from_validation = trainer.strategy.broadcast(is_new)
        if self._state.score_comes_from_validation:
            self._state.scored_this_epoch = True
            self._note_score(trainer)
            self._keep_best(trainer, pl_module)

    def _log_entropies(self, trainer: Trainer, pl_module: LightningModule) -> None:
        entropies, on_all = self._measured or {}, trainer.world_size > 1
        pl_module.log_dict({entropy_key(name): value for name, value in entropies.items()}, sync_dist=on_all)
        prunable = [value for name, value in entropies.items() if name in (self._candidates or ())]
        if prunable:
            pl_module.log(LEAST_ENTROPY_KEY, min(prunable), prog_bar=True, sync_dist=on_all)

    def _log_progress(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = {REMOVED_KEY: float(len(stand_ins(pl_module)))}
        if trainer.state.fn == TrainerFn.FITTING:
            progress[ROUND_KEY] = float(len(self._state.rounds) - 1)
        pl_module.log_dict(progress, prog_bar=True, sync_dist=trainer.world_size > 1)

    def _note_score(self, trainer: Trainer) -> None:
        score = self._scores.get(trainer, self.monitor)
        if score is not None:
            self._state.score = score

    def _keep_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model if no other with as many linear activations had a better score."""
        if not self.best_per_depth or self._state.finished or self.dry_run:
            return
        score = trainer.strategy.broadcast(self._state.score)
        removed = len(stand_ins(pl_module))
        best = self._state.best.get(str(removed))
        if (
            score is not None
            and math.isfinite(score)
            and (best is None or self.rules.tolerance.is_better(score, best.score))
        ):
            now = BestCheckpoint(score, files.best_file(removed))
            with self._state.told(best={**self._state.best, str(removed): now}):
                self._files.save(trainer, self.best_checkpoints[removed])

    # The loop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what an interruption has cut off: a validation, a judgement, an operation."""
        if not self._active:
            return
        state = self._state
        self._files.load_as_ever(trainer)
        self._dashboard = Dashboard(trainer.loggers, self.monitor)
        self._dashboard.write_layout()
        self._scores.have_early_stopping_wait(trainer)
        if self._taken_up:
            surgery.check_is_linear(pl_module, self._state.linear_by_now)
            surgery.check_activations(pl_module, state.activations)
        else:
            state.activations = surgery.activations_of(pl_module, self.gates)
        own = {name for this in state.rounds for name in this.removed}
        given = len(stand_ins(pl_module).keys() - own)
        if given > 0:
            rank_zero_info(f"{given} activations are linear from the start; they stay so and are not judged.")
        state.folder = self._files.claim(trainer, self.dirpath, state, self.state_key, writes=not self.dry_run)
        if self._taken_up:
            state.best = self._files.still_best(trainer, state.folder, self.state_key, state.best)
        # Lightning knows nothing of these after an interruption
        scores = {REMOVED_KEY: float(len(stand_ins(pl_module)))}
        if state.score is not None and state.score_comes_from_validation:
            scores[self.monitor] = state.score
        self._scores.put(trainer, scores)
        is_kept = state.snapshot.file == files.round_file(len(state.rounds) - 1)
        if self._taken_up and state.rounds[-1].accepted and not is_kept and not self.dry_run:
            self._keep(trainer)  # that has failed, and the run was saved on the exception
        if not self._taken_up and len(state.rounds) == 1:
            goes_on = wiring.check_length(trainer, pl_module, self.rules.epochs_of(0))
            if not goes_on and not self.dry_run:
                rank_zero_warn("Nothing will be pruned: the run ends with its dense round. Raise `max_epochs`.")
            state.ended = state.rounds[0].epoch = trainer.current_epoch
        self._taken_up = True
        if self.dry_run and state.decision is not None:  # that of the run whose checkpoint this is
            self._list(trainer, pl_module, state.decision.remove)
            trainer.should_stop = True
        elif state.finished:
            trainer.should_stop = True
            rank_zero_info("Pruning was over when this run was saved; remove EntropyPruningCallback to train on.")
        if state.interruption.validation_due:
            state.interruption = replace(state.interruption, validation_due=False)
            wiring.run_validation(trainer, max(trainer.current_epoch - state.ended, 0))
        if trainer.current_epoch > state.ended:  # Lightning has skipped the end of an epoch
            if state.interruption.counts is not None:
                self._count_on(trainer, pl_module)
                self._finish_measuring(trainer, pl_module)
            if not (state.score_comes_from_validation or state.scored_this_epoch):
                state.score = None  # what an epoch of training has logged is not in a checkpoint
            if not state.interruption.epoch_end_begun:
                wiring.check_early_stopping(trainer, pl_module)
            is_new = state.scored_this_epoch or not trainer.enable_validation
            self._end_epoch(trainer, pl_module, state.interruption.not_called or [], trainer.current_epoch, is_new)
            state.begin_epoch()
        self._resumed_inside = trainer.current_epoch if trainer.fit_loop.restarted_mid_epoch else -1
        if trainer.fit_loop.restarted_mid_epoch and not trainer.fit_loop.done:  # it skips the start of an epoch
            self._operate(trainer, pl_module)
            self._attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided at the end of the last epoch."""
        if not self._active:
            return
        self._state.begin_epoch()
        self._operate(trainer, pl_module)
        self._scores.mark(trainer, self.monitor, "epoch")
        self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count or watch training, from where an interrupted epoch has left it; distil where that is wanted."""
        if self.distill and self.removed:
            path, dense = self._state.path_of(files.round_file(0)), self._state.rounds[:1]
            use = "checkpoint of the dense round", "be distilled from it"
            self._distillation.start(
                pl_module,
                self._sites(pl_module),
                self.removed,
                lambda: self._files.find(trainer, path, self.state_key, dense, *use)[1],
            )
        elif self.distill:
            self._distillation.stop()
        if self._state.finished:
            return
        if self.measure_on == "training":
            self._count_on(trainer, pl_module)
        elif not wiring.is_compiled(pl_module):  # hooks would cost it a compilation
            self._measurement.watch(trainer, pl_module, self._state.interruption.not_called)

    def _count_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measurement.start(pl_module)
        self._measurement.follow_chains(pl_module, self._candidates or (), 1)
        interruption = self._state.interruption
        if interruption.counts is not None:
            self._measurement.load_counts(interruption.counts, trainer.is_global_zero)
            self._state.interruption = replace(interruption, counts=None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the round, if this was its last epoch, and decide on the next."""
        state = self._state
        if not self._active:
            return
        if state.finished:
            state.ended = max(state.ended, trainer.current_epoch + 1)
            return
        if trainer.current_epoch < state.ended:  # Lightning repeats the hook when it resumes here
            return
        if state.interruption.counts is not None:  # it does so, and the hook was cut off
            self._count_on(trainer, pl_module)
        if self._measurement.is_counting:
            self._finish_measuring(trainer, pl_module)
            self._log_entropies(trainer, pl_module)
        if not trainer.enable_validation:
            self._log_progress(trainer, pl_module)
        not_called = self._measurement.not_called or state.interruption.not_called or []
        self._measurement.stop_watching()
        if wiring.ends_inside_epoch(trainer):  # on_train_end judges
            return
        if self.measure_on == "validation" and not state.validated_this_epoch:
            wiring.check_validation_ran(trainer)
        from_validation = state.score_comes_from_validation or state.scored_this_epoch
        if self._resumed_inside == trainer.current_epoch and not from_validation:
            state.score = None  # of an epoch that this process has not seen whole
        else:
            if state.validated or not trainer.enable_validation:
                wiring.check_monitor(trainer, self.monitor, state.score)
            self._note_score(trainer)
        if not state.score_comes_from_validation or not trainer.enable_validation:
            self._keep_best(trainer, pl_module)
        is_new = state.scored_this_epoch or self._scores.is_new(trainer, self.monitor, "epoch")
        self._end_epoch(trainer, pl_module, not_called, trainer.current_epoch + 1, is_new)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a round that the end of the run has cut short, and go back if that is what was decided."""
        if not self._active:
            return
        self._measurement.stop()
        self._measurement.stop_watching()
        dense = self._state.rounds[0]
        if dense.accepted is None:
            rank_zero_warn(
                f"Nothing was pruned: the run ended before its first round, "
                f"{self.rules.epochs_of(0)} epochs with a validation at their end that logs "
                f"{self.monitor!r}."
            )
        self._conclude(trainer, pl_module)
        if self._targets.are_given and not self.dry_run:
            self._warn_of_a_missed_target()

    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a model that was judged; a second call does nothing."""
        this = self._state.rounds[-1]
        if this.removed and this.accepted is None:
            self._note_score(trainer)
        self._carry_out(trainer, pl_module, self._loop.run_ended(self._ask(trainer)))

    def _end_epoch(
        self, trainer: Trainer, pl_module: LightningModule, not_called: list[str], epochs_ended: int, is_new: bool
    ) -> None:
        """Count an epoch, and judge and decide if it was the last of its round."""
        is_measured = self._state.validated_this_epoch or not trainer.enable_validation
        ask = self._ask(trainer, not_called, is_new)
        commands = self._loop.epoch_ended(epochs_ended, is_scored=is_new, is_measured=is_measured, ask=ask)
        self._carry_out(trainer, pl_module, commands)

    def _ask(self, trainer: Trainer, not_called: Sequence[str] = (), is_there: bool = True) -> Ask:
        """Have the loop ask all processes, which may hold values of their own: rank 0 decides.

        Args:
            trainer: The Trainer.
            not_called: Activations that were not called in training.
            is_there: Whether there is a score.
        """
        return Ask(
            lambda: trainer.strategy.broadcast(self._state.score if is_there else None),
            lambda measured: self._choose(trainer, measured, not_called),
        )

    def _carry_out(self, trainer: Trainer, pl_module: LightningModule, commands: Iterable[Command]) -> None:
        """Do what the loop says, in its order."""
        for command in commands:
            match command:
                case Verdict(number):
                    self._tell_verdict(trainer, pl_module, number)
                case CutShort(number):
                    rank_zero_warn(
                        f"Round {number} is taken back without a judgement: the run ended before {self.monitor!r} was "
                        f"logged for the model with {self.rounds[number].removed} linear. Log it in every validation, "
                        f"and have the run end with one: raise `max_epochs` or `max_steps`, or the patience of "
                        f"EarlyStopping."
                    )
                case Wait(number):
                    rank_zero_warn(
                        f"Round {number} goes on, since epoch {self._state.ended - 1}, which was to end it, has no "
                        f"{self.monitor!r}: it ends with the next epoch that has one. Log it in every validation, or "
                        f"choose `epochs_per_round` and `warmup_epochs` so that rounds end where it is logged."
                    )
                case Decided(choice) if self.dry_run:
                    self._list(trainer, pl_module, choice)
                    trainer.should_stop = True
                case Stop(why):
                    trainer.should_stop = True
                    if why is not None and not self.dry_run:
                        rank_zero_info(f"{len(self.removed)} activations are linear and {why}: pruning is over.")
                case Keep() if not self.dry_run:
                    self._keep(trainer)
                case GoBack():
                    self._go_back(trainer, pl_module)
                case Apply(choice):
                    self._remove(trainer, pl_module, choice)
                case Diverged(score):
                    raise ValueError(
                        f"Expected the score of argument `monitor` {self.monitor!r} to be finite, but got {score} in "
                        f"epoch {trainer.current_epoch}. The training has diverged: lower the learning rate. The last "
                        f"good model is {self.last_good or 'an earlier checkpoint'}."
                    )

    def _tell_verdict(self, trainer: Trainer, pl_module: LightningModule, number: int) -> None:
        state, report = self._state, self.report()
        this = state.rounds[number]
        if self._dashboard is not None:
            if this.score_after is not None:
                self._dashboard.write_score(this.score_after, len(stand_ins(pl_module)))
            self._dashboard.write_event(report.event(number), trainer.global_step)
        rank_zero_info(report.line(number, self.rules.tolerance.amount))
        self._warn_of_a_weak_reference()
        if number == 0 and state.now.ranked is not None:
            self._tell_what_saves(trainer, pl_module, state.now.ranked)

    def _warn_of_a_weak_reference(self) -> None:
        """Warn if the dense network had not learned enough when its score became the reference."""
        rounds, rules = self._state.rounds, self.rules
        dense = rounds[0].score_after
        is_still_learning = rules.is_still_learning(rounds, self._state.dense_scores)
        if len(rounds) == 1 and is_still_learning:
            rise = rules.rise_per_epoch(self._state.dense_scores)
            so = f"still got better by {rise:.4f} an epoch at the end of its round"
        elif rules.reference == "dense" and not is_still_learning and rules.is_first_to_overtake(rounds):
            so = f"is exceeded by the {rounds[-1].score_after:.4f} of round {len(rounds) - 1}"
        else:
            return
        other = " or pass reference='best'," if rules.reference == "dense" else ""
        rank_zero_warn(
            f"The dense score, {self.monitor} {dense:.4f}, {so}, more than the tolerance of "
            f"{rules.tolerance.amount:g}: the network was still learning. Judged against it, rounds may lose more than "
            f"the tolerance of what the network can reach. Raise `warmup_epochs`,{other} or take a trained network."
        )

    def _warn_of_a_missed_target(self) -> None:
        """Say what the last good model has reached instead."""
        attained = self._state.snapshot.measured.attained
        if attained is not None and attained.is_reached:
            return
        what = attained.words if attained is not None else "no activation became linear"
        rank_zero_warn(
            f"The run is over, and its target is not reached: {what}. Raise `tolerance` or `max_epochs`, or let more "
            f"activations become linear (`include`, `max_removals`, `on_reject='next'`, collapse='fit')."
        )

    def _tell_what_saves(self, trainer: Trainer, pl_module: LightningModule, ranked: Ranked) -> None:
        """Say before the first removal how many would save something; nothing is timed for it."""
        if not trainer.is_global_zero or not wiring.can_tell_what_merges(trainer):
            return
        names = [name for name in self._state.now.entropies or {} if name in (self._candidates or ())]
        if not names:
            return
        outlook = self.ranking.outlook(pl_module, ranked, names)
        tell = rank_zero_info if outlook.useful or outlook.unknown else rank_zero_warn
        tell(self.ranking.told(outlook, str(pl_module.device)))

    def _as_validated(self) -> Measured:
        """Return what a validation alone has measured."""
        return Measured(self._measured or {}, self._measurement.affines, self._ranked)

    def _choose(self, trainer: Trainer, measured: Measured, not_called: Iterable[str]) -> Removal | None:
        """Choose among what was measured; None if nothing is left. Some activations were not called in training."""
        entropies, ranked = measured.entropies or {}, measured.ranked or Ranked()
        eligible = self.rules.eligible(ranked.ranks, self._candidates or (), self._state.rejected)
        unused = [  # by no process
            name for name in eligible if trainer.strategy.reduce_boolean_decision(name in not_called, all=True)
        ]
        if unused:
            rank_zero_warn(
                f"Training does not call {unused}, which validation calls: they are left alone. Does `training_step` "
                f"call other methods than the model's forward?"
            )
            eligible = {name: value for name, value in eligible.items() if name not in unused}
        count = self.rules.how_many(len(self.removed), len(eligible))
        names = list(dict.fromkeys(self.select(eligible, count)))[:count] if count > 0 else []
        names = trainer.strategy.broadcast(names)
        if not set(names) <= set(eligible):
            raise ValueError(f"Expected `select` to choose among {list(eligible)}, but it returned {names}")
        names = apart(names, ranked.fits)
        if not names:
            return None
        operations = self.ranking.operations(names, ranked, measured.affines)
        return Removal(names, {name: entropies[name] for name in names}, [each.to_plain() for each in operations])

    def _list(self, trainer: Trainer, pl_module: LightningModule, choice: Removal | None) -> None:
        """Say what would be done."""
        entropies = self._measured or self._state.snapshot.measured.entropies
        self._listed = candidates(pl_module, entropies, gates=self.gates, shift_padding=self.shift_padding)
        names = "nothing" if choice is None else ", ".join(f"`{name}`" for name in choice.names)
        rank_zero_info(f"{self._listed}\nDry run: {names} would become linear next. The model was not changed.")

    def _operate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided, once."""
        if not self.dry_run:
            self._carry_out(trainer, pl_module, self._loop.epoch_begins())

    def _remove(self, trainer: Trainer, pl_module: LightningModule, choice: Removal) -> None:
        state = self._state
        before = state.kept[-1].score_after
        state.snapshot = replace(state.snapshot, plateaus=plateaus(trainer))
        operations = [from_plain(plain) for plain in choice.operations]
        wiring.check_optimizers_let_parameters_change(
            trainer, pl_module, choice.names, any(operation.changes_parameters for operation in operations)
        )
        shifts, dropped, joined = surgery.carry_out(trainer, pl_module, operations)
        assert self._recipe is not None
        self._recipe.restart(trainer, self.restart)
        reset_patience(trainer)
        lines = {name: line for each in operations for name, line in each.lines(self._candidates or ()).items()}
        self._loop.applied(
            Round(choice.names, choice.entropies, before, None, None, trainer.current_epoch, shifts, lines)
        )
        state.operations, state.dropped = choice.operations, dropped
        state.joined += joined
        self._scores.forget(trainer)
        self._scores.put(trainer, {REMOVED_KEY: float(len(stand_ins(pl_module)))})

    def _keep(self, trainer: Trainer) -> None:
        """Save the state of a round that was kept on disk, where it costs no device memory.

        Each round has a file of its own: a run that is taken up at an older checkpoint still finds the one it needs.
        """
        state = self._state
        file, scores = files.round_file(len(state.rounds) - 1), self._scores.all(trainer)
        with state.told(snapshot=replace(state.snapshot, file=file, scores=scores)):
            assert self.last_good is not None
            self._files.save(trainer, self.last_good)

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back structure, weights, optimizers and schedulers of the last good round."""
        state = self._state
        path, checkpoint = self._files.find(trainer, self.last_good, self.state_key, state.kept)
        operations = [from_plain(plain) for plain in state.operations]
        surgery.go_back(trainer, pl_module, operations, state.dropped, path, checkpoint, self._files.load)
        surgery.check_is_linear(pl_module, self.removed)
        put_plateaus(trainer, state.snapshot.plateaus)
        self._measurement.structure_changed()
        self._loop.went_back()
        self._scores.forget(trainer)
        self._scores.put(trainer, state.snapshot.scores)
        for logger in trainer.loggers:
            logger.log_metrics({REMOVED_KEY: float(len(stand_ins(pl_module)))}, trainer.global_step)
        rank_zero_info(f"Went back to the last good model, {path}, with {len(self.removed)} linear activations.")

    # What a checkpoint carries

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what belongs to this very moment: counts and calls so far, and whether a validation is still to come."""
        if not self._active or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._note_score(trainer)
        state, measurement = self._state, self._measurement
        then = state.interruption  # what was loaded and not made up for yet stays as it is
        counts = then.counts
        if self.measure_on == "training" and measurement.has_counts:
            counts = measurement.save_counts()
        interruption = Interruption(
            validation_due=then.validation_due or wiring.validation_is_due(trainer, state.validated_at),
            epoch_end_begun=wiring.epoch_end_has_begun(trainer),
            not_called=then.not_called if measurement.not_called is None else measurement.not_called,
            counts=counts,
        )
        now = replace(state, interruption=interruption)
        checkpoint["callbacks"][self.state_key] = self._plain(now)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: it loads with ``weights_only=True``."""
        return self._plain(self._state)

    def _plain(self, state: RunState) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.rules.tolerance.mode, **state.to_plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where its checkpoint left it; the structure comes with the model's own state dict.

        To validate, test or predict with a checkpoint is not to take up its run: rounds and report stay as they are.

        Raises:
            MisconfigurationException: If the run was judged on another score.
        """
        if self._stage not in (None, TrainerFn.FITTING):
            warn_if_rejected(state_dict)
            return
        judged_on = (state_dict["monitor"], state_dict["mode"])
        if judged_on != (self.monitor, self.rules.tolerance.mode):
            raise MisconfigurationException(
                f"Expected arguments `monitor` and `mode` to be {judged_on}, those of the run that is resumed, but got "
                f"{(self.monitor, self.rules.tolerance.mode)}: its rounds can't be compared on another score."
            )
        plain = {key: value for key, value in state_dict.items() if key not in ("monitor", "mode")}
        self._loop = PruningLoop(self.rules, self.monitor, RunState.from_plain(plain))
        self._taken_up = self._state.folder is not None  # else it had not begun: a finder's, saved before the fit
