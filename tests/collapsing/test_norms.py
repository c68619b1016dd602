"""Batch norms of a changed model compute mean and deviation as before, to the last of them; an unchanged one stays."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_easier.collapsing.fit.drift import as_matrices, drift_of, outputs_of
from lightning_easier.collapsing.fit.norms import MatchedNorms, NormsBefore, match_norms

WIDTHS = (3, 8, 6)


def network(norm=nn.BatchNorm2d, **options):
    """Two convolutions with norms in a state that no other has, one after a rectifier."""
    layers = []
    for before, after in pairwise(WIDTHS):
        layers += [nn.Conv2d(before, after, 3), norm(after, **options), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).double()
    model(torch.zeros(2, 3, 9, 7).double())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def batches(*sizes):
    """Uneven batches whose channels differ."""
    return [(torch.randn(size, 3, 9, 7).double() * torch.tensor([1, 2, 0.5]).view(3, 1, 1) + 1,) for size in sizes]


def changed(model):
    """The model with other convolutions: the first varies less, the second is another."""
    model = deepcopy(model)
    with torch.no_grad():
        model[0].weight *= 0.4
        model[3].weight += 0.1 * torch.randn_like(model[3].weight)
    return model


def moments(model, upto, data):
    """Mean and deviation of each channel after a layer, over all batches together."""
    with torch.no_grad():
        values = torch.cat([model[:upto](value) for (value,) in data]).transpose(0, 1).flatten(1)
    return values.mean(1), values.std(1, correction=0)


def test_each_norm_computes_mean_and_deviation_as_before():
    model, data = network(), batches(16)
    other = changed(model)
    NormsBefore(model, data).match(other)
    for upto in (2, 5):
        for now, before in zip(moments(other, upto, data), moments(model, upto, data), strict=True):
            torch.testing.assert_close(now, before, rtol=1e-9, atol=1e-9)


def test_over_several_batches_the_statistics_are_those_of_all_together():
    model, data = network(), batches(16, 9, 3)
    other = changed(model)
    NormsBefore(model, data).match(other)
    for now, before in zip(moments(other, 2, data), moments(model, 2, data), strict=True):
        torch.testing.assert_close(now, before, rtol=0.02, atol=0.02)  # samples have as many positions each
    reads = torch.cat([other[:1](value) for (value,) in data]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(other[1].running_mean, reads.mean(1))
    torch.testing.assert_close(other[1].running_var, reads.var(1, correction=0))


def test_the_changed_model_comes_nearer_and_training_goes_on_from_what_it_computes():
    model, data = network(), batches(64)
    other = changed(model)
    (value,) = data[0]
    with torch.no_grad():
        before = (other(value) - model(value)).norm()
        NormsBefore(model, data).match(other)
        assert (other(value) - model(value)).norm() < before / 2
        at_rest = other(value)
        torch.testing.assert_close(other.train()(value), at_rest, rtol=1e-2, atol=1e-2)


def test_a_model_that_was_not_changed_stays_bit_for_bit_and_so_does_what_comes_before_a_change():
    model, data = network(), batches(16, 16)
    norms = NormsBefore(model, data)
    same = deepcopy(model)
    assert not norms.match(same).before
    other = deepcopy(model)
    with torch.no_grad():
        other[3].weight *= 0.4
    norms.match(other)
    for name, value in model[1].state_dict().items():
        assert torch.equal(other[1].state_dict()[name], value)
    assert not torch.equal(other[4].running_var, model[4].running_var)


def test_it_can_be_undone():
    model, data = network(), batches(16)
    other = changed(model)
    before = deepcopy(other.state_dict())
    NormsBefore(model, data).match(other).undo()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_norm_without_scale_or_statistics_is_left(options):
    model, data = network(**options), batches(16)
    norms = NormsBefore(model, data)
    assert norms.names == ()
    assert not norms.match(changed(model)).before


def test_norms_that_share_a_scale_are_called_twice_or_see_few_values_are_left():
    shared = network()
    shared.append(nn.BatchNorm1d(4).double().eval())
    shared.append(nn.Linear(4, 4).double())
    assert NormsBefore(shared, batches(16)).names == ("1", "4")  # 16 values a channel are too few for the last
    assert NormsBefore(shared, batches(64)).names == ("1", "4", "8")
    twin = nn.BatchNorm2d(8).double().eval()
    twin.weight = shared[1].weight
    shared.insert(2, twin)
    assert NormsBefore(shared, batches(64)).names == ("5", "9")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, value):
            return self.norm(self.norm(value))

    assert NormsBefore(Twice().eval(), batches(16)).names == ()


def test_a_channel_that_is_constant_only_moves():
    model, data = network(), batches(16)
    other = deepcopy(model)
    with torch.no_grad():
        other[0].weight[2] = 0
        other[0].bias[2] = 5
    NormsBefore(model, data).match(other)
    mean, deviation = moments(other, 2, data)
    torch.testing.assert_close(mean[2], moments(model, 2, data)[0][2])
    assert deviation[2] == 0
    assert other[1].weight.isfinite().all()


def test_what_brings_the_outputs_no_nearer_is_undone():
    """What the first convolution lacks the second makes up for: between them the norm computes less, as it should."""
    model, data = network(), batches(16, 16)
    other = deepcopy(model)
    with torch.no_grad():
        other[0].weight *= 0.5
        other[0].bias *= 0.5
        other[1].running_mean *= 0.5
        other[1].bias *= 0.5
        other[3].weight *= 2  # the rectifier between passes a factor on
    before = deepcopy(other.state_dict())
    assert NormsBefore(model, data).match(deepcopy(other)).before
    assert match_norms(other, model, data) is None
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        other[3].weight /= 2
    assert match_norms(other, model, data) is not None


@pytest.mark.parametrize("sizes", [(32,), (16, 16)])
def test_norms_are_kept_matched_while_other_things_come_and_go(sizes):
    model, data = network(), batches(*sizes)
    other = deepcopy(model)
    norms, wanted = MatchedNorms(other, model, data), outputs_of(model, data)
    for name, value in changed(model).state_dict().items():
        if name in ("0.weight", "3.weight"):
            other.state_dict()[name].copy_(value)
    before, raw = deepcopy(other.state_dict()), outputs_of(other, data)
    on_the_way = as_matrices(norms.run(lambda: [other(value) for (value,) in data]))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    outputs = norms.match(wanted, {})
    assert drift_of(outputs, wanted) < drift_of(raw, wanted) / 2
    torch.testing.assert_close(outputs, outputs_of(other, data))
    if len(data) == 1:
        torch.testing.assert_close(on_the_way, outputs)
    once = deepcopy(other.state_dict())
    norms.match(wanted, {})
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, once[name])
    norms.restore()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    norms.match(wanted, {})
    norms.forget()
    norms.restore()
    assert not torch.equal(other[1].weight, before["1.weight"])


def test_norms_that_a_run_does_not_get_to_have_the_values_as_given():
    model, data = network(), batches(16, 8)
    other = deepcopy(model)
    norms, wanted = MatchedNorms(other, model, data), outputs_of(model, data)
    for name, value in changed(model).state_dict().items():
        if name in ("0.weight", "3.weight"):
            other.state_dict()[name].copy_(value)
    given = deepcopy(other.state_dict())
    norms.match(wanted, {})
    matched = deepcopy(other.state_dict())
    ran = []
    other[4].register_forward_hook(lambda *_: ran.append(1))
    norms.match_alike(lambda arguments: other[:3](*arguments), {})
    assert not ran
    for name, value in other.state_dict().items():
        expected = matched if name.startswith("1.") else given
        torch.testing.assert_close(value, expected[name])
    assert not torch.equal(matched["4.weight"], given["4.weight"])


def test_norms_that_were_left_at_the_last_match_are_left():
    model, data = network(), batches(16)
    other = deepcopy(model)
    norms = MatchedNorms(other, model, data)
    with torch.no_grad():
        for tensor in (other[0].weight, other[0].bias, other[1].running_mean, other[1].bias):
            tensor *= 0.5
        other[3].weight *= 2  # what the first convolution lacks it makes up for
    norms.forget()
    norms.match(outputs_of(model, data), {})
    before = deepcopy(other.state_dict())
    norms.match_alike(lambda arguments: other(*arguments), {})
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Moved(nn.Module):
    """Scales and moves each channel; the norm behind it can make up for all of that."""

    def __init__(self, channels: int, by_name: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        along = (-1, *[1] * (x.ndim - 2))
        return self.scale.view(along) * x + self.offset.view(along)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, by_name: bool) -> None:
        super().__init__()
        self.moved, self.norm, self.by_name = Moved(3, by_name), norm, by_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.moved(x)
        return self.norm(input=x) if self.by_name else self.norm(x)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (5, 7), (2, 5, 7)])
def test_what_a_norm_reads_is_scaled_and_moved_back_while_it_runs(dtype, shape, by_name):
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    torch.manual_seed(0)
    norm = kinds[len(shape)](3, eps=0.1)
    for values, low in ((norm.weight, -2.0), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.5)):
        nn.init.uniform_(values, low, 2.0)
    model = Normed(norm, by_name).eval().to(dtype)
    data = [(torch.randn(64, 3, *shape).to(dtype),) for _ in range(2)]
    before, changed = NormsBefore(model, data), deepcopy(model)
    changed.moved.scale += torch.tensor([1.0, -0.5, 0.0])
    changed.moved.offset += torch.tensor([1.0, 0.0, -2.0])
    state = deepcopy(changed.state_dict())
    bounds = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        wanted = [model(*batch) for batch in data]
        with before.matching(changed) as read:
            found = [changed(*batch) for batch in data]
            again = changed(*data[0])  # called more often than before, it computes what it does
        plain = changed(*data[0])
    assert [len(parts) for parts in read.values()] == [2]
    assert all(value.dtype == dtype for value in found)
    torch.testing.assert_close(found, wanted, **bounds)
    torch.testing.assert_close(again, plain)
    assert not torch.allclose(plain, wanted[0], rtol=0.1)
    assert "forward" not in vars(changed.norm)
    assert all(torch.equal(value, state[name]) for name, value in changed.state_dict().items())


def test_a_norm_whose_forward_was_replaced_is_left_alone():
    model, data = network(), batches(16)
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)
    before = NormsBefore(model, data)
    assert "1" not in before.names
    with torch.no_grad(), before.matching(model):
        torch.testing.assert_close(model(*data[0]), outputs_of(model, data)[0])
    assert model[1].forward is not plain


def test_what_brings_the_outputs_no_nearer_is_not_kept_matched():
    model, data = network(), batches(16)
    other = deepcopy(model)
    norms, wanted = MatchedNorms(other, model, data), outputs_of(model, data)
    with torch.no_grad():
        for tensor in (other[0].weight, other[0].bias, other[1].running_mean, other[1].bias):
            tensor *= 0.5
        other[3].weight *= 2  # what the first convolution lacks it makes up for
    before = deepcopy(other.state_dict())
    torch.testing.assert_close(norms.match(wanted, {}), outputs_of(other, data))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(16, 3, 9, 7), (5, 3, 160, 190)], ids=["together", "in parts"])
def test_statistics_of_what_is_far_from_zero_are_as_exact(shape, layout):
    norm, value = nn.Sequential(nn.BatchNorm2d(3)).eval(), 1e4 + torch.randn(shape)
    value = (value + torch.arange(3.0).view(-1, 1, 1)).to(memory_format=layout)  # channels that differ
    before = NormsBefore(norm, [(value,)])
    with before.matching(norm) as read:
        norm(value)
    ((seen,),) = read.values()
    variance, mean = torch.var_mean(value.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(seen.variance, variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(seen.mean, mean, rtol=1e-7, atol=0)
