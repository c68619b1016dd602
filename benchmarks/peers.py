"""What others do to make a trained network faster: the peers of ``tuning.py``, each until it is as fast as wanted.

- ``taylor``: Torch-Pruning (Fang et al., "DepGraph", arXiv 2301.12900). Channels go in groups that depend on each
  other, those of least first-order Taylor importance in the whole network. Of a transformer, the width that attention
  has stays, since torchvision's forward reads it as a number; that inside the MLPs and of the stem goes. Of a CIFAR
  ResNet those inside the blocks go: its shortcuts pad channels with zeros, and DepGraph takes one padded for one that
  was there, so that shapes do not fit at some step.
- ``fastnas``: ModelOpt's FastNAS. The widths of all layers are searched, under a bound of the multiply-accumulates.
- ``blocks_kl``, ``blocks_cka``: whole residual blocks go, the one at a time after which the logits diverge least, or
  after which the features before the head are most alike (1 − linear CKA; Pons et al., arXiv 2405.17081).
- ``practise``: as ``blocks_kl``; then the features before the head follow those of the dense network on 500 images
  without labels (after Wang and Wu, "Practical network acceleration with tiny sets", CVPR 2023).

The first two need the extra ``peers``.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier import TakenOut, collapse
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.support.costs import count_macs
from lightning_easier.support.timing import measure_latency, speed_up
from lightning_easier.zoo import CifarResNet

_STEPS, _LEAST_LEFT = 50, 0.1  # of Torch-Pruning: until a tenth of the channels is left
_DIVISOR = 4  # of widths in FastNAS: its default, 32, leaves narrow networks as they are
_CLOSE_ENOUGH, _BISECTIONS = 0.02, 6
_IMAGES_TO_MIMIC, _STEPS_TO_MIMIC, _BATCH = 500, 300, 64


@dataclass
class Speed:
    """Tells how much faster than the dense network one is when it is collapsed.

    Attributes:
        dense: The dense network, its batch norms folded.
        example: What is timed.
        wanted: The speed-up that is wanted.
    """

    dense: nn.Module
    example: Tensor
    wanted: float

    def may_be_reached(self, model: nn.Module) -> bool:
        """Tell whether enough multiply-accumulates are gone; no network of ours gains more than they tell."""
        before, after = (count_macs(each, (self.example[:1],)) for each in (self.dense, model))
        return after * self.wanted <= before

    def of(self, model: nn.Module) -> float:
        """Return the median ratio, of timings in turn."""
        calls = {"before": self.dense, "after": collapse(model, self.example, objective="macs").model}
        times = measure_latency(calls, (self.example,), samples=25)
        return speed_up(times["before"], times["after"]).median

    def is_reached(self, model: nn.Module) -> bool:
        """Tell whether a network is fast enough; it is timed where it may be."""
        return self.may_be_reached(model) and self.of(model) >= self.wanted * (1 - _CLOSE_ENOUGH)


Peer = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor], Speed], nn.Module]
"""Makes a model faster, given calibration batches and their labels. It is given a copy to work on."""


def taylor(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor], speed: Speed) -> nn.Module:
    """Prune channels by Torch-Pruning, step by step, until the network is fast enough."""
    import torch_pruning as tp

    stays = [_head(model), *(module for module in model.modules() if isinstance(module, nn.MultiheadAttention))]
    if isinstance(model, CifarResNet):
        stays += [model.conv1, *(module for name, module in model.named_modules() if name.endswith(".conv2"))]
    pruner = tp.pruner.BasePruner(
        model, batches[0][:2], importance=tp.importance.GroupTaylorImportance(), global_pruning=True,
        pruning_ratio=1 - _LEAST_LEFT, iterative_steps=_STEPS, ignored_layers=stays,
    )  # fmt: skip
    for _ in range(_STEPS):
        model.zero_grad()
        for values, classes in zip(batches, labels, strict=True):
            F.cross_entropy(model(values), classes).backward()
        pruner.step()
        if speed.is_reached(model):
            break
    model.zero_grad()
    return model


def fastnas(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor], speed: Speed) -> nn.Module:
    """Search widths by FastNAS, under the bound of multiply-accumulates that makes the network fast enough.

    Where none does, the fastest that was found is returned.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.fastnas import FastNASConfig

    def hits(candidate: nn.Module) -> float:
        with torch.no_grad():
            return sum(
                float((candidate(x).argmax(1) == y).float().mean()) for x, y in zip(batches, labels, strict=True)
            )

    space = FastNASConfig().model_dump()
    space["nn.Conv2d"]["*"]["channel_divisor"] = space["nn.BatchNorm2d"]["*"]["feature_divisor"] = _DIVISOR
    low, high = 0.1, 1.0  # the share of multiply-accumulates: too few, too many
    best, fastest = model, 0.0
    with TemporaryDirectory() as folder:
        settings = {
            "data_loader": [(x,) for x in batches], "collect_func": lambda batch: batch[0], "score_func": hits,
            "verbose": False, "checkpoint": str(Path(folder) / "scores.pth"),
        }  # fmt: skip
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            try:
                found, _ = mtp.prune(
                    deepcopy(model), [("fastnas", space)], {"flops": f"{100 * share:.2f}%"}, batches[0][:1], settings
                )
            except ValueError:  # nothing in the space is as small
                low = share
                continue
            reached = speed.of(found)
            if reached >= speed.wanted * (1 - _CLOSE_ENOUGH):
                best, fastest, low = found, math.inf, share
            else:
                high = share
                if reached > fastest:
                    best, fastest = found, reached
            if abs(reached / speed.wanted - 1) <= _CLOSE_ENOUGH:
                break
    return best


