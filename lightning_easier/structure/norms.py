"""Split batch norms that compute more than that, such as timm's, which hold the activation that follows.

What reads a network operator by operator would see neither: such a batch norm is no operator of its own, and an
activation in it can't be replaced alone.
"""

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm

_AXES = {batchnorm.BatchNorm1d: 1, batchnorm.BatchNorm2d: 2, batchnorm.BatchNorm3d: 3}
_POSITIONS, _SAMPLES = 5, 3


def split_norms(model: nn.Module) -> list[str]:
    """Put a batch norm of torch's own and what follows it in the place of each that computes both, in place.

    They are known by their values: in eval mode such a module computes what a batch norm with its parameters and then
    its children do, in the order of their registration. The children keep their names, so that the activation of
    ``bn1`` is ``bn1.act`` still; parameters of the norm are those of ``bn1.norm`` then, and the same objects.

    ``compress``, ``candidates`` and ``collapse(mode="fit")`` do that in a copy. A pruning callback does not, since the
    keys of checkpoints change with the names: call it in the ``__init__`` of the LightningModule, when the network has
    the weights that it starts with.

    Args:
        model: Any module.

    Returns:
        The names of what was split.

    Example:
        >>> from timm.layers import BatchNormAct2d
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))
        >>> split_norms(model)
        ['1']
        >>> list(model[1]._modules)
        ['norm', 'drop', 'act']
    """
    parts = _parts_by_name(model)
    for name, each in parts.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, each)
    return list(parts)


def norms_to_split(model: nn.Module) -> list[str]:
    """Return the names of what :func:`split_norms` would split; the model is not changed."""
    return list(_parts_by_name(model))


def with_split_norms(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose norms are split, or the model itself if none has more in it than a norm."""
    if not any(_has_more(module) for module in model.modules()):
        return model
    copy = deepcopy(model)
    split_norms(copy)
    return copy


def _parts_by_name(model: nn.Module) -> dict[str, nn.Sequential]:
    found = ((name, _parts_of(module)) for name, module in model.named_modules() if name)
    return {name: parts for name, parts in found if parts is not None}


def _has_more(module: nn.Module) -> bool:
    return isinstance(module, batchnorm._BatchNorm) and any(True for _ in module.children())


def _parts_of(module: nn.Module) -> nn.Sequential | None:
    kind = next((each for each in _AXES if isinstance(module, each)), None)
    if kind is None or type(module) is kind or not _has_more(module) or _is_watched(module):
        return None
    norm: Any = kind.__new__(kind)
    nn.Module.__init__(norm)
    norm.__dict__.update(
        {key: value for key, value in vars(module).items() if key in kind.__constants__ or key == "training"}
    )
    norm._parameters, norm._buffers = dict(module._parameters), dict(module._buffers)
    if norm._parameters.keys() != {"weight", "bias"} or "norm" in dict(module.named_children()):
        return None  # it computes with more than a batch norm has
    parts = nn.Sequential(OrderedDict(norm=norm, **dict(module.named_children())))
    return parts.train(module.training) if _compute_the_same(module, parts, _AXES[kind]) else None


def _is_watched(module: nn.Module) -> bool:
    """Tell whether something else is called with it, or changes it while it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or hasattr(module, "parametrizations")


def _compute_the_same(module: nn.Module, parts: nn.Sequential, axes: int) -> bool:
    one, other = (deepcopy(each).eval() for each in (module, parts))
    like = next(value for value in (*module.parameters(), *module.buffers()) if value.is_floating_point())
    if like.is_meta:  # there are no values to tell it by
        return False
    generator = torch.Generator().manual_seed(0)
    channels = int(module.num_features)  # type: ignore[arg-type]
    values = 3 * torch.randn(_SAMPLES, channels, *(_POSITIONS,) * axes, generator=generator).to(like)
    try:
        with torch.no_grad():
            found, expected = one(values.clone()), other(values.clone())
    except Exception:  # whatever somebody's forward raises of such values
        return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
