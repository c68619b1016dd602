"""Fewer samples are looked at of networks that do more for each, and never fewer than fits need."""

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier import compress
from lightning_easier.collapsing.fit import correcting, fitting
from lightning_easier.collapsing.fit.correcting import beginnings_of
from lightning_easier.collapsing.fit.drift import samples_that_tell
from lightning_easier.collapsing.fit.enough import enough, first_batches
from lightning_easier.collapsing.fit.fittable import FittableChains
from lightning_easier.collapsing.fit.norms import NormsBefore
from lightning_easier.pruning import mending, search
from lightning_easier.pruning import work as work_module
from lightning_easier.support.batches import BatchReader
from lightning_easier.support.calibration import read_calibration
from lightning_easier.zoo import CifarResNet

SMALL, LARGE = 1e6, 4e9


@given(st.integers(1, 5000), st.integers(1, 500), st.floats(1, 1e12))
def test_all_together_take_no_more_work_than_of_a_small_network(samples: int, fewest: int, work: float) -> None:
    found = enough(samples, fewest, work)
    assert min(samples, fewest) <= found <= samples
    assert found == min(samples, fewest) or found * work <= samples * 2**28 * (1 + 1e-9)
    assert enough(samples, fewest, 2 * work) <= found


def test_a_small_network_is_run_on_all_and_one_of_which_nothing_is_known() -> None:
    assert [enough(200, 64, work) for work in (None, 0.0, SMALL, 2**28)] == [200] * 4
    assert enough(200, 64, 2**29) == 100
    assert enough(200, 64, LARGE) == 64
    assert enough(40, 64, LARGE) == 40


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 1000))
def test_the_first_batches_are_no_more_than_it_takes(sizes: list[int], samples: int) -> None:
    batches = [(torch.empty(size, 0),) for size in sizes]
    found = first_batches(batches, samples)
    assert found
    assert all(a is b for a, b in zip(found, batches, strict=False))
    assert sum(sizes[: len(found) - 1]) < samples
    assert len(found) == len(batches) or sum(sizes[: len(found)]) >= samples


@pytest.mark.parametrize(("work", "told", "corrected"), [(None, 200, 500), (SMALL, 200, 500), (LARGE, 32, 96)])
def test_drift_and_corrections_are_looked_at_in_fewer_samples(work: float, told: int, corrected: int) -> None:
    model, batches = nn.Linear(6, 2).eval(), [(torch.randn(10, 6),) for _ in range(60)]
    assert abs(sum(len(batch[0]) for batch in samples_that_tell(model, batches, work)) - told) < 10
    assert abs(beginnings_of(model, batches, work).samples - corrected) < 10


