"""LaCoOT in a Trainer."""

from typing import Literal

from lightning_easier.callbacks.files import Files
from lightning_easier.callbacks.pruning import PruningCallback
from lightning_easier.pruning.methods import RemoveBlocks
from lightning_easier.pruning.rules import Rounds
from lightning_easier.pruning.targets import Target


class OptimalTransportCallback(PruningCallback):
    """Train once with a regularizer that makes blocks removable, then take them out without training again.

    While training goes on, the distance between what goes into each block and what comes out of it is added to the
    loss. When it has ended, blocks are taken out one by one, the nearest first, each judged on a validation of its own,
    while the score has not fallen by more than the tolerance. :func:`~lightning_easier.collapse` leaves nothing of
    them; :func:`~lightning_easier.collapsible_blocks` lists those of a model beforehand.

    See :class:`~lightning_easier.PruningCallback` for how a run goes and what may be raised. Logged are, besides:
    ``transport_loss``, the mean distance over the blocks of a training batch, without its weight;
    ``distance/<block>`` in each validation.

    Args:
        monitor: Name of the score, logged in a validation step or at the end of validation.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below that of the trained network, in the score's own unit.
        weight: Of the distance in the loss. LaCoOT takes 5 for ResNet-18, 0.1 for Swin-T, 9 for MobileNetV2 on
            CIFAR-10, and 1 for Swin-T on Tiny-ImageNet. With 0 nothing is added, and the order tells little.
        blocks: Name globs of the blocks; by default those that lie in no other.
        directions: How many directions a distance looks along, drawn anew for each batch.
        p: Order of the distance, at least 1.
        seed: Of the directions.
        rounds: Whether blocks go when training has ended (``epochs=0``, the default), or with training after each; how
            many go at once; what follows when one is taken back.
        exclude: Name globs of blocks that stay.
        target: How fast or how shallow the network should become; no more blocks go when it is.
        files: Where the checkpoints are kept, and which.
        dry_run: Only list what would be done.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range. When training starts, if blocks overlap; in training, if a
            block changes the shape of its input, or its first batch has one sample, which is no distribution; in
            validation, if all batches have.
        MisconfigurationException: When training starts, if there is no block, a glob matches none, or the module
            optimizes by hand; besides what a PruningCallback raises.

    Note:
        The first axis of what a block reads is taken for the samples. A block stays, with a warning, if its distance is
        not finite, or if validation only gives it one sample at once. The network that was trained is the last round
        that was kept if no block could go. To train on after blocks have gone, take what
        :func:`~lightning_easier.load_pruned` returns.

    Source: LaCoOT, arXiv 2406.08933.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = OptimalTransportCallback(monitor="val_acc", tolerance=0.01, weight=5.0)
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        weight: float = 1.0,
        blocks: list[str] | str | None = None,
        directions: int = 50,
        *,
        p: float = 2.0,
        seed: int = 0,
        rounds: Rounds = Rounds(epochs=0),
        exclude: list[str] | str | None = None,
        target: Target | None = None,
        files: Files = Files(),
        dry_run: bool = False,
    ) -> None:
        super().__init__(
            RemoveBlocks(weight, blocks, directions, p, seed),
            monitor,
            mode,
            tolerance,
            rounds=rounds,
            exclude=exclude,
            target=target,
            files=files,
            dry_run=dry_run,
        )
