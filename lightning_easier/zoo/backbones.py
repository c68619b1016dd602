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
from lightning_easier.zoo.plain_weights import plain_weights
from lightning_easier.zoo.small_images import mobilenet_v2_small_strides, resnet18_small_stem

_OWN: dict[str, Callable[..., nn.Module]] = {
    "fused_resnet": FusedResNet,
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "resnet18_small_stem": resnet18_small_stem,
    "mobilenet_v2_small_strides": mobilenet_v2_small_strides,
}


def build_backbone(name: str, num_classes: int, *, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """Build a classification network by name.

    Args:
        name: One of our own (``"fused_resnet"``, ``"cifar_resnet20"``), of torchvision (``"resnet18"``) or of timm
            (``"timm/convnext_atto"``, or without the prefix where torchvision has none of that name).
        num_classes: Number of classes.
        weights: Name of pretrained weights of torchvision (``"DEFAULT"``, ``"IMAGENET1K_V1"``), which are downloaded
            where they are not in torch's cache, and read as plain data. The last layer is new if these are of other
            classes. timm's are asked for by ``pretrained=True``.
        **kwargs: Further arguments of the network, such as ``in_channels``.

    Raises:
        ValueError: If there is no network of this name, it has no such weights, or their file holds more than tensors
            and plain data.
        ModuleNotFoundError: If timm is asked for and not installed, or torchvision for a network that is made of its.
    """
    torchvisions: list[str] = []
    if name not in _OWN and find_spec("torchvision") is not None:
        from torchvision import models

        torchvisions = models.list_models()
        if name in torchvisions:
            with plain_weights(name):
                return _torchvisions(models, name, num_classes, weights, kwargs)
    if weights is not None:
        raise ValueError(
            f"Expected argument `weights` to be left out with {name!r}, which is none of torchvision's, but got "
            f"{weights!r}; timm's are asked for by `pretrained=True` (in `backbone_args` of a config)"
        )
    if name in _OWN:
        return _OWN[name](num_classes=num_classes, **kwargs)
    wanted = name.removeprefix("timm/")
    if name.startswith("timm/") or find_spec("timm") is not None:
        timm = needed("timm", f"The network {name!r}")
        if timm.is_model(wanted):
            with plain_weights(name):
                return timm.create_model(wanted, num_classes=num_classes, **kwargs)
    known = [*_OWN, *torchvisions]
    raise ValueError(
        f"Expected argument `name` to be a network of lightning_easier {list(_OWN)}, torchvision or timm, but got "
        f"{name!r}. Did you mean one of {get_close_matches(wanted, known) or known[:5]}?"
        f"{'' if torchvisions else ' (torchvision is not installed.)'}"
    )


def _torchvisions(models: Any, name: str, num_classes: int, weights: str | None, kwargs: dict[str, Any]) -> nn.Module:
    """Build a network of torchvision, which puts weights into one with as many classes as they have only."""
    if weights is None:
        return models.get_model(name, num_classes=num_classes, **kwargs)
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(
            f"Expected argument `weights` to be one of {list(known.__members__)} for {name!r}, but got {weights!r}"
        )
    if len(known[weights].meta["categories"]) == num_classes:
        # Its own function does more than load: GoogLeNet's has the input transformed, DenseNet's renames keys
        return models.get_model(name, weights=known[weights], **kwargs)
    model: nn.Module = models.get_model(name, num_classes=num_classes, **kwargs)
    pretrained = known[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
    head = list(model.state_dict())[-1].rpartition(".")[0]
    for key in [key for key in pretrained if key.startswith(f"{head}.")]:
        del pretrained[key]
    try:
        loaded = model.load_state_dict(pretrained, strict=False)
    except RuntimeError as error:  # of other shapes
        raise ValueError(f"Expected argument `weights` to fit {name!r}, but {weights!r} do not: {error}") from error
    unfit = [key for key in loaded.missing_keys if not key.startswith(f"{head}.")] + loaded.unexpected_keys
    if unfit:
        raise ValueError(f"Expected argument `weights` to fit {name!r}, but {weights!r} do not: they differ in {unfit}")
    return model
