"""Put a fitted operator in the place of a chain: which modules become what.

The operator takes the place of the first of the chain, all after it becomes identities, and the batch norm that reads
the chain gets the statistics of what is fitted. That is the same in a collapse, where new modules take the places of
those of a copy (:func:`replace`), and in training, where an optimizer and a wrapper hold the parameters, so that values
move into the modules that are there (:func:`as_chain_fit`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.least_squares import Fit
from lightning_easier.collapsing.fit.fit_prices import PricedFit
from lightning_easier.collapsing.fit.fittable import CannotFitError, FittableChain, Place
from lightning_easier.collapsing.fit.fittable_blocks import FittableBlock
from lightning_easier.collapsing.fit.narrowing import NarrowableChain, NarrowFit
from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.activations import replace_activation
from lightning_easier.structure.names import seen_from
from lightning_easier.structure.stand_in import StandIn
from lightning_easier.structure.substitution import Absorbed, ChainFit, Form, attributes_of
from lightning_easier.support.calls import call, copies

_T = TypeVar("_T")


def replace(model: nn.Module, choice: PricedFit, arguments: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Put an operator in the place of a chain, or of a block, in place.

    Args:
        model: The model, in eval mode.
        choice: The operator.
        arguments: Example inputs, for a forward that shows whether the model still runs.

    Returns:
        What was there before, by name; :func:`put` brings it back.

    Raises:
        CannotFitError: If it does not, since its forward reads more of the operators than what they compute; the model
            is as it was.
    """
    old = _put_fitted(model, choice)
    try:
        with torch.no_grad():
            call(model, copies(arguments))
    except Exception as error:  # whatever the user's forward raises
        put(model, old)
        raise _does_not_run(error) from error
    return old


def try_out(model: nn.Module, choice: PricedFit, run: Callable[[], _T]) -> _T:
    """Run something while an operator is in the place of a chain; the model is as it was afterwards.

    Args:
        model: The model, in eval mode.
        choice: The operator.
        run: Runs the model; what it returns is returned.

    Raises:
        CannotFitError: As for :func:`replace`.
    """
    old: dict[str, nn.Module] = {}
    try:
        old = _put_fitted(model, choice)
        with torch.no_grad():
            return run()
    except Exception as error:  # whatever the user's forward raises
        raise _does_not_run(error) from error
    finally:
        put(model, old)


def _put_fitted(model: nn.Module, choice: PricedFit) -> dict[str, nn.Module]:
    """Put an operator in its place, in place; return what was there before, by name."""
    new = _modules_in(choice.place, model, choice.fit)
    old = {name: model.get_submodule(name) for name in new}
    put(model, new)
    return old


@singledispatch
def _modules_in(place: Place, model: nn.Module, fit: Fit) -> dict[str, nn.Module]:
    """Return name -> module for all that changes when an operator is put in a place."""
    raise NotImplementedError(type(place).__name__)


@_modules_in.register
def _(chain: FittableChain, model: nn.Module, fit: Fit) -> dict[str, nn.Module]:
    """Put a new module, of whatever kind, in the place of the first of a chain.

    What it absorbs leaves no attributes: a forward that reads more of an operator than what it computes is refused.
    """
    new: dict[str, nn.Module] = {chain.operators[0]: deepcopy(fit.operator).to(chain.like(model)).eval()}
    new |= {name: Absorbed().eval() for name in chain.after}
    return new | _adjusted_norm(model, chain, fit)


@_modules_in.register
def _(chain: NarrowableChain, model: nn.Module, fit: NarrowFit) -> dict[str, nn.Module]:
    """Put narrower modules in the places of those of a chain; an offset without a place goes into the batch norm."""
    last: Any = model.get_submodule(chain.operators[-1])
    missing = fit.bias if last.bias is None and _has_adjustable_norm(model, chain) else None
    new = chain.narrow_modules(model, fit.channels, fit.weight, fit.bias if missing is None else None)
    return new | _adjusted_norm(model, chain, fit, missing)


@_modules_in.register
def _(block: FittableBlock, model: nn.Module, fit: Fit) -> dict[str, nn.Module]:
    """Put a module in the place of a block that takes what that takes."""
    return {block.name: block.stand_in(fit, block.like(model)).eval()}


def _does_not_run(error: Exception) -> CannotFitError:
    return CannotFitError(f"the model does not run with an operator in its place: {error}")


