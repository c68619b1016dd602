"""Runs whose every bit is recorded before the code is rebuilt, and compared after: nothing that they do may change.

    python -m tests.golden record golden.json
    python -m tests.golden compare golden.json

The figures are those of one machine, one version of torch and one thread: record them where they are compared.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_easier import EntropyPruningCallback, compress, isolate_activations
from lightning_easier.zoo import DigitsDataModule, ImageClassifier
from tests.integration.interrupted import run
from tests.integration.test_interruptions import RECIPES, SCORES, be_killed
from tests.settings import callback as callback_of

# Options of the callback -> a run of the demo's network with them
TRAINED = {
    "demo": {"warmup_epochs": 12, "epochs": 3},
    "fitted": {"warmup_epochs": 4, "fit": True, "criterion": "linearity", "gain": "macs"},
    "distilled affines": {"warmup_epochs": 4, "stand_in": "affine", "trainable": True, "distill": True},
}
PROCESSES = ("plain", "taken back slope", "fitted priced", "affine trained", "sharded", "plain resumed mid-epoch")


def digest(value: Any) -> str:
    """Return a hash of tensors, numbers and strings in mappings and sequences, bit for bit."""
    found = hashlib.blake2b(digest_size=12)

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)};".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                found.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, Sequence) and not isinstance(part, str):
            for each in part:
                add(each)
        else:
            found.update(f"{part!r};".encode())

    add(value)
    return found.hexdigest()


def told(model: Any, callback: EntropyPruningCallback, trainer: Trainer) -> dict[str, Any]:
    """Return what a run came to."""
    return {
        "rounds": [[each.removed, each.entropies, each.score_after, each.accepted] for each in callback.rounds],
        "report": callback.report().to_markdown(),
        "removed": callback.removed,
        "weights": digest(model.state_dict()),
        "optimizer": digest([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "schedule": digest([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "steps": trainer.global_step,
    }


def trained(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train the demo's network on its digits."""
    seed_everything(0, verbose=False)
    warmup, epochs = options["warmup_epochs"], options.get("epochs", 1)
    model = ImageClassifier(
        "fused_resnet",
        num_classes=10,
        backbone_args={"in_channels": 1},
        lr=0.05,
        weight_decay=2e-2,
        milestones=[warmup],
    )
    isolate_activations(model)
    pruning = callback_of(monitor="val_acc", tolerance=0.01, dirpath=str(root / "rounds"), **options)
    trainer = Trainer(
        max_epochs=warmup + 8 * epochs,
        accelerator="cpu",
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(model, DigitsDataModule(batch_size=64))
    return told(model, pruning, trainer)


def interrupted(root: Path) -> dict[str, Any]:
    """Kill a run while it saves, and take it up again."""
    process = get_context("spawn").Process(target=be_killed, args=(root, "save"))
    process.start()
    process.join()
    options = {"scores": SCORES, "pruning": {"max_rejections": 3}}
    return told(*run(root, ckpt_path=root / "saved" / "last.ckpt", **options))


def recipe(root: Path, name: str) -> dict[str, Any]:
    """Run a recipe of the tests."""
    scores, pruning, options = RECIPES[name]
    return told(*run(root, scores=scores, pruning=pruning, **options))


def compressed(root: Path) -> dict[str, Any]:
    """Compress a network without training."""
    seed_everything(0, verbose=False)
    model = ImageClassifier("fused_resnet", num_classes=10, backbone_args={"in_channels": 1}).eval()
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    tried: list[str] = []

    def evaluate(candidate: torch.nn.Module) -> float:
        tried.append(digest(candidate.state_dict()))
        return (0.9, 0.9, 0.5)[len(tried) % 3]

    result = compress(model, batches, evaluate=evaluate, objective="macs")
    return {"tried": tried, "fitted": digest(result.fitted.state_dict()), "model": digest(result.model.state_dict())}


def processes(root: Path) -> dict[str, Any]:
    """Run scenarios of the tests on two processes."""
    script = Path(__file__).parent / "integration" / "processes.py"
    subprocess.run(
        [
            sys.executable,
            *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            script,
            root,
            *PROCESSES,
        ],
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    found = {name: json.loads((root / name / "0.json").read_text()) for name in PROCESSES}
    return {
        name: {"removed": each["removed"], "linear": each["linear"], "model": each["model"]}
        for name, each in found.items()
    }


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "interrupted": interrupted,
        "compressed": compressed,
        "processes": processes,
    }
    runs |= {name: lambda root, what=what: trained(root, what) for name, what in TRAINED.items()}
    runs |= {f"recipe {name}": lambda root, name=name: recipe(root, name) for name in RECIPES}
    found = {}
    for name, run_it in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = json.loads(json.dumps(run_it(Path(folder))))
    if options.what == "record":
        options.file.write_text(json.dumps(found, indent=1))
        return
    expected = json.loads(options.file.read_text())
    others = [name for name in found if found[name] != expected.get(name)]
    for name in others:
        print(f"{name}\n  was {json.dumps(expected.get(name))}\n  is  {json.dumps(found[name])}")
    print(f"{len(found) - len(others)} of {len(found)} runs are the same bit for bit")
    sys.exit(bool(others))


if __name__ == "__main__":
    main()
