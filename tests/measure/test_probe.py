"""Entropies of a whole model: what is counted, of how many samples, and that the model is left as it was."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, TensorDataset

from lightning_easier import ActivationEntropy, EntropyProbe, linearize, measure_entropy
from lightning_easier.sites.activations import isolated_sites
from tests.models import Functional, Residual


def is_hooked(module: nn.Module) -> bool:
    """Tell whether there is any hook, those that only count among them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 5), nn.GELU()
    )


def images(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 2, 4, 5, generator=torch.Generator().manual_seed(1))


def expected_entropies(model: nn.Sequential, data: torch.Tensor) -> list[float]:
    with torch.no_grad():
        model.eval()
        maps = model[1](model[0](data))
        tokens = model[4](model[3](torch.relu(maps)))
    result = []
    for z in (maps, tokens):
        metric = ActivationEntropy().set_dtype(torch.float64)
        metric.update(z)
        result.append(metric.layer().item())
    return result


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_measures_in_place_rectifiers_over_all_batches_together(batch_size):
    model, data = make_model(), images()
    measured = measure_entropy(model, DataLoader(TensorDataset(data, torch.zeros(9)), batch_size))
    assert list(measured) == ["2", "5"]
    assert list(measured.values()) == pytest.approx(expected_entropies(model, data), rel=1e-12)
    assert 0 < measured["2"] < 1


def test_max_batches_stops_early_and_takes_no_further_batch():
    model, data = make_model(), images(8)
    taken = []

    def batches():
        for number, batch in enumerate(data.split(2)):
            taken.append(number)
            yield batch

    assert measure_entropy(model, batches(), max_batches=2) == measure_entropy(model, [data[:4]])
    assert taken == [0, 1]


def test_modes_hooks_weights_and_gradients_are_left_as_found():
    model = make_model()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    measure_entropy(model, [images()])
    with pytest.raises(ValueError, match="`batches` to be accepted by the forward of Sequential"):
        measure_entropy(model, [images(), torch.randn(3, 7, 4, 5)])
    assert [module.training for module in model.modules()] == modes
    assert not any(is_hooked(module) for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_each_call_of_a_shared_module_is_measured_and_linear_ones_are_not():
    model = Residual()
    data = torch.randn(3, 4, 5, 6)
    assert list(measure_entropy(model, [data])) == ["relu", "relu_1"]
    linearize(model, ["relu"])
    assert list(measure_entropy(model, [data])) == ["relu_1"]


def test_the_probe_counts_only_while_it_is_attached_and_not_paused():
    model = make_model().eval()
    with EntropyProbe(isolated_sites(model)) as probe:
        model(images())
        probe.paused = True
        model(-images())
        probe.paused = False
        first = probe.entropies()
    model(-images())
    assert probe.entropies() == first == measure_entropy(model, [images()])
    probe.reset()
    with pytest.raises(RuntimeError, match="None of the 2 activations"):
        probe.entropies()


def test_the_probe_leaves_no_hook_behind_after_an_exception():
    model = make_model()

    def fail_inside_the_probe():
        with EntropyProbe(isolated_sites(model)):
            assert is_hooked(model[2])
            raise KeyError("any")

    with pytest.raises(KeyError, match="any"):
        fail_inside_the_probe()
    assert not is_hooked(model[2])


def test_the_neuron_axis_can_be_overridden_by_glob():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    z = torch.randn(6, 3, 4)
    with torch.no_grad():
        by_channel, by_token = (ActivationEntropy(neuron_dim=axis) for axis in (-1, 1))
        by_channel.update(model[0](z))
        by_token.update(model[0](z))
    assert measure_entropy(model, [z])["1"] == pytest.approx(by_channel.layer().item(), rel=1e-6)
    assert measure_entropy(model, [z], neuron_dim={"*": 1})["1"] == pytest.approx(by_token.layer().item(), rel=1e-6)
    with pytest.raises(ValueError, match="`neuron_dim` to hold globs that match activations, but 'x' matches none"):
        measure_entropy(model, [z], neuron_dim={"x": 1})


def test_an_activation_that_eval_mode_does_not_call_is_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.main, self.aux = nn.Linear(2, 2), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            x = self.main(self.fc(x))
            return (x, self.aux(x)) if self.training else x

    assert list(measure_entropy(Auxiliary(), [torch.randn(4, 2)])) == ["main"]


def test_a_model_compiled_before_the_hooks_is_an_error_and_not_an_entropy_of_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.call = [torch.jit.trace(model, torch.randn(1, 2))]  # runs no Python hook, as compiled code does not

        def forward(self, x):
            return self.call[0](x)

    with pytest.raises(RuntimeError, match="None of the 1 activations.*code compiled earlier"):
        measure_entropy(Compiled(), [torch.randn(4, 2)])


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "message"),
    [
        (nn.Linear(2, 2), [torch.randn(2, 2)], {}, ValueError, "at least one rectifier, but none was found in Linear"),
        (make_model(), [], {}, ValueError, "`batches` to yield at least one batch"),
        (make_model(), images(), {}, TypeError, r"iterable of batches, but got a tensor.*Pass `\[tensor\]`"),
        (make_model(), [{"x": 1}], {}, TypeError, "`batches` to hold .*type int|`batches` to hold dictionaries"),
        (make_model(), [images()], {"max_batches": 0}, ValueError, "`max_batches` to be None or a positive integer"),
        (Functional(), [torch.randn(6)], {}, ValueError, r"activation `relu` can't be measured.*got shape \(6,\)"),
    ],
)
def test_bad_input_is_named(model, batches, options, error, message):
    with pytest.raises(error, match=message):
        measure_entropy(model, batches, **options)


