"""Blocks that can be taken out: found where they are, nowhere else, and the rest runs on without them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_easier.sites.activations import isolate_activations
from lightning_easier.sites.blocks import Block, find_blocks
from lightning_easier.structure.linearize import bypass
from lightning_easier.support.inference import tensors_in
from lightning_easier.zoo import CifarResNet
from tests.networks import NETWORKS
from tests.sites.test_dataflow import Net


class _Gone(nn.Module):
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


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> list[torch.Size]:
    with torch.no_grad():
        return [tensor.shape for tensor in tensors_in(model(*arguments))]


def _check_shapes(model: nn.Module, blocks: list[Block], arguments: tuple[Any, ...]) -> list[torch.Size]:
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
    shapes = _run(model, arguments)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(block.name for block in blocks)
    return shapes


def _check_removals(model: nn.Module, blocks: list[Block], arguments: tuple[Any, ...], expected: list[Any]) -> None:
    """Take out one block of each class, and all outermost ones together."""
    kinds = {(type(block.module), block.leaves, block.returns): [block] for block in blocks}
    outermost = [block for block in blocks if block.inside is None]
    for removed in (*kinds.values(), outermost):
        without = deepcopy(model)
        for block in removed:
            without.set_submodule(block.name, _Gone(block))
        assert _run(without, arguments) == expected, removed


def _names(model: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(model)]


def _rows(model: nn.Module) -> list[tuple[str, str, str | None, int | None]]:
    return [(block.name, block.leaves, block.inside, block.returns) for block in find_blocks(model)]


def _tiny(library: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """Build a small network of somebody else's classes."""

    def build() -> nn.Module:
        if library == "timm":
            return pytest.importorskip("timm").create_model(name, **options)
        return getattr(torchvision.models, name)(**options)

    return build


def _listed(name: str) -> Callable[[], nn.Module]:
    return next(network for network in NETWORKS if str(network) == name).build


def _convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(8, 16, 2), setting(16, None, 1)], stochastic_depth_prob=0.2)


