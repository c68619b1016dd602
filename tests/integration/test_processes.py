"""Two real processes: the counts are summed, the decisions one."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_easier.linearize import stand_ins
from tests.integration.tiny import Tiny, pruning, train


class UnevenScores(Tiny):
    """Each process logs a score of its own, as happens where a user forgets sync_dist."""

    def on_validation_epoch_end(self):
        self.log("own", 0.9 if self.global_rank == 0 or self.current_epoch == 0 else 0.1, sync_dist=False)


class Note(Callback):
    """Writes down what a process ended with; nothing else comes back from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def on_train_end(self, trainer, pl_module):
        (callback,) = (c for c in trainer.callbacks if hasattr(c, "rounds"))
        note = {
            "rounds": callback.state_dict()["rounds"],
            "linear": sorted(stand_ins(pl_module)),
            "weights": sum(parameter.double().sum().item() for parameter in pl_module.parameters()),
        }
        (Path(self.folder) / f"{trainer.global_rank}.json").write_text(json.dumps(note))


@pytest.mark.parametrize("static_graph", [False, True])
def test_two_processes_take_one_decision(tmp_path, static_graph):
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", static_graph=static_graph)
    callback = pruning(monitor="own", tolerance=0.1)
    train(UnevenScores(), callback, Note(tmp_path), root=tmp_path, epochs=3, devices=2, strategy=strategy)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first["linear"]) == 2
    assert [this["accepted"] for this in first["rounds"]] == [True, True, True]


def test_an_activation_with_parameters_is_refused_under_several_processes(tmp_path):
    from torch.multiprocessing import ProcessRaisedException

    with pytest.raises((MisconfigurationException, ProcessRaisedException), match=r"can't remove \['act2'\] under 2"):
        train(Tiny(activation="PReLU"), pruning(), root=tmp_path, devices=2, strategy="ddp_spawn")
