"""The table of blocks: on example inputs, with shares of the cost, by globs."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import BlockReport, collapsible_blocks
from lightning_easier.zoo import CifarResNet

_IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _names(report: BlockReport) -> list[str]:
    return [block.name for block in report.blocks]


class _Layer(nn.Module):
    """An MLP around a skip, and a second branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.mix(x)


def test_without_inputs_there_are_names_only() -> None:
    report = collapsible_blocks(nn.Sequential(nn.Linear(3, 8), _Layer(8)))

    assert report.to_markdown().splitlines() == [
        "**Blocks that can be taken out**",
        "",
        "| block | kind | leaves | inside | share of MACs | share of time |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 | _Layer | identity | - | - | - |",
        "| 1.mlp | Sequential | zeros | 1 | - | - |",
        "| 1.mix | Linear | zeros | 1 | - | - |",
    ]


def test_shares_of_the_cost() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _Layer(8))

    report = collapsible_blocks(model, torch.randn(4, 8))

    # multiply-accumulates a sample: 64 for each of two small layers, 2 * 256 for the wide ones
    assert [block.macs for block in report.blocks] == [pytest.approx(share / 640) for share in (576, 512, 64)]
    assert all(block.time is not None and block.time > 0 for block in report.blocks)
    assert report.left_out == {}
    assert report.notes == []
    assert "90.0%" in report.to_markdown()


def test_nothing_of_the_model_changes() -> None:
    model = CifarResNet(8)
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = deepcopy(model.state_dict())
    images = _IMAGES.clone()

    assert _names(collapsible_blocks(model, images)) == ["layer1.0"]

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(images, _IMAGES)


class _Pair(nn.Module):
    """The addition is between a row and a column: nobody can tell without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), _Spread()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x).reshape(-1, 1, 8))


class _Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x).permute(1, 0, 2)


def test_a_block_that_is_none_is_left_out_with_the_reason() -> None:
    assert _names(collapsible_blocks(_Pair())) == ["block"]

    report = collapsible_blocks(_Pair(), torch.randn(3, 8))

    assert _names(report) == []
    assert report.left_out == {
        "block": "its output has shape (3, 3, 8) and dtype torch.float32, its input (3, 1, 8) and torch.float32"
    }
    assert "| block | its output has shape" in report.to_markdown()


def test_another_batch_size_tells_more() -> None:
    """With one sample, the row and the column have one shape."""
    report = collapsible_blocks(_Pair(), torch.randn(1, 8))

    assert report.left_out == {
        "block": "its output has shape (2, 2, 8) and dtype torch.float32, its input (2, 1, 8) and torch.float32"
    }


class _OfTwo(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 8))


def test_a_batch_that_cannot_grow_is_noted() -> None:
    report = collapsible_blocks(_OfTwo(8), torch.randn(2, 8))

    assert _names(report) == ["mlp", "mix"]
    assert len(report.notes) == 1
    assert report.notes[0].startswith("The shapes were checked with the batch as given only")


class _SometimesCalled(nn.Module):
    """It calls its block once a sample, which no look at its code tells."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _Layer(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.block(sample) for sample in x])


def test_a_block_that_is_called_several_times_is_left_out() -> None:
    assert "block" in _names(collapsible_blocks(_SometimesCalled()))
    assert collapsible_blocks(_SometimesCalled(), torch.randn(3, 8)).left_out["block"] == "it is called 3 times"


class _Asks(nn.Module):
    """Asks its block for something in a way that no look at its code tells: its own forward can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.other = nn.Linear(8, 8), _Layer(8), _Layer(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if bool((x == x).all()):
            x = self.block(x) * len(self.block.mlp)
        return self.other(x)


def test_a_block_without_which_the_model_does_not_run_is_left_out_with_the_reason() -> None:
    model = _Asks()
    modules, before = dict(model.named_modules()), [*model.block._modules]

    report = collapsible_blocks(model, torch.randn(3, 8), include=["block", "other"])

    assert _names(report) == ["other"]
    assert report.left_out["block"].startswith("the model does not run without it (AttributeError: ")
    assert dict(model.named_modules()) == modules
    assert [*model.block._modules] == before


class _Logarithm(nn.Module):
    """Of nothing in the place of the branch the logarithm is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.other = nn.Linear(8, 8), nn.Linear(8, 8), _Layer(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.other(x + self.branch(x).abs().log())


def test_a_branch_without_which_the_output_is_not_finite_is_left_out() -> None:
    report = collapsible_blocks(_Logarithm(), torch.randn(3, 8), include=["branch", "other"])

    assert _names(report) == ["other"]
    assert report.left_out == {"branch": "what the model returns is not finite without it"}


def test_no_block_is_no_error() -> None:
    report = collapsible_blocks(nn.Linear(3, 3), torch.randn(2, 3))

    assert report.blocks == []
    assert report.to_markdown().startswith("**No blocks that can be taken out**")


def test_globs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _Layer(8), _Layer(8))
    assert _names(collapsible_blocks(model, include="*.mlp")) == ["1.mlp", "2.mlp"]
    assert _names(collapsible_blocks(model, include=["1", "1.*"], exclude="*.mix")) == ["1", "1.mlp"]
    with pytest.raises(ValueError, match=r"Expected argument `exclude` to hold globs that match blocks, but '3\.\*'"):
        collapsible_blocks(model, exclude="3.*")
    with pytest.raises(TypeError, match="Expected argument `include` to hold name globs, but got 3"):
        collapsible_blocks(model, include=3)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"Expected argument `model` to be a torch.nn.Module, but got str"):
        collapsible_blocks("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected argument `example_inputs` to be a tensor"):
        collapsible_blocks(CifarResNet(8), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected argument `example_inputs` to be accepted by the forward"):
        collapsible_blocks(CifarResNet(8), torch.randn(2, 5))
    with torch.device("meta"):
        model = CifarResNet(8)
    assert _names(collapsible_blocks(model)) == ["layer1.0"]
    with pytest.raises(ValueError, match="on the meta device"):
        collapsible_blocks(model, _IMAGES)
