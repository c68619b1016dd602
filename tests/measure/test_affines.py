"""Tests of affine stand-ins: fitted to activations, marked in checkpoints, folded by a collapse."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_easier import collapse, linearize, load_pruned, measure_affines, measure_entropy, restore
from lightning_easier.measure.affines import AffineFit, AffineStatistics, affine_of
from lightning_easier.structure.linearize import stand_ins
from tests.collapsing.test_collapse_fit import randomized
from tests.integration.interrupted import Small, run


def directly(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and offset for each column, by torch's own least squares."""
    pairs = []
    for a, b in zip(z.double().T, y.double().T, strict=True):
        pairs.append(torch.linalg.lstsq(torch.stack([a, torch.ones_like(a)], 1), b[:, None]).solution[:, 0])
    scale, offset = torch.stack(pairs, 1)
    return scale, offset


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    batches=st.integers(1, 5),
    layout=st.sampled_from([(1, (7, 3)), (1, (5, 3, 4, 2)), (-1, (5, 4, 3)), (-1, (2, 3, 2, 3))]),
)
def test_scale_and_offset_are_those_of_least_squares(seed, mean, dtype, batches, layout):
    torch.manual_seed(seed)
    dim, shape = layout
    statistics, seen = AffineStatistics(dim), []
    for _ in range(batches):
        z = (torch.randn(shape) + mean).to(dtype)
        y = torch.nn.functional.leaky_relu(z.double() - mean, 0.2)
        statistics.update(z, y)
        seen.append((z.movedim(dim, -1).reshape(-1, 3), y.movedim(dim, -1).reshape(-1, 3)))
    z, y = (torch.cat(part) for part in zip(*seen, strict=True))
    fit = affine_of(statistics.sums, statistics.neuron_dim)
    varies = z.double().std(0) > 1e-3
    scale, offset = directly(z, y)
    torch.testing.assert_close(fit.scale[varies], scale[varies], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        (fit.scale * z.double() + fit.offset)[:, varies], (scale * z.double() + offset)[:, varies], rtol=2e-3, atol=2e-3
    )
    assert -1e-6 <= fit.explained <= 1 + 1e-6


def test_a_channel_that_does_not_vary_becomes_its_mean():
    statistics = AffineStatistics()
    z = torch.full((6, 2), 5.0)
    z[:, 1] = torch.arange(6.0)
    statistics.update(z, z.relu())
    fit = affine_of(statistics.sums, statistics.neuron_dim)
    torch.testing.assert_close(fit.scale, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(fit.offset, torch.tensor([5.0, 0.0], dtype=torch.float64))


def test_one_channel_is_a_vector_still():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    fits = measure_affines(model, [torch.randn(2, 1, 5, 5)])
    assert fits["1"].scale.shape == fits["1"].offset.shape == (1,)
    linearize(model, ["1"], stand_in="affine", statistics=fits)
    assert model(torch.randn(2, 1, 5, 5)).shape == (2, 1, 3, 3)


def test_nothing_seen_is_no_affine():
    with pytest.raises(RuntimeError, match="has seen no pre-activation"):
        affine_of(AffineStatistics().sums, 1)
    statistics = AffineStatistics()
    statistics.update(torch.full((3, 2), torch.nan), torch.full((3, 2), torch.nan))
    assert statistics.left_out == 3
    with pytest.raises(RuntimeError, match="no sample whose values are all finite"):
        affine_of(statistics.sums, statistics.neuron_dim)


@pytest.mark.parametrize(("shape", "dim"), [((12, 3), 1), ((12, 5, 3), -1), ((12, 3, 4, 5), 1), ((3, 12, 5), 0)])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_are_left_out_of_an_affine(shape, dim, strange):
    torch.manual_seed(0)
    z = torch.randn(shape, dtype=torch.float64) + 100
    y = z.sin()
    samples = 1 if dim == 0 else 0
    z.movedim(samples, 0)[4][1] = strange  # of one the pre-activation, of one what is made of it, all of one
    y.movedim(samples, 0)[7][0] = -strange
    y.movedim(samples, 0)[9] = z.movedim(samples, 0)[9] = strange
    kept = torch.tensor([place for place in range(12) if place not in (4, 7, 9)])
    found, expected = AffineStatistics(dim), AffineStatistics(dim)
    found.update(z, y)
    expected.update(z.index_select(samples, kept), y.index_select(samples, kept))
    assert found.left_out == 3
    assert torch.equal(found.sums[0], expected.sums[0])
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, 1e5])
def test_an_affine_that_is_not_finite_is_not_put_into_a_model(strange):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).half()
    fit = AffineFit(torch.tensor([1.0, strange, 1.0]), torch.zeros(3), 1, 1.0)
    with pytest.raises(ValueError, match="`statistics` to hold finite numbers .*float16, but those of '1' are not"):
        linearize(model, ["1"], stand_in="affine", statistics={"1": fit})
    assert isinstance(model[1], nn.ReLU)


