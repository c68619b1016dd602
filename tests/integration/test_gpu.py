"""The same on a GPU, or on the device that `make device` makes in its place; skipped where there is neither."""

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import (
    EntropyProbe,
    OptimalTransportCallback,
    Rounds,
    Sparsify,
    collapse,
    compress,
    fit_chains,
    isolate_activations,
    linearize,
    measure_affines,
    measure_entropy,
    restore,
    sliced_wasserstein,
)
from lightning_easier.cli.keeping import save_whole
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.structure.linearize import stand_ins
from lightning_easier.support.operators import time_inside
from lightning_easier.support.timing import LatencyTable, stopwatch
from lightning_easier.zoo import CifarResNet
from tests.collapsing.test_collapse_fit import Mlp
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.processes import SLOPE
from tests.integration.residual import Net
from tests.integration.test_recipes import InHalf, Slope
from tests.integration.tiny import assert_equal_states
from tests.pruning.test_compress_together import OPTIONS, images, randomized

ELSEWHERE = sys.modules.get("tests.devices.elsewhere")
DEVICE = "cuda" if torch.cuda.is_available() else "elsewhere"
pytestmark = pytest.mark.skipif(DEVICE == "elsewhere" and ELSEWHERE is None, reason="no GPU")
only_on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")


def there(precision=None):
    """Return what has a Trainer run there."""
    if DEVICE == "cuda":
        return {"accelerator": "gpu", "devices": 1, "precision": precision}
    if precision is not None and precision.endswith("mixed"):
        return ELSEWHERE.trainer_options() | {"plugins": MixedPrecision(precision, DEVICE)}
    return ELSEWHERE.trainer_options() | {"precision": precision}


@contextmanager
def reading_is_an_error():
    """Fail where a value is read back to the host, which waits for the device then."""
    if DEVICE == "cuda":
        tell, on, off = torch.cuda.set_sync_debug_mode, "error", "default"
    else:
        tell, on, off = ELSEWHERE.set_reading_is_an_error, True, False
    tell(on)
    try:
        yield
    finally:
        tell(off)


class Stack(nn.Sequential):
    """Convolutions, batch norms and activations."""

    def __init__(self) -> None:
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())]
        super().__init__(nn.Conv2d(3, 8, 3), *layers, nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_pruning_on_a_gpu(tmp_path, precision):
    model = (InHalf if precision == "16-true" else Small)((0.9, 0.1, 0.9))
    model, callback, _ = run(tmp_path, method=Slope, model=model, pruning={"max_rejections": 3}, **there(precision))
    assert [this.accepted for this in callback.rounds] == [True, False, True, True]
    assert callback.rounds[1].removed == [SLOPE]
    assert sorted(stand_ins(model)) == sorted(callback.removed)


@pytest.mark.parametrize(
    "pruning",
    [
        {"stand_in": "affine", "trainable": True},
        {"fit": True, "criterion": "linearity"},
        {"fit": True, "criterion": "linearity", "gain": "latency", "mergeable_only": True, "depth": 1},
        {"distill": True},
    ],
)
def test_every_way_to_remove_on_a_gpu(tmp_path, pruning):
    model, callback, trainer = run(tmp_path, pruning={"max_rejections": 3} | pruning, **there())
    assert all(this.accepted for this in callback.rounds)
    assert callback.removed
    device = trainer.strategy.root_device
    assert {tensor.device for tensor in model.state_dict().values() if tensor.dtype != torch.uint8} <= {
        device,
        torch.device("cpu"),  # where Lightning leaves a model
    }
    saved = torch.load(callback.last_good, weights_only=True)  # as it was saved
    (state,) = (value for key, value in saved["callbacks"].items() if key.startswith("EntropyPruning"))
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} <= {"cpu"}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
def test_masks_on_a_gpu(tmp_path, precision):
    options = {"amount": 0.3, "guard": 1e9}
    model, callback, _ = run(tmp_path, method=Sparsify, pruning=options, **there(precision))
    assert all(this.accepted for this in callback.rounds)
    zeros = sum(int((value == 0).sum()) for value in model.parameters() if value.ndim > 1)
    assert f"{zeros / 180:.1%} of all 180 are zero" in callback.rounds[3].notes["weights"][0]


def test_fits_are_those_of_the_cpu():
    torch.manual_seed(0)
    model, batches = Mlp().eval(), [torch.randn(256, 8) for _ in range(4)]
    expected = fit_chains(model, batches)
    found = fit_chains(model.to(DEVICE), batches)
    assert {name: fit.explained for name, fit in found.items()} == pytest.approx(
        {name: fit.explained for name, fit in expected.items()}, abs=1e-3
    )


def test_compression_on_a_gpu():
    torch.manual_seed(0)
    model, batches = Mlp().eval().to(DEVICE), [torch.randn(256, 8) for _ in range(4)]
    result = compress(model, batches, evaluate=lambda compressed: float(compressed.cpu()(batches[0]).shape[0]))
    assert {parameter.device.type for parameter in result.model.parameters()} == {DEVICE}
    assert any(trial.kept for trial in result.report.trials)


