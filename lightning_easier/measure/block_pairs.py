"""Hooks that see what goes into blocks and what comes out of them, together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.sites.blocks import Block
from lightning_easier.support.hooks import HookOfOneModel, first_tensor

Seen = Callable[[str, Tensor, Tensor], None]
"""What is told of a call: the name of the block, what would be left of it, and what it has computed."""


class _Input(NamedTuple):
    """What a block is called with.

    Attributes:
        value: The tensor itself.
        version: How often it was written into by then; None for one that does not count that.
        kept: It, or a copy.
    """

    value: Tensor
    version: int | None
    kept: Tensor


class BlockPairs:
    """Owns the hooks on blocks that compare what a block computes with what is left when it is taken out.

    That is the block's input, or zeros where a branch of an addition is taken out. Where no gradients are recorded, the
    input is copied first, for a block may write into it; where they are, the first call tells whether it does.

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
        self._writes: dict[str, bool] = {}  # block -> whether it writes into its input, as its first call has told
        self._inputs: dict[str, list[_Input]] = {}  # of calls that go on
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""
        if self._handles:
            return
        for block in self._blocks:

            @torch.compiler.disable  # type: ignore[untyped-decorator]
            def begin(module: nn.Module, args: Any, kwargs: Any, block: Block = block) -> None:
                self._begin(block, first_tensor(args, kwargs))

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
        may_write = not torch.is_grad_enabled() or self._writes.get(block.name, True)
        kept = value.clone() if block.leaves == "identity" and may_write else value
        version = None if value.is_inference() else value._version
        self._inputs.setdefault(block.name, []).append(_Input(value, version, kept))

    def _end(self, block: Block, output: Any) -> None:
        calls = self._inputs.get(block.name)
        if self.paused or not calls:
            return
        value, version, kept = calls.pop()
        if version is not None:
            self._writes.setdefault(block.name, value._version != version)
            if not self._writes[block.name]:  # gradients are summed up in the order of later calls, which copy nothing
                kept = value
        if block.returns is not None:
            output = output[0]
        if block.leaves == "zeros":
            self._seen(block.name, torch.zeros_like(output), output)
        else:
            self._seen(block.name, kept, output)
