"""Random networks of linear operators, for property tests: chains and residual graphs from the whole algebra."""

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import randomize_batch_norms

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


class LayerScale(nn.Module):
    """Scales and offsets channels, as written in ConvNeXt and timm."""

    def __init__(self, channels: int, axes: int, spelling: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, *[1] * axes))
        self.beta = nn.Parameter(torch.randn(channels, *[1] * axes))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "scale":
            return self.gamma * x
        if self.spelling == "offset":
            return x - self.beta
        if self.spelling == "in place":
            x *= self.gamma
            return x.add_(self.beta)
        return torch.mul(x, self.gamma.reshape(self.gamma.shape)) + 0.5


class Spell(nn.Module):
    """Something that is no module: pooling, flattening, slicing, padding, permuting, as functions and methods."""

    def __init__(self, spelling: str, axes: int = 0) -> None:
        super().__init__()
        self.spelling = spelling
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "mean":
                return x.mean(list(range(2, 2 + self.axes)))
            case "mean keepdim":
                return torch.mean(x, tuple(range(-1, -1 - self.axes, -1)), keepdim=True)
            case "flatten":
                return torch.flatten(x, 1)
            case "view":
                return x.view(x.size(0), -1)
            case "reshape":
                return x.reshape(x.shape[0], x.shape[1])
            case "rows":
                return x.reshape(-1, self.axes)
            case "every second":
                return x[(slice(None), slice(None), *[slice(None, None, 2)] * self.axes)]
            case "channels last":
                return x.movedim(1, -1)
            case "channels first":
                return x.movedim(-1, 1)
            case "more channels":
                return F.pad(x, (*[0, 0] * self.axes, 1, 2))
            case "around":
                return F.pad(x, [1, 1] * self.axes)
            case "zeros around":
                return (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[self.axes - 1](1)(x)
            case "copy":
                return x.clone().contiguous()
            case "same dtype":
                return x.to(x.dtype)
            case "half":
                return x * 0.5
            case "shift":
                return 2 - x
            case "tokens":
                return x.flatten(0, -2)
            case "mean of tokens":
                return x.mean(dim=1)
        raise AssertionError(self.spelling)


class Branches(nn.Module):
    """Adds or concatenates what several branches make of one value."""

    def __init__(self, branches: list[nn.Module], spelling: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        if self.spelling == "concatenate":
            return torch.cat(values, dim=1)
        total = values[0]
        for value in values[1:]:
            if self.spelling == "in place":
                total += value
            elif self.spelling == "difference":
                total = total - value
            elif self.spelling == "share":
                total = torch.add(total, value, alpha=0.5)
            else:
                total = torch.add(total, value) if self.spelling == "function" else total + value
        return total


class Positions(nn.Module):
    """Scales and offsets each element of a sample."""

    def __init__(self, shape: tuple[int, ...], spelling: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))
        self.offset = nn.Parameter(torch.randn(1, *shape))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "offset":
            return x + self.offset
        return x * self.scale if self.spelling == "scale" else torch.sub(x * self.scale, self.offset)


class FunctionalLinear(nn.Module):
    """A convolution or Linear as a function of parameters."""

    def __init__(self, operator: Any, of_vectors: bool = False) -> None:
        super().__init__()
        self.of_vectors = of_vectors
        self.weight, self.bias, self.kind = operator.weight, operator.bias, type(operator)
        self.options = {}
        if not isinstance(operator, nn.Linear):
            self.options = {name: getattr(operator, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        if self.of_vectors and self.bias is not None:
            return torch.addmm(self.bias, x, self.weight.t(), alpha=1.5)
        if self.kind is nn.Linear:
            return F.linear(x, self.weight, self.bias)
        function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: torch.conv3d}[self.kind]
        return function(x, self.weight, self.bias, **self.options)


class Asks(nn.Module):
    """Asks for a shape before it goes on, which torch.fx can't follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 1:
            raise ValueError("no channels")
        return self.inner(x)


@dataclass
class State:
    """What a value looks like while a network is drawn."""

    channels: int
    sizes: tuple[int, ...]  # of a map; () for vectors
    last: bool = False  # whether the channels come last (tokens)

    def shape(self, samples: int) -> tuple[int, ...]:
        return (samples, *self.sizes, self.channels) if self.last else (samples, self.channels, *self.sizes)


@st.composite
def networks(draw: st.DrawFn, most: int = 6) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """Draw a network in eval mode, and the shapes of two inputs that it accepts."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    axes = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3]))
    sizes = tuple(draw(st.integers(5, 11)) for _ in range(axes))
    tokens = axes == 0 and draw(st.booleans())
    state = State(draw(st.integers(1, 6)), (4,) if tokens else sizes, tokens)
    first = state.shape(2)
    steps = [_step(draw, state) for _ in range(draw(st.integers(2, most)))]
    model: nn.Module = randomize_batch_norms(nn.Sequential(*steps), seed=draw(st.integers(0, 99)))
    if draw(st.integers(0, 19)) == 0:
        model = Asks(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and draw(st.integers(0, 9)) == 0:
            nn.init.zeros_(module.bias) if module.bias is not None else None
    of_one_size = any(isinstance(module, Positions) for module in model.modules())
    second = (
        (3, *first[1:])
        if axes == 0 or of_one_size or draw(st.booleans())
        else (1, first[1], *(n + draw(st.integers(0, 3)) for n in sizes))
    )
    try:
        output = model.eval()(torch.randn(first))
    except RuntimeError:  # a crop that leaves nothing, say
        reject()
    if not output.numel() or output.norm() < 1e-3:  # what cancels out, as in x + (2 - x) - 2, is rounding only
        reject()
    return model, first, second


def _step(draw: st.DrawFn, state: State, inside: bool = False) -> nn.Module:
    if state.last or not state.sizes:
        return _vector_step(draw, state, inside)
    axes = len(state.sizes)
    small = min(state.sizes) < 3
    kinds = ["convolution"] * 4 + ["pointwise"] * 3 + ["batch norm", "affine", "idle", "number"]
    if not small:
        kinds += ["pool", "slice"]
    if not inside:
        kinds += ["branches"] * 2 + ["global", "transposed", "pad", "channels last", "flatten", "positions"]
        if all(size == 1 for size in state.sizes):
            kinds += ["flatten"] * 6
    kind = draw(st.sampled_from(kinds))
    if kind in ("convolution", "pointwise", "transposed"):
        return _convolution(draw, state, kind)
    if kind == "batch norm":
        return BATCH_NORMS[axes - 1](state.channels, affine=draw(st.booleans()))
    if kind == "affine":
        return LayerScale(state.channels, axes, draw(st.sampled_from(["scale", "offset", "in place", "view"])))
    if kind == "number":
        return Spell(draw(st.sampled_from(["half", "shift"])))
    if kind == "idle":
        return draw(st.sampled_from([nn.Identity(), DROPOUTS[max(axes - 1, 0)](), Spell("copy"), Spell("same dtype")]))
    if kind == "branches":
        return _branches(draw, state)
    if kind == "pool":
        padding = draw(st.integers(0, 1))
        stride, ceil, whole = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
        pool = POOLS[axes - 1](2 + padding, stride, padding, ceil_mode=ceil, count_include_pad=whole)
        state.sizes = tuple(pool(torch.zeros(1, 1, *state.sizes)).shape[2:])
        return pool
    if kind == "slice":
        state.sizes = tuple((size + 1) // 2 for size in state.sizes)
        return Spell("every second", axes)
    if kind == "global":
        spelling = draw(st.sampled_from(["module", "mean keepdim", "mean"]))
        state.sizes = () if spelling == "mean" else (1,) * axes
        return ADAPTIVE_POOLS[axes - 1](1) if spelling == "module" else Spell(spelling, axes)
    if kind == "positions":
        return Positions(state.shape(1)[1:], draw(st.sampled_from(["scale", "offset", "both"])))
    if kind == "flatten":
        spellings = [nn.Flatten(), Spell("flatten"), Spell("view")]
        if all(size == 1 for size in state.sizes):
            spellings += [Spell("reshape"), Spell("rows", state.channels)]
        state.channels, state.sizes = state.channels * prod(state.sizes), ()
        return draw(st.sampled_from(spellings))
    if kind == "pad":
        if draw(st.booleans()):
            state.channels += 3
            return Spell("more channels", axes)
        state.sizes = tuple(size + 2 for size in state.sizes)
        return Spell(draw(st.sampled_from(["around", "zeros around"])), axes)
    assert kind == "channels last"
    state.last = True
    return Spell("channels last")


def _vector_step(draw: st.DrawFn, state: State, inside: bool) -> nn.Module:
    kinds = ["linear"] * 5 + ["affine", "idle", "number"]
    if not state.last:
        kinds.append("batch norm")
    if not inside:
        kinds += ["branches"] * 2
        if state.last:
            kinds += ["channels first", "tokens", "positions"] + ["mean"] * (len(state.sizes) == 1)
    kind = draw(st.sampled_from(kinds))
    if kind == "linear":
        width = draw(st.integers(1, 6))
        made = nn.Linear(state.channels, width, draw(st.booleans()))
        state.channels = width
        return FunctionalLinear(made, of_vectors=not state.last) if draw(st.integers(0, 4)) == 0 else made
    if kind == "affine":
        return LayerScale(state.channels, 0, draw(st.sampled_from(["scale", "offset", "in place", "view"])))
    if kind == "number":
        return Spell(draw(st.sampled_from(["half", "shift"])))
    if kind == "idle":
        return draw(st.sampled_from([nn.Identity(), nn.Dropout(), Spell("copy"), Spell("same dtype")]))
    if kind == "batch norm":
        return nn.BatchNorm1d(state.channels)
    if kind == "branches":
        return _branches(draw, state)
    if kind == "positions":
        return Positions(state.shape(1)[1:], draw(st.sampled_from(["scale", "offset", "both"])))
    state.last = False
    if kind == "channels first":
        return Spell("channels first")
    state.sizes = ()
    return Spell("tokens" if kind == "tokens" else "mean of tokens")


def _convolution(draw: st.DrawFn, state: State, kind: str) -> nn.Module:
    axes = len(state.sizes)
    outputs = draw(st.integers(1, 6))
    groups = draw(st.sampled_from([1, 1, gcd(state.channels, outputs), state.channels]))
    outputs = groups * max(outputs // groups, 1)
    options = {"bias": draw(st.booleans()), "groups": groups}
    if kind == "pointwise":
        made = CONVOLUTIONS[axes - 1](state.channels, outputs, 1, **options)
        state.channels = outputs
        return made

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    if kind == "transposed":
        stride, dilation = each(1, 2), each(1, 2)
        beyond = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        kernel = each(1, 3)
        padding = tuple(draw(st.integers(0, 1)) if k > 1 else 0 for k in kernel)
        made = TRANSPOSED[axes - 1](
            state.channels, outputs, kernel, stride, padding, beyond, dilation=dilation, **options
        )
    else:
        kernel = tuple(min(k, size) for k, size in zip(each(1, 3), state.sizes, strict=True))
        dilation = tuple(
            draw(st.integers(1, 2)) if d * 2 < size else 1 for d, size in zip(kernel, state.sizes, strict=True)
        )
        padding = draw(st.sampled_from([(0,) * axes, (0,) * axes, tuple(k // 2 for k in kernel), each(0, 2)]))
        mode = draw(st.sampled_from(["zeros"] * 5 + ["circular", "replicate"]))
        if any(p > size for p, size in zip(padding, state.sizes, strict=True)):
            padding = (0,) * axes
        made = CONVOLUTIONS[axes - 1](
            state.channels, outputs, kernel, each(1, 2), padding, dilation, padding_mode=mode, **options
        )
    try:
        shape = made(torch.zeros(1, state.channels, *state.sizes)).shape
    except RuntimeError:  # a crop that leaves nothing
        reject()
    state.channels, state.sizes = outputs, tuple(shape[2:])
    functional = kind == "convolution" and made.padding_mode == "zeros" and draw(st.integers(0, 4)) == 0
    return FunctionalLinear(made) if functional else made


def _branches(draw: st.DrawFn, state: State) -> nn.Module:
    """Draw branches that end in one shape; what does not fit is left out."""
    spelling = draw(st.sampled_from(["operator", "function", "in place", "concatenate", "difference", "share"]))
    branches: list[nn.Module] = []
    ends: list[State] = []
    for _ in range(draw(st.integers(2, 3))):
        end = State(state.channels, state.sizes, state.last)
        steps = (
            []
            if draw(st.integers(0, 2)) == 0
            else [_step(draw, end, inside=True) for _ in range(draw(st.integers(1, 3)))]
        )
        if ends and end.sizes == ends[0].sizes and end.channels != ends[0].channels and spelling != "concatenate":
            width = ends[0].channels
            vectors = end.last or not end.sizes
            steps.append(
                nn.Linear(end.channels, width) if vectors else CONVOLUTIONS[len(end.sizes) - 1](end.channels, width, 1)
            )
            end.channels = width
        if not ends or (end.sizes == ends[0].sizes and (spelling == "concatenate" or end.channels == ends[0].channels)):
            branches.append(nn.Sequential(*steps))
            ends.append(end)
    if spelling == "concatenate" and state.last:
        spelling = "operator"
        branches, ends = branches[:1], ends[:1]
    if spelling == "in place" and len(branches[0]) == 0:
        spelling = "operator"  # it would write into its own input
    state.sizes, state.last = ends[0].sizes, ends[0].last
    state.channels = sum(end.channels for end in ends) if spelling == "concatenate" else ends[0].channels
    return Branches(branches, spelling)
