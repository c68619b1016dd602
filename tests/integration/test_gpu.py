"""The same on a GPU; skipped where there is none."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import EntropyProbe, Sparsify, collapse, compress, fit_chains, measure_entropy
from lightning_easier.sites.activations import isolated_sites
from lightning_easier.structure.linearize import stand_ins
from tests.collapsing.test_collapse_fit import Mlp
from tests.integration.interrupted import At, Small, outcome, run, stop
from tests.integration.processes import SLOPE
from tests.integration.test_recipes import Slope
from tests.integration.tiny import assert_equal_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = {"accelerator": "gpu", "devices": 1}
DEVICE = "cuda"


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_pruning_on_a_gpu(tmp_path, precision):
    scores = (0.9, 0.1, 0.9)
    model, callback, _ = run(
        tmp_path, method=Slope, scores=scores, pruning={"max_rejections": 3}, precision=precision, **GPU
    )
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
    model, callback, trainer = run(tmp_path, pruning={"max_rejections": 3} | pruning, **GPU)
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
    model, callback, _ = run(tmp_path, method=Sparsify, pruning=options, precision=precision, **GPU)
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
    assert measure_entropy(model.cuda(), data) == pytest.approx(expected, abs=0.02)  # signs of numbers near zero


def test_a_run_goes_on_from_the_middle_of_an_epoch(tmp_path):
    torch.use_deterministic_algorithms(True)

    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        stop(trainer)

    try:
        whole = outcome(*run(tmp_path / "whole", **GPU))
        run(tmp_path, At("on_train_batch_end", 1, 1, save), **GPU)
        resumed = outcome(*run(tmp_path, ckpt_path=tmp_path / "saved.ckpt", **GPU))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_states(resumed, whole)


def test_nothing_is_read_back_in_a_hook(tmp_path):
    """A value that is read makes the host wait for the device, in every batch."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        model, x = Small().cuda().eval(), torch.ones(8, 4, device="cuda")
        for sample in (1.0, 0.5):
            with EntropyProbe(isolated_sites(model), sample=sample).to(x.device):
                model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_pruned_model_collapses_on_the_gpu(tmp_path):
    model, _, _ = run(tmp_path, **GPU)
    x = torch.randn(8, 4, device="cuda")
    result = collapse(model.cuda(), x)
    assert torch.allclose(result.model(x), model.eval()(x), atol=1e-4)
