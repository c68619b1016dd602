"""Count, for a network of each family, what could merge, be fitted, or be taken out: the table of will-it-help.md.

``python docs/maintainers/families.py`` prints the table. Nothing is timed, so that it is the same on every machine.
Random weights, one image of 224×224 pixels (CIFAR networks: 32×32), or one sequence of 128 tokens.
"""

from collections.abc import Collection, Iterator

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from lightning_easier import candidates, isolate_activations
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.norms import with_split_norms
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import call
from lightning_easier.support.costs import count_macs
from lightning_easier.zoo import CifarResNet

COLUMNS = ("network", "activations", "would merge", "in a chain", "of the MACs", "blocks", "of the MACs")
IMAGE = (3, 224, 224)
OPERATORS = (nn.Linear, nn.modules.conv._ConvNd, transformers.pytorch_utils.Conv1D)


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield name, network and example inputs."""
    image = torch.randn(1, *IMAGE)
    yield "ResNet-56 (CIFAR)", CifarResNet(56), torch.randn(1, 3, 32, 32)
    for name in (
        "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf",
        "densenet121", "convnext_tiny", "swin_t", "vit_b_16",
    ):  # fmt: skip
        yield f"torchvision {name}", torchvision.models.get_model(name), image
    for name in ("mixer_s32_224", "poolformer_s12", "repvgg_a0", "mobilenetv4_conv_small"):
        yield f"timm {name}", timm.create_model(name), image
    tokens = torch.randint(0, 1000, (1, 128))
    yield "transformers BERT (base)", transformers.BertModel(transformers.BertConfig()), tokens
    yield "transformers GPT-2", transformers.GPT2Model(transformers.GPT2Config(use_cache=False)), tokens


def macs_of_operators(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Count the multiply-accumulates of each operator with weights in one call: name -> MACs."""
    counts: dict[str, int] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
        outputs = weight.shape[1 if transposed else 0]
        counts[name] = counts.get(name, 0) + output.numel() * (weight.numel() // outputs)

    for name, module in model.named_modules():
        if isinstance(module, OPERATORS):
            module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
    with torch.no_grad():
        call(model, as_arguments(inputs, model))
    return counts


def share(names: Collection[str], counts: dict[str, int], total: int) -> str:
    """Return the share of the multiply-accumulates that some operators have, in words."""
    return f"{sum(counts.get(name, 0) for name in names) / total:.0%}"


def row(name: str, model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the row of one network."""
    model = with_split_norms(model.eval())
    total = count_macs(model, as_arguments(inputs, model))
    sites = isolate_activations(model)
    merging = [this for this in candidates(model).candidates if this.merges]
    chains = FittableChains(model, sites).in_rows()
    in_chains = {operator for chain in chains for operator in chain.operators}
    blocks = [block.name for block in find_blocks(model)]
    outer = [block for block in blocks if not any(block.startswith(f"{other}.") for other in blocks)]
    counts = macs_of_operators(model, inputs)
    in_blocks = [operator for operator in counts if any(operator.startswith(f"{block}.") for block in outer)]
    return (
        name, str(len(sites)), str(len(merging)), str(len({site for chain in chains for site in chain.sites})),
        share(in_chains, counts, total), str(len(outer)), share(in_blocks, counts, total),
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", sep="\n")
    for network in networks():
        print(f"| {' | '.join(row(*network))} |", flush=True)


if __name__ == "__main__":
    main()
