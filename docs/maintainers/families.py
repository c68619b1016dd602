"""Count, for a network of each family, what could merge, be fitted, or be taken out: the table of will-it-help.md.

``python docs/maintainers/families.py`` prints the table. Nothing is timed, so that it is the same on every machine.
Random weights, one image of 224×224 pixels (CIFAR networks: 32×32), or one sequence of 128 tokens.

``--time`` prints how much of the time of a forward that is instead, on the CPU, for a batch of one and of eight.
"""

import math
from argparse import ArgumentParser
from collections.abc import Collection, Iterable, Iterator

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
from lightning_easier.support.operators import time_inside
from lightning_easier.zoo import CifarResNet

COLUMNS = ("network", "activations", "would merge", "in a chain", "of the MACs", "blocks", "of the MACs")
IMAGE = (3, 224, 224)
TIMED = ("network", "in a chain, batch 1", "batch 8", "blocks, batch 1", "batch 8")
SIZES = 1, 8
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


class Places:
    """What could be replaced in a network, by name.

    Args:
        model: The network; its norms are split and its activations isolated.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = list(isolate_activations(model))
        self.merging = [this for this in candidates(model).candidates if this.merges]
        self.chains = FittableChains(model, self.sites).in_rows()
        blocks = [block.name for block in find_blocks(model)]
        self.blocks = [block for block in blocks if not any(block.startswith(f"{other}.") for other in blocks)]

    def are_in_blocks(self, names: Iterable[str]) -> list[str]:
        """Return those of some modules that are in a block."""
        return [name for name in names if any(f"{name}.".startswith(f"{block}.") for block in self.blocks)]


def row(name: str, model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the row of one network in which all is counted."""
    model = with_split_norms(model.eval())
    total = count_macs(model, as_arguments(inputs, model))
    places = Places(model)
    in_chains = {operator for chain in places.chains for operator in chain.operators}
    counts = macs_of_operators(model, inputs)
    return (
        name, str(len(places.sites)), str(len(places.merging)),
        str(len({site for chain in places.chains for site in chain.sites})), share(in_chains, counts, total),
        str(len(places.blocks)), share(places.are_in_blocks(counts), counts, total),
    )  # fmt: skip


def timed_row(name: str, model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the row of one network that says how much of the time is in what could be replaced."""
    model = with_split_norms(model.eval())
    places = Places(model)
    in_chains = {part for chain in places.chains for part in chain.parts}
    shares: dict[str, list[str]] = {"chains": [], "blocks": []}
    for size in SIZES:
        arguments = as_arguments(inputs.repeat(size, *[1] * (inputs.ndim - 1)), model)
        seconds = time_inside({name: model}, arguments, lambda: math.inf, most=10.0)[name]
        spent: dict[str, float] = {}  # functions go by the module whose forward calls them
        for key, each in seconds.items():
            module = key.split(": ")[0]
            spent[module] = spent.get(module, 0.0) + each
        for which, names in (("chains", in_chains), ("blocks", {*places.are_in_blocks(spent)})):
            shares[which].append(f"{sum(spent[each] for each in names & spent.keys()) / sum(spent.values()):.0%}")
    return (name, *shares["chains"], *shares["blocks"])


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="how much of the time it is, and not of the work")
    is_timed = parser.parse_args().time
    torch.manual_seed(0)
    columns, row_of = (TIMED, timed_row) if is_timed else (COLUMNS, row)
    print(f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", sep="\n")
    for network in networks():
        print(f"| {' | '.join(row_of(*network))} |", flush=True)


if __name__ == "__main__":
    main()
