"""NEPENTHE and EGP in a Trainer."""

from typing import Literal

from lightning_easier.callbacks.distillation import Distillation
from lightning_easier.callbacks.files import Files
from lightning_easier.callbacks.pruning import PruningCallback
from lightning_easier.pruning.methods import Measuring, Sparsify
from lightning_easier.pruning.rules import Rounds
from lightning_easier.pruning.targets import Target


class EntropyGuidedPruningCallback(PruningCallback):
    """Prune weights where entropy is low, round by round, until layers are empty and activations linear.

    A round makes a share of the weights zero, holds them so while training goes on, and is kept while the score allows.
    Activations whose neurons do not switch any more become linear, with a scale of 1 or 0 for each neuron where they
    are ReLU: the score does not move on the data that was measured. When the run ends, those that do not switch in the
    last good model become linear, too, if they were measured in validation. :func:`~lightning_easier.collapse` takes
    channels out that are zero, and merges what has become linear.

    See :class:`~lightning_easier.PruningCallback` for how a run goes and what may be raised. Logged are, besides:
    ``sparsity``, the share of zeros among all weights of two axes or more; ``weight_sparsity/<weight>``, that of each;
    ``emptied``, how many activations are linear or have an entropy of zero.

    Args:
        monitor: Name of the score, logged in a validation or training step or at the end of validation.
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below the reference, in the score's own unit.
        amount: Share of the weights left that a round prunes, in (0, 1). The papers take 0.5 for ResNet-18, 0.25 for
            Swin-T, 0.1 for MobileNetV2.
        variant: How many weights go of each layer: ``"nepenthe"``, ``"egp"``, or by ``"magnitude"`` over all layers, or
            the same share of each (``"uniform"``).
        guard: How many standard deviations a neuron has to be away from switching before its activation becomes linear.
        keep_zeros: Whether weights that are zero when the run begins stay so, as those that an earlier run has pruned.
        importance: Whether entropy weighs magnitudes by ``"layer"`` or by ``"neuron"``.
        rounds: How long a round is, and what it is judged against. The papers begin with a new optimizer and the whole
            schedule in each: ``Rounds(epochs=160, restart="optimizer")``.
        include: Name globs of the activations whose layers are pruned; all by default.
        exclude: Name globs of those whose layers are not.
        measuring: What is measured on; all samples, since none may switch.
        target: How fast or how shallow the network should become; the run is over when it is.
        distillation: Whether and how the rounds after the first are trained on the logits of the dense network, too.
        files: Where the checkpoints are kept, and which.
        dry_run: Only list what would be done.

    Raises:
        ValueError: Besides what a PruningCallback raises, when training starts, if a weight has masks or is
            parametrized, the model was collapsed or quantized, or an activation that was named has no weights before
            it.

    Note:
        A model keeps its parameters and their names. Masks are in the state of the run: to go on with them, resume with
        ``ckpt_path``, or begin another run with ``keep_zeros``. A neuron that was OFF on every sample may be ON on
        another; ``guard`` asks for a margin.

    Source: NEPENTHE, arXiv 2404.16890; EGP, arXiv 2308.06619.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_easier import Rounds
        >>> pruning = EntropyGuidedPruningCallback(monitor="val_acc", amount=0.25, rounds=Rounds(epochs=2))
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        amount: float = 0.5,
        variant: Literal["nepenthe", "egp", "magnitude", "uniform"] = "nepenthe",
        *,
        guard: float = 0.0,
        importance: Literal["layer", "neuron"] = "layer",
        keep_zeros: bool = False,
        rounds: Rounds = Rounds(),
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        measuring: Measuring = Measuring(),
        target: Target | None = None,
        distillation: Distillation | None = None,
        files: Files = Files(),
        dry_run: bool = False,
    ) -> None:
        super().__init__(
            Sparsify(amount, variant, guard, importance, keep_zeros),
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
