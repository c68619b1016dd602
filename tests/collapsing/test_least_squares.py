"""Tests of operators fitted by least squares: against what they are fitted to, and against the data themselves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_easier.collapsing.algebra import least_squares
from lightning_easier.collapsing.algebra.affine import ChannelAffine
from lightning_easier.collapsing.algebra.least_squares import RIDGES, Fit, Geometry, Moments, Sums, fits

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EVERYTHING = 10**9


def moments_of(
    geometry: Geometry, batches: list[tuple[Tensor, Tensor]], positions: int = EVERYTHING
) -> tuple[Moments, dict[str, Fit]]:
    """Sum up batches, and fit what can be fitted; of several of a kind the first."""
    channels = batches[0][1].shape[1 if geometry.kernel else -1]
    moments = Moments.of(geometry, channels, torch.device("cpu"))
    for value, target in batches:
        moments.add(value, target, positions)
    found: dict[str, Fit] = {}
    for fit in fits(moments):
        found.setdefault(fit.kind, fit)
    return moments, found


def random_maps(axes: int, channels: int, samples: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, channels, *(9, 7, 5)[:axes], dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(
    axes=st.integers(1, 3),
    channels=st.integers(1, 3),
    outputs=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_a_convolution_is_found_again_with_its_borders(axes, channels, outputs, kernel, stride, padding, seed):
    torch.manual_seed(seed)
    wanted = CONVOLUTIONS[axes - 1](channels, outputs, kernel, stride, padding).double()
    geometry = Geometry(channels, (kernel,) * axes, (stride,) * axes, (padding,) * axes)
    with torch.no_grad():
        x = random_maps(axes, channels)
        _, found = moments_of(geometry, [(x, wanted(x)), (-x, wanted(-x))])
        fit = found["convolution"]
        other = random_maps(axes, channels, samples=2)
        torch.testing.assert_close(fit.operator(other), wanted(other), rtol=1e-7, atol=1e-7)
    assert fit.explained == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", [(64, 5), (16, 3, 5), (8, 2, 3, 5)])
def test_a_linear_is_found_again_for_vectors_and_tokens(shape):
    torch.manual_seed(0)
    wanted = nn.Linear(5, 4).double()
    with torch.no_grad():
        x = torch.randn(shape, dtype=torch.float64)
        _, found = moments_of(Geometry(5), [(x, wanted(x)), (x + 1, wanted(x + 1))])
        torch.testing.assert_close(found["linear"].operator(x), wanted(x), rtol=1e-8, atol=1e-8)


def direct(operator: nn.Module, value: Tensor, target: Tensor) -> float:
    """Return the share of variance explained, from the values themselves."""
    axes = (0, *range(2, target.ndim))
    variance = (target - target.mean(axes, keepdim=True)).square().sum()
    return float(1 - (operator(value) - target).square().sum() / variance)


@torch.no_grad()
def test_what_is_explained_on_held_out_samples_is_what_their_values_tell():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    x = torch.randn(40, 4, 6, 5, dtype=torch.float64)
    moments, found = moments_of(Geometry(4, (3, 3), (1, 1), (1, 1)), [(x, chain(x))])
    assert set(found) == {"convolution", "separable", "pointwise", "low-rank", "affine"}
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:10]
    assert moments.held_out.positions == 10 * 30
    assert moments.fitted.positions == 30 * 30
    for fit in found.values():
        at = x[held_out]
        assert fit.explained == pytest.approx(direct(fit.operator, at, chain(at)), abs=1e-9)
        assert fit.explained < 0.95
    order = ["convolution", "separable", "pointwise", "low-rank"]
    assert sorted(order, key=lambda kind: -found[kind].explained) == order


@torch.no_grad()
def test_the_least_residual_is_that_of_no_neighbour():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).double()
    x = torch.randn(64, 2, 6, 5, dtype=torch.float64)
    moments, _ = moments_of(Geometry(2, (3, 3), (1, 1), (1, 1)), [(x, chain(x))])
    moments.held_out = moments.fitted  # so that there is no ridge
    operator = next(fits(moments)).operator
    fitted = torch.ones(64, dtype=torch.bool)
    fitted[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:16]] = False
    least = direct(operator, x[fitted], chain(x[fitted]))
    for _ in range(10):
        for parameter in operator.parameters():
            change = 1e-3 * torch.randn_like(parameter)
            parameter += change
            assert direct(operator, x[fitted], chain(x[fitted])) < least
            parameter -= change


@torch.no_grad()
def test_a_depthwise_and_a_pointwise_convolution_are_found_again():
    torch.manual_seed(0)
    wanted = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), nn.Conv2d(4, 6, 1)).double()
    x = torch.randn(64, 4, 8, 6, dtype=torch.float64)
    _, found = moments_of(Geometry(4, (3, 3), (2, 2), (1, 1)), [(x, wanted(x))])
    torch.testing.assert_close(found["separable"].operator(x), wanted(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_product_of_two_matrices_is_found_again_by_its_rank():
    torch.manual_seed(0)
    wanted = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16)).double()
    x = torch.randn(256, 16, dtype=torch.float64) + 1
    moments = Moments.of(Geometry(16), 16, torch.device("cpu"))
    moments.add(x, wanted(x), EVERYTHING)
    low = {fit.operator[0].out_features: fit for fit in fits(moments) if fit.kind == "low-rank"}
    assert sorted(low) == [1, 2, 4]
    torch.testing.assert_close(low[2].operator(x), wanted(x), rtol=1e-6, atol=1e-6)
    assert low[1].explained < 0.99


@torch.no_grad()
def test_of_all_matrices_of_a_rank_none_is_nearer():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    x = torch.randn(512, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    moments = Moments.of(Geometry(8), 8, torch.device("cpu"))
    moments.add(x, chain(x), EVERYTHING)
    moments.held_out = moments.fitted
    fit = next(fit for fit in fits(moments) if fit.kind == "low-rank")
    least = moments.fitted.explained(_weight(fit.operator))
    for _ in range(20):
        for parameter in fit.operator.parameters():
            change = 1e-3 * torch.randn_like(parameter)
            parameter += change
            assert moments.fitted.explained(_weight(fit.operator)) < least
            parameter -= change


def _weight(two: nn.Module) -> Tensor:
    first, second = two
    return torch.cat([(second.weight @ first.weight).T, second.bias[None]])


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_an_affine_is_that_of_covariance_and_variance(stride):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.0]).view(3, 1, 1) + 0.5
    target = torch.relu(x)[:, :, ::stride, ::stride]
    _, found = moments_of(Geometry(3, (1, 1), (stride, stride), (0, 0)), [(x, target)])
    operator = found["affine"].operator
    held_out = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:8]
    kept = torch.ones(32, dtype=torch.bool)
    kept[held_out] = False
    z, y = x[kept][:, :, ::stride, ::stride], target[kept]
    for channel in range(3):
        a, b = z[:, channel].reshape(-1), y[:, channel].reshape(-1)
        scale = 0.0 if channel == 2 else float(((a - a.mean()) * (b - b.mean())).mean() / a.var(correction=0))
        expected = scale * z[:, channel] + (b.mean() - scale * a.mean())
        torch.testing.assert_close(operator(x[kept])[:, channel], expected)
    assert isinstance(operator, ChannelAffine) == (stride == 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_a_higher_one(dtype):
    torch.manual_seed(0)
    wanted = nn.Linear(6, 4).double()
    x = (torch.randn(4096, 6) + 10).to(dtype)  # a mean far from zero is what cancels
    target = wanted(x.double())
    _, found = moments_of(Geometry(6), [(x, target.float())] * 8)
    torch.testing.assert_close(found["linear"].operator.weight, wanted.weight, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sums_add_up_over_batches_and_a_share_of_the_positions_is_enough():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).double()
    batches = [(x, chain(x)) for x in torch.randn(6, 32, 3, 8, 8, dtype=torch.float64)]
    geometry = Geometry(3, (3, 3), (1, 1), (1, 1))
    whole, found = moments_of(geometry, batches)
    assert whole.fitted.positions + whole.held_out.positions == 6 * 32 * 64
    part, found_too = moments_of(geometry, batches, positions=700)
    assert part.fitted.positions + part.held_out.positions == 6 * 700
    again, _ = moments_of(geometry, batches, positions=700)
    assert torch.equal(part.fitted.gram, again.fitted.gram)
    assert found_too["convolution"].explained == pytest.approx(found["convolution"].explained, abs=0.03)


@torch.no_grad()
def test_what_can_not_be_told_from_the_data_is_left_at_zero():
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64)
    x[:, 1] = 0.0  # a channel that is never on
    x[:, 3] = x[:, 2]  # two that are one
    _, found = moments_of(Geometry(4), [(x, x[:, :1] + x[:, 2:3])])
    weight = found["linear"].operator.weight
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.0, 0.5, 0.5]], dtype=torch.float64), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_few_samples_call_for_a_ridge():
    torch.manual_seed(0)
    x = torch.randn(40, 24, dtype=torch.float64)
    target = x[:, :1] + torch.randn(40, 1, dtype=torch.float64)
    moments, found = moments_of(Geometry(24), [(x, target)])
    gram, cross = moments.fitted.gram, moments.fitted.cross
    plain = torch.linalg.solve(gram, cross)
    assert moments.held_out.explained(plain) < found["linear"].explained


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_large_samples(samples):
    torch.manual_seed(0)
    wanted = nn.Conv2d(2, 2, 1).double()
    x = torch.randn(samples, 2, 20, 20, dtype=torch.float64)
    moments, found = moments_of(Geometry(2, (1, 1), (1, 1), (0, 0)), [(x, wanted(x))])
    assert 0 < moments.held_out.positions < 400 * samples
    torch.testing.assert_close(found["convolution"].operator.weight, wanted.weight, rtol=1e-8, atol=1e-8)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize("panel", [4, 7, 512])
@pytest.mark.parametrize("rows", [1, 13, 1000])
def test_sums_by_panels_and_parts_are_those_of_all_values(monkeypatch, dtype, accuracy, panel, rows):
    """Means far from zero, parts of unequal sizes, and a panel that is not full."""
    torch.manual_seed(0)
    monkeypatch.setattr(least_squares, "_PANEL", panel)
    monkeypatch.setattr(least_squares, "_VALUES_AT_A_TIME", rows * 11)
    batches = [torch.randn(size, 10) * torch.logspace(-1, 1, 10) + 30 for size in (64, 3, 37)]
    batches = [x.to(dtype) for x in batches]
    targets = [x[:, :5].square().to(dtype) for x in batches]
    moments = Moments.of(Geometry(10), 5, torch.device("cpu"))
    kept = [x.clone() for x in (*batches, *targets)]
    for x, target in zip(batches, targets, strict=True):
        moments.add(x, target, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*batches, *targets), strict=True))
    gram, cross, squares = (
        getattr(moments.fitted, name) + getattr(moments.held_out, name) for name in ("gram", "cross", "squares")
    )
    u, t = with_ones(torch.cat(batches)), torch.cat(targets).double()
    torch.testing.assert_close(gram, u.T @ u, rtol=accuracy, atol=0)
    torch.testing.assert_close(cross, u.T @ t, rtol=accuracy, atol=0)
    torch.testing.assert_close(squares, t.square().sum(0), rtol=accuracy, atol=0)
    torch.testing.assert_close(gram, gram.T, rtol=1e-7, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)])
def test_a_solution_is_that_of_least_squares_on_the_values(monkeypatch, dtype, accuracy):
    torch.manual_seed(0)
    monkeypatch.setattr(least_squares, "RIDGES", (0.0,) * len(RIDGES))
    monkeypatch.setattr(least_squares, "CALM", 0.0)
    monkeypatch.setattr(least_squares, "_PANEL", 5)
    monkeypatch.setattr(least_squares, "_VALUES_AT_A_TIME", 17 * 13)
    x = (torch.randn(400, 12) @ torch.randn(12, 12) + 20).to(dtype)
    target = (x.float().relu() - x.float().square() / 40 + torch.randn(400, 12)).to(dtype)
    _, found = moments_of(Geometry(12), [(x, target)])
    held_out = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:100]
    kept = torch.ones(400, dtype=torch.bool)
    kept[held_out] = False
    wanted = torch.linalg.lstsq(with_ones(x[kept]), target[kept].double()).solution
    operator = found["linear"].operator
    torch.testing.assert_close(operator.weight, wanted[:-1].T, rtol=accuracy, atol=accuracy)


@torch.no_grad()
@pytest.mark.parametrize("geometry", [Geometry(6), Geometry(6, (3, 3), (1, 1), (1, 1))])
def test_what_hardly_varies_gets_no_large_weight_for_nothing_and_what_is_exact_stays(geometry):
    """The square of a channel has a part that a tiny channel explains, by a weight of hundreds."""
    torch.manual_seed(0)
    shape = (60, 6, 8, 7) if geometry.kernel else (3000, 6)
    x = torch.randn(shape, dtype=torch.float64)
    across = [1, 1] if geometry.kernel else []
    x = x * torch.tensor([1, 1, 1, 1, 1, 1e-3]).double().view(-1, *across)
    kernel = torch.randn(4, 6, *geometry.kernel, dtype=torch.float64)
    exact = F.conv2d(x, kernel, padding=1) if geometry.kernel else x @ kernel.T
    _, found = moments_of(geometry, [(x, exact)])
    kind = "convolution" if geometry.kernel else "linear"
    torch.testing.assert_close(found[kind].operator.weight, kernel, rtol=1e-6, atol=1e-6)

    tiny = (x[:, 5:] if geometry.kernel else x[..., 5:]) * 100
    target = exact + exact.square() / 4 + tiny
    _, found = moments_of(geometry, [(x, target)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "CALM", 0.0)
        _, large = moments_of(geometry, [(x, target)])
    for each in (kind, "separable") if geometry.kernel else (kind,):
        assert largest_weight(found[each]) < 10 < 80 < largest_weight(large[each])
        assert found[each].explained > large[each].explained - 0.01 * (1 - large[each].explained) - 1e-9


def largest_weight(fit):
    return max(float(value.abs().max()) for name, value in fit.operator.named_parameters() if name.endswith("weight"))


def random_moments(samples: int, noise: float, same: bool, seed: int) -> Moments:
    """Return moments of a noisy linear map; with two columns that are the same they are singular without a ridge."""
    torch.manual_seed(seed)
    x = torch.randn(samples, 24, dtype=torch.float64)
    if same:
        x[:, 1] = x[:, 0]
    moments = Moments.of(Geometry(24), 3, torch.device("cpu"))
    moments.add(x, x[:, :3] + noise * torch.randn(samples, 3, dtype=torch.float64), EVERYTHING)
    return moments


@torch.no_grad()
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("samples", [36, 60, 2000])
def test_the_ridge_is_the_one_that_leaves_least_of_what_is_held_out(samples, noise, same):
    """Each ridge by least squares with the ridge as further rows, on a square root of the sums."""
    for seed in range(4):
        moments = random_moments(samples, noise, same, seed)
        gram, cross = moments.fitted.gram, moments.fitted.cross
        scale = gram.diagonal().sqrt()
        residuals = []
        for ridge in RIDGES[1:] if same else RIDGES:
            penalty = ridge * scale.square()
            penalty[-1] = 0.0
            weight = torch.linalg.lstsq(gram + penalty.diag(), cross, driver="gelsd").solution
            residuals.append(moments.held_out.residual(weight))
        fit = next(fits(moments))
        weight = torch.cat([fit.operator.weight.T, fit.operator.bias[None]])
        assert moments.held_out.residual(weight) == pytest.approx(min(residuals), rel=1e-6)


@torch.no_grad()
def test_sums_through_a_depthwise_convolution_are_those_of_what_it_computes():
    torch.manual_seed(0)
    patches, target = torch.randn(50, 4 * 9, dtype=torch.float64) + 3, torch.randn(50, 5, dtype=torch.float64)
    kernels = torch.randn(4, 9, dtype=torch.float64)
    u = with_ones(patches)
    through = Sums(u.T @ u, u.T @ target, target.square().sum(0)).through(kernels)
    v = with_ones((patches.view(50, 4, 9) * kernels).sum(2))
    torch.testing.assert_close(through.gram, v.T @ v)
    torch.testing.assert_close(through.cross, v.T @ target)


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 6])
def test_kernels_are_those_of_least_squares_given_the_rest(channels):
    torch.manual_seed(0)
    taps, outputs = 4, 8
    patches = torch.randn(300, channels * taps, dtype=torch.float64) + 1
    patches[:, :taps] *= 0.0  # a channel that is never on
    target = torch.randn(300, outputs, dtype=torch.float64)
    u, pointwise = with_ones(patches), torch.randn(channels + 1, outputs, dtype=torch.float64)
    sums = Sums(u.T @ u, u.T @ target, target.square().sum(0))
    kernels = torch.randn(channels, taps, dtype=torch.float64)
    for _ in range(8):  # each improves on the last
        kernels = least_squares._kernels_given(sums, pointwise, kernels)
    # every position and output is an equation in all taps of the kernels
    equations = torch.einsum("pct,co->poct", patches.view(300, channels, taps), pointwise[:-1])
    right = (target - pointwise[-1]).reshape(-1, 1)
    wanted = torch.linalg.lstsq(equations.reshape(300 * outputs, -1), right, driver="gelsd").solution
    torch.testing.assert_close(kernels[1:].reshape(-1, 1), wanted[taps:], rtol=1e-6, atol=1e-6)
    assert bool(kernels.isfinite().all())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_places_are_sent_to_a_gpu_without_waiting_for_it(monkeypatch, on_gpu):
    class There(torch.Tensor):
        is_cuda = on_gpu

    send, sent = torch.Tensor.to, []

    def to(self, *args, **kwargs):
        if self.dtype == torch.int64 and self.ndim == 1 and args and isinstance(args[0], torch.device):
            sent.append(kwargs.get("non_blocking", False))
        return send(self, *args, **kwargs)

    moments = Moments.of(Geometry(3, (3, 3), (1, 1), (1, 1)), 4, torch.device("cpu"))
    value, target = torch.randn(8, 3, 5, 5).as_subclass(There), torch.randn(8, 4, 5, 5)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moments.add(value, target, 50)
    assert sent == [on_gpu] * 6  # three axes, of what is fitted to and of what is held out
