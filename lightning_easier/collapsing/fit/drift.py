"""How much the outputs of a model have changed, and in which direction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.fit.enough import FEWEST_VALUES, enough, first_batches
from lightning_easier.support.calls import call, copies, mapped
from lightning_easier.support.inference import tensors_in
from lightning_easier.support.rows import rows_are_samples, rows_of

# So many tell how much the outputs have changed, and so many values of each in which direction.
_SAMPLES, _VALUES = 200, 1024
# No fewer are left of a batch where there are no batch norms, for which they may be too few.
_FEWEST = 32


def outputs_of(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return what a model makes of the first samples of some batches: a matrix for each of its outputs.

    Args:
        model: The model, in eval mode.
        batches: The forward's positional arguments, for each batch.
    """
    with torch.no_grad():
        return as_matrices([call(model, copies(batch)) for batch in first_batches(batches, _SAMPLES)])


def samples_that_tell(
    model: nn.Module, batches: Sequence[tuple[Tensor, ...]], work: float | None = None
) -> list[tuple[Tensor, ...]]:
    """Return no more samples than tell how much outputs have changed, however large the batches are.

    Of the last batch they are drawn from all of it: it may be sorted by class.

    Args:
        model: The model as given: where its forward takes the rows of a batch for what they are together, the batch
            stays whole.
        batches: The forward's positional arguments, for each batch.
        work: Of the model for each sample, as for :func:`enough`.
    """
    has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    fewest = FEWEST_VALUES if has_norms else _FEWEST
    samples = enough(_SAMPLES, fewest, work)
    *some, last = first_batches(batches, samples)
    left, rows = samples - sum(len(batch[0]) for batch in some), rows_of(last)
    if rows is None or not fewest <= left < rows or not rows_are_samples(model, last):
        return [*some, last]
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:left].sort().values
    return [*some, mapped(lambda value: value[drawn.to(value.device)], last)]


def as_matrices(returned: Sequence[Any]) -> list[Tensor]:
    """Return a matrix of what a model has returned for some batches, for each of its outputs: a row a sample."""
    outputs: list[Tensor] = []
    for column in zip(*map(tensors_in, returned), strict=True):
        rows = [x.reshape(len(x), -1) for x in column if x.ndim]
        is_one = len({x.shape[1] for x in rows}) == 1  # else sequences of other lengths
        outputs += [torch.cat(rows)] if is_one else rows
    return outputs


def drift_of(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the share of the variance of outputs that has changed, over all of them."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, before, strict=True) if b.is_floating_point()]
    changed = sum(float((a - b).square().sum()) for a, b in pairs)
    variance = sum(float((b - b.mean(0)).square().sum()) for _, b in pairs)
    return changed / variance if variance > 0 else changed


def change_of(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Return what has changed of outputs, as one vector: sums of such vectors tell what several changes do together.

    Of outputs of many values some are taken, scaled so that the square of the length stays what it is on average.
    """
    parts = [torch.zeros(0, device=before[0].device)] if before else []
    for number, (a, b) in enumerate(zip(outputs, before, strict=True)):
        if b.is_floating_point():
            values = b.shape[1]
            if values > _VALUES:
                places = torch.randperm(values, generator=torch.Generator().manual_seed(number))[:_VALUES].to(b.device)
                a, b = a[:, places], b[:, places]
            change = a.double() - b.double()
            parts.append((change * (values / b.shape[1]) ** 0.5).float().flatten())
    return torch.cat(parts)
