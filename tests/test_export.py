"""An exported file computes what the model does at every size that is free; what can't be exported writes nothing."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_easier import ExportError, collapse, export, exporting, linearize
from lightning_easier import export as export_function
from lightning_easier.collapsing.algebra.affine import ChannelAffine, ElementAffine
from lightning_easier.measure.affines import AffineFit
from lightning_easier.structure.stand_in import AffineStandIn
from tests.models import Functional, Residual, randomize_batch_norms
from tests.versions import keeps_a_batch_of_attention, needs_later_operators


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def run_pt2(path: Path, *inputs: Tensor) -> list[Tensor]:
    return [torch.export.load(path).module()(*inputs)]


RUN = {"onnx": run_onnx, "pt2": run_pt2}


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("collapsed", [True, False])
def test_the_file_computes_the_same_at_any_batch_size(tmp_path, format, collapsed):
    model = nn.Sequential(randomize_batch_norms(Residual()), nn.Dropout(0.5)).train()
    linearize(model, ["0.relu"])
    x = torch.randn(1, 4, 5, 6)
    shipped = collapse(model, x, objective="depth").model if collapsed else model
    path = tmp_path / "folder" / f"model.{format}"
    report = export(shipped, path, x)
    other = torch.randn(7, 4, 5, 6)
    (output,) = RUN[format](path, other)
    assert torch.allclose(output, model.eval()(other), rtol=1e-4, atol=1e-5)
    assert report.format == format
    assert report.size == path.stat().st_size
    assert [parity.batch_size for parity in report.parity] == [1, 2]
    assert all(parity.relative_difference <= report.tolerance == 1e-4 for parity in report.parity)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("shape", "dtype", "rounding"),
    [
        ((2, 3), torch.float32, 1e-5),
        ((2, 5, 3), torch.float32, 1e-5),
        ((2, 3, 8, 8), torch.float32, 1e-5),
        ((2, 3, 8, 8), torch.float16, 2e-3),  # ONNX rounds products, too
    ],
)
def test_an_affine_that_stays_is_exported_at_any_batch_size(tmp_path, shape, dtype, rounding):
    dim = 1 if len(shape) == 4 else -1
    fit = AffineFit(torch.tensor([0.5, 0.0, -2.0]), torch.tensor([1.0, -3.0, 0.25]), dim, 1.0)
    of_elements = ElementAffine(shape[1:], dim)
    affines = AffineStandIn(nn.GELU(), fit), ChannelAffine(3, dim), ChannelAffine(3, dim, bias=False), of_elements
    for affine in affines[1:]:
        for parameter in affine.parameters():
            nn.init.normal_(parameter)
    layers = (each for affine in affines for each in (affine, nn.Sigmoid()))  # between which nothing can be merged
    model = nn.Sequential(*layers, affines[0]).to(dtype)
    export(model, tmp_path / "m.onnx", torch.randn(shape).to(dtype))
    other = torch.randn(7, *shape[1:]).to(dtype)
    (output,) = run_onnx(tmp_path / "m.onnx", other)
    torch.testing.assert_close(output, model.eval()(other), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    "own",
    [
        lambda x, y: torch.addcmul(y, x, y, value=0.5),
        lambda x, y: torch.addcdiv(x, y, y.exp(), value=3),
        lambda x, y: torch.lerp(x, y, y.sigmoid()),
        lambda x, y: torch.lerp(x, y, 0.25),
        lambda x, y: (x + y).addcmul_(x, y).addcdiv_(x, y.exp()).lerp_(x, 0.25),
    ],
)
def test_sums_of_products_that_a_forward_writes_as_one_are_exported_at_any_batch_size(tmp_path, own):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.scale = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return own(self.norm(self.layer(x)), self.scale)

    model = randomize_batch_norms(Own())
    export(model, tmp_path / "m.onnx", torch.randn(2, 3, 6, 6))
    other = torch.randn(7, 3, 6, 6)
    (output,) = run_onnx(tmp_path / "m.onnx", other)
    torch.testing.assert_close(output, model.eval()(other), rtol=1e-4, atol=1e-5)


def test_an_isolated_functional_model_is_exported_and_left_as_it_was(tmp_path):
    model = Functional().train()
    linearize(model, ["relu"])
    x = torch.randn(3, 6)
    export(model, tmp_path / "m.onnx", x)
    assert all(module.training for module in model.modules())
    (output,) = run_onnx(tmp_path / "m.onnx", x)
    assert torch.allclose(output, model.eval()(x), atol=1e-6)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, image: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(image)
        return y + offset, y - offset


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_several_inputs_and_outputs(tmp_path, format):
    model, inputs = TwoInputs(), (torch.randn(2, 3), torch.randn(2, 2))
    report = export(model, tmp_path / "m", inputs, format=format)
    assert [parity.batch_size for parity in report.parity] == [2, 3]
    if format == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "m")
        assert [node.name for node in session.get_inputs()] == ["image", "offset"]
        assert len(run_onnx(tmp_path / "m", *inputs)) == 2


class ViewsAttention(nn.Module):
    """Works in eval mode without gradients: torch's fused attention returns what `view` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0].view(len(x), -1))


