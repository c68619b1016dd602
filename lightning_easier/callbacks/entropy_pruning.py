"""EASIER in a Trainer."""

from typing import Literal

from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.callbacks.files import Files
from lightning_easier.callbacks.pruning import PruningCallback
from lightning_easier.pruning.methods import Linearize, Measuring
from lightning_easier.pruning.rules import Rounds
from lightning_easier.pruning.targets import Target


class EntropyPruningCallback(PruningCallback):
    """Make the activations of lowest entropy linear, round by round, while the score allows.

    See :class:`~lightning_easier.PruningCallback` for how a run goes, what is logged, and what may be raised.

    Args:
        monitor: Name of the score, logged in a validation or training step or at the end of validation. (What is logged
            in the module's ``on_train_epoch_end`` comes too late.)
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below the reference, in the score's own unit.
        method: What takes the place of an activation, and which goes first. :class:`~lightning_easier.Linearize`: an
            identity or an affine, whose neighbours :func:`~lightning_easier.collapse` merges after the run.
            :class:`~lightning_easier.FitChains`: one cheaper operator at once, in the place of the chain around it.
        rounds: How long a round is, how much goes in it, what it is judged against, what follows when it is taken back.
        include: Name globs of the activations that may become linear; all by default.
        exclude: Name globs of those that may not; they are not measured either.
        measuring: What is measured on.
        target: How fast or how shallow the network should become; the run is over when it is.
        distillation: Whether and how the rounds after the first are trained on the logits of the dense network, too.
        files: Where the checkpoints are kept, and which.
        dry_run: Only list what would be done.

    Source: EASIER, arXiv 2404.18949.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_easier import Rounds
        >>> pruning = EntropyPruningCallback(monitor="val_acc", mode="max", tolerance=0.01, rounds=Rounds(epochs=2))
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        *,
        method: Linearize = Linearize(),
        rounds: Rounds = Rounds(),
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        measuring: Measuring = Measuring(),
        target: Target | None = None,
        distillation: Distillation | None = None,
        files: Files = Files(),
        dry_run: bool = False,
    ) -> None:
        if not isinstance(method, Linearize):
            raise TypeError(
                f"Expected argument `method` to be a Linearize or a FitChains, but got {method!r}; PruningCallback "
                f"takes any method"
            )
        super().__init__(
            method,
            monitor,
            mode,
            tolerance,
            rounds=rounds,
            include=include,
            exclude=exclude,
            measuring=measuring,
            target=target,
            distillation=distillation,
            files=files,
            dry_run=dry_run,
        )
