"""What is captured of a model that torch.fx can't follow, and what its collapsed form can do."""

import copy
import inspect
import io
import math
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_easier import CollapseError, collapse, export, isolate_activations, linearize
from lightning_easier.collapsing.exact.guards import SizeGuards
from lightning_easier.support.inference import relative_difference
from tests.collapsing.test_linear_steps import conv
from tests.models import randomize_batch_norms
from tests.test_export import OtherStrides, ViewsAttention


class AsksForShapes(nn.Module):
    """What torch.fx can't follow and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.act, self.b = conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)
        self.gamma = nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[1] != 3:
            raise ValueError("three channels are needed")
        maps = self.b(self.act(self.norm(self.a(x)))) * self.gamma
        return {"maps": maps, "mean": maps.mean([2, 3])}


@pytest.mark.parametrize("samples", [1, 2])
def test_what_only_torch_export_can_trace_is_collapsed(samples, tmp_path):
    model = randomize_batch_norms(linearize(AsksForShapes(), ["act"])).eval()
    x = torch.randn(samples, 3, 8, 9)
    result = collapse(model, x, objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b", "mul")]
    assert result.report.fused == ["norm"]
    assert list(result.model.state_dict()) == ["a.weight", "a.bias"]
    other = torch.randn(3, 3, 12, 7)
    assert relative_difference(result.model(other), model(other)) <= 1e-5
    assert (
        relative_difference(copy.deepcopy(result.model).double()(other.double()), model.double()(other.double())) < 1e-6
    )
    assert export(result.model, tmp_path / "model.onnx", x).parity


def test_how_many_samples_a_kernel_takes_is_no_condition(monkeypatch, tmp_path):
    """On a GPU torch asks it of every batch norm; as a condition of the graph it would keep it from being exported."""
    compute, asked = F.batch_norm, []

    def batch_norm(x, *args, **kwargs):
        asked.append(bool(x.shape[0] <= 880801) and bool(x.shape[0] <= 65535))
        return compute(x, *args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", batch_norm)
    model, x = randomize_batch_norms(linearize(AsksForShapes(), ["act"])).eval(), torch.randn(2, 3, 8, 9)
    collapsed = collapse(model, x, objective="macs").model
    assert asked
    assert not any("65535" in condition for condition in collapsed._guards_fn.conditions)
    assert export(collapsed, tmp_path / "model.onnx", x).parity


class Branches(nn.Module):
    """Takes another way with the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return F.avg_pool2d(y, 2) if x.shape[2] > 5 else y


def test_what_was_exported_for_some_sizes_refuses_others():
    model = Branches().eval()
    collapsed = collapse(model, torch.randn(2, 3, 8, 9), objective="macs").model
    x = torch.randn(3, 3, 6, 11)  # odd, as the example's: for torch 2.10 that is a condition
    assert relative_difference(collapsed(x), model(x)) <= 1e-5
    with pytest.raises(AssertionError, match="holds where"):
        collapsed(torch.randn(2, 3, 5, 5))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_torch_export_captured_is_an_ordinary_module():
    model = Branches().eval()
    x = torch.randn(2, 3, 8, 9)
    collapsed = collapse(model, x, objective="macs").model
    for other in (saved_and_loaded(collapsed), copy.deepcopy(collapsed), torch.compile(collapsed, backend="eager")):
        assert torch.equal(other(x), collapsed(x))
        with pytest.raises((AssertionError, RuntimeError), match="holds where"):  # torch.compile has its own
            other(torch.randn(2, 3, 5, 5))
    collapsed.graph.eliminate_dead_code()
    collapsed.recompile()
    with pytest.raises(AssertionError, match="holds where"):  # nobody reads its value, and yet it is not dead
        collapsed(torch.randn(2, 3, 5, 5))
    again = torch.export.export(collapsed, (x,)).module()
    assert relative_difference(again(x), model(x)) <= 1e-5
    assert model(x).shape == (2, 2, 4, 4)  # the source has no guards, and still takes either way
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 2, 5, 5)


