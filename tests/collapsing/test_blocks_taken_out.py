"""A collapse leaves nothing of a block that was taken out: no module, no parameter, no add of zeros."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from lightning_easier import collapse
from lightning_easier.collapsing import engine
from lightning_easier.collapsing.exact.capture import capture, capture_at
from lightning_easier.collapsing.exact.nodes import name_of
from lightning_easier.collapsing.exact.zero_branches import zero_branches
from lightning_easier.structure.linearize import bypass, replace_block
from lightning_easier.structure.stand_in import Bypass, StandIn
from lightning_easier.support import timing
from lightning_easier.support.affine import ChannelAffine
from lightning_easier.support.inference import relative_difference
from tests.models import randomize_batch_norms

SUMS = ("add", "add_", "iadd", "sub")


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Take no time for timings; a test may say that the named models are slower."""
    told = {}
    monkeypatch.setattr(timing.LatencyTable, "compare", lambda *_: timing.Speedup((1.0,) * 6))
    monkeypatch.setattr(
        engine, "compare", lambda calls, *_: {name: timing.Latency.of([told.get(name, 1.0)] * 6) for name in calls}
    )
    return told


def randomize(model):
    """Give norms, biases and scales random numbers, so that none is the identity by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.normal_(0.5, 0.2)
    return randomize_batch_norms(model)


def additions(model, *inputs):
    graph = model if isinstance(model, fx.GraphModule) else capture_at(copy.deepcopy(model), inputs)
    return sum(name_of(node) in SUMS for node in graph.graph.nodes)


def without(model, names, leaves, *inputs, returns=0, objective="depth"):
    """Take blocks out of a model and collapse it; check that the result is the same function, and plain."""
    model = bypass(randomize(copy.deepcopy(model)).eval(), names, leaves, returns)
    result = collapse(model, inputs, objective=objective)
    assert not any(isinstance(part, StandIn) for part in result.model.modules())
    assert not any("made_linear" in key for key in result.model.state_dict())
    assert result.report.relative_difference < 1e-5
    assert result.report.taken_out == names
    with torch.no_grad():
        assert relative_difference(result.model(*inputs), model(*inputs)) < 1e-5
    return result


def owners(model):
    return {name.rpartition(".")[0] for name, _ in model.named_parameters()}


def torchvisions_vit():
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)


def torchvisions_swin():
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=4)


def timms_vit():
    return pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=4, init_values=0.1
    )


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False,
                                    bos_token_id=None, eos_token_id=None)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=30, **common)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **common)),
    }[name]()  # fmt: skip


MAPS, MORE_MAPS, TOKENS = torch.randn(2, 3, 16, 16), torch.randn(1, 3, 32, 32), torch.arange(6).view(2, 3)

BRANCHES = {  # network, its branch, how many values it returns, what fed only the branch
    "torchvision's ViT, MLP": (torchvisions_vit, MAPS, "encoder.layers.encoder_layer_0.mlp", 0,
                               "encoder.layers.encoder_layer_0.ln_2"),
    "torchvision's ViT, attention": (torchvisions_vit, MAPS, "encoder.layers.encoder_layer_1.self_attention", 2,
                                     "encoder.layers.encoder_layer_1.ln_1"),
    "Swin, MLP": (torchvisions_swin, MORE_MAPS, "features.1.0.mlp", 0, "features.1.0.norm2"),
    "Swin, attention": (torchvisions_swin, MORE_MAPS, "features.3.0.attn", 0, "features.3.0.norm1"),
    "timm's ViT, MLP and layer scale": (timms_vit, MORE_MAPS, "blocks.0.mlp", 0, "blocks.0.norm2"),
    "timm's ViT, attention and layer scale": (timms_vit, MORE_MAPS, "blocks.1.attn", 0, "blocks.1.norm1"),
    "GPT-2, attention": (lambda: of_transformers("gpt2"), TOKENS, "h.1.attn", 2, "h.1.ln_1"),
    "ViT of transformers, attention": (lambda: of_transformers("vit"), MAPS, "layers.1.attention", 2,
                                       "layers.1.layernorm_before"),
}  # fmt: skip

BLOCKS = {
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=4), MORE_MAPS, ["layer1.1", "layer2.1"]),
    "MobileNetV2": (lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25), MORE_MAPS,
                    ["features.3", "features.8"]),
    "torchvision's ViT": (torchvisions_vit, MAPS, ["encoder.layers.encoder_layer_0"]),
    "Swin": (torchvisions_swin, MORE_MAPS, ["features.1.0"]),
    "timm's ViT": (timms_vit, MORE_MAPS, ["blocks.0"]),
    "BERT": (lambda: of_transformers("bert"), TOKENS, ["encoder.layer.1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BRANCHES)
def test_a_branch_that_was_taken_out_leaves_nothing(case):
    build, x, branch, returns, norm = BRANCHES[case]
    torch.manual_seed(0)
    model = build().eval()
    result = without(model, [branch], "zeros", x, returns=returns)
    assert isinstance(result.model, fx.GraphModule)
    assert not any(owner.startswith((branch, norm)) for owner in owners(result.model))
    assert additions(result.model, x) < additions(bypass(copy.deepcopy(model), [branch], "zeros", returns), x)
    assert not any(name_of(node) == "zeros_like" for node in result.model.graph.nodes)


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_that_was_taken_out_leaves_nothing(case):
    build, x, blocks = BLOCKS[case]
    torch.manual_seed(0)
    model = build().eval()
    result = without(model, blocks, "identity", x)
    assert isinstance(result.model, fx.GraphModule)
    assert not any(owner.startswith(tuple(f"{block}." for block in blocks)) for owner in owners(result.model))
    assert additions(result.model, x) < additions(model, x)


def test_zeros_that_an_operator_reads_leave_its_bias_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 6)
            self.dense, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.tanh(x + self.dense(self.inner(self.norm(x)))))

    result = without(Net(), ["inner"], "zeros", torch.randn(2, 5, 6))
    assert not {"dense", "inner", "norm"} & owners(result.model)


def test_a_scale_that_the_caller_of_a_branch_holds_goes_with_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.branch, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.tanh(x + self.branch(x) * self.gamma.view(1, -1)))

    result = without(Net(), ["branch"], "zeros", torch.randn(5, 6))
    assert dict(result.model.named_parameters()).keys() == {"last.weight", "last.bias"}


# ---- random residual networks --------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, width, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width, *(1,) * axes))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """Returns two values, like attention."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask=None):
        return self.inner(x), mask