def test_entropies_are_those_of_the_cpu(tmp_path):
    torch.manual_seed(0)
    model, data = Small(), DataLoader(TensorDataset(torch.randn(64, 4)), 16)
    expected = measure_entropy(model, data)
    assert measure_entropy(model.to(DEVICE), data) == pytest.approx(expected, abs=0.02)  # signs of numbers near zero


def test_a_run_goes_on_from_the_middle_of_an_epoch(tmp_path):
    torch.use_deterministic_algorithms(True)

    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        stop(trainer)

    try:
        whole = outcome(*run(tmp_path / "whole", **there()))
        run(tmp_path, At("on_train_batch_end", 1, 1, save), **there())
        resumed = outcome(*run(tmp_path, ckpt_path=tmp_path / "saved.ckpt", **there()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_states(resumed, whole)


def test_nothing_is_read_back_in_a_hook(tmp_path):
    """A value that is read makes the host wait for the device, in every batch."""
    model, x = Small().to(DEVICE).eval(), torch.ones(8, 4, device=DEVICE)
    for sample in (1.0, 0.5):
        probe = EntropyProbe(isolated_sites(model), sample=sample).to(x.device)  # which makes the host wait, once
        with probe, reading_is_an_error():
            model(x)


def test_the_pruned_model_collapses_on_the_gpu(tmp_path):
    model, _, _ = run(tmp_path, **there())
    x = torch.randn(8, 4, device=DEVICE)
    result = collapse(model.to(DEVICE), x)
    assert torch.allclose(result.model(x), model.eval()(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["identity", "affine", "fitted"])
def test_surgery_is_that_of_the_cpu(kind):
    model, batches = Stack().eval(), [torch.randn(16, 3, 9, 9) for _ in range(2)]
    twin = copy.deepcopy(model).to(DEVICE)
    expected = model(batches[0])
    outputs = []
    for each in (model, twin):
        names = list(isolate_activations(each))[:2]
        for name in names:
            measured = {"affine": measure_affines, "fitted": fit_chains}.get(kind)
            statistics = None if measured is None else measured(each, batches)
            linearize(each, [name], stand_in=kind, statistics=statistics)
        assert sorted(stand_ins(each)) == sorted(names)
        outputs.append(each(batches[0].to(next(each.parameters()).device)).cpu())
    assert {tensor.device.type for tensor in twin.parameters()} == {DEVICE}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-2)
    assert (outputs[0] - expected).abs().max() > 1e-3
    if kind != "fitted":  # the operators that were replaced are gone
        restore(twin)
        torch.testing.assert_close(twin(batches[0].to(DEVICE)).cpu(), expected, rtol=1e-3, atol=1e-3)


@only_on_a_gpu
@pytest.mark.real_clock
def test_a_time_is_that_until_the_device_is_done():
    cycles = 10**8  # at 5 GHz, which no device has, a fiftieth of a second
    assert stopwatch(lambda: torch.cuda._sleep(cycles))(1) > cycles / 5e9


@pytest.mark.real_clock
def test_a_collapse_is_priced_on_the_device():
    model, x, table = Stack().eval().to(DEVICE), torch.randn(4, 3, 33, 33, device=DEVICE), LatencyTable()
    linearize(model, list(isolate_activations(model)))
    result = collapse(model, x, latencies=table)
    assert result.report.merges or DEVICE != "cuda"  # times of the device that tests make tell nothing
    assert table.seconds
    assert all(seconds > 0 for seconds in table.seconds.values())
    assert all(DEVICE in str(key) for key in table.seconds)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-3)


def test_masks_hold_through_a_fused_optimizer(tmp_path):
    class Fused(Small):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02, fused=True)

    options = {"amount": 0.3, "guard": 1e9}
    model, callback, _ = run(tmp_path, method=Sparsify, pruning=options, model=Fused(), **there("bf16-mixed"))
    zeros = sum(int((value == 0).sum()) for value in model.parameters() if value.ndim > 1)
    assert f"{zeros / 180:.1%} of all 180 are zero" in callback.rounds[3].notes["weights"][0]


def test_the_transport_distance_and_its_gradient_are_those_of_the_cpu():
    first, second = torch.randn(32, 5), torch.randn(32, 5) + 0.5
    found = []
    for device in ("cpu", DEVICE):
        x = first.to(device).detach().requires_grad_()  # a leaf on either device
        distance = sliced_wasserstein(x, second.to(device), generator=torch.Generator().manual_seed(0))
        distance.backward()
        found += [distance.detach().cpu(), x.grad.cpu()]
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_blocks_are_taken_out_on_a_gpu(tmp_path, precision):
    pruning = {"rounds": Rounds(epochs=0, max_removals=1), "monitor": "score", "tolerance": 0.5}
    model, callback, _ = run(tmp_path, kind=_transport, pruning=pruning, model=Net(), epochs=2, **there(precision))
    assert [this.accepted for this in callback.rounds] == [True, True]
    assert len(stand_ins(model)) == 1
    assert all(value.isfinite().all() for value in model.parameters())


