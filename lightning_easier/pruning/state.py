"""Where a run stands, as plain data: all that a checkpoint has to carry for the run to go on as if uncut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_easier.pruning.methods.base import Proposal
from lightning_easier.pruning.targets import Attained
from lightning_easier.report import Round
from lightning_easier.structure.operations import from_plain, kind_of

VERSION = 3
"""Of the form of a state; a checkpoint tells it."""

Position = list[Any]
"""Which of the parameters, optimizer, parameter group and place within it, and its name there, if any; plain data."""

Place = list[Any]
"""Name of a module, the optimizer and group that its parameters have joined, and in which round; plain data."""


def is_plain_name(file: Any) -> bool:
    """Tell whether something is the name of a file in a folder, on any system, and leads nowhere else."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\:\0")


@dataclass
class Chosen:
    """What was chosen of a proposal.

    Attributes:
        names: Of what is removed.
        entropies: Their entropies in bits, as far as they have one.
        operations: What removes it, as plain data.
    """

    names: list[str]
    entropies: dict[str, float]
    operations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Decision:
    """What was decided at the end of an epoch, to be carried out at the start of the next.

    Attributes:
        go_back: Whether the last good model comes back first.
        chosen: What is done then; nothing if pruning is over.
    """

    go_back: bool
    chosen: Chosen | None


@dataclass
class BestCheckpoint:
    """The best checkpoint of the models from which one number was removed.

    Attributes:
        score: Its monitored score.
        file: Its name.
    """

    score: float
    file: str


