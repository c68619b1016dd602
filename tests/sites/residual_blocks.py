"""What the tests of blocks share: residual blocks, and models that run on without theirs."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.support.inference import tensors_in


class Gone(nn.Module):
    """What is left where a block was."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.leaves, self.returns = block.leaves, block.returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _given(args, kwargs)
        value = given if self.leaves == "identity" else torch.zeros_like(given)
        return value if self.returns is None else (value, *[None] * (self.returns - 1))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def run(model: nn.Module, arguments: tuple[Any, ...]) -> list[torch.Size]:
    with torch.no_grad():
        return [tensor.shape for tensor in tensors_in(model(*arguments))]


def check_shapes(model: nn.Module, blocks: list[Block], arguments: tuple[Any, ...]) -> list[torch.Size]:
    """Run a model, compare what each block is given with what it returns, and return the shapes of the outputs."""
    calls: list[str] = []

    def compare(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(block.name)
            assert block.returns is None or len(output) == block.returns
            value, given = output if block.returns is None else output[0], _given(args, kwargs)
            assert (value.shape, value.dtype) == (given.shape, given.dtype), block

        return hook

    handles = [block.module.register_forward_hook(compare(block), with_kwargs=True) for block in blocks]
    shapes = run(model, arguments)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(block.name for block in blocks)
    return shapes


def check_removals(model: nn.Module, blocks: list[Block], arguments: tuple[Any, ...], expected: list[Any]) -> None:
    """Take out one block of each class, and all outermost ones together."""
    kinds = {(type(block.module), block.leaves, block.returns): [block] for block in blocks}
    outermost = [block for block in blocks if block.inside is None]
    for removed in (*kinds.values(), outermost):
        without = deepcopy(model)
        for block in removed:
            without.set_submodule(block.name, Gone(block))
        assert run(without, arguments) == expected, removed


def names(model: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(model)]


def rows(model: nn.Module) -> list[tuple[str, str, str | None, int | None]]:
    return [(block.name, block.leaves, block.inside, block.returns) for block in find_blocks(model)]


def conv(channels: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, options.pop("out", channels), 3, padding=1, **options)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.f = conv() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class AddsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.conv(y)


class ScaledResidual(nn.Module):
    def __init__(self, first=False):
        super().__init__()
        self.f, self.first = nn.Linear(8, 8), first

    def forward(self, scale, x):
        return x + scale * self.f(x)
