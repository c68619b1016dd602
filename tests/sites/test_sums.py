"""Where the sum is seen that a branch is added to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_easier.sites.blocks import find_blocks
from lightning_easier.sites.sums import sums_of

ADDITIONS = {
    "alpha": lambda x, y: torch.add(x, y, alpha=0.1),
    "alpha of a method": lambda x, y: x.add(y, alpha=0.1),
    "alpha in place": lambda x, y: x.add_(y, alpha=0.1),
    "alpha by name": lambda x, y: torch.add(alpha=0.1, other=y, input=x),
    "alpha of the other side": lambda x, y: torch.add(y, x, alpha=0.1),
    "alpha of the other side by name": lambda x, y: torch.add(alpha=0.1, other=x, input=y),
    "alpha of one": lambda x, y: torch.add(x, y, alpha=1),
    "difference": lambda x, y: torch.add(x, y, alpha=-1),
}


class Adds(nn.Module):
    """Adds a branch to its input, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.norm, self.after = way, nn.LayerNorm(4), nn.Linear(4, 4)
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.after(x)
        if self.way == "read":
            return self.norm(x + self.drop(self.branch(x)))
        if self.way == "read twice by one":
            x = x + self.branch(x)
            return self.norm(self.norm(x))
        if self.way == "scaled":
            return self.norm(x + self.scale * self.branch(x))
        if self.way == "functions":
            return F.softmax(x + self.branch(x), -1) * 2
        if self.way in ADDITIONS:
            return self.norm(ADDITIONS[self.way](x, self.branch(x)))
        x += self.branch(self.norm(x))
        return x


class Holds(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.adds = Adds(way)

    def forward(self, x):
        return self.adds(x) * 2


def sum_after(model, name="adds.branch"):
    (branch,) = [block for block in find_blocks(model) if block.name == name]
    assert branch.leaves == "zeros"
    return sums_of(model, [branch])[name]


@pytest.mark.parametrize("way", ["read", "returned"])
def test_who_is_told_to_see_it_sees_it(way):
    torch.manual_seed(0)
    model = Holds(way).double().eval()
    watched, seen = sum_after(model), []
    if watched.side == "input":
        watched.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        watched.module.register_forward_hook(lambda m, args, output: seen.append(output))
    assert watched.side == ("input" if way == "read" else "output")
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        y = model.adds.after(x)
        expected = y + model.adds.branch(y if way == "read" else model.adds.norm(y))
    (found,) = seen
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        *((way, "it is scaled, its axes are exchanged, or something else is done to it, before it is added")
          for way in ("scaled", "alpha", "alpha of a method", "alpha in place", "alpha by name")),
        ("functions", "no module alone reads the sum"),
        ("read twice by one", "no module alone reads the sum"),
    ],
)  # fmt: skip
def test_why_it_is_not_known(way, reason):
    assert reason in sum_after(Holds(way))


@pytest.mark.parametrize(
    "way", ["alpha of the other side", "alpha of the other side by name", "alpha of one", "difference"]
)
def test_a_branch_that_is_added_as_it_is_has_its_sum_seen(way):
    model = Holds(way)
    assert sum_after(model).module is model.adds.norm


def test_without_branches_nothing_is_looked_at():
    assert sums_of(nn.Linear(2, 2), []) == {}
