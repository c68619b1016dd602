"""A step that goes wrong is left out with its reason, and the rest is done."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from lightning_easier import CollapseError, collapse
from lightning_easier.collapsing.algebra import operators
from lightning_easier.collapsing.exact import steps
from lightning_easier.support.inference import relative_difference
from tests.coarse import multiply_coarsely
from tests.models import randomize_batch_norms

compose = operators.compose


def without_the_first_bias(first: nn.Module, second: nn.Module) -> nn.Module:
    merged = copy.deepcopy(second)
    merged.in_features = first.in_features
    merged.weight = nn.Parameter(second.weight @ first.weight)
    return merged


def of_another_width(first: nn.Module, second: nn.Module) -> nn.Module:
    return compose(first, second) if first.weight.is_meta else nn.Linear(2, 2).double()


def that_fails_with_data(first: nn.Module, second: nn.Module) -> nn.Module:
    return compose(first, second) if first.weight.is_meta else compose(first, second).weight[None]


def that_fails_at_once(first: nn.Module, second: nn.Module) -> nn.Module:
    raise IndexError("tuple index out of range")


def wrong_for_nine_channels(wrong):
    """Return a composition that is wrong for the chain in the middle only."""
    return lambda first, second: (wrong if first.weight.shape[0] == 9 else compose)(first, second)


def three_chains() -> nn.Module:
    """Linear layers, two in a row three times, the middle ones with nine channels between them."""
    return nn.Sequential(
        nn.Linear(3, 7), nn.Linear(7, 4), nn.Tanh(),
        nn.Linear(4, 9), nn.Linear(9, 4), nn.Tanh(),
        nn.Linear(4, 7), nn.Linear(7, 2),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (without_the_first_bias, "left out, since it would change what is computed by .*please report it"),
        (of_another_width, r"left out, since it would change what is computed by inf"),
        (that_fails_with_data, "left out, since it failed"),
        (that_fails_at_once, "left out, since it failed .*IndexError: tuple index out of range"),
    ],
)
def test_a_merge_that_goes_wrong_is_left_out_and_the_others_are_made(monkeypatch, wrong, reason, dtype):
    monkeypatch.setattr(operators, "compose", wrong_for_nine_channels(wrong))
    model = three_chains().to(dtype)
    with pytest.warns(UserWarning, match="1 of the steps .* Sequential .* were left out"):
        result = collapse(model, torch.randn(3, 3, dtype=dtype), objective="depth")
    assert [merge.operators for merge in result.report.merges] == [("0", "1"), ("6", "7")]
    (refusal,) = result.report.refusals
    assert refusal.operators == ("3", "4")
    assert re.search(reason, refusal.reason)
    assert not any(module.training for module in result.model.modules())
    x = torch.randn(5, 3, dtype=dtype)
    assert relative_difference(result.model(x), model(x)) <= (1e-12 if dtype == torch.float64 else 1e-5)


class OfItsDtype(nn.Module):
    """Does not run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = three_chains()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.dtype == torch.float32, "float32 is needed")
        return self.layers(x)


def test_without_float64_it_is_found_in_the_dtype_of_the_model(monkeypatch):
    monkeypatch.setattr(operators, "compose", wrong_for_nine_channels(without_the_first_bias))
    model = OfItsDtype()
    with pytest.warns(UserWarning, match="were left out"):
        result = collapse(model, torch.randn(3, 3), objective="depth")
    assert len(result.report.merges) == 2
    assert [refusal.operators for refusal in result.report.refusals] == [("layers.3", "layers.4")]
    x = torch.randn(5, 3)
    assert relative_difference(result.model(x), model(x)) <= 1e-5


class MapsOfItsDtype(OfItsDtype):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Tanh())


def test_what_a_gpu_rounds_by_default_is_no_step_s_fault(monkeypatch):
    multiply_coarsely(monkeypatch)
    model, x = randomize_batch_norms(MapsOfItsDtype()).eval(), torch.randn(2, 3, 8, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = collapse(model, x, objective="macs")
    assert result.report.fused == ["layers.1"]
    assert [merge.operators for merge in result.report.merges] == [("layers.0", "layers.2")]
    assert relative_difference(result.model(x), model(x)) > 1e-4  # in what they are used in
    assert result.report.relative_difference < 1e-5
    assert torch.backends.cudnn.allow_tf32


def test_a_batch_norm_that_is_folded_wrongly_is_left_out(monkeypatch):
    fold = steps.fold_batch_norm

    def fold_wrongly(operator: nn.Module, batch_norm: nn.Module) -> nn.Module:
        folded = fold(operator, batch_norm)
        if operator.out_channels == 5:
            folded.bias = nn.Parameter(folded.bias + 1)
        return folded

    monkeypatch.setattr(steps, "fold_batch_norm", fold_wrongly)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    model = randomize_batch_norms(model).double().eval()
    with pytest.warns(UserWarning, match="were left out"):
        result = collapse(model, torch.randn(2, 3, 8, 9, dtype=torch.float64), objective="macs")
    assert result.report.fused == ["4"]
    assert [merge.operators for merge in result.report.merges] == [("0", "1"), ("3", "5")]  # in another way
    (refusal,) = result.report.refusals
    assert refusal.operators == ("1",)
    assert "left out" in refusal.reason
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)
    assert relative_difference(result.model(x), model(x)) <= 1e-12


def test_a_wrong_merge_does_not_get_out_where_zeros_hide_it(monkeypatch):
    monkeypatch.setattr(operators, "compose", wrong_for_nine_channels(without_the_first_bias))
    model = nn.Sequential(three_chains(), nn.Linear(2, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    nn.init.zeros_(model[0][7].weight)  # nor is the difference met at the end of the last chain
    with pytest.warns(UserWarning, match="were left out"):
        result = collapse(model, torch.randn(2, 3), objective="depth")
    assert ("0.3", "0.4") in [refusal.operators for refusal in result.report.refusals]


def test_a_difference_that_is_no_step_s_fault_is_an_error(monkeypatch):
    def wrong_everywhere(self) -> None:
        for node in self._graph.nodes:
            if node.op == "output":
                node.args = ((node.args[0], node.args[0]),)

    monkeypatch.setattr(steps.Steps, "drop_assertions", wrong_everywhere)
    with pytest.raises(CollapseError, match="differs from Sequential by inf .*please report it"):
        collapse(three_chains(), torch.randn(2, 3), objective="depth")
