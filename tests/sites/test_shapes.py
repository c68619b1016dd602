"""Shapes are followed without an example: what broadcasts, pools or crops is no block."""

import pytest
import torch
from torch import Tensor, nn

from lightning_easier.sites.blocks import find_blocks
from tests.sites.residual_blocks import AddsFirst, Residual, check_removals, conv, names, rows


class _Minus(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class _Times(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.f(x))


class _Cropped(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x))[:, :, 1:]


class _OnlyInTraining(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            return y.mean((2, 3))
        return x + y


class _Dictionary(Residual):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x + self.f(x)}


@pytest.mark.parametrize(
    ("block", "example"),
    [
        (Residual(conv(1, out=4)), torch.zeros(2, 1, 6, 6)),  # the skip is spread over the channels
        (Residual(conv(4, out=1)), None),
        (Residual(nn.Linear(1, 6)), torch.zeros(2, 4, 6, 1)),
        (_Cropped(), None),
        (_Minus(), None),
        (_Times(), None),
        (_Dictionary(), None),
        (_OnlyInTraining(), None),
        (nn.Sequential(nn.LayerNorm(6), nn.ReLU()), None),
        (conv(), None),
        (nn.Conv2d(4, 4, 3, 2, 1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_block(block: nn.Module, example: Tensor | None) -> None:
    block(torch.zeros(2, 4, 6, 6) if example is None else example)  # it does run

    assert [name for name in names(nn.Sequential(block, nn.ReLU())) if name == "0"] == []


class _PooledSkip(nn.Module):
    """The skip is pooled to one position, and spread again by the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.block = AddsFirst()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.pool(x), self.conv(x))


class _Context(nn.Module):
    """A pooled value is added: the block keeps its shape, the branch has another one."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.context(x)


def test_pooled_values() -> None:
    assert names(_PooledSkip()) == []
    model = nn.Sequential(_Context(), nn.Sequential(Residual(_Context())))
    assert names(model) == ["0", "1.0", "1.0.f"]
    assert names(_Context()) == []


class _WrittenOut(nn.Module):
    """The norms of Llama are formulas; the gate of squeeze and excitation is one like them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.mix, self.mlp, self.gate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        scaled = self.mlp(x)
        return x + scaled * torch.sigmoid(self.gate(scaled.mean(1, keepdim=True)))


def test_norms_that_are_written_out() -> None:
    """What the second addition takes is read by the gate, too."""
    model = _WrittenOut()
    assert rows(nn.Sequential(nn.Linear(8, 8), model)) == [
        ("1", "identity", None, None), ("1.mix", "zeros", "1", None),
    ]  # fmt: skip
    check_removals(model, find_blocks(model), (torch.randn(2, 3, 8),), [torch.Size((2, 3, 8))])
