r"""What a network computes on its way to its outputs, beside what the network that it comes from computes there.

The features of a network are what its blocks return, and its activations outside of blocks; its outputs count as one
more. With :math:`F_l` the values of one of :math:`L` features, :math:`F'_l` those of the other network on the same
inputs, the distance of the two networks is

.. math:: \frac{1}{L} \sum_l \frac{\mathrm{mean}\,(F_l - F'_l)^2}{\mathrm{var}\,F'_l}.

A network that is trained to be near needs no labels (see Wang and Wu, "Practical network acceleration with tiny sets",
CVPR 2023, where the last features are followed).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.sites.blocks import Block
from lightning_easier.support.calls import call, copies
from lightning_easier.support.hooks import HookOfOneModel
from lightning_easier.support.inference import evaluation_mode, tensors_in

# So many places tell how near two networks are: all of a deep one would take more time to compare than to compute.
_MOST = 16
_OUTPUTS = "outputs"
# Of a feature that does not vary, the difference is taken as it is.
_SMALLEST_VARIANCE = 1e-12


class Features:
    """Notes what some modules of a network return while it runs.

    Args:
        model: The network.
        names: Names of the modules.

    Attributes:
        values: Name -> what it has returned since :meth:`forget`, the first tensor of it, as it was then.
        repeated: Names of those that were called again since.
        paused: Whether what runs now is not noted.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self.repeated: set[str] = set()
        self.paused = False
        self._modules = {name: model.get_submodule(name) for name in names}
        self._handles: list[RemovableHandle] = []

    def are_of(self, model: nn.Module, names: Sequence[str]) -> bool:
        """Tell whether they are those of some modules of a model, as it is now."""
        now = {name: model.get_submodule(name) for name in names}
        return now == self._modules

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if self._handles:
            return
        for name, module in self._modules.items():

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._note(name, output)

            self._handles.append(module.register_forward_hook(HookOfOneModel(note)))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def __enter__(self) -> "Features":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def forget(self) -> None:
        """Forget what was noted."""
        self.values, self.repeated = {}, set()

    def taken(self) -> dict[str, Tensor]:
        """Return what was noted of modules that were called once, and forget all."""
        values = {name: value for name, value in self.values.items() if name not in self.repeated}
        self.forget()
        return values

    def _note(self, name: str, output: Any) -> None:
        if self.paused:
            return
        if name in self.values:
            self.repeated.add(name)
            return
        value = next((each for each in tensors_in(output) if each.is_floating_point()), None)
        if value is not None:
            self.values[name] = value.clone()  # what comes next may write into it


def places_of_features(blocks: Sequence[Block], activations: Sequence[str]) -> list[str]:
    """Return names of modules that may tell what a network computes on its way.

    Args:
        blocks: Its blocks and branches.
        activations: Names of its activations.
    """
    outer = [block.name for block in blocks if block.leaves == "identity" and block.inside is None]
    return [*outer, *(name for name in activations if not any(name.startswith(f"{block}.") for block in outer))]


def same_places(model: nn.Module, dense: nn.Module, names: Iterable[str]) -> list[str]:
    """Return which modules are at the same place in a changed network and in the one it comes from.

    A block is there whatever has taken its place; an activation that has become something else returns another value.

    Args:
        model: The changed network.
        dense: The network as it was given.
        names: Names of blocks and activations of it.
    """

    def is_same(name: str) -> bool:
        before, now = dense.get_submodule(name), _module_at(model, name)
        return now is not None and (any(True for _ in before.children()) or type(now) is type(before))

    return [name for name in names if is_same(name)]


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def common_features(model: nn.Module, dense: nn.Module, names: Iterable[str], arguments: Sequence[Tensor]) -> list[str]:
    """Return which modules return the same feature in a changed network and in the one it comes from.

    They are called once in either, and return values of the same shape. Of many some are taken, the last among them.

    Args:
        model: The changed network.
        dense: The network as it was given.
        names: Names of modules that may be compared, those of activations among them.
        arguments: Example inputs.

    Returns:
        Names, in the order in which the modules of ``dense`` return.
    """
    asked = same_places(model, dense, names)
    noted = []
    for network in (dense, model):
        with evaluation_mode(network), Features(network, asked) as features:
            call(network, copies(arguments))
            noted.append({name: value.shape for name, value in features.taken().items()})
    before, now = noted
    common = [name for name, shape in before.items() if now.get(name) == shape]
    if len(common) <= _MOST:
        return common
    return [common[(number + 1) * len(common) // _MOST - 1] for number in range(_MOST)]


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Return the mean squared difference of features in shares of their variance, over all of them; a scalar.

    Args:
        found: Name -> the feature of a network.
        wanted: Name -> what it is to be near to. What is not among them is left out.
    """
    parts = []
    for name, value in found.items():
        goal = wanted.get(name)
        if goal is not None and goal.shape == value.shape:
            wide = torch.promote_types(goal.dtype, torch.float32)
            value, goal = value.to(wide), goal.to(wide)
            variance = goal.var(correction=0)
            scale = torch.where(variance > _SMALLEST_VARIANCE, variance, 1.0)
            parts.append((value - goal).square().mean() / scale)
    return torch.stack(parts).mean() if parts else torch.zeros(())


class FeatureDistance:
    """Tells how far what a changed network computes is from what the network as given computes.

    Args:
        model: The changed network.
        dense: The network as it was given; it is run without gradients.
        names: Names of the modules whose features are compared, beside the outputs.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, names: Sequence[str]) -> None:
        self._networks = model, dense
        self._features = Features(model, names), Features(dense, names)
        self._stack = ExitStack()

    def __enter__(self) -> "FeatureDistance":
        for each in self._features:
            self._stack.enter_context(each)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, arguments: Sequence[Tensor]) -> Tensor:
        """Return the distance on one batch, with its gradient where gradients are on.

        Args:
            arguments: The forward's positional arguments.
        """
        (model, dense), (found, wanted) = self._networks, self._features
        for each in self._features:
            each.forget()
        with torch.no_grad():
            goal = call(dense, copies(arguments))
        made = call(model, copies(arguments))
        return distance({**found.taken(), **_named(made)}, {**wanted.taken(), **_named(goal)})


def _named(outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a network by names that no module has."""
    floats = [each for each in tensors_in(outputs) if each.is_floating_point()]
    return {f"{_OUTPUTS}:{number}": value for number, value in enumerate(floats)}
