"""What a model does for each sample: it tells on how many samples a compression runs it."""

from torch import Tensor, nn

from lightning_easier.collapsing.engine import counted
from lightning_easier.support.calls import copies
from lightning_easier.support.costs import count_work


def work_of_a_sample(model: nn.Module, batch: tuple[Tensor, ...]) -> float | None:
    """Return what a model does for each sample of a batch, in multiply-accumulates; None where that can't be counted.

    Args:
        model: The model, in eval mode.
        batch: What its forward is called with.
    """
    work = counted(count_work, model, copies(batch))
    return None if work is None else work / len(batch[0])
