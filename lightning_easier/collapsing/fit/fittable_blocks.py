"""Find the whole blocks that one operator could replace: an identity, zeros, or what comes closest to the block."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_easier.collapsing.algebra.convolutions import CONVOLUTIONS
from lightning_easier.collapsing.algebra.least_squares import Fit, Geometry, Moments
from lightning_easier.collapsing.algebra.operators import BATCH_NORMS
from lightning_easier.collapsing.fit.fittable import Place
from lightning_easier.collapsing.fit.showing import Shown
from lightning_easier.sites.blocks import Block
from lightning_easier.structure.block_operators import dtype_of_values
from lightning_easier.structure.stand_in import Bypass, InPlaceOfBlock
from lightning_easier.support.calibration import tell
from lightning_easier.support.calls import call, copies
from lightning_easier.support.hooks import HookOfOneModel, input_of
from lightning_easier.support.inference import evaluation_mode

# Of sums over what a larger kernel reads, in float64: more is not gathered for one block.
_MOST_UNKNOWNS = 2**13
# Of a convolution.
_MOST_AXES_OF_POSITIONS = 3
_PLAIN = (Tensor, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))


class _Call(NamedTuple):
    """How a block is called, but for its input: the places of that hold None.

    Attributes:
        args: By position.
        kwargs: By name.
        places: Where among the first the input is given: attention reads it three times.
        names: Where among the second.
    """

    args: tuple[Any, ...] = (None,)
    kwargs: Mapping[str, Any] = {}
    places: frozenset[int] = frozenset([0])
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "_Call":
        """Return the call with these arguments, among them the input."""
        return cls(
            tuple(None if each is value else each for each in args),
            {key: None if each is value else each for key, each in kwargs.items()},
            frozenset(place for place, each in enumerate(args) if each is value),
            frozenset(key for key, each in kwargs.items() if each is value),
        )


class _CalledAgain(nn.Module):
    """A block that is called with an input, and all else as it was."""

    def __init__(self, block: nn.Module, call: _Call) -> None:
        super().__init__()
        self.block = block
        self._call = call

    def forward(self, value: Tensor) -> Any:
        args = (value if place in self._call.places else each for place, each in enumerate(self._call.args))
        kwargs = {key: value if key in self._call.names else each for key, each in self._call.kwargs.items()}
        return self.block(*args, **kwargs)


@dataclass(frozen=True)
class FittableBlock(Place):
    """A block that one operator would replace.

    Attributes:
        name: Qualified name.
        leaves: What it leaves where nothing computes it any more: ``"identity"``, or ``"zeros"`` for a branch.
        returns: How many values it returns, if that is a tuple, the first of them what it computes; 0 otherwise.
        sites: Names of the activations in it.
        geometry: Which values of its input a fitted operator reads.
        within: Names of all modules in it, and its own.
        has_others: Whether it is called with something besides its input.
        call: How the model calls it.
        dtype: Of the values that it reads and returns; None if that is not its own, under autocast.
        ends_in: Name of the activation whose output it returns; None if it returns no activation's, or it is not known.
    """

    name: str
    leaves: str
    returns: int
    sites: tuple[str, ...]
    geometry: Geometry
    within: frozenset[str] = field(repr=False)
    has_others: bool = False
    call: _Call = field(default=_Call(), compare=False, repr=False)
    dtype: torch.dtype | None = None
    ends_in: str | None = field(default=None, compare=False)

    @property
    def operators(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its name."""
        return (self.name,)

    @property
    def key(self) -> tuple[str, ...]:
        """Its name, told from that of an activation."""
        return "block", self.name

    @property
    def described(self) -> str:
        """What to call it in a sentence."""
        return f"the block {self.name!r}"

    @property
    def told(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Its name: what is in it goes with it."""
        return (self.name,)

    @property
    def ends(self) -> tuple[str, str]:
        """Its name."""
        return self.name, self.name

    @property
    def shown(self) -> Shown:
        """In what it returns: that has its skip in it, if it is no branch."""
        return Shown(self.name, "output")

    @property
    def parts(self) -> frozenset[str]:
        """Names of all modules in it, and its own."""
        return self.within

    @property
    def why_nothing_is_fitted(self) -> str | None:
        """Why only what needs no fit may take its place; None if an operator may, too."""
        if not self.geometry.is_flat:
            return None
        return (
            "no operator was fitted: channels have to be on the last axis of what the block reads, or on axis 1 before "
            "at most three axes of positions, and no layer tells that they are"
        )

    def given(self, value: Tensor) -> Tensor:
        """Return a copy of its input: it may begin with an activation that writes."""
        return value.detach().clone()

    def made(self, output: Any) -> Tensor:
        """Return the first of what it returns."""
        value: Tensor = output[0] if self.returns else output
        return value.detach()

    def outputs(self, model: nn.Module) -> int:
        """Return how many channels its output has, as many as its input."""
        return self.geometry.channels

    def like(self, model: nn.Module) -> Tensor:
        """Return a tensor of the dtype of its values, or of its parameters, or of the model's, on its device."""
        block = model.get_submodule(self.name)
        device = next((each.device for part in (block, model) for each in part.parameters()), None)
        return torch.empty(0, dtype=dtype_of_values(block, model, self.dtype), device=device)

    def without_fit(self, moments: Moments) -> Iterator[Fit]:
        """Yield what it leaves where nothing computes it any more."""
        sums, channels = moments.held_out, self.geometry.channels
        weight = torch.zeros_like(sums.cross)
        if self.leaves == "identity":
            columns = torch.arange(channels) * self.geometry.taps + (self.geometry.centre or 0)
            weight[columns, torch.arange(channels)] = 1
        yield Fit(self.leaves, nn.Identity(), sums.explained(weight), *moments.fitted.statistics(weight))

    def timed(self, model: nn.Module) -> nn.Module:
        """Return the block, called as the model calls it; in a collapse its batch norms are folded."""
        block = deepcopy(model.get_submodule(self.name))
        for name, module in list(block.named_modules()):
            if name and type(module) in BATCH_NORMS:
                block.set_submodule(name, nn.Identity())
        return _CalledAgain(block, self.call)

    def timed_in_its_place(self, fit: Fit) -> nn.Module | None:
        """Return the operator; None for what it leaves where nothing computes it any more."""
        return None if fit.kind == self.leaves else fit.operator

    def stand_in(self, fit: Fit, like: Tensor) -> nn.Module:
        """Make what takes its place.

        Args:
            fit: The operator.
            like: A tensor of the dtype that it is to have, on the device.
        """
        if fit.kind == self.leaves:
            return Bypass(self.leaves, self.returns)
        operator = deepcopy(fit.operator).to(like)
        return InPlaceOfBlock(operator, self.returns) if self.has_others or self.returns else operator


def fittable_blocks(
    model: nn.Module, blocks: Sequence[Block], sites: Collection[str], arguments: Sequence[Tensor]
) -> tuple[list[FittableBlock], dict[str, str]]:
    """Tell which blocks an operator could replace, from how a model calls them.

    Args:
        model: The model, in eval mode.
        blocks: The blocks.
        sites: Names of all activations of the model.
        arguments: Example inputs.

    Returns:
        Those blocks, and name -> why another can't be replaced.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {block.name: [] for block in blocks}
    activated: list[tuple[str, Any]] = []  # what activations have returned

    def note_activation(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            activated.append((site, output))

        return hook

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name].append((args, kwargs, output))

        return hook

    handles = [
        model.get_submodule(block.name).register_forward_hook(HookOfOneModel(note(block.name)), with_kwargs=True)
        for block in blocks
    ]
    handles += [
        model.get_submodule(site).register_forward_hook(HookOfOneModel(note_activation(site))) for site in sites
    ]
    try:
        with evaluation_mode(model):
            call(model, copies(arguments))
    finally:
        for handle in handles:
            handle.remove()
    found: list[FittableBlock] = []
    reasons: dict[str, str] = {}
    for block in blocks:
        made = fittable_block(model, block, calls[block.name], sites)
        if isinstance(made, str):
            reasons[block.name] = made
        else:
            ((_, _, output),) = calls[block.name]
            output = output[0] if made.returns else output
            last = next((site for site, value in activated if value is output and site in made.sites), None)
            found.append(replace(made, ends_in=last))
    not_fitted = [block for block in found if block.why_nothing_is_fitted is not None]
    if not_fitted:
        names = [block.name for block in not_fitted]
        tell(f"Only an identity or zeros may take the place of {names}: {not_fitted[0].why_nothing_is_fitted}")
    return found, reasons


def fittable_block(
    model: nn.Module, block: Block, calls: Sequence[tuple[Any, ...]], sites: Collection[str]
) -> FittableBlock | str:
    """Read one block, or say why no operator can take its place.

    Args:
        model: The model.
        block: The block.
        calls: Arguments by position, arguments by name, and output, of each call of it in one of the model's.
        sites: Names of all activations of the model.
    """
    if len(calls) != 1:
        return f"the model's forward calls it {len(calls)} times"
    ((args, kwargs, output),) = calls
    value = input_of(args, kwargs)
    returns = block.returns or 0
    output = output[0] if returns else output
    if not isinstance(value, Tensor) or not isinstance(output, Tensor) or not value.is_floating_point():
        return "what it reads and returns are no tensors of numbers"
    if value.shape != output.shape or value.ndim < 2:
        return f"it makes {tuple(output.shape)} of {tuple(value.shape)}"
    is_cast = torch.is_autocast_enabled(value.device.type)
    if value.dtype != output.dtype and not is_cast:
        return f"it makes {output.dtype} of {value.dtype}"
    others = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, _PLAIN)]
    if others:  # a cache, say: what it costs would depend on what came before
        return f"it is called with a {type(others[0]).__name__}, which it may change"
    module = model.get_submodule(block.name)
    parts = frozenset(".".join(filter(None, (block.name, name))) for name, _ in module.named_modules())
    inside = tuple(site for site in sites if site in parts)
    has_others = len(args) + len(kwargs) > 1
    axis = axis_of_channels(block.axes, value)
    return FittableBlock(
        block.name, block.leaves, returns, inside, _geometry(module, value, axis), parts, has_others,
        _Call.of(value, args, kwargs), None if is_cast else value.dtype,
    )  # fmt: skip


def axis_of_channels(axes: Mapping[int, int], value: Tensor) -> int | None:
    """Return the axis that holds the channels of a value: 1 before axes of positions, or -1; None for any other.

    Args:
        axes: What is known, see :class:`~lightning_easier.sites.blocks.Block`.
        value: The value.
    """
    axis = axes.get(value.ndim)
    if value.ndim == 2 or axis == value.ndim - 1:
        return -1
    return 1 if axis == 1 and value.ndim - 2 <= _MOST_AXES_OF_POSITIONS else None


def _geometry(block: nn.Module, value: Tensor, axis: int | None) -> Geometry:
    """Return what an operator reads in the place of a block: its largest kernel, where it is one of maps."""
    if axis is None:
        return Geometry.flat()
    if axis == -1:
        return Geometry(value.shape[-1])
    axes = value.ndim - 2
    parts: list[Any] = [part for part in block.modules() if type(part) in CONVOLUTIONS]
    convolutions = [part for part in parts if len(part.kernel_size) == axes]
    sizes = [
        max((part.dilation[axis] * (part.kernel_size[axis] - 1) + 1 for part in convolutions), default=1)
        for axis in range(axes)
    ]
    kernel = tuple(size if size % 2 else size - 1 for size in sizes)
    geometry = Geometry(value.shape[1], kernel, (1,) * axes, tuple(size // 2 for size in kernel))
    if geometry.unknowns <= _MOST_UNKNOWNS:
        return geometry
    return Geometry(value.shape[1], (1,) * axes, (1,) * axes, (0,) * axes)
