"""Lightning's hooks, and what happens in each; how it is done stands in the other files of this folder.

Two moments matter. The *decision* falls at the end of a training epoch, when validation is over and every score is
known, and before ModelCheckpoint saves: a checkpoint pairs the score with the structure it belongs to, and holds the
decision. The *operation* follows at the start of the next epoch (or when a run is taken up again).
"""

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_easier.callbacks import observing, private, resuming, rounds, starting, telling, wiring
from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.callbacks.files import Files
from lightning_easier.callbacks.results import Results
from lightning_easier.callbacks.run import Run, Settings
from lightning_easier.pruning.methods import Measuring, Method
from lightning_easier.pruning.rules import Rounds, Rules, Tolerance
from lightning_easier.pruning.targets import Target
from lightning_easier.structure.checkpoint import warn_if_rejected
from lightning_easier.support.arguments import as_globs, check_bool, check_instance


class PruningCallback(Results, Callback):
    """Prune by a method, round by round, while the score allows.

    The first round trains the dense model for ``warmup_epochs + epochs`` epochs; its score is the reference. Every
    further round starts with an operation that the method has proposed, trains for ``epochs`` epochs, and is judged on
    the validation that ends it. If the score has fallen by more than ``tolerance`` from the dense score, structure,
    weights, optimizer and schedulers go back to those of the last good round, and the run stops, or the next candidate
    is tried. It stops as well when nothing is left to remove, the target is reached, or ``max_removals`` is. A round
    whose score is not logged in its last epoch goes on until it is. A round that the end of the run cuts short is
    judged on its last score, and taken back if it has none.

    A run that was killed goes on from any of its checkpoints (``ckpt_path``) as if it had not been, from the middle of
    an epoch too if the training loader can (``state_dict`` and ``load_state_dict``).

    Logged: ``entropy/<activation>`` in bits for every activation that is not linear yet; ``removed``, how much was
    removed, what was linear from the start among it; ``remaining``, how many activations are not linear; ``H_min``, the
    least entropy of those that may become linear; ``round``. With a target, or ``Measuring(costs=True)``, ``depth`` and
    ``speedup`` of the collapsed network. At the end of each round all loggers get the score against the number removed,
    and, as pictures and text, what :meth:`figure` and :meth:`report` have; TensorBoard has charts of curves besides.
    When something was removed, all logged values are NaN until they are logged again: they are of another model.

    The model of every round that was kept is a checkpoint ``round_<number>.ckpt``, the last of them :attr:`last_good`;
    :func:`~lightning_easier.load_pruned` loads it.

    Args:
        method: What is done to the model, and in which order.
        monitor: Name of the score, logged in a validation or training step or at the end of validation. (What is logged
            in the module's ``on_train_epoch_end`` comes too late.)
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below the reference, in the score's own unit.
        rounds: How long a round is, how much goes in it, what it is judged against, what follows when it is taken back.
        include: Name globs of the activations that may become linear; all by default.
        exclude: Name globs of those that may not; they are not measured either.
        measuring: What is measured on.
        target: How fast or how shallow the network should become; the run is over when it is. The tolerance guards it
            still. It is asked for once in each round, in the validation that the round is judged on; a run that ends
            without says what it has reached.
        distillation: Whether and how the rounds after the first are trained on the logits of the dense network, too.
        files: Where the checkpoints are kept, and which.
        dry_run: Only list what would be done: the run stops where the first decision falls, and :attr:`listed` holds
            the list. With ``trainer.validate`` it needs no training.

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

    Note:
        EASIER restarts optimizer and schedule every round; here both go on unless told otherwise. The patience of
        EarlyStopping begins anew with every operation. A model that comes with linear activations keeps them; the score
        of this run's first round is the reference. The Trainer's ``min_epochs`` keeps it training when pruning is over,
        without judging what follows.
    """

    def __init__(
        self,
        method: Method,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        *,
        rounds: Rounds = Rounds(),
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        measuring: Measuring = Measuring(),
        target: Target | None = None,
        distillation: Distillation | None = None,
        files: Files = Files(),
        dry_run: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"Expected argument `monitor` to be the name of a logged score, but got {monitor!r}")
        check_instance("method", method, Method)
        check_instance("rounds", rounds, Rounds)
        check_instance("measuring", measuring, Measuring)
        check_instance("target", target, Target | None)
        check_instance("distillation", distillation, Distillation | None)
        check_instance("files", files, Files)
        check_bool("dry_run", dry_run)
        if method.needs_eval_mode and measuring.on != "validation":
            raise ValueError(
                f"Expected argument `on` of Measuring to be 'validation' with {type(method).__name__}, but got "
                f"{measuring.on!r}: what it measures has to be computed in eval mode"
            )
        if not rounds.trains and (measuring.on != "validation" or distillation is not None):
            raise ValueError(
                f"Expected arguments `on` of Measuring and `distillation` to be 'validation' and None with "
                f"Rounds(epochs=0), but got {measuring.on!r} and {distillation}: nothing is trained after a removal"
            )
        rules = Rules(Tolerance(tolerance, mode), rounds)
        telling.warn_of_a_mode(monitor, rules.tolerance)
        globs = as_globs("include", include), as_globs("exclude", exclude)
        self._run = Run(
            Settings(
                monitor,
                rules,
                method,
                *globs,
                measuring,
                target,
                distillation,
                files,
                dry_run,
                state_key=self.state_key,
            )
        )

    # Start and end of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Isolate the activations before weights are loaded and the strategy wraps the model."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                f"Expected one {type(self).__name__} in the Trainer, but got {len(others)} pruning callbacks; give one "
                f"of them all globs"
            )
        starting.set_up(self._run, trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the recipe as it is at the start."""
        starting.begin_fit(self._run, trainer, pl_module)
        if self._run.is_active and not self._run.settings.rules.rounds.trains:
            self._run.around.callback(
                private.have_skipped_training_followed(trainer, lambda: self._follow_training(trainer, pl_module))
            )

    def _follow_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what follows a training that a run had behind it when it was taken up."""
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring what a resumed run has left undone to its end, and say so when there was nothing to train on."""
        if self._run.is_active:
            rounds.conclude(self._run, trainer, pl_module)
            wiring.check_there_was_training(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        starting.stop_measuring(self._run)
        self._run.around.close()
        self._run.stage = self._run.recipe = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; what was counted stays, for a checkpoint that is saved on the exception."""
        if self._run.is_active and isinstance(exception, Exception):
            telling.explain_failure(self._run, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and self._run.stage == TrainerFn.FITTING:
            telling.warn_of_what_is_unjudged(self._run)
        self._run.around.close()

    # Validation

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a score whose name may be mistaken, before an epoch is spent on it."""
        if self._run.is_active:
            telling.warn_of_an_unknown_score(trainer, self._run.settings.monitor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        if self._run.is_seen(trainer):
            observing.begin_validation(self._run, trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the entropies, the number removed, and the round."""
        if self._run.is_seen(trainer):
            observing.end_validation_epoch(self._run, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score of the structure as it is, and the best model so far."""
        if self._run.is_seen(trainer):
            observing.end_validation(self._run, trainer, pl_module)

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what an interruption has cut off: a validation, a judgement, an operation."""
        if self._run.is_active:
            resuming.begin(self._run, trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided at the end of the last epoch."""
        if not self._run.is_active:
            return
        self._run.state.begin_epoch()
        rounds.begin_epoch(self._run, trainer, pl_module)
        self._run.scores.mark(trainer, self._run.settings.monitor, "epoch")
        observing.watch_training(self._run, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the round, if this was its last epoch, and decide on the next."""
        run, state = self._run, self._run.state
        if not run.is_active:
            return
        if state.finished:
            state.ended = max(state.ended, trainer.current_epoch + 1)
            return
        if trainer.current_epoch < state.ended:  # Lightning repeats the hook when it resumes here
            return
        not_called = observing.end_training_epoch(run, trainer, pl_module)
        if wiring.ends_inside_epoch(trainer):  # on_train_end judges
            return
        if run.settings.measuring.on == "validation" and not state.validations.seen_this_epoch:
            wiring.check_validation_ran(trainer)
        is_scored = observing.note_score_of_epoch(run, trainer, pl_module)
        rounds.end_epoch(run, trainer, pl_module, not_called, trainer.current_epoch + 1, is_scored)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a round that the end of the run has cut short, and go back if that is what was decided."""
        run = self._run
        if not run.is_active:
            return
        starting.stop_measuring(run)
        rounds.conclude(run, trainer, pl_module)
        if run.state.rounds[0].accepted is None:
            telling.warn_that_nothing_was_pruned(run)
        if run.settings.target is not None and not run.settings.dry_run:
            telling.warn_of_a_missed_target(run)

    # What a checkpoint carries

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what belongs to this very moment: counts and calls so far, and whether a validation is still to come."""
        if self._run.is_seen(trainer) and trainer.state.fn == TrainerFn.FITTING:
            resuming.add_this_moment(self._run, trainer, checkpoint["callbacks"][self.state_key])

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: it loads with ``weights_only=True``."""
        return resuming.to_plain(self._run, self._run.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where its checkpoint left it; the structure comes with the model's own state dict.

        To validate, test or predict with a checkpoint is not to take up its run: rounds and report stay as they are.

        Raises:
            MisconfigurationException: If the run was judged on another score.
        """
        if self._run.stage in (None, TrainerFn.FITTING):
            resuming.read(self._run, state_dict)
        else:
            warn_if_rejected(state_dict)
