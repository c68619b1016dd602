"""What a collapse takes from torch that a version may take away."""

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx._symbolic_trace import PH
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv
from torch.utils import _pytree as pytree

from lightning_easier.support import versions


class AsksForItsSize(nn.Module):
    """What torch.fx can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            raise ValueError("too many")
        return self.b(self.a(x))


def test_what_torch_export_asked_of_sizes_stays_in_its_environment():
    (x,) = (node.meta["val"] for node in exported().module().graph.nodes if node.op == "placeholder")
    size = x.shape[0].node.expr
    environment = x.fake_mode.shape_env
    assert size.is_Symbol
    assert environment.simplify(size) == size
    assert not environment.is_unbacked_symint(size)
    assert (size <= 100) in [guard.expr for guard in environment.guards]
    assert isinstance(environment.deferred_runtime_asserts, dict)


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


def test_conditions_on_sizes_are_written_with_names_that_are_there():
    assert eval("math.floor(9 / 2)", dict(SYMPY_INTERP)) == 4


def test_an_argument_that_is_a_placeholder_stays_one():
    def scaled(x, scale=2.0):
        return x * scale

    graph = fx.Tracer().trace(scaled, concrete_args=(PH, PH))
    assert [node.op for node in graph.nodes].count("placeholder") == 2
