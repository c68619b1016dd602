"""What every method has in common: it measures, and proposes operations by what was measured.

A :class:`Method` is a frozen config: what a user writes, in Python or as a ``class_path``. In a run it has a
:class:`Worker`, which owns the hooks. What a method proposes is plain data, a :class:`Proposal`: who runs the loop
chooses from it, carries the operations out and takes them back, and knows none of them by name.

A method of one's own is a subclass with one function. This one removes the activations in the order of execution::

    class FromTheFirst(Method):
        def propose(self, model, evidence):
            proposal = Proposal()
            for place, name in enumerate(evidence.entropies):
                proposal.add(Identities([name]), rank=place)
            return proposal

    callback = PruningCallback(FromTheFirst(), monitor="val_acc")
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightning_easier.measure.probe import EntropyProbe
from lightning_easier.pruning.candidates import candidates
from lightning_easier.report import Report
from lightning_easier.sites.activations import ActivationSite, planned_sites
from lightning_easier.structure.operations import Operation, from_plain, kind_of
from lightning_easier.support.arguments import as_axes, check_bool, check_choice, check_share
from lightning_easier.support.inference import device_of


@dataclass(frozen=True)
class Measuring:
    """What is measured on, and how much of it.

    Args:
        on: Which batches.
        sample: Share of the samples of each batch that is counted, in (0, 1], for a smaller overhead.
        neuron_dim: Axis of the neurons by name glob, where the one found is not the one wanted.
        costs: Whether the network is collapsed and timed at the end of each round, too, to log its ``depth`` and
            ``speedup`` and the score against latency. With a target it is anyway.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range.
    """

    on: Literal["validation", "training"] = "validation"
    sample: float = 1.0
    neuron_dim: dict[str, int] | None = None
    costs: bool = False

    def __post_init__(self) -> None:
        check_choice("on", self.on, ("validation", "training"))
        check_share("sample", self.sample)
        as_axes("neuron_dim", self.neuron_dim)
        check_bool("costs", self.costs)

    @property
    def axes(self) -> dict[str, int]:
        """Axis of the neurons by name glob."""
        return as_axes("neuron_dim", self.neuron_dim)


@dataclass
class Proposal:
    """What may be done to a model as it is; plain data.

    Attributes:
        ranks: Name -> rank of what may be removed, in execution order; the lowest goes first.
        operations: Name -> what removes it, as plain data.
        exact: Names of what changes nothing on the data that was measured. What is left of it when the run ends is done
            then, and not trained any more.
        blocks: What a dry run lists of whole blocks, one a block, as plain data; see :meth:`Method.listed`.
    """

    ranks: dict[str, float] = field(default_factory=dict)
    operations: dict[str, dict[str, Any]] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, operation: Operation, rank: float, name: str | None = None) -> None:
        """Propose one more operation.

        Args:
            operation: The operation.
            rank: Its rank; the lowest goes first.
            name: What it removes; by default the first activation that it makes linear.

        Raises:
            ValueError: If it has no name, or another operation has the same.
        """
        if name is None and not operation.names:
            raise ValueError(
                f"Expected argument `name` to say what {type(operation).__name__} removes, since it makes no "
                f"activation linear, but got None"
            )
        name = operation.names[0] if name is None else name
        if name in self.operations:
            raise ValueError(f"Expected argument `name` to be proposed once, but {name!r} is there already")
        self.ranks[name] = rank
        self.operations[name] = operation.to_plain()

    def eligible(self, candidates: Container[str], rejected: Container[str]) -> dict[str, float]:
        """Return the ranks of what may be chosen.

        Args:
            candidates: The activations, or whatever is removed, that may become linear and are not.
            rejected: Names of what was taken back.
        """
        return {
            name: rank
            for name, rank in self.ranks.items()
            if name not in rejected and name in self.operations and all(n in candidates for n in self.linear(name))
        }

    def linear(self, name: str) -> list[str]:
        """Return the activations that become linear if one thing is removed."""
        return list(self.operations[name]["names"])

    def disjoint(self, names: Sequence[str]) -> list[str]:
        """Leave out what takes a part that an earlier one takes, or lies inside such a part, or holds one."""
        taken: set[str] = set()
        chosen = []
        for name in names:
            parts = from_plain(self.operations[name]).parts
            if not any(_overlap(part, other) for part in parts for other in taken):
                chosen.append(name)
                taken |= parts
        return chosen

    def without_large_operations(self) -> "Proposal":
        """Forget what may be as large as the model; what is left may be chosen still."""
        kept = {name: plain for name, plain in self.operations.items() if not kind_of(plain).is_large}
        return Proposal(self.ranks, kept, self.exact, self.blocks)


def _overlap(part: str, other: str) -> bool:
    """Tell whether two modules are one, or one lies inside the other."""
    return part == other or part.startswith(f"{other}.") or other.startswith(f"{part}.")


@dataclass(frozen=True)
class Evidence:
    """What was measured of a model; methods that measure more have a subclass.

    Attributes:
        entropies: Name -> entropy in bits of the activations that may become linear and are not, in execution order.
    """

    entropies: dict[str, float]


class Regularizer(ABC):
    """What a method adds to the loss of training steps; owns the hooks that it needs for it.

    Attributes:
        key: The name that it is logged by.
        in_step: Whether a step goes on whose loss it is added to, which who adds it sets: a hook is called in other
            forwards, too, those of a validation or those that a backward pass repeats.
    """

    key: str
    in_step: bool = False

    @abstractmethod
    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        """Watch what training computes from now on; a second call watches what the model has become.

        Args:
            model: The model.
            names: What may be removed of it still.
        """

    @abstractmethod
    def detach(self) -> None:
        """Take all hooks away; a second call does nothing."""

    @abstractmethod
    def begin_step(self, number: int) -> None:
        """Forget what the last step has left.

        Args:
            number: Of the training batch, counted over all epochs: a step that is repeated has the same.
        """

    @abstractmethod
    def term(self) -> tuple[Tensor, Tensor] | None:
        """Return what is added to the loss of this step, and what is logged of it; None if nothing is."""


class Outlook(NamedTuple):
    """What may come of a run.

    Attributes:
        words: What there is to say.
        is_promising: Whether anything may.
    """

    words: str
    is_promising: bool


@dataclass(frozen=True)
class Method(ABC):
    """What may be done to a model, and in which order. Subclasses with arguments are frozen dataclasses."""

    @abstractmethod
    def propose(self, model: nn.Module, evidence: Any) -> Proposal:
        """Propose operations; on several processes, rank 0 alone does.

        Args:
            model: The model, in eval mode. It must not be changed.
            evidence: What the worker measured: an :class:`Evidence`.
        """

    def select(self, ranks: Mapping[str, float], count: int) -> list[str]:
        """Choose from what may be removed, in the order in which it goes; where ranks are equal, the earlier.

        Args:
            ranks: Name -> rank, in execution order.
            count: How many to choose at most.
        """
        return sorted(ranks, key=ranks.__getitem__)[:count]

    def worker(self, measuring: Measuring) -> "Worker":
        """Return who measures for it in a run."""
        return Worker(self, measuring)

    @property
    def wanted(self) -> str:
        """What a model is expected to do or to have, in words, for errors."""
        return (
            "to call at least one rectifier, which are the activations of torch.nn from ReLU to Softplus (see "
            "`isolate_activations`), or to have what else is removed"
        )

    def regularizer(self) -> Regularizer | None:
        """Return what it adds to the loss of training steps; None for nothing."""
        return None

    @property
    def needs_eval_mode(self) -> bool:
        """Whether what it measures has to be computed in eval mode, so not on training batches."""
        return False

    @property
    def kinds_of_gates(self) -> Collection[str]:
        """Which bounded activations count, see :func:`~lightning_easier.isolate_activations`."""
        return ()

    def removable(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what may be removed, by name, that is in a model still: its activations.

        ``include`` and ``exclude`` of the callback choose from it, and from what was removed.
        """
        return {site.name: site.module for site in planned_sites(model, self.kinds_of_gates)}

    def check(self, model: nn.Module, names: Sequence[str], *, named: bool) -> None:  # noqa: B027  # most take any
        """Refuse a model that it can't work on, before anything is changed.

        Args:
            model: The model.
            names: What may be removed of it.
            named: Whether a user has named them by ``include``.

        Raises:
            ValueError: With the reason.
        """

    def held_from_the_start(self, model: nn.Module, names: Sequence[str]) -> list[Operation]:
        """Return operations that an earlier run has done, and that have to hold from the first round on.

        Args:
            model: The model; every process has to call this.
            names: What may be removed of it.
        """
        return []

    @property
    def is_cheap(self) -> bool:
        """Whether it needs nothing but what is measured anyway; then it is asked after every validation."""
        return True

    @property
    def looks_at_operators(self) -> bool:
        """Whether it tells what merges, or prices it, for which the operators must not be sharded."""
        return not self.is_cheap

    @property
    def needs_whole_parameters(self) -> tuple[str, str] | None:
        """What is done to parameters for which they must not be sharded, and the remedy; None if nothing is."""
        return None

    @property
    def charts(self) -> dict[str, str]:
        """Title -> regular expression of the tags in it, of the charts of what its worker logs besides entropies."""
        return {}

    @property
    def objective(self) -> Literal["latency", "macs"]:
        """What the network is collapsed for when it is asked whether it has reached a target."""
        return "latency"

    def list_candidates(self, model: nn.Module, entropies: Mapping[str, float] | None) -> Report:
        """List what may be removed, for a dry run.

        Args:
            model: The model.
            entropies: Name -> entropy in bits.
        """
        return candidates(model, entropies, gates=self.kinds_of_gates)

    def listed(self, model: nn.Module, entropies: Mapping[str, float] | None, proposal: Proposal) -> Report:
        """Return what a dry run lists: by default what :meth:`list_candidates` does.

        Args:
            model: The model.
            entropies: Name -> entropy in bits.
            proposal: What was proposed for it.
        """
        return self.list_candidates(model, entropies)

    def outlook(self, model: nn.Module, proposal: Proposal, names: Sequence[str], device: str) -> Outlook | None:
        """Say before the first removal what may come of it; None if there is nothing to tell.

        Args:
            model: The model.
            proposal: What was proposed for it.
            names: The activations that may become linear.
            device: What it runs on.
        """
        return None


