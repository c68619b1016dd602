"""Blocks that can be taken out: found in other people's networks, and the rest runs on without them."""

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
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.linearize import bypass
from lightning_easier.zoo import CifarResNet
from tests.networks import NETWORKS
from tests.sites.residual_blocks import Residual, ScaledResidual, check_removals, check_shapes, conv, names, rows
from tests.sites.test_dataflow import Net


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


def _mixer() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=24)
    return model


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
    "timm mixer": (_mixer, _IMAGES, (2, 4)),
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
    shapes = check_shapes(model, blocks, arguments)
    check_removals(model, blocks, arguments, shapes)
    check_shapes(model, blocks, tuple(torch.cat([each, each[:1]]) for each in arguments))


def _built(name: str) -> nn.Module:
    return _NETWORKS[name][0]()


def test_names_of_residual_blocks() -> None:
    assert rows(_built("resnet18")) == [
        (name, "identity", None, None) for name in ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    ]
    assert names(_built("mobilenet_v2")) == [f"features.{number}" for number in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    assert names(CifarResNet(20)) == [
        *(f"layer1.{number}" for number in range(3)), "layer2.1", "layer2.2", "layer3.1", "layer3.2",
    ]  # fmt: skip


def test_names_of_branches() -> None:
    pytest.importorskip("transformers")
    layer = "encoder.layers.encoder_layer_0"
    assert rows(_built("vit"))[:3] == [
        (layer, "identity", None, None),
        (f"{layer}.self_attention", "zeros", layer, 2),
        (f"{layer}.mlp", "zeros", layer, None),
    ]
    assert rows(_built("swin"))[:3] == [
        ("features.1.0", "identity", None, None),
        ("features.1.0.attn", "zeros", "features.1.0", None),
        ("features.1.0.mlp", "zeros", "features.1.0", None),
    ]
    assert rows(_built("GPT-2"))[:3] == [
        ("h.0", "identity", None, None), ("h.0.attn", "zeros", "h.0", 2), ("h.0.mlp", "zeros", "h.0", None),
    ]  # fmt: skip
    assert rows(_built("ViT"))[:3] == [
        ("layers.0", "identity", None, None), ("layers.0.attention", "zeros", "layers.0", 2),
        ("layers.0.mlp", "zeros", "layers.0", None),
    ]  # fmt: skip
    # norms come after the additions, which are made inside modules that are given both sides
    assert rows(_built("BERT")) == [
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


class _PostActivation(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.f(x), x), inplace=True)


def test_plain_and_nested_blocks() -> None:
    assert rows(nn.Sequential(conv(), Residual(), nn.ReLU())) == [("1", "identity", None, None)]
    assert names(nn.Sequential(conv(), _PostActivation())) == ["1"]
    # a chain of blocks is none of its own; a block around such a chain is
    assert names(nn.Sequential(nn.Sequential(Residual(), Residual()), nn.ReLU())) == ["0.0", "0.1"]
    assert rows(nn.Sequential(Residual(nn.Sequential(conv(), Residual(), nn.Sequential(Residual()))))) == [
        ("0", "identity", None, None), ("0.f.1", "identity", "0", None), ("0.f.2.0", "identity", "0", None),
    ]  # fmt: skip


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"Expected argument `model` to be a torch.nn.Module, but got str"):
        find_blocks("resnet18")  # type: ignore[arg-type]


def test_an_isolated_model_has_the_same_blocks() -> None:
    model = CifarResNet(8)
    model.layer1[0] = _PostActivation(conv(16))
    found = names(model)
    assert found == ["layer1.0"]

    isolate_activations(model)

    assert names(model) == found


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
    assert names(_Task()) == ["net.layer1.0"]
    assert names(_WithForward()) == ["net.layer1.0"]  # its forward does not call the other one


def test_wrapped_models() -> None:
    assert names(torch.compile(CifarResNet(8))) == ["layer1.0"]  # type: ignore[arg-type]
    assert names(nn.DataParallel(CifarResNet(8))) == ["layer1.0"]


def test_what_is_left_is_the_first_tensor():
    net = Net(lambda m, x: m.block(2.0, x), block=ScaledResidual())
    (block,) = find_blocks(net)
    bypass(net, [block.name], block.leaves)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), x)
