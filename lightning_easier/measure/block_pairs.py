"""Hooks that see what goes into blocks and what comes out of them, together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.sites.blocks import Block
from lightning_easier.support.hooks import HookOfOneModel, input_of

Seen = Callable[[str, Tensor, Tensor], None]
"""What is told of a call: the name of the block, what would be left of it, and what it has computed."""


class BlockPairs:
    """Owns the hooks on blocks that compare what a block computes with what is left when it is taken out.

    That is the block's input, or zeros where a branch of an addition is taken out. Where no gradients are recorded, the
    input is copied first, for a block may write into it; where they are, from the first call on that has done so, which
    is not told of.

    Args:
        blocks: The blocks.
        seen: Is told of each call.

    Attributes:
        paused: Whether nothing is told.
    """

    def __init__(self, blocks: Sequence[Block], seen: Seen) -> None:
        self.paused = False
        self._blocks = list(blocks)
        self._seen = seen
        self._writes_to_its_input: set[str] = set()
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {}  # of calls that go on, with their versions
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if self._handles:
            return
        for block in self._blocks:

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def begin(module: nn.Module, args: Any, kwargs: Any, block: Block = block) -> None:
                self._begin(block, input_of(args, kwargs))

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def end(module: nn.Module, args: Any, kwargs: Any, output: Any, block: Block = block) -> None:
                self._end(block, output)

            self._handles += [
                block.module.register_forward_pre_hook(HookOfOneModel(begin), with_kwargs=True),
                block.module.register_forward_hook(HookOfOneModel(end), with_kwargs=True),
            ]

    def detach(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of the inputs of calls that have failed."""
        self._inputs = {}

    def _begin(self, block: Block, value: Any) -> None:
        if self.paused or not isinstance(value, Tensor):
            return
        if block.leaves == "identity" and (block.name in self._writes_to_its_input or not torch.is_grad_enabled()):
            value = value.clone()
        version = 0 if value.is_inference() else value._version
        self._inputs.setdefault(block.name, []).append((value, version))

    def _end(self, block: Block, output: Any) -> None:
        calls = self._inputs.get(block.name)
        if self.paused or not calls:
            return
        value, version = calls.pop()
        if block.returns is not None:
            output = output[0]
        if block.leaves == "zeros":
            self._seen(block.name, torch.zeros_like(output), output)
        elif not value.is_inference() and value._version != version:
            self._writes_to_its_input.add(block.name)
        else:
            self._seen(block.name, value, output)
