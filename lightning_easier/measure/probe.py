"""Measure entropies with forward pre-hooks that leave nothing behind.

A pre-hook sees the pre-activation even where the rectifier works in place. It reduces the tensor to counts on the spot:
nothing is kept alive and no value is read back from a GPU until the entropies are asked for.

Samples whose pre-activations are not all finite are counted; :meth:`EntropyProbe.entropies` warns of them. NaN counts
neither as ON nor as OFF, and an affine is fitted without these samples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.hooks import RemovableHandle

from lightning_easier.measure.affines import AffineFit, AffineStatistics, affine_of, merged
from lightning_easier.measure.entropy import Sampler, StateCounts, entropy_of_counts
from lightning_easier.measure.moments import (
    Moments,
    batch_norms_before,
    error_likelihood,
    moments_after,
    moments_of,
)
from lightning_easier.measure.switching import States
from lightning_easier.sites.activations import ActivationSite, isolated_sites, planned_sites, unwrap
from lightning_easier.support.arguments import check_share
from lightning_easier.support.batches import BatchReader, InputsOf
from lightning_easier.support.calibration import check_batches, tell, tell_left_out, usable_batches
from lightning_easier.support.calls import mapped
from lightning_easier.support.finite import is_surely_finite
from lightning_easier.support.hooks import HookOfOneModel, input_of
from lightning_easier.support.inference import check_weights, device_of, evaluation_mode
from lightning_easier.support.processes import gather_from_processes
from lightning_easier.support.progress import over

_T = TypeVar("_T")


class EntropyProbe:
    """Own the hooks that count the states of activations, as a context manager.

    Args:
        sites: The activations to look at.
        neuron_dim: Axis of the neurons by name glob, where the one found is not the one wanted.
        sample: Share of the samples of each batch that is counted, in (0, 1]; they are drawn pseudo-randomly, by the
            number of the batch, so that every run draws the same.
        affines: Whether the sums for the affine that comes closest to each activation are taken as well.

    Attributes:
        reasons: Activation -> why it has no entropy, and no affine, though it was called.
        has_left_out: Whether samples were found that are not finite, once entropies or affines were asked for.

    Raises:
        ValueError: If a glob of ``neuron_dim`` matches no activation, or ``sample`` is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_easier.sites.activations import isolated_sites
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with EntropyProbe(isolated_sites(model)) as probe:
        ...     _ = model(torch.randn(8, 2))
        >>> list(probe.entropies())
        ['1']
    """

    def __init__(
        self,
        sites: Sequence[ActivationSite],
        neuron_dim: Mapping[str, int] | None = None,
        *,
        sample: float = 1.0,
        affines: bool = False,
    ) -> None:
        check_share("sample", sample)
        self.paused = False
        self._sites = list(sites)
        self._handles: list[RemovableHandle] = []
        self._sampler = None if sample == 1 else Sampler(sample)
        self._calls = dict.fromkeys((site.name for site in sites), 0)
        axes = neuron_dim or {}
        _check_axes(axes, sites)
        self._states = {site.name: StateCounts(site.axis(axes)) for site in sites}
        self._affines = {name: AffineStatistics(states.neuron_dim) for name, states in self._states.items() if affines}
        self._forget_samples()

    def _forget_samples(self) -> None:
        self._samples = dict.fromkeys(self._states, 0)
        self._left_out = {
            name: torch.zeros((), dtype=torch.int64, device=states.device) for name, states in self._states.items()
        }
        self._has_told = self.has_left_out = False
        self.reasons: dict[str, str] = {}

    def __enter__(self) -> "EntropyProbe":
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def names(self) -> list[str]:
        """The activations that are looked at, in execution order."""
        return list(self._states)

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if not self._handles:
            for site in self._sites:
                hook = HookOfOneModel(self._hook(site.name, self._states[site.name]))
                self._handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forget the counts."""
        self._calls = dict.fromkeys(self._calls, 0)
        for states in self._states.values():
            states.reset()
        for statistics in self._affines.values():
            statistics.reset()
        self._forget_samples()

    def to(self, device: torch.device) -> "EntropyProbe":
        """Move the counts to the device of the model, where a process that gets no batch has to have them too."""
        for states in self._states.values():
            states.to(device)
        for statistics in self._affines.values():
            statistics.to(device)
        self._left_out = {name: count.to(device) for name, count in self._left_out.items()}
        return self

    def counts(self) -> dict[str, dict[str, Any]]:
        """Return the counts over all processes, with one communication for all activations together.

        Every process has to call this.

        Returns:
            Name -> ``on`` and ``off``, int64 tensors of shape ``(neurons,)`` on the CPU, and ``calls``, how often the
            activation was called, on the process where that was most often. What was not called has no neurons.
            ``samples`` and ``left_out``: how many samples it was called with, and of how many not all values were
            finite. With ``affines``, besides, ``affine``, what :class:`AffineStatistics` has summed up.
        """
        if not self._states:
            return {}
        numbers = [[self._calls[name], self._samples[name]] for name in self._states]
        left_out = torch.stack([self._all_left_out(name) for name in self._states])
        table = torch.cat([torch.tensor(numbers, device=left_out.device), left_out.unsqueeze(1)], 1)
        of_processes = gather_from_processes([table, *(part for name in self._states for part in self._parts(name))])
        tables = torch.stack([process[0] for process in of_processes])
        calls, (samples, left_out) = tables[..., 0].amax(0), tables[..., 1:].sum(0).unbind(1)
        of_each = zip(self._states, calls.tolist(), samples.tolist(), left_out.tolist(), strict=True)
        parts = 3 if self._affines else 2
        return {
            name: {"calls": calls, "samples": samples, "left_out": left_out}
            | _put_together([process[1 + parts * place :][:parts] for process in of_processes])
            for place, (name, calls, samples, left_out) in enumerate(of_each)
        }

    def _all_left_out(self, name: str) -> Tensor:
        """Return how many samples this process has left out of one activation."""
        return self._left_out[name] + self._affines[name].left_out if self._affines else self._left_out[name]

    def _parts(self, name: str) -> list[Tensor]:
        """Return what this process has summed up of one activation: ON; OFF; sums for affines."""
        states = self._states[name]
        return [states.on, states.off, *([self._affines[name].sums] if self._affines else [])]

    def resume(self, counts: Mapping[str, Mapping[str, Any]], is_global_zero: bool = True) -> None:
        """Go on from what :meth:`counts` returned; one process takes all counts, since they will be summed."""
        for name, count in counts.items():
            self._calls[name] = count["calls"]
            if is_global_zero and count["on"].numel():
                self._samples[name] += count["samples"]
                self._left_out[name] = self._left_out[name] + count["left_out"]
                self._states[name].add(count["on"], count["off"])
                if name in self._affines and "affine" in count:
                    self._affines[name].add(count["affine"])

    def entropies(self) -> dict[str, float]:
        """Compute the entropy of each activation in bits, over all batches and processes, in execution order.

        Every process has to call this. Activations that were not called (auxiliary heads in eval mode) are left out,
        and those of which no sample was finite: nothing observed is not an entropy of zero.

        Raises:
            RuntimeError: If none was called.

        Warns:
            UserWarning: If samples were not finite, once.
        """
        counts = self._called()
        if self._states and not counts:
            raise RuntimeError(
                f"None of the {len(self._states)} activations {list(self._states)[:5]} was called while their "
                f"entropy was measured. Their model's forward has to run as it is now: code compiled earlier does "
                f"not see them (call `torch._dynamo.reset()`), nor does a step that calls other methods than forward."
            )
        return {
            name: float(entropy_of_counts(count["on"], count["off"]).mean())
            for name, count in counts.items()
            if name not in self.reasons
        }

    def affines(self) -> dict[str, AffineFit]:
        """Compute the affine that comes closest to each activation, over all batches and processes.

        Every process has to call this. Activations that were not called are left out, and those whose affine would not
        be finite.

        Warns:
            UserWarning: If samples were not finite, once, or an affine is not.
        """
        called = self._called()  # fills the reasons
        fits = {
            name: affine_of(count["affine"], self._affines[name].neuron_dim)
            for name, count in called.items()
            if name not in self.reasons
        }
        strange = [name for name, fit in fits.items() if not fit.is_finite_in(fit.scale.dtype)]
        if strange:
            tell(f"No affine can take the place of {strange}: sums over their values overflow.")
        return {name: fit for name, fit in fits.items() if name not in strange}

    def moments(self) -> dict[str, Moments]:
        """Compute mean and deviation of the pre-activations of each activation, over all batches and processes.

        Every process has to call this, of a probe that was made with ``affines``. Activations that were not called are
        left out, and those whose moments would not be finite.

        Warns:
            UserWarning: If samples were not finite, once, or moments are not.
        """
        called = self._called()  # fills the reasons
        moments = {
            name: moments_of(count["affine"], self._affines[name].neuron_dim)
            for name, count in called.items()
            if name not in self.reasons
        }
        strange = [name for name, each in moments.items() if not each.is_finite]
        if strange:
            tell(f"{strange} have no mean and deviation: sums over their values overflow.")
        return {name: each for name, each in moments.items() if name not in strange}

    def states(self) -> dict[str, States]:
        """Return how often the neurons of each activation were ON and OFF, over all batches and processes.

        Every process has to call this. Activations that were not called are left out.
        """
        return {
            name: States(count["on"], count["off"], self._states[name].neuron_dim)
            for name, count in self._called().items()
        }

    def _called(self) -> dict[str, dict[str, Any]]:
        """Return the counts of what was called; tell once of samples that were left out."""
        counts = {name: count for name, count in self.counts().items() if count["samples"]}
        for name, count in counts.items():
            if count["left_out"] == count["samples"]:
                self.reasons[name] = "none of its samples is finite"
        if not self._has_told:
            for most in sorted(counts.values(), key=lambda count: count["left_out"])[-1:]:
                self.has_left_out = most["left_out"] > 0
                tell_left_out(most["left_out"], most["samples"], "what was measured")
            if self.reasons:
                tell(f"{list(self.reasons)} were not measured: none of the samples that reach them is finite.")
        self._has_told = True
        return counts

    def _hook(self, name: str, states: StateCounts) -> Callable[..., None]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pre_activation: Tensor = input_of(args, kwargs)
            if self.paused or _is_traced(pre_activation):
                return
            if pre_activation.is_nested:  # of a transformer layer with padding; zeros do not count
                pre_activation = pre_activation.to_padded_tensor(0.0)
            if states.device != pre_activation.device:
                self.to(pre_activation.device)
            call = self._calls[name]
            self._calls[name] += 1
            try:
                if self._sampler is not None:
                    pre_activation = self._sampler(pre_activation, call, states.neuron_dim)
                sums = states.update(pre_activation)
                self._samples[name] += sums.shape[0]
                if name in self._affines:
                    # a copy, which one that works in place may write into
                    activation = module.forward(pre_activation.clone(), *args[1:])
                    self._affines[name].update(pre_activation, activation)
                elif not is_surely_finite(sums):
                    self._left_out[name] = self._left_out[name] + (~sums.isfinite()).sum()
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"The entropy of activation `{name}` can't be measured: {error}. Exclude it, or override its "
                    f"`neuron_dim`."
                ) from error

        return count


