"""Whether two operators around an activation would really be neighbours, if the activation were linear."""

from collections import Counter
from typing import Any

from torch import nn

from lightning_easier.sites.dataflow import Kind
from lightning_easier.sites.discovery import IsolationPlan
from lightning_easier.sites.neighbourhood import Meeting
from lightning_easier.support.inference import has_hooks


class Adjacency:
    """Tells of operators that meet what keeps them apart.

    Args:
        model: The model.
        plan: What was discovered in it.
    """

    def __init__(self, model: nn.Module, plan: IsolationPlan) -> None:
        self._hooked = {name: module for name, module in model.named_modules() if name and has_hooks(module)}
        # how many modules hold a tensor, and how often one is read without its module being called
        self._readers = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
        for node in plan.flow.nodes:
            if node.kind == Kind.CONSTANT:
                owner, _, attribute = node.name.rpartition(".")
                self._readers[id(_get(model, owner, attribute))] += 1

    def why_apart(self, meeting: Meeting) -> str | None:
        """Return what keeps two operators apart; None if nothing does."""
        if "addition" in meeting.through:
            return (
                "an addition lies between them, through which a merge goes only where all that is added comes linearly "
                "from one value"
            )
        if "flatten" in meeting.through:
            return "a flatten lies between them, through which a merge goes only from maps of one position"
        first, second = meeting.operators
        if first is None or second is None:
            return "one of them is a function, not a module"
        for operator in (first, second):
            if self.shares_parameters(operator):
                return "one of them shares its parameters with something else"
        for name, module in self._hooked.items():
            if self._are_parts(name, meeting.first, meeting.second) or module in (*meeting.between, *meeting.idle):
                return f"`{name}` has hooks, which would see something else"
        if not all(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in meeting.between):
            return "a functional batch norm lies between them"
        return None

    def shares_parameters(self, operator: nn.Module) -> bool:
        """Tell whether something else holds, or reads, a parameter of an operator."""
        return any(self._readers[id(parameter)] > 1 for parameter in operator.parameters())

    def is_hooked(self, name: str) -> bool:
        """Tell whether an operator, or a module that it is a part of, has hooks."""
        return any(self._are_parts(hooked, name) for hooked in self._hooked)

    @staticmethod
    def _are_parts(whole: str, *names: str) -> bool:
        """Tell whether any of some modules is another, or a part of it."""
        return any(f"{name}.".startswith(f"{whole}.") for name in names)


def _get(model: nn.Module, owner: str, attribute: str) -> Any:
    try:
        return getattr(model.get_submodule(owner), attribute, None)
    except AttributeError:  # a question that was asked of a value, such as its size
        return None
