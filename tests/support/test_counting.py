"""What is only counted: multiply-accumulates and memory, also of forwards that can't be looked at."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_easier import collapse
from lightning_easier.collapsing.engine import cost_of, counted
from lightning_easier.pruning.work import work_of_a_sample
from lightning_easier.support import costs
from lightning_easier.support.costs import count_macs, count_together, count_work, measure_activation_memory
from lightning_easier.support.inference import relative_difference
from lightning_easier.support.timing import Latency


class Attends(nn.Module):
    """Reads the output of its attention in an order that only the fused path gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.b(self.a(y.view(-1, 8)))


ATTENTION = 3 * 5 * (4 * 8 * 8) + 2 * 3 * 5 * 5 * 8


def test_attention_whose_fused_path_is_needed_is_collapsed_and_counted():
    model = Attends().eval()
    result = collapse(model, torch.randn(3, 5, 8), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("a", "b")]
    assert result.report.before.macs == ATTENTION + 15 * (8 * 16 + 16 * 4)
    assert result.report.after.macs == ATTENTION + 15 * 8 * 4
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        assert relative_difference(result.model(x), model(x)) <= 1e-5


class Padded(nn.Module):
    """Calls a transformer whose padding makes it a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=torch.arange(5).expand(3, 5) > 3)


@pytest.mark.parametrize("mask", [None, torch.rand(3, 2, 5, 7) > 0.2])
@pytest.mark.parametrize("enabled", [True, False], ids=["fused", "written out"])
def test_products_of_attention_are_counted_whichever_way_they_run(mask, enabled):
    class Products(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value, mask)

    arguments = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    with sdpa_kernel(list(SDPBackend.__members__.values()) if enabled else SDPBackend.MATH):
        assert count_macs(Products(), arguments) == 3 * 2 * 5 * 7 * (8 + 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), ATTENTION + 2 * 15 * 8 * 12),
        (Padded(), 2 * (ATTENTION + 2 * 15 * 8 * 12)),
    ],
)
def test_fused_layers_are_counted_as_they_are_written_out(model, macs):
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model.eval(), (torch.randn(3, 5, 8),)) == macs
    assert torch.backends.mha.get_fastpath_enabled() == enabled


class NotLookedAt(nn.Module):
    """Fails while something looks at its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if _get_current_dispatch_mode_stack():
            raise RuntimeError("it is looked at")
        return x + self.offset


def test_what_can_not_be_counted_is_collapsed_all_the_same():
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 4), NotLookedAt())
    model[2].register_forward_hook(lambda *_: None)  # so that it is a leaf
    result = collapse(model, torch.randn(2, 3), objective="macs")
    assert [merge.operators for merge in result.report.merges] == [("0", "1")]
    assert result.report.before.macs is result.report.after.macs is None
    assert result.report.after.activation_memory is None
    assert "| not counted | - |" in str(result.report)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted(kind, gates):
    model = nn.Sequential(kind(8, 16, batch_first=True))
    assert count_macs(model, (torch.randn(4, 5, 8),)) == 4 * 5 * gates * 16 * (8 + 16)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)),
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), Attends(), nn.LSTM(8, 16, batch_first=True),
    ],
    ids=["Linear", "convolution", "transformer", "attention", "recurrent"],
)  # fmt: skip
def test_what_is_counted_in_one_call_is_what_is_counted_in_two(model):
    model.eval()
    arguments = (torch.randn(3, 5, 8),)
    cost = cost_of(model, arguments, 1, Latency.of([1.0] * 6))
    assert cost.macs == counted(count_macs, model, arguments) is not None
    assert cost.activation_memory == counted(measure_activation_memory, model, arguments) is not None


def test_what_can_be_counted_in_one_call_is_called_once():
    called: list[int] = []
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    model.register_forward_hook(lambda *_: called.append(1))
    assert count_together(model, (torch.randn(3, 8),)) == (3 * (8 * 16 + 16 * 4), 4 * 3 * (16 + 4))
    assert len(called) == 1


def test_a_recurrent_network_is_counted_whatever_is_set_of_float32_and_that_stays():
    model, x = nn.GRU(4, 5), torch.randn(3, 2, 4)
    libraries = torch.backends.mkldnn, torch.backends.cudnn
    is_enabled = [each.enabled for each in libraries]
    kind = getattr(torch.backends.cudnn, "conv", None)
    before = getattr(kind, "fp32_precision", None)
    try:
        if kind is not None:
            kind.fp32_precision = (
                "ieee"  # since torch 2.9 it may be, and what torch tells of all kinds is an error then
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert count_macs(model, (x,)) == 3 * 2 * 3 * 5 * (4 + 5)
        assert getattr(kind, "fp32_precision", None) == ("ieee" if kind is not None else None)
    finally:
        if kind is not None:
            kind.fp32_precision = before
    assert [each.enabled for each in libraries] == is_enabled


def test_work_is_multiply_accumulates_and_all_values_that_operators_return():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(60, 7))
    assert count_work(layers, (torch.randn(5, 2, 4, 5),)) == 5 * (20 * 2 * 3 * 9 + 60 * 7 + 64 * (60 + 60 + 7))
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)  # a few products for each value
    assert count_work(depthwise, (torch.randn(1, 6, 4, 4),)) == 96 * (9 + 64)


def test_work_is_told_for_each_sample():
    model, of_each = nn.Linear(6, 7), 6 * 7 + 64 * 7
    assert [work_of_a_sample(model, (torch.randn(rows, 6),)) for rows in (1, 5)] == [of_each, of_each]


def test_work_that_can_not_be_counted_is_not_known():
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if _get_current_dispatch_mode_stack():
                raise RuntimeError("looked at")
            return x

    assert work_of_a_sample(Refusing(), (torch.randn(2, 3),)) is None


def test_the_work_of_a_recurrent_layer_is_counted(monkeypatch):
    """Fused, it has no formula of multiply-accumulates; step by step it has."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    x = torch.randn(2, 5, 4)
    assert count_work(Recurrent(), (x,)) >= 2 * 5 * (4 * 6 * (4 + 6) + 64 * 6)
    monkeypatch.setattr(costs, "_MACS_FOR_A_VALUE", 0)
    assert count_work(Recurrent(), (x,)) == count_macs(Recurrent(), (x,)) == 2 * 5 * 4 * 6 * (4 + 6)