@keeps_a_batch_of_attention
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_view_of_what_attention_returns(tmp_path, format):
    model, path = ViewsAttention(), tmp_path / f"m.{format}"
    export(model, path, torch.randn(2, 5, 8))
    x = torch.randn(7, 5, 8)
    (output,) = RUN[format](path, x)
    with torch.no_grad():
        assert torch.allclose(output, model.eval()(x), atol=1e-5)
    assert not model.attention._forward_hooks


class SlicesWithoutEnd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None, :] * 2.0


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_slice_without_an_end_of_a_size_that_is_free(tmp_path, format):
    path = tmp_path / f"m.{format}"
    export(SlicesWithoutEnd(), path, torch.randn(2, 3))
    x = torch.randn(5, 3)
    (output,) = RUN[format](path, x)
    assert torch.allclose(output, SlicesWithoutEnd()(x), atol=1e-6)


class CountsSamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1) / len(x)


def test_a_number_of_samples_that_runs_through_len_stays_free(tmp_path):
    export(CountsSamples(), tmp_path / "m.pt2", torch.randn(2, 3, 4))
    x = torch.randn(5, 3, 4)
    (output,) = run_pt2(tmp_path / "m.pt2", x)
    assert torch.allclose(output, CountsSamples()(x))


class OtherStrides(nn.Module):
    """Makes of its input what has other strides while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return (y.mT.contiguous().mT if torch.compiler.is_compiling() else y).view(len(x), -1)


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_a_view_that_only_an_export_refuses_is_named_with_its_remedy(tmp_path, dynamic_batch):
    with pytest.raises(
        ExportError, match=r"Cannot view a tensor.*Write `reshape` in the place of `view`: .*\.$"
    ) as info:
        export(OtherStrides(), tmp_path / "m.pt2", torch.randn(2, 5, 8), dynamic_batch=dynamic_batch)
    assert "dynamic_batch" not in str(info.value)


class TwoTypes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x > 0, x.argmax(-1)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_outputs_that_are_not_floating_point(tmp_path, format):
    report = export(TwoTypes(), tmp_path / "m", torch.randn(3, 4), format=format)
    assert all(parity.max_difference == 0 for parity in report.parity)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) * 2


def test_a_batch_size_that_is_built_in(tmp_path):
    with pytest.raises(ExportError, match=r"torch\.export does not take FixedBatch.*dynamic_batch=False"):
        export(FixedBatch(), tmp_path / "m.pt2", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []
    report = export(FixedBatch(), tmp_path / "m.pt2", torch.randn(2, 3), dynamic_batch=False)
    assert [parity.batch_size for parity in report.parity] == [2]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_that_differs_does_not_replace_the_one_there(tmp_path, format, monkeypatch):
    path = tmp_path / f"m.{format}"
    path.write_text("precious")
    import lightning_easier.exporting

    module = __import__("sys").modules[export_function.__module__]
    write = getattr(module, f"_write_{format}")

    def write_wrongly(*wanted):
        run = write(*wanted)
        return lambda inputs: [output + 0.01 for output in run(inputs)]

    monkeypatch.setattr(module, f"_write_{format}", write_wrongly)
    with pytest.raises(ExportError, match=f"The {format} file differs from Linear by .* at batch size 2"):
        export(nn.Linear(3, 3), path, torch.randn(2, 3))
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]
    assert lightning_easier.export is export_function


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("m.txt", torch.randn(2, 3)), {}, ValueError, r"one of \('onnx', 'pt2'\).*but got `path` 'm.txt'"),
        (("m", torch.randn(2, 3)), {"format": "tflite"}, ValueError, "but got `format` 'tflite'"),
        (("m.pt2", torch.randn(2, 4)), {}, ValueError, "`example_inputs` to be accepted by the forward of Linear"),
        (("m.pt2", torch.randn(0, 3)), {}, ValueError, r"`example_inputs` to hold at least one sample.*\(0, 3\)"),
        (("m.pt2", torch.randn(2, 3).to("meta")), {}, ValueError, "`example_inputs` to hold data.*meta device"),
        (("m.pt2", torch.tensor(1.0)), {}, ValueError, "a batch axis first, but got a tensor without axes"),
        (("m.pt2", None), {}, TypeError, "`example_inputs` to be a tensor"),
        (("m.pt2", torch.randn(2, 3)), {"tolerance": -1.0}, ValueError, "`tolerance` to be None or at least 0"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, monkeypatch, arguments, options, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        export(nn.Linear(3, 3), *arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="`model` to have weights, but Linear has `weight` on the meta device"):
        export(nn.Linear(3, 3).to("meta"), tmp_path / "m.pt2", torch.randn(2, 3))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    module = __import__("sys").modules[export_function.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx, onnxscript, onnxruntime.*lightning-easier\[onnx\]"):
        export(nn.Linear(3, 3), tmp_path / "m.onnx", torch.randn(2, 3))


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_what_is_masked_is_zero_for_good_in_the_file(tmp_path, suffix):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    data = torch.randn(3, 4)
    expected = model(data)  # after which the masked weight has a history
    report = export(model, tmp_path / f"model.{suffix}", data)
    assert all(each.relative_difference < 1e-5 for each in report.parity)
    assert prune.is_pruned(model[0])
    torch.testing.assert_close(model(data), expected)


class Named(nn.Module):
    """Returns by name what it makes of a sequence; the second of what it returns is often not there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor, mask: Tensor, with_features: bool = False) -> dict[str, Tensor | None]:
        values = self.embedding(tokens) * mask[..., None]
        return {"logits": self.head(values.sum(1)), "features": values if with_features else None}


