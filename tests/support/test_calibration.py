"""Tests of what is read of calibration data, and what is left out of it."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import (
    EntropyProbe,
    collapse,
    compress,
    fit_chains,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
)
from lightning_easier.collapsing.fit.chain_fits import ChainProbe
from lightning_easier.pruning.gains import ShapeProbe
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.support.batches import BatchReader
from lightning_easier.support.calibration import inputs_left_out, read_calibration
from tests.collapsing.test_collapse_fit import Mlp

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
        read = read_calibration(BatchReader(model, "batches"), data, model)
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
        read = read_calibration(BatchReader(Scaled(), "batches"), data, Scaled().eval())
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


MEASURES = [measure_entropy, measure_affines, fit_chains]


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(30, 3)).eval()


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_measurements_leave_out_samples_that_are_not_finite_and_say_how_many(strange):
    for model, data in ((Mlp().eval(), batches()), (convolutional(), [torch.randn(64, 2, 9, 7) for _ in range(4)])):
        clean = [batch.clone() for batch in data]
        data[1].view(64, -1)[3, 5] = data[1].view(64, -1)[7, 0] = strange
        kept = [place for place in range(64) if place not in (3, 7)]
        clean[1] = clean[1][kept]
        with pytest.warns(UserWarning, match="2 of the 256 samples in what was measured"):
            found = measure_affines(model, data)["1"]
        expected = measure_affines(model, clean)["1"]
        torch.testing.assert_close(found.scale, expected.scale)
        torch.testing.assert_close(found.offset, expected.offset)
        with pytest.warns(UserWarning, match="2 of the 256 samples in `batches`"):
            fit = fit_chains(model, data)["1"]
        assert fit.explained == pytest.approx(fit_chains(model, clean)["1"].explained, abs=0.05)
        with pytest.warns(UserWarning, match="2 of the 256 samples in what was measured"):
            entropy = measure_entropy(model, data)["1"]
        assert entropy == pytest.approx(measure_entropy(model, clean)["1"], abs=0.02)


def test_sums_of_a_chain_are_those_without_the_samples_that_are_left_out():
    model, data = convolutional(), torch.randn(64, 2, 9, 7)
    isolate_activations(model)
    probes = []
    for strange in (0.0, math.nan):
        data[[5, 11], 1, 4, 4] = strange
        with ChainProbe(model, ["1"], 1) as probe, torch.no_grad():
            model(data)
        probes.append(probe)
    whole, left_out = ((seen.moments.fitted, seen.moments.held_out) for (seen,) in (p._seen for p in probes))
    assert probes[1].left_out == (2, 64)
    assert sum(part.positions for part in whole) == 64 * 5 * 3
    assert sum(part.positions for part in left_out) == 62 * 5 * 3
    with torch.no_grad():
        patches = model[2](model[1](model[0](data[[p for p in range(64) if p not in (5, 11)]])))
    targets = sum(part.cross[-1] for part in left_out)
    torch.testing.assert_close(targets, patches.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    squares = sum(part.squares for part in left_out)
    torch.testing.assert_close(squares, patches.double().square().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


def test_what_is_measured_beside_a_strange_sample_gives_finite_numbers_again():
    data = batches()
    data[2][3, 2] = math.nan
    for stand_in, measure in (("affine", measure_affines), ("fitted", fit_chains)):
        model = Mlp().eval()
        with pytest.warns(UserWarning, match="1 of the 256"):
            linearize(model, ["1"], stand_in=stand_in, statistics=measure(model, data))
        assert model(data[0]).isfinite().all()


@pytest.mark.parametrize("measure", [measure_entropy, measure_affines])
def test_an_activation_that_no_finite_sample_reaches_is_not_measured(measure):
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) / 0.0 - math.inf)

    with pytest.warns(UserWarning, match=r"\['second'\] were not measured: none of the samples that reach them"):
        assert list(measure(Second(), batches())) == ["first"]
    with pytest.raises(ValueError, match=r"`batches` to hold samples for which .* none is where \['1'\]"):
        measure(Mlp().eval(), [torch.full((4, 8), math.nan)])


def test_what_was_counted_of_strange_samples_is_told_once_and_goes_with_the_counts():
    model, data = Mlp().eval(), batches()
    data[0][3] = math.nan
    sites = isolated_sites(model)
    with EntropyProbe(sites, affines=True) as probe:
        model(data[0])
    saved = probe.counts()
    assert (saved["1"]["samples"], saved["1"]["left_out"]) == (64, 1)
    rest = EntropyProbe(sites, affines=True)
    rest.resume(saved)
    with rest:
        model(data[1])
    assert (rest.counts()["1"]["samples"], rest.counts()["1"]["left_out"]) == (128, 1)
    with pytest.warns(UserWarning, match="1 of the 128 samples"):
        rest.affines()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest.entropies()
    rest.reset()
    assert rest.counts()["1"]["left_out"] == 0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_measurements_skip_batches_without_samples_and_say_so(measure, place):
    model, data = Mlp().eval(), batches()
    expected = measure(model, data)
    data.insert(place, torch.zeros(0, 8))
    with pytest.warns(UserWarning, match="1 of the batches in `batches` hold no sample"):
        found = measure(model, data)
    assert str(found) == str(expected)
    with pytest.raises(ValueError, match="`batches` to yield at least one batch that can be used, but 1 of"):
        measure(model, [torch.zeros(0, 8)])


def test_probes_see_nothing_in_a_batch_without_samples():
    model, data = convolutional()[:3], torch.randn(4, 2, 9, 7)
    isolate_activations(model)
    entropies, chains, shapes = (
        EntropyProbe(isolated_sites(model), affines=True), ChainProbe(model, ["1"], 1), ShapeProbe(model, ["1"])
    )  # fmt: skip
    shapes.attach()
    with entropies, chains, torch.no_grad():
        model(data[:0])
        assert entropies.affines() == {}
        model(data)
    shapes.detach()
    assert shapes.shapes["1"] == data.shape
    assert entropies.counts()["1"]["samples"] == 4
    ((_, _, shape),) = chains.fitted()
    assert shape == data.shape


def test_probes_see_what_operators_are_called_with_by_name():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.act(input=self.first(input=x)))

    model = ByName().eval()
    entropies, chains, shapes = (
        EntropyProbe(isolated_sites(model)), ChainProbe(model, ["act"], 1), ShapeProbe(model, ["act"])
    )  # fmt: skip
    shapes.attach()
    with entropies, chains, torch.no_grad():
        model(torch.randn(32, 8))
    shapes.detach()
    assert shapes.shapes == {"act": (32, 8)}
    assert list(entropies.entropies()) == ["act"]
    assert [shape for _, _, shape in chains.fitted()] == [(32, 8)]


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("batches", lambda model, data: compress(model, data, objective="macs")),
        (
            "calibration",
            lambda model, data: collapse(model, torch.ones(2, 8), mode="fit", sites=["1"], calibration=data),
        ),
        *(("batches", measure) for measure in MEASURES),
    ],
)
def test_data_on_the_meta_device_are_an_error(argument, call):
    with pytest.raises(ValueError, match=f"`{argument}` to hold data, but got a tensor of shape .* on the meta device"):
        call(Mlp().eval(), [torch.randn(64, 8, device="meta")])


READERS = {
    "compress": ("batches", lambda model, data: compress(model, data, **FREE)),
    "collapse": (
        "calibration",
        lambda model, data: collapse(
            model, torch.ones(2, 8), mode="fit", sites=["1"], calibration=data, objective="macs"
        ),
    ),
    **{measure.__name__: ("batches", measure) for measure in MEASURES},
}
STRANGE = {
    "a tensor": (lambda: torch.ones(4, 8), TypeError, r"a tensor .* whose samples would be taken .* `\[tensor\]`"),
    "a mapping": (lambda: {"x": torch.ones(4, 8)}, TypeError, r"a .* dict, whose keys would .* `\[batch\]`"),
    "a string": (lambda: "train", TypeError, "a value of type str. Pass a list of tensors, or a DataLoader"),
    "a number": (lambda: 3, TypeError, "a value of type int. Pass a list of tensors, or a DataLoader"),
    "no batch": (list, ValueError, "but it yielded none$"),
    "a generator that was read": (
        lambda: (batch for batch in ()), ValueError, "but it yielded none: an iterator yields its batches only once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("strange", STRANGE)
def test_what_holds_no_batches_is_refused_by_all_in_the_same_words(reader, strange):
    (argument, read), (make, error, message) = READERS[reader], STRANGE[strange]
    model = Mlp()
    modules = [type(module) for module in model.modules()]
    expected = "be an iterable of batches, but got" if error is TypeError else "yield at least one batch .*,"
    with pytest.raises(error, match=f"`{argument}` to {expected} {message.replace('{}', argument)}"):
        read(model, make())
    assert [type(module) for module in model.modules()] == modules
    assert model.training


@pytest.mark.parametrize("reader", READERS)
def test_a_generator_is_read_as_a_list_is(reader):
    _, read = READERS[reader]
    model = Mlp().eval()
    found, expected = (read(model, data) for data in (iter(batches()), batches()))
    if isinstance(found, dict):
        assert str(found) == str(expected)
    else:
        with torch.no_grad():
            torch.testing.assert_close(found.model(torch.ones(2, 8)), expected.model(torch.ones(2, 8)))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_model_on_the_meta_device_is_not_measured(measure):
    with pytest.raises(ValueError, match="`model` to have weights"):
        measure(Mlp().eval().to("meta"), batches())
