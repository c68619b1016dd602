"""Count, for a network of each family, what could merge, be fitted, or be taken out: the table of will-it-help.md.

``python docs/maintainers/families.py`` prints the table. Nothing is timed, so that it is the same on every machine.
Random weights, one image of 224×224 pixels (CIFAR networks: 32×32), or one sequence of 128 tokens.

``--time`` prints how much of the time of a forward that is instead, on the CPU, for a batch of one and of eight.
"""

import math
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_easier import candidates, isolate_activations
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.structure.norms import with_split_norms
from lightning_easier.support.batches import as_arguments
from lightning_easier.support.calls import call
from lightning_easier.support.operators import time_inside
from lightning_easier.zoo import CifarResNet

COLUMNS = ("network", "activations", "would merge", "in a chain", "of the MACs", "blocks", "of the MACs")
IMAGE = (3, 224, 224)
TIMED = ("network", "in a chain, batch 1", "batch 8", "blocks, batch 1", "batch 8")
SIZES = 1, 8


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


def macs_of_modules(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Count the multiply-accumulates of each module in one call, with those inside: name -> MACs; "" is the model."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, as_arguments(inputs, model))
    root = type(model).__name__
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return {name.removeprefix(root).removeprefix("."): macs for name, macs in counts.items() if name.startswith(root)}


def share(names: Iterable[str], counts: Mapping[str, float], total: float) -> str:
    """Return the share of the work, or of the time, that some modules have, in words."""
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
    places = Places(model)
    in_chains = {operator for chain in places.chains for operator in chain.operators}
    counts = macs_of_modules(model, inputs)
    return (
        name, str(len(places.sites)), str(len(places.merging)),
        str(len({site for chain in places.chains for site in chain.sites})), share(in_chains, counts, counts[""]),
        str(len(places.blocks)), share(places.blocks, counts, counts[""]),
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
            shares[which].append(share(names, spent, sum(spent.values())))
    return (name, *shares["chains"], *shares["blocks"])


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="how much of the time it is, and not of the work")
    is_timed = parser.parse_args().time
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole attention, which torch can't count
    columns, row_of = (TIMED, timed_row) if is_timed else (COLUMNS, row)
    print(f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", sep="\n")
    for network in networks():
        print(f"| {' | '.join(row_of(*network))} |", flush=True)


if __name__ == "__main__":
    main()
