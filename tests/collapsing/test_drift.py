"""Which samples tell how much the outputs of a model have changed: no more than needed, and whole batches of others."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import compress
from lightning_easier.collapsing.fit.drift import outputs_of, samples_that_tell
from lightning_easier.pruning.search import Search
from lightning_easier.support.calls import Arguments, call


def rows(*sizes: int) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(size, 6),) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ((512,), (200,)),
        ((250, 250), (200,)),
        ((200, 10), (200,)),
        ((128, 128, 128), (128, 72)),
        ((100, 100, 100), (100, 100)),
        ((64, 64, 64, 64, 64), (64, 64, 64, 64)),  # eight more are too few for a norm, and no batch is left out
        ((30, 40), (30, 40)),
    ],
)
def test_a_batch_is_cut_where_no_more_is_needed(sizes: tuple[int, ...], left: tuple[int, ...]) -> None:
    batches = rows(*sizes)
    found = samples_that_tell(nn.Linear(6, 2).eval(), batches)
    assert tuple(len(batch[0]) for batch in found) == left
    for cut, (whole,) in zip(found, batches, strict=False):
        assert all(any(torch.equal(row, other) for other in whole) for row in cut[0])
        assert len(cut[0].unique(dim=0)) == len(cut[0])
        if len(cut[0]) == len(whole):
            assert torch.equal(cut[0], whole)
        else:
            assert not torch.equal(cut[0], whole[: len(cut[0])])


def test_samples_of_a_batch_that_is_sorted_are_of_all_classes() -> None:
    classes = torch.arange(10).repeat_interleave(100)
    for order in (classes, classes.reshape(10, 100).T.flatten()):
        ((cut,),) = samples_that_tell(nn.Linear(1, 2).eval(), [(order[:, None].float(),)])
        assert len(cut) == 200
        assert cut.flatten().long().bincount(minlength=10).min() >= 10


class Remembering(nn.Module):
    """Keeps each batch until the next one, which has to have as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.last: Tensor | None = None

    def forward(self, value: Tensor) -> Tensor:
        before, self.last = self.last, value
        return self.linear(value if before is None else value + 0 * before)


def test_a_model_that_keeps_something_of_a_call_does_not_see_the_rows_that_are_tried() -> None:
    model = Remembering().eval()
    batch = (torch.randn(250, 6),)
    samples_that_tell(model, [batch])
    assert model.last is None
    model(*batch)
    (found,) = samples_that_tell(model, [batch])
    assert torch.equal(found[0], batch[0])
    model(*found)


class Graph(nn.Module):
    """Takes the rows for the nodes of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, nodes: Tensor, neighbours: Tensor) -> Tensor:
        return self.layers(neighbours @ nodes)


class Centred(nn.Module):
    """Takes the mean of a batch off."""

    def forward(self, value: Tensor) -> Tensor:
        return value - value.mean(0)


class Masked(nn.Module):
    """Takes a mask by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, value: Tensor, *, scale: Tensor) -> Tensor:
        return self.layers(value) * scale


def test_a_batch_whose_rows_are_no_samples_stays_whole() -> None:
    graph = (torch.randn(250, 6), torch.rand(250, 250))
    for model, batch in ((Graph(), graph), (Centred(), (torch.randn(250, 6),))):
        (found,) = samples_that_tell(model.eval(), [batch])
        assert all(map(torch.equal, found, batch))
    shared = (torch.randn(250, 6), torch.randn(6))  # an argument that all samples share
    (found,) = samples_that_tell(nn.Bilinear(6, 6, 2), [shared])
    assert all(map(torch.equal, found, shared))


def test_what_is_passed_by_name_is_passed_so_still() -> None:
    model = Masked().eval()
    batch = Arguments((torch.randn(250, 6), torch.rand(250, 1)), ("scale",))
    (found,) = samples_that_tell(model, [batch])
    with torch.no_grad():
        rows = torch.cat([(batch[0] == row).all(1).nonzero()[0] for row in found[0]])
        assert len(rows.unique()) == 200
        torch.testing.assert_close(call(model, found), call(model, batch)[rows])
        torch.testing.assert_close(outputs_of(model, [found])[0], call(model, batch)[rows])


def test_a_search_runs_on_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 2)).eval()
    sizes: list[int] = []

    def watched(self: Search) -> None:
        handle = self.model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
        match(self)
        handle.remove()

    match = Search._match_norms
    monkeypatch.setattr(Search, "_match_norms", watched)
    compress(model, [torch.randn(256, 6)], objective="macs", max_drift=math.inf, example_inputs=torch.randn(2, 6))
    assert sizes
    assert {*sizes} == {200}
    sizes.clear()
    nodes = [(torch.randn(256, 6), torch.rand(256, 256) / 256)]
    compress(Graph().eval(), nodes, objective="macs", max_drift=math.inf)
    assert {*sizes} == {256}
