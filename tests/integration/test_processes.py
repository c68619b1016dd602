"""Several real processes: counts are summed, decisions are one, and all hold the same model."""

import json
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessRaisedException

from lightning_easier import restore_structure_on_load
from lightning_easier.structure.linearize import stand_ins
from tests.forks import run_together
from tests.integration.interrupted import Small, run
from tests.integration.processes import SLOPE, main_as_a_script, main_on_rank, main_under_torchrun
from tests.once import made_once

UNDER_DDP = [
    "plain", "static graph", "unused parameters", "on training", "slope", "slope, static graph", "slope taken back",
    "resumed", "resumed mid-epoch", "on training, resumed mid-epoch", "by hand", "slope, by hand, static graph",
    "affine, trained", "affine, trained, resumed mid-epoch", "affine, trained, slope taken back",
    "affine", "affine, on training, resumed mid-epoch", "affine, slope taken back", "fitted", "fitted, static graph",
    "fitted, taken back", "fitted, resumed mid-epoch", "slope, distilled", "slope, distilled, resumed mid-epoch",
    "priced", "fitted, priced", "not shared", "sometimes called", "logged on rank 0", "drift",
    "borrowed", "full", "in the logger's folder", "own method, taken back", "own method, taken back, resumed mid-epoch",
    "own method, wrong", "sparse", "sparse, resumed mid-epoch", "blocks", "blocks, resumed mid-epoch",
    "blocks after each", "fitted, blocks",
]  # fmt: skip
SHARDED = [
    "sharded", "sharded, affine, taken back", "sharded, taken back", "sharded, one file, taken back",
    "sharded, resumed", "sharded, one file, resumed", "sharded, slope", "sharded, affine, trained",
    "sharded, priced", "sharded, mergeable", "sharded, sparse", "sharded, sparse, resumed",
    "sharded, blocks",
]  # fmt: skip
REFUSED = {
    "own method, wrong",
    "full",
    "not shared",
    "drift",
    "borrowed",
    "sharded, slope",
    "sharded, affine, trained",
    "sharded, priced",
    "sharded, mergeable",
    "sharded, blocks",
}


def noted(folder: Path, world: int, names: list[str]) -> dict[str, list[dict]]:
    """Read what each of the processes noted."""
    return {name: [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(world)] for name in names}


@pytest.fixture(scope="session")
def under_torchrun(tmp_path_factory, forked):
    names = [*UNDER_DDP, "uneven shards", *SHARDED]

    def make(folder):
        told = 2, find_free_network_port(), str(folder), *names
        run_together([forked.Process(target=main_on_rank, args=(rank, *told)) for rank in range(2)], seconds=300)

    return noted(made_once(tmp_path_factory, "torchrun", make), 2, names)


@pytest.mark.parametrize("name", [name for name in UNDER_DDP + SHARDED if name not in REFUSED])
def test_two_processes_prune_as_one_does(under_torchrun, name):
    first, second = under_torchrun[name]
    assert first == second
    assert first["linear"] == sorted(first["removed"])
    accepted = [this["accepted"] for this in first["rounds"]][:4]
    assert accepted == ([True, False, True, True] if "taken back" in name else [True] * 4)
    if "slope" in name:
        assert first["rounds"][1]["removed"] == [SLOPE]
        assert (SLOPE in first["linear"]) == ("taken back" not in name)
    same_as = {
        "in the logger's folder": "plain",
        "static graph": "plain",
        "unused parameters": "plain",
        "resumed": "plain",
        "resumed mid-epoch": "plain",
        "on training, resumed mid-epoch": "on training",
        "affine, trained, resumed mid-epoch": "affine, trained",
        "fitted, static graph": "fitted",
        "fitted, resumed mid-epoch": "fitted",
        "slope, distilled, resumed mid-epoch": "slope, distilled",
        "sharded, resumed": "sharded",
        "sharded, one file, resumed": "sharded",
        "sharded, one file, taken back": "sharded, taken back",
        "own method, taken back, resumed mid-epoch": "own method, taken back",
        "sparse, resumed mid-epoch": "sparse",
        "blocks, resumed mid-epoch": "blocks",
        "sharded, sparse, resumed": "sharded, sparse",
    }
    assert first == under_torchrun[same_as.get(name, name)][0]


def test_torchrun_starts_the_processes_and_they_prune_as_told_ones_do(under_torchrun, tmp_path, forked):
    run_together([forked.Process(target=main_under_torchrun, args=(2, str(tmp_path), "plain"))])
    assert noted(tmp_path, 2, ["plain"])["plain"] == under_torchrun["plain"]


