"""Give every activation call of a model a module of its own.

A *site* is a call of an activation, not a module: torchvision's ResNet-18 has 9 ReLU modules and 17 calls. Everything
is planned first (see :mod:`lightning_easier.sites.discovery`), without touching the model, then carried out.
"""

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_easier.sites.discovery import ActivationSite, Discovery, IsolationPlan
from lightning_easier.sites.rectifiers import as_gates
from lightning_easier.sites.rewriting import carry_out


def isolate_activations(model: nn.Module, *, gates: bool | Iterable[str] = False) -> dict[str, nn.Module]:
    """Give every call of a rectifier a submodule of its own, in place.

    A rectifier may be a module, a module that is called several times, or a function (``F.relu``, ``torch.relu``,
    ``x.relu_()``, ``F.gelu``, ...). Parameter names, classes and the function computed do not change. A second call
    changes nothing.

    Args:
        model: Any module; a compiled or DistributedDataParallel-wrapped one is unwrapped.
        gates: Whether activations that bound their output count too: all of them, or those named (``"sigmoid"``,
            ``"tanh"``, ``"softmax"``, ``"hardsigmoid"``, ``"hardtanh"``, ``"softsign"``).

    Returns:
        Qualified name -> activation module, in execution order. Names are stable across processes.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule.
        ValueError: If ``gates`` names something else.

    Warns:
        UserWarning: Once, with the names of the modules that seem to call a rectifier and can't be rewritten.

    Example:
        >>> import torch.nn as nn, torch.nn.functional as F
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return F.relu(self.fc2(F.relu(self.fc1(x))))
        >>> isolate_activations(Net())
        {'relu': ReLU(), 'relu_1': ReLU()}
    """
    return {site.name: site.module for site in isolated_sites(model, gates)}


def isolated_sites(model: nn.Module, gates: bool | Iterable[str] = False) -> list[ActivationSite]:
    """Isolate the activations of a model in place and describe each; see :func:`isolate_activations`."""
    plan = plan_isolation(model, gates)
    isolate(model, plan)
    return plan.sites


def plan_isolation(model: nn.Module, gates: bool | Iterable[str] = False) -> IsolationPlan:
    """Look for the sites of a model, and plan what would isolate them; the model is not touched."""
    return Discovery(as_gates(gates)).plan(unwrap(model))


def isolate(model: nn.Module, plan: IsolationPlan) -> None:
    """Carry out a plan that was made for a model as it still is."""
    carry_out(plan.edits)
    if plan.left_alone:
        listing = "; ".join(f"`{name or type(model).__name__}`: {reason}" for name, reason in plan.left_alone.items())
        warnings.warn(
            f"Activations called inside the following modules were left alone, since their forward can't be "
            f"rewritten faithfully: {listing}. Call each activation through an nn.Module of its own there to have it "
            f"measured and pruned.",
            UserWarning,
            stacklevel=3,
        )


def planned_sites(model: nn.Module, gates: bool | Iterable[str] = False) -> list[ActivationSite]:
    """Describe the sites that :func:`isolated_sites` would find; the model is not touched."""
    return plan_isolation(model, gates).sites


def replace_activation(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of an activation, or of anything else.

    torch's transformer layer has a fused path for inference that computes the activation by itself; it is told, and
    told again when everything is back.
    """
    model.set_submodule(name, module)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = _fused_as(parent)


def _fused_as(layer: nn.TransformerEncoderLayer) -> int:
    """Return as what the fused path of a layer computes what is in it: 1 as ReLU, 2 as GELU, 0 for not at all."""
    activation: Any = layer.activation
    if any(type(operator) is not nn.Linear for operator in (layer.linear1, layer.linear2)):
        return 0
    if activation is functional.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is functional.gelu or isinstance(activation, nn.GELU) else 0


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile``, DataParallel and DistributedDataParallel wrappers.

    Raises:
        TypeError: If ``model`` is not a Module, or a ScriptModule, whose forward is no longer Python.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "Expected argument `model` to be a Python nn.Module, but got a ScriptModule, whose forward can't be "
            "rewritten. Pass the module it was scripted from."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    return model


def match_names(
    names: Sequence[str], include: Iterable[str] | None, exclude: Iterable[str] | None, *, kind: str = "activations"
) -> list[str]:
    """Select names by shell-style globs: those that match any of ``include`` (all by default) and none of ``exclude``.

    Raises:
        ValueError: If a glob matches nothing.
    """
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs or ():
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"Expected argument `{argument}` to hold globs that match {kind}, but {glob!r} matches none "
                    f"of {list(names)}"
                )
    return [
        name
        for name in names
        if (include is None or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude or ())
    ]