def as_chain_fit(model: nn.Module, chain: FittableChain, fit: Fit) -> ChainFit | None:
    """Tell how an operator moves into the modules of a chain.

    Here parameters stay the same objects: an operator moves in only if it is of the first one's kind. An affine, or an
    offset that the first has no place for, goes into the stand-in of the activation, or into the batch norm.

    Args:
        model: The model.
        chain: The chain. The operator takes the place of its first activation; the others become identities.
        fit: The operator.

    Returns:
        None if the operator is of another kind than the first of the chain, so that it can't move in, or its values are
        too large for the dtype of the model.
    """
    site = chain.sites[0]
    first: Any = model.get_submodule(chain.operators[0])
    operator: Any = fit.operator
    if type(operator) not in (type(first), ChannelAffine):
        return None
    bias = operator.bias.detach()
    host: str | None = None
    attributes: dict[str, Any] = {}
    affine: AffineFit | None = None
    missing: Tensor | None = None  # what the batch norm makes up for
    tensors: dict[str, Tensor] = {}
    absorbed = [name for name in chain.after if name != site]
    if type(operator) is ChannelAffine:
        absorbed.insert(0, chain.operators[0])
        affine = AffineFit(operator.weight.detach(), bias, operator.dim, fit.explained)
    else:
        host, attributes = chain.operators[0], attributes_of(operator)
        tensors[f"{host}.weight"] = operator.weight.detach()
        if first.bias is not None:
            tensors[f"{host}.bias"] = bias
        elif _has_adjustable_norm(model, chain):
            missing = bias
        else:
            affine = AffineFit(torch.ones_like(bias), bias, 1 if chain.geometry.kernel else -1, fit.explained)
    for norm, adjusted in _adjusted_norm(model, chain, fit, missing).items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{name}"] = getattr(adjusted, name).detach()
    absorbed = [name for name in absorbed if not isinstance(model.get_submodule(name), StandIn | Absorbed)]
    form = Form(
        None if host is None else seen_from(site, host), attributes, tuple(seen_from(site, name) for name in absorbed)
    )
    of_model = {seen_from(site, name): value.to(first.weight) for name, value in tensors.items()}
    found = ChainFit(fit.kind, fit.explained, form, of_model, affine)
    return found if found.is_finite_in(first.weight.dtype) else None


def _has_adjustable_norm(model: nn.Module, chain: FittableChain) -> bool:
    """Tell whether a batch norm reads a chain that has statistics, and can make up for others by scale and offset."""
    if chain.norm is None:
        return False
    norm: Any = model.get_submodule(chain.norm)
    return norm.running_mean is not None and norm.weight is not None and norm.bias is not None


def _adjusted_norm(
    model: nn.Module, chain: FittableChain, fit: Fit, missing: Tensor | None = None
) -> dict[str, nn.Module]:
    """Return the batch norm that reads a chain, for the statistics of what is fitted, by name; nothing if none does.

    Args:
        model: The model.
        chain: The chain.
        fit: The operator in its place.
        missing: What the operator's output lacks of that, shape ``(C,)``; nothing by default.
    """
    if chain.norm is None or not _has_adjustable_norm(model, chain):
        return {}
    mean = fit.mean if missing is None else fit.mean - missing
    return {chain.norm: with_statistics(model.get_submodule(chain.norm), mean, fit.variance, missing)}


def with_statistics(norm: Any, mean: Tensor, variance: Tensor, offset: Tensor | None = None) -> nn.Module:
    """Copy a batch norm for values of other statistics; in eval mode it computes the same.

    What is fitted varies less than what it was fitted to. In training mode a batch norm would scale that up again, and
    training would begin with another function than the one that was fitted.

    Args:
        norm: The batch norm, with statistics, a scale and an offset.
        mean: Of its input from now on, shape ``(C,)``.
        variance: Of its input from now on, shape ``(C,)``.
        offset: What its input lacks from now on, shape ``(C,)``; the batch norm makes up for it.
    """
    copied = deepcopy(norm)
    mean, variance = mean.to(norm.running_mean), variance.to(norm.running_var)
    shift = torch.zeros_like(mean) if offset is None else offset.to(mean)
    with torch.no_grad():
        before, after = (value + norm.eps for value in (norm.running_var, variance))
        copied.bias += norm.weight * (mean + shift - norm.running_mean) / before.sqrt()
        copied.weight *= (after / before).sqrt()
        copied.running_mean.copy_(mean)
        copied.running_var.copy_(variance)
    return copied


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules under their names."""
    for name, module in modules.items():
        replace_activation(model, name, module)