def sequences(samples: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"tokens": torch.randint(0, 9, (samples, length)), "mask": torch.rand(samples, length)}


LENGTHS = {"tokens": {1: "length"}, "mask": {1: "length"}}
OWN_NAMES = {"input_names": ["ids", "weights"], "output_names": ["scores"]}


@pytest.mark.parametrize(
    ("options", "inputs", "outputs"),
    [
        ({}, ["tokens", "mask"], ["logits"]),
        pytest.param({**OWN_NAMES, "opset_version": 21}, ["ids", "weights"], ["scores"], marks=needs_later_operators),
    ],
)
def test_inputs_outputs_and_operators_are_those_that_are_asked_for(tmp_path, options, inputs, outputs):
    model = Named().eval()
    path = tmp_path / "m.onnx"
    report = export(model, path, sequences(2, 5), dynamic_axes=LENGTHS, **options)
    assert [parity.batch_size for parity in report.parity] == [2, 3]
    session = onnxruntime.InferenceSession(path)
    assert [node.name for node in session.get_inputs()] == inputs
    assert [node.name for node in session.get_outputs()] == outputs
    opset = {each.domain: each.version for each in onnx.load(path).opset_import}[""]
    assert opset == options.get("opset_version", opset)
    longer = sequences(4, 8)
    (output,) = run_onnx(path, *longer.values())
    torch.testing.assert_close(output, model(**longer)["logits"])


