"""Tests of the progress bars: they are drawn on a terminal alone, count right, and never fail a run."""

import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_easier import collapse, compress, export, fit_chains, measure_entropy
from lightning_easier.collapsing.fit import replacing
from lightning_easier.support import progress, timing
from lightning_easier.support.progress import Steps, over


@pytest.fixture
def bars(monkeypatch):
    """Draw all bars, at once and into nothing, and return them: description, total, and where each has ended."""
    made = []

    class Bar(progress.tqdm):
        def __init__(self, *args, **options):
            is_shown = options.get("disable") is not True  # that is for a bar within another
            shown = {"disable": not is_shown, "file": io.StringIO(), "delay": 0, "mininterval": 0}
            super().__init__(*args, **{**options, **shown})
            if is_shown:
                made.append(self)

    for module in (progress, timing, replacing):
        monkeypatch.setattr(module, "tqdm", Bar)
    return made


class Stream(IterableDataset):
    """So many samples, of which nobody knows how many there are."""

    def __iter__(self):
        yield from torch.randn(6, 8).unbind()


class Surly(list):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize(("items", "most", "total"), [
    ([1, 2, 3], None, 3), ([1, 2, 3], 2, 2), ([1, 2, 3], 5, 3), (iter([1, 2, 3]), None, None), (iter([1, 2, 3]), 2, 2),
    (Surly([1, 2, 3]), None, None), (DataLoader(Stream()), None, None),
])  # fmt: skip
def test_a_bar_knows_how_many_items_there_are_where_anybody_does(bars, items, most, total):
    yielded = list(over(items, "Reading", most=most))
    assert len(yielded) == (6 if isinstance(items, DataLoader) else 3)
    assert (bars[0].desc, bars[0].total) == ("Reading", total)


def test_a_bar_over_what_is_made_of_items_counts_the_items(bars):
    assert list(over((2 * item for item in [1, 2]), "Reading", [1, 2])) == [2, 4]
    assert (bars[0].total, bars[0].n) == (2, 2)


def test_a_bar_is_closed_where_its_reader_stops(bars):
    for item in over([1, 2, 3], "Reading"):
        if item == 2:
            break
    assert bars[0].disable or bars[0].pos == 0  # tqdm's own mark of a bar that is closed
    with pytest.raises(KeyError):
        next(over((each for each in [][0:] or _raising()), "Reading"))


def _raising():
    raise KeyError("of the loader")
    yield


def test_steps_show_the_one_that_has_begun(bars):
    with Steps("Exporting", 2) as steps:
        steps.begin("capture")
        assert (bars[0].n, bars[0].postfix) == (0, "capture")
        steps.begin("write")
        assert (bars[0].n, bars[0].postfix) == (1, "write")


def test_what_takes_seconds_has_a_bar(bars, tmp_path):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batches = [torch.randn(64, 8) for _ in range(3)]

    def told(run) -> dict[str, int | None]:
        bars.clear()
        run()
        return {bar.desc: bar.total for bar in bars}

    assert told(lambda: measure_entropy(model, batches)) == {"Measuring": 3}
    assert told(lambda: measure_entropy(model, DataLoader(Stream(), 2), max_batches=2)) == {"Measuring": 2}
    assert told(lambda: fit_chains(model, batches)) == {"Reading": 3, "Gathering": 3, "Fitting": 1}
    assert told(lambda: export(model, tmp_path / "model.onnx", batches[0])) == {"Exporting": 3}
    assert told(lambda: collapse(model, batches[0])).keys() == {"Timing"}
    fitted = told(lambda: collapse(model, batches[0], mode="fit", sites=["1"], calibration=batches))
    assert fitted.keys() >= {"Reading", "Timing", "Timing operators"}
    told_of = told(lambda: compress(model, batches, max_drift=0.5))
    assert told_of.pop("Reading") == 3
    assert len(told_of) == 1  # one bar for all that follows