def test_what_can_not_leave_a_model_under_several_processes_is_refused(under_torchrun):
    for result in under_torchrun["borrowed"]:
        assert "can't remove ['prelu'] under 2 processes: their slope is a parameter of another" in result["error"]
    for result in under_torchrun["not shared"]:
        assert "not every process can read" in result["error"]
    for result in under_torchrun["sharded, affine, trained"]:
        assert "can't train affines under ModelParallelStrategy" in result["error"]
    for result in under_torchrun["sharded, priced"] + under_torchrun["sharded, mergeable"]:
        assert "can't tell what merges, or price it, under ModelParallelStrategy" in result["error"]
    for result in under_torchrun["sharded, blocks"]:
        assert "can't take blocks out under ModelParallelStrategy" in result["error"]
        assert "gathered model with `compress`" in result["error"]
    for result in under_torchrun["sharded, slope"]:
        assert "can't remove ['layers.3'] under ModelParallelStrategy" in result["error"]


def test_processes_that_drift_apart_are_an_error_at_once_on_all_of_them(under_torchrun):
    first, second = under_torchrun["drift"]
    assert "rank 0 agrees with rank 0" in first["error"]
    assert "rank 1 differs from rank 0" in second["error"]


def test_what_a_method_fails_with_on_rank_0_is_an_error_on_all_of_them(under_torchrun):
    first, second = under_torchrun["own method, wrong"]
    assert first["error"] == "nothing comes to mind"
    assert second["error"] == "Rank 0 has failed: RuntimeError: nothing comes to mind"


def test_a_checkpoint_that_one_process_can_not_write_is_an_error_at_once_on_all_of_them(under_torchrun):
    first, second = under_torchrun["full"]
    for result in (first, second):
        assert "round_1.ckpt could not be written, and is as it was before" in result["error"]
    assert "No space left on device" in first["error"]
    assert "another process has failed" in second["error"]


def test_lightning_starts_the_processes_and_rank_0_decides(tmp_path, forked):
    run_together([forked.Process(target=main_as_a_script, args=(str(tmp_path), "uneven scores"))], seconds=300)
    first, second = noted(tmp_path, 2, ["uneven scores"])["uneven scores"]
    assert first == second
    assert len(first["linear"]) == 1
    # Rank 1 logged a fall in every epoch; rank 0, which decides, only in the last.
    assert [this["accepted"] for this in first["rounds"]] == [True, True, False]


def test_four_processes_with_uneven_shards_measure_the_whole(tmp_path, forked):
    told = 4, find_free_network_port(), str(tmp_path), "uneven shards"
    run_together([forked.Process(target=main_on_rank, args=(rank, *told)) for rank in range(4)])
    results = noted(tmp_path, 4, ["uneven shards"])["uneven shards"]
    for result in results:
        assert result["measured"] == pytest.approx(result["expected"], rel=1e-12)
        assert len(result["measured"]) == 5
    assert sum("3 of the 13 samples in what was measured" in told for told in results[0]["told"]) == 1


def test_what_all_processes_have_alike_is_logged_on_each_and_not_averaged(under_torchrun):
    first, second = under_torchrun["uneven shards"]
    own = {"val_loss", "score"}  # which the module logs as it likes
    logged, of_other = ({k: v for k, v in each["logged"].items() if k not in own} for each in (first, second))
    assert logged == of_other
    assert {"H_min", "removed"} < logged.keys()
    assert len(logged) == len(first["measured"]) + 2
    assert first["reduced"] == second["reduced"] == 0
    assert not [told for each in (first, second) for told in each["advised"] if not any(name in told for name in own)]


def spawning() -> DDPStrategy:
    """Like "ddp_spawn", but for a process to spawn them that has imported everything."""
    return DDPStrategy(start_method="forkserver", process_group_backend="gloo")


def test_spawned_processes_bring_structure_and_weights_back(tmp_path, forked):
    model = restore_structure_on_load(Small())
    run(tmp_path, model=model, devices=2, strategy=spawning(), epochs=3)
    assert len(stand_ins(model)) == 2
    kept = max((tmp_path / "rounds").glob("round_*.ckpt"))
    assert kept.name == "round_2.ckpt"


def test_spawned_processes_whose_structure_would_not_come_back_are_refused(tmp_path, forked):
    with pytest.raises((MisconfigurationException, ProcessRaisedException), match="restore_structure_on_load"):
        run(tmp_path, devices=1, strategy=spawning())