class Residual(nn.Module):
    def __init__(self, norm, branch, after, style, returns=0):
        super().__init__()
        self.norm, self.branch, self.after, self.style, self.returns = norm, branch, after, style, returns

    def forward(self, x):
        y = self.branch(self.norm(x))
        if self.returns:
            y, _ = y
        y = self.after(y)
        match self.style:
            case "skip first":
                return x + y
            case "branch first":
                return y + x
            case "in place":
                y += x
                return y
            case "method":
                return torch.add(x, y)
            case "rectified":
                return F.relu(y + x, inplace=True)
            case "difference":
                return x - y


STYLES = ("skip first", "branch first", "in place", "method", "rectified", "difference")


def residual(pick, width, maps):
    """Return a residual block, and how many values its branch returns."""
    if maps:
        norm = pick.choice([nn.BatchNorm2d(width), nn.GroupNorm(1, width), nn.Identity()])
        branch = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, width, 1, bias=False))
    else:
        norm = pick.choice([nn.LayerNorm(width), nn.Identity()])
        branch = nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, width))
    returns = pick.choice([0, 2])
    after = nn.Sequential(*pick.sample([Scale(width, 2 if maps else 0), nn.Dropout(0.5)], pick.randint(0, 2)))
    return Residual(norm, Attention(branch) if returns else branch, after, pick.choice(STYLES), returns), returns


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_random_residual_networks_lose_blocks_and_branches_exactly(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed % 2**31)
    width, maps, depth = pick.randint(2, 4), pick.random() < 0.5, pick.randint(1, 4)
    blocks, returns = zip(*(residual(pick, width, maps) for _ in range(depth)), strict=True)
    stem = nn.Conv2d(width, width, 3) if maps else nn.Linear(width, width)
    model = nn.Sequential(stem, *blocks, nn.Flatten(1), nn.LazyLinear(3)).double()
    x = torch.randn(2, width, 6, 5).double() if maps else torch.randn(2, 5, width).double()
    model(x)
    randomize(model).eval()
    for number, values in enumerate(returns, 1):
        match pick.choice(["stays", "block", "branch", "branch"]):
            case "block":
                bypass(model, [str(number)], "identity")
            case "branch":
                bypass(model, [f"{number}.branch"], "zeros", values)
    with torch.no_grad():
        expected = model(x.clone())
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x.clone()), expected, rtol=1e-9, atol=1e-9)
    kept = sum(isinstance(part, Residual) and not isinstance(part.branch, StandIn) for part in model.modules())
    assert additions(result.model, x) <= kept
    assert not any(isinstance(part, StandIn | Bypass) for part in result.model.modules())


