"""Which axis holds the channels of what blocks read and return, and what is fitted there."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.least_squares import fits
from lightning_easier.collapsing.fit.block_fits import BlockProbe
from lightning_easier.collapsing.fit.fittable_blocks import fittable_blocks
from lightning_easier.collapsing.fit.fitting import gather
from lightning_easier.pruning.compress import compress
from lightning_easier.sites.blocks import find_blocks


class Adds(nn.Module):
    """x + f(x), whose layers read what its axes are moved to."""

    def __init__(self, *layers, to=None, back=None):
        super().__init__()
        self.layers, self.to, self.back = nn.Sequential(*layers), to, back

    def forward(self, x):
        y = x if self.to is None else x.permute(self.to)
        y = self.layers(y)
        return x + (y if self.back is None else y.permute(self.back))


class Conformer(nn.Module):
    """Reads ``(N, L, C)``, and convolves along L."""

    def __init__(self, width=4):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv1d(width, width, 3, padding=1)
        self.act, self.linear = nn.SiLU(), nn.Linear(width, width)

    def forward(self, x):
        y = self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.linear(self.act(y))


class Pools(nn.Module):
    """Reads maps, and has no layer that tells where their channels are."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return x + F.gelu(self.pool(x))


class Rows(nn.Module):
    """Mixes the values in each row of maps by a branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.mix = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 7))

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.mix(x))


def conv(dims):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(4, 4, 3, padding=1), nn.GELU(), kind(4, 4, 1)


LINEAR = nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)
BLOCKS = {  # block, what makes its input from three values on the last axis or on axis 1, axis of the channels
    "linear": (lambda: Adds(*LINEAR), nn.Linear(3, 4), (2, 7, 3), -1),
    "conformer": (Conformer, nn.Linear(3, 4), (2, 7, 3), -1),
    "maps last": (lambda: Adds(*conv(2), to=(0, 3, 1, 2), back=(0, 2, 3, 1)), nn.Linear(3, 4), (2, 5, 7, 3), -1),
    "videos last": (lambda: Adds(*conv(3), to=(0, 4, 1, 2, 3), back=(0, 2, 3, 4, 1)), nn.Linear(3, 4),
                    (2, 5, 7, 4, 3), -1),
    "maps": (lambda: Adds(*conv(2)), nn.Conv2d(3, 4, 1), (2, 3, 5, 7), 1),
    "linear on maps": (lambda: Adds(*LINEAR, to=(0, 2, 3, 1), back=(0, 3, 1, 2)), nn.Conv2d(3, 4, 1), (2, 3, 5, 7), 1),
    "pooled": (Pools, nn.Conv2d(3, 4, 1), (2, 3, 5, 7), 1),
    "sequences": (lambda: Adds(*conv(1)), nn.Conv1d(3, 4, 1), (2, 3, 7), 1),
    "vectors": (lambda: Adds(*LINEAR), nn.Linear(3, 4), (5, 3), -1),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_the_channels_of_a_block_are_where_its_layers_read_them(name):
    torch.manual_seed(0)
    make, stem, shape, axis = BLOCKS[name]
    model = nn.Sequential(stem, make()).double().eval()
    (block,) = [block for block in find_blocks(model) if block.name == "1"]
    x = torch.randn(shape, dtype=torch.float64)
    (place,), _ = fittable_blocks(model, [block], [], [x])
    has_maps = axis == 1
    assert (place.geometry.channels, len(place.geometry.kernel)) == (4, x.ndim - 2 if has_maps else 0)
    others = [torch.randn_like(x.repeat_interleave(2, -1 if has_maps and x.ndim > 2 else -2)) for _ in range(20)]
    probe = probed(model, block, x, *others)  # of another size, too
    (found,) = probe.choices()
    assert not probe.reasons
    assert not probe.notes
    larger = torch.randn_like(others[0].movedim(axis, -1).repeat_interleave(3, 0).movedim(-1, axis))
    with torch.no_grad():
        inner = model[0](larger)
        for fit in found.fits:
            operator = fit.operator.double()
            assert operator(inner).shape == inner.shape
            if isinstance(operator, ChannelAffine):
                assert operator.dim == (axis if has_maps else -1)
        values = [(stemmed := model[0](value), model[1](stemmed)) for value in (x, *others)]
    given, made = (torch.cat([each.movedim(axis, -1).reshape(-1, 4) for each in part])
                   for part in zip(*values, strict=True))  # fmt: skip
    left = (given - made).square().sum() / (made - made.mean(0)).square().sum()
    assert found.left == pytest.approx(float(left), rel=1e-6)


def probed(model, block, *batches):
    probe = BlockProbe(model, [block], [])
    probe.attach()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    probe.detach()
    return probe


MAPS = [torch.randn(4, size, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for size in (5, 6)]


def test_where_the_channels_are_not_known_only_what_needs_no_fit_takes_the_place_of_a_block():
    model = nn.Sequential(Pools(), nn.Flatten(2)).eval()
    (block,) = find_blocks(model)
    probe = probed(model, block, *MAPS)
    (found,) = probe.choices()
    assert [fit.kind for fit in found.fits] == ["identity"]
    assert "no layer tells that they are" in probe.notes["0"]
    given = torch.cat([value.flatten() for value in MAPS])
    made = torch.cat([model[0](value).flatten() for value in MAPS])
    assert found.left == pytest.approx(float((given - made).square().sum() / (made - made.mean()).square().sum()))
    with pytest.warns(match=r"Only an identity or zeros may take the place of \['0'\]: no operator was fitted"):
        places, _ = fittable_blocks(model, [block], [], MAPS[:1])
    ((place, gathered),) = gather(model, places, [(maps,) for maps in MAPS], MAPS[:1])
    assert [fit.kind for fit in place.without_fit(gathered.moments)] == ["identity"]
    assert not list(fits(gathered.moments))


def test_a_block_whose_calls_differ_in_their_channels_stays_and_says_why():
    model = nn.Sequential(Pools(), nn.Flatten(2)).eval()
    block = replace(find_blocks(model)[0], axes={4: 1})
    probe = probed(model, block, *MAPS)
    assert not list(probe.choices())
    assert probe.reasons == {"0": "its calls have other numbers of channels: 5, and then a value of (4, 6, 3, 2)"}


def test_a_branch_may_read_another_axis_than_that_of_the_channels_of_its_sum():
    torch.manual_seed(0)
    model = Rows().double().eval()
    (block,) = find_blocks(model)
    x = torch.randn(6, 3, 5, 7, dtype=torch.float64)
    ((_, left, _),) = probed(model, block, x).measured()
    with torch.no_grad():
        inner = model.stem(x)
        added = model.mix(inner)
        total = inner + added
    expected = added.square().sum() / (total - total.mean((0, 2, 3), keepdim=True)).square().sum()
    assert left == pytest.approx(float(expected), rel=1e-9)


def test_compress_takes_batches_of_several_lengths_and_what_it_returns_takes_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Conformer(), nn.Linear(4, 2)).double().eval()
    batches = [torch.randn(4, length, 3, dtype=torch.float64) for length in (6, 6, 7, 5)]
    result = compress(model, batches, objective="macs", max_drift=0.5)
    assert result.report.trials
    assert result.model(torch.randn(2, 9, 3, dtype=torch.float64)).shape == (2, 9, 2)
