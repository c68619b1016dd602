"""Does a model run without one of its blocks? It is tried before the block is proposed: later, training would crash.

Other forwards may read attributes, children or the class of a block, which what takes its place has not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_easier.sites.blocks import Block
from lightning_easier.sites.tracing import chance_restored, undone
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.stand_in import Bypass
from lightning_easier.support.calibration import tell
from lightning_easier.support.devices import draws_restored
from lightning_easier.support.finite import is_finite
from lightning_easier.support.hooks import HookOfOneModel, Remembered
from lightning_easier.support.inference import device_of, tensors_in
from lightning_easier.support.processes import sum_over_processes

# What may be passed to a module again and again; a cache of keys and values, say, would grow
_PASSED_AGAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def can_be_passed_again(value: Any) -> bool:
    """Tell whether a value is the same after a module was called with it, or can be copied."""
    return all(isinstance(leaf, _PASSED_AGAIN) for leaf in pytree.tree_leaves(value))


def fails_without(model: nn.Module, block: Block, run: Callable[[], Any], *, is_finite_with: bool) -> str | None:
    """Run a model without one of its blocks.

    Args:
        model: The model.
        block: The block.
        run: Runs it, or a part of it that holds the block.
        is_finite_with: Whether what that returns is finite with the block.

    Returns:
        Why the model can't do without, None if it can.

    Raises:
        OutOfMemoryError: If there is no memory to run it.
    """
    holder = model.get_submodule(block.name.rpartition(".")[0])
    name = block.name.rpartition(".")[2]
    holder._modules[name] = Bypass(block.leaves, block.returns or 0).eval()
    try:
        output = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a user's forward raises
        cause = error.__cause__ or error
        return f"the model does not run without it ({type(cause).__name__}: {cause})"
    finally:
        holder._modules[name] = block.module
    if is_finite_with and not is_finite(*tensors_in(output)):
        return "what the model returns is not finite without it"
    return None


def _ignore(*_: Any, **__: Any) -> None:
    """Do nothing."""


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what runs in this context draw at random, and leave in attributes and buffers of a model.

    What forwards of a LightningModule log meanwhile is not logged: it would count in the means of the validation.
    """
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    with chance_restored(), draws_restored(device_of(model)):
        try:
            with ExitStack() as stack:
                for module in model.modules():
                    stack.enter_context(undone(module))
                vars(model).update({name: _ignore for name in ("log", "log_dict") if hasattr(type(model), name)})
                yield
        finally:
            for buffer, value in before.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@dataclass
class _Call:
    """A call of a module.

    Attributes:
        name: Of the module.
        args: What it is called with, by position.
        kwargs: The same by name.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def repeat(self, model: nn.Module) -> Any:
        """Call the module again; what it is given may be written into."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (self.args, self.kwargs))
        return model.get_submodule(self.name)(*args, **kwargs)


@dataclass
class _Heard:
    """What is heard of the calls of the modules that hold blocks.

    Attributes:
        open: Names of the modules whose calls go on, the outermost first.
        calls: Those of the outermost call, in the order in which they began.
        known: The modules of which a call was heard.
    """

    open: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    known: set[str] = field(default_factory=set)


