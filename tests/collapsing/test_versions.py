"""What a collapse does where torch.export is too old for it, and what it takes from torch where it is not."""

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx._symbolic_trace import PH
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv
from torch.utils import _pytree as pytree

from lightning_easier import CollapseError, collapse, isolate_activations, linearize
from lightning_easier.collapsing.exact.torch_export import GUARDS
from lightning_easier.support import versions
from tests.versions import needs_sizes


class AsksForItsSize(nn.Module):
    """What torch.fx can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            raise ValueError("too many")
        return self.b(self.a(x))


@pytest.fixture
def old(monkeypatch):
    monkeypatch.setattr(versions, "SAYS_SIZES", False)


def test_what_only_a_later_torch_can_capture_is_refused_by_its_name(old):
    with pytest.raises(CollapseError, match=rf"torch {torch.__version__.partition('+')[0]}.*sizes.*2\.10"):
        collapse(AsksForItsSize(), torch.randn(2, 4), objective="macs")


def test_a_part_that_only_a_later_torch_can_capture_is_named_and_the_rest_merges(old):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), AsksForItsSize())
    result = collapse(model, torch.randn(2, 3), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("0", "1")]
    ((names, reason),) = [(each.operators, each.reason) for each in result.report.refusals if "3" in each.operators]
    assert names == ("3",)
    assert "AsksForItsSize can't be traced" in reason
    assert "2.10" in reason


def test_a_layer_of_torch_that_only_a_later_torch_can_capture_is_named(old):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), layer).eval()
    linearize(model, list(isolate_activations(model)))
    result = collapse(model, torch.randn(2, 5, 8), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("0", "1")]
    ((names, reason),) = [(each.operators, each.reason) for each in result.report.refusals]
    assert names == ("2",)
    assert "TransformerEncoderLayer can't be traced" in reason
    assert "2.10" in reason


class WritesIntoNewZeros(nn.Module):
    """What torch.fx can follow and must not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(2, 2)
        out += self.b(self.a(x))
        return out


def test_what_torch_fx_must_not_record_is_refused_by_both_reasons(old):
    with pytest.raises(CollapseError, match=r"makes a tensor and writes into it.*torch\.cat.*sizes.*2\.10"):
        collapse(WritesIntoNewZeros(), torch.randn(2, 4), objective="macs")


@needs_sizes
def test_the_guards_of_torch_export_go_by_the_name_that_is_looked_for():
    assert any(node.target == GUARDS for node in exported().module().graph.nodes)


def test_a_structure_has_its_children():
    _, specification = pytree.tree_flatten((1, [2, 3]))
    first, second = versions.children_of(specification)
    assert first.is_leaf()
    assert second.type is list
    assert len(versions.children_of(second)) == 2


def test_children_of_an_old_structure_are_an_attribute():
    class Old:
        children_specs = ("a", "b")

    assert versions.children_of(Old()) == ["a", "b"]


def exported() -> ExportedProgram:
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    return torch.export.export(AsksForItsSize(), (torch.randn(2, 4),), dynamic_shapes=shapes, strict=False)


@needs_sizes
def test_an_exported_graph_says_what_it_returns_and_which_layers_were_called():
    graph = exported().module().graph
    assert graph._codegen.pytree_info.out_spec.is_leaf()
    stacks = [node.meta["nn_module_stack"] for node in graph.nodes if node.op == "call_function"]
    assert {list(stack.values())[-1][0] for stack in stacks if stack} >= {"a", "b"}


def test_an_export_asks_for_sizes_where_their_length_is_watched(monkeypatch):
    asked, original = [], ShapeEnv.evaluate_expr

    def evaluate(self, size, *args, **kwargs):
        asked.append(size)
        return original(self, size, *args, **kwargs)

    monkeypatch.setattr(ShapeEnv, "evaluate_expr", evaluate)
    exported()
    assert any(isinstance(size, sympy.Basic) for size in asked)


@needs_sizes
def test_conditions_on_sizes_are_written_with_names_that_are_there():
    assert eval("math.floor(9 / 2)", dict(SYMPY_INTERP)) == 4


def test_an_argument_that_is_a_placeholder_stays_one():
    def scaled(x, scale=2.0):
        return x * scale

    graph = fx.Tracer().trace(scaled, concrete_args=(PH, PH))
    assert [node.op for node in graph.nodes].count("placeholder") == 2
