"""Hooks on the activations while a Trainer runs: counts for the entropies, and which activations training calls."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.callbacks import wiring
from lightning_easier.callbacks.network import FirstCall
from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.pruning.gains import Gains, ShapeProbe
from lightning_easier.pruning.ranking import ACTIVATIONS_IN_A_CHAIN, Ranked, Ranking
from lightning_easier.sites.activations import ActivationSite, isolated_sites
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.calibration import tell_left_out
from lightning_easier.support.hooks import HookOfOneModel
from lightning_easier.support.inference import evaluation_mode


class Measurement:
    """Owns every hook that the callback has on a model.

    Args:
        gates: Which bounded activations count.
        exclude: Name globs of activations that are not measured.
        neuron_dim: Axis of the neurons by name glob.
        sample: Share of each batch that is counted.
        ranking: Tells what is measured besides, and the order in which activations become linear.

    Attributes:
        affines: Name -> the affine that comes closest to an activation, as measured last, as plain data.
    """

    def __init__(
        self,
        gates: Sequence[str],
        exclude: Sequence[str],
        neuron_dim: Mapping[str, int],
        sample: float,
        ranking: Ranking,
    ) -> None:
        self._gates = gates
        self._exclude = exclude
        self._neuron_dim = neuron_dim
        self._sample = sample
        self._ranking = ranking
        self._gains = None if ranking.prices_by is None else Gains(ranking.prices_by, ranking.shift_padding)
        self._chains: ChainProbe | None = None
        self._shapes: ShapeProbe | None = None
        self._first_call: FirstCall | None = None
        self.affines: dict[str, dict[str, Any]] = {}
        self._sites: list[ActivationSite] | None = None  # None: the structure may have changed
        self._linear: set[str] = set()  # what was linear when the sites were looked for
        self._probe: EntropyProbe | None = None
        self._told_left_out = False  # that samples were left out of what was measured last
        self._watches: dict[str, RemovableHandle] | None = None  # None: training is not watched

    # Counting

    @property
    def is_counting(self) -> bool:
        """Whether activations are counted now."""
        return self._probe is not None and not self._probe.paused

    @property
    def has_counts(self) -> bool:
        """Whether something was counted, or is."""
        return self._probe is not None

    def start(self, pl_module: LightningModule) -> None:
        """Count from zero."""
        self.stop()
        sites = [s for s in self._live_sites(pl_module) if not any(fnmatchcase(s.name, glob) for glob in self._exclude)]
        neuron_dim = {  # what an axis was given for may be linear by now
            glob: axis for glob, axis in self._neuron_dim.items() if any(fnmatchcase(site.name, glob) for site in sites)
        }
        self._probe = EntropyProbe(sites, neuron_dim, sample=self._sample, affines=self._ranking.needs_affines).to(
            pl_module.device
        )
        self._probe.attach()
        wiring.forget_compiled_code(pl_module)

    def follow_chains(self, pl_module: LightningModule, names: Iterable[str], batches: int) -> None:
        """Measure besides what the order of the next removals depends on.

        Args:
            pl_module: The model.
            names: The activations that may become linear.
            batches: How many batches there will be on all processes together.
        """
        live = {site.name for site in self._live_sites(pl_module)}
        wanted = [name for name in names if name in live]
        if self._ranking.needs_chains:
            self._chains = ChainProbe(pl_module, wanted, batches, ACTIVATIONS_IN_A_CHAIN)
            self._chains.attach()
        if self._ranking.needs_shapes:
            self._shapes = ShapeProbe(pl_module, wanted)
            self._shapes.attach()

    def follow_network(self, pl_module: LightningModule, sites: Iterable[str]) -> None:
        """Note which module is called, and with what."""
        self._forget_network()
        self._first_call = FirstCall(pl_module, sites)

    @property
    def network(self) -> tuple[nn.Module, tuple[Tensor, ...]] | None:
        """The network inside the module and a batch of its inputs, if they were noted; they are forgotten."""
        found = None if self._first_call is None else self._first_call.network
        self._forget_network()
        return found

    def _forget_network(self) -> None:
        if self._first_call is not None:
            self._first_call.detach()
        self._first_call = None

    def _forget_chains(self) -> None:
        for probe in (self._chains, self._shapes):
            if probe is not None:
                probe.detach()
        self._chains = self._shapes = None

    def rank(
        self, trainer: Trainer, pl_module: LightningModule, entropies: Mapping[str, float], names: Iterable[str]
    ) -> Ranked:
        """Rank what may become linear; every process has to call this, rank 0 tells.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            entropies: Name -> entropy in bits, as :meth:`finish` returned them.
            names: The activations that may become linear.
        """
        chains, shapes = self._chains, self._shapes
        self._forget_chains()
        if chains is not None:
            chains.reduce()
        ranked = Ranked()
        if trainer.is_global_zero:
            chosen = {name: entropies[name] for name in names if name in entropies}
            with evaluation_mode(pl_module):
                ranked = self._ranking.rank(pl_module, chosen, self.affines, chains, shapes, self._gains)
            if chains is not None:
                if not self._told_left_out:
                    tell_left_out(*chains.left_out, "what fitted operators are fitted to")
                reasons = {name: reason for name, reason in chains.reasons.items() if name in chosen}
                if reasons and not ranked.fits:
                    rank_zero_warn(f"No operator can take the place of a chain: {reasons}")
        return trainer.strategy.broadcast(ranked)

    def pause(self, paused: bool) -> None:
        """Leave what runs now out of the counts, or count again."""
        for probe in (self._probe, self._chains):
            if probe is not None:
                probe.paused = paused

    def save_counts(self) -> dict[str, Any] | None:
        """Return the counts so far over all processes, each of which has to call this; None if nothing is counted."""
        return None if self._probe is None else self._probe.counts()

    def load_counts(self, counts: Mapping[str, Any], is_global_zero: bool) -> None:
        """Go on from counts that were saved."""
        assert self._probe is not None
        self._probe.resume(counts, is_global_zero)

    def finish(self, pl_module: LightningModule, known: Mapping[str, float]) -> dict[str, float]:
        """Stop counting and return the entropies over all processes, each of which has to call this.

        Args:
            pl_module: The model.
            known: What was measured before: where nothing of that is left, nothing may be called.
        """
        assert self._probe is not None
        probe = self._probe
        self._stop_counting()
        wiring.forget_compiled_code(pl_module)
        self.affines = {}
        if known and not any(name in known for name in probe.names):
            return {}
        if self._ranking.needs_affines:
            self.affines = {name: fit.to_plain() for name, fit in probe.affines().items()}
        entropies = probe.entropies()
        self._told_left_out = probe.has_left_out
        return entropies

    def detach(self) -> None:
        """Take all hooks away; what was counted and noticed stays."""
        for probe in (self._probe, self._chains, self._shapes, self._first_call):
            if probe is not None:
                probe.detach()
        for handle in (self._watches or {}).values():
            handle.remove()

    def stop(self) -> None:
        """Stop measuring; what was counted is lost."""
        self._stop_counting()
        self._forget_chains()
        self._forget_network()

    def _stop_counting(self) -> None:
        if self._probe is not None:
            self._probe.detach()
            self._probe = None

    # Watching

    def watch(self, trainer: Trainer, pl_module: LightningModule, names: Iterable[str] | None = None) -> None:
        """Notice which activations training does not call; each hook goes away at the first call.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            names: Which are not called yet; all by default.
        """
        self.stop_watching()
        watches: dict[str, RemovableHandle] = {}
        for site in self._live_sites(pl_module):
            if names is not None and site.name not in names:
                continue

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def note(module: nn.Module, args: Any, name: str = site.name) -> None:
                if not trainer.validating and name in watches:
                    watches.pop(name).remove()

            watches[site.name] = site.module.register_forward_pre_hook(HookOfOneModel(note))
        self._watches = watches

    @property
    def not_called(self) -> list[str] | None:
        """The activations that training has not called since it is watched; None if it is not."""
        return None if self._watches is None else list(self._watches)

    def stop_watching(self) -> None:
        """Take the remaining hooks away."""
        for handle in (self._watches or {}).values():
            handle.remove()
        self._watches = None

    # The model

    def structure_changed(self) -> None:
        """Look for activations anew."""
        self._sites = None

    def look(self, pl_module: LightningModule) -> list[ActivationSite]:
        """Find and isolate the activations; that costs time, so it is done once for a structure."""
        self._sites = isolated_sites(pl_module, self._gates)
        self._linear = set(stand_ins(pl_module))
        return self._sites

    def _live_sites(self, pl_module: LightningModule) -> list[ActivationSite]:
        """Return the activations that are not linear."""
        returned = self._linear - stand_ins(pl_module).keys()  # weights of another structure may have been loaded
        sites = self.look(pl_module) if self._sites is None or returned else self._sites
        return [site for site in sites if pl_module.get_submodule(site.name) is site.module]
