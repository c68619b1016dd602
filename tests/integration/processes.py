"""A script for several processes: what each scenario ended with, on each of them, as JSON.

Started by torchrun's agent, or by Lightning, which starts it again for every other process.
"""

import copy
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_easier import Linearize, Method, Proposal, PruningCallback, RemoveBlocks, Sparsify, measure_entropy
from lightning_easier.callbacks.surgery import fingerprint
from lightning_easier.pruning import state
from lightning_easier.pruning.methods import Evidence
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.structure.operations import Identities
from tests.integration.interrupted import At, Small, run, stop
from tests.integration.residual import Net
from tests.settings import callback as callback_of

SLOPE = "layers.3"


class Sharded(Small):
    """FSDP2: every process holds a part of each weight."""

    def configure_model(self):
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.layers, mesh=mesh)
            fully_shard(self.norm, mesh=mesh)

    def on_validation_epoch_end(self):
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)], sync_dist=True)


class ShardedBlocks(Net):
    """The same, of residual blocks."""

    def configure_model(self):
        if self.device_mesh is not None:
            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


class Borrowing(Small):
    """Computes with a slope of its own, which no module holds."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x):
        return self.layers(nn.functional.prelu(self.norm(x), self.slope))


class Sometimes(Small):
    """One process trains past an activation."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            layers, self.layers = self.layers, self.layers[:7] + self.layers[8:]
            loss = super().training_step(batch, batch_idx)
            self.layers = layers
            return loss
        return super().training_step(batch, batch_idx)


class LogsOnRank0(Small):
    """As one does whose score is computed on one process."""

    def on_validation_epoch_end(self):
        if self.global_rank == 0:
            self.log("score", 0.9, rank_zero_only=True)


class UnevenScores(Small):
    """Each process logs a score of its own, as happens where a user forgets sync_dist."""

    def on_validation_epoch_end(self):
        good = 2 if self.global_rank == 0 else 1
        self.log("score", 0.9 if self.current_epoch < good else 0.1, sync_dist=False)


class Drift(Callback):
    """Changes a weight on one process only."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.layers[0].weight[0, 0] += 1e-3


class HoldsWhatLives(Callback):
    """Checks the optimizer in every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in pl_module.parameters())
        assert len(held) == sum(1 for _ in pl_module.parameters())


class Manual(Small):
    """Steps by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Elsewhere(type(Path())):
    """A path on a disk of its own: what another process has written is not there."""

    def exists(self, **_: Any) -> bool:
        return False


class SlopeFirst(Linearize):
    """Removes the activation that has a parameter, then others."""

    def select(self, ranks, count):
        return [SLOPE] if SLOPE in ranks else super().select(ranks, count)


class LastFirst(Method):
    """Removes the last activation, then the one before it, ..."""

    def propose(self, model: nn.Module, evidence: Evidence) -> Proposal:
        proposal = Proposal()
        for place, name in enumerate(evidence.entropies):
            proposal.add(Identities([name]), rank=-place)
        return proposal


class WrongOnRank0(Method):
    """Fails where alone it is asked; the other process waits for what it says."""

    def propose(self, model: nn.Module, evidence: Evidence) -> Proposal:
        raise RuntimeError("nothing comes to mind")


def scenario(name: str, root: Path, world: int) -> tuple[Small, PruningCallback]:
    """Prune."""
    seed_everything(3, verbose=False)  # for the models that are made here
    wanted: dict[str, Any] = {"scores": (0.9, 0.1, 0.9) if "taken back" in name else (0.9,)}
    callbacks: list[Callback] = [HoldsWhatLives()]
    strategy: dict[str, Any] = {"static_graph": "static" in name, "find_unused_parameters": "unused" in name}
    if "slope" in name:
        wanted |= {"method": SlopeFirst, "pruning": {"max_rejections": 3}}
    if "wrong" in name:
        wanted["method"] = WrongOnRank0
    elif "own" in name:
        wanted |= {"method": LastFirst, "pruning": {"max_rejections": 3}}
    if "sparse" in name:
        wanted |= {"method": Sparsify, "pruning": {"amount": 0.2, "guard": 1e9, "exclude": SLOPE}}
    if "fitted, blocks" in name:
        wanted |= {"model": Net(), "pruning": {"blocks": True}}
    elif "blocks" in name:
        wanted |= {
            "method": RemoveBlocks,
            "model": Net(),
            "pruning": {"weight": 1.0, "epochs": int("after each" in name)},
        }
    if "training" in name:
        wanted["pruning"] = {"on": "training"}
    if "affine" in name:
        wanted.setdefault("pruning", {}).update(stand_in="affine", trainable="trained" in name)
    if "fitted" in name:
        wanted.setdefault("pruning", {}).update(fit=True, criterion="linearity", max_rejections=3)
    if "priced" in name:
        wanted.setdefault("pruning", {}).update(gain="macs", mergeable_only=True, depth=2)
    if "mergeable" in name:
        wanted.setdefault("pruning", {}).update(mergeable_only=True)
    if "distilled" in name:
        wanted.setdefault("pruning", {}).update(distill=True)
    if "logger's folder" in name:
        wanted["pruning"] = {"dirpath": None}
    if "uneven" in name:
        wanted["model"] = UnevenScores()
    if "rank 0" in name:
        wanted |= {"model": LogsOnRank0(), "pruning": {"best_per_depth": True}}
    if "sometimes" in name:
        wanted["model"] = Sometimes()
    if "by hand" in name:
        wanted["model"] = Manual()
    state.Path = Elsewhere if "not shared" in name and os.environ.get("LOCAL_RANK") == "1" else Path
    if "borrowed" in name:
        wanted["model"] = Borrowing()
    if "drift" in name:
        callbacks.append(Drift())
    if "full" in name:
        callbacks.append(At("on_train_epoch_start", 1, None, fill_the_disk))
    made: Any = DDPStrategy(process_group_backend="gloo", **strategy)
    if "sharded" in name:
        made = ModelParallelStrategy(process_group_backend="gloo", save_distributed_checkpoint="one file" not in name)
        pruning = {"exclude": SLOPE, "max_rejections": 3} if "slope" not in name else {}
        pruning = {} if "blocks" in name else pruning
        model = ShardedBlocks() if "blocks" in name else Sharded(wanted["scores"])
        wanted |= {"model": model, "pruning": wanted.get("pruning", {}) | pruning}
        callbacks = []
    if "resumed" in name:
        strategy = copy.deepcopy(made)
        moment = ("on_train_batch_end", 2, 1) if "mid-epoch" in name else ("on_train_epoch_end", 2, None)
        run(root, *callbacks, At(*moment, save_and_stop), devices=world, strategy=strategy,
            **copy.deepcopy(wanted))  # fmt: skip
        wanted["ckpt_path"] = root / "saved.ckpt"
    model, callback, _ = run(root, *callbacks, devices=world, strategy=made, **wanted)
    return model, callback


def fill_the_disk(trainer: Trainer) -> None:
    """Let the next save fail, on the process that writes."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer.strategy.checkpoint_io.save_checkpoint = fail