def test_any_length_is_taken_of_an_example_of_length_one_by_a_pt2_file_too(tmp_path):
    model = Named().eval()
    export(model, tmp_path / "m.pt2", sequences(1, 1), dynamic_axes=LENGTHS)
    longer = sequences(4, 8)
    found = torch.export.load(tmp_path / "m.pt2").module()(*longer.values())
    torch.testing.assert_close(found["logits"], model(**longer)["logits"])


def test_an_opset_that_torch_can_not_write_is_an_error_and_no_file(tmp_path, caplog):
    with pytest.raises(ExportError, match="version 9 of ONNX's operators, as `opset_version` asks; it wrote"):
        export(nn.Sequential(nn.Linear(3, 3), nn.GELU()), tmp_path / "m.onnx", torch.randn(2, 3), opset_version=9)
    assert list(tmp_path.iterdir()) == []
    assert not [record for record in caplog.records if "onnxscript" in record.name]


def test_who_has_long_work_to_do_first_is_told_of_such_an_opset_before(tmp_path):
    model, x, state = nn.Linear(3, 3), torch.randn(2, 3), torch.random.get_rng_state()
    with torch.device("meta"):  # another default than the CPU
        exporting.check_export(model, tmp_path / "m.onnx", x, opset_version=18)
    with pytest.raises(ValueError, match="`opset_version` to be a version that can be written, but got 5: torch.onnx"):
        exporting.check_export(model, tmp_path / "m.onnx", x, opset_version=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_names": ["a"]}, ValueError, r"`input_names` to hold 2 different names, but got \['a'\]"),
        ({"input_names": ["a", "a"]}, ValueError, "`input_names` to hold 2 different names"),
        ({"output_names": ["a", "b"]}, ValueError, "`output_names` to hold 1 different names"),
        ({"output_names": "logits"}, TypeError, "`output_names` to be a sequence of names, but got 'logits'"),
        ({"opset_version": 0}, ValueError, "`opset_version` to be at least 1"),
        ({"opset_version": 999}, ValueError, r"to be at most \d+, the last one that onnx .* but got 999"),
        ({"opset_version": "18"}, TypeError, "`opset_version` to be an integer"),
        ({"dynamic_axes": {"ids": {1: "length"}}}, ValueError, r"names of arguments .* 'ids', not one of \['tokens', "),
        (
            {"dynamic_axes": {"mask": {2: "length"}}},
            ValueError,
            "axes from 1 to 1 .* `mask` .* but got 2: 'length'",
        ),
        ({"dynamic_axes": {"mask": {0: "samples"}}}, ValueError, "the first axis is `dynamic_batch`"),
        ({"opset_version": 18, "format": "pt2"}, ValueError, "`opset_version` to be None: they belong to ONNX"),
    ],
)
def test_names_versions_and_axes_that_do_not_fit_are_named(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export(Named(), tmp_path / "m.onnx", sequences(2, 5), **options)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_refused_for_onnx_in_plain_words_and_goes_to_pt2(tmp_path):
    model, x = nn.Linear(3, 2).bfloat16(), torch.randn(2, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`weight` is in bfloat16, .* Export `model.float\(\)` .* or to .pt2"):
        export(model, tmp_path / "m.onnx", x)
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path / "m.pt2", x).parity[0].relative_difference == 0
    export(model.float(), tmp_path / "m.onnx", x.float())


class Echo(nn.Module):
    """Returns by the name of its input what it makes of it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x + 1, "x_out": x * 2}


def test_an_output_that_is_called_as_an_input_gets_a_name_of_its_own(tmp_path):
    x = torch.randn(2, 3)
    export(Echo(), tmp_path / "m.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [each.name for each in (*session.get_inputs(), *session.get_outputs())]
    assert len(set(names)) == 3
    assert names[0] == "x"
    for found, expected in zip(run_onnx(tmp_path / "m.onnx", x), Echo()(x).values(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("names", [{"output_names": ["x", "y"]}, {"input_names": ["a"], "output_names": ["b", "a"]}])
def test_names_of_outputs_that_inputs_have_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"`output_names` to hold other names than the inputs have, \['[xa]'\]"):
        export(Echo(), tmp_path / "m.onnx", torch.randn(2, 3), **names)
    assert list(tmp_path.iterdir()) == []


class Scaled(nn.Module):
    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return scale * x


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_first_input_without_axes(tmp_path, suffix):
    inputs = (torch.tensor(2.0), torch.randn(3, 2))
    report = export(Scaled(), tmp_path / f"m.{suffix}", inputs, dynamic_batch=False)
    assert [(each.batch_size, each.max_difference) for each in report.parity] == [(1, 0.0)]
    (output,) = RUN[suffix](tmp_path / f"m.{suffix}", *inputs)
    assert torch.equal(output, 2 * inputs[1])


def test_a_file_in_the_place_of_its_folder_is_named_before_any_work(tmp_path):
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(NotADirectoryError, match="Expected argument `path` to be a file in a folder"):
        export(nn.Linear(3, 3), tmp_path / "taken" / "m.pt2", torch.randn(2, 3))
    assert (tmp_path / "taken").read_text() == "precious"


class Positions(nn.Module):
    """Has so many positions, as language models do, and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(most, 4), nn.Linear(4, 2)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.words(ids) + self.positions(places)).mean(1)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_model_at_its_longest_text_is_checked_on_a_shorter_one(monkeypatch, tmp_path, suffix):
    torch.manual_seed(0)
    shapes, compare = [], exporting._compare
    monkeypatch.setattr(exporting, "_compare", lambda *given: shapes.append(given[2][0].shape) or compare(*given))
    model, ids = Positions(6).eval(), torch.randint(0, 9, (3, 6))
    report = export(model, tmp_path / f"model.{suffix}", ids, dynamic_axes={"ids": {1: "length"}})
    assert [parity.batch_size for parity in report.parity] == [3, 4]
    assert shapes == [(3, 6), (4, 5)]
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        short = ids[:2, :3]
        (found,) = session.run(None, {session.get_inputs()[0].name: short.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(short).detach(), rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """Positions, and a mask beside, whose batch is that of the others only where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Positions(6)

    def forward(self, tokens, mask):
        return self.words(tokens) * mask.sum(1, keepdim=True)


@pytest.mark.parametrize("model", [Named, Masked])
@pytest.mark.parametrize("axes", [None, LENGTHS], ids=["batch", "length"])
def test_an_onnx_file_calls_its_sizes_as_they_were_asked_for(tmp_path, model, axes):
    export(model().eval(), tmp_path / "model.onnx", sequences(2, 6), dynamic_axes=axes)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [each.shape for each in session.get_inputs()] == [["batch", "length" if axes else 6]] * 2
    assert session.get_outputs()[0].shape[0] == "batch"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_file_is_compared_with_what_is_computed_in_full(tmp_path, monkeypatch, precision):
    """A Trainer advises to set it; a CPU that has bfloat16 then computes in that, and no file does."""
    compute = exporting.call

    def coarsely(model, arguments):
        output = compute(model, arguments)
        return output if torch.get_float32_matmul_precision() == "highest" else output.bfloat16().float()

    monkeypatch.setattr(exporting, "call", coarsely)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    try:
        torch.set_float32_matmul_precision(precision)
        report = export(model, tmp_path / "model.onnx", x)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert max(each.relative_difference for each in report.parity) < 1e-5
