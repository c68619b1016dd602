"""The network inside a LightningModule: the outermost module that holds all activations and is called.

A ``training_step`` may call ``self(x)``, ``self.model(x)`` or something else; what is called tells which module turns
inputs into logits. A container that is never called, such as a ModuleList, is passed over.

A strategy may redirect a whole step through the LightningModule's own call: that one ends after the step.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_easier.callbacks import private
from lightning_easier.support.batches import as_called
from lightning_easier.support.calls import Arguments
from lightning_easier.support.hooks import HookOfOneModel

_OF_A_RUN = ("training_step", "configure_optimizers")
Noticed = Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]
"""What is told of a call: the name of the module, its positional and keyword arguments, and its output."""
Begins = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
"""What is told of a call that has not ended: the same without an output."""


def holders(pl_module: LightningModule, sites: Iterable[str]) -> list[str]:
    """Return the names of the modules that hold all activations, the LightningModule first and the innermost last."""
    paths = [name.split(".")[:-1] for name in sites]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return [".".join(common[:length]) for length in range(len(common) + 1)]


def notice_calls(
    pl_module: LightningModule, sites: Iterable[str], noticed: Noticed, begins: Begins | None = None
) -> list[RemovableHandle]:
    """Have the calls of all modules that hold the activations noticed.

    Args:
        pl_module: The LightningModule.
        sites: Names of the activations.
        noticed: Is told of each call when it has ended.
        begins: Is told of each call before it begins, if that is wanted.

    Returns:
        What takes the hooks away.
    """
    handles = []
    for name in holders(pl_module, sites):
        module: nn.Module = pl_module.get_submodule(name) if name else pl_module

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
        ) -> None:
            noticed(name, args, kwargs, output)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def note_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            if begins is not None:
                begins(name, args, kwargs)

        if begins is not None:
            handles.append(module.register_forward_pre_hook(HookOfOneModel(note_first), with_kwargs=True))
        handles.append(module.register_forward_hook(HookOfOneModel(note), with_kwargs=True))
    return handles


def copied(module: nn.Module) -> nn.Module:
    """Copy a network, a LightningModule without its Trainer and without what was put on the instance for a run.

    What a module was given compiled holds the original, which a copy of it would compute with: the copy gets what was
    compiled, as its own.
    """
    if not isinstance(module, LightningModule):
        return _copied(module)
    own = {name: vars(module).pop(name) for name in _OF_A_RUN if name in vars(module)}
    try:
        with private.without_trainer(module):
            return _copied(module)
    finally:
        vars(module).update(own)


def _copied(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = _without_graphs(module)
    copy = deepcopy(module, memo)
    for part in copy.modules():
        for name, value in list(vars(part).items()):
            original = private.compiled_from(value)
            if original is not None:
                vars(part)[name] = deepcopy(original, memo)
    return copy


def _without_graphs(module: nn.Module) -> dict[int, Tensor]:
    """Return, by its identity, a copy of each tensor that a module has kept of a step, its loss for example.

    It hangs on a graph, which can't be copied.
    """
    kept = (value for part in module.modules() for value in pytree.tree_leaves(vars(part)))
    return {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}


class FirstCall:
    """Notes the arguments of the first call of each module that holds the activations, if they are tensors with values.

    Args:
        pl_module: The LightningModule.
        sites: Names of the activations.
    """

    def __init__(self, pl_module: LightningModule, sites: Iterable[str]) -> None:
        self._pl_module = pl_module
        self._order = holders(pl_module, sites := list(sites))
        self._arguments: dict[str, Arguments] = {}
        self._handles = notice_calls(pl_module, sites, self._note)

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = as_called(self._pl_module.get_submodule(name), args, kwargs)
        if given is not None:
            self._arguments.setdefault(name, given)

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def network(self) -> tuple[nn.Module, Arguments] | None:
        """The outermost module that was called, and the arguments of its first call; None if none was."""
        for name in self._order:
            if name in self._arguments:
                return self._pl_module.get_submodule(name), self._arguments[name]
        return None
