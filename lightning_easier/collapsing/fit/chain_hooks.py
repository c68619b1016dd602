"""Tell of each pass through a chain, by hooks: what goes into it, and what comes out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.collapsing.fit.fittable import Place
from lightning_easier.support.hooks import HookOfOneModel, input_of


class ChainHooks:
    """Own the two hooks of a chain, or a block: before its first operator, and after its last.

    A pass is a call of the last operator after one of the first; each is told once, as it ends. Whether it counts is
    decided by the one who is told.

    Args:
        model: A model whose activations are isolated.
        chain: The chain, or the block.
        tell: Called with what has gone into the chain and what has come out, both without their gradients.
    """

    def __init__(self, model: nn.Module, chain: Place, tell: Callable[[Tensor, Tensor], None]) -> None:
        self._chain = chain
        self._ends = tuple(model.get_submodule(name) for name in chain.ends)
        self._tell = tell
        self._input: Tensor | None = None  # of the pass that has begun
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if self._handles:
            return

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = input_of(args, kwargs)
            self._input = None if given is None else self._chain.given(given)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given, self._input = self._input, None
            if given is not None:
                self._tell(given, self._chain.made(output))

        first, last = self._ends
        self._handles = [
            first.register_forward_pre_hook(HookOfOneModel(begin), with_kwargs=True),
            last.register_forward_hook(HookOfOneModel(end)),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Forget a pass that has begun and will not end, since the forward was left before."""
        self._input = None
