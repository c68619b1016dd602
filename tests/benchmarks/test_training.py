"""Of a run of two epochs the second is timed, and is whole."""

import torch
import training
from torch import nn


class Counting(nn.Module):
    """Counts its forwards in training."""

    steps = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 10)

    def forward(self, x):
        Counting.steps += self.training
        return self.linear(x.mean((-2, -1)))


def test_a_whole_epoch_is_timed_after_one_of_one_step(monkeypatch):
    monkeypatch.setattr(Counting, "steps", 0)
    monkeypatch.setattr(training, "now", lambda: float(Counting.steps))
    data = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1])) for _ in range(3)]
    assert training.second_epoch(Counting, lambda files: [], data, torch.device("cpu")) == 3.0
    assert Counting.steps == 1 + 3
