"""A collapse computes the same with fewer operators, leaves its argument alone, and says why others did not merge."""

import copy
import dataclasses
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_easier import CollapseError, collapse, isolate_activations, linearize
from lightning_easier.support.inference import relative_difference
from tests.models import Residual, randomize_batch_norms


def assert_same_function(collapsed: nn.Module, source: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Compare at other shapes than the example's, in float64."""
    dtype = next(source.parameters()).dtype
    source = copy.deepcopy(source).eval()
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            assert relative_difference(collapsed(x), source(x)) <= {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]


def names_of_linear_operators(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]


def test_an_mlp_without_its_activation_becomes_one_linear():
    model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Identity(), nn.Linear(24, 6)).double()
    linearize(model, ["1"])
    x = torch.randn(3, 6, dtype=torch.float64)
    result = collapse(model, x, objective="macs")
    assert names_of_linear_operators(result.model) == ["0"]
    assert_same_function(result.model, model, (5, 6), (2, 3, 6))
    (merge,) = result.report.merges
    assert merge.operators == ("0", "4")
    assert merge.into == "Linear 6→6"
    assert (merge.price_before, merge.price_after) == (3 * 2 * 6 * 24, 3 * 6 * 6)
    before, after = result.report.before, result.report.after
    assert (before.depth, after.depth) == (2, 1)
    assert (before.parameters, after.parameters) == (6 * 24 * 2 + 24 + 6, 42)
    assert (before.macs, after.macs) == (864, 108)
    assert result.report.dropped == ["2", "3"]
    assert before.latency.median > 0
    assert after.latency.median > 0


@pytest.mark.parametrize("activation_linear", [True, False])
def test_a_residual_block_with_batch_norm(activation_linear):
    model = randomize_batch_norms(Residual().double())
    isolate_activations(model)
    if activation_linear:
        linearize(model, ["relu"])
    result = collapse(model, torch.randn(2, 4, 5, 7, dtype=torch.float64), objective="depth")
    assert_same_function(result.model, model, (1, 4, 9, 6))
    assert result.report.fused == ["bn1"]
    assert names_of_linear_operators(result.model) == (["conv1"] if activation_linear else ["conv1", "conv2"])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())


def test_a_chain_of_merges_keeps_the_names_of_its_operators():
    model = nn.Sequential(*(nn.Conv1d(2, 2, 3) for _ in range(4))).double()
    result = collapse(model, torch.randn(1, 2, 20, dtype=torch.float64), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("0", "1", "2", "3")]
    assert result.model.get_submodule("0").kernel_size == (9,)
    assert_same_function(result.model, model, (3, 2, 9), (1, 2, 31))


def test_the_argument_is_untouched_and_the_result_is_independent():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Dropout())
    linearize(model, ["2"])
    modules = [(name, module, module.training) for name, module in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 2, 6, 6)
    result = collapse(model, x, objective="depth")
    expected = result.model(x)
    assert [(name, module, module.training) for name, module in model.named_modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(result.model(x), expected)
    assert not any(module.training for module in result.model.modules())


def test_the_result_is_an_ordinary_module():
    model = linearize(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), ["1"])
    x = torch.randn(4, 3)
    collapsed = collapse(model, x, objective="depth").model
    twin = copy.deepcopy(collapsed)
    twin.load_state_dict(collapsed.state_dict())
    assert torch.equal(twin(x), collapsed(x))
    assert torch.equal(torch.compile(collapsed, backend="eager")(x), collapsed(x))
    assert collapsed.double()(x.double()).dtype == torch.float64
    twin(x).sum().backward()  # fine-tuning
    assert all(parameter.grad is not None for parameter in twin.parameters())


def refusals_of(model: nn.Module, x: Tensor, objective: str = "depth") -> dict[tuple[str, ...], str]:
    result = collapse(model.double(), x.double(), objective=objective)
    assert_same_function(result.model, model, tuple(x.shape))
    assert result.report.merges == []
    return {refusal.operators: refusal.reason for refusal in result.report.refusals}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x))


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x):
        y = self.act(self.fc1(x))
        return self.fc2(y) * y


