"""Find the operators that are left of a model in its changed copy, of which the weights can be changed alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import Geometry
from lightning_easier.collapsing.fit.fittable import CannotFitError, Place, geometry_of
from lightning_easier.collapsing.fit.showing import AfterOperators, Shown, has_statistics
from lightning_easier.sites.adjacency import Adjacency
from lightning_easier.sites.dataflow import Kind
from lightning_easier.sites.discovery import Discovery
from lightning_easier.sites.rectifiers import GATES


@dataclass(frozen=True)
class KeptOperator(Place):
    """A place of one operator, which stays and may get other weights.

    Attributes:
        operators: Its name.
        geometry: Which values of its input it reads.
        norm: Name of the batch norm that is all that reads it; None if there is none.
        total: Where the sum is seen that it, or that norm, is added to; None if there is none.
    """

    operators: tuple[str]
    geometry: Geometry
    norm: str | None = None
    total: Shown | None = None

    sites = ()

    @property
    def name(self) -> str:
        """Name of the operator."""
        return self.operators[0]

    @property
    def key(self) -> tuple[str, ...]:
        """The operator."""
        return self.operators

    @property
    def described(self) -> str:
        """What to call it in a sentence."""
        return f"the operator {self.name!r}"

    @property
    def told(self) -> tuple[str, ...]:
        """The operator."""
        return self.operators

    @property
    def ends(self) -> tuple[str, str]:
        """The operator, twice."""
        return self.name, self.name

    @property
    def replaced(self) -> tuple[str, ...]:
        """The operator and the norm after it."""
        return (self.name,) if self.norm is None else (self.name, self.norm)

    @property
    def parts(self) -> frozenset[str]:
        """The operator and the norm after it."""
        return frozenset(self.replaced)

    @property
    def shown(self) -> Shown:
        """In the sum that it is added to, else in what the norm after it returns, else in what it does itself."""
        return self.total or Shown(self.name if self.norm is None else self.norm, "output", self.norm)

    def outputs(self, model: nn.Module) -> int:
        """Return how many channels its output has."""
        return len(self.like(model))

    def like(self, model: nn.Module) -> Tensor:
        """Return its weight."""
        weight: Tensor = model.get_submodule(self.name).weight  # type: ignore[assignment]
        return weight

    def timed(self, model: nn.Module) -> nn.Module:
        """Return the operator."""
        return model.get_submodule(self.name)


def kept_operators(model: nn.Module, dense: nn.Module) -> list[KeptOperator]:
    """Find the operators of a changed model that are as in the model as given, and can get other weights by themselves.

    These are Linear and convolutions without groups or dilation, which pad with zeros, are called once, share nothing,
    and have no hooks, masks or parametrizations. What was fitted to correct errors is not among them.

    Args:
        model: The changed model, in eval mode, its activations isolated.
        dense: The model as given.

    Returns:
        Them, in execution order.
    """
    return list(_kept(model, dense))


def _kept(model: nn.Module, dense: nn.Module) -> Iterator[KeptOperator]:
    plan = Discovery(frozenset(GATES)).plan(model)
    names = {module: name for name, module in model.named_modules()}
    given = dict(dense.named_modules())
    after = AfterOperators(plan.flow, names)
    adjacency = Adjacency(model, plan)
    calls = Counter(node.module for node in plan.flow.nodes)
    for node in plan.flow.nodes:
        operator: Any = node.module
        if node.kind != Kind.OPERATOR or operator not in names or calls[operator] != 1:
            continue
        name = names[operator]
        norm, total = after.norms.get(name), after.totals.get(name)
        if norm is not None and not has_statistics(model.get_submodule(norm)):
            continue
        if adjacency.shares_parameters(operator) or adjacency.is_hooked(name):
            continue
        geometry = _geometry(operator)
        if geometry is not None and _is_as_given(operator, given.get(name)):
            place = KeptOperator((name,), geometry, norm, total)
            if place.shown.module in given:
                yield place


def _geometry(operator: Any) -> Geometry | None:
    """Return what an operator reads of its input; None for one that is left alone."""
    is_plain = type(operator) in CONVOLUTIONS and operator.groups == 1 and set(operator.dilation) == {1}
    if not (is_plain or type(operator) is nn.Linear) or not operator.weight.is_floating_point():
        return None
    try:
        return geometry_of([operator])
    except CannotFitError:  # it pads with something else than zeros
        return None


def _is_as_given(operator: nn.Module, given: nn.Module | None) -> bool:
    if type(given) is not type(operator):
        return False
    tensors, wanted = operator.state_dict(), given.state_dict()
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in tensors)