def _transport(method, dirpath, **options):
    return OptimalTransportCallback(**options)


def test_compression_decides_by_times_of_the_device():
    model, batches = Stack().eval().to(DEVICE), [torch.randn(64, 3, 9, 9, device=DEVICE) for _ in range(2)]
    result = compress(model, batches, max_drift=0.5, example_inputs=batches[0][:8])
    assert any(trial.kept for trial in result.report.trials)
    x = batches[0]
    drift = (result.model(x) - model(x)).square().sum() / (model(x) - model(x).mean(0)).square().sum()
    assert 1e-6 < drift < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropies_under_autocast_are_nearly_those_without(dtype):
    model, batches = Stack().eval().to(DEVICE), [torch.randn(64, 3, 9, 9) for _ in range(2)]
    expected = measure_entropy(model, batches)
    with torch.autocast(DEVICE, dtype=dtype):
        found = measure_entropy(model, batches)
    assert found == pytest.approx(expected, abs=0.05)


@only_on_a_gpu
def test_a_collapsed_model_compiles_on_the_gpu():
    model, x = Stack().eval().to(DEVICE), torch.randn(4, 3, 33, 33, device=DEVICE)
    linearize(model, list(isolate_activations(model))[:2])
    collapsed = collapse(model, x, objective="macs").model
    compiled = torch.compile(collapsed)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)


@only_on_a_gpu  # of the other device, no backend of torch.distributed knows anything
def test_ddp_of_one_device_prunes_and_goes_back(tmp_path):
    try:
        model, callback, _ = run(tmp_path, strategy="ddp", scores=(0.9, 0.9, 0.1), **there())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert [this.accepted for this in callback.rounds] == [True, True, False]
    assert sorted(stand_ins(model)) == sorted(callback.removed) == sorted(callback.rounds[1].chosen)


def test_what_was_absorbed_keeps_its_dtype_where_the_model_moves():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Embedding(3, 8).bfloat16(), Mlp()).eval(), [torch.randn(64, 8)]
    fits = {f"1.{name}": fit for name, fit in fit_chains(model[1], batches).items()}
    expected = model[1](batches[0]).detach()
    linearize(model, list(fits), stand_in="fitted", statistics=fits)
    restore(model.to(DEVICE))
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    assert {parameter.dtype for parameter in model[1].parameters()} == {torch.float32}
    torch.testing.assert_close(model[1](batches[0].to(DEVICE)).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_score_that_a_trainer_measures_elsewhere_leaves_what_is_taken_back_as_it_was():
    torch.manual_seed(0)
    model, batches = randomized(CifarResNet(8)).to(DEVICE), images(64, 64, 64)
    before, scores = copy.deepcopy(model.state_dict()), iter([1.0, *[0.0] * 99])

    def evaluate(candidate):
        candidate.cpu()  # as at the end of a validation
        return next(scores)

    result = compress(model, batches, evaluate=evaluate, max_rejections=2, **OPTIONS)
    assert result.report.trials
    assert not any(trial.kept for trial in result.report.trials)
    for name, value in result.fitted.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_network_is_kept_for_machines_without_the_device(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).to(DEVICE)
    save_whole(model, tmp_path / "kept.pt")
    assert torch.load(tmp_path / "kept.pt", weights_only=False)(torch.ones(2, 3)).device.type == "cpu"
    assert next(model.parameters()).device.type == DEVICE


def test_numbers_are_drawn_as_if_nothing_had_been_collapsed():
    model, x = Stack().eval().to(DEVICE), torch.randn(4, 3, 33, 33, device=DEVICE)
    linearize(model, list(isolate_activations(model)))
    state = torch.get_device_module(DEVICE).get_rng_state()
    collapse(model, x)
    assert torch.equal(torch.get_device_module(DEVICE).get_rng_state(), state)
    torch.randn(1, device=DEVICE)
    assert not torch.equal(torch.get_device_module(DEVICE).get_rng_state(), state)


def test_times_of_what_a_collapsed_model_calls_are_those_until_the_device_is_done():
    model, x = Stack().eval().to(DEVICE), torch.randn(4, 3, 33, 33, device=DEVICE)
    waits = []
    synchronize = torch.accelerator.synchronize
    torch.accelerator.synchronize = lambda device: waits.append(synchronize(device))
    try:
        times = time_inside({"model": model}, (x,), lambda: 0.0)
    finally:
        torch.accelerator.synchronize = synchronize
    assert len(times["model"]) == len(model)
    assert len(waits) >= 2 * len(model)