class TakesAnotherWayAtOne(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.a, self.b = axis, nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y * 3 if x.shape[self.axis] == 1 else y


@pytest.mark.parametrize("axis", [0, 1])
def test_another_way_at_a_size_of_one_is_not_taken_silently(axis):
    model = TakesAnotherWayAtOne(axis).eval()
    sizes = [3, 5, 4]
    result = collapse(model, torch.randn(sizes), objective="macs")
    assert len(result.report.merges) == 1
    x = torch.randn(7, 6, 4)
    assert relative_difference(result.model(x), model(x)) <= 1e-5
    sizes[axis] = 1
    x = torch.randn(sizes)
    with pytest.raises(AssertionError, match="holds where"):
        result.model(x)
    collapsed = collapse(model, x, objective="macs").model  # what is recorded is the way of the example
    assert relative_difference(collapsed(x), model(x)) <= 1e-5
    with pytest.raises(AssertionError, match="holds where"):
        collapsed(torch.randn(7, 6, 4))


def test_another_way_without_samples_is_not_taken_silently():
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return self.b(self.a(x)) + offset if x.numel() else x

    class Asks(Early):
        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return self.b(self.a(x)) + offset if x.shape[0] < 9 else x

    inputs = torch.randn(5, 4), torch.randn(5, 3)
    early, asks = Early().eval(), Asks().eval()
    none = [x[:0] for x in inputs]
    collapsed = collapse(early, inputs, objective="macs").model
    assert relative_difference(collapsed(*(x[:1] for x in inputs)), early(*(x[:1] for x in inputs))) <= 1e-5
    with pytest.raises(AssertionError, match=r"holds where x\.size\(\)\[0\] != 0"):
        collapsed(*none)
    alike = collapse(asks, inputs, objective="macs").model
    assert alike(*none).shape == asks(*none).shape == (0, 3)


def test_sizes_that_torch_export_can_not_reason_about_are_taken_as_they_are():
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(2, 5, 3, stride=(1, 2), dilation=(1, 2)), conv(5, 1, 2, stride=(1, 2))
            self.gamma = nn.Parameter(torch.randn(5, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).mul_(self.gamma)) if x.shape[1] == 2 else x

    model = Strided().eval()
    result = collapse(model, torch.randn(2, 2, 6, 8), objective="depth")
    assert len(result.report.merges) == 1
    x = torch.randn(3, 2, 6, 8)
    assert relative_difference(result.model(x), model(x)) <= 1e-5
    x = torch.randn(2, 2, 7, 9)
    output = unless_refused(result.model, x)
    if torch.__version__.startswith("2.6."):  # it can, at times
        assert output is None or relative_difference(output, model(x)) <= 1e-5
    else:
        assert output is None


def unless_refused(collapsed: nn.Module, x: Tensor) -> Any:
    """Call a collapsed model; None where it holds for other sizes."""
    try:
        return collapsed(x)
    except AssertionError as error:
        if "holds where" not in str(error):
            raise
        return None


class CountsSamples(nn.Module):
    """Uses the number of samples in a way that torch.export takes for a constant, or with other sizes."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(6, 8), nn.Linear(8, 4), forward

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("six features are needed")
        return self.then(self.b(self.a(x)))


@pytest.mark.parametrize(
    "then",
    [
        lambda y: y.reshape(len(y), -1),
        lambda y: y.view(int(y.shape[0]), -1),
        lambda y: y / math.sqrt(y.shape[0]),
        lambda y: y.mean(-1).chunk(4, 1)[1].relu(),  # contiguous, of a size that torch.export counts on
        lambda y: torch.cat([y, y.new_ones(len(y), 1, 4)], 1),
    ],
    ids=["len", "int", "sqrt", "chunk", "token"],
)
@pytest.mark.parametrize("samples", [3, 1])
def test_the_number_of_samples_stays_free_where_the_forward_leaves_it_free(then, samples):
    model = CountsSamples(then).eval()
    collapsed = collapse(model, torch.randn(samples, 4, 6), objective="macs").model
    assert any(isinstance(module, SizeGuards) for module in collapsed.modules())
    for samples in (1, 2, 3, 4, 7):
        x = torch.randn(samples, 4, 6)
        assert relative_difference(collapsed(x), model(x)) <= 1e-5


def test_what_takes_each_sample_alone_is_recorded_for_their_number():
    model = CountsSamples(lambda y: torch.stack([each * 2 for each in y])).eval()
    collapsed = collapse(model, torch.randn(3, 4, 6), objective="macs").model
    x = torch.randn(3, 4, 6)
    assert relative_difference(collapsed(x), model(x)) <= 1e-5
    with pytest.raises(AssertionError, match="holds where"):
        collapsed(torch.randn(2, 4, 6))


class Upsamples(nn.Module):
    """Asks a transposed convolution for a size that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = conv(2, 4), conv(4, 3), nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (3, 4):
            raise ValueError("another size")
        return self.up(self.b(self.a(x)), output_size=[7, 8])


def test_a_transposed_convolution_keeps_the_size_that_it_is_asked_for():
    model = Upsamples().eval()
    result = collapse(model, torch.randn(2, 2, 3, 4), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    x = torch.randn(5, 2, 3, 4)
    assert result.model(x).shape == (5, 3, 7, 8)
    assert relative_difference(result.model(x), model(x)) <= 1e-5


class Strides(nn.Module):
    """Its stride depends on the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(2, 4), conv(4, 3), conv(3, 3), conv(3, 2)
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.b(self.a(x)), self.weight, stride=x.size(2) - 4)
        return self.d(self.c(y))


def test_an_operator_whose_stride_depends_on_a_size_stays_and_its_neighbours_merge():
    model = Strides().eval()
    result = collapse(model, torch.randn(2, 2, 6, 7), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b"), ("c", "d")]
    for shape in ((2, 2, 6, 7), (3, 2, 7, 9)):
        x = torch.randn(shape)
        assert relative_difference(result.model(x), model(x)) <= 1e-5


class Adds(nn.Module):
    """Its second input is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = x + others[0]
        return self.b(self.a(x * 2 if x.shape[1] > 3 else x))


def test_inputs_with_one_sample_and_those_without_a_name_of_their_own():
    model = Adds().eval()
    collapsed = collapse(model, (torch.randn(4, 5, 4), torch.randn(1, 5, 4)), objective="macs").model
    inputs = torch.randn(3, 5, 4), torch.randn(1, 5, 4)
    assert relative_difference(collapsed(*inputs), model(*inputs)) <= 1e-5


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.frozen(x)
        return self.b(self.a(y))


class Positions(WithoutGradients):
    """Computes constants without gradients, as rotary embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.arange(x.shape[1], device=x.device).float() / 2
        return self.b(self.a(x)) + positions[:, None]


def test_gradients_stay_off_where_they_were_turned_off():
    model = WithoutGradients().eval()
    with pytest.raises(CollapseError, match="autograd"):
        collapse(model, torch.randn(2, 4), objective="macs")
    model = Positions().eval()
    result = collapse(model, torch.randn(2, 3, 4), objective="macs")
    assert len(result.report.merges) == 1
    x = torch.randn(1, 5, 4)
    assert relative_difference(result.model(x), model(x)) <= 1e-5
    assert result.model.to("meta")(x.to("meta")).device.type == "meta"  # what it makes is made where its input is


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embedding(x[:, :32] if x.shape[1] > 32 else x))))


def test_weights_that_are_tied_stay_tied():
    model = Tied().eval()
    result = collapse(model, torch.randint(0, 50, (2, 8)), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    x = torch.randint(0, 50, (3, 5))
    assert relative_difference(result.model(x), model(x)) <= 1e-5


class TwoOutputs(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make, self.a, self.b = make, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor):
        if x.shape[1] != 3:
            raise ValueError("three features are needed")
        y = self.b(self.a(x))
        return self.make(logits=y, both=(y + 1, None))


def test_a_result_returns_the_classes_that_the_model_returns():
    x = torch.randn(2, 3)
    model = TwoOutputs(OrderedDict)
    collapsed = collapse(model, x, objective="macs").model
    for result in (collapsed, saved_and_loaded(collapsed)):
        output = result(x)
        assert type(output) is OrderedDict
        assert relative_difference(output, model(x)) <= 1e-5
        assert list(output) == ["logits", "both"]
        assert output["both"][1] is None


class Attributes(dict):
    """A dictionary of somebody's own; torch knows nothing of it."""


torch.utils._pytree.register_pytree_node(
    Attributes,
    lambda made: (list(made.values()), list(made)),
    lambda values, keys: Attributes(zip(keys, values, strict=True)),
)


@pytest.mark.parametrize("make", [OrderedDict, Attributes])
def test_what_torch_fx_records_returns_the_classes_that_the_model_returns(make):
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor):
            y = self.b(self.a(x))
            return make({"logits": y, "both": (y + 1, None)})

    model = Returns()
    x = torch.randn(2, 3)
    result = collapse(model, x, objective="macs")
    assert len(result.report.merges) == 1
    output = result.model(x)
    assert type(output) is make
    assert list(output) == ["logits", "both"]
    assert relative_difference(output, model(x)) <= 1e-5


def test_a_class_of_transformers_is_returned_and_its_conv1d_is_merged():
    transformers = pytest.importorskip("transformers")
    configuration = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                                            use_cache=False, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = transformers.GPT2Model(configuration).eval()
    linearize(model, list(isolate_activations(model))[1:])
    tokens = torch.randint(0, 99, (2, 7))
    result = collapse(model, tokens, objective="macs")
    assert [merge.into for merge in result.report.merges] == ["Linear 32→32"]
    for collapsed in (result.model, saved_and_loaded(result.model)):
        for x in (tokens, torch.randint(0, 99, (3, 5))):
            output = collapsed(x)
            assert type(output) is type(model(x))
            assert relative_difference(output.last_hidden_state, model(x).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_layers_inside_a_transformer_layer_are_seen(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", norm_first=norm_first, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer).eval()
    linearize(model, list(isolate_activations(model)))
    x = torch.randn(2, 5, 8)
    result = collapse(model, x, objective="macs")
    (merge,) = result.report.merges
    assert merge.operators[:2] == ("1.linear1", "1.linear2")
    assert relative_difference(result.model(x), model(x)) <= 1e-5
    with pytest.raises(AssertionError, match="holds where input.ndim == 3"):
        result.model(x[0])


class ProjectsAttention(ViewsAttention):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def test_a_view_of_what_attention_returns_is_captured():
    model = ProjectsAttention().eval()
    result = collapse(model, torch.randn(2, 5, 8), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("fc", "head")]
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert relative_difference(result.model(x), model(x)) <= 1e-5
    assert not any(module._forward_hooks for module in (*model.modules(), *result.model.modules()))


def test_what_torch_export_could_not_take_is_the_reason_where_torch_fx_can_not_follow():
    with pytest.raises(CollapseError, match="captured: ValueError: Cannot view a tensor.*Write `reshape` in the place"):
        collapse(OtherStrides().eval(), torch.randn(2, 5, 8), objective="macs")


def test_a_model_in_which_nothing_merges_keeps_its_own_forward():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    result = collapse(model, x, objective="macs")
    assert type(result.model) is nn.TransformerEncoder
    assert result.report.before.macs == result.report.after.macs > 0
    assert relative_difference(result.model(x), model(x)) == 0
    assert all(a is not b for a, b in zip(result.model.parameters(), model.parameters(), strict=True))


class Asserts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(4, 8), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 7, "maps of seven rows are needed")
        y = self.a(x)
        torch._assert(y.shape[1] == 8, "eight channels are needed")
        return self.b(y)


def test_what_is_asserted_of_inputs_stays_asserted():
    result = collapse(Asserts(), torch.randn(2, 4, 7, 7), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    with pytest.raises(AssertionError, match="seven rows"):
        result.model(torch.randn(2, 4, 8, 8))


def test_a_model_whose_forward_calls_its_children_in_a_row_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")).eval()
    linearize(model, list(isolate_activations(model)))
    collapse(model, torch.randn(2, 5, 8), objective="macs")
    assert [name for name, _ in model.named_children()] == ["0", "1"]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 4)


class ScalesAndMasks(TwoLayers):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, kind: str = "plain") -> Tensor:
        y = self.b(self.a(x))
        if mask is not None:
            y = y + mask
        return y * scale if kind == "plain" else y


class AsksForItsScale(TwoLayers):
    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, *, both: bool = True) -> Tensor:
        y = self.b(self.a(x))
        if mask is not None:
            y = y + mask
        return y * scale if scale != 1.0 and both else y