class Worker:
    """Measures for a method in a run, and has it propose; owns every hook that it needs on a model.

    Args:
        method: The method.
        measuring: What is measured on.
        affines: Whether the affine that comes closest to each activation is measured, too.

    Attributes:
        excluded: Name globs of what a user leaves out: it is not measured.
    """

    excluded: Sequence[str] = ()

    def __init__(self, method: Method, measuring: Measuring, *, affines: bool = False) -> None:
        self.method = method
        self._measuring = measuring
        self._affines = affines
        self.probe: EntropyProbe | None = None
        self.entropies: dict[str, float] = {}

    @property
    def is_counting(self) -> bool:
        """Whether activations are counted now."""
        return self.probe is not None and not self.probe.paused

    def start(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        """Count from zero.

        Args:
            model: The model.
            sites: The activations that are measured, none of them linear.
        """
        self.stop()
        axes = {  # what an axis was given for may be linear by now
            glob: axis
            for glob, axis in self._measuring.axes.items()
            if any(fnmatchcase(site.name, glob) for site in sites)
        }
        self.probe = EntropyProbe(sites, axes, sample=self._measuring.sample, affines=self._affines)
        self.probe.to(device_of(model)).attach()

    def follow(self, model: nn.Module, names: Sequence[str], batches: int) -> None:
        """Measure besides what takes more; :meth:`start` was called before.

        Args:
            model: The model.
            names: The activations that may become linear and are not.
            batches: How many batches there will be on all processes together.
        """

    def pause(self, paused: bool) -> None:
        """Leave what runs now out of the counts, or count again."""
        if self.probe is not None:
            self.probe.paused = paused

    def counts(self) -> dict[str, Any] | None:
        """Return the counts so far over all processes, each of which has to call this; None if nothing is counted."""
        return None if self.probe is None else self.probe.counts()

    def resume(self, counts: Mapping[str, Any], is_global_zero: bool) -> None:
        """Go on from counts that were saved; :meth:`start` was called before."""
        assert self.probe is not None
        self.probe.resume(counts, is_global_zero)

    def finish(self, known: Container[str] | None = None) -> dict[str, float]:
        """Stop counting and return the entropies over all processes, each of which has to call this.

        Args:
            known: What was measured before; where nothing of that is left, nothing may be called. None for the first.
        """
        assert self.probe is not None
        probe, self.probe = self.probe, None
        probe.detach()
        self.entropies = {}
        if not known or any(name in known for name in probe.names):
            self.take(probe)
        return self.entropies

    def take(self, probe: EntropyProbe) -> None:
        """Take note of what was counted; every process has to call this."""
        self.entropies = probe.entropies()

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return what is logged besides the entropies, after each measurement; every process has to call this.

        Returns:
            Key -> value, the same on every process.
        """
        return {}

    def reduce(self) -> None:
        """Sum up over all processes what :meth:`follow` has measured; every process has to call this."""

    def propose(self, model: nn.Module, names: Sequence[str]) -> Proposal:
        """Have the method propose by what was measured last.

        Args:
            model: The model, in eval mode.
            names: The activations that may become linear.
        """
        return self.method.propose(model, Evidence(self._among(names)))

    def _among(self, names: Sequence[str]) -> dict[str, float]:
        return {name: self.entropies[name] for name in names if name in self.entropies}

    def detach(self) -> None:
        """Take all hooks away; what was counted stays."""
        if self.probe is not None:
            self.probe.detach()

    def forget(self) -> None:
        """Forget what :meth:`follow` has measured."""

    def stop(self) -> None:
        """Stop measuring; what was counted is lost."""
        self.detach()
        self.probe = None
        self.forget()