@dataclass(frozen=True)
class Measured:
    """What is known of one structure.

    Attributes:
        entropies: Name -> entropy in bits; None while they were not measured.
        proposal: What the method would do next; None while it was not asked.
        asked: Whether it was asked how far it comes up to the targets of the run.
        attained: The answer; None where nothing was removed.
    """

    entropies: dict[str, float] | None = None
    proposal: Proposal | None = None
    asked: bool = False
    attained: Attained | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it can be decided by it what is done next."""
        return self.entropies is not None and self.proposal is not None

    def without_large_operations(self) -> "Measured":
        """Forget the operations that may be as large as the model."""
        return self if self.proposal is None else replace(self, proposal=self.proposal.without_large_operations())

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Measured":
        """Rebuild it from plain data."""
        measured = cls(**plain)
        proposal, attained = plain["proposal"], plain["attained"]
        return replace(
            measured,
            proposal=None if proposal is None else Proposal(**proposal),
            attained=None if attained is None else Attained(**attained),
        )


@dataclass(frozen=True)
class Snapshot:
    """The last good round: what a run goes back to, beside the checkpoint.

    Attributes:
        file: Name of its checkpoint; None before the first round was kept.
        measured: What was known of its structure.
        scores: All that was logged by then.
        plateaus: The schedules that follow a score, and the learning rates that they had set.
    """

    file: str | None = None
    measured: Measured = field(default_factory=Measured)
    scores: dict[str, float] = field(default_factory=dict)
    plateaus: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Interruption:
    """What a run that is taken up has to make up for: Lightning does not.

    Attributes:
        validation_due: Whether the validation that follows the last training batch was still to come.
        epoch_end_begun: Whether callbacks were being told that an epoch has ended.
        not_called: Activations that training had not called in the epoch; None while that was not watched.
        counts: Name -> counts of the epoch so far, if training batches are measured.
    """

    validation_due: bool = False
    epoch_end_begun: bool = False
    not_called: list[str] | None = None
    counts: dict[str, Any] | None = None


@dataclass
class Validations:
    """What was seen of the validations.

    Attributes:
        have_score: Whether they log the score, and not training.
        seen: Whether there was one of the structure as it is.
        seen_this_epoch: Whether there was one in this epoch.
        scored_this_epoch: Whether one of this epoch has logged the score.
        at: The training batch before the last of them, counted over all epochs; -1 before the first.
    """

    have_score: bool = True
    seen: bool = False
    seen_this_epoch: bool = False
    scored_this_epoch: bool = False
    at: int = -1


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        rounds: The rounds so far, the dense one first.
        epochs: Training epochs finished in the round.
        ended: Training epochs of the whole run whose end was seen.
        dense_scores: The monitored score of each epoch of the dense round; None where it was not logged.
        now: What is known of the structure as it is.
        score: Its monitored score; None while there is none.
        validations: What was seen of them.
        decision: Decided, not carried out.
        finished: Whether pruning is over.
        folder: Where the run keeps its checkpoints.
        snapshot: The last good round.
        interruption: What has to be made up for.
        rejected: Names of what was taken back.
        rejections: Rounds taken back since the last that was kept.
        best: Number removed, as a string -> the best checkpoint.
        operations: Those of this round, as plain data.
        dropped: Where the parameters that this round removed were in the optimizers.
        joined: Where new parameters are in the optimizers, in the order in which they came.
        good_at: The training batch, counted over all epochs, after which the model was the last good one, as it was
            measured; -1 if it was trained since it was measured.
        held: The operations of earlier rounds that have to hold what they did, as plain data.
        activations: Name -> class of all activations of the module, as it was when the run began.
        version: Of the form of the state.
    """

    rounds: list[Round] = field(default_factory=lambda: [Round([], {}, None, None, None, 0)])
    epochs: int = 0
    ended: int = 0
    dense_scores: list[float | None] = field(default_factory=list)
    now: Measured = field(default_factory=Measured)
    score: float | None = None
    validations: Validations = field(default_factory=Validations)
    decision: Decision | None = None
    finished: bool = False
    folder: str | None = None
    snapshot: Snapshot = field(default_factory=Snapshot)
    interruption: Interruption = field(default_factory=Interruption)
    rejected: list[str] = field(default_factory=list)
    rejections: int = 0
    best: dict[str, BestCheckpoint] = field(default_factory=dict)
    operations: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[Position] = field(default_factory=list)
    joined: list[Place] = field(default_factory=list)
    good_at: int = -1
    held: list[dict[str, Any]] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    def to_plain(self) -> dict[str, Any]:
        """Return numbers, strings, lists, dicts and tensors: it loads with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "RunState":
        """Rebuild the state from what :meth:`to_plain` returned.

        Raises:
            ValueError: If it is something else, of another version, or names a file that is not in the folder of the
                run.
        """
        version = plain.get("version")
        if version != VERSION:
            raise ValueError(
                f"Expected the checkpoint to hold the record of a pruning run of version {VERSION}, but got {version}: "
                f"it was saved by another version of lightning_easier. Resume it with that one, or load its model with "
                f"`load_pruned` and start anew."
            )
        try:
            state = cls._from_plain(plain)
            state.check_form()
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Expected the checkpoint to hold the record of a pruning run, but it has another form ({error!r}). "
                f"Take another checkpoint, or start anew."
            ) from error
        for file in (state.snapshot.file, *(best.file for best in state.best.values())):
            if file is not None and not is_plain_name(file):
                raise ValueError(
                    f"Expected the record of a pruning run to name files in its own folder, but got {file!r}: "
                    f"somebody has changed the checkpoint. Take another one."
                )
        return state

    def check_form(self) -> None:
        """Refuse what no run has left.

        Raises:
            TypeError: If a part is of another type.
        """
        chosen = None if self.decision is None else self.decision.chosen
        for plain in [*self.operations, *self.held, *(chosen.operations if chosen is not None else ())]:
            from_plain(plain)
        whole = {"epochs": self.epochs, "ended": self.ended, "rejections": self.rejections}
        lists = {"rejected": self.rejected, "dropped": self.dropped, "joined": self.joined, "rounds": self.rounds}
        strange = [name for name, value in whole.items() if not isinstance(value, int) or isinstance(value, bool)]
        strange += ["joined"] if any(not isinstance(place, list) or len(place) != 4 for place in self.joined) else []
        strange += [f"rounds, {this}" for this in self.rounds if not isinstance(this.removed, list)]
        strange += [name for name, value in lists.items() if not isinstance(value, list)]
        if not isinstance(self.folder, str | None) or not all(number.isdigit() for number in self.best):
            strange += [f"folder {self.folder!r} or best {list(self.best)}"]
        if strange or not self.rounds:
            raise TypeError(f"not as expected: {strange or ['rounds']}")

    @classmethod
    def _from_plain(cls, plain: Mapping[str, Any]) -> "RunState":
        state = cls(**plain)
        state.rounds = [Round(**this) for this in plain["rounds"]]
        state.best = {number: BestCheckpoint(**best) for number, best in plain["best"].items()}
        state.now = Measured.from_plain(plain["now"])
        measured = Measured.from_plain(plain["snapshot"]["measured"])
        state.snapshot = Snapshot(**{**plain["snapshot"], "measured": measured})
        state.interruption = Interruption(**plain["interruption"])
        state.validations = Validations(**plain["validations"])
        if plain["decision"] is not None:
            chosen = plain["decision"]["chosen"]
            state.decision = Decision(plain["decision"]["go_back"], None if chosen is None else Chosen(**chosen))
        return state

    @contextmanager
    def recording(self, **news: Any) -> Iterator[None]:
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

    def begin_round(self, this: Round, operations: Sequence[dict[str, Any]] = ()) -> None:
        """Forget what was known of the last structure, and hold what was done to it.

        Args:
            this: The round.
            operations: Its operations, as plain data.
        """
        for plain in self.operations:
            if kind_of(plain).holds():
                later = from_plain(plain)
                self.held = [each for each in self.held if not later.supersedes(from_plain(each))] + [plain]
        self.operations = list(operations)
        self.rounds.append(this)
        self.epochs = 0
        self.now, self.score = Measured(), None
        self.validations = replace(self.validations, seen=False, seen_this_epoch=False, scored_this_epoch=False)

    def begin_epoch(self) -> None:
        """Forget what the last epoch has seen."""
        self.validations = replace(self.validations, seen_this_epoch=False, scored_this_epoch=False)
        self.interruption = Interruption()

    def forget_large_operations(self) -> None:
        """Forget what was not chosen and may be as large as the model."""
        self.now = self.now.without_large_operations()
        self.snapshot = replace(self.snapshot, measured=self.snapshot.measured.without_large_operations())

    def path_of(self, file: str | None) -> Path | None:
        """Return where a file of the run is."""
        return None if file is None or self.folder is None else Path(self.folder) / file

    @property
    def kept(self) -> list[Round]:
        """The rounds up to the last that was kept, those between that were taken back among them."""
        last = max((number for number, this in enumerate(self.rounds) if this.accepted), default=-1)
        return self.rounds[: last + 1]

    @property
    def removed(self) -> list[str]:
        """The activations that are linear by now, in the order of their removal."""
        return [name for this in self.rounds if this.accepted is not False for name in this.removed]

    @property
    def chosen_by_now(self) -> list[str]:
        """What was removed, in the order of its removal, that of a round whose going back is still to come among it."""
        return [name for this in self._in_force for name in this.chosen]

    @property
    def number_removed(self) -> int:
        """How much of that is counted as removed."""
        return sum(this.number_removed for this in self._in_force)

    @property
    def _in_force(self) -> list[Round]:
        """The rounds that were not taken back, and one whose going back is still to come."""
        last = len(self.rounds) - 1
        return [
            this
            for number, this in enumerate(self.rounds)
            if this.accepted is not False or (number == last and self.operations)
        ]

    @property
    def is_going_back(self) -> bool:
        """Whether the last good model is to come back."""
        return self.decision is not None and self.decision.go_back

    @property
    def linear_by_now(self) -> list[str]:
        """What this run has made linear and not restored yet."""
        return [*self.removed, *(self.rounds[-1].removed if self.is_going_back else [])]
