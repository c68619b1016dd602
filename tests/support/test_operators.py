"""Where the time of a call goes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_easier.support.operators import _Stopwatch, time_inside

pytestmark = pytest.mark.real_clock


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.first(x)
        assert x.shape[0] == 4  # asked for in passing
        return F.gelu(self.block(x) + x)


def test_modules_go_by_their_names_and_functions_by_those_and_where_they_are_called():
    x = torch.randn(4, 8)
    outer = nn.Sequential(Net())
    times = time_inside({"a": Net(), "b": outer}, [x], lambda: math.inf)
    assert list(times["a"]) == ["first", "block.0", "block.1", "add", "gelu"]
    assert list(times["b"]) == ["0.first", "0.block.0", "0.block.1", "0: add", "0: gelu"]
    assert all(seconds > 0 for each in times.values() for seconds in each.values())


def test_the_largest_operator_takes_most():
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.Linear(2048, 1))
    times = time_inside({"it": model}, [torch.randn(64, 64)], lambda: math.inf)["it"]
    assert max(times, key=times.get) == "2"


def test_a_module_that_is_called_twice_has_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    assert list(time_inside({"it": Twice()}, [torch.randn(2, 4)], lambda: 0.0)["it"]) == ["fc"]


def test_no_hook_is_left_and_inputs_are_as_they_were_even_where_a_forward_fails():
    class Fails(Net):
        def forward(self, x):
            x.add_(1)
            raise RuntimeError("on purpose")

    x = torch.zeros(4, 8)
    model = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        time_inside({"it": model}, [x], lambda: math.inf)
    time_inside({"it": (other := Net())}, [x], lambda: math.inf)
    assert torch.equal(x, torch.zeros(4, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, other) for m in net.modules())


def test_the_device_is_waited_for_that_is_timed(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in ("cpu", "cuda:1"):
        with _Stopwatch(torch.device(device)):
            torch.ones(2).exp()
    assert set(waited) == {torch.device("cuda:1")}
