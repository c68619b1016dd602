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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.fit.drift import as_matrices, drift_of, outputs_of
from lightning_easier.collapsing.fit.enough import FEWEST_VALUES
from lightning_easier.support.caches import values_in_caches
from lightning_easier.support.calls import call, copies
from lightning_easier.support.finite import is_finite
from lightning_easier.support.forwards import computing
from lightning_easier.support.hooks import HookOfOneModel, first_tensor
from lightning_easier.support.inference import evaluation_mode

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
        """Measure a batch ``(N, C, *)``, on a CPU in parts that stay in its cache: each value is fetched once."""
        value = value.detach()
        value = value if value.dtype == torch.float64 else value.float()
        by_position = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        rows = value.movedim(1, -1).flatten(1, 2) if by_position else value.reshape(*value.shape[:2], -1)
        positions = 1 if by_position else 2  # the axis
        center = rows[0].mean(positions - 1)  # of what is far from zero the squares would tell little
        origin = center if by_position else center[:, None]
        count = rows.shape[0] * rows.shape[positions]
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        for part in rows.split(_samples_in_cache(rows)):
            part = part - origin
            sums.append(_wide(part.sum(positions)).sum(0))
            if by_position:
                squares.append(_wide(part.square_().sum(positions)).sum(0))
            else:  # norms of rows take a tenth of the time of `torch.var_mean` over several axes
                squares.append(_wide(torch.linalg.vector_norm(part, dim=positions)).square().sum(0))
        mean, square = (torch.stack(each).sum(0) / count for each in (sums, squares))
        return cls(mean + _wide(center), (square - mean.square()).clamp(min=0), len(value))


