"""The layers that are pruned, and which of their weights may go without cutting every way from input to output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_easier.measure.switching import SwitchedAffine
from lightning_easier.pruning.methods.budget import LayerState, total_budget
from lightning_easier.sites.feeding import FeedingWeight
from lightning_easier.sites.paths import Paths
from lightning_easier.support.calibration import tell


@dataclass(frozen=True)
class Layer:
    """The weights that feed an activation.

    Attributes:
        name: The activation; the first, where several have them in common.
        entropies: Of the neurons of each of these activations, in bits.
        weights: The weights.
        values: Their values.
        magnitudes: Their magnitudes, one after the other, on the CPU.
        order: The places of those that are not zero, the smallest first.
    """

    name: str
    entropies: tuple[Tensor, ...]
    weights: tuple[FeedingWeight, ...]
    values: tuple[Tensor, ...]
    magnitudes: Tensor = field(init=False, repr=False)
    order: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        magnitudes = torch.cat([value.detach().abs().flatten() for value in self.values]).cpu()
        order = magnitudes.argsort(stable=True)
        object.__setattr__(self, "magnitudes", magnitudes)
        object.__setattr__(self, "order", order[int((magnitudes == 0).sum()) :])

    @property
    def left(self) -> int:
        """How many weights are not zero."""
        return len(self.order)

    @property
    def mean(self) -> float:
        """Mean magnitude of those that are not zero."""
        return float(self.magnitudes.double().sum()) / self.left if self.left else 0.0

    def mean_of_neurons(self, neurons: int) -> Tensor:
        """Return the mean magnitude of the weights of each neuron; that of all where rows are no neurons."""
        rows = [
            value.detach().abs().cpu().double().movedim(weight.neuron_dim, 0).flatten(1)
            for weight, value in zip(self.weights, self.values, strict=True)
        ]
        if any(len(each) != neurons for each in rows):  # after a flatten, a concatenation, groups of a transposed one
            return torch.full((neurons,), self.mean, dtype=torch.float64)
        together = torch.cat(rows, 1)
        return together.sum(1) / (together != 0).sum(1).clamp(min=1)

    def left_after(self, count: int) -> dict[str, Tensor]:
        """Return which weights are not zero when so many of the smallest have gone: parameter name -> bool."""
        left = self.magnitudes != 0
        left[self.order[:count]] = False
        parts = left.split([value.numel() for value in self.values])
        return {
            weight.name: part.view(value.shape)
            for weight, value, part in zip(self.weights, self.values, parts, strict=True)
        }


def smallest(layers: Sequence[Layer], amount: float) -> list[int]:
    """Return how many of each layer are among the smallest of all layers together."""
    budget = total_budget([LayerState(0.0, layer.left) for layer in layers], amount)
    sizes = torch.cat([layer.magnitudes[layer.order] for layer in layers]) if layers else torch.empty(0)
    owners = torch.repeat_interleave(torch.tensor([layer.left for layer in layers], dtype=torch.long))
    chosen = owners[sizes.argsort(stable=True)[:budget]]
    return torch.bincount(chosen, minlength=len(layers)).tolist()


def left_of(layers: Sequence[Layer], counts: Sequence[int]) -> dict[str, Tensor]:
    """Return which weights of layers are left when so many of each have gone: parameter name -> bool."""
    found: dict[str, Tensor] = {}
    for layer, count in zip(layers, counts, strict=True):
        found |= layer.left_after(count)
    return found


class PathGuard:
    """Sees to it that a way is left from the input of a model to its output.

    Args:
        paths: Tells whether there is one.
        nonzero: Parameter name -> which of its elements are not zero now.
    """

    def __init__(self, paths: Paths, nonzero: Mapping[str, Tensor]) -> None:
        self._paths = paths
        self._nonzero = nonzero
        # Only ways that are certain, unless there is none as it is
        self._certain = paths.is_open(nonzero, certain=True)
        self._passing: dict[str, Tensor] = {}  # activation -> which of its neurons its stand-in will pass on

    def passing(self, linear: Mapping[str, SwitchedAffine]) -> dict[str, SwitchedAffine]:
        """Return those of the activations that may become linear: not where every neuron on the way would be zero.

        Args:
            linear: Name -> what would take its place.
        """
        kept = {}
        for name, switched in sorted(linear.items(), key=lambda item: -int((item[1].affine.scale != 0).sum())):
            passes = {**self._passing, name: switched.affine.scale != 0}
            if self._is_known(name):
                is_open = self._paths.is_open(self._nonzero, passes, certain=self._certain)
            else:
                is_open = bool(passes[name].any())
            if is_open:
                kept[name], self._passing = switched, passes
        return {name: kept[name] for name in linear if name in kept}

    def hold_back(self, layers: Sequence[Layer], counts: Sequence[int]) -> tuple[list[int], list[str]]:
        """Hold back what would cut every way.

        Layer by layer, those that lose the least first, as many go as those before have left a way for. Fewer pruned
        weights never cut a way, so how many is found by bisection.

        Args:
            layers: The layers.
            counts: How many weights of each are to go.

        Returns:
            How many may, and what there is to say of those that may not.

        Warns:
            UserWarning: If no way is left as it is; then nothing is pruned.
        """
        if not any(counts):
            return list(counts), []
        # no layer is emptied of which it is not known where its values go
        most = [layer.left if self._is_known(layer.name) else max(layer.left - 1, 0) for layer in layers]
        wanted, counts = counts, [min(count, limit) for count, limit in zip(counts, most, strict=True)]
        said = list(_said_of(layers, wanted, counts, "no way from the input to the output can be followed through it"))
        if not self._paths.is_known:
            return counts, said
        if not self._is_open({}):
            tell("Nothing is pruned any more: no output of the model depends on its input, since weights are zero.")
            return [0] * len(layers), []
        if self._is_open(left_of(layers, counts)):
            return counts, said
        kept = [0] * len(layers)
        left = left_of(layers, kept)
        for place in sorted(range(len(layers)), key=lambda place: counts[place] / max(layers[place].left, 1)):
            kept[place] = self._most(layers[place], counts[place], left)
            left |= layers[place].left_after(kept[place])
        return kept, [*said, *_said_of(layers, counts, kept, "else no way would be left from input to output")]

    def _most(self, layer: Layer, wanted: int, left: Mapping[str, Tensor]) -> int:
        """Return how many weights of one layer may go with those of the others; with none of them a way is left.

        Args:
            layer: The layer.
            wanted: How many are to go.
            left: Which weights of the layers are left.
        """
        if self._is_open({**left, **layer.left_after(wanted)}):
            return wanted
        low, high = 0, wanted
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._is_open({**left, **layer.left_after(middle)}) else (low, middle)
        return low

    def _is_open(self, left: Mapping[str, Tensor]) -> bool:
        return self._paths.is_open({**self._nonzero, **left}, self._passing, certain=self._certain)

    def _is_known(self, name: str) -> bool:
        return self._paths.is_known and self._paths.covers(name)


def _said_of(layers: Sequence[Layer], counts: Sequence[int], kept: Sequence[int], why: str) -> Iterator[str]:
    for layer, wanted, count in zip(layers, counts, kept, strict=True):
        if count < wanted:
            yield f"{wanted - count:,} held back before `{layer.name}`: {why}"