_VIT = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "image_size": 32, "patch_size": 8}
_SWIN = {
    "patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [2, 2],
    "stochastic_depth_prob": 0.2,
}  # fmt: skip
_IMAGES = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
_WORDS = (torch.arange(24).reshape(2, 12) % 50,)
# Name -> what builds it, its inputs, and the number of blocks and of branches that its structure has, counted by hand.
_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[int, int]]] = {
    "resnet18": (_listed("torchvision-resnet18"), _IMAGES, (5, 0)),
    "resnet50": (_tiny("torchvision", "resnet50", width_per_group=8), _IMAGES, (12, 0)),
    "mobilenet_v2": (_listed("torchvision-mobilenet_v2"), _IMAGES, (10, 0)),
    "efficientnet_b0": (_listed("torchvision-efficientnet_b0"), _IMAGES, (9, 0)),
    "convnext": (_convnext, _IMAGES, (3, 0)),
    "vit": (_tiny("torchvision", "VisionTransformer", **_VIT), _IMAGES, (2, 4)),
    "swin": (_tiny("torchvision", "SwinTransformer", **_SWIN), _IMAGES, (3, 6)),
    "densenet": (_tiny("torchvision", "DenseNet", growth_rate=4, block_config=(2, 2)), _IMAGES, (0, 0)),
    "squeezenet": (_tiny("torchvision", "squeezenet1_1"), _IMAGES, (0, 0)),
    "timm resnet10t": (_tiny("timm", "resnet10t"), _IMAGES, (1, 0)),
    "timm regnetx": (_tiny("timm", "regnetx_002"), _IMAGES, (9, 0)),
    "timm vit": (
        _tiny("timm", "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, drop_path_rate=0.2), _IMAGES, (2, 4)
    ),
    "timm convnextv2": (_tiny("timm", "convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), _IMAGES, (4, 0)),
    "BERT": (_listed("transformers-BertModel"), _WORDS, (4, 0)),
    "ViT": (_listed("transformers-ViTModel"), _IMAGES, (2, 4)),
    "GPT-2": (_listed("transformers-GPT2Model"), _WORDS, (2, 4)),
    "CLIP": (_listed("transformers-CLIPVisionModel"), _IMAGES, (2, 4)),
    "ALBERT": (_listed("transformers-AlbertModel"), _WORDS, (0, 0)),  # one layer, called again and again
    "CifarResNet": (lambda: CifarResNet(20), _IMAGES, (7, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", _NETWORKS)
def test_other_peoples_networks_run_on_without_their_blocks(name: str) -> None:
    build, arguments, counts = _NETWORKS[name]
    if build.__qualname__.startswith("_transformers"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build().eval()

    blocks = find_blocks(model)

    leaves = [block.leaves for block in blocks]
    assert (leaves.count("identity"), leaves.count("zeros")) == counts
    assert all(model.get_submodule(block.name) is block.module for block in blocks)
    shapes = _check_shapes(model, blocks, arguments)
    _check_removals(model, blocks, arguments, shapes)
    _check_shapes(model, blocks, tuple(torch.cat([each, each[:1]]) for each in arguments))


def _built(name: str) -> nn.Module:
    return _NETWORKS[name][0]()


def test_names_of_residual_blocks() -> None:
    assert _rows(_built("resnet18")) == [
        (name, "identity", None, None) for name in ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    ]
    assert _names(_built("mobilenet_v2")) == [f"features.{number}" for number in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    assert _names(CifarResNet(20)) == [
        *(f"layer1.{number}" for number in range(3)), "layer2.1", "layer2.2", "layer3.1", "layer3.2",
    ]  # fmt: skip


def test_names_of_branches() -> None:
    pytest.importorskip("transformers")
    layer = "encoder.layers.encoder_layer_0"
    assert _rows(_built("vit"))[:3] == [
        (layer, "identity", None, None),
        (f"{layer}.self_attention", "zeros", layer, 2),
        (f"{layer}.mlp", "zeros", layer, None),
    ]
    assert _rows(_built("swin"))[:3] == [
        ("features.1.0", "identity", None, None),
        ("features.1.0.attn", "zeros", "features.1.0", None),
        ("features.1.0.mlp", "zeros", "features.1.0", None),
    ]
    assert _rows(_built("GPT-2"))[:3] == [
        ("h.0", "identity", None, None), ("h.0.attn", "zeros", "h.0", 2), ("h.0.mlp", "zeros", "h.0", None),
    ]  # fmt: skip
    assert _rows(_built("ViT"))[:3] == [
        ("layers.0", "identity", None, None), ("layers.0.attention", "zeros", "layers.0", 2),
        ("layers.0.mlp", "zeros", "layers.0", None),
    ]  # fmt: skip
    # norms come after the additions, which are made inside modules that are given both sides
    assert _rows(_built("BERT")) == [
        row
        for layer in ("encoder.layer.0", "encoder.layer.1")
        for row in ((layer, "identity", None, None), (f"{layer}.attention", "identity", layer, 2))
    ]


def test_nothing_of_the_model_changes() -> None:
    model = CifarResNet(8)
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = deepcopy(model.state_dict())
    children = dict(model.named_modules())

    assert find_blocks(model)

    assert [module.training for module in model.modules()] == modes
    assert dict(model.named_modules()) == children
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _conv(channels: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, options.pop("out", channels), 3, padding=1, **options)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.f = _conv() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class _PostActivation(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.f(x), x), inplace=True)


class _Minus(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class _Times(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.f(x))


class _Cropped(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x))[:, :, 1:]


class _Tuple(_Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y


class _SecondInput(_Residual):
    """The skip is the second value that it is given."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.f(x)


class _OnlyInTraining(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            return y.mean((2, 3))
        return x + y


class _WritesInput(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x) + self.f(x)


class _Dictionary(_Residual):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x + self.f(x)}


def test_plain_and_nested_blocks() -> None:
    assert _rows(nn.Sequential(_conv(), _Residual(), nn.ReLU())) == [("1", "identity", None, None)]
    assert _names(nn.Sequential(_conv(), _PostActivation())) == ["1"]
    # a chain of blocks is none of its own; a block around such a chain is
    assert _names(nn.Sequential(nn.Sequential(_Residual(), _Residual()), nn.ReLU())) == ["0.0", "0.1"]
    assert _rows(nn.Sequential(_Residual(nn.Sequential(_conv(), _Residual(), nn.Sequential(_Residual()))))) == [
        ("0", "identity", None, None), ("0.f.1", "identity", "0", None), ("0.f.2.0", "identity", "0", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "example"),
    [
        (_Residual(_conv(1, out=4)), torch.zeros(2, 1, 6, 6)),  # the skip is spread over the channels
        (_Residual(_conv(4, out=1)), None),
        (_Residual(nn.Linear(1, 6)), torch.zeros(2, 4, 6, 1)),
        (_Cropped(), None),
        (_Minus(), None),
        (_Times(), None),
        (_Dictionary(), None),
        (_OnlyInTraining(), None),
        (nn.Sequential(nn.LayerNorm(6), nn.ReLU()), None),
        (_conv(), None),
        (nn.Conv2d(4, 4, 3, 2, 1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_block(block: nn.Module, example: Tensor | None) -> None:
    block(torch.zeros(2, 4, 6, 6) if example is None else example)  # it does run

    assert [name for name in _names(nn.Sequential(block, nn.ReLU())) if name == "0"] == []


class _PooledSkip(nn.Module):
    """The skip is pooled to one position, and spread again by the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _AddsFirst()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), _conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.pool(x), self.conv(x))


class _AddsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.conv(y)


class _Context(nn.Module):
    """A pooled value is added: the block keeps its shape, the branch has another one."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Sequential(_conv(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.context(x)


def test_pooled_values() -> None:
    assert _names(_PooledSkip()) == []
    model = nn.Sequential(_Context(), nn.Sequential(_Residual(_Context())))
    assert _names(model) == ["0", "1.0", "1.0.f"]
    assert _names(_Context()) == []


class _Leaky(nn.Module):
    """A value from inside a block is read by its caller."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block, self.end = inner, _Residual()

    def forward(self, x: Tensor) -> Tensor:
        value, inner = self.block(x)
        return self.end(value) + inner


class _UsesFirst(_Leaky):
    def forward(self, x: Tensor) -> Tensor:
        value, _ = self.block(x)
        return self.end(value)


def test_values_that_others_read() -> None:
    assert _names(_Leaky(_Tuple())) == ["end"]
    model = _UsesFirst(_Tuple())
    assert _rows(model) == [("block", "identity", None, 2), ("end", "identity", None, None)]
    _check_removals(model, find_blocks(model), (torch.zeros(2, 4, 6, 6),), [torch.Size((2, 4, 6, 6))])


class _Around(nn.Module):
    """The value before a block is read again after it, or the value after it is overwritten."""

    def __init__(self, block: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.after, self.other = block, after or nn.Identity(), _conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        return torch.cat([self.after(self.block(x)), x], 1)


def test_writing_in_place() -> None:
    assert _names(nn.Sequential(_conv(), _WritesInput())) == ["1"]  # nothing else reads what it overwrites
    assert _names(_Around(_WritesInput())) == ["block.f"]  # the branch writes nothing
    assert _names(_Around(_Residual(), nn.ReLU(inplace=True))) == ["block.f"]  # an identity would let it write to x
    assert _names(_Around(_Residual(), nn.ReLU())) == ["block"]


def test_writing_in_place_after_two_blocks() -> None:
    """The one that is left lets it write to the input of both, once the other is gone."""
    assert _names(_Around(nn.Sequential(_Residual(), _Residual()), nn.ReLU(inplace=True))) == ["block.0.f", "block.1"]


class _CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.once = _Residual(), _Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.block(self.block(x)))


def test_what_is_called_twice_is_left_out() -> None:
    assert _names(_CalledTwice()) == ["once"]


class _TwoInputs(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.left, self.right = block, _conv(), _conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.left(x), self.right(x))


def test_two_inputs() -> None:
    """The identity passes the first value on, so that has to be the skip."""
    assert _names(_TwoInputs(_AddsFirst())) == ["block"]
    assert _names(_TwoInputs(_SecondInput())) == []


class _Branches(nn.Module):
    """Additions of branches, one with a norm before and dropout after, made by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.first, self.gated, self.strided, self.other = _conv(), _conv(), _conv(stride=2), _conv()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.drop(self.first(self.norm(x)))
        x = x + x * self.gated(x)  # no addition takes what it computes
        x = self.pool(x) + self.strided(x)
        return x + x + 2 * self.other(F.relu(x))


def test_branches_of_the_model_itself() -> None:
    model = _Branches()
    assert _rows(model) == [("first", "zeros", None, None), ("other", "zeros", None, None)]
    _check_removals(model.eval(), find_blocks(model), (torch.zeros(2, 4, 6, 6),), [torch.Size((2, 4, 3, 3))])


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
    assert _rows(nn.Sequential(nn.Linear(8, 8), model)) == [
        ("1", "identity", None, None), ("1.mix", "zeros", "1", None),
    ]  # fmt: skip
    _check_removals(model, find_blocks(model), (torch.randn(2, 3, 8),), [torch.Size((2, 3, 8))])


class _Unreadable(nn.Module):
    """Its forward asks for a value, so that nobody can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.branch = _Residual(), _conv()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum() * 0) + 1):
            x = self.block(x)
        return x + self.branch(x)


def test_blocks_inside_what_cannot_be_traced() -> None:
    """A block keeps its shape whoever calls it; what a branch is added to is not known."""
    assert _names(nn.Sequential(_conv(), _Unreadable())) == ["1.block"]


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"Expected argument `model` to be a torch.nn.Module, but got str"):
        find_blocks("resnet18")  # type: ignore[arg-type]


def test_an_isolated_model_has_the_same_blocks() -> None:
    model = CifarResNet(8)
    model.layer1[0] = _PostActivation(_conv(16))
    names = _names(model)
    assert names == ["layer1.0"]

    isolate_activations(model)

    assert _names(model) == names


class _Task(LightningModule):
    """A LightningModule without a forward, that holds its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CifarResNet(8)


class _WithForward(_Task):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = CifarResNet(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_lightning_modules() -> None:
    assert _names(_Task()) == ["net.layer1.0"]
    assert _names(_WithForward()) == ["net.layer1.0"]  # its forward does not call the other one


def test_wrapped_models() -> None:
    assert _names(torch.compile(CifarResNet(8))) == ["layer1.0"]  # type: ignore[arg-type]
    assert _names(nn.DataParallel(CifarResNet(8))) == ["layer1.0"]


class Position(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(8))

    def forward(self):
        return self.values * 2


class Residual(nn.Module):
    def __init__(self, first=False):
        super().__init__()
        self.f, self.first = nn.Linear(8, 8), first

    def forward(self, scale, x):
        return x + scale * self.f(x)


def test_a_module_that_is_called_with_nothing_is_no_block():
    net = Net(lambda m, x: m.block(1.0, x + m.position()), block=Residual(), position=Position())
    assert [block.name for block in find_blocks(net)] == ["block"]


def test_a_block_with_a_weight_that_is_read_outside_is_left_out():
    net = Net(lambda m, x: F.linear(m.block(1.0, x), m.block.f.weight), block=Residual())
    assert find_blocks(net) == []


def test_the_layer_that_torchs_encoder_asks_stays():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    net = nn.Sequential(nn.Linear(5, 8), layers)
    names = [block.name for block in find_blocks(net) if block.inside is None]
    assert "1.layers.0" not in names
    assert {"1.layers.1", "1.layers.2"} <= {*names}
    bypass(net, ["1.layers.1", "1.layers.2"])
    net.eval()(torch.randn(2, 4, 5))


def test_what_is_left_is_the_first_tensor():
    net = Net(lambda m, x: m.block(2.0, x), block=Residual())
    (block,) = find_blocks(net)
    bypass(net, [block.name], block.leaves)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), x)
