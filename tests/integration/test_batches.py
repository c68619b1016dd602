"""Batches as people have them: dictionaries, dataclasses, several inputs, inputs by name, read alike by all."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_easier import (
    collapse,
    collapsible_blocks,
    compress,
    export,
    fit_chains,
    linearize,
    measure_affines,
    measure_entropy,
    measure_error_likelihood,
)

FREE: dict[str, Any] = {"objective": "macs", "max_drift": math.inf}


class Two(nn.Module):
    """A network of two inputs; the place of the second differs from class to class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def compute(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.layers(image) * scale


class Positional(Two):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.compute(image, scale)


class ByName(Two):
    def forward(self, image: Tensor, flip: bool = False, *, scale: Tensor) -> Tensor:
        return self.compute(-image if flip else image, scale)


class Optional(Two):
    def forward(self, image: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        made = self.compute(image, torch.ones_like(image[:, :1]) if scale is None else scale)
        return made if bias is None else made + bias


class Collecting(LightningModule):
    """As Lightning's own example of a transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ByName()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(**inputs)


NETWORKS = [Positional, ByName, Optional, Collecting]


@dataclass
class Sample:
    image: Tensor
    scale: Tensor
    label: Tensor


def made(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return network().eval()


def dictionaries(count: int = 4) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        {"label": torch.arange(64), "scale": torch.rand(64, 1) + 1, "image": torch.randn(64, 8), "text": ["?"] * 64}
        for _ in range(count)
    ]


def as_dataclasses(batch: dict[str, Any]) -> Sample:
    return Sample(batch["image"], batch["scale"], batch["label"])


def nested(batch: dict[str, Any]) -> Any:
    return ({"image": batch["image"], "scale": batch["scale"]}, batch["label"])


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict, "BatchEncoding": BatchEncoding, "dataclass": as_dataclasses, "with labels": nested,
}  # fmt: skip
READERS: dict[str, Callable[..., Any]] = {
    "measure_entropy": measure_entropy, "measure_affines": measure_affines, "fit_chains": fit_chains,
    "measure_error_likelihood": measure_error_likelihood,
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_form_is_measured_as_its_tensors_are(network, form):
    data = dictionaries()
    batches = [FORMS[form](batch) for batch in data]
    ((name, entropy),) = measure_entropy(made(network), batches).items()
    expected = measure_entropy(made(Positional), [(batch["image"], batch["scale"]) for batch in data])
    assert name.endswith("layers.1")
    assert entropy == expected["layers.1"] > 0


@pytest.mark.parametrize("reader", READERS)
def test_all_that_measures_reads_dictionaries_and_takes_one_override(reader):
    read, data = READERS[reader], dictionaries()
    expected = read(made(Positional), [(batch["image"], batch["scale"]) for batch in data])
    assert str(read(made(ByName), data)) == str(expected)
    others = [{"x": batch["image"], "meta": {"s": batch["scale"]}} for batch in data]
    found = read(made(ByName), others, inputs_of=lambda batch: {"image": batch["x"], "scale": batch["meta"]["s"]})
    assert str(found) == str(expected)
    found = read(made(Positional), others, inputs_of=lambda batch: (batch["x"], batch["meta"]["s"]))
    assert str(found) == str(expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_collapsed_network_takes_by_name_what_its_example_gives(network):
    model, data = made(network), dictionaries()
    (name,) = measure_entropy(model, data)
    linearize(model, [name])
    x = {key: data[0][key] for key in ("image", "scale")}
    result = collapse(model, data[0], objective="macs")
    assert len(result.report.merges) == 1
    with torch.no_grad():
        torch.testing.assert_close(result.model(**x), model(**x))
        few = {key: value[:3] for key, value in x.items()}
        torch.testing.assert_close(result.model(**few), model(**few))


@pytest.mark.parametrize(
    ("network", "form"), [(ByName, "dict"), (Optional, "BatchEncoding"), (Collecting, "with labels")]
)
def test_a_network_is_compressed_on_batches_of_any_form(network, form):
    data = dictionaries()
    model = made(network)
    result = compress(model, [FORMS[form](batch) for batch in data], **FREE)
    expected = compress(made(Positional), [(batch["image"], batch["scale"]) for batch in data], **FREE)
    assert any(trial.kept for trial in result.report.trials)
    x = {key: data[1][key] for key in ("image", "scale")}
    with torch.no_grad():
        torch.testing.assert_close(result.model(**x), expected.model(**x))
        torch.testing.assert_close(result.fitted(**x), expected.model(**x), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(result.model(**x), result.model(image=x["image"], scale=2 * x["scale"]))


def test_it_is_trained_on_them_and_fitted_in_a_collapse():
    model, data = made(ByName), dictionaries()
    trained = compress(model, data, finetune=20, **FREE)
    x = {key: data[1][key] for key in ("image", "scale")}
    with torch.no_grad():
        torch.testing.assert_close(trained.model(**x), trained.fitted(**x), atol=1e-4, rtol=1e-4)
    fitted = collapse(model, data[0], mode="fit", sites=["layers.1"], calibration=data, objective="macs")
    assert len(fitted.report.fitted) == 1


@pytest.mark.parametrize(("network", "suffix"), [(Collecting, "onnx"), (Collecting, "pt2"), (Optional, "pt2")])
def test_a_file_takes_them_too(network, suffix, tmp_path):
    model, data = made(network), dictionaries(1)
    report = export(model, tmp_path / f"model.{suffix}", data[0])
    assert [parity.batch_size for parity in report.parity] == [64, 65]
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(report.path)
        assert sorted(each.name for each in session.get_inputs()) == ["image", "scale"]


def test_blocks_are_checked_on_them():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, *, image: Tensor, scale: Tensor) -> Tensor:
            return (image + self.block(image)) * scale

    report = collapsible_blocks(Residual().eval(), dictionaries(1)[0])
    assert [(block.name, block.macs) for block in report.blocks] == [("block", 1.0)]


def test_several_inputs_come_together_or_in_a_row():
    data = dictionaries()
    expected = measure_entropy(made(Positional), data)
    rows = [(batch["image"], batch["scale"], batch["label"]) for batch in data]
    pairs = [((batch["image"], batch["scale"]), batch["label"]) for batch in data]
    assert measure_entropy(made(Positional), rows) == measure_entropy(made(Positional), pairs) == expected
    optional = measure_entropy(made(Optional), [[batch["image"], batch["label"]] for batch in data])
    assert optional == measure_entropy(made(Positional), [(batch["image"], torch.ones(64, 1)) for batch in data])


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: (batch["image"], batch["scale"], batch["label"]),
        lambda batch: [batch["image"], batch["scale"], batch["text"], None],
        lambda batch: ((batch["image"], batch["scale"]), batch["label"]),
        lambda batch: ({"image": batch["image"], "scale": batch["scale"]}, batch["label"]),
    ],
    ids=["labels", "text and none", "a pair and labels", "a dictionary and labels"],
)
def test_a_whole_batch_is_an_example_input(form, tmp_path):
    model, (batch, *_) = made(Positional), dictionaries()
    image, scale = batch["image"], batch["scale"]
    result = collapse(model, form(batch), objective="macs")
    with torch.no_grad():
        torch.testing.assert_close(result.model(image, scale), model(image, scale))
        export(model, tmp_path / "m.pt2", form(batch))
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(image, scale), model(image, scale))


class Record(NamedTuple):
    label: Tensor
    scale: Tensor
    image: Tensor


def test_a_named_tuple_that_has_all_names_is_read_by_them():
    data = dictionaries()
    records = [Record(batch["label"], batch["scale"], batch["image"]) for batch in data]
    for network in (Positional, Optional):
        assert measure_entropy(made(network), records) == measure_entropy(made(network), data)
    model, (batch, *_) = made(Positional), data
    result = collapse(model, records[0], objective="macs")
    with torch.no_grad():
        inputs = batch["image"], batch["scale"]
        torch.testing.assert_close(result.model(*inputs), model(*inputs))
    other = [Pair(batch["image"], batch["scale"]) for batch in data]  # names of its own: in a row
    assert measure_entropy(made(Positional), other) == measure_entropy(made(Positional), data)


def test_the_only_tensor_that_is_no_label_is_the_only_input_whatever_it_is_called():
    model = made(Two).layers
    data = [{"pixel_values": batch["image"], "labels": batch["label"], "id": "a"} for batch in dictionaries()]
    assert measure_entropy(model, data) == measure_entropy(model, [batch["pixel_values"] for batch in data])
    x = data[0]["pixel_values"]
    result = compress(model, data, example_inputs=x[:5], **FREE)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), compress(model, [each["pixel_values"] for each in data],
                                                             example_inputs=x[:5], **FREE).model(x))  # fmt: skip


class Losing(nn.Module):
    """Returns a loss besides, where it gets labels, as Hugging Face's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, image: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(image)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def test_labels_are_left_out_and_given_where_they_are_asked_for():
    data = [{"image": batch["image"], "labels": batch["label"] % 4} for batch in dictionaries()]
    result = compress(made(Losing), data, **FREE)
    (note,) = (note for note in result.report.notes if "labels" in note)
    assert "was not given `labels`: outputs are compared, not losses. To give it" in note
    with torch.no_grad():
        assert list(result.model(data[0]["image"])) == ["logits"]
    given = compress(made(Losing), data, inputs_of=lambda batch: batch, **FREE)
    with torch.no_grad():
        assert list(given.model(**data[0])) == ["loss", "logits"]
    assert not [note for note in given.report.notes if "labels" in note]

    class Refusing(Losing):
        def forward(self, image: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return super().forward(image, labels[:])

    for read in (measure_entropy, compress, fit_chains):
        with pytest.raises(ValueError, match="was not given `labels`; where it needs them, pass `inputs_of=lambda"):
            read(made(Refusing), data)

    class Needing(Losing):
        def forward(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return super().forward(image, labels)

    with torch.no_grad():
        assert list(collapse(made(Needing), data[0], objective="macs").model(**data[0])) == ["loss", "logits"]


def test_what_the_forward_does_not_take_is_told():
    data = [{**batch, "weight": torch.ones(64)} for batch in dictionaries()]
    notes = compress(made(ByName), data, **FREE).report.notes
    assert "The forward of ByName does not take `weight`, which the batches hold, too" in notes


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("network", "batch", "message"),
    [
        (ByName, {"image": torch.ones(2, 8)}, r"`scale` in each batch, which its forward takes \(ByName\).*`image`"),
        (ByName, {"image": [1.0], "scale": torch.ones(2)}, "a tensor as `image`.*type list|a tensor as `image`.* list"),
        (ByName, {"x": torch.ones(2, 8), "y": torch.ones(2)}, "`image`, `scale`"),
        (ByName, {"x": torch.ones(2, 8)}, "`image`, `scale`"),
        (Positional, Pair(torch.ones(2, 8), None), "whose first 2 elements are the input tensors, or dictionaries"),
        (Positional, {}, "takes, `image`, `scale`, but got one of nothing"),
        (Optional, "text", "tensors, or sequences .* type str.*inputs_of=lambda batch"),
    ],
)  # fmt: skip
def test_a_batch_without_the_inputs_is_an_error_that_says_what_to_do(network, batch, message):
    model = made(network)
    for read, argument in ((measure_entropy, "batches"), (compress, "batches")):
        with pytest.raises(TypeError, match=f"(?s)`{argument}` to hold .*{message}"):
            read(model, [batch])


def test_batches_that_differ_in_what_they_hold_are_an_error():
    data = dictionaries(2)
    del data[1]["scale"]
    with pytest.raises(TypeError, match="`batches` to hold `scale` in each batch, which the forward is called with"):
        measure_entropy(made(Optional), data)


def test_bad_overrides_are_named():
    with pytest.raises(TypeError, match="`inputs_of` to be a function of a batch, .* got a value of type str"):
        measure_entropy(made(ByName), dictionaries(), inputs_of="image")
    with pytest.raises(ValueError, match="`calibration` and `inputs_of` to be None"):
        collapse(made(ByName), dictionaries(1)[0], inputs_of=lambda batch: batch)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def sentences(count: int = 3) -> list[BatchEncoding]:
    torch.manual_seed(1)
    masks = torch.ones(count, 4, 7, dtype=torch.long)
    masks[:, 0, 5:] = 0
    labels = torch.arange(4) % 3
    return [
        BatchEncoding({"input_ids": torch.randint(1, 50, (4, 7)), "attention_mask": mask, "labels": labels})
        for mask in masks
    ]


def test_a_network_of_hugging_face_is_measured_compressed_and_exported(bert, tmp_path):
    data = sentences()
    inputs = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in data]
    entropies = measure_entropy(bert, data)
    assert entropies == measure_entropy(bert, [tuple(batch.values()) for batch in inputs])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = compress(bert, data, objective="macs", max_drift=0.5)
    assert sum("no longer takes the arguments **" in str(warning.message) for warning in told) == 1
    assert any(trial.kept for trial in result.report.trials)
    with torch.no_grad():
        made, fitted = result.model(**inputs[1]), result.fitted(**inputs[1])
    torch.testing.assert_close(made.logits, fitted.logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError, match="`labels` to be None"):
        result.model(**data[1])
    assert result.fitted(**data[1]).loss.requires_grad
    report = export(result.model, tmp_path / "bert.onnx", data[0])
    session = onnxruntime.InferenceSession(report.path)
    (logits, *_) = session.run(None, {key: value[:2].numpy() for key, value in inputs[1].items()})
    torch.testing.assert_close(torch.from_numpy(logits), made.logits[:2], atol=1e-4, rtol=1e-3)


def test_a_cache_in_the_outputs_is_named_with_the_switch_that_turns_it_off():
    torch.manual_seed(0)
    ids = torch.randint(1, 9, (2, 5))
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match="DynamicCache, which can't be compared. .* `model.config.use_cache = False`"):
        collapse(model, batch, objective="macs")
    model.config.use_cache = False
    result = collapse(model, batch, objective="macs")
    with torch.no_grad():
        torch.testing.assert_close(result.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_length_that_positions_limit_is_free_in_a_file(bert, tmp_path):
    batch = sentences(1)[0]
    lengths = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    export(bert, tmp_path / "bert.pt2", batch, dynamic_axes=lengths)
    shorter = {name: batch[name][:3, :4] for name in lengths}
    found = torch.export.load(tmp_path / "bert.pt2").module()(*shorter.values())
    with torch.no_grad():
        torch.testing.assert_close(found.logits, bert(**shorter).logits)