class IsExported(TwoLayers):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if x.shape[1] != 5:  # torch.fx can't follow this
            raise ValueError("five features are needed")
        y = self.b(self.a(x)) * scale
        return y if mask is None else y + mask


MASK = torch.randn(4)


@pytest.mark.parametrize(
    ("make", "free", "fixed", "signature"),
    [
        (ScalesAndMasks, {"scale": 2.0}, {"mask": MASK, "kind": "other"}, "(x, mask=None, scale=1.0, kind='plain')"),
        (AsksForItsScale, {}, {"scale": 2.0, "mask": MASK, "both": False},
         "(x, scale=1.0, mask=None, both=True)"),
        (IsExported, {}, {"scale": 2.0, "mask": MASK}, "(x, mask=None, scale=1.0)"),
    ],
)  # fmt: skip
def test_arguments_that_the_example_leaves_out_are_taken_or_refused(make, free, fixed, signature, tmp_path):
    model = make().eval()
    example = torch.randn(3, 5)
    result = collapse(model, example, objective="macs")
    assert len(result.report.merges) == 1
    assert result.report.fixed_arguments == {name: inspect.signature(model.forward).parameters[name].default
                                             for name in signature[1:-1].replace("=", ", ").split(", ") if name in fixed
                                             }  # fmt: skip
    assert all(f"| {name} | only" in str(result.report) for name in fixed)
    x = torch.randn(6, 5)
    for collapsed in (result.model, copy.deepcopy(result.model), saved_and_loaded(result.model)):
        assert str(inspect.signature(collapsed.forward)).partition(" ->")[0] == signature
        assert relative_difference(collapsed(x=x, mask=None), model(x)) <= 1e-5
        for name, value in free.items():
            assert relative_difference(collapsed(x, **{name: value}), model(x, **{name: value})) <= 1e-5
        for name, value in fixed.items():
            with pytest.raises(AssertionError, match=f"Expected argument `{name}` to be .*, its default"):
                collapsed(x, **{name: value})
    assert relative_difference(torch.compile(result.model, backend="eager")(x), model(x)) <= 1e-5
    assert export(result.model, tmp_path / "model.onnx", example).parity