def _samples_in_cache(rows: Tensor) -> int:
    """Return how many samples are summed up at a time: on an accelerator all."""
    return max(1, values_in_caches() // max(1, rows[0].numel())) if rows.device.type == "cpu" else len(rows)


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
    if not _norms(model):
        return None
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
            def hook(norm: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                value = first_tensor(arguments, named)
                if value.ndim < 2 or value.numel() // max(value.shape[1], 1) < FEWEST_VALUES:
                    too_few.add(name)
                else:
                    read[name].append(_Statistics.of(value))

            return hook

        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            for name, norm in norms.items():
                stack.callback(norm.register_forward_pre_hook(HookOfOneModel(note(name)), with_kwargs=True).remove)
            for arguments in batches if norms else ():
                call(model, copies(arguments))
        self._computed: dict[str, list[_Computed]] = {}
        self._wanted: dict[str, _Computed] = {}
        for name, parts in read.items():
            if name not in too_few and len(parts) == len(batches):
                self._computed[name] = [_Computed.by(norms[name], part) for part in parts]
                self._wanted[name] = _Computed.by(norms[name], _pooled(parts))
        self.names = tuple(self._computed)

    @contextmanager
    def matching(
        self, model: nn.Module, kept: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator[dict[str, list[_Statistics]]]:
        """Have what the norms of a changed model compute corrected while it runs on the same batches, once, in order.

        Args:
            model: The changed model, in eval mode; it is not changed itself.
            kept: Name of a norm -> which of its channels are left, where some are gone.

        Yields:
            Name of a norm -> what it has read of each batch, which is filled by the runs.
        """
        norms = {
            name: norm
            for name, norm in _norms(model).items()
            if name in self._computed and norm.num_features == len(self._wanted[name].of(kept.get(name)).mean)
        }
        read: dict[str, list[_Statistics]] = {name: [] for name in norms}

        def corrected(name: str, norm: Any) -> Callable[..., Tensor]:
            forward, parts, computed = norm.forward, read[name], self._computed[name]

            def run(*arguments: Any, **named: Any) -> Tensor:
                value = first_tensor(arguments, named)
                if len(parts) == len(computed):  # called more often than before
                    result: Tensor = forward(value)
                    return result
                parts.append(_Statistics.of(value))
                scale, offset = _Computed.by(norm, parts[-1]).correction(computed[len(parts) - 1].of(kept.get(name)))
                weight, bias = scale * _wide(norm.weight), scale * _wide(norm.bias) + offset
                return F.batch_norm(
                    value, norm.running_mean, norm.running_var, weight.to(norm.weight), bias.to(norm.bias), eps=norm.eps
                )

            return run

        with computing({norm: corrected(name, norm) for name, norm in norms.items()}):
            yield read

    @torch.no_grad()
    def match(
        self,
        model: nn.Module,
        kept: Mapping[str, Tensor] = MappingProxyType({}),
        run: Callable[[Sequence[Tensor]], Any] | None = None,
    ) -> "Matched":
        """Have the norms that are left in a changed model compute what they computed, in place, in one pass.

        What a norm computes on a batch is corrected before the next reads it, by what it computed on the same batch as
        given: so all are matched at once.

        Args:
            model: The changed model.
            kept: Name of a norm -> which of its channels are left, where some are gone.
            run: Runs the model on one batch; norms that it does not get to stay as they are. All of it by default.

        Returns:
            What can undo it.
        """
        run = partial(_whole, model) if run is None else run
        with evaluation_mode(model), self.matching(model, kept) as read:
            returned = [run(arguments) for arguments in self._batches]
        norms = _norms(model)
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
                tensors = _tensors_of(norm)
                before.append((tensors, [tensor.clone() for tensor in tensors]))
                for tensor, value in zip(tensors, new, strict=True):
                    tensor.copy_(value)
        return Matched(before, returned)


def _whole(model: nn.Module, arguments: Sequence[Tensor]) -> Any:
    return call(model, copies(arguments))


class Matched(NamedTuple):
    """What :meth:`NormsBefore.match` has changed.

    Attributes:
        before: The tensors, and the values that they had.
        returned: What the model has returned for each batch, as its norms were corrected on the way.
    """

    before: list[tuple[list[Tensor], list[Tensor]]]
    returned: list[Any]

    @torch.no_grad()
    def undo(self) -> None:
        """Give the norms the values that they had."""
        for tensors, values in self.before:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


class MatchedNorms:
    """Keeps the batch norms of a model matched to what they computed before, while other things in it come and go.

    Args:
        model: The model, in eval mode, as it is before it is changed.
        dense: The model as given.
        batches: The forward's positional arguments, for each batch.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._model, self._batches = model, batches
        self._before = NormsBefore(dense, batches)
        self._given = self._values()
        self._is_matched = True  # what is as it was is

    def run(self, runs: Callable[[], list[Any]], kept: Mapping[str, Tensor] = MappingProxyType({})) -> list[Any]:
        """Return what a run of the changed model on all batches returns if its norms are matched on the way.

        They are not where they were left as they were at the last match, since the outputs were nearer so: what is
        compared with what the model returned then has to be computed alike.

        Args:
            runs: Runs it.
            kept: As in :meth:`NormsBefore.match`. Other norms with fewer channels than before are left: they compute
                what they did, where one thing alone was changed.
        """
        if not self._before.names or not self._is_matched:
            return runs()
        with self._before.matching(self._model, kept):
            return runs()

    def match(self, wanted: Sequence[Tensor], kept: Mapping[str, Tensor]) -> list[Tensor]:
        """Match the norms of the changed model in place, if its outputs come nearer by it.

        Args:
            wanted: What the model as given returns, see :func:`~lightning_easier.collapsing.fit.drift.outputs_of`.
            kept: As in :meth:`NormsBefore.match`.

        Returns:
            What it returns then.
        """
        outputs = outputs_of(self._model, self._batches)
        if not self._before.names:
            return outputs
        matched = self._before.match(self._model, kept)
        # Of one batch, what was returned on the way is what is returned now
        is_one = len(self._batches) == 1
        nearer = as_matrices(matched.returned) if is_one else outputs_of(self._model, self._batches)
        self._is_matched = drift_of(nearer, wanted) < drift_of(outputs, wanted)
        if self._is_matched:
            return nearer
        matched.undo()
        return outputs

    def match_alike(self, run: Callable[[Sequence[Tensor]], Any], kept: Mapping[str, Tensor]) -> None:
        """Match the norms that a run gets to, if they were at the last match; the others get the values as given.

        Args:
            run: Runs the model on one batch, as far as is wanted.
            kept: As in :meth:`NormsBefore.match`.
        """
        was_matched = self._is_matched
        self.restore()
        self._is_matched = was_matched
        if was_matched and self._before.names:
            self._before.match(self._model, kept, run)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the norms the values that they had before the model was changed."""
        for tensor, value in self._given:
            tensor.copy_(value)
        self._is_matched = True

    def forget(self) -> None:
        """Take the values that the norms have now for those before, since something else has changed them."""
        self._given = self._values()

    def _values(self) -> list[tuple[Tensor, Tensor]]:
        norms = _norms(self._model)
        tensors = [tensor for name in self._before.names if name in norms for tensor in _tensors_of(norms[name])]
        return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _tensors_of(norm: Any) -> list[Tensor]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def _norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms with statistics, and a scale and an offset that are nobody else's, by name.

    One whose forward was replaced computes something else.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    named: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if type(m) in BATCH_NORMS]
    return {
        name: norm
        for name, norm in named
        if norm.running_mean is not None
        and norm.affine
        and "forward" not in vars(norm)
        and holders[id(norm.weight)] == holders[id(norm.bias)] == 1
    }
