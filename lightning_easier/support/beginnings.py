"""Run a model again and again where only an end of it changes: what comes before returns what it has returned."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_easier.support.calls import call, copies
from lightning_easier.support.forwards import computing
from lightning_easier.support.inference import has_hooks

# So many bytes of outputs are kept at most.
_MOST = 2**29


class _Span(NamedTuple):
    """When a module was called, counted in calls and returns, and what it takes to keep what it returned."""

    began: int
    ended: int
    size: int


class Beginnings:
    """Knows what the modules of a model return on some batches.

    While it is used, only what it is told of may change in the model. A module is never run again where that can't be
    told from running it: it is called once, returns tensors alone, nothing that follows writes into them, and nothing
    in it has hooks, writes into what it is given, or keeps something of a call.

    Args:
        model: The model, in eval mode.
        batches: What it is called with.
        most: How many bytes of outputs are kept at most.

    Attributes:
        model: The model.
        outputs: What the model returns on each batch.
        samples: How many there are in all batches.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Sequence[Tensor]], most: int = _MOST) -> None:
        self.model, self._batches = model, batches
        self._began: dict[nn.Module, int] = {}
        self._kept: dict[nn.Module, list[Any]] = {}
        self._ended: dict[nn.Module, int] = {}
        self.outputs: list[Any] = []
        sizes = [len(batch[0]) if batch[0].ndim else 1 for batch in batches]
        self.samples = sum(sizes)
        worth_keeping: set[nn.Module] | None = None
        for batch in batches[:1]:  # which are worth the room
            watch = _Watch(model)
            watch.run(model, batch)
            self._began = {module: span.began for module, span in watch.spans.items()}
            self._ended = {module: span.ended for module, span in watch.spans.items()}
            alone = {module: span for module, span in watch.spans.items() if module in watch.alone}
            worth_keeping = _within(alone, most * sizes[0] // max(self.samples, 1))
        for batch in batches:
            watch = _Watch(model, worth_keeping)
            self.outputs.append(watch.run(model, batch))
            kept = watch.kept()
            worth_keeping = set(kept) if worth_keeping is None else worth_keeping & set(kept)
            for module, output in kept.items():
                self._kept.setdefault(module, []).append(output)
        self._kept = {module: self._kept[module] for module in worth_keeping or ()}

    def running_from(self, names: Iterable[str]) -> Callable[[], list[Any]]:
        """Return a function that runs the model on each batch, if only these modules and those after them have changed.

        Args:
            names: Names of modules, as they are now; something else may be in their places when the function is called.
        """
        done = self._done_before(names)

        def run() -> list[Any]:
            returned = []
            for number, batch in enumerate(self._batches):
                with torch.no_grad(), _returning({module: self._kept[module][number] for module in done}):
                    returned.append(call(self.model, copies(batch)))
            return returned

        return run

    def before(self, name: str, batch: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Have what is done before a module is called return what it has returned, until the end.

        Args:
            name: Name of the module.
            batch: What the model is called with meanwhile; of what is none of the batches nothing is known.
        """
        number = next((number for number, each in enumerate(self._batches) if each is batch), None)
        if number is None:
            return nullcontext()
        return _returning({module: self._kept[module][number] for module in self._done_before([name])})

    def _done_before(self, names: Iterable[str]) -> list[nn.Module]:
        """Return the modules whose outputs are kept and that are done before any of some others is called."""
        began = [self._began.get(self.model.get_submodule(name)) for name in names]
        # What was not called before may be called now, whenever
        start = 0 if None in began else min((each for each in began if each is not None), default=0)
        return [module for module in self._kept if self._ended[module] < start]


class _Watch:
    """Notes when each module of a model is called, and what it returns.

    Args:
        model: The model.
        wanted: The modules whose outputs are kept; none by default.

    Attributes:
        spans: Of each module that was called once, and returned tensors alone.
        alone: Those of them of which nothing else is left of a call than what it returns.
    """

    def __init__(self, model: nn.Module, wanted: Iterable[nn.Module] | None = None) -> None:
        self.spans: dict[nn.Module, _Span] = {}
        self._wanted = set(wanted or ())
        self._time = 0
        self._calls: dict[nn.Module, list[int]] = {}
        self._returned: dict[nn.Module, tuple[Any, list[int | None]]] = {}
        inner = (module for module in model.modules() if module is not model)
        self._inner = [module for module in inner if not isinstance(module, torch.jit.ScriptModule)]  # takes no hooks
        self._given: dict[nn.Module, tuple[list[Tensor], list[int | None]]] = {}
        self.alone = {module for module in self._inner if not any(map(has_hooks, module.modules()))}

    def run(self, model: nn.Module, batch: Sequence[Tensor]) -> Any:
        """Return what the model returns."""
        handles = [module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in self._inner]
        handles += [module.register_forward_hook(self._end) for module in self._inner]
        before = {module: _state(module) for module in self._inner}
        try:
            with torch.no_grad():
                returned = call(model, copies(batch))
            changed = {module for module, state in before.items() if not _is_same(_state(module), state)}
            self.alone = {module for module in self.alone if changed.isdisjoint(module.modules())}
            return returned
        finally:
            for handle in handles:
                handle.remove()

    def kept(self) -> dict[nn.Module, Any]:
        """Return what the wanted modules have returned, where nothing has written into it since."""
        return {
            module: output
            for module, (output, versions) in self._returned.items()
            if module in self.spans and module in self.alone and versions == _versions(_tensors(output) or ())
        }

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._time += 1
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._given[module] = given, _versions(given)
        self._calls.setdefault(module, []).append(self._time)

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        self._time += 1
        tensors = _tensors(output)
        given, versions = self._given.pop(module, ([], []))  # of one that calls itself, twice
        if versions != _versions(given):  # others may read there what it has written
            self.alone.discard(module)
        self.spans.pop(module, None)
        if len(self._calls[module]) > 1 or tensors is None:
            return
        size = sum(tensor.nbytes for tensor in tensors)
        self.spans[module] = _Span(self._calls[module][0], self._time, size)
        if module in self._wanted:
            self._returned[module] = output, _versions(tensors)


def _versions(tensors: Iterable[Tensor]) -> list[int | None]:
    """Return what tells whether tensors were written into; those made in inference mode don't say."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _state(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return what a module holds: each value, and what tells whether it was written into."""
    held: list[tuple[Any, Any]] = []
    for value in (*vars(module).values(), *module.buffers(recurse=False), *module.parameters(recurse=False)):
        mark: Any = len(value) if isinstance(value, (list, dict, set)) else None
        held.append((value, _versions([value]) if isinstance(value, Tensor) else mark))
    return held


def _is_same(now: list[tuple[Any, Any]], before: list[tuple[Any, Any]]) -> bool:
    return len(now) == len(before) and all(
        a is b and mark == mark_before for (a, mark), (b, mark_before) in zip(now, before, strict=True)
    )


def _tensors(output: Any) -> list[Tensor] | None:
    """Return the tensors that an output is made of; None if it is made of anything else."""
    leaves = pytree.tree_leaves(output)
    return leaves if leaves and all(isinstance(leaf, Tensor) for leaf in leaves) else None


def _within(spans: dict[nn.Module, _Span], most: int) -> set[nn.Module]:
    """Return what is kept of so many bytes: what has parts first, and of each the earlier."""
    wanted: set[nn.Module] = set()
    for module in sorted(spans, key=lambda each: (not any(True for _ in each.children()), spans[each].began)):
        if spans[module].size <= most:
            most -= spans[module].size
            wanted.add(module)
    return wanted


def _returning(outputs: dict[nn.Module, Any]) -> AbstractContextManager[None]:
    """Have modules return what they have returned, until the end."""
    return computing({module: _constant(output) for module, output in outputs.items()})


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
