"""Fit an operator to the chain around each activation while a model runs, by hooks, in the pass that counts.

What a chain reads and what it computes are summed up on the spot (see
:mod:`lightning_easier.collapsing.algebra.least_squares`): nothing is kept, and the sums of all chains come from one
pass over the data.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.collapsing.algebra.least_squares import NOT_FINITE, Fit, Moments, Sums, fits
from lightning_easier.collapsing.fit.chain_hooks import ChainHooks
from lightning_easier.collapsing.fit.fit_prices import ChainPrices, PricedFit, priced
from lightning_easier.collapsing.fit.fittable import FittableChain, FittableChains
from lightning_easier.collapsing.fit.fitting import positions_wanted
from lightning_easier.collapsing.fit.placing import as_chain_fit
from lightning_easier.sites.activations import isolate_activations, match_names, unwrap
from lightning_easier.sites.rectifiers import GATES, activation_kind
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.substitution import ChainFit
from lightning_easier.support.arguments import as_globs
from lightning_easier.support.batches import BatchReader, InputsOf
from lightning_easier.support.calibration import check_batches, tell_left_out, usable_batches
from lightning_easier.support.calls import mapped
from lightning_easier.support.inference import check_weights, device_of, evaluation_mode
from lightning_easier.support.processes import sum_over_processes
from lightning_easier.support.progress import over

# Of the sums of all chains together.
_MOST_BYTES = 2**32


@dataclass
class _Seen:
    """What the hooks have seen of one chain."""

    moments: Moments
    shape: torch.Size | None = None
    calls: int = 0


class ChainProbe:
    """Own the hooks that sum up what the chains around activations read and compute.

    Args:
        model: A model whose activations are isolated.
        sites: Names of the activations.
        batches: How many batches there will be on this process and the others together, which bounds how many positions
            of each are used.
        most: How many activations in a row a chain may have. Of those with several, as in the bodies of bottlenecks and
            inverted residuals, only what a smaller operator could take the place of is looked at.

    Attributes:
        chains: The chains.
        reasons: Site -> why it is in none.
        paused: Whether what runs now is left out.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], batches: int, most: int = 1) -> None:
        with evaluation_mode(model):
            found = FittableChains(model, sites)
            self.chains = [chain for chain in found.in_windows(most) if _may_pay(model, chain)]
        self.reasons = found.reasons
        self._leave_out(model)
        self.paused = False
        self._model = model
        self._batches = max(batches, 1)
        self._seen: list[_Seen] = []  # of each chain
        self._hooks: list[ChainHooks] = []
        for chain in self.chains:
            last: Any = model.get_submodule(chain.operators[-1])
            outputs = last.out_channels if chain.geometry.kernel else last.out_features
            seen = _Seen(Moments.of(chain.geometry, outputs, last.weight.device))
            self._seen.append(seen)
            self._hooks.append(ChainHooks(model, chain, partial(self._add, chain, seen)))

    def _leave_out(self, model: nn.Module) -> None:
        """Leave out chains whose padding was moved by a removal, and those whose sums do not fit into memory."""
        moved = {name for site, stand_in in stand_ins(model).items() if stand_in.shift is not None
                 for name in stand_in.shift.names(site)}  # fmt: skip
        taken = 0
        kept = []
        for chain in sorted(self.chains, key=lambda chain: (len(chain.sites), chain.geometry.unknowns)):
            needed = 2 * 8 * chain.geometry.unknowns**2
            if moved & {*chain.operators}:
                reason = "the padding of its operators was moved, for an exact merge"
            elif taken + needed > _MOST_BYTES:
                reason = f"its sums would take {needed / 2**30:.1f} GiB more; `compress` takes one at a time"
            else:
                taken += needed
                kept.append(chain)
                continue
            if len(chain.sites) == 1:
                self.reasons[chain.sites[0]] = reason
        self.chains = [chain for chain in self.chains if chain in kept]

    def __enter__(self) -> "ChainProbe":
        self.attach()
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        for hooks in self._hooks:
            hooks.attach()

    def detach(self) -> None:
        """Remove the hooks; the sums stay."""
        for hooks in self._hooks:
            hooks.detach()

    def _add(self, chain: FittableChain, seen: _Seen, value: Tensor, output: Tensor) -> None:
        """Add a pass through a chain."""
        if self.paused or not value.numel():  # a batch without samples
            return
        seen.shape = seen.shape or value.shape
        seen.calls += 1
        seen.moments.add(value, output, -(-positions_wanted(chain) // self._batches))

    def reduce(self) -> None:
        """Sum up over all processes, each of which has to call this once."""
        if not self._seen:
            return
        device = self._seen[0].moments.left_out.device
        numbers = torch.tensor([(seen.calls, seen.moments.samples) for seen in self._seen], device=device)
        numbers, *left_out = sum_over_processes([numbers, *(seen.moments.left_out for seen in self._seen)])
        for seen, (calls, samples), strange in zip(self._seen, numbers.tolist(), left_out, strict=True):
            seen.calls, seen.moments.samples, seen.moments.left_out = calls, samples, strange
            # one chain at a time: there may be no room for all of them twice
            parts = [each for sums in (seen.moments.fitted, seen.moments.held_out) for each in vars(sums).values()]
            totals = sum_over_processes(parts)
            seen.moments.fitted, seen.moments.held_out = Sums(*totals[:3]), Sums(*totals[3:])

    def fitted(self) -> Iterator[tuple[FittableChain, list[Fit], torch.Size | None]]:
        """Fit operators to the chains that were called; yields chain, what was fitted, and the shape of the input."""
        both = list(zip(self.chains, self._seen, strict=True))
        for chain, seen in over(both, "Fitting"):
            reason = seen.moments.why_no_fit() if seen.calls else "it was not called"
            found = [] if reason else list(fits(seen.moments))
            reason = reason or (None if found else NOT_FINITE)
            if reason is None:
                yield chain, found, seen.shape
            elif len(chain.sites) == 1:
                self.reasons[chain.sites[0]] = reason

    @property
    def left_out(self) -> tuple[int, int]:
        """How many samples were left out, since they are not finite, and how many there were; of the worst chain."""
        counts = ((int(seen.moments.left_out), seen.moments.samples) for seen in self._seen)
        return max(counts, default=(0, 0))

    def price(
        self, chain: FittableChain, candidates: Sequence[Fit], shape: torch.Size, prices: ChainPrices
    ) -> list[PricedFit]:
        """Tell what each operator would save in the place of a chain."""
        return priced(self._model, chain, candidates, shape, prices)

    def chain_fit(self, chain: FittableChain, fit: Fit) -> ChainFit | None:
        """Tell how an operator moves into the modules of a chain; None if it can't."""
        return as_chain_fit(self._model, chain, fit)


def _may_pay(model: nn.Module, chain: FittableChain) -> bool:
    """Tell whether a chain is worth its sums: around one activation, or with more weights than a 1×1 in its place."""
    if len(chain.sites) == 1:
        return True
    if any(activation_kind(model.get_submodule(site)) in GATES for site in chain.sites):
        return False  # what a checkpoint names as absorbed has to be found without being told of gates
    operators: list[Any] = [model.get_submodule(name) for name in chain.operators]
    return chain.geometry.channels * len(operators[-1].weight) < sum(each.weight.numel() for each in operators)


def fit_chains(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    inputs_of: InputsOf | None = None,
) -> dict[str, ChainFit]:
    """Fit the best single operator to the chain around each activation, over all batches together.

    A chain is operator, activation, operator, with batch norms and dropouts between. ``linearize(model, names,
    stand_in="fitted", statistics=...)`` puts the fitted operators in their places. The model runs in eval mode, without
    gradients, and is left as it was found.

    Args:
        model: Any module.
        batches: As for :func:`~lightning_easier.measure_entropy`. Those without samples are skipped, and samples whose
            values are not all finite left out, where they are not.
        include: Name globs of the activations; all by default.
        exclude: Name globs of those to leave out.
        inputs_of: As for :func:`~lightning_easier.measure_entropy`.

    Returns:
        Qualified name -> fit, in execution order. Activations that no operator can take the place of, with one before
        and one after them, are left out.

    Raises:
        TypeError: If ``model`` is not a Module, or ``batches`` do not hold tensors.
        ValueError: If a glob matches nothing, there is no batch, or an input does not fit or is on the meta device.

    Warns:
        UserWarning: If a batch has no sample, or samples were left out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_easier import linearize
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> fits = fit_chains(model, [torch.randn(64, 4) for _ in range(4)])
        >>> linearize(model, ["1"], stand_in="fitted", statistics=fits)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): IdentityStandIn(in place of ReLU(), with a fitted operator in place of its chain)
          (2): Absorbed()
        )
    """
    check_batches("batches", batches)
    inner = unwrap(model)
    check_weights(inner)
    reader = BatchReader(inner, "batches", inputs_of)
    sites = match_names(list(isolate_activations(inner)), as_globs("include", include), as_globs("exclude", exclude))
    taken = list(over(usable_batches(reader, batches), "Reading", batches))
    device = device_of(inner)
    with ChainProbe(inner, sites, len(taken)) as probe, evaluation_mode(inner):
        for arguments in over(taken, "Gathering"):
            reader.call(inner, mapped(lambda x: x.to(device), arguments))
    tell_left_out(*probe.left_out, "`batches`")
    best: dict[str, ChainFit] = {}
    for chain, candidates, _ in probe.fitted():
        possible = [fit for each in candidates if (fit := probe.chain_fit(chain, each)) is not None]
        if possible:
            best[chain.sites[0]] = max(possible, key=lambda fit: fit.explained)
    return best
