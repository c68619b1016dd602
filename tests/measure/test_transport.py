"""The sliced Wasserstein distance and its gradients are those of its definition; the metric is the mean of batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lightning_easier import SlicedWasserstein, sliced_wasserstein
from tests.forks import run_together

KINDS = ("max", "mean")
KIND = pytest.mark.parametrize("kind", KINDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, (1.5 * y + 0.5).to(dtype)


def directions_of(x: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw them as the definition says: normal numbers, each direction of length 1."""
    drawn = torch.randn(number, x[0].numel(), generator=generator, dtype=x.dtype)
    return drawn / drawn.square().sum(1, keepdim=True).sqrt()


def by_definition(x: Tensor, y: Tensor, directions: Tensor, p: float, kind: str) -> float:
    """Pair the sorted projections, one direction after the other."""
    slices = []
    for direction in directions.numpy():
        one, other = (sorted(float(np.dot(sample.reshape(-1), direction)) for sample in v.numpy()) for v in (x, y))
        slices.append(sum(abs(a - b) ** p for a, b in zip(one, other, strict=True)) / len(one))
    return (max(slices) if kind == "max" else sum(slices) / len(slices)) ** (1 / p)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 9), *[st.integers(1, 4)] * 2).flatmap(
        lambda sizes: st.sampled_from([sizes[:1], sizes[:2], sizes, (*sizes, 2)])
    ),
    directions=st.integers(1, 12),
    p=st.sampled_from([1, 1.5, 2.0, 3.0]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_is_that_of_the_definition_and_of_pot_with_the_same_projections(shape, directions, p, kind, seed):
    x, y = pair(*shape, seed=seed)
    distance = sliced_wasserstein(x, y, p=p, directions=directions, kind=kind, generator=seeded(seed)).item()
    drawn = directions_of(x, directions, seeded(seed))
    assert math.isclose(distance, by_definition(x, y, drawn, p, kind), rel_tol=1e-10, abs_tol=1e-12)
    import ot  # here, since it takes seconds, which the processes below needn't wait for

    reference = {"max": ot.max_sliced_wasserstein_distance, "mean": ot.sliced_wasserstein_distance}[kind]
    flat = [value.reshape(len(value), -1).numpy() for value in (x, y)]
    assert math.isclose(distance, reference(*flat, p=p, projections=drawn.T.numpy()), rel_tol=1e-7, abs_tol=1e-9)


def test_by_default_it_is_the_largest_of_fifty_slices_of_order_two():
    x, y = pair(6, 3, 2)
    distance = sliced_wasserstein(x, y, generator=seeded(3))
    assert math.isclose(distance.item(), by_definition(x, y, directions_of(x, 50, seeded(3)), 2, "max"), rel_tol=1e-10)
    assert distance.shape == ()
    torch.manual_seed(3)  # the global generator draws where none is given
    assert torch.equal(sliced_wasserstein(x, y), distance)
    assert not torch.equal(sliced_wasserstein(x, y), distance)  # and draws anew


@KIND
def test_the_order_of_samples_does_not_count_nor_which_batch_is_first(kind):
    x, y = pair(7, 2, 3)
    distance = sliced_wasserstein(x, y, kind=kind, generator=seeded())
    shuffled = sliced_wasserstein(
        x[torch.randperm(7, generator=seeded(1))],
        y[torch.randperm(7, generator=seeded(2))],
        kind=kind,
        generator=seeded(),
    )
    assert_close(shuffled, distance)
    assert_close(sliced_wasserstein(y, x, kind=kind, generator=seeded()), distance)
    assert sliced_wasserstein(x, x.flip(0), kind=kind, generator=seeded()) < 1e-12


@KIND
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_a_translation_is_as_far_as_the_directions_see_it(kind, p):
    x, _ = pair(5, 4)
    offset = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    seen = (directions_of(x, 8, seeded(5)) @ offset).abs()
    expected = seen.max() if kind == "max" else seen.pow(p).mean().pow(1 / p)
    assert_close(sliced_wasserstein(x, x + offset, p=p, directions=8, kind=kind, generator=seeded(5)), expected)


@KIND
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_gradients_are_those_of_finite_differences(kind, p):
    x, y = (value.requires_grad_() for value in pair(5, 2, 3))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return sliced_wasserstein(x, y, p=p, directions=4, kind=kind, generator=seeded())

    assert torch.autograd.gradcheck(distance, (x, y))


@KIND
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_identical_has_no_distance_and_no_gradient(kind, p, dtype):
    x, _ = pair(4, 3, dtype=dtype)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    distance = sliced_wasserstein(x, y, p=p, kind=kind)
    distance.backward()
    assert distance == 0
    assert not x.grad.any()
    assert not y.grad.any()


@KIND
def test_a_step_along_the_gradient_makes_it_smaller_to_the_end(kind):
    x, y = pair(16, 3)
    y.requires_grad_()
    distances = []
    for seed in range(300):
        distance = sliced_wasserstein(x, y, kind=kind, generator=seeded(seed))
        (gradient,) = torch.autograd.grad(distance**2, y)
        y = (y - 4 * gradient).detach().requires_grad_()
        distances.append(distance.item())
    assert distances[-1] < 0.05 * distances[0]


@KIND
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_half_precision_and_autocast_are_computed_in_float32(kind, dtypes):
    x, y = (value.to(dtype).requires_grad_() for value, dtype in zip(pair(8, 40), dtypes, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        within = sliced_wasserstein(x, y, kind=kind, generator=seeded())
    outside = sliced_wasserstein(x, y, kind=kind, generator=seeded())
    drawn = directions_of(x.float(), 50, seeded()).double()
    assert within.dtype == torch.float32
    assert torch.equal(within, outside)
    expected = by_definition(x.detach().double(), y.detach().double(), drawn, 2, kind)
    assert math.isclose(within.item(), expected, rel_tol=1e-5)
    within.backward()
    assert (x.grad.dtype, y.grad.dtype) == dtypes
    assert x.grad.any()


def test_large_values_of_half_precision_do_not_overflow():
    x = torch.full((2, 1), 6e4, dtype=torch.float16)
    assert sliced_wasserstein(x, -x).item() == pytest.approx(2 * x[0].item())


@KIND
def test_float64_stays_float64(kind):
    x, y = pair(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert sliced_wasserstein(x, y, kind=kind).dtype == torch.float64
        assert sliced_wasserstein(x.float(), y, kind=kind).dtype == torch.float64
    assert sliced_wasserstein(x.float(), y.float(), kind=kind).dtype == torch.float32


@KIND
def test_values_that_are_not_finite_are_not_hidden(kind):
    for bad in (math.nan, math.inf, -math.inf):
        x, y = pair(4, 3)
        x[1, 2] = bad
        assert not sliced_wasserstein(x, y, kind=kind).isfinite()
        assert not sliced_wasserstein(y, x, kind=kind).isfinite()


@KIND
def test_no_value_is_read_and_a_generator_of_another_device_draws(kind):
    x = torch.empty(4, 3, device="meta", requires_grad=True)  # it has no values: reading one is an error
    generator = seeded()
    distance = sliced_wasserstein(x, x * 2, kind=kind, generator=generator)
    distance.backward()
    assert (distance.device.type, x.grad.shape) == ("meta", x.shape)
    assert not torch.equal(generator.get_state(), seeded().get_state())


def test_a_generator_draws_the_same_and_leaves_the_global_one():
    x, y = pair(5, 6)
    before = torch.get_rng_state()
    generator = seeded(4)
    first, second = (sliced_wasserstein(x, y, directions=3, generator=generator) for _ in range(2))
    assert torch.equal(sliced_wasserstein(x, y, directions=3, generator=seeded(4)), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_direction_that_is_drawn_as_zero_is_harmless(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: torch.zeros(*shape))
    x = torch.randn(3, 1, generator=seeded()).requires_grad_()
    for kind in KINDS:
        distance = sliced_wasserstein(x, x.detach() + 1, kind=kind)
        distance.backward()
        assert distance == 0
    assert not x.grad.any()


def test_for_the_backward_one_direction_is_kept_and_no_batch():
    x, y = (value.requires_grad_() for value in pair(6, 1000))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        distance = sliced_wasserstein(x, y)
    places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sum(places.values()) < 1.5 * 1000 * 8
    with torch.no_grad():  # so that what follows may write over them
        x.zero_(), y.zero_()
    distance.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("x", "y", "kwargs", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), {}, ValueError, r"got \(3, 2\) and \(3, 4\).*changes the shape"),
        (torch.ones(3, 2), torch.ones(2, 2), {}, ValueError, r"same shape, but got \(3, 2\) and \(2, 2\)"),
        (torch.ones(1, 2), torch.ones(1, 2), {}, ValueError, r"two samples.* \(1, 2\): .*`drop_last=True`"),
        (torch.ones(0, 2), torch.ones(0, 2), {}, ValueError, r"two samples, but got shape \(0, 2\)"),
        (torch.ones(3, 0), torch.ones(3, 0), {}, ValueError, r"`x` and `y` to have features, but got shape \(3, 0\)"),
        (torch.tensor(1.0), torch.tensor(1.0), {}, ValueError, r"`x` to have a batch axis, shape \(N, \*\)"),
        (torch.ones(3), torch.tensor(1.0), {}, ValueError, r"`y` to have a batch axis"),
        (torch.ones(3), torch.ones(3, device="meta"), {}, ValueError, "same device, but got cpu and meta"),
        (torch.ones(3, dtype=torch.int64), torch.ones(3), {}, TypeError, r"`x` to be a float.* torch\.int64.*float"),
        (torch.ones(3), torch.ones(3, dtype=torch.bool), {}, TypeError, r"`y` to be a floating .* torch\.bool"),
        ([1.0, 2.0], torch.ones(2), {}, TypeError, r"`x` to be a Tensor, but got \[1\.0, 2\.0\]"),
        (torch.ones(3), torch.ones(3), {"p": 0.5}, ValueError, "`p` to be finite and at least 1.*but got 0.5"),
        (torch.ones(3), torch.ones(3), {"p": math.inf}, ValueError, "`p` to be finite.*but got inf"),
        (torch.ones(3), torch.ones(3), {"p": math.nan}, ValueError, "`p` to be finite.*but got nan"),
        (torch.ones(3), torch.ones(3), {"p": "2"}, TypeError, "`p` to be a number, but got '2'"),
        (torch.ones(3), torch.ones(3), {"p": True}, TypeError, "`p` to be a number, but got True"),
        (torch.ones(3), torch.ones(3), {"directions": 0}, ValueError, "`directions` to be at least 1, but got 0"),
        (torch.ones(3), torch.ones(3), {"directions": 2.0}, TypeError, "`directions` to be an integer, but got 2.0"),
        (torch.ones(3), torch.ones(3), {"kind": "median"}, ValueError, "`kind` to be one of .*but got 'median'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_drawn(x, y, kwargs, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        sliced_wasserstein(x, y, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    if kwargs:
        with pytest.raises(error, match=message):
            SlicedWasserstein(**kwargs)
    elif "two samples" not in message:
        metric = SlicedWasserstein()
        with pytest.raises(error, match=message):
            metric.update(x, y)
        assert (metric.samples.item(), metric.left_out.item()) == (0, 0)


# the metric


def drawn_by(number: int, seed: int = 0) -> torch.Generator:
    """Draws the directions of an update, as the metric does."""
    metric = SlicedWasserstein(seed=seed)
    metric._number = number
    return metric._generator(torch.device("cpu"))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [pair(size, 3, seed=size, dtype=torch.float32) for size in (8, 8, 1, 5, 2)]


def mean_of(updates: list[tuple[int, tuple[Tensor, Tensor]]], **kwargs) -> float:
    """Weigh the distances of numbered batches by their samples."""
    counted = [(number, *batch) for number, batch in updates if len(batch[0]) > 1]
    distances = [sliced_wasserstein(x, y, generator=drawn_by(number), **kwargs).item() for number, x, y in counted]
    sizes = [len(x) for _, x, _ in counted]
    return sum(map(math.prod, zip(distances, sizes, strict=True))) / sum(sizes)


@pytest.mark.parametrize("kwargs", [{}, {"p": 1, "directions": 5, "kind": "mean"}])
def test_a_metric_is_the_mean_of_the_batches_by_samples_and_leaves_out_those_of_one(kwargs):
    metric = SlicedWasserstein(**kwargs)
    for batch in batches():
        metric.update(*batch)
    assert metric.compute().item() == pytest.approx(mean_of(list(enumerate(batches())), **kwargs), rel=1e-6)
    assert (metric.samples.item(), metric.left_out.item()) == (23, 1)


def test_directions_follow_from_the_seed_and_the_number_of_the_update():
    states = [drawn_by(number, seed).get_state() for number in range(3) for seed in range(3)]
    assert len({tuple(state.tolist()) for state in states}) == 9
    x, y = pair(8, 3)
    metric, again, other = (
        SlicedWasserstein(directions=1),
        SlicedWasserstein(directions=1),
        SlicedWasserstein(directions=1, seed=1),
    )
    first, second = metric(x, y), metric(x, y)
    assert not torch.equal(first, second)
    assert torch.equal(again(x, y), first)
    assert not torch.equal(other(x, y), first)
    metric.reset()
    assert torch.equal(metric(x, y), first)
    metric.update(x, y)  # the second, whether it is called or updated
    assert_close(2 * metric.compute(), first + second)
    assert not torch.equal(metric(x, y), second)


@KIND
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_left_out_of_the_metric(kind, bad):
    x, y = pair(6, 2, 3)
    wanted = sliced_wasserstein(x[[0, 2, 3, 5]], y[[0, 2, 3, 5]], kind=kind, generator=drawn_by(0))
    x[1, 0, 2], y[4, 1, 1] = bad, bad
    metric = SlicedWasserstein(kind=kind).set_dtype(torch.float64)
    metric.update(x, y)
    assert_close(metric.compute(), wanted, rtol=1e-6, atol=0.0)
    assert (metric.samples.item(), metric.left_out.item()) == (4, 0)
    metric.update(x[:2], y[:2])  # one is left, which is no distribution
    assert_close(metric.compute(), wanted, rtol=1e-6, atol=0.0)
    assert (metric.samples.item(), metric.left_out.item()) == (4, 1)
    metric.update(x[[1, 4]], y[[1, 4]])  # none is left: that is told
    assert not metric.compute().isfinite()


@pytest.mark.parametrize("on_step", [False, True])
def test_calling_the_metric_returns_the_distance_that_is_added(on_step):
    metric, reference = SlicedWasserstein(dist_sync_on_step=on_step), SlicedWasserstein()
    for number, (x, y) in enumerate(batches()):
        distance = metric(x.requires_grad_(), y)
        assert not distance.requires_grad
        if len(x) > 1:
            assert_close(distance, sliced_wasserstein(x, y, generator=drawn_by(number)).detach())
        else:
            assert distance.isnan()
        reference.update(x, y)
    assert_close(metric.compute(), reference.compute())
    assert (metric.samples.item(), metric.left_out.item()) == (23, 1)


def test_nothing_observed_is_an_error_and_batches_of_one_alone_are_no_number():
    metric = SlicedWasserstein()
    with pytest.raises(RuntimeError, match="has seen no batches"), pytest.warns(UserWarning, match="compute"):
        metric.compute()
    metric.update(torch.ones(1, 2), torch.ones(1, 2))
    assert metric.compute().isnan()


def test_a_metric_is_updated_inside_and_outside_of_inference_mode_and_in_any_dtype():
    metric = SlicedWasserstein().set_dtype(torch.float64)
    metric.half()
    x = torch.ones(2, 1)
    with torch.inference_mode():
        metric.reset()
        metric.update(x, x + 1)
    metric.update(x.bfloat16(), x.bfloat16() + 2)
    metric.update(x.double(), x.double() + 3)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(2)
    assert (metric.total.dtype, metric.samples.dtype) == (torch.float32, torch.int64)


def test_a_bad_seed_is_named():
    with pytest.raises(ValueError, match="`seed` to be at least 0, but got -1"):
        SlicedWasserstein(seed=-1)


SHARDS = ([0, 1, 2], [3], [])  # rank 2 gets no batch


def compute_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    metric = SlicedWasserstein()
    for index in SHARDS[rank]:
        metric.update(*batches()[index])
    torch.save((metric.compute(), metric.samples), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_over_uneven_processes_it_is_the_mean_of_all_batches(tmp_path: Path, forked):
    run_together([forked.Process(target=compute_on_rank, args=(rank, str(tmp_path))) for rank in range(3)])
    expected = mean_of([(number, batches()[index]) for shard in SHARDS for number, index in enumerate(shard)])
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for rank, (distance, own_samples) in enumerate(results):
        assert distance.item() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(distance, results[0][0])
        assert own_samples.item() == (16, 5, 0)[rank]  # what a process counted stays its own