def samples_counted(share: float, sizes: list[int]) -> list[int]:
    """Return how many samples of each batch are counted."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    counted = []
    with EntropyProbe(isolated_sites(model), sample=share) as probe:
        for size in sizes:
            model(torch.ones(size, 1))
            counted.append(int(probe.counts()["1"]["on"]))
    return [after - before for before, after in zip([0, *counted], counted, strict=False)]


def test_a_share_of_the_samples_is_counted_whatever_the_size_of_the_batches():
    assert samples_counted(0.25, [100] * 4) == [25] * 4
    assert set(samples_counted(0.3, [5] * 50)) == {1, 2}
    for size in (1, 2, 7):
        counted = samples_counted(0.2, [size] * 2000)
        assert counted[0] >= 1  # or nothing might be measured
        assert sum(counted) == pytest.approx(0.2 * size * 2000, rel=0.1)


def test_samples_are_drawn_by_the_number_of_the_batch_and_nothing_else():
    model, data = make_model().eval(), images(64)
    state = torch.random.get_rng_state()
    counts = []
    for _ in range(2):
        with EntropyProbe(isolated_sites(model), sample=0.5) as probe:
            model(data)
            model(data)
        counts.append(probe.counts())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(counts[0][name]["on"], counts[1][name]["on"]) for name in ("2", "5"))
    with EntropyProbe(isolated_sites(model), sample=0.5) as probe:
        model(data)
    assert not torch.equal(2 * probe.counts()["2"]["on"], counts[0]["2"]["on"])  # another half the second time


def test_counting_goes_on_from_saved_counts():
    model, data = make_model().eval(), images()
    sites = isolated_sites(model)
    with EntropyProbe(sites) as whole:
        model(data[:4])
        saved = whole.counts()
        model(data[4:])
    rest = EntropyProbe(sites)
    rest.resume(saved)
    with rest:
        model(data[4:])
    assert rest.entropies() == whole.entropies()
    assert [count["calls"] for count in rest.counts().values()] == [2, 2]
    other = EntropyProbe(sites)
    other.resume(saved, is_global_zero=False)
    assert all(count["on"].numel() == 0 and count["calls"] == 1 for count in other.counts().values())
    rest.reset()
    assert all(count["on"].sum() == 0 and count["calls"] == 0 for count in rest.counts().values())


@pytest.mark.parametrize("share", [0, 1.5, "all", True])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises((TypeError, ValueError), match="Expected argument `sample`"):
        EntropyProbe([], sample=share)


@pytest.mark.parametrize(
    "trace",
    [lambda model, data: torch.export.export(model, (data,), strict=False), lambda model, data: make_fx(model)(data)],
    ids=["export", "make_fx"],
)
def test_a_forward_that_is_only_traced_is_not_counted_and_what_was_counted_stays(trace):
    model, data = make_model().eval(), images()
    with EntropyProbe(isolated_sites(model)) as probe, torch.no_grad():
        model(data)
        before = probe.counts()
        trace(model, data)
        after = probe.counts()
        model(data)
    for name, count in probe.counts().items():
        assert torch.equal(before[name]["on"], after[name]["on"])
        assert torch.equal(2 * before[name]["on"], count["on"])
        assert (before[name]["calls"], after[name]["calls"], count["calls"]) == (1, 1, 2)
