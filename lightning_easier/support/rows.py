"""Tell whether the rows of a batch are samples, each independent of the others: then some of them are a batch, too."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from lightning_easier.support.calls import call, copies, mapped
from lightning_easier.support.inference import (
    evaluation_mode,
    full_float32,
    relative_difference,
    tensors_in,
    tolerance_for,
)


def rows_of(batch: Sequence[Tensor]) -> int | None:
    """Return how many rows all arguments of a forward have; None if they have not equally many."""
    rows = {len(value) if value.ndim else 0 for value in batch}
    return rows.pop() if len(rows) == 1 else None


@full_float32()
def rows_are_samples(model: nn.Module, batch: tuple[Tensor, ...]) -> bool:
    """Tell whether a model makes of some rows of a batch what it makes of them in the batch.

    They may be the nodes of a graph, or the positions of sequences; or a forward takes so many and no others.

    Args:
        model: The model; a copy of it runs, in eval mode: it may keep something of a call for the next one.
        batch: The forward's positional arguments, all of which have equally many rows.
    """
    rows = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(0))[: max(1, len(batch[0]) // 2)]
    some = mapped(lambda value: value[rows.to(value.device)], batch)
    model = deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with evaluation_mode(model):
        whole = tensors_in(call(model, copies(batch)))
        try:
            part = tensors_in(call(model, some))
        except Exception:  # whatever the user's forward raises of a batch of another size
            return False
    if any(not value.ndim or len(value) != len(batch[0]) for value in whole):
        return False
    return relative_difference(part, [value[rows.to(value.device)] for value in whole]) <= tolerance_for(whole) + 1e-6
