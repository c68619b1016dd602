"""The entropy of activations is that of its definition, over all batches and processes, in any shape and dtype."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_easier import ActivationEntropy, activation_entropy
from lightning_easier.measure import entropy
from lightning_easier.measure.entropy import StateCounts
from tests.forks import run_together


def entropy_by_definition(neurons: list[list[float]]) -> list[float]:
    """The paper's formula, written as it stands, one neuron after the other."""
    result = []
    for values in neurons:
        on, off = sum(v > 0 for v in values), sum(v < 0 for v in values)
        shares = [n / (on + off) for n in (on, off) if n]
        result.append(-sum(p * math.log2(p) for p in shares))
    return result


def neurons_of(pre_activation: Tensor, axis: int) -> list[list[float]]:
    return pre_activation.movedim(axis, 0).flatten(1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_matches_the_definition_for_any_shape_axis_and_dtype(shape, last, seed, dtype):
    axis = -1 if last else 1
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = torch.where(z.abs() < 0.3, 0.0, z).to(dtype)
    metric = ActivationEntropy(neuron_dim=axis).set_dtype(torch.float64)
    metric.update(z)
    expected = torch.tensor(entropy_by_definition(neurons_of(z, axis)), dtype=torch.float64)
    assert_close(metric.compute().reshape(-1), expected, rtol=1e-12, atol=1e-12)
    assert_close(metric.layer(), expected.mean(), rtol=1e-12, atol=1e-12)
    assert_close(activation_entropy(z, axis).double(), expected, rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "channels last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda z: torch.stack([z, z.neg()], -1)[..., 0],
    "turned": lambda z: z.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda z: z[:, :, :1].expand(z.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_does_not_depend_on_how_a_batch_is_cut_into_parts_nor_on_its_layout(axis, dtype, layout, monkeypatch):
    z = torch.randn(7, 6, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[3, 2], z[5, :, 1] = 0.0, math.nan  # in some parts only
    z = LAYOUTS[layout](z)
    expected = [sign.movedim(axis, 0).flatten(1).sum(1) for sign in (z > 0, z < 0)]
    for most in (1, 3, 50, 300, 10_000):
        monkeypatch.setattr(entropy, "values_in_caches", lambda most=most: most)
        counts = StateCounts(axis)
        sums = counts.update(z)
        assert torch.equal(counts.on, expected[0])
        assert torch.equal(counts.off, expected[1])
        of_samples = z.movedim(1 if axis == 0 else 0, 0).flatten(1).double().sum(1)
        assert_close(sums.double(), of_samples, equal_nan=True, rtol=1e-3, atol=1e-4)
        counts.update(z[:0] if axis else z[:, :0])
        assert torch.equal(counts.on, expected[0])


class Largest(TorchDispatchMode):
    """Notes the most values of a tensor that was made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, Tensor) and all(
            made.untyped_storage().data_ptr() != each.untyped_storage().data_ptr()
            for each in args
            if isinstance(each, Tensor)
        ):
            self.values = max(self.values, made.numel())
        return made


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_counting_holds_besides_the_batch_fits_into_the_cache(dtype, layout, monkeypatch):
    monkeypatch.setattr(entropy, "values_in_caches", lambda: 100)
    z = LAYOUTS[layout](torch.randn(4, 6, 8, 8).to(dtype))  # one sample is 384 values
    z[2] = 0.0
    with Largest() as largest:
        StateCounts().update(z)
    assert 0 < largest.values <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_where_the_values_are_whatever_the_default_device(dtype):
    z = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [0.0, -4.0]], dtype=dtype)
    counts = StateCounts()
    with torch.device("meta"):
        sums = counts.update(z)
    assert (counts.on.tolist(), counts.off.tolist(), sums.tolist()) == ([1, 2], [1, 1], [3.0, 2.0, -4.0])


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 3)])
def test_what_is_counted_may_have_a_tangent(shape):
    z, tangent = torch.randn(2, *shape)
    counts = StateCounts()
    value, slope = torch.func.jvp(lambda x: (counts.update(x), x.relu())[1], (z,), (tangent,))
    assert torch.equal(value, z.relu())
    assert torch.equal(slope, torch.where(z > 0, tangent, 0.0))
    with forward_ad.dual_level():
        counts.update(forward_ad.make_dual(z, tangent))
    expected = [2 * sign.movedim(1, 0).flatten(1).sum(1) for sign in (z > 0, z < 0)]
    assert torch.equal(counts.on, expected[0])
    assert torch.equal(counts.off, expected[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3, 3)])
def test_a_model_that_is_traced_may_be_counted(shape):
    z = torch.randn(shape)
    traced = torch.jit.trace(lambda x: (StateCounts().update(x), x.relu())[1], z)
    assert torch.equal(traced(z), z.relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_under_autocast(dtype):
    z = torch.ones(3, 2, 100, 100, dtype=dtype)
    z[1, 0, 0, :3] = torch.tensor([-1.0, 0.0, math.nan])
    counts = StateCounts()
    with torch.autocast("cpu", torch.bfloat16):
        counts.update(z)
    assert (counts.on.tolist(), counts.off.tolist()) == ([29_997, 30_000], [1, 0])


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 2**31))
def test_does_not_depend_on_how_the_data_set_is_cut_into_batches(cuts, seed):
    z = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(seed))
    whole, parts = ActivationEntropy(), ActivationEntropy()
    whole.update(z)
    for batch in torch.tensor_split(z, sorted(cuts)):
        parts.update(batch)
    assert torch.equal(whole.compute(), parts.compute())


def test_is_over_the_data_set_and_not_the_mean_of_batches():
    metric = ActivationEntropy()
    metric.update(torch.full((4, 1), 1.0))
    metric.update(torch.full((4, 1), -1.0))
    assert metric.compute().item() == 1.0  # the mean of the batches' entropies would be 0


def test_zeros_and_nan_are_discarded_and_infinities_have_a_sign():
    z = torch.tensor([[0.0, 1.0], [-0.0, math.nan], [3.0, math.nan], [0.0, -math.inf]])
    metric = ActivationEntropy()
    metric.update(z)
    assert metric.compute().tolist() == [0.0, 1.0]
    assert metric.on.tolist() == [1, 1]
    assert metric.off.tolist() == [0, 1]


def test_a_neuron_that_is_always_zero_has_no_entropy():
    metric = ActivationEntropy()
    metric.update(torch.zeros(3, 2))
    assert metric.compute().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_do_not_stall_in_half_precision(dtype):
    z = torch.ones(5, 1, 100, 100, dtype=dtype)  # a bfloat16 sum would stop at 256
    z[0] = -1
    metric = ActivationEntropy()
    metric.update(z)
    assert (metric.on.item(), metric.off.item()) == (40_000, 10_000)


def test_states_are_integers_whatever_dtype_is_set():
    metric = ActivationEntropy().set_dtype(torch.float64)
    metric.double().half()
    metric.update(torch.randn(4, 2))
    assert metric.on.dtype == metric.off.dtype == torch.int64
    assert metric.compute().dtype == torch.float64
    unset = ActivationEntropy()
    unset.update(torch.randn(4, 2))
    assert unset.compute().dtype == torch.float32


def test_can_be_updated_inside_and_outside_of_inference_mode():
    metric = ActivationEntropy()
    with torch.inference_mode():
        metric.update(torch.tensor([[1.0]]))
    metric.update(torch.tensor([[-1.0]]))
    assert metric.layer().item() == 1.0


@pytest.mark.parametrize("neurons", [1, 3])
def test_calling_the_metric_returns_the_batch_and_keeps_counting(neurons):
    metric, reference = ActivationEntropy(), ActivationEntropy()
    for seed in range(2):
        z = torch.randn(9, neurons, generator=torch.Generator().manual_seed(seed))
        assert_close(metric(z).reshape(-1), activation_entropy(z))
        reference.update(z)
    assert torch.equal(metric.compute(), reference.compute())


def test_reset_forgets():
    metric = ActivationEntropy()
    metric.update(torch.tensor([[1.0], [-1.0]]))
    metric.reset()
    metric.update(torch.tensor([[1.0, 1.0]]))
    assert metric.compute().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_neurons", [None, 3])
def test_nothing_observed_is_an_error_and_not_zero(num_neurons):
    with pytest.raises(RuntimeError, match="has seen no pre-activation"), pytest.warns(UserWarning, match="compute"):
        ActivationEntropy(num_neurons).compute()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`num_neurons` to be a positive integer, but got 0"):
        ActivationEntropy(0)
    with pytest.raises(TypeError, match=r"floating point tensor, but got dtype torch\.int64"):
        activation_entropy(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"neuron axis 1, but got shape \(3,\)"):
        activation_entropy(torch.randn(3))
    with pytest.raises(ValueError, match="neuron axis 3"):
        activation_entropy(torch.randn(3, 3), neuron_dim=3)
    metric = ActivationEntropy(4)
    with pytest.raises(ValueError, match=r"to have 4 neurons on axis 1, but got shape \(2, 3\)"):
        metric.update(torch.randn(2, 3))
    assert metric.on.tolist() == [0] * 4


def shards(rank: int) -> list[Tensor]:
    """Uneven: rank 0 gets two batches of unlike size, rank 1 none, rank 2 one."""
    z = torch.randn(11, 3, 2, generator=torch.Generator().manual_seed(0))
    return [[z[:4], z[4:5]], [], [z[5:]]][rank]


def compute_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    metric = ActivationEntropy()
    for batch in shards(rank):
        metric.update(batch)
    torch.save((metric.compute(), metric.layer(), metric.on), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_is_exact_over_uneven_processes_of_which_one_has_no_batch(tmp_path: Path, forked):
    run_together([forked.Process(target=compute_on_rank, args=(rank, str(tmp_path))) for rank in range(3)])
    single = ActivationEntropy()
    for rank in range(3):
        for batch in shards(rank):
            single.update(batch)
    for rank in range(3):
        neurons, layer, own_count = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(neurons, single.compute())
        assert torch.equal(layer, single.layer())
        assert own_count.numel() == (0 if rank == 1 else 3)  # what a process counted stays its own