def blocks_kl(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor], speed: Speed) -> nn.Module:
    """Take out blocks, the one at a time after which the logits diverge least."""
    return _without_blocks(model, batches, speed, lambda module, values: module(values), _divergence)


def blocks_cka(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor], speed: Speed) -> nn.Module:
    """Take out blocks, the one at a time after which the features before the head are most alike."""
    return _without_blocks(model, batches, speed, _features, _unlikeness)


def practise(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor], speed: Speed) -> nn.Module:
    """Take out blocks, then have the features before the head follow those of the dense network, without labels."""
    dense = deepcopy(model).eval()
    model = blocks_kl(model, batches, labels, speed)
    images = torch.cat(list(batches))[:_IMAGES_TO_MIMIC]
    with torch.no_grad():
        wanted = torch.cat([_features(dense, part) for part in images.split(_BATCH)])
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS_TO_MIMIC)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS_TO_MIMIC):
        places = torch.randperm(len(images), generator=generator)[:_BATCH]
        with torch.enable_grad():
            loss = F.mse_loss(_features(model, images[places]), wanted[places])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    return model


PEERS: dict[str, Peer] = {peer.__name__: peer for peer in (taylor, fastnas, blocks_kl, blocks_cka, practise)}


def _without_blocks(
    model: nn.Module,
    batches: Sequence[Tensor],
    speed: Speed,
    look: Callable[[nn.Module, Tensor], Tensor],
    damage: Callable[[Tensor, Tensor], float],
) -> nn.Module:
    """Take out the block of least damage until the network is fast enough; the damage is measured anew each time."""
    images = batches[0]
    with torch.no_grad():
        dense = look(model, images)
        removals = {
            block.name: TakenOut([block.name], block.leaves, block.returns or 0) for block in find_blocks(model)
        }
        while removals and not speed.is_reached(model):
            damages = {}
            for name, removal in removals.items():
                candidate = deepcopy(model)
                removal.apply(candidate)
                damages[name] = damage(look(candidate, images), dense)
            best = min(damages, key=damages.__getitem__)
            removals[best].apply(model)
            # What lies in it goes with it; what it lies in may go later
            removals = {name: each for name, each in removals.items() if not f"{name}.".startswith(f"{best}.")}
    return model


def _head(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what goes into the head, shape ``(N, C)``."""
    seen: list[Any] = []
    handle = _head(model).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        model(images)
    finally:
        handle.remove()
    features: Tensor = seen[0]
    return features


def _divergence(logits: Tensor, dense: Tensor) -> float:
    return float(F.kl_div(logits.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean"))


def _unlikeness(features: Tensor, dense: Tensor) -> float:
    """Return one minus linear CKA (Kornblith et al., arXiv 1905.00414, equation 5)."""
    x, y = (each.double() - each.double().mean(0) for each in (features, dense))
    return 1 - float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