class AsksForSamples(nn.Module):
    """Asks for a size, which torch.export takes, and torch.fx does not."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.shape[2] < 100 else x


@pytest.mark.parametrize("style", ["skip first", "branch first", "in place", "difference"])
def test_torch_export_loses_blocks_and_branches_exactly(style):
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
    blocks = [Residual(nn.LayerNorm(4), copy.deepcopy(branch), Scale(4, 0), style) for _ in range(3)]
    model = randomize(AsksForSamples(nn.Sequential(*blocks, nn.Linear(4, 3))).double()).eval()
    bypass(model, ["model.0"], "identity")
    bypass(model, ["model.1.branch"], "zeros")
    x = torch.randn(2, 5, 4).double()
    with torch.no_grad():
        expected = model(x.clone())
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x.clone()), expected, rtol=1e-9, atol=1e-9)
    assert "aten" in str(result.model.graph)
    assert additions(result.model, x) == 1
    assert not any(owner.startswith(("model.0", "model.1")) for owner in owners(result.model))


# ---- what is written, read twice, or stays -------------------------------------------


class Written(nn.Module):
    """Writes into the sum of a value that is read besides, and a branch."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = x + self.branch(x)
        y.relu_()
        return self.last(x) + self.last(y)


def test_a_sum_that_is_written_into_does_not_write_into_what_it_was_made_of():
    model = Written().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    bypass(model, ["branch"], "zeros")
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any("left out" in refusal.reason for refusal in result.report.refusals)
    assert additions(result.model, x) == 1


class WrittenZeros(nn.Module):
    """Reads zeros after something was written into them."""

    def __init__(self):
        super().__init__()
        self.branch, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        zeros = self.branch(x)
        zeros += x
        return self.last(torch.tanh(x) + zeros) + self.last(zeros)


def test_zeros_that_are_written_into_are_none_any_more():
    model = bypass(WrittenZeros().double(), ["branch"], "zeros")
    x = torch.randn(5, 4, dtype=torch.float64)
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


class Broadcast(nn.Module):
    """Adds a branch that is larger than what it is added to."""

    def __init__(self):
        super().__init__()
        self.branch, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(x.mean(1, keepdim=True) + self.branch(x))


def test_zeros_that_give_a_sum_its_shape_stay():
    model = bypass(Broadcast().double(), ["branch"], "zeros")
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert result.model(x).shape == (5, 3, 2)


def test_a_scale_that_is_not_finite_makes_no_zeros():
    model = nn.Sequential(Residual(nn.Identity(), nn.Linear(4, 4), Scale(4, 0), "skip first"), nn.Linear(4, 2)).double()
    bypass(model, ["0.branch"], "zeros")
    graph = capture(copy.deepcopy(model).eval(), [torch.randn(2, 4).double()])
    assert len(list(zero_branches(graph))) == 1
    with torch.no_grad():
        model[0].after.gamma[1] = torch.inf
    graph = capture(copy.deepcopy(model).eval(), [torch.randn(2, 4).double()])
    assert list(zero_branches(graph)) == []


