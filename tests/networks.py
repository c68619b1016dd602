"""Other people's networks, small inputs, random weights: what the coverage table and its test are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Network:
    """A network to try, built anew at each call of ``build``."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    @property
    def installed(self) -> bool:
        return find_spec(self.library) is not None

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"


def _images(size: int, count: int = 1) -> Callable[[], Inputs]:
    def make() -> tuple[Tensor]:
        return (torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    return make


def _torchvision(name: str, size: int = 64, **options: Any) -> Network:
    def build() -> nn.Module:
        if name in ("inception_v3", "googlenet"):
            options.setdefault("init_weights", False)  # theirs takes a minute
        return torchvision.models.get_model(name, weights=None, **options)

    return Network("torchvision", name, build, _images(size))


def _detector(name: str) -> Network:
    def build() -> nn.Module:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        model.transform.min_size, model.transform.max_size = (64,), 96
        if hasattr(model.transform, "fixed_size") and model.transform.fixed_size:
            model.transform.fixed_size = (128, 128)
        return model

    def inputs() -> Inputs:
        return ([_images(64)()[0][0]],)

    return Network("torchvision", name, build, inputs)


def _timm(name: str, size: int = 64, **options: Any) -> Network:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return Network("timm", name, build, _images(size))


def _transformers(name: str, config: str, inputs: Callable[[], Inputs], **options: Any) -> Network:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return Network("transformers", name, build, inputs)


def _words() -> Inputs:
    return (torch.arange(24).reshape(2, 12) % 50,)


_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip

NETWORKS: tuple[Network, ...] = (
    _torchvision("alexnet"),
    _torchvision("vgg11", 32),
    _torchvision("vgg16_bn", 32),
    _torchvision("resnet18"),
    _torchvision("resnet50"),
    _torchvision("resnext50_32x4d"),
    _torchvision("wide_resnet50_2"),
    _torchvision("densenet121"),
    _torchvision("inception_v3", 96),
    _torchvision("googlenet"),
    _torchvision("squeezenet1_1"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("mnasnet0_5"),
    _torchvision("efficientnet_b0"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("regnet_y_400mf"),
    _torchvision("convnext_tiny"),
    _torchvision("swin_t"),
    _torchvision("swin_v2_t"),
    _torchvision("vit_b_32", 64, image_size=64),
    _torchvision("maxvit_t", 224),
    _torchvision("fcn_resnet50", weights_backbone=None),
    _torchvision("deeplabv3_resnet50", weights_backbone=None),
    _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None),
    _detector("fasterrcnn_resnet50_fpn"),
    _detector("fasterrcnn_resnet50_fpn_v2"),
    _detector("maskrcnn_resnet50_fpn"),
    _detector("keypointrcnn_resnet50_fpn"),
    _detector("retinanet_resnet50_fpn"),
    _detector("fcos_resnet50_fpn"),
    _detector("ssdlite320_mobilenet_v3_large"),
    _timm("resnet10t"),
    _timm("resnetv2_18"),
    _timm("regnetx_002"),
    _timm("mobilenetv4_conv_small"),
    _timm("tf_efficientnet_lite0"),
    _timm("ghostnet_050"),
    _timm("dla34"),
    _timm("hrnet_w18_small"),
    _timm("res2net50_14w_8s"),
    _timm("vovnet39a"),
    _timm("repvgg_a0"),
    _timm("nf_regnet_b0"),
    _timm("convnextv2_atto"),
    _timm("convmixer_768_32"),
    _timm("mixer_s32_224", 224),
    _timm("vit_tiny_patch16_224", 224),
    _timm("vit_base_patch32_clip_quickgelu_224", 224),
    _timm("deit_tiny_patch16_224", 224),
    _timm("levit_128s", 224),
    _timm("swin_tiny_patch4_window7_224", 224),
    _timm("poolformer_s12"),
    _timm("caformer_s18"),
    _timm("mobilevit_xxs"),
    _timm("efficientformer_l1", 224),
    _timm("fastvit_t8"),
    _timm("xcit_nano_12_p16_224", 224),
    _timm("rexnet_100"),
    _timm("selecsls42b"),
    _timm("tresnet_m"),
    _timm("coat_lite_tiny", 224),
    _timm("edgenext_xx_small"),
    _timm("nasnetalarge", 96),
    _timm("inception_resnet_v2", 96),
    _transformers("BertModel", "BertConfig", _words, vocab_size=50, max_position_embeddings=16, **_SMALL),
    _transformers("ViTModel", "ViTConfig", _images(32), image_size=32, patch_size=8, **_SMALL),
    _transformers("GPT2Model", "GPT2Config", _words, n_positions=16, n_embd=32, n_layer=2, n_head=2),
    _transformers("CLIPVisionModel", "CLIPVisionConfig", _images(32), image_size=32, patch_size=8, **_SMALL),
    _transformers("AlbertModel", "AlbertConfig", _words, vocab_size=50, embedding_size=16, **_SMALL),
)  # fmt: skip