def test_affines_of_values_whose_squares_overflow_are_left_out_and_told():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with pytest.warns(UserWarning, match=r"No affine can take the place of \['1'\]: sums over their values overflow"):
        assert measure_affines(model, [1e30 * torch.randn(8, 2)]) == {}


class Net(nn.Module):
    """Rectifiers of three kinds, in place, on maps and on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.act2 = nn.Conv2d(4, 3, 1), nn.PReLU(3)
        self.head, self.act3, self.out = nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.bn(self.conv1(x)))))
        return self.out(self.act3(self.head(x.mean((2, 3)))))


NAMES = ["act1", "act2", "act3"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomized(Net())


BATCHES = [torch.randn(8, 2, 7, 6) for _ in range(3)]


def test_the_affines_of_a_model_are_those_of_what_its_activations_see(net):
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NAMES}
    plain = copy.deepcopy(net)
    for name in NAMES:
        module = plain.get_submodule(name)
        module.inplace = False
        module.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args[0], out)))
    with torch.no_grad():
        for batch in BATCHES:
            plain(batch)
    before = copy.deepcopy(net.state_dict())
    fits = measure_affines(net, BATCHES)
    assert list(fits) == NAMES
    for name, pairs in seen.items():
        columns = [torch.cat([pair[k].transpose(0, 1).flatten(1) for pair in pairs], 1).T for k in (0, 1)]
        scale, offset = directly(*columns)
        torch.testing.assert_close(fits[name].scale, scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fits[name].offset, offset, rtol=1e-4, atol=1e-5)
        assert 0 < fits[name].explained < 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert measure_entropy(net, BATCHES) == measure_entropy(plain, BATCHES)


def changed(net: nn.Module, fits: dict[str, AffineFit] | None) -> float:
    """Return by how much the output changes if all activations become linear."""
    linear = copy.deepcopy(net)
    linearize(linear, NAMES, stand_in="identity" if fits is None else "affine", statistics=fits)
    with torch.no_grad():
        return float((linear.eval()(BATCHES[0]) - net(BATCHES[0])).norm())


def test_an_affine_comes_nearer_than_the_identity_and_the_activation_comes_back(net):
    fits = measure_affines(net, BATCHES)
    assert changed(net, fits) < 0.7 * changed(net, None)
    with torch.no_grad():
        expected = net(BATCHES[0])
        linearize(net, ["act1", "act3"], stand_in="affine", statistics=fits)
        assert not torch.allclose(net(BATCHES[0]), expected)
        restore(net)
        torch.testing.assert_close(net(BATCHES[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_trained_only_where_that_is_asked_for(net, trainable):
    fits = measure_affines(net, BATCHES)
    parameters = {name for name, _ in net.named_parameters()}
    linearize(net, ["act1"], stand_in="affine", statistics=fits, trainable=trainable)
    new = {name for name, _ in net.named_parameters()} - parameters
    assert new == ({"act1.weight", "act1.bias"} if trainable else set())
    assert {"act1.weight", "act1.bias"} <= set(net.state_dict())


@pytest.mark.parametrize("trainable", [False, True])
def test_a_checkpoint_brings_it_back_or_fails_loudly(net, tmp_path, trainable):
    fits = measure_affines(net, BATCHES)
    linearize(net, ["act1"], stand_in="affine", statistics=fits, trainable=trainable, shift_padding=True)
    linearize(net, ["act2"])
    path = tmp_path / "pruned.pt"
    torch.save(net.state_dict(), path)
    with pytest.raises(RuntimeError, match="act1"):
        Net().load_state_dict(torch.load(path))
    other = load_pruned(Net(), path).eval()
    assert {name: s.mark for name, s in stand_ins(other).items()} == {n: s.mark for n, s in stand_ins(net).items()}
    with torch.no_grad():
        torch.testing.assert_close(other(BATCHES[0]), net(BATCHES[0]), rtol=0, atol=0)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in net.named_parameters()]
    identities = linearize(Net(), ["act1", "act2"])
    with pytest.raises(ValueError, match="to carry the mark"):
        identities.load_state_dict(torch.load(path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_has_the_dtype_of_the_model_and_keeps_that_of_a_value(net, dtype):
    fits = measure_affines(net, BATCHES)
    net.to(dtype)
    linearize(net, NAMES, stand_in="affine", statistics=fits)
    assert net.act1.weight.dtype == dtype
    assert net(BATCHES[0].to(dtype)).dtype == dtype
    assert net.act1(BATCHES[0].to(torch.bfloat16)[:, :1].expand(-1, 4, -1, -1)).dtype == torch.bfloat16


@pytest.mark.parametrize("objective", ["macs", "depth"])
def test_a_collapse_folds_it_exactly(net, objective):
    net.double()
    batches = [batch.double() for batch in BATCHES]
    fits = measure_affines(net, batches)
    linearize(net, NAMES, stand_in="affine", statistics=fits)
    result = collapse(net, batches[0], objective=objective)
    other = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(result.model(other), net(other), rtol=1e-9, atol=1e-9)
    assert result.report.before.depth == 4
    assert result.report.after.depth == 2
    assert stand_ins(result.model) == {}


def test_the_callback_measures_it_in_the_same_pass_and_puts_it_in_place(tmp_path):
    measured: dict[str, AffineFit] = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            loader = trainer.val_dataloaders
            measured.update({f"{trainer.current_epoch} {n}": f for n, f in measure_affines(pl_module, loader).items()})

    model, callback, _ = run(tmp_path, before=(Note(),), pruning={"stand_in": "affine"}, epochs=3)
    assert len(callback.removed) == 2
    for epoch, name in enumerate(callback.removed):
        stand_in, fit = stand_ins(model)[name], measured[f"{epoch} {name}"]
        assert stand_in.mark.stand_in == "affine"
        torch.testing.assert_close(stand_in.weight.double(), fit.scale, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stand_in.bias.double(), fit.offset, rtol=1e-5, atol=1e-6)
    other = load_pruned(Small(), callback.last_good)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stand_in": "affine"}, "`statistics` to hold the affine of 'act1'.*but got None"),
        ({"stand_in": "affine", "statistics": {"act1": (1.0, 0.0)}}, r"affine of 'act1'.*but got \(1.0, 0.0\)"),
        ({"statistics": {}}, "`statistics` to be None: the identity"),
        ({"stand_in": "zero"}, r"`stand_in` to be one of \('identity', 'affine', 'fitted'\), but got 'zero'"),
    ],
)
def test_bad_arguments_are_named_and_the_model_is_as_it_was(net, options, message):
    names = [name for name, _ in net.named_modules()]
    with pytest.raises(ValueError, match=message):
        linearize(net, ["act1"], **options)
    assert [name for name, _ in net.named_modules()] == names
    assert stand_ins(net) == {}