def sums_of(looked_at: int | None, positions: int) -> tuple[int, float]:
    """Return how many batches of 20 samples a fit has read of the 10 that there are, and how many positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    batches = [(torch.randn(20, positions, 5),) for _ in range(10)]
    chains = [FittableChains(model, ["1"]).around(["1"])]
    read: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    ((_, gathered),) = fitting.gather(model, chains, batches, batches[0], enough=looked_at)
    assert gathered is not None
    return len(read), gathered.moments.positions


def test_a_fit_reads_more_than_is_enough_of_others_where_it_has_too_few_positions() -> None:
    assert sums_of(None, 1) == (10, 200)
    assert sums_of(2, 10) == (2, 400)  # of six unknowns, 14 for each are enough
    assert sums_of(2, 1) == (5, 100)
    assert sums_of(10, 1) == (10, 200)


def test_as_many_positions_are_drawn_from_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_ENOUGH_POSITIONS", 200)
    assert sums_of(None, 10) == (10, 200)
    assert sums_of(4, 10) == (4, 200)


@pytest.mark.parametrize(("work", "told", "kept", "fitted"), [(SMALL, 20, 38, 38), (LARGE, 5, 10, 26)])
def test_a_search_runs_a_network_that_does_much_on_fewer(
    work: float, told: int, kept: int, fitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batches = CifarResNet(8).eval(), [torch.randn(10, 3, 8, 8) for _ in range(38)]
    looked_at: dict[str, list[int]] = {"told": [], "kept": [], "fitted": [], "matched": []}

    def noting(module: Any, name: str, of: str, argument: int) -> None:
        plain = getattr(module, name)

        def noted(*args: Any) -> Any:
            looked_at[of].append(args[argument] if isinstance(args[argument], int) else len(args[argument]))
            return plain(*args)

        monkeypatch.setattr(module, name, noted)

    noting(search, "MatchedNorms", "told", 2)
    noting(correcting, "Beginnings", "kept", 1)
    noting(search, "gather", "fitted", -1)
    noting(mending, "match_norms", "matched", 2)
    monkeypatch.setattr(work_module, "count_work", lambda model, arguments: int(work) * len(arguments[0]))
    assert compress(model, batches, objective="macs", max_drift=math.inf).report.trials
    assert looked_at == {"told": [told], "kept": [kept], "fitted": [fitted], "matched": [fitted]}


@pytest.mark.parametrize("size", [70, 75, 140, 150])
@pytest.mark.parametrize("work", [None, LARGE])
def test_what_is_left_of_a_batch_is_enough_for_a_norm_of_vectors(work: float | None, size: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    batches = samples_that_tell(model, [(torch.randn(size, 6),) for _ in range(5)], work)
    assert NormsBefore(model, batches).names == ("1",)


def strange(batches: int, size: int, share: float) -> list[Tensor]:
    """Batches of which a share of the samples of each of the first three makes a model return NaN."""
    data = [torch.rand(size, 6) for _ in range(batches)]
    for batch in data[:3]:
        batch[: round(size * share)] = -1.0
    return data


class Rooted(nn.Module):
    """Returns NaN of what is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.sqrt())


def test_samples_that_make_no_finite_values_are_none_of_those_that_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "count_work", lambda model, arguments: int(LARGE) * len(arguments[0]))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not all finite"):
        report = compress(Rooted(), strange(8, 100, 0.9), objective="macs", max_drift=math.inf).report
    assert math.isfinite(report.drift)
    assert report.trials


def read(tried: float, batches: list[Tensor]) -> tuple[int, int]:
    """Return on how many rows a model is called while batches are read, and how many rows are left."""
    model = Rooted().eval()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    reader = BatchReader(model, "batches", None, None)
    data = read_calibration(reader, batches, model, lambda first: tried)
    return sum(rows), sum(len(batch[0]) for batch in data.batches)


@pytest.mark.filterwarnings("ignore:.*not all finite.*")
def test_a_model_is_called_on_as_many_as_are_enough_while_batches_are_read() -> None:
    whole, gaps = strange(6, 20, 0.0), strange(6, 20, 0.5)
    assert read(math.inf, whole) == (120, 120)
    assert read(40, whole) == (40, 120)
    assert read(41, whole) == (60, 120)
    assert read(math.inf, gaps) == (120, 90)
    assert read(40, gaps) == (80, 90)  # ten of each of the first three, and a whole one


def test_a_batch_that_a_model_refuses_is_named_wherever_it_is() -> None:
    batches = [torch.rand(20, 6) for _ in range(5)]
    with pytest.raises(ValueError, match="batches"):
        read(20, [*batches, torch.rand(20, 7)])
    with pytest.raises(ValueError, match="batches"):
        read(20, [*batches, torch.ones(20, 6, dtype=torch.float64)])


@pytest.mark.parametrize(("finetune", "rows"), [(None, 260), (1, 380)])
def test_what_is_trained_on_is_read_whole(finetune: int | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "count_work", lambda model, arguments: int(LARGE) * len(arguments[0]))
    module, seen = importlib.import_module("lightning_easier.pruning.compress"), []
    plain = module.read_calibration

    def watched(reader: BatchReader, data: Any, model: nn.Module, tried: Any) -> Any:
        handle = model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
        found = plain(reader, data, model, tried)
        handle.remove()
        return found

    monkeypatch.setattr(module, "read_calibration", watched)
    batches = [torch.rand(10, 6) for _ in range(38)]
    compress(Rooted(), batches, objective="macs", max_drift=math.inf, finetune=finetune)
    assert sum(seen) == rows
