"""A script for two processes: prune, and write down what each of them ended with."""

import json
import sys
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from lightning_easier.linearize import stand_ins
from tests.integration.tiny import Tiny, pruning, train


class UnevenScores(Tiny):
    """Each process logs a score of its own, as happens where a user forgets sync_dist."""

    def on_validation_epoch_end(self):
        good = 2 if self.global_rank == 0 else 1
        self.log("own", 0.9 if self.current_epoch < good else 0.1, sync_dist=False)


def main(folder: str, activation: str, static_graph: str = "") -> None:
    callback, model = pruning(monitor="own", tolerance=0.1), UnevenScores(activation=activation)
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=bool(static_graph))
    trainer = train(model, callback, root=folder, epochs=9, devices=2, strategy=strategy)
    note = {
        "rounds": callback.state_dict()["rounds"],
        "linear": sorted(stand_ins(model)),
        "weights": sum(parameter.double().sum().item() for parameter in model.parameters()),
    }
    (Path(folder) / f"{trainer.global_rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main(*sys.argv[1:])
