"""The rules of what is linear, each by itself: which calls it reads, why not others, and what it makes of one."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lightning_easier import collapse
from lightning_easier.collapsing.errors import CannotMergeError
from lightning_easier.collapsing.exact.reading import RULES, Reader, rule_of
from lightning_easier.collapsing.exact.rules.rule import Call
from lightning_easier.measure.affines import AffineFit
from lightning_easier.structure.stand_in import AffineStandIn
from lightning_easier.support.inference import relative_difference
from tests.collapsing.test_linear_steps import conv, numbers
from tests.models import randomize_batch_norms
from tests.versions import needs_symbolic_strides


class Net(nn.Module):
    """A forward given as a function."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


class Layers(fx.Tracer):
    """Takes every child for a layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def last_call(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Call, Tensor]:
    """Return the last call of a forward, and an input."""
    model = randomize_batch_norms(model).to(dtype if dtype.is_floating_point else None)
    x = torch.randn(shape).to(dtype)
    captured = fx.GraphModule(model, Layers().trace(model))
    ShapeProp(captured).propagate(x)
    *_, node, _ = captured.graph.nodes
    return Call(captured, node), x


def on_maps(forward, **children) -> tuple[nn.Module, tuple[int, ...]]:
    return Net(forward, **children).eval(), (2, 3, 6, 5)


def on_rows(forward, **children) -> tuple[nn.Module, tuple[int, ...]]:
    return Net(forward, **children).eval(), (4, 3)


def norm(s, x: Tensor, **given) -> Tensor:
    return F.batch_norm(x, s.n.running_mean, s.n.running_var, **given)


def affine(channels: int, dim: int) -> AffineStandIn:
    return AffineStandIn(nn.ReLU(), AffineFit(torch.randn(channels), torch.randn(channels), dim, 1.0))


# rule -> calls that it reads
READ = {
    "OperatorModule": [on_rows(lambda s, x: s.a(x), a=nn.Linear(3, 4))],
    "AffineOfAnActivation": [  # it may write, and so not into the model's input
        on_maps(lambda s, x: s.a(x * 1), a=affine(3, 1)),
        on_rows(lambda s, x: s.a(x * 1), a=affine(3, -1)),
    ],
    "ConvolutionModule": [
        on_maps(lambda s, x: s.a(x), a=conv(3, 4, (3, 2), padding=1)),
        on_maps(lambda s, x: s.a(x), a=nn.ConvTranspose2d(3, 4, 3, stride=2)),
    ],
    "Convolution": [on_maps(lambda s, x: F.conv2d(x, s.w, s.b, 2), w=numbers(4, 3, 2, 3), b=numbers(4))],
    "TransposedConvolution": [on_maps(lambda s, x: F.conv_transpose2d(x, s.w, stride=2), w=numbers(3, 4, 2, 3))],
    "MatrixProduct": [
        on_rows(lambda s, x: x @ s.w, w=numbers(3, 4)),
        on_rows(lambda s, x: F.linear(x, s.w, s.b), w=numbers(4, 3), b=numbers(4)),
        on_rows(lambda s, x: F.linear(input=x, weight=s.w), w=numbers(4, 3)),
        on_rows(lambda s, x: torch.matmul(x, other=s.w), w=numbers(3, 4)),
        on_rows(lambda s, x: torch.mm(mat2=s.w, input=x), w=numbers(3, 4)),
    ],
    "MatrixProductAndSum": [
        on_rows(lambda s, x: torch.addmm(s.b, x, s.w, alpha=2, beta=3), w=numbers(3, 4), b=numbers(4)),
        on_rows(lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w), w=numbers(3, 4), b=numbers(4)),
    ],
    "BatchNormModule": [on_maps(lambda s, x: s.n(x), n=nn.BatchNorm2d(3))],
    "BatchNorm": [
        on_maps(norm, n=nn.BatchNorm2d(3)),
        on_rows(
            lambda s, x: torch.batch_norm(x, s.w, None, s.n.running_mean, s.n.running_var, False, 0.1, 0.2, False),
            n=nn.BatchNorm1d(3), w=numbers(3),
        ),
    ],
    "Arithmetic": [
        on_maps(lambda s, x: s.g - x, g=numbers(3, 1, 1)),
        on_maps(lambda s, x: x.true_divide(s.g), g=numbers(1, 3, 1, 1)),
        on_maps(lambda s, x: x * s.p, p=numbers(3, 6, 5)),
        on_rows(lambda s, x: 2 - x),
        on_rows(lambda s, x: -x),
    ],
    "AveragePool": [
        on_maps(lambda s, x: s.p(x), p=nn.AvgPool2d(2, 1, 1)),
        on_maps(lambda s, x: F.avg_pool2d(x, (2, 3), divisor_override=5)),
    ],
    "Slice": [on_maps(lambda s, x: x[:, :, ::2, ::3])],
    "ZeroPadding": [
        on_maps(lambda s, x: s.p(x), p=nn.ZeroPad2d((1, 1, 2, 2))),
        on_maps(lambda s, x: F.pad(x, (0, 0, 1, 1, 2, 1))),
    ],
}  # fmt: skip
# rules of what has no operator of its own -> calls, and where the channels are after each
MOVED = {
    "Copy": [(on_maps(lambda s, x: x.clone()), {1: 1, -1: -1})],
    "Conversion": [(on_maps(lambda s, x: x.type_as(x)), {1: 1, -1: -1})],
    "AdaptivePool": [
        (on_maps(lambda s, x: s.p(x), p=nn.AdaptiveAvgPool2d((2, 1))), {1: 1}),
        (on_maps(lambda s, x: F.adaptive_avg_pool2d(x, 1)), {1: 1}),
    ],
    "Mean": [
        (on_maps(lambda s, x: x.mean((2, 3))), {1: -1}),
        (on_maps(lambda s, x: x.mean(-2, keepdim=True)), {1: 1, -1: -1}),
        (on_maps(lambda s, x: x.mean(1)), {-1: -1}),
    ],
    "Permutation": [
        (on_maps(lambda s, x: x.permute(0, 2, 3, 1)), {1: -1}),
        (on_maps(lambda s, x: x.transpose(1, -1)), {1: -1, -1: 1}),
    ],
    "Reshape": [
        (on_maps(lambda s, x: s.f(x), f=nn.Flatten()), {}),
        (on_maps(lambda s, x: x.view(x.size(0), 3, -1)), {1: 1}),
        (on_maps(lambda s, x: x.view(x.size(0), -1, 5)), {-1: -1}),
    ],
}
# rule -> calls that it does not read, and why
REFUSED = {
    "AffineOfAnActivation": [(Net(lambda s, x: s.a(x * 1), a=affine(6, 2)), (2, 3, 6, 5), "an axis without channels")],
    "ConvolutionModule": [(Net(lambda s, x: s.a(x), a=conv(3, 4)), (3, 6, 5), "one sample, without its axis")],
    "Convolution": [
        (Net(lambda s, x: F.conv1d(x, s.w * 2), w=numbers(4, 3, 1)), (2, 3, 6), "its weight or bias is computed"),
        (Net(lambda s, x: F.conv1d(x, s.w, stride=x.size(0)), w=numbers(4, 3, 1)), (2, 3, 6), "depends on the size"),
    ],
    "TransposedConvolution": [
        (Net(lambda s, x: F.conv_transpose1d(x, s.w), w=numbers(3, 4, 1)), (3, 6), "one sample, without its axis"),
    ],
    "MatrixProduct": [
        (Net(lambda s, x: x @ s.w, w=numbers(2, 3, 4)), (2, 5, 3), "its weight is not a matrix"),
        (Net(lambda s, x: x @ x), (3, 3), "its weight or bias is computed"),
    ],
    "MatrixProductAndSum": [
        (Net(lambda s, x: torch.addmm(s.b, x, s.w), w=numbers(3, 4), b=numbers(5, 4)), (5, 3),
         "not a number for each output"),
    ],
    "BatchNormModule": [(Net(lambda s, x: s.n(x), n=nn.BatchNorm1d(3)).train(), (4, 3), "its own statistics")],
    "BatchNorm": [
        (Net(lambda s, x: norm(s, x, training=True), n=nn.BatchNorm1d(3)), (4, 3), "its own statistics"),
        (Net(lambda s, x: norm(s, x, weight=s.n.weight + 1), n=nn.BatchNorm1d(3)), (4, 3), "is computed"),
    ],
    "Arithmetic": [
        (Net(lambda s, x: torch.add(x, s.g, alpha=2), g=numbers(3)), (4, 3), "it scales, rounds or writes besides"),
        (Net(lambda s, x: torch.div(x, 2, rounding_mode="floor")), (4, 3), "it scales, rounds or writes besides"),
        (Net(lambda s, x: x + x), (4, 3), "not of one value and one constant"),
        (Net(lambda s, x: x + s.g, g=numbers(4, 3)), (3,), "it broadcasts the value"),
        (Net(lambda s, x: 1 / x), (4, 3), "it divides by the value"),
        (Net(lambda s, x: x + s.g, g=nn.Parameter(torch.tensor([0, -math.inf, 0]))), (4, 3), "is not finite"),
        (Net(lambda s, x: x + s.g, g=numbers(4, 5)), (2, 3, 4, 5), "neither a number for each channel nor"),
    ],
    "Copy": [(Net(lambda s, x: x.clone()), (3,), "no axis of channels")],
    "Conversion": [(Net(lambda s, x: x.to(torch.float64)), (4, 3), "its dtype is written out")],
    "AveragePool": [(Net(lambda s, x: F.avg_pool2d(x, 2)), (3, 6, 5), "one sample, without its axis")],
    "AdaptivePool": [(Net(lambda s, x: s.p(x), p=nn.AdaptiveAvgPool2d(1)), (3, 6, 5), "one sample, without its axis")],
    "Mean": [
        (Net(lambda s, x: x.mean((0, 2))), (2, 3, 6), "over the samples"),
        (Net(lambda s, x: x.mean(keepdim=True, dim=None)), (2, 3, 6), "over everything"),
        (Net(lambda s, x: x.mean(1, dtype=torch.float32)), (2, 3, 6), "it converts the value"),
    ],
    "Permutation": [(Net(lambda s, x: x.transpose(0, 1)), (2, 3, 6), "it moves the axis of the samples")],
    "Reshape": [
        (Net(lambda s, x: x.view(-1, 9)), (2, 3, 6), "it mixes channels with positions"),
        (Net(lambda s, x: x.flatten()), (2, 3, 6), "no axis of channels"),
        (Net(lambda s, x: x.reshape(shape=(2, 18))), (2, 3, 6), "given by name"),
    ],
    "Slice": [
        (Net(lambda s, x: x[:, :, 1:]), (2, 3, 6), "it picks a part of an axis"),
        (Net(lambda s, x: x[:, ::2]), (2, 3, 6), "it picks samples or channels"),
        (Net(lambda s, x: x[:, :2]), (2, 3), "not a batch of maps"),
    ],
    "ZeroPadding": [
        (Net(lambda s, x: s.p(x), p=nn.ConstantPad1d(1, 2.0)), (2, 3, 6), "other values than zeros"),
        (Net(lambda s, x: F.pad(x, (1, 1), mode="reflect")), (2, 3, 6), "other values than zeros"),
        (Net(lambda s, x: F.pad(x, (1, 2))), (2, 3, 6), "pads the sides of the map unevenly"),
        (Net(lambda s, x: F.pad(x, (0, 0, -1, 1))), (2, 3, 6), "crops the channels"),
        (Net(lambda s, x: F.pad(x, (1, 1))), (2, 3), "not a batch of maps"),
    ],
}  # fmt: skip


def cases(table: dict, **marks: pytest.MarkDecorator) -> list:
    """List the cases of a table; those that have a mark by their rule and number."""
    named = {f"{rule}_{n}": (rule, case) for rule in table for n, case in enumerate(table[rule])}
    return [pytest.param(*named[name], id=name, marks=marks.get(name, ())) for name in named]


@pytest.mark.parametrize(("rule", "case"), cases(READ))
def test_an_operator_computes_what_the_call_does(rule, case):
    model, shape = case
    call, x = last_call(model, shape)
    assert type(rule_of(call)).__name__ == rule
    link = Reader(call.captured).link(call.node)
    assert link.node is call.node
    assert link.value in call.node.all_input_nodes
    assert link.value.op != "get_attr"
    assert relative_difference(link.operator(x), model(x)) <= 1e-12


@pytest.mark.parametrize(("rule", "case"), cases(MOVED))
def test_what_moves_or_averages_says_where_the_channels_are(rule, case):
    (model, shape), moves = case
    call, _ = last_call(model, shape)
    assert type(rule_of(call)).__name__ == rule
    link = Reader(call.captured).link(call.node)
    assert (link.operator, link.moves) == (None, moves)
    assert (link.averaging is not None) is (rule in ("AdaptivePool", "Mean"))
    assert link.unchanged is (rule in ("Copy", "Conversion"))


@pytest.mark.parametrize(("rule", "case"), cases(REFUSED, Convolution_1=needs_symbolic_strides))
def test_a_check_gives_the_reason(rule, case):
    model, shape, reason = case
    call, _ = last_call(model, shape)
    assert type(rule_of(call)).__name__ == rule
    with pytest.raises(CannotMergeError, match=reason):
        rule_of(call).read(call)
    assert Reader(call.captured).read(call.node) is None


@pytest.mark.parametrize(
    ("model", "shape", "dtype", "reason"),
    [
        (Net(lambda s, x: x * 2), (4, 3), torch.int64, "not floating point"),
        (Net(lambda s, x: s.p(x, output_size=[1, 1]), p=nn.ConvTranspose2d(3, 4, 1)), (2, 3, 1, 1), torch.float64,
         "more than one value"),
        (Net(lambda s, x: x.mul_(2)), (4, 3), torch.float64, "something else sees"),
        (Net(lambda s, x: x.mean() * 2), (4, 3), torch.float64, "no tensor that has axes"),
    ],
)  # fmt: skip
def test_what_no_rule_can_read_is_refused(model, shape, dtype, reason):
    call, _ = last_call(model, shape, dtype)
    with pytest.raises(CannotMergeError, match=reason):
        Reader(call.captured).link(call.node)


def test_arguments_that_do_not_fit_are_no_error():
    call, _ = last_call(Net(lambda s, x: x.transpose(1, 2)), (2, 3, 4))
    call.node.args = (*call.node.args, 1, 2)
    with pytest.raises(CannotMergeError, match="its arguments are spelled in another way"):
        Reader(call.captured).link(call.node)
    assert Reader(call.captured).read(call.node) is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Net(lambda s, x: torch.sin(x)), "sin"),
        (Net(lambda s, x: x.softmax(1)), "softmax"),
        (Net(lambda s, x: torch.ops.aten.cos.default(x)), "cos"),
        (Net(lambda s, x: s.a(x), a=nn.GELU()), "GELU"),
        # a subclass may compute anything
        (Net(lambda s, x: s.a(x), a=type("Quantized", (nn.Linear,), {"__module__": "torch.nn."})(3, 4)), "Quantized"),
    ],
)
def test_an_unknown_call_is_refused_with_its_name(model, name):
    call, _ = last_call(model, (4, 3))
    with pytest.raises(CannotMergeError, match=f"no rule reads `{name}`"):
        Reader(call.captured).link(call.node)


def test_no_two_rules_claim_the_same_call():
    claims = Counter(claim for rule in RULES for claim in (*rule.modules, *rule.functions))
    assert {claim: count for claim, count in claims.items() if count > 1} == {}


def test_every_rule_is_tried_here():
    assert {type(rule).__name__ for rule in RULES} == {*READ, *MOVED}
    assert {type(rule).__name__ for rule in RULES if "check" in vars(type(rule))} <= {*REFUSED}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.b(F.linear(input=x, weight=s.w.T)),
        lambda s, x: s.b(torch.matmul(x, other=s.w)),
        lambda s, x: s.b(torch.addmm(input=s.c, mat1=x, mat2=s.w)),
    ],
)
def test_a_product_whose_arguments_are_named_merges(forward):
    model = Net(forward, w=numbers(3, 4), c=numbers(4), b=nn.Linear(4, 2)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    result = collapse(model, x, objective="depth")
    assert [merge.into for merge in result.report.merges] == ["Linear 3→2"]
    assert relative_difference(result.model(x), model(x)) <= 1e-9


def pools_to_a_third(s, x: Tensor) -> Tensor:
    assert x.shape[1] == 3  # torch.export captures it
    return s.b(F.adaptive_avg_pool2d(s.a(x), x.size(2) // 3))


def pools_to_a_third_of_its_own(s, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.b(F.adaptive_avg_pool2d(y, y.size(2) // 3))


@pytest.mark.parametrize(
    ("forward", "names", "reason"),
    [
        (pools_to_a_third, ("a", "adaptive_avg_pool2d", "b"),
         "`adaptive_avg_pool2d` takes `floordiv`, which is computed after `a`"),
        (pools_to_a_third_of_its_own, ("a", "adaptive_avg_pool2d"),
         "its value has 2 readers: `size`, `adaptive_avg_pool2d`"),
        (lambda s, x: s.b(s.a(x).view(x.size(0), 4, x.size(2) * x.size(3), 1)), ("a", "b"),
         "`view` takes `mul`, which is computed after `a`"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["depth", "macs"])
def test_a_size_that_is_computed_inside_a_chain_is_given_as_the_reason(forward, names, reason, objective):
    model = Net(forward, a=conv(3, 4), b=conv(4, 2)).double().eval()
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    result = collapse(model, x, objective=objective)
    assert result.report.merges == []
    assert [(refusal.operators, refusal.reason) for refusal in result.report.refusals] == [(names, reason)]
    other = torch.randn(3, 3, 12, 7, dtype=torch.float64)
    assert relative_difference(result.model(other), model(other)) <= 1e-9


def test_a_size_that_is_computed_before_a_chain_does_not_stop_it():
    def forward(s, x: Tensor) -> Tensor:
        size = x.size(2) // 3
        return s.b(F.adaptive_avg_pool2d(s.a(x), size))

    model = Net(forward, a=conv(3, 4), b=conv(4, 2)).double().eval()
    result = collapse(model, torch.randn(2, 3, 9, 6, dtype=torch.float64), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    x = torch.randn(3, 3, 12, 7, dtype=torch.float64)
    assert relative_difference(result.model(x), model(x)) <= 1e-9