def save_and_stop(trainer: Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")
    stop(trainer)


def note(model: Small, callback: PruningCallback) -> dict[str, Any]:
    """Return what has to be the same on all processes."""
    return {
        "rounds": callback.state_dict()["rounds"],
        "removed": callback.removed,
        "linear": sorted(stand_ins(model)),
        "model": fingerprint(model),
        "zeros": {name: zeros_of(value) for name, value in model.named_parameters() if value.ndim > 1},
    }


def zeros_of(value: torch.Tensor) -> int:
    """Count the zeros of a weight, of all processes together."""
    return int(((value.full_tensor() if isinstance(value, DTensor) else value) == 0).sum())


class Part(IterableDataset):
    """What one process sees of 13 samples; the last sees none."""

    PARTS = (range(7), range(7, 11), range(11, 13), range(0))

    def __init__(self, rank: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples = torch.randn(13, 4, generator=generator)
        self.samples[[2, 8, 9], 1] = torch.nan  # on two processes
        self.places = range(13) if rank is None else self.PARTS[rank]

    def __iter__(self):
        yield from ((self.samples[place], 0) for place in self.places)


def uneven_shards(world: int, rank: int) -> dict[str, Any]:
    """Measure where every process has another number of batches, and one has none."""
    torch.manual_seed(0)
    model, callback = Small(), callback_of("score", stand_in="affine")
    strategy = DDPStrategy(process_group_backend="gloo")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=world, strategy=strategy, callbacks=[callback], **quiet)
    reduced: list[Any] = []
    reduce, strategy.reduce = strategy.reduce, lambda value, **how: reduced.append(value) or reduce(value, **how)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.validate(model, DataLoader(Part(rank), 2), verbose=False)
    return {
        "measured": callback.entropies,
        "expected": measure_entropy(model, DataLoader(Part(), 5)),
        "told": [str(warning.message) for warning in told if "samples" in str(warning.message)],
        "advised": [str(warning.message) for warning in told if "sync_dist" in str(warning.message)],
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "reduced": len(reduced),
    }


def main(folder: str, *names: str) -> None:
    """Run scenarios one after the other."""
    world = int(os.environ.get("WORLD_SIZE", 2))
    for name in names:
        root = Path(folder) / name
        root.mkdir(parents=True, exist_ok=True)
        rank = int(os.environ.get("LOCAL_RANK", 0))
        try:
            result = uneven_shards(world, rank) if name == "uneven shards" else note(*scenario(name, root, world))
        except (RuntimeError, OSError, MisconfigurationException) as error:
            result = {"error": str(error)}
        (root / f"{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():  # a process that ends while another still listens may be aborted
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main_on_rank(rank: int, world: int, port: int, folder: str, *names: str) -> None:
    """Run scenarios in a process that was not started by torchrun, but is told what torchrun tells."""
    torch.set_num_threads(1)
    told = {"LOCAL_RANK": rank, "RANK": rank, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": world, "WORLD_SIZE": world}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {name: str(value) for name, value in told.items()}
    main(folder, *names)


def main_under_torchrun(world: int, folder: str, *names: str) -> None:
    """Run scenarios in processes that torchrun's agent starts; it forks them, so that nothing is imported again."""
    torch.set_num_threads(1)
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "standalone"}
    config = LaunchConfig(1, 1, world, start_method="fork", max_restarts=0, **where)
    elastic_launch(config, main)(folder, *names)


def main_as_a_script(folder: str, *names: str) -> None:
    """Run scenarios in a process that is as one whose command line this was, for Lightning to start it again."""
    torch.set_num_threads(1)
    os.environ |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    sys.argv = [__file__, folder, *names]
    main(folder, *names)


if __name__ == "__main__":
    main(*sys.argv[1:])
