"""The whole of it on a small problem: train, prune by entropy, collapse, export, verify, report.

Run it with ``python -m lightning_easier.zoo.demo``; it took 36 s on two cores, and downloads nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import rich
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_easier import EntropyPruningCallback, Rounds, collapse, export, isolate_activations, load_pruned
from lightning_easier.report import ModelCost, Report, Table, log_report
from lightning_easier.report.figures import save_figure
from lightning_easier.support.storage import replacing
from lightning_easier.zoo import DigitsDataModule, ImageClassifier


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where the files go")
    parser.add_argument("--warmup-epochs", type=int, default=12, help="epochs before the dense round")
    parser.add_argument("--epochs-per-round", type=int, default=3, help="epochs between two removals")
    parser.add_argument("--tolerance", type=float, default=0.01, help="how far the accuracy may fall")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size, also of the latencies")
    options = parser.parse_args()
    start = time.monotonic()
    seed_everything(0)

    data = DigitsDataModule(batch_size=options.batch_size)
    model = ImageClassifier(
        "fused_resnet",
        num_classes=10,
        backbone_args={"in_channels": 1},
        lr=0.05,
        weight_decay=2e-2,
        milestones=[options.warmup_epochs],
    )
    rectifiers = len(isolate_activations(model))
    pruning = EntropyPruningCallback(
        monitor="val_acc",
        tolerance=options.tolerance,
        rounds=Rounds(epochs=options.epochs_per_round, warmup_epochs=options.warmup_epochs),
    )
    logger = TensorBoardLogger(options.output, name="logs", version=time.strftime("%Y%m%d-%H%M%S"))
    trainer = Trainer(
        max_epochs=options.warmup_epochs + 8 * options.epochs_per_round,
        callbacks=[pruning],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    trainer.fit(model, data)

    if pruning.last_good is None or not pruning.removed:
        sys.exit(f"No activation could become linear within a tolerance of {options.tolerance}; allow a larger one.")
    pruned = load_pruned(ImageClassifier, pruning.last_good).eval()
    images = next(iter(data.test_dataloader()))[0]
    result = collapse(pruned, images)
    exported = export(result.model, options.output / "model.onnx", images)
    reports: dict[str, Report] = {"pruning": pruning.report(), "collapse": result.report, "export": exported}
    for report in reports.values():
        rich.print(report)

    scores = [this.score_after or 0.0 for this in pruning.rounds if this.accepted]
    table = Table(
        "Result",
        ("", "rectifiers", "val_acc", "depth", "parameters", "MACs", "latency [ms]"),
        [
            _row("dense, batch norms folded", rectifiers, scores[0], result.report.dense),
            _row("pruned and collapsed", rectifiers - len(pruning.removed), scores[-1], result.report.after),
        ],
    )
    accuracy = {name: _accuracy(m, data) for name, m in (("pruned", pruned), ("collapsed", result.model))}
    lines = [
        f"Speed-up: {result.report.speedup}, median and quartiles of the ratios of timings in turn",
        f"Test accuracy: pruned {accuracy['pruned']:.4f}, collapsed {accuracy['collapsed']:.4f}",
    ]
    rich.print(table, *lines, sep="\n")
    texts = [*(report.to_markdown() for report in reports.values()), table.to_markdown(), *lines]
    with replacing(options.output / "report.md") as new:
        new.write_text("\n\n".join(texts) + "\n")
    everything = {name: report.to_dict() for name, report in reports.items()} | {
        "test_accuracy": accuracy,
    }
    with replacing(options.output / "report.json") as new:
        new.write_text(json.dumps(everything, indent=2))
    save_figure(pruning.figure(), options.output / "pruning.png")
    save_figure(result.report.figure(), options.output / "collapse.png")
    log_report(trainer.loggers, "collapse", result.report, trainer.global_step)
    logger.finalize("success")

    print(f"\nDone in {time.monotonic() - start:.0f} s. Files:")
    for file in ("report.md", "report.json", "pruning.png", "collapse.png", "model.onnx"):
        print(f"  {options.output / file}")
    print(f"Open the curves with:\n  {Path(sys.executable).parent / 'tensorboard'} --logdir {options.output}")
    print("then http://localhost:6006/#images, #custom_scalars and #text")


def _row(name: str, rectifiers: int, score: float, cost: ModelCost) -> tuple[str, ...]:
    latency = cost.latency
    time = f"{latency.median * 1e3:.2f} ± {latency.spread * 1e3:.2f}"
    return name, str(rectifiers), f"{score:.4f}", str(cost.depth), f"{cost.parameters:,}", f"{cost.macs:,}", time


@torch.no_grad()
def _accuracy(model: nn.Module, data: DigitsDataModule) -> float:
    hits = [(model(images).argmax(-1) == labels) for images, labels in data.test_dataloader()]
    return float(torch.cat(hits).double().mean())


if __name__ == "__main__":
    main()