def test_an_argument_that_the_example_gives_is_taken():
    model = ScalesAndMasks().eval()
    result = collapse(model, (torch.randn(3, 5), torch.randn(4)), objective="macs")
    x = torch.randn(6, 5)
    for arguments in ((x, MASK), (x, MASK, 2.0)):
        assert relative_difference(result.model(*arguments), model(*arguments)) <= 1e-5
    assert list(result.report.fixed_arguments) == ["kind"]


class TakesBranches(TwoLayers):
    """Its optional input goes through branches that merge."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        y = self.b(self.a(x)) * scale
        return y if mask is None else y * (self.c(mask) + self.d(mask))


class ExportsAMask(TwoLayers):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        if x.shape[1] != 5:  # torch.fx can't follow this
            raise ValueError("five features are needed")
        y = self.b(self.a(x)) * scale
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    ("make", "size", "merges"),
    [(TakesBranches, 5, 2), (ExportsAMask, 4, 1)],
)
def test_an_optional_argument_that_was_a_tensor_is_asked_for(make, size, merges, tmp_path):
    model = make().eval()
    x, mask, scale = torch.randn(3, 5), torch.randn(3, size), torch.tensor(2.0)
    result = collapse(model, (x, mask, scale), objective="macs")
    assert len(result.report.merges) == merges
    expected, collapsed = model(x, mask, scale), result.model
    for each in (collapsed, copy.deepcopy(collapsed), saved_and_loaded(collapsed)):
        assert str(inspect.signature(each.forward)).partition(" ->")[0] == "(x, mask=None, scale=1.0)"
        assert relative_difference(each(x, scale=scale, mask=mask), expected) <= 1e-5
        for name, arguments in (("mask", (x,)), ("mask", (x, None, scale)), ("scale", (x, mask))):
            with pytest.raises(AssertionError, match=rf"`{name}` to be a tensor: .* shape \(.*without `{name}`"):
                each(*arguments)
    compiled = torch.compile(collapsed, backend="eager")
    assert relative_difference(compiled(x, mask, scale), expected) <= 1e-5
    with pytest.raises((AssertionError, RuntimeError), match="`mask` to be a tensor"):  # torch.compile has its own
        compiled(x, None, scale)
    assert export(collapsed, tmp_path / "model.onnx", (x, mask, scale), dynamic_batch=False).parity
    collapsed.graph.eliminate_dead_code()
    collapsed.recompile()
    with pytest.raises(AssertionError, match="`mask` to be a tensor"):
        collapsed(x)


def test_an_optional_argument_before_those_that_a_forward_collects_is_asked_for():
    class CollectsMore(TwoLayers):
        def forward(self, x: Tensor, mask: Tensor | None = None, *others: Tensor) -> Tensor:
            y = self.b(self.a(x)) + others[0]
            return y if mask is None else y * mask

    model = CollectsMore().eval()
    inputs = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)
    collapsed = collapse(model, inputs, objective="macs").model
    assert relative_difference(collapsed(*inputs), model(*inputs)) <= 1e-5
    with pytest.raises(AssertionError, match="`mask` to be a tensor"):
        collapsed(inputs[0], None, inputs[2])


class Collects(TwoLayers):
    def forward(self, x: Tensor, *others: Tensor, scale: float = 1.0) -> Tensor:
        return self.b(self.a(x + others[0])) * scale


class HasAnObject(TwoLayers):
    def forward(self, x: Tensor, sizes: object = nn.Identity(), scale: float = 1.0) -> Tensor:
        return self.b(self.a(x)) * scale


class CollectsNames(TwoLayers):
    def forward(self, x: Tensor, sizes: object = nn.Identity(), *, scale: float = 1.0, **others: float) -> Tensor:
        return self.b(self.a(x)) * scale * others.get("gain", 1.0)


@pytest.mark.parametrize(
    ("make", "inputs", "lost"),
    [
        (Collects, 2, ["scale"]),
        (HasAnObject, 1, ["sizes", "scale"]),
        (CollectsNames, 1, ["sizes", "scale", "**others"]),
    ],
)
def test_arguments_that_are_lost_are_told(make, inputs, lost):
    model = make().eval()
    example = (torch.randn(3, 5),) * inputs
    with pytest.warns(UserWarning, match=re.escape(f"no longer takes the arguments {', '.join(lost)}, and computes")):
        result = collapse(model, example, objective="macs")
    assert result.report.lost_arguments == lost
    assert "| scale | no longer |" in str(result.report)
    with pytest.raises(TypeError, match="positional arguments"):
        result.model(*example, 2.0)  # not taken for another
    with pytest.raises(TypeError, match="scale"):
        result.model(*example, scale=2.0)
    assert relative_difference(result.model(*example), model(*example)) <= 1e-5


class CollectsAll(TwoLayers):
    def forward(self, x: Tensor, *others: Tensor, **named: float) -> Tensor:
        return sum(others, self.b(self.a(x))) * named.get("gain", 1.0)


@pytest.mark.parametrize(
    ("examples", "lost"),
    [([torch.randn(3, 5)], ["*others", "**named"]), ([torch.randn(3, 5), torch.randn(3, 4)], ["**named"])],
)
def test_arguments_that_a_forward_collects_and_a_graph_does_not_are_told(examples, lost):
    model = CollectsAll().eval()
    with pytest.warns(UserWarning, match=re.escape(f"no longer takes the arguments {', '.join(lost)}, and computes")):
        result = collapse(model, examples, objective="macs")
    assert result.report.lost_arguments == lost
    assert all(f"| {name} | no longer |" in str(result.report) for name in lost)
    assert relative_difference(result.model(*examples), model(*examples)) <= 1e-5
    with pytest.raises(TypeError, match="gain"):
        result.model(*examples, gain=2.0)


def test_a_model_in_which_nothing_merges_takes_what_it_took():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 4)

        def forward(self, x: Tensor, *, scale: float = 1.0, flag: bool = False) -> Tensor:
            return -self.a(x) if flag else self.a(x) * scale

    model = One().eval()
    result = collapse(model, torch.randn(3, 5), objective="macs")
    assert result.report.fixed_arguments == {}
    x = torch.randn(3, 5)
    assert torch.equal(result.model(x, flag=True), model(x, flag=True))


class AddsToNewZeros(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(3, 4)
        out += self.b(self.a(x))
        return out


class WritesIntoNewZeros(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(3, 6)
        out[:, 1:5] = self.b(self.a(x))
        return out


class WritesAfterItWasRead(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(4)
        y = self.b(self.a(x)) + shift
        shift[0] = 1
        return y * 2 + shift


@pytest.mark.parametrize("make", [AddsToNewZeros, WritesIntoNewZeros, WritesAfterItWasRead])
def test_a_tensor_that_a_forward_makes_and_writes_into_is_new_in_every_call(make):
    model = make().eval()
    result = collapse(model, torch.randn(3, 5), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    inputs = torch.randn(3, 5), torch.randn(3, 5)
    outputs = [result.model(x) for x in inputs]
    for x, output in zip(inputs, outputs, strict=True):
        assert relative_difference(output, model(x)) <= 1e-5
    # torch.export would lose the hooks: it is named as what it is
    model.a.register_forward_hook(lambda *_: None)
    with pytest.raises(CollapseError, match=re.escape("its forward makes a tensor and writes into it")):
        collapse(model, torch.randn(3, 5), objective="macs")
