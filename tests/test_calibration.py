"""Tests of what is read of calibration data, and what is left out of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import collapse, compress
from lightning_easier.support.calibration import inputs_left_out, read_calibration
from tests.test_collapse_fit import Mlp

CPU = torch.device("cpu")
FREE = {"objective": "macs", "max_drift": math.inf}


def batches(count: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(64, 8) for _ in range(count)]


class Overflowing(nn.Module):
    """Makes a value that is finite into one that is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.parametrize("strange", [math.nan, math.inf, 1e30])
def test_samples_that_are_not_finite_are_left_out_and_counted(strange):
    data = batches()
    data[1][3, 5] = data[1][7, 0] = strange
    model = nn.Sequential(Overflowing(), nn.Linear(8, 2)).eval()
    with pytest.warns(UserWarning, match="2 of the 256 samples in `batches` were left out"):
        read = read_calibration("batches", data, model, 1, [CPU])
    assert [len(x) for (x,) in read.batches] == [64, 62, 64, 64]
    kept = [place for place in range(64) if place not in (3, 7)]
    assert torch.equal(read.batches[1][0], data[1][kept])


def test_one_sample_that_is_not_a_number_changes_nothing_else():
    model = nn.Sequential(Mlp(), nn.Linear(8, 8), Mlp()).eval()
    data = batches()
    clean = compress(model, data, **FREE)
    data[2] = torch.cat([data[2], torch.full((1, 8), math.nan)])
    with pytest.warns(UserWarning, match="1 of the 257 samples"):
        found = compress(model, data, **FREE)
    x = torch.randn(16, 8)
    torch.testing.assert_close(found.model(x), clean.model(x))
    assert "1 of the 257 samples in `batches` were left out" in str(found.report)


def test_it_is_left_out_of_a_collapse_with_fits_too():
    model = Mlp().eval()
    data = batches()
    x = torch.randn(16, 8)
    clean = collapse(model, x, mode="fit", sites=["1"], calibration=data, objective="macs")
    data[0] = torch.cat([data[0], torch.full((1, 8), math.inf)])
    with pytest.warns(UserWarning, match="1 of the 257 samples in `calibration`"):
        found = collapse(model, x, mode="fit", sites=["1"], calibration=data, objective="macs")
    torch.testing.assert_close(found.model(x), clean.model(x))
    assert any("1 of the 257" in note for note in found.report.notes)


def test_batches_without_samples_are_skipped_and_said():
    data = [batches()[0][:0], *batches(), batches()[0][:0]]
    with pytest.warns(UserWarning, match="2 of the batches in `batches` hold no sample"):
        result = compress(Mlp().eval(), data, **FREE)
    assert any(trial.kept for trial in result.report.trials)
    assert "2 of the batches" in str(result.report)


@pytest.mark.parametrize("data", [[torch.zeros(0, 8)], [torch.full((4, 8), math.nan)], []])
def test_data_of_which_nothing_is_left_are_an_error(data):
    with pytest.raises(ValueError, match="`batches` to yield at least one batch that can be used, but"):
        compress(Mlp().eval(), data, **FREE)


def test_what_belongs_to_all_samples_stays_whole():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.mlp(x) * scale

    data = [(x, torch.rand(8)) for x in batches()]
    data[0][0][0, 0] = math.nan
    with pytest.warns(UserWarning, match="1 of the 256"):
        read = read_calibration("batches", data, Scaled().eval(), 2, [CPU, CPU])
    assert read.batches[0][0].shape == (63, 8)
    assert torch.equal(read.batches[0][1], data[0][1])


class Masked(nn.Module):
    """An MLP that reads only what a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.mlp(x if mask is None else x * mask) * scale


def test_a_mask_in_the_batch_is_not_dropped_without_a_word():
    data = [(x, (torch.rand_like(x) < 0.5).float()) for x in batches()]
    with pytest.warns(UserWarning, match=r"`x` alone: .* `mask`, .* `example_inputs=\(x, mask\)`"):
        result = compress(Masked().eval(), data, **FREE)
    assert "`mask`" in str(result.report)


def test_a_mask_that_is_an_example_is_used_and_stays_an_input(recwarn):
    data = [(x, (torch.rand_like(x) < 0.5).float()) for x in batches()]
    model = Masked().eval()
    result = compress(model, data, example_inputs=data[0], **FREE)
    assert not [warning for warning in recwarn if "can't be told" in str(warning.message)]
    x, mask = data[1]
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, mask), result.fitted(x, mask))
        assert not torch.allclose(result.model(x, mask), result.model(x, torch.ones_like(mask)))


class Lengths(nn.Module):
    """An MLP that reads of each sample only so many values."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.mlp(x if lengths is None else x * (torch.arange(8) < lengths[:, None]))


@pytest.mark.parametrize("labels", [torch.arange(64) % 4, torch.rand(64)])
def test_whole_numbers_before_the_labels_are_not_dropped_without_a_word(labels):
    data = [(x, torch.randint(0, 2, (64,)), labels) for x in batches()]
    with pytest.warns(UserWarning, match=r"hold 3 elements.* `lengths`, .* `example_inputs=\(x, lengths\)`"):
        result = compress(Lengths().eval(), data, **FREE)
    assert "`lengths`" in str(result.report)


def test_classes_that_a_forward_would_take_are_labels_and_this_is_noted(recwarn):
    data = [(x, torch.randint(0, 4, (64,))) for x in batches()]
    result = compress(Lengths().eval(), data, **FREE)
    assert not [warning for warning in recwarn if "lengths" in str(warning.message)]
    (note,) = (note for note in result.report.notes if "lengths" in note)
    assert "taken for labels. If it is `lengths`, pass `example_inputs=(x, lengths)`" in note
    result = compress(Lengths().eval(), data, example_inputs=data[0], **FREE)
    assert not [note for note in result.report.notes if "lengths" in note]


def test_labels_are_not_taken_for_inputs():
    x, labels, nothing = batches()[0], torch.arange(64), (None, None)
    assert inputs_left_out(Masked(), (x, labels), 1)[0] is None
    assert inputs_left_out(Mlp(), (x, labels), 1) == nothing
    assert inputs_left_out(Mlp(), (x, torch.rand(64, 3)), 1) == nothing
    assert inputs_left_out(Masked(), x, 1) == nothing
    doubt, decision = inputs_left_out(Masked(), (x, labels > 3), 1)
    assert "`mask`" in doubt
    assert decision is None
    doubt, _ = inputs_left_out(Masked(), (x, labels, labels), 1)  # the last are the labels
    assert "`mask`" in doubt
    assert "`scale`" not in doubt


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-40])
def test_inputs_too_small_to_fit_to_are_named(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)).eval()
    data = [scale * torch.randn(16, 4, 9, 7) for _ in range(3)]
    example = torch.randn(2, 4, 9, 7)
    report = compress(model, data, example_inputs=example, **FREE).report
    assert report.trials == []
    assert "its inputs are zero, or so small (below 1e-17)" in report.reasons["1"]
    small = compress(model, [1e-12 * torch.randn(16, 4, 9, 7) for _ in range(3)], example_inputs=example, **FREE)
    assert small.report.trials
