r"""Have the batch norms of a changed model compute what they computed before, as far as mean and deviation go.

What is fitted varies less than what it was fitted to, and so does all that comes after it. Each batch norm that is left
gets the statistics of what it reads now, and a scale and an offset with which each channel of what it computes has the
mean and the deviation that it had in the model as given:

.. math:: \beta' = \mu, \qquad \gamma' = \gamma \, \frac{\sigma}{\hat\sigma} \sqrt{\frac{v' + \epsilon}{v + \epsilon}}

with :math:`\mu, \sigma` of its output as given, :math:`\hat\sigma` of its output now, :math:`v` its running variance
and :math:`v'` that of what it reads now. A model that was not changed stays as it is. Source: Jordan et al., REPAIR
(arXiv 2211.08403, section 3), there for networks that were averaged.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.fit.drift import drift_of, outputs_of
from lightning_easier.support.calls import call, copies
from lightning_easier.support.finite import is_finite
from lightning_easier.support.hooks import HookOfOneModel
from lightning_easier.support.inference import evaluation_mode

# Of each channel in a batch: fewer tell too little of its mean and deviation.
_FEWEST_VALUES = 64
# By how much a channel is scaled up or down at most: a channel that hardly varies any more is mostly noise.
_MOST_SCALE = 4.0
# An offset below this share of the deviation is rounding.
_AS_IT_WAS = 1e-5


def _wide(value: Tensor) -> Tensor:
    """Return values in float64, where there is that."""
    return value.detach().to("cpu" if value.device.type in ("mps", "xla") else value.device, torch.float64)


class _Statistics(NamedTuple):
    """Mean and variance of each channel that a batch norm reads, shape ``(C,)`` each, float64.

    Attributes:
        mean: Over samples and positions.
        variance: Over samples and positions.
        samples: How many samples they are of.
    """

    mean: Tensor
    variance: Tensor
    samples: int

    @classmethod
    def of(cls, value: Tensor) -> "_Statistics":
        """Measure a batch ``(N, C, *)``."""
        axes = [axis for axis in range(value.ndim) if axis != 1]
        value = value.detach()
        value = value if value.dtype == torch.float64 else value.float()
        variance, mean = torch.var_mean(value, axes, correction=0)
        return cls(_wide(mean), _wide(variance), len(value))


def _pooled(parts: Sequence[_Statistics]) -> _Statistics:
    """Return the statistics of several batches together."""
    samples = sum(part.samples for part in parts)
    mean = sum(part.mean * part.samples for part in parts) / samples
    square = sum((part.variance + part.mean.square()) * part.samples for part in parts) / samples
    return _Statistics(mean, (square - mean.square()).clamp(min=0), samples)  # type: ignore[union-attr, arg-type]


class _Computed(NamedTuple):
    """Mean and deviation of each channel that a batch norm computes."""

    mean: Tensor
    deviation: Tensor

    def of(self, channels: Tensor | None) -> "_Computed":
        """Return those of some channels; all of them for None."""
        return self if channels is None else _Computed(*(value[channels.to(value.device)] for value in self))

    @classmethod
    def by(cls, norm: Any, read: _Statistics) -> "_Computed":
        """Tell what a norm in eval mode makes of what it reads."""
        scale = _wide(norm.weight) / (_wide(norm.running_var) + norm.eps).sqrt()
        mean = scale * (read.mean - _wide(norm.running_mean)) + _wide(norm.bias)
        return cls(mean, scale.abs() * read.variance.sqrt())

    def correction(self, wanted: "_Computed") -> tuple[Tensor, Tensor]:
        """Return the scale and the offset that make this what is wanted."""
        is_some = (self.deviation > 0) & (wanted.deviation > 0)
        scale = torch.where(is_some, wanted.deviation / self.deviation, 1.0).clamp(1 / _MOST_SCALE, _MOST_SCALE)
        return scale, wanted.mean - scale * self.mean


def match_norms(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> "Matched | None":
    """Have the batch norms of a changed model compute as in the model as given, if that brings its outputs nearer.

    Args:
        model: The changed model, in eval mode; its norms are changed in place.
        dense: The model as given, in eval mode.
        batches: The forward's positional arguments, for each batch.
        kept: Name of a norm -> which of its channels are left, where some are gone.

    Returns:
        What can undo it; None if nothing was changed.
    """
    wanted = outputs_of(dense, batches)
    before = drift_of(outputs_of(model, batches), wanted)
    matched = NormsBefore(dense, batches).match(model, kept)
    if matched.before and drift_of(outputs_of(model, batches), wanted) < before:
        return matched
    matched.undo()
    return None


class NormsBefore:
    """What the batch norms of a model computed before it was changed.

    Args:
        model: The model as given, in eval mode.
        batches: The forward's positional arguments, for each batch.

    Attributes:
        names: Of the norms that can be matched: with statistics, scale and offset of their own, called once, with
            enough values in each batch.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._batches = batches
        norms = _norms(model)
        read: dict[str, list[_Statistics]] = {name: [] for name in norms}
        too_few: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            def hook(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                (value,) = arguments
                if value.ndim < 2 or value.numel() // max(value.shape[1], 1) < _FEWEST_VALUES:
                    too_few.add(name)
                else:
                    read[name].append(_Statistics.of(value))

            return hook

        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            for name, norm in norms.items():
                stack.callback(norm.register_forward_pre_hook(HookOfOneModel(note(name))).remove)
            for arguments in batches:
                call(model, copies(arguments))
        self._computed: dict[str, list[_Computed]] = {}
        self._wanted: dict[str, _Computed] = {}
        for name, parts in read.items():
            if name not in too_few and len(parts) == len(batches):
                self._computed[name] = [_Computed.by(norms[name], part) for part in parts]
                self._wanted[name] = _Computed.by(norms[name], _pooled(parts))
        self.names = tuple(self._computed)

    @torch.no_grad()
    def match(self, model: nn.Module, kept: Mapping[str, Tensor] = MappingProxyType({})) -> "Matched":
        """Have the norms that are left in a changed model compute what they computed, in place, in one pass.

        What a norm computes on a batch is corrected before the next reads it, by what it computed on the same batch as
        given: so all are matched at once.

        Args:
            model: The changed model.
            kept: Name of a norm -> which of its channels are left, where some are gone.

        Returns:
            What can undo it.
        """
        norms = {
            name: norm
            for name, norm in _norms(model).items()
            if name in self._computed and norm.num_features == len(self._wanted[name].of(kept.get(name)).mean)
        }
        read: dict[str, list[_Statistics]] = {name: [] for name in norms}

        def correct(name: str) -> Callable[..., Tensor]:
            def hook(norm: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                parts, computed = read[name], self._computed[name]
                if len(parts) == len(computed):  # called more often than before
                    return output
                parts.append(_Statistics.of(arguments[0]))
                scale, offset = _Computed.by(norm, parts[-1]).correction(computed[len(parts) - 1].of(kept.get(name)))
                shape = (1, -1, *[1] * (output.ndim - 2))
                return output * scale.to(output).view(shape) + offset.to(output).view(shape)

            return hook

        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            for name, norm in norms.items():
                stack.callback(norm.register_forward_hook(correct(name)).remove)
            for arguments in self._batches:
                call(model, copies(arguments))
        before = []
        for name, parts in read.items():
            norm = norms[name]
            if len(parts) != len(self._batches):  # the changed model does not call it any more
                continue
            now = _pooled(parts)
            computed = _Computed.by(norm, now)
            wanted = self._wanted[name].of(kept.get(name))
            scale, offset = computed.correction(wanted)
            is_off = ((scale - 1).abs() > _AS_IT_WAS) | (offset.abs() > _AS_IT_WAS * computed.deviation)
            if not is_off.any():
                continue  # nothing before it was changed
            weight = _wide(norm.weight) * scale
            weight *= ((now.variance + norm.eps) / (_wide(norm.running_var) + norm.eps)).sqrt()
            new = weight, wanted.mean, now.mean, now.variance
            if is_finite(*new):
                tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
                before.append((tensors, [tensor.clone() for tensor in tensors]))
                for tensor, value in zip(tensors, new, strict=True):
                    tensor.copy_(value)
        return Matched(before)


class Matched(NamedTuple):
    """What :meth:`NormsBefore.match` has changed.

    Attributes:
        before: The tensors, and the values that they had.
    """

    before: list[tuple[list[Tensor], list[Tensor]]]

    @torch.no_grad()
    def undo(self) -> None:
        """Give the norms the values that they had."""
        for tensors, values in self.before:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms with statistics, and a scale and an offset that are nobody else's, by name."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    named: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if type(m) in BATCH_NORMS]
    return {
        name: norm
        for name, norm in named
        if norm.running_mean is not None and norm.affine and holders[id(norm.weight)] == holders[id(norm.bias)] == 1
    }
