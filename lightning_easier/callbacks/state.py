"""Where a pruning run stands, as plain data: all that a checkpoint has to carry for the run to go on as if uncut."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_easier.callbacks.optimizers import Place, Position
from lightning_easier.pruning.goals import Attained
from lightning_easier.pruning.ranking import Ranked
from lightning_easier.report import Round


def is_plain_name(file: Any) -> bool:
    """Tell whether something is the name of a file in a folder, on any system, and leads nowhere else."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\:\0")


@dataclass
class Choice:
    """Activations that were chosen to become linear.

    Attributes:
        names: The activations.
        entropies: Their entropies in bits.
        affines: Name -> the affine that takes its place, as plain data; none for identities.
        fits: Name -> the operator that takes the place of the chain around it, as plain data.
    """

    names: list[str]
    entropies: dict[str, float]
    affines: dict[str, dict[str, Any]] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Decision:
    """What was decided at the end of an epoch, to be carried out at the start of the next.

    Attributes:
        go_back: Whether the last good model comes back first.
        remove: What becomes linear then; nothing if pruning is over.
    """

    go_back: bool
    remove: Choice | None


@dataclass
class BestCheckpoint:
    """The best checkpoint of the models with one number of linear activations.

    Attributes:
        score: Its monitored score.
        file: Its name.
    """

    score: float
    file: str


