"""How long do ``compress`` and the fitted method take on large networks? Random images: the time only.

Part ``large`` of ``python -m benchmarks``, for a GPU: ResNet-50 and ViT-B/16 at 224².
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torchvision
from fitting import compressions, tiny
from questions import Case, Effort, Question, Variant, elapsed
from torch import nn

from lightning_easier import fit_chains
from lightning_easier.collapsing.exact.prices import Objective


def questions(effort: Effort) -> Iterator[Question]:
    """Ask how long each takes."""
    large = [(name, torchvision.models.get_model_builder(kind), 224)
             for name, kind in (("ResNet-50", "resnet50"), ("ViT-B/16", "vit_b_16"))]  # fmt: skip
    networks: list[tuple[str, Callable[[], nn.Module], int]] = effort.pick(
        large, large, [("three convolutions", tiny, 8)]
    )
    images = effort.pick(1000, 200, 16)
    objective: Objective = effort.pick("latency", "latency", "macs")  # timings take seconds, however small it is
    for name, make in (("fits of all chains", fits), ("compress", partial(compressions, objective=objective))):
        cases = [
            Case(f"{network}, {images:,} images of 3×{size}×{size}", partial(make, build, images, size), is_slow=True)
            for network, build, size in networks
        ]
        yield Question(f"{name}, random weights and images", tuple(cases))


def fits(make: Callable[[], nn.Module], images: int, size: int, device: torch.device) -> dict[str, Variant]:
    """Return fits of one operator in the place of every chain of a network."""
    batch = min(images, 50)
    model = make().to(device).eval()
    batches = [torch.randn(batch, 3, size, size, device=device) for _ in range(images // batch)]
    return {"fit": Variant(elapsed(lambda: fit_chains(model, batches), device))}