class LinearThenBatchNorm(nn.Module):
    """On (N, L, C) a BatchNorm1d normalises the axis L, not the Linear's."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.fc(x))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[3].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("make", "shape", "operators", "reason"),
    [
        (Shared, (2, 3), ("fc", "fc"), "is called 2 times"),
        (lambda: linearize(TwoReaders(), ["act"]), (2, 3), ("act",), r"2 readers: `fc2` \(Linear\), `mul`"),
        (TwoReaders, (2, 3), (), ""),
        (tied, (2, 3), ("0", "1"), "shares its parameters"),
        (hooked, (2, 3), ("0", "1"), "has hooks"),
        (lambda: randomize_batch_norms(LinearThenBatchNorm()), (2, 3, 3), ("fc", "bn"), "channel axis"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), (2, 1, 4, 4), ("1",),
         "no running statistics"),
        (lambda: nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 2, 3)), (2, 1, 4, 4), ("0",),
         "the model's input"),
        (lambda: randomize_batch_norms(nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3, padding=1))), (2, 1, 4, 4),
         ("0", "1"), "would have put its bias"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1)), (2, 1, 6, 6), ("0", "1"), "borders"),
        (lambda: linearize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), ["1"]), (2, 1, 6, 6), ("1",),
         "nothing to merge: what comes after it is `2` \\(MaxPool2d\\)"),
        (lambda: linearize(nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(1, 2, 3)), ["1"]), (2, 1, 6, 6), ("1",),
         "what comes before it is `0` \\(MaxPool2d\\)"),
    ],
)  # fmt: skip
def test_what_is_not_merged_is_reported_with_its_reason(make, shape, operators, reason):
    refusals = refusals_of(make(), torch.randn(shape))
    assert list(refusals) == ([operators] if operators else [])
    assert re.search(reason, refusals.get(operators, ""))


def test_a_batch_norm_in_training_mode_breaks_a_chain_and_stays_in_it():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
    )
    model = randomize_batch_norms(model).eval().double()
    model[1].train()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 1, 5, 6).double()
    result = collapse(model, x, objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("2", "4")]
    assert {r.operators: r.reason for r in result.report.refusals}["1",].startswith(
        "this batch norm is in training mode"
    )
    names = {name: module.training for name, module in result.model.named_modules() if name}
    assert names == {"0": False, "1": True, "2": False}
    for key, value in result.model.get_submodule("1").state_dict().items():
        assert torch.equal(value, state[f"1.{key}"])
    assert model[1].training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    x = torch.randn(3, 1, 7, 5).double()
    assert relative_difference(result.model(x), model(x)) <= 1e-9
    assert relative_difference(result.model.eval()(x), model.eval()(x)) <= 1e-9
    # in a model that was not put into eval mode they all are taken as in eval mode
    assert len(collapse(model.train(), x, objective="depth").report.fused) == 2


def test_parametrized_weights_are_left_alone():
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert refusals_of(model, torch.randn(2, 3)) == {}


def test_a_merge_that_does_not_pay_is_not_made():
    model = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 64))
    x = torch.randn(4, 64)
    refusals = refusals_of(model, x, "macs")
    assert refusals == {("0", "1"): "does not pay: as Linear 64→64 it would cost 16,384 MACs instead of 1,024 MACs"}
    assert len(collapse(model, x.double(), objective="depth").report.merges) == 1


def test_latency_decides_where_the_difference_is_plain():
    wide = linearize(nn.Sequential(nn.Linear(32, 4096), nn.ReLU(), nn.Linear(4096, 32)), ["1"])
    (merge,) = collapse(wide, torch.randn(256, 32)).report.merges
    assert merge.objective == "latency"
    assert merge.price_after < merge.price_before


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float | None = None) -> dict[str, Tensor]:
        y = self.fc2(self.fc1(a))
        return {"sum": y + b, "product": y * b if scale is None else y * scale}


def test_several_inputs_and_outputs_and_their_names():
    model = ManyOutputs()
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    result = collapse(model, (a, b), objective="depth")
    assert len(result.report.merges) == 1
    assert relative_difference(result.model(a=a, b=b), model(a, b)) < 1e-5


class UntraceablePart(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.fc(x)) if x.sum() > 1e9 else self.head(self.fc(x)) + 1


def test_a_part_that_does_not_trace_stays_whole():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), UntraceablePart())
    result = collapse(model, torch.randn(2, 3), objective="depth")
    assert len(result.report.merges) == 1
    assert [(r.operators, r.reason) for r in result.report.refusals] == [
        (("2",), "stays whole: UntraceablePart can't be traced, and torch.export can't take the model")
    ]
    assert result.report.before.depth == 4
    assert_same_function(result.model, model, (5, 3))
    with pytest.raises(CollapseError, match="UntraceablePart can't be captured.*control flow.*torch.export"):
        collapse(UntraceablePart(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Linear(3, 3), torch.randn(2, 4)), {}, ValueError, r"`example_inputs`.*a tensor of shape \(2, 4\)"),
        ((nn.Linear(3, 3), "x"), {}, TypeError, "`example_inputs` to be a tensor, a non-empty tuple"),
        ((nn.Linear(3, 3), torch.randn(0, 3)), {}, ValueError, r"`example_inputs` to hold at least one .*\(0, 3\)"),
        ((nn.Bilinear(3, 3, 2), (torch.randn(2, 3), torch.randn(0, 3))), {}, ValueError, "at least one sample"),
        ((nn.Linear(3, 3), torch.randn(2, 3).to("meta")), {}, ValueError, "`example_inputs` to hold data.*meta device"),
        ((nn.Linear(3, 3).to("meta"), torch.randn(2, 3)), {}, ValueError, "`model` to have weights.*`weight` on the"),
        (("x", torch.randn(2, 3)), {}, TypeError, "`model` to be a torch.nn.Module, but got str"),
        ((nn.Linear(3, 3), torch.randn(2, 3)), {"objective": "size"}, ValueError, "`objective` to be one of"),
        (
            (nn.Linear(3, 3), torch.randn(2, 3)),
            {"sites": ["a"]},
            ValueError,
            "`sites`, `calibration` and `inputs_of` to be None",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        collapse(*arguments, **options)


def test_named_children_of_an_ordered_sequential_keep_their_names():
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 4, 3), act=nn.ReLU(), head=nn.Conv2d(4, 2, 1)))
    result = collapse(linearize(model, ["act"]), torch.randn(1, 1, 5, 5), objective="depth")
    assert list(result.model.state_dict()) == ["stem.weight", "stem.bias"]


@dataclasses.dataclass
class Answer:
    value: Tensor


class ReturnsDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return Answer(self.fc(x))


def test_outputs_that_can_not_be_compared_are_refused():
    with pytest.raises(ValueError, match="to return tensors.*ReturnsDataclass returns a value of type Answer"):
        collapse(ReturnsDataclass(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="`example_inputs` to give finite outputs"):
        collapse(nn.Linear(3, 3), torch.full((2, 3), torch.nan))


class ReadsWeightElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x)) @ self.fc1.weight.t()


class InPlaceOnAnIntermediate(nn.Module):
    """The first Linear's output has two names, and changes in place before the second reads it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)

    def forward(self, x):
        y = self.drop(self.fc1(input=x))
        z = y
        y += 1
        return self.fc2(input=z)


@pytest.mark.parametrize("make", [ReadsWeightElsewhere, InPlaceOnAnIntermediate])
def test_what_reads_an_operator_besides_is_seen(make):
    model = make().eval()
    result = collapse(model, torch.randn(2, 3), objective="depth")
    assert result.report.merges == []
    assert_same_function(result.model, model, (4, 3))


def test_a_batch_norm_without_weights_is_folded():
    for first, shape in ((nn.Linear(3, 4), (5, 3)), (nn.Conv2d(2, 4, 1), (2, 2, 3, 3))):
        norm = nn.BatchNorm1d if isinstance(first, nn.Linear) else nn.BatchNorm2d
        model = nn.Sequential(first, norm(4, affine=False)).double()
        model[1].running_mean.normal_()
        result = collapse(model, torch.randn(shape, dtype=torch.float64))
        assert result.report.fused == ["1"]
        assert_same_function(result.model, model, shape)
