r"""Refit the operators that are left of a changed model, so that they make up for the error of what was changed.

One after the other, in execution order, each gets weights with which what it computes on what it reads by now comes
nearer to what it computed in the model as given; where it is added to a sum, that sum does. With :math:`U` the patches
of its input and :math:`E` what is missing where it shows, its weights move by

.. math:: \min_D \|U D - E\|^2 + \|\Lambda^{1/2} D\|^2

where the ridge draws towards the weights as they are. Only a part of the samples and of the operators is looked at:
each takes a run of both models up to where it shows, so that all of them would take time with the square of the depth.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.corrected import step_against
from lightning_easier.collapsing.algebra.least_squares import Moments
from lightning_easier.collapsing.fit.correcting import SideBySide, is_enough, on_shown, positions_of
from lightning_easier.collapsing.fit.drift import drift_of, outputs_of
from lightning_easier.collapsing.fit.kept import KeptOperator, kept_operators
from lightning_easier.collapsing.fit.placing import with_statistics
from lightning_easier.support.beginnings import Beginnings
from lightning_easier.support.calls import call, copies
from lightning_easier.support.finite import is_finite
from lightning_easier.support.inference import evaluation_mode

MOST_REFITS = 16
"""So many operators are refitted at most: those at which most of the variance is error."""
# A share of the variance: what is less is not worth two runs.
_LEAST_ERROR = 0.01
# Of what shows of an operator in one sample: as many tell how much of it is error.
_VALUES = 2**8
_NORM = ("weight", "bias", "running_mean", "running_var")


def _nothing() -> None: ...


def _never() -> bool:
    return False


class Refitted(NamedTuple):
    """What :func:`refit_kept` has changed.

    Attributes:
        names: Of the operators that have other weights, in execution order.
        before: The tensors, and the values that they had.
    """

    names: list[str]
    before: list[tuple[Tensor, Tensor]]

    def undo(self) -> None:
        """Give the operators, and the norms after them, the values that they had."""
        _set(self.before)


def refit_kept(
    model: nn.Module,
    dense: Beginnings,
    batches: Sequence[tuple[Tensor, ...]],
    is_over: Callable[[], bool] = _never,
    advance: Callable[[], object] = _nothing,
) -> Refitted | None:
    """Have the operators that are left of a changed model make up for its error, if its outputs come nearer by it.

    That is asked once, at the end: the first of them often move the outputs away, which the others make up for.

    Args:
        model: The changed model, in eval mode, its activations isolated; values are changed in place.
        dense: The model as given, in eval mode, see :func:`~lightning_easier.collapsing.fit.correcting.beginnings_of`.
        batches: Calibration data: the forward's positional arguments, for each batch.
        is_over: Tells whether the time is over, before each operator.
        advance: What is called after each operator, :data:`MOST_REFITS` times at most.

    Returns:
        What can undo it; None if nothing was changed.
    """
    wanted = outputs_of(dense.model, batches)
    drift = drift_of(outputs_of(model, batches), wanted)
    refitted = Refitted([], [])
    if drift == 0:
        return None
    for place in _worst(model, dense.model, kept_operators(model, dense.model), batches[0]):
        if is_over():
            break
        moments = _errors(model, dense, place, batches)
        values = [] if moments is None else _moved(model, place, moments)
        if values:
            refitted.names.append(place.name)
            refitted.before.extend((tensor, tensor.detach().clone()) for tensor, _ in values)
            _set(values)
        advance()
    if refitted.names and drift_of(outputs_of(model, batches), wanted) < drift:
        return refitted
    refitted.undo()
    return None


@torch.no_grad()
def _set(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in values:
        tensor.copy_(value)


def _worst(
    model: nn.Module, dense: nn.Module, places: Sequence[KeptOperator], batch: tuple[Tensor, ...]
) -> list[KeptOperator]:
    """Return the operators at which most of the variance is error, in the order of the given ones."""
    now, wanted = (_some_shown(each, places, batch) for each in (model, dense))
    both = [place for place in places if place in now and place in wanted and now[place].shape == wanted[place].shape]
    shares = {place: drift_of([now[place]], [wanted[place]]) for place in both}
    shares = {place: share for place, share in shares.items() if share > _LEAST_ERROR}
    worst = sorted(shares, key=lambda place: -shares[place])[:MOST_REFITS]
    return [place for place in places if place in worst]


def _some_shown(
    model: nn.Module, places: Sequence[KeptOperator], batch: tuple[Tensor, ...]
) -> dict[KeptOperator, Tensor]:
    """Return some of the values that show of each operator, always the same, in one run."""
    found: dict[KeptOperator, Tensor] = {}

    def note(place: KeptOperator, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel():
            rows = value.detach().flatten(1)
            some = torch.randint(rows.shape[1], (_VALUES,), generator=torch.Generator().manual_seed(0))
            found[place] = rows[:, some.to(rows.device)]

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for place in places:
            stack.callback(on_shown(model, place, partial(note, place)).remove)
        call(model, copies(batch))
    return found


def _errors(
    model: nn.Module, dense: Beginnings, place: KeptOperator, batches: Sequence[tuple[Tensor, ...]]
) -> Moments | None:
    """Sum up what goes into an operator, and what is missing to what should come out; None if that is not known."""
    moments = Moments.of(place.geometry, place.outputs(model), place.like(model).device)
    with SideBySide(model, dense, place) as side_by_side:
        for batch in batches:
            compared = side_by_side.run(batch)
            if compared is None:
                return None
            moments.add(compared.value, compared.error, positions_of(place, batch, dense))
            if is_enough(moments, place, dense):
                break
    return moments if moments.why_no_fit() is None else None


def _moved(model: nn.Module, place: KeptOperator, moments: Moments) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of an operator and of the norm after it, with their new values; none where they stay.

    An operator without a bias gets none: the norm makes up for it, where there is one with an offset.
    """
    operator: Any = model.get_submodule(place.name)
    norm: Any = None if place.norm is None or not _is_adjustable(model, place.norm) else model.get_submodule(place.norm)
    has_bias = operator.bias is not None
    if not has_bias and norm is None:
        fitted, held_out = (sums.without_offset() for sums in (moments.fitted, moments.held_out))
        moments = Moments(moments.geometry, fitted, held_out)
    step = step_against(moments)
    if not step.left < 1:
        return []
    weight = operator.weight.detach().to(step.weight).flatten(1).T
    bias = operator.bias.detach().to(step.weight) if has_bias else torch.zeros_like(step.weight[-1])
    new = step.weight + torch.cat([weight, bias[None]])
    values = [(operator.weight, new[:-1].T.reshape(operator.weight.shape))]
    if has_bias:
        values.append((operator.bias, new[-1]))
    if norm is not None:
        mean, variance = moments.fitted.statistics(new)
        offset = None if has_bias else new[-1]
        adjusted = with_statistics(norm, mean if offset is None else mean - offset, variance, offset)
        values += [(getattr(norm, name), getattr(adjusted, name).detach()) for name in _NORM]
    values = [(tensor, value.to(tensor)) for tensor, value in values]
    return values if is_finite(*(value for _, value in values)) else []


def _is_adjustable(model: nn.Module, name: str) -> bool:
    """Tell whether a batch norm has a scale and an offset, which nothing else holds."""
    norm: Any = model.get_submodule(name)
    holders = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    return holders.count(id(norm.weight)) == holders.count(id(norm.bias)) == 1
