"""What the parts of the callback share: what the user has asked for, where the run stands, and who does what."""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_easier.callbacks.added_loss import AddedTerm
from lightning_easier.callbacks.distillation import DenseTeacher, Distillation
from lightning_easier.callbacks.files import Files, RunFiles
from lightning_easier.callbacks.holding import Holding
from lightning_easier.callbacks.measuring import Measurement
from lightning_easier.callbacks.recipe import InitialRecipe
from lightning_easier.callbacks.scores import LoggedScores
from lightning_easier.callbacks.targets import TargetCheck
from lightning_easier.pruning.loop import PruningLoop
from lightning_easier.pruning.methods import Measuring, Method, Proposal
from lightning_easier.pruning.rules import Rules
from lightning_easier.pruning.state import RunState
from lightning_easier.pruning.targets import Target
from lightning_easier.report import PruningReport, Report
from lightning_easier.report.dashboard import Dashboard
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.hooks import Remembered, Undone


@dataclass(frozen=True)
class Settings:
    """What the user has asked for; see :class:`~lightning_easier.PruningCallback`.

    Attributes:
        state_key: Under which the callback's state is in a checkpoint.
    """

    monitor: str
    rules: Rules
    method: Method
    include: list[str] | None
    exclude: list[str] | None
    measuring: Measuring
    target: Target | None
    distillation: Distillation | None
    files: Files
    dry_run: bool
    state_key: str

    @property
    def prices_network(self) -> bool:
        """Whether the network is collapsed and timed at the end of each round."""
        return self.target is not None or self.measuring.costs


class Run:
    """One run, and what is left of the last one.

    Args:
        settings: What the user has asked for.

    Attributes:
        settings: The same.
        loop: Judges and decides; its state is what a checkpoint carries.
        is_taken_up: Whether the state is that of a checkpoint.
        was_pruned: Whether something was gone from the model already when it was handed to the Trainer.
        of_trainer: The Trainer that the state is of.
        candidates: The activations that may become linear, or what else the method removes, those that have become so
            among them; None while they were not looked for.
        method_names: The same, with those that the user leaves out.
        entropies: As measured last, whatever was validated; None before.
        proposal: What the method would do by that.
        listed: What a dry run has listed.
        is_active: Whether anything is done; not in a ``fast_dev_run``.
        stage: Of the Trainer, while it runs.
        around: Undoes what was put around the objects of the user.
        measurement: Owns the hooks.
        teacher: Distils, if that is asked for.
        added: Adds what the method adds to the loss, if it does.
        target: Asks what the network costs, and whether the target is reached, if either is wanted.
        dashboard: Writes to TensorBoard.
        recipe: Optimizers and schedules as they began.
        scores: What was logged.
        holding: Has operations hold what they did.
        files: The checkpoints.
        resumed_inside: The epoch that a checkpoint was saved in the middle of.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = PruningLoop(settings.rules, settings.monitor)
        self.is_taken_up = False
        self.was_pruned = False
        self.of_trainer = Remembered[Trainer]()
        self.candidates: list[str] | None = None
        self.method_names: list[str] = []
        self.entropies: dict[str, float] | None = None
        self.proposal = Proposal()
        self.listed: Report | None = None
        self.is_active = False
        self.stage: str | None = None
        self.around = Undone()
        self.measurement = Measurement(settings.method, settings.measuring, settings.exclude or ())
        self.teacher = None if settings.distillation is None else DenseTeacher(settings.distillation)
        regularizer = settings.method.regularizer()
        self.added = None if regularizer is None else AddedTerm(regularizer)
        self.target = TargetCheck(settings.target, settings.method.objective) if settings.prices_network else None
        self.dashboard: Dashboard | None = None
        self.recipe: InitialRecipe | None = None
        self.scores = LoggedScores()
        self.holding = Holding()
        self.files = RunFiles()
        self.resumed_inside = -1

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self.loop.state

    @property
    def report(self) -> PruningReport:
        """What the run did."""
        mode = self.settings.rules.tolerance.mode
        return PruningReport(self.settings.monitor, list(self.state.rounds), mode, list(self.state.activations))

    @property
    def last_good(self) -> Path | None:
        """Checkpoint of the last round that was kept; None before the first was judged."""
        return self.state.path_of(self.state.snapshot.file)

    @property
    def best_checkpoints(self) -> dict[int, Path]:
        """Number removed -> checkpoint with the best score."""
        paths = {number: self.state.path_of(best.file) for number, best in self.state.best.items()}
        return {int(number): path for number, path in paths.items() if path is not None}

    def begin_anew(self, trainer: Trainer) -> None:
        """Forget the last run, for one of a Trainer."""
        self.loop = PruningLoop(self.settings.rules, self.settings.monitor)
        self.is_taken_up = False
        self.of_trainer = Remembered(trainer)
        self.files.release()
        self.files = RunFiles()

    def note_score(self, trainer: Trainer) -> None:
        """Take note of the score, if it was logged for the structure as it is."""
        score = self.scores.get(trainer, self.settings.monitor)
        if score is not None:
            self.state.score = score

    def is_seen(self, trainer: Trainer) -> bool:
        """Tell whether a validation counts; the sanity check before training does not."""
        return self.is_active and not trainer.sanity_checking

    def may_decide(self, trainer: Trainer) -> bool:
        """Tell whether a decision may follow the validation that goes on."""
        return self.loop.may_decide if trainer.state.fn == TrainerFn.FITTING else self.settings.dry_run

    def number_removed(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Return how much is removed from a model, what was linear from the start among it.

        Where a model is only validated, nothing tells of what left no mark in it, such as masks.
        """
        linear = stand_ins(pl_module).keys()
        if trainer.state.fn != TrainerFn.FITTING:
            return len(linear)
        own = {name for this in self.state.rounds for name in this.removed}
        return len(linear - own) + self.state.number_removed

    def sites(self, pl_module: LightningModule) -> list[str]:
        """Return the names of all activations, those that are linear among them."""
        return list(dict.fromkeys([*(self.candidates or ()), *stand_ins(pl_module)]))