class Opaque(nn.Module):
    """Asks its values, so that nothing traces it."""

    def __init__(self):
        super().__init__()
        self.block, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.block(x)
        return x + self.branch(x) if float(x.sum()) > -1e9 else x


def test_what_stays_whole_keeps_no_mark_and_no_block_and_says_what_is_left():
    model = nn.Sequential(nn.Linear(4, 4), Opaque(), nn.Linear(4, 2)).double()
    bypass(model, ["1.block"], "identity")
    bypass(model, ["1.branch"], "zeros")
    x = torch.randn(3, 4, dtype=torch.float64)
    result = collapse(model, x, objective="depth")
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(part, StandIn) for part in result.model.modules())
    assert owners(result.model) == {"0", "2"}
    reasons = {refusal.operators: refusal.reason for refusal in result.report.refusals}
    assert "passes on what it gets" in reasons["1.block",]
    assert "zeros are added in its place" in reasons["1.branch",]
    assert result.report.taken_out == ["1.block", "1.branch"]
    assert "`1.branch` was taken out" in str(result.report)


def test_a_model_that_is_faster_as_it_was_keeps_its_forward_and_no_block(times):
    times.update(after=2.0, unmerged=2.0)
    model = Written().double()
    bypass(model, ["branch"], "zeros")
    x = torch.randn(5, 3, dtype=torch.float64)
    result = collapse(model, x)
    assert type(result.model) is Written
    assert type(result.model.branch) is Bypass
    assert not any("made_linear" in key for key in result.model.state_dict())
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    reasons = {refusal.operators: refusal.reason for refusal in result.report.refusals}
    assert "zeros are added in its place" in reasons["branch",]
    assert model.branch.activation is not None  # the model itself was not touched


class PostNormed(nn.Module):
    """x + norm(f(x)), as in Swin v2."""

    def __init__(self, f, norm):
        super().__init__()
        self.f, self.norm = f, norm

    def forward(self, x):
        return x + self.norm(self.f(x))


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False), nn.GroupNorm(2, 6), nn.BatchNorm2d(6)],
)
def test_a_norm_of_zeros_leaves_its_offset_alone(norm):
    is_of_maps = isinstance(norm, nn.GroupNorm | nn.BatchNorm2d)
    layer = (lambda a, b: nn.Conv2d(a, b, 1)) if is_of_maps else nn.Linear
    model = randomize(nn.Sequential(layer(5, 6), PostNormed(layer(6, 6), norm), nn.Tanh(), layer(6, 2))).double().eval()
    bypass(model, ["1.f"], "zeros")
    x = torch.randn(3, 5, *((4, 3) if is_of_maps else ()), dtype=torch.float64)
    small = collapse(model, x, objective="macs").model
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert additions(small, x) == 0
    assert not [name for name, _ in small.named_parameters() if "norm" in name]


def test_a_norm_over_several_axes_stays():
    norm = nn.LayerNorm((4, 6))
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Linear(5, 6), PostNormed(nn.Linear(6, 6), norm), nn.Tanh()).double().eval()
    bypass(model, ["1.f"], "zeros")
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(collapse(model, x, objective="macs").model(x), model(x), rtol=0, atol=1e-12)


def test_what_took_the_place_of_a_block_merges_with_its_neighbours():
    torch.manual_seed(0)
    for operator in (ChannelAffine(4, -1), nn.Linear(4, 4)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3))
        for parameter in operator.parameters():
            nn.init.normal_(parameter)
        model = replace_block(model, "1", operator).double()
        x = torch.randn(5, 4, dtype=torch.float64)
        result = collapse(model, x, objective="depth")
        torch.testing.assert_close(result.model(x), model(x))
        assert [tuple(p.shape) for p in result.model.parameters()] == [(3, 4), (3,)]