def _is_traced(value: Tensor) -> bool:
    """Tell whether a forward is only traced, as ``torch.export`` does: there are no values to count then."""
    return isinstance(value, FakeTensor) or get_proxy_mode() is not None


def _check_axes(axes: Mapping[str, int], sites: Sequence[ActivationSite]) -> None:
    """Refuse a glob for an axis that matches no activation."""
    for glob in axes:
        if not any(fnmatchcase(site.name, glob) for site in sites):
            raise ValueError(
                f"Expected argument `neuron_dim` to hold globs that match activations, but {glob!r} matches none of "
                f"{[site.name for site in sites]}"
            )


def _put_together(of_processes: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Put together what processes have counted of one activation; those that saw nothing know no neurons."""
    on, off, *affine = zip(*of_processes, strict=True)
    return {"on": _total(on), "off": _total(off)} | ({"affine": merged(affine[0])} if affine else {})


def _total(counts: Sequence[Tensor]) -> Tensor:
    """Add up counts, of which those of a process that saw nothing are empty."""
    return torch.stack([each for each in counts if each.numel()] or [counts[0]]).sum(0)


def measure_entropy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    neuron_dim: Mapping[str, int] | None = None,
    gates: bool | Iterable[str] = False,
    inputs_of: InputsOf | None = None,
) -> dict[str, float]:
    """Measure the entropy of every activation over all batches together.

    The activations are isolated first, see :func:`~lightning_easier.isolate_activations`. The model runs in eval mode
    without gradients; modes, hooks and weights are left as found.

    Args:
        model: Any module.
        batches: Batches, such as a DataLoader's: a tensor each, a sequence whose first elements are the forward's
            arguments (as many as it can't do without), or a dictionary or dataclass, of which the forward gets by name
            what it takes, labels aside. Those without samples are skipped. A pre-activation that is NaN counts neither
            as ON nor as OFF.
        max_batches: How many batches to use; all by default.
        neuron_dim: Axis of the neurons by name glob, where the one found is not the one wanted.
        gates: Whether bounded activations are measured too, see :func:`~lightning_easier.isolate_activations`.
        inputs_of: Returns the inputs in a batch, where they are found elsewhere: a tensor, a tuple of positional
            arguments, or a dictionary of arguments by name.

    Returns:
        Qualified name -> entropy in bits, in execution order. Activations that are not called are left out.

    Raises:
        TypeError: If ``model`` is not a Module or ``batches`` do not hold tensors.
        ValueError: If there is no activation, no batch or no finite sample, an input does not fit or is on the meta
            device, or ``max_batches`` is not positive.
        RuntimeError: If no activation was called.

    Warns:
        UserWarning: If a batch has no sample, or the pre-activations of a sample are not all finite.

    Source: EASIER, arXiv 2404.18949.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
        >>> measure_entropy(model, [torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]])])
        {'1': 1.0}
    """
    probe = _measured(model, batches, max_batches, neuron_dim, gates, inputs_of, affines=False)
    return _unless_empty(probe.entropies(), probe)


def measure_affines(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    neuron_dim: Mapping[str, int] | None = None,
    gates: bool | Iterable[str] = False,
    inputs_of: InputsOf | None = None,
) -> dict[str, AffineFit]:
    """Measure the affine that comes closest to each activation, over all batches together.

    Scale and offset of each channel are those of least squares: ``linearize(model, names, stand_in="affine",
    statistics=...)`` puts them in the place of the activations. The model is left as :func:`measure_entropy` leaves it.

    Args:
        model: Any module.
        batches: As for :func:`measure_entropy`. Samples whose values are not all finite are left out, where they are
            not.
        neuron_dim: As for :func:`measure_entropy`.
        gates: As for :func:`measure_entropy`.
        inputs_of: As for :func:`measure_entropy`.

    Returns:
        Qualified name -> scale, offset, axis of the channels and the share of variance explained, in execution order.
        Activations that are not called are left out.

    Raises:
        TypeError: As :func:`measure_entropy`.
        ValueError: As :func:`measure_entropy`.
        RuntimeError: If no activation was called.

    Warns:
        UserWarning: As :func:`measure_entropy`, and if an affine would not be finite, which is left out then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> list(measure_affines(model, [torch.randn(8, 1)]))
        ['1']
    """
    probe = _measured(model, batches, None, neuron_dim, gates, inputs_of, affines=True)
    return _unless_empty(probe.affines(), probe)


def measure_error_likelihood(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    neuron_dim: Mapping[str, int] | None = None,
    gates: bool | Iterable[str] = False,
    inputs_of: InputsOf | None = None,
) -> dict[str, float]:
    """Compute how likely the neurons of every activation are to switch, from batch norms where that is possible.

    The mean over the neurons of Φ(−|β| / γ). Where a batch norm lies right before the activation,
    identities aside, β and γ are its shift and its scale, and no data are needed. Elsewhere
    they are mean and standard deviation of the pre-activation, which are measured.

    Args:
        model: Any module. It is left as :func:`measure_entropy` leaves it; without ``batches`` nothing is isolated.
        batches: As for :func:`measure_entropy`; only needed where an activation has no batch norm before it.
        neuron_dim: As for :func:`measure_entropy`. An activation whose axis is given is measured, if it is not 1.
        gates: As for :func:`measure_entropy`.
        inputs_of: As for :func:`measure_entropy`.

    Returns:
        Qualified name -> likelihood in [0, 1/2], in execution order. Activations that are not called are left out,
        unless they have a batch norm, and those whose moments are not finite.

    Raises:
        TypeError: As :func:`measure_entropy`.
        ValueError: As :func:`measure_entropy`, and if ``batches`` are needed and not given.
        RuntimeError: If batches were needed, and no activation was called.

    Warns:
        UserWarning: As :func:`measure_entropy`, and if moments are not finite.

    Source: TLC, arXiv 2412.15077.

    Note:
        The paper tries layers and removes the one that raises the loss on a batch least. This ranks them by the
        likelihood.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU())
        >>> measure_error_likelihood(model)
        {'2': 0.5}
    """
    inner = unwrap(model)
    check_weights(inner)
    with evaluation_mode(inner):
        sites = planned_sites(inner, gates)
    _check_any(sites, inner)
    _check_axes(neuron_dim or {}, sites)
    norms = batch_norms_before(inner, sites, neuron_dim or {})
    rest = [site.name for site in sites if site.name not in norms]
    moments = {name: moments_after(norm) for name, norm in norms.items()}
    if rest and batches is None:
        raise ValueError(
            f"Expected argument `batches` to be given, since no batch norm lies right before {rest[:5]}, whose "
            f"pre-activations have to be measured, but got None"
        )
    if rest and batches is not None:
        probe = _measured(inner, batches, None, neuron_dim, gates, inputs_of, affines=True)
        measured = _unless_empty(probe.moments(), probe)
        moments |= {name: measured[name] for name in rest if name in measured}
    strange = [name for name in moments if not moments[name].is_finite]
    if strange:
        tell(f"{strange} have no likelihood: scales or shifts of the batch norms before them are not finite.")
    names = [site.name for site in sites if site.name in moments and site.name not in strange]
    return {name: error_likelihood(moments[name]) for name in names}


def _unless_empty(measured: dict[str, _T], probe: EntropyProbe) -> dict[str, _T]:
    """Refuse batches of which no sample was finite anywhere."""
    if not measured and probe.reasons:
        raise ValueError(
            f"Expected argument `batches` to hold samples for which the model's values are finite, but none is "
            f"where {list(probe.reasons)[:5]} are called. Look for NaN in the batches and in the weights."
        )
    return measured


def _check_any(sites: Sequence[ActivationSite], model: nn.Module) -> None:
    """Refuse a model without activations."""
    if not sites:
        raise ValueError(
            f"Expected argument `model` to call at least one rectifier, but none was found in {type(model).__name__}"
        )


def _measured(
    model: nn.Module,
    batches: Iterable[Any],
    max_batches: int | None,
    neuron_dim: Mapping[str, int] | None,
    gates: bool | Iterable[str],
    inputs_of: InputsOf | None,
    *,
    affines: bool,
) -> EntropyProbe:
    """Run a model over batches with its activations measured."""
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(f"Expected argument `max_batches` to be None or a positive integer, but got {max_batches}")
    check_batches("batches", batches)
    inner = unwrap(model)
    check_weights(inner)
    reader = BatchReader(inner, "batches", inputs_of)
    sites = isolated_sites(inner, gates)
    _check_any(sites, inner)
    device = device_of(inner)
    with EntropyProbe(sites, neuron_dim, affines=affines) as probe, evaluation_mode(inner):
        usable = usable_batches(reader, batches, max_batches)
        for arguments in over(usable, "Measuring", batches, max_batches):
            reader.call(inner, mapped(lambda x: x.to(device), arguments))
    return probe
