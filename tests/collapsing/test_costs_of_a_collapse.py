"""What a collapse runs, captures and copies: counted, each with its reason. Nothing is done twice."""

import sys
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import collapse, linearize
from lightning_easier.collapsing import baseline, engine
from lightning_easier.collapsing.exact import steps, torch_export, verification
from lightning_easier.collapsing.exact.capture import capture, duplicate
from lightning_easier.collapsing.exact.nodes import ALIASES

FORWARDS = {  # what runs a whole model -> how often, where work decides
    "_source": 1,  # what it computes
    "check_repeatable": 1,  # whether it computes the same again
    "_note_shapes": 2,  # of the model, and of the dense network, whose batch norms are folded
    "verify_in_float64": 2,  # the model, and the result
    "verify_rounded": 1,  # the result in its own dtype
    "compare": 3,  # the model, the dense network and the result, by a clock that asks each for its work once
    "count_together": 3,  # operations and memory of each
    "_time_once": 2,  # where the time goes, before and after: in one round here
}
BY_TIME = FORWARDS | {
    "verify_in_float64": 4,  # the same of the result without its merges, which is timed, too
    "compare": 4,
}


@pytest.fixture
def forwards(monkeypatch):
    """Count the calls of Tanh on whole maps, of which the networks here have one, by what runs the network."""
    counts: Counter[str] = Counter()
    compute = nn.Tanh.forward

    def forward(self: nn.Tanh, x: Tensor) -> Tensor:
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name not in FORWARDS:
            frame = frame.f_back
        if x.shape == (2, 3, 8, 9):  # a number for each channel may be followed alone
            counts["somebody else" if frame is None else frame.f_code.co_name] += 1
        return compute(self, x)

    monkeypatch.setattr(nn.Tanh, "forward", forward)
    return counts


def network() -> nn.Module:
    """Two convolutions that merge, where an activation is linear."""
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.Tanh()
    return linearize(nn.Sequential(*layers).eval(), ["2"], shift_padding=True)


@pytest.mark.parametrize(("objective", "expected"), [("macs", FORWARDS), ("depth", FORWARDS), ("latency", BY_TIME)])
def test_each_forward_of_a_whole_model_has_its_reason(monkeypatch, forwards, objective, expected):
    faster = steps.Speedup((2.0,) * 9)
    monkeypatch.setattr(steps.LatencyTable, "compare", lambda *_: faster)
    report = collapse(network(), torch.randn(2, 3, 8, 9), objective=objective).report
    assert len(report.merges) == 1
    assert forwards == expected


def test_of_what_is_not_linear_the_graph_is_known(monkeypatch, forwards):
    monkeypatch.setattr(baseline, "deepcopy", None)  # what is timed is a copy already
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1), nn.Tanh()).eval()
    collapse(model, torch.randn(2, 3, 8, 9), objective="macs")
    assert forwards == FORWARDS | {"_note_shapes": 1}


class AsksForShapes(nn.Module):
    """Asks what ``torch.fx`` can't answer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.shape[1] % 3 == 0 else x


@pytest.mark.parametrize(("norm", "dense_is_for_all"), [(nn.LayerNorm(8), False), (nn.BatchNorm1d(8), True)])
def test_a_dense_network_without_batch_norms_is_exported_for_the_sizes_of_the_example(
    monkeypatch, norm, dense_is_for_all
):
    """It is asked for its depth only; with batch norms it is timed as it was recorded, as the result is."""
    attempts, export = [], torch_export._program
    monkeypatch.setattr(
        torch_export, "_program", lambda model, attempt: attempts.append(attempt) or export(model, attempt)
    )
    model = AsksForShapes(nn.Linear(3, 8), norm, nn.ReLU(), nn.Linear(8, 3)).eval()
    model, x = linearize(model, ["layers.2"]), torch.randn(2, 3)
    result = collapse(model, x, objective="macs")
    assert [any(each.free) for each in attempts] == [True, dense_is_for_all]
    assert result.report.dense.depth == 2
    more = torch.randn(5, 3)
    torch.testing.assert_close(result.model(more), model(more))


def test_nothing_is_made_that_nothing_reads(monkeypatch):
    made: Counter[str] = Counter()

    def counted(room, name):
        original = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args: made.update([name]) or original(*args))

    counted(steps, "ChannelFlow")
    counted(steps.Steps, "snapshot")
    counted(verification, "_converted")
    counted(engine, "capture")
    collapse(network(), torch.randn(2, 3, 8, 9), objective="macs")
    assert made == {"ChannelFlow": 1, "_converted": 2, "capture": 1}


class Residual(nn.Module):
    """Adds zeros in the place of a branch, and something of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return x + self.second(x)


def test_channels_are_followed_again_where_a_branch_has_gone(monkeypatch):
    flows, original = [], steps.ChannelFlow
    monkeypatch.setattr(steps, "ChannelFlow", lambda captured: flows.append(captured) or original(captured))
    model, x = Residual().eval(), torch.randn(2, 3, 4, 5)
    result = collapse(model, x, objective="macs")
    assert len(flows) == 2
    torch.testing.assert_close(result.model(x), model(x))


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(-1, 2, 2).transpose(1, 2)


def test_a_copy_of_a_graph_knows_of_its_own_values_which_share_their_memory():
    captured = capture(Viewed().eval(), (torch.randn(3, 4),))
    twin = duplicate(captured)
    noted = [[[each.name for each in node.meta[ALIASES]] for node in each.graph.nodes] for each in (captured, twin)]
    assert noted[0] == noted[1]
    assert any(noted[0])
    assert {each for node in twin.graph.nodes for each in node.meta[ALIASES]} <= set(twin.graph.nodes)
