"""Sum up what a place computes, and what it would have to compute to correct the errors of what was fitted before it.

A changed model and the model as given run side by side on the same batches. Where what the place computes shows, in the
sum with its skip if there is one, the difference of the two is the error of all that was changed so far: with a batch
norm between, what the place has to add for it to be gone is that by what the norm multiplies with.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.collapsing.algebra.corrected import CorrectedMoments
from lightning_easier.collapsing.algebra.least_squares import Moments
from lightning_easier.collapsing.fit.chain_hooks import ChainHooks
from lightning_easier.collapsing.fit.enough import enough, first_batches
from lightning_easier.collapsing.fit.fittable import FittableChain, Place
from lightning_easier.collapsing.fit.fitting import Gathered, gather, is_known, positions_wanted, shapes_of_inputs
from lightning_easier.support.beginnings import Beginnings
from lightning_easier.support.calls import call, copies
from lightning_easier.support.hooks import HookOfOneModel, first_tensor
from lightning_easier.support.inference import evaluation_mode

# Channels that a norm multiplies with so much less than another are not corrected: what they would need is large.
_LEAST_SCALE = 1e-2
# Half as many images give nearly as much as a thousand, for half of the runs of both models; where each has but one
# position, as before a classifier, more are used if there are.
_SAMPLES, _FEWEST = 500, 96


def _nothing() -> None: ...


class _SeenError(BaseException):
    """Ends a forward of which all that is wanted has been seen; no forward catches it."""


def gather_corrected(
    model: nn.Module,
    dense: Beginnings,
    place: Place,
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    watched: Iterable[str] = (),
    advance: Callable[[], object] = _nothing,
) -> Gathered | None:
    """Sum up one place of a changed model, its targets corrected as far as that generalizes.

    Args:
        model: The changed model, in eval mode.
        dense: The model as given, in eval mode, see :func:`beginnings_of`.
        place: The place, in which nothing was changed.
        batches: The forward's positional arguments, for each batch.
        arguments: Example inputs.
        watched: Names of modules of which is said whether they ran before all of it was known.
        advance: What is called after each batch.

    Returns:
        Its sums; None if there is no error, a forward does not get there, nothing of the shape of its output is seen
        where it shows, or the model as given computes something else there.
    """
    if not _is_shown_alike(model, dense.model, place):
        return None
    sums: CorrectedMoments | None = None
    is_off = False
    running: set[str] = set()
    with ExitStack() as stack:
        side_by_side = stack.enter_context(SideBySide(model, dense, place))
        for name in watched:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(_noting(name, running)).remove)
        for batch in batches:
            compared = side_by_side.run(batch)
            if compared is None:
                return None
            value, output, error = compared
            axis = 1 if place.geometry.kernel else -1
            if sums is None:
                sums = CorrectedMoments(place.geometry, output.shape[axis], output.device)
            is_off = is_off or bool(error.any())
            sums.add(value, output, error.to(output), positions_of(place, batch, dense))
            advance()
            if is_enough(sums.moments, place, dense):
                break
    shape = shapes_of_inputs(model, [place.whole], arguments).get(place.whole)
    if sums is None or not is_off or shape is None:
        return None
    moments, _ = sums.mixed()
    return Gathered(moments, shape, frozenset(running))


def gather_alone(
    model: nn.Module,
    dense: Beginnings | None,
    place: Place,
    batches: Sequence[tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    watched: Iterable[str] = (),
    advance: Callable[[], object] = _nothing,
) -> Gathered | None:
    """Sum up one place; where something was changed already, its targets correct for that, if it can be seen.

    Args:
        model: The model, in eval mode.
        dense: The model as given, in eval mode, see :func:`beginnings_of`; None if nothing was changed yet.
        place: The place.
        batches: The forward's positional arguments, for each batch.
        arguments: Example inputs.
        watched: Names of modules of which is said whether they ran.
        advance: What is called after each batch.

    Returns:
        Its sums; None if the forward does not get there.
    """
    if dense is not None and not place.geometry.is_flat:  # nothing is fitted there
        corrected = gather_corrected(model, dense, place, batches, arguments, watched, advance)
        if corrected is not None:
            return corrected
    ((_, gathered),) = gather(model, [place], batches, arguments, watched, advance)
    return gathered


def positions_of(place: Place, batch: Sequence[Tensor], dense: Beginnings) -> int:
    """Return how many positions of one batch are used, so that all that are looked at have as many as are wanted."""
    return -(-positions_wanted(place) * len(batch[0]) // dense.samples)


def is_enough(moments: Moments, place: Place, dense: Beginnings) -> bool:
    """Tell whether so many samples have been compared that more would hardly tell more of a place."""
    return moments.samples >= dense.samples and is_known(moments, place)


def beginnings_of(dense: nn.Module, batches: Sequence[tuple[Tensor, ...]], work: float | None = None) -> Beginnings:
    """Return the model as given with what its modules return on as many samples as are compared of most places.

    Args:
        dense: The model as given, in eval mode.
        batches: The forward's positional arguments, for each batch.
        work: Of the model for each sample, as for :func:`enough`.
    """
    with evaluation_mode(dense):  # as both are compared, whatever batch norm was left in training mode
        return Beginnings(dense, first_batches(batches, enough(_SAMPLES, _FEWEST, work)))


class Compared(NamedTuple):
    """What one batch makes of a place.

    Attributes:
        value: What goes into it on the changed model.
        output: What comes out of it there.
        error: What would have to be added to that for the error to be gone that shows; float64 where the output is.
    """

    value: Tensor
    output: Tensor
    error: Tensor


class SideBySide:
    """Runs a changed model and the model as given on the same batches, up to where a place shows what it computes.

    Args:
        model: The changed model.
        dense: The model as given, see :func:`beginnings_of`.
        place: The place.
    """

    def __init__(self, model: nn.Module, dense: Beginnings, place: Place) -> None:
        self._models = model, dense.model
        self._dense = dense
        self._place = place
        self._by = _by_what(model, place)
        self._passed: list[tuple[Tensor, Tensor]] = []
        self._hooks = ChainHooks(model, place, lambda value, output: self._passed.append((value, output)))
        self._found, self._wanted = RunUpTo(model, place), RunUpTo(dense.model, place)

    def __enter__(self) -> "SideBySide":
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(evaluation_mode(model))
            stack.callback(self._hooks.detach)
            self._hooks.attach()
            for shown in (self._wanted, self._found):
                stack.enter_context(shown)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def given(self, arguments: Sequence[Tensor]) -> Tensor | None:
        """Return what goes into the place on the changed model; None if the forward does not get there."""
        self._run(arguments)
        return self._passed[0][0] if self._passed else None

    def run(self, batch: Sequence[Tensor]) -> Compared | None:
        """Compare one batch; None if a forward does not get there, or shapes differ."""
        with self._dense.before(self._place.shown.module, batch):
            before = self._wanted.run(batch)
        now = self._run(batch)
        if before is None or now is None or not self._passed:
            return None
        value, output = self._passed[0]
        if not before.shape == now.shape == output.shape:
            return None
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        return Compared(value, output, (before.to(wide) - now.to(wide)) * self._by.to(wide))

    def _run(self, batch: Sequence[Tensor]) -> Tensor | None:
        self._passed.clear()
        self._hooks.forget()
        return self._found.run(batch)


def on_shown(model: nn.Module, place: Place, tell: Callable[[Any], None]) -> RemovableHandle:
    """Register a hook that tells what shows of a place, each time it does.

    Args:
        model: The model.
        place: The place.
        tell: Called with it.
    """
    shown = place.shown
    module = model.get_submodule(shown.module)

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell(first_tensor(args, kwargs))

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tell(place.made(output))

    if shown.side == "input":
        return module.register_forward_pre_hook(HookOfOneModel(enters), with_kwargs=True)
    return module.register_forward_hook(HookOfOneModel(leaves))


class RunUpTo:
    """Runs a model up to where it shows what a place computes.

    Args:
        model: The model.
        place: The place.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        self._model = model
        self._place = place
        self._value: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "RunUpTo":
        self._handle = on_shown(self._model, self._place, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _end(self, value: Any) -> None:
        self._value = value.detach().clone() if isinstance(value, Tensor) else None
        raise _SeenError

    def run(self, arguments: Sequence[Tensor]) -> Tensor | None:
        """Return what shows; None if the forward does not get there."""
        self._value = None
        with suppress(_SeenError):
            call(self._model, copies(arguments))
        return self._value


def _is_shown_alike(model: nn.Module, dense: nn.Module, place: Place) -> bool:
    """Tell whether the model as given computes where a place shows what the changed one does, but for errors.

    An operator that was fitted stands for more than the one whose name it has: for a whole chain. One of a pair, which
    takes the place of a chain, is not in the model as given at all.
    """
    name = place.shown.module
    if not any(name == other for other, _ in dense.named_modules()):
        return False
    if not isinstance(place, FittableChain) or place.total is not None:
        return True
    now, before = (each.get_submodule(name).state_dict() for each in (model, dense))
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def _noting(name: str, running: set[str]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        running.add(name)

    return hook


def _by_what(model: nn.Module, place: Place) -> Tensor:
    """Return what an error has to be multiplied with, for each channel: one by the scale of the norm before it."""
    if place.shown.norm is None:
        return torch.ones((), device=place.like(model).device)
    norm: Any = model.get_submodule(place.shown.norm)
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    wide = torch.float64 if norm.running_var.dtype == torch.float64 else torch.float32
    scale = weight.to(wide) / (norm.running_var.to(wide) + norm.eps).sqrt()
    by = torch.where(scale.abs() > _LEAST_SCALE * scale.abs().max(), 1 / scale, 0.0)
    return by.view(-1, *[1] * len(place.geometry.kernel))
