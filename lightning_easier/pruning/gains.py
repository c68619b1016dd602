"""What the removal of an activation saves: the price of the operators around it, before and after they merge."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.collapsing import CollapseError, collapse
from lightning_easier.collapsing.fit.fit_prices import ChainPrices
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.sites.activations import isolate_activations
from lightning_easier.sites.neighbourhood import Meeting
from lightning_easier.structure.linearize import linearize
from lightning_easier.support.hooks import HookOfOneModel, input_of
from lightning_easier.support.inference import evaluation_mode, random_like
from lightning_easier.support.timing import LatencyTable

Gain = Literal["latency", "macs"]
GAINS: tuple[Gain, ...] = ("latency", "macs")


class ShapeProbe:
    """Own the hooks that note the shapes of what the operators before activations read.

    Args:
        model: A model whose activations are isolated.
        sites: Names of the activations.

    Attributes:
        meetings: Site -> the operators that would meet there.
        shapes: Site -> shape of the input of the first of them, once it was called.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str]) -> None:
        with evaluation_mode(model):
            self.meetings = FittableChains(model, sites).meetings
        self.shapes: dict[str, torch.Size] = {}
        self._model = model
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks."""
        for site, meeting in self.meetings.items():

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: str = site) -> None:
                value = input_of(args, kwargs)
                if site not in self.shapes and value is not None and value.numel():  # else it tells nothing
                    self.shapes[site] = value.shape

            first = self._model.get_submodule(meeting.first)
            self._handles.append(first.register_forward_pre_hook(HookOfOneModel(note), with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Gains:
    """Prices what the removal of activations saves, each kind of neighbourhood once.

    Args:
        gain: ``"latency"`` (seconds, measured on the device of the model) or ``"macs"`` (multiply-accumulates).
        shift_padding: Whether paddings move with a removal, see :func:`~lightning_easier.linearize`.

    Attributes:
        prices: Tells what modules cost.
    """

    def __init__(self, gain: Gain, shift_padding: bool) -> None:
        self.gain: Gain = gain
        self._table = LatencyTable()
        self.prices = ChainPrices(gain, self._table)
        self._shift_padding = shift_padding
        self._known: dict[tuple[str, torch.Size], float] = {}

    def of_merge(self, meeting: Meeting, activation: nn.Module, shape: torch.Size) -> float:
        """Return what an exact collapse saves if an activation becomes linear; 0 where it merges nothing.

        Args:
            meeting: The operators that meet then.
            activation: The activation.
            shape: Of the input of the first of them.
        """
        first, second = meeting.operators
        assert first is not None
        assert second is not None
        between = [module for module in meeting.between if module is not None]
        dense = nn.Sequential(*(deepcopy(module) for module in (first, *between, activation, second))).eval()
        for module in dense.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        key = str(dense), shape
        if key not in self._known:
            weight: Tensor = first.weight  # type: ignore[assignment]
            self._known[key] = self._merged(dense, random_like(weight, shape))
        return self._known[key]

    def _merged(self, dense: nn.Sequential, value: Tensor) -> float:
        (site,) = isolate_activations(dense, gates=True)
        linear = linearize(deepcopy(dense), [site], shift_padding=self._shift_padding)
        try:
            before, after = (
                collapse(model, value, objective=self.gain, latencies=self._table) for model in (dense, linear)
            )
        except CollapseError:
            return 0.0
        if not after.report.merges:  # the activation's own time, which is less than the noise of the others'
            return 0.0
        priced = self.prices.of({"before": before.model, "after": after.model}, value.shape, value)
        return max(0.0, priced["before"] - priced["after"])
