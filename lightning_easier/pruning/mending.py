"""Bring a compressed model nearer to the model as given at last, without another operator in it.

Three things, each kept if the score is no worse with it: closed forms of what stays, batch norms, and some training.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_easier.collapsing.fit.norms import match_norms
from lightning_easier.collapsing.fit.refitting import MOST_REFITS, refit_kept
from lightning_easier.pruning.finetuning import Finetuner
from lightning_easier.pruning.judge import Judge
from lightning_easier.pruning.search import Search
from lightning_easier.pruning.stages import FINETUNING, REFITTING, Clock
from lightning_easier.support.progress import Stages


class Mending:
    """Refits the operators that are left, matches the batch norms, and trains; what the score falls by is undone.

    Args:
        search: The search, which is over.
        source: The model as given.
        batches: Calibration data.
        judge: Tells whether a model is as good as it was.
        score: Of the model of the search; None if it was not evaluated.
        clock: Tells whether the time is over: then nothing more is begun.
        progress: Is told of each operator.

    Attributes:
        score: Of the model by now; None if it was not evaluated.
        notes: What was done, in words; nothing if the model is as it was.
    """

    def __init__(
        self,
        search: Search,
        source: nn.Module,
        batches: Sequence[tuple[Tensor, ...]],
        judge: Judge,
        score: float | None,
        clock: Clock,
        progress: Stages,
    ) -> None:
        self.score = score
        self.notes: list[str] = []
        self._search, self._source, self._batches, self._judge = search, source, batches, judge
        self._clock, self._progress = clock, progress
        self._drift = search.drift

    def mend(self, finetuner: Finetuner | None) -> None:
        """Do one after the other, each if the outputs come nearer by it and the score does not fall.

        Args:
            finetuner: Trains the model at last; None for no training.
        """
        self._clock.begin(REFITTING)
        self._progress.begin(REFITTING, MOST_REFITS)
        if not self._search.steps:
            return
        if not self._clock.is_over():
            self._refit()
        self._search.forget_dense()  # nothing is fitted any more
        if not self._clock.is_over():
            self._match_norms()
        if finetuner is not None:
            self._clock.begin(FINETUNING)
            self._progress.begin(FINETUNING, finetuner.settings.steps)
            self._finetune(finetuner)

    def _refit(self) -> None:
        refitted = refit_kept(
            self._search.model, self._search.dense, self._batches, self._clock.is_over, self._progress.finish
        )
        if refitted is not None:
            names = ", ".join(f"`{name}`" for name in refitted.names)
            self._keep_or_undo(refitted.undo, f"operators that stay were refitted ({names})")

    def _match_norms(self) -> None:
        matched = match_norms(self._search.model, self._source, self._batches, self._search.kept_channels)
        if matched is not None:
            did = (
                "at last each batch norm was given the scale and offset with which it computes mean and deviation of "
                "each channel as in the model as given"
            )
            self._keep_or_undo(matched.undo, did)

    def _finetune(self, finetuner: Finetuner) -> None:
        trained = finetuner.run(self._search.model, self._progress.finish)
        if trained.is_nearer:
            self._keep_or_undo(trained.undo, trained.words)

    def _keep_or_undo(self, undo: Callable[[], None], did: str) -> None:
        """Keep what was done if score and drift are good enough still, and note it in words; else undo it."""
        score, drift = self._judge.score(self._search.model), self._search.drift
        is_too_far = drift > self._drift and self._judge.why_not(score, drift) is not None
        if is_too_far or not self._judge.is_no_worse(score, self.score):
            undo()
            return
        self.score = score
        before, self._drift = self._drift, drift
        self.notes.append(
            f"{did}: of the variance of the outputs {self._drift:.2%} has changed then, and not {before:.2%}"
        )
