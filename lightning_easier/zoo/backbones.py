"""Networks by name: our own, and those of torchvision and timm where they are installed."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_easier.zoo.cifar_resnet import CifarResNet
from lightning_easier.zoo.fused_resnet import FusedResNet
from lightning_easier.zoo.optional import needed

_OWN: dict[str, Callable[..., nn.Module]] = {
    "fused_resnet": FusedResNet,
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
}


def build_backbone(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a classification network by name.

    Args:
        name: One of our own (``"fused_resnet"``, ``"cifar_resnet20"``), of torchvision (``"resnet18"``) or of timm
            (``"timm/convnext_atto"``, or without the prefix where torchvision has none of that name).
        num_classes: Number of classes.
        **kwargs: Further arguments of the network, such as ``in_channels`` or torchvision's ``weights``.

    Raises:
        ValueError: If there is no network of this name.
        ModuleNotFoundError: If timm is asked for and not installed.
    """
    if name in _OWN:
        return _OWN[name](num_classes=num_classes, **kwargs)
    torchvisions: list[str] = []
    if find_spec("torchvision") is not None:
        from torchvision import models

        torchvisions = models.list_models()
        if name in torchvisions:
            return models.get_model(name, num_classes=num_classes, **kwargs)
    wanted = name.removeprefix("timm/")
    if name.startswith("timm/") or find_spec("timm") is not None:
        timm = needed("timm", f"The network {name!r}")
        if timm.is_model(wanted):
            return timm.create_model(wanted, num_classes=num_classes, **kwargs)
    known = [*_OWN, *torchvisions]
    raise ValueError(
        f"Expected argument `name` to be a network of lightning_easier {list(_OWN)}, torchvision or timm, but got "
        f"{name!r}. Did you mean one of {get_close_matches(wanted, known) or known[:5]}?"
        f"{'' if torchvisions else ' (torchvision is not installed.)'}"
    )
