"""How many samples of the calibration data are looked at: fewer of a network that does more for each."""

import math
from collections.abc import Sequence

from torch import Tensor

# A ResNet-56 does about as much for an image of 32×32; at 224×224 MobileNetV2 does six times that, ViT-S 22 times.
_WORK = 2**28
# Of each channel, in each batch: batch norms are matched by their mean and deviation.
FEWEST_VALUES = 50
# Of one that does more, a share of so many are looked at for first fits, and no fewer than so many.
_TO_FIT = 1000, 256


def enough(samples: int, fewest: int, work: float | None) -> int:
    """Return how many samples a network is run on, so that they take no more work than of a small one.

    Args:
        samples: Of a small network.
        fewest: Of one that does much for each.
        work: For each sample, see :func:`~lightning_easier.support.costs.count_work`; None where that is not known.
    """
    share = 1.0 if not work else min(1.0, _WORK / work)
    return max(min(fewest, samples), int(samples * share))


def enough_to_fit(work: float | None) -> float:
    """Return how many samples are enough for first fits, if they have many positions; of a small network all.

    Args:
        work: As for :func:`enough`.
    """
    return math.inf if not work or work <= _WORK else enough(*_TO_FIT, work)


def first_batches(batches: Sequence[tuple[Tensor, ...]], samples: float) -> list[tuple[Tensor, ...]]:
    """Return the first of some batches, that together have so many samples."""
    some: list[tuple[Tensor, ...]] = []
    seen = 0
    for batch in batches:
        if seen >= samples:
            break
        some.append(batch)
        seen += len(batch[0])
    return some
