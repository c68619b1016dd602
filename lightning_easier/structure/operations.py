"""What may be done to a model between two rounds, as plain data: each kind applies itself, and undoes itself.

Whoever carries an operation out on a running Trainer need not know its kind: optimizers follow what it says of the
parameters, a checkpoint holds its plain data, and a report its notes. A kind of one's own is a subclass that is a
dataclass of plain data with a ``kind`` of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.nn import Parameter

from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.rectifiers import activation_kind
from lightning_easier.structure.block_operators import BlockFit
from lightning_easier.structure.linearize import bypass, linearize, replace_block, restore, stand_ins
from lightning_easier.structure.stand_in import StandIn
from lightning_easier.structure.substitution import ChainFit, Substitution

_KINDS: dict[str, "type[Operation]"] = {}


@dataclass(frozen=True)
class Change:
    """What an operation has done to a model.

    Attributes:
        lost: Parameters that the model does not have any more.
        joined: Names of modules whose parameters are new.
        rewritten: Parameters whose values, or shapes, are others now, so that what an optimizer knows of them is of no
            use.
        notes: Name -> what the report says of it, beside that it was removed.
    """

    lost: list[Parameter] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    rewritten: list[Parameter] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Operation(ABC):
    """Something that is done to a model.

    Attributes:
        kind: Name of the subclass in plain data.
        is_large: Whether its plain data may be as large as the model. It is forgotten when it was not chosen.
        names: The activations that it makes linear, none for an operation that makes none so.

    Raises:
        TypeError: If a subclass has the kind of another.
    """

    kind: ClassVar[str]
    is_large: ClassVar[bool] = False
    names: list[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" not in vars(cls):
            return
        known = _KINDS.setdefault(cls.kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"Expected {cls.__name__}.kind to be one of its own, but {cls.kind!r} is {known.__name__}")
        _KINDS[cls.kind] = cls  # perhaps its module was imported anew

    @abstractmethod
    def apply(self, model: nn.Module) -> Change:
        """Carry it out, in place.

        Raises:
            ValueError: If the model is not one that it was made for; it is as it was then.
        """

    @abstractmethod
    def undo(self, model: nn.Module) -> list[Parameter]:
        """Undo it, in place; values of parameters are the business of whoever has saved them.

        Returns:
            The parameters that are back, those that :meth:`apply` has called lost, in that order.
        """

    @abstractmethod
    def leaving(self, model: nn.Module) -> list[Parameter]:
        """Return the parameters that will leave the model when it is undone."""

    @property
    @abstractmethod
    def changes_parameters(self) -> bool:
        """Whether parameters leave or join with it, beside those of the activations themselves."""

    @property
    def parts(self) -> set[str]:
        """The modules that it takes: another operation that takes one of them does not go with it."""
        return set(self.names)

    @property
    def removes(self) -> int:
        """How much it removes, where that is counted: one thing, unless a subclass says so."""
        return 1

    def hold(self, model: nn.Module) -> None:  # noqa: B027  # most have nothing to hold
        """Have what it did hold, as a mask has to; override it, and it is called after every step of an optimizer.

        It is, in the run of the operation, as long as its round was not taken back, and after a resume too.
        """

    def supersedes(self, earlier: "Operation") -> bool:
        """Tell whether it holds all that an earlier one does; that is not held any more then."""
        return False

    @classmethod
    def holds(cls) -> bool:
        """Tell whether there is something to hold."""
        return cls.hold is not Operation.hold

    def to_plain(self) -> dict[str, Any]:
        """Return plain data, which :func:`from_plain` reads.

        Raises:
            TypeError: If the class has no ``kind`` of its own: another class would be made of it.
        """
        if "kind" not in vars(type(self)):
            raise TypeError(
                f"Expected {type(self).__name__} to have a class attribute `kind` of its own, by which a checkpoint "
                f"names it"
            )
        return {"kind": self.kind, **asdict(self)}


@dataclass
class _StandIns(Operation):
    """Stand-ins take the places of activations."""

    @abstractmethod
    def put(self, model: nn.Module) -> None:
        """Put them there, in place."""

    def apply(self, model: nn.Module) -> Change:
        """Carry it out, in place."""
        modules = {name: model.get_submodule(name) for name in self.names}
        described = self.describe(model)
        self.put(model)
        linear = stand_ins(model)
        parts = [part for name in self.names for part in (modules[name], *linear[name].absorbed)]
        notes = {name: [*described.get(name, ()), *_shifted(name, linear[name])] for name in self.names}
        return Change(
            lost=_missing(model, parts),
            joined=list(self.names),
            rewritten=self.rewritten(model),
            notes={name: each for name, each in notes.items() if each},
        )

    def undo(self, model: nn.Module) -> list[Parameter]:
        """Undo it, in place."""
        linear = stand_ins(model)
        parts = [part for name in self.names for part in (linear[name].activation, *linear[name].absorbed)]
        back = _missing(model, parts)
        restore(model, self.names)
        return back

    def leaving(self, model: nn.Module) -> list[Parameter]:
        """Return the parameters that will leave the model when it is undone."""
        linear = stand_ins(model)
        return [parameter for name in self.names for parameter in linear[name].parameters()]

    def rewritten(self, model: nn.Module) -> list[Parameter]:
        """Return the parameters whose values, or shapes, are others now."""
        return []

    def describe(self, model: nn.Module) -> dict[str, list[str]]:
        """Say what is about to take the place of an activation, where the kind does not say it all."""
        return {}


@dataclass
class Identities(_StandIns):
    """Identities take the places of activations (EASIER).

    Attributes:
        shift_padding: As for :func:`~lightning_easier.linearize`.
    """

    kind = "identity"
    shift_padding: bool = True

    def put(self, model: nn.Module) -> None:
        """Put them there, in place."""
        linearize(model, self.names, shift_padding=self.shift_padding)

    @property
    def changes_parameters(self) -> bool:
        """No."""
        return False


@dataclass
class Affines(_StandIns):
    """Affines take the places of activations, a scale and an offset for each channel.

    Attributes:
        affines: Name -> the affine, as plain data.
        shift_padding: As for :func:`~lightning_easier.linearize`.
        trainable: As there.
    """

    kind = "affine"
    affines: dict[str, dict[str, Any]]
    shift_padding: bool = True
    trainable: bool = False

    def put(self, model: nn.Module) -> None:
        """Put them there, in place."""
        fits = {name: AffineFit(**plain) for name, plain in self.affines.items()}
        linearize(
            model,
            self.names,
            stand_in="affine",
            statistics=fits,
            shift_padding=self.shift_padding,
            trainable=self.trainable,
        )

    @property
    def changes_parameters(self) -> bool:
        """Those that are trained join."""
        return self.trainable


@dataclass
class FittedOperators(_StandIns):
    """Fitted operators take the places of the chains around activations.

    Attributes:
        fits: Name -> the operator, as plain data.
    """

    kind = "fitted"
    is_large = True
    fits: dict[str, dict[str, Any]]

    def put(self, model: nn.Module) -> None:
        """Put them there, in place."""
        linearize(model, self.names, stand_in="fitted", statistics=self.chain_fits)

    @property
    def chain_fits(self) -> dict[str, ChainFit]:
        """Name -> the operator."""
        return {name: ChainFit.from_plain(plain) for name, plain in self.fits.items()}

    @property
    def changes_parameters(self) -> bool:
        """Those of what goes with the chains leave."""
        return True

    @property
    def parts(self) -> set[str]:
        """The activations, and all that goes with their chains."""
        names = (Substitution(fit.form, fit.tensors).names(name) for name, fit in self.chain_fits.items())
        return set(self.names).union(*names)

    def rewritten(self, model: nn.Module) -> list[Parameter]:
        """Return the parameters that the operators have moved into."""
        linear = stand_ins(model)
        hosts = [
            substitution.host(model, name)
            for name in self.names
            if (substitution := linear[name].substitution) is not None and substitution.form.host is not None
        ]
        return [parameter for host in hosts if host is not None for parameter in host.parameters()]

    def describe(self, model: nn.Module) -> dict[str, list[str]]:
        """Say what takes the place of each chain, and which activations go with it."""
        return {name: [_fitted(model, name, fit)] for name, fit in self.chain_fits.items()}


@dataclass
class _OfBlocks(Operation):
    """Something takes the places of whole blocks."""

    @abstractmethod
    def put(self, model: nn.Module) -> None:
        """Put it there, in place."""

    @abstractmethod
    def describe(self, name: str) -> str:
        """Say what took the place of a block."""

    def apply(self, model: nn.Module) -> Change:
        """Carry it out, in place."""
        blocks = [model.get_submodule(name) for name in self.names]
        self.put(model)
        joined = [name for name in self.names if any(p.requires_grad for p in model.get_submodule(name).parameters())]
        notes = {name: [self.describe(name)] for name in self.names}
        return Change(lost=_missing(model, blocks), joined=joined, notes=notes)

    def undo(self, model: nn.Module) -> list[Parameter]:
        """Undo it, in place."""
        linear = stand_ins(model)
        back = _missing(model, [linear[name].activation for name in self.names])
        restore(model, self.names)
        return back

    def leaving(self, model: nn.Module) -> list[Parameter]:
        """Return the parameters of what took the places; what a block leaves has none."""
        linear = stand_ins(model)
        return [parameter for name in self.names for parameter in linear[name].parameters()]

    @property
    def changes_parameters(self) -> bool:
        """Those of the blocks leave."""
        return True


@dataclass
class TakenOut(_OfBlocks):
    """Whole blocks are taken out (LaCoOT).

    Attributes:
        names: The blocks.
        leaves: What is left of them: ``"identity"``, or ``"zeros"`` where a branch of an addition is taken out.
        returns: How many values they return, if that is a tuple; 0 otherwise.
    """

    kind = "block"
    leaves: str = "identity"
    returns: int = 0

    def put(self, model: nn.Module) -> None:
        """Take them out, in place."""
        bypass(model, self.names, self.leaves, self.returns)

    def describe(self, name: str) -> str:
        """Say which sort it is."""
        return "the branch was taken out" if self.leaves == "zeros" else "the block was taken out"


@dataclass
class FittedBlocks(_OfBlocks):
    """Fitted operators take the places of whole blocks; their parameters are new, and join the optimizer.

    Attributes:
        names: The blocks.
        fits: Name -> the operator, as plain data.
    """

    kind = "operator"
    is_large = True
    fits: dict[str, dict[str, Any]]

    def put(self, model: nn.Module) -> None:
        """Put the operators there, in place."""
        for name in self.names:
            fit = BlockFit.from_plain(self.fits[name])
            replace_block(model, name, fit.operator(), fit.returns)

    def describe(self, name: str) -> str:
        """Say which operator it is, and how well it stands for the block."""
        fit = BlockFit.from_plain(self.fits[name])
        return f"{fit.kind} in place of the block, {1 - fit.unexplained:.1%} explained"


def kind_of(plain: Mapping[str, Any]) -> type[Operation]:
    """Return the class of an operation that is plain data.

    Raises:
        ValueError: If its kind is unknown.
    """
    kind = _KINDS.get(plain["kind"])
    if kind is None:
        raise ValueError(
            f"Expected an operation of the kinds {sorted(_KINDS)}, but got {plain['kind']!r}. One of your own "
            f"has to be imported before a run is taken up."
        )
    return kind


def from_plain(plain: Mapping[str, Any]) -> Operation:
    """Rebuild an operation from what :meth:`Operation.to_plain` returned.

    Raises:
        ValueError: If its kind is unknown.
    """
    return kind_of(plain)(**{name: value for name, value in plain.items() if name != "kind"})


def _missing(model: nn.Module, modules: Sequence[nn.Module]) -> list[Parameter]:
    """List the parameters of modules that the model does not have, each once."""
    live = set(model.parameters())
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p not in live))


def _shifted(name: str, stand_in: StandIn) -> list[str]:
    if stand_in.shift is None or not stand_in.moves_padding:
        return []
    return [stand_in.shift.described(name)]


def _fitted(model: nn.Module, name: str, fit: ChainFit) -> str:
    parts = [part for part in Substitution(fit.form, fit.tensors).names(name) if part != name]
    others = [part for part in parts if activation_kind(model.get_submodule(part)) is not None]
    beside = f", together with {' and '.join(f'`{other}`' for other in others)}" if others else ""
    return f"{fit.kind}{beside}, {fit.explained:.1%} explained"