class WithoutBlocks:
    """Tries out, once for each block of a run, whether the model runs without it on a batch of the validation.

    It listens to the modules that hold blocks. When the outermost call has ended, it is repeated without each block, in
    the context in which it was made: with its precision, its mode, and whatever else was put around it.

    Args:
        pause: Has whoever measures leave out what runs meanwhile, or go on.

    Attributes:
        reasons: Name -> why the model can't do without, of all blocks of which that is known on all processes.
    """

    def __init__(self, pause: Callable[[bool], None]) -> None:
        self.reasons: dict[str, str] = {}
        self._pause = pause
        self._model: Remembered[nn.Module] = Remembered()
        self._tried: dict[str, str | None] = {}  # here, since the last agreement
        self._agreed: set[str] = set()
        self._blocks: dict[str, Block] = {}
        self._heard = _Heard()
        self._handles: list[RemovableHandle] = []
        self._told: set[str] = set()

    def watch(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        """Try out the blocks that were not, in the calls that follow."""
        self.detach()
        if not self._model.is_(model):
            self._model, self.reasons, self._agreed, self._told = Remembered(model), {}, set(), set()
        self._tried, self._heard = {}, _Heard()
        self._blocks = {block.name: block for block in blocks if block.name not in self._agreed}
        holders = dict.fromkeys(holder for name in self._blocks for holder in _holders(name))
        for name in holders:

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def begin(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._begin(name, args, kwargs)

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def end(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._end(model, name)

            module = model.get_submodule(name)
            self._handles += [
                module.register_forward_pre_hook(HookOfOneModel(begin), with_kwargs=True),
                module.register_forward_hook(HookOfOneModel(end)),
            ]

    def detach(self) -> None:
        """Take the hooks away; what was tried stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._heard = _Heard()

    def _begin(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call, unless it lies in that of another part, of which the arguments are enough."""
        heard = self._heard
        is_first = name not in heard.known and not any(heard.open)
        heard.open.append(name)
        if is_first and can_be_passed_again((args, kwargs)):
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            heard.calls.append(_Call(name, args, kwargs))

    def _end(self, model: nn.Module, name: str) -> None:
        heard = self._heard
        if name in heard.open:  # else it was taken note of while this went on
            del heard.open[heard.open.index(name) :]
        if heard.open or not heard.calls:
            return
        calls, heard.calls = heard.calls, []
        heard.known |= {call.name for call in calls}
        self._heard = _Heard(open=["paused"], known=heard.known)  # nothing is heard of the calls that follow
        self._pause(True)
        try:
            with torch.compiler.set_stance("force_eager"):  # else each block would cost a compilation
                self._try_out(model, calls)
        except torch.OutOfMemoryError:
            tell(
                "There is no memory to try out whether the model runs without each of its blocks. Where one that it "
                "can't do without is taken out, training fails."
            )
        finally:
            self._pause(False)
            self._heard = heard

    def _try_out(self, model: nn.Module, calls: Sequence[_Call]) -> None:
        for call in calls:
            blocks = [
                block for name, block in self._blocks.items() if name not in self._tried and call.name in _holders(name)
            ]
            if not blocks:
                continue
            try:
                with left_as_it_was(model):
                    is_finite_with = is_finite(*tensors_in(call.repeat(model)))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a step of the LightningModule that a strategy runs as its forward, say
                continue
            for block in blocks:
                with left_as_it_was(model):
                    run = partial(call.repeat, model)
                    reason = fails_without(model, block, run, is_finite_with=is_finite_with)
                self._tried[block.name] = reason

    def agree(self) -> None:
        """Put together what all processes have tried, each of which has to call this: what fails on one is left out."""
        names = list(self._blocks)
        if not names:
            return
        device = next((each.device for block in self._blocks.values() for each in block.module.parameters()), None)
        tried = [[name in self._tried, self._tried.get(name) is not None] for name in names]
        (sums,) = sum_over_processes([torch.tensor(tried, dtype=torch.int64, device=device)])
        for name, (times, failures) in zip(names, sums.tolist(), strict=True):
            if failures:
                self.reasons[name] = self._tried.get(name) or "the model does not run without it on another process"
            if times:
                self._agreed.add(name)
        self._blocks = {name: block for name, block in self._blocks.items() if name not in self._agreed}

    def tell(self, reasons: Mapping[str, str]) -> None:
        """Warn of blocks that are left out, once of each."""
        new = {name: reason for name, reason in reasons.items() if name not in self._told}
        self._told |= new.keys()
        for reason in dict.fromkeys(new.values()):
            tell(f"{[name for name, other in new.items() if other == reason]} are not taken out: {reason}.")


def _holders(name: str) -> list[str]:
    """Return the names of the modules that hold one, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def no_longer_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Say why blocks that there were when the run began are none any more, though nothing was taken out.

    Args:
        model: The model.
        names: Of them.
    """
    if stand_ins(model):
        return {}
    reason = (
        "when the run began it seemed that the model could do without, but now that it has run another forward reads "
        "something that is set while it runs"
    )
    return dict.fromkeys(names, reason)