@dataclass
class PruningState:
    """Where a run stands.

    Attributes:
        rounds: The rounds so far, the dense one first.
        epochs: Training epochs finished in the round.
        ended: Training epochs of the whole run whose end was seen.
        dense_scores: The monitored score of each epoch of the dense round; None where it was not logged.
        entropies: Those of the structure as it is, in bits; None while it was not measured.
        affines: The affines that come closest to the activations as they are, as plain data, if they are measured.
        ranked: The order in which activations would become linear; None while it was not measured.
        asked: Whether it was asked how far the structure as it is comes up to the targets of the run.
        attained: The answer; None where nothing was removed.
        score: The monitored score of the structure as it is; None while there is none.
        score_comes_from_validation: Whether validation logs it, and not training.
        validated: Whether the structure as it is was validated.
        validated_this_epoch: Whether it was in this epoch.
        scored_this_epoch: Whether a validation of this epoch has logged the score.
        validation_due: Whether the validation that follows the last training batch is still to come.
        validated_at: The training batch before the last validation, counted over all epochs; -1 before the first.
        epoch_end_begun: Whether callbacks were being told that an epoch has ended, at the moment of a save.
        not_called: Activations that training has not called in this epoch; None while that is not watched.
        counts: Name -> counts of the epoch so far, if training batches are measured.
        decision: Decided, not carried out.
        finished: Whether pruning is over.
        folder: Where the run keeps its checkpoints.
        last_good: File name of the last round that was kept.
        entropies_of_last_good: All entropies that were measured at its end.
        affines_of_last_good: The affines that were.
        ranked_of_last_good: The order at its end.
        attained_of_last_good: How far it came up to the targets.
        scores_of_last_good: All that was logged by then.
        plateaus_of_last_good: The schedules that follow a score, and the learning rates that they had set.
        rejected: Activations whose removal was taken back.
        rejections: Rounds taken back since the last that was kept.
        best: Number of linear activations, as a string -> their best checkpoint.
        dropped: Where the parameters that this round removed were in the optimizers.
        joined: Where the parameters of stand-ins are in the optimizers, in the order in which they came.
        activations: Name -> class of all activations of the module, as it was when the run began.
    """

    rounds: list[Round] = field(default_factory=lambda: [Round([], {}, None, None, None, 0)])
    epochs: int = 0
    ended: int = 0
    entropies: dict[str, float] | None = None
    affines: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranked: Ranked | None = None
    asked: bool = False
    attained: Attained | None = None
    score: float | None = None
    score_comes_from_validation: bool = True
    validated: bool = False
    validated_this_epoch: bool = False
    scored_this_epoch: bool = False
    validation_due: bool = False
    validated_at: int = -1
    epoch_end_begun: bool = False
    not_called: list[str] | None = None
    counts: dict[str, Any] | None = None
    decision: Decision | None = None
    finished: bool = False
    folder: str | None = None
    last_good: str | None = None
    entropies_of_last_good: dict[str, float] = field(default_factory=dict)
    affines_of_last_good: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranked_of_last_good: Ranked = field(default_factory=Ranked)
    attained_of_last_good: Attained | None = None
    scores_of_last_good: dict[str, float] = field(default_factory=dict)
    plateaus_of_last_good: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    rejections: int = 0
    best: dict[str, BestCheckpoint] = field(default_factory=dict)
    dropped: list[Position] = field(default_factory=list)
    joined: list[Place] = field(default_factory=list)
    dense_scores: list[float | None] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return numbers, strings, lists, dicts and tensors: it loads with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "PruningState":
        """Rebuild the state from what :meth:`to_plain` returned.

        Raises:
            ValueError: If it is something else, or names a file that is not in the folder of the run.
        """
        try:
            state = cls._from_plain(plain)
            if not isinstance(state.folder, str | None) or not all(number.isdigit() for number in state.best):
                raise TypeError(f"folder {state.folder!r}, best {list(state.best)}")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Expected the checkpoint to hold the record of a pruning run, but it has another form ({error!r}): "
                f"was it saved by another version of lightning_easier? Take another checkpoint, or start anew."
            ) from error
        for file in (state.last_good, *(best.file for best in state.best.values())):
            if file is not None and not is_plain_name(file):
                raise ValueError(
                    f"Expected the record of a pruning run to name files in its own folder, but got {file!r}: "
                    f"somebody has changed the checkpoint. Take another one."
                )
        return state

    @classmethod
    def _from_plain(cls, plain: Mapping[str, Any]) -> "PruningState":
        state = cls(**plain)
        state.rounds = [Round(**this) for this in plain["rounds"]]
        state.best = {number: BestCheckpoint(**best) for number, best in plain["best"].items()}
        state.ranked = None if plain["ranked"] is None else Ranked(**plain["ranked"])
        state.ranked_of_last_good = Ranked(**plain["ranked_of_last_good"])
        for name in ("attained", "attained_of_last_good"):
            if plain[name] is not None:
                setattr(state, name, Attained(**plain[name]))
        if plain["decision"] is not None:
            remove = plain["decision"]["remove"]
            state.decision = Decision(plain["decision"]["go_back"], None if remove is None else Choice(**remove))
        return state

    @contextmanager
    def told(self, **news: Any) -> Iterator[None]:
        """Have the state tell of a file while that is written, since the file holds the state, and after if it was.

        Args:
            **news: Attribute -> value.
        """
        before = {name: getattr(self, name) for name in news}
        vars(self).update(news)
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def begin_round(self, this: Round) -> None:
        """Forget what was known of the last structure."""
        self.rounds.append(this)
        self.epochs = 0
        self.entropies = self.ranked = self.score = self.attained = None
        self.asked = False
        self.affines = {}
        self.validated = self.validated_this_epoch = self.scored_this_epoch = False

    def forget_fits(self) -> None:
        """Forget the fitted operators that were not chosen: they may be as large as the model."""
        self.ranked_of_last_good = Ranked(self.ranked_of_last_good.ranks)
        if self.ranked is not None:
            self.ranked = Ranked(self.ranked.ranks)

    def path_of(self, file: str | None) -> Path | None:
        """Return where a file of the run is."""
        return None if file is None or self.folder is None else Path(self.folder) / file

    @property
    def kept(self) -> list[Round]:
        """The rounds up to the last that was kept, those between that were taken back among them."""
        last = max((number for number, this in enumerate(self.rounds) if this.accepted), default=-1)
        return self.rounds[: last + 1]
