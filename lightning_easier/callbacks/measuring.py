"""Hooks on the activations while a Trainer runs: what a method measures, and which activations training calls."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.callbacks import wiring
from lightning_easier.callbacks.agreement import from_rank_zero
from lightning_easier.callbacks.network import FirstCall
from lightning_easier.pruning.methods import Measuring, Method, Proposal
from lightning_easier.sites.activations import ActivationSite, isolated_sites
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.calls import Arguments
from lightning_easier.support.hooks import HookOfOneModel
from lightning_easier.support.inference import evaluation_mode


class Measurement:
    """Owns every hook that the callback has on a model.

    Args:
        method: The method, whose worker measures.
        measuring: What is measured on.
        exclude: Name globs of activations, or what else the method removes, that are not measured.
    """

    def __init__(self, method: Method, measuring: Measuring, exclude: Sequence[str]) -> None:
        self._method = method
        self._gates = method.kinds_of_gates
        self._exclude = exclude
        self._worker = method.worker(measuring)
        self._worker.excluded = exclude
        self._first_call: FirstCall | None = None
        self._sites: list[ActivationSite] | None = None  # None: the structure may have changed
        self._linear: set[str] = set()  # what was linear when the sites were looked for
        self._watches: dict[str, RemovableHandle] | None = None  # None: training is not watched

    # Counting

    @property
    def is_counting(self) -> bool:
        """Whether activations are counted now."""
        return self._worker.is_counting

    @property
    def has_counts(self) -> bool:
        """Whether something was counted, or is."""
        return self._worker.probe is not None

    def start(self, pl_module: LightningModule) -> None:
        """Count from zero."""
        self.stop()
        sites = self._live_sites(pl_module)
        self._worker.start(
            pl_module, [site for site in sites if not any(fnmatchcase(site.name, glob) for glob in self._exclude)]
        )
        wiring.forget_compiled_code(pl_module)

    def follow(self, pl_module: LightningModule, names: Iterable[str], batches: int) -> None:
        """Measure besides what the next decision depends on.

        Args:
            pl_module: The model.
            names: The activations that may become linear.
            batches: How many batches there will be on all processes together.
        """
        live = {site.name for site in self._live_sites(pl_module)}
        self._worker.follow(pl_module, [name for name in names if name in live], batches)

    def follow_network(self, pl_module: LightningModule, sites: Iterable[str]) -> None:
        """Note which module is called, and with what."""
        self._forget_network()
        self._first_call = FirstCall(pl_module, sites)

    @property
    def network(self) -> tuple[nn.Module, Arguments] | None:
        """The network inside the module and a batch of its inputs, if they were noted; they are forgotten."""
        found = None if self._first_call is None else self._first_call.network
        self._forget_network()
        return found

    def _forget_network(self) -> None:
        if self._first_call is not None:
            self._first_call.detach()
        self._first_call = None

    def propose(
        self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str], known: Sequence[str]
    ) -> Proposal:
        """Have the method propose what to do next; every process has to call this, rank 0 tells.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            names: What may be removed.
            known: All that the method removes, what was removed among it.

        Raises:
            TypeError: If it is no proposal.
            ValueError: If it would remove something else.
            RuntimeError: On the other processes, if rank 0 has failed.
        """
        self._worker.detach()
        self._worker.reduce()
        proposal = from_rank_zero(trainer, lambda: self._propose(pl_module, names, known))
        self._worker.forget()
        return proposal

    def _propose(self, pl_module: LightningModule, names: Sequence[str], known: Sequence[str]) -> Proposal:
        with evaluation_mode(pl_module):
            proposal = self._worker.propose(pl_module, names)
        self._check(proposal, known)
        return proposal

    def _check(self, proposal: Any, known: Sequence[str]) -> None:
        """Refuse what is no proposal, or removes what the method does not know of."""
        method = type(self._method).__name__
        if not isinstance(proposal, Proposal):
            raise TypeError(f"Expected `propose` of {method} to return a Proposal, but got {proposal!r}")
        for name in proposal.operations:
            strange = [linear for linear in proposal.linear(name) if linear not in known]
            if strange:
                raise ValueError(
                    f"Expected {method} to propose what its `removable` returns, but {name!r} removes {strange}, which "
                    f"is none of {list(known)}"
                )

    def pause(self, paused: bool) -> None:
        """Leave what runs now out of the counts, or count again."""
        self._worker.pause(paused)

    def save_counts(self) -> dict[str, Any] | None:
        """Return the counts so far over all processes, each of which has to call this; None if nothing is counted."""
        return self._worker.counts()

    def load_counts(self, counts: Mapping[str, Any], is_global_zero: bool) -> None:
        """Go on from counts that were saved."""
        self._worker.resume(counts, is_global_zero)

    def finish(self, pl_module: LightningModule, known: Mapping[str, float]) -> dict[str, float]:
        """Stop counting and return the entropies over all processes, each of which has to call this.

        Args:
            pl_module: The model.
            known: What was measured before: where nothing of that is left, nothing may be called.
        """
        self._worker.detach()
        wiring.forget_compiled_code(pl_module)
        return self._worker.finish(known)

    def metrics(self, pl_module: LightningModule) -> dict[str, float]:
        """Return what the method logs besides the entropies; every process has to call this."""
        return self._worker.metrics(pl_module)

    def detach(self) -> None:
        """Take all hooks away; what was counted and noticed stays."""
        self._worker.detach()
        if self._first_call is not None:
            self._first_call.detach()
        for handle in (self._watches or {}).values():
            handle.remove()

    def stop(self) -> None:
        """Stop measuring; what was counted is lost."""
        self._worker.stop()
        self._forget_network()

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
        modules = dict(pl_module.named_modules(remove_duplicate=False))
        return [site for site in sites if modules.get(site.name) is site.module]
