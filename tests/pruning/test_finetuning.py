"""Train what is left without labels: nearer to the model as given, undone bit for bit, in its time, in `compress`."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_easier import CompressResult, Finetuning, compress, isolate_activations
from lightning_easier.measure.features import places_of_features
from lightning_easier.pruning.finetuning import Finetuned, Finetuner, finetune
from lightning_easier.sites.blocks import find_blocks
from lightning_easier.zoo import CifarResNet


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3)
    ).double()


def data(count: int = 4, samples: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def off(model: nn.Module, by: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * parameter.std() * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def places(model: nn.Module) -> list[str]:
    return places_of_features(find_blocks(model), list(isolate_activations(model)))


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def test_a_network_comes_back_to_what_it_computed() -> None:
    dense, changed = mlp().eval(), off(mlp()).eval()
    names = places(dense)
    places(changed)
    done = finetune(changed, dense, names, [(x,) for x in data()], Finetuning(200))
    assert done.steps == 200
    assert done.after < done.before / 10
    unseen = torch.randn(500, 6, dtype=torch.float64)
    with torch.no_grad():
        error, before = (changed(unseen) - dense(unseen)).square().mean(), (off(mlp())(unseen) - dense(unseen)).square()
    assert error < before.mean() / 5


def test_mode_gradients_and_generators_are_left_as_they_were() -> None:
    dense, changed = mlp().eval(), off(mlp()).eval()
    names = places(dense)
    places(changed)
    changed[0].weight.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():  # whoever calls may have turned gradients off
        done = finetune(changed, dense, names, [(x,) for x in data()], Finetuning(5))
    assert done.steps == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert not changed.training
    assert all(parameter.grad is None for parameter in changed.parameters())
    assert [p.requires_grad for p in changed.parameters()] == [False] + [True] * 7
    assert not any(module._forward_hooks for module in (*changed.modules(), *dense.modules()))
    assert not torch.equal(changed[0].weight, off(mlp())[0].weight)  # it is trained for all that


def test_undone_it_is_as_it_was_with_statistics_of_batch_norms() -> None:
    torch.manual_seed(0)
    dense = CifarResNet(8).eval()
    torch.manual_seed(1)
    changed = CifarResNet(8).eval()
    names = places(dense)
    places(changed)
    before = everything(changed)
    done = finetune(changed, dense, names, [(torch.randn(20, 3, 8, 8),)], Finetuning(4, samples=20))
    now = everything(changed)
    assert any(not torch.equal(before[key], now[key]) for key in before if key.endswith("running_mean"))
    assert not any(module.training for module in changed.modules())
    done.undo()
    assert all(torch.equal(value, changed.state_dict()[key]) for key, value in before.items())


def test_few_samples_leave_statistics_alone() -> None:
    dense, changed = CifarResNet(8).eval(), CifarResNet(8).eval()
    names = places(dense)
    places(changed)
    before = everything(changed)
    finetune(changed, dense, names, [(torch.randn(20, 3, 8, 8),)], Finetuning(3, samples=4))
    assert all(torch.equal(v, changed.state_dict()[k]) for k, v in before.items() if "running" in k)


def test_what_does_not_come_nearer_is_as_it_was() -> None:
    dense, changed = mlp().eval(), off(mlp(), 1e-6).eval()
    names = places(dense)
    places(changed)
    before = everything(changed)
    done = finetune(changed, dense, names, [(x,) for x in data()], Finetuning(5, rate=1.0))
    assert not done.is_nearer
    assert all(torch.equal(value, changed.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_step_is_taken_where_there_is_no_time(seconds: float) -> None:
    dense, changed = mlp().eval(), off(mlp()).eval()
    done = finetune(changed, dense, [], [(x,) for x in data()], Finetuning(5), left=lambda: seconds)
    assert done.steps == 0
    assert done.after == done.before


def test_where_the_time_is_short_the_rate_falls_within_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("lightning_easier.pruning.finetuning.monotonic", lambda: 10.0 * next(ticks))
    dense, changed = mlp().eval(), off(mlp()).eval()
    done = finetune(changed, dense, [], [(x,) for x in data()], Finetuning(300), left=lambda: 30.0)
    assert 5 < done.steps < 30  # one takes 2 s by this clock
    assert done.is_nearer


class Masked(nn.Module):
    """Takes a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, value: Tensor, table: Tensor) -> Tensor:
        return self.net(value + table[0])


def test_samples_of_other_shapes_and_arguments_that_are_shared() -> None:
    dense, changed = Masked().eval(), Masked().eval()
    off(changed.net)
    names = places(dense)
    places(changed)
    shared = [(x, torch.ones(1, 6, dtype=torch.float64)) for x in data()]
    assert finetune(changed, dense, names, shared, Finetuning(30)).is_nearer
    tokens, changed = mlp().eval(), off(mlp()).eval()
    names = places(tokens)
    places(changed)
    lengths = [(torch.randn(7, length, 6, dtype=torch.float64),) for length in (3, 5, 3)]
    assert finetune(changed, tokens, names, lengths, Finetuning(30, samples=10)).is_nearer


def compressed(**options: object) -> CompressResult:
    return compress(mlp(), data(), objective="macs", max_drift=math.inf, target_depth=2, **options)


def test_compress_trains_what_is_left_at_last() -> None:
    plain, trained = compressed(), compressed(finetune=100)
    assert [t.kept for t in plain.report.trials] == [t.kept for t in trained.report.trials]
    assert trained.report.drift < plain.report.drift / 1.2
    assert any("trained for 100 steps" in note for note in trained.report.notes)
    x = data()[0]
    with torch.no_grad():
        assert torch.allclose(trained.model(x), trained.fitted(x), atol=1e-9)  # it is collapsed again
    assert str(trained.model) == str(plain.model)


def test_compress_keeps_the_model_as_it_was_where_the_score_is_worse_after_training() -> None:
    scores: list[float] = []

    def evaluate(model: nn.Module) -> float:
        scores.append(1.0 if not scores else scores[-1] - 1e-6)
        return scores[-1]

    plain, trained = compressed(evaluate=evaluate), compressed(evaluate=evaluate, finetune=20)
    assert torch.equal(plain.fitted(data()[0]), trained.fitted(data()[0]))
    assert not any("trained for" in note for note in trained.report.notes)


def test_what_would_be_taken_back_is_trained_first() -> None:
    limit = 0.01
    plain = compress(mlp(), data(), objective="macs", max_drift=limit)
    trained = compress(mlp(), data(), objective="macs", max_drift=limit, finetune=150)
    kept = [sum(trial.kept for trial in each.report.trials) for each in (plain, trained)]
    assert kept[0] < kept[1]
    assert trained.report.drift <= limit


def test_training_in_vain_leaves_no_trace() -> None:
    before = compress(mlp(), data(), objective="macs", max_drift=1e-9, max_rejections=2)
    after = compress(mlp(), data(), objective="macs", max_drift=1e-9, max_rejections=2, finetune=2)
    assert not any(trial.kept for trial in after.report.trials)
    x = data()[0]
    assert torch.equal(before.fitted(x), after.fitted(x))


def test_what_goes_beyond_the_drift_in_training_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compress(mlp(), data(), objective="macs", max_drift=0.05)

    def trained(self: Finetuner, model: nn.Module, advance: object = None) -> Finetuned:
        done = Finetuned(model)
        done.before, done.after = 1.0, 0.0
        with torch.no_grad():
            [*model.parameters()][-1].add_(10.0)
        return done

    monkeypatch.setattr(Finetuner, "run", trained)
    result = compress(mlp(), data(), objective="macs", max_drift=0.05, finetune=1)
    assert result.report.drift <= 0.05
    assert torch.equal(plain.fitted(data()[0]), result.fitted(data()[0]))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_bad_arguments_are_refused() -> None:
    model = mlp()
    for bad in (True, 1.5, "300"):
        assert "`finetune`" in refusal(lambda bad=bad: compress(model, data(), finetune=bad))
    assert "`finetune`" in refusal(lambda: compress(model, data(), finetune=0))
    assert "`steps`" in refusal(lambda: Finetuning(0))
    assert "`samples`" in refusal(lambda: Finetuning(samples=-1))
    assert "`rate`" in refusal(lambda: Finetuning(rate=0.0))
    half = mlp().to(torch.bfloat16)
    assert "torch.bfloat16" in refusal(lambda: compress(half, [x.bfloat16() for x in data()], finetune=1))


class Graph(nn.Module):
    """Nodes of one graph, and which of them are neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, nodes: Tensor, neighbours: Tensor) -> Tensor:
        return self.net(neighbours @ nodes)


class Positions(nn.Module):
    """The first axis is that of positions, which are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, value: Tensor) -> Tensor:
        return self.net(value - value.mean(0))


class OneSize(nn.Module):
    """Takes batches of 20 alone, and holds a buffer that can't be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("zeros", torch.zeros(1, dtype=torch.float64).expand(6))

    def forward(self, value: Tensor) -> Tensor:
        return self.net(value.view(20, 6) + self.zeros)


@pytest.mark.parametrize("make", [Graph, Positions, OneSize])
def test_batches_whose_rows_are_no_samples_are_drawn_whole(make: type[nn.Module]) -> None:
    dense, changed = make().eval(), make().eval()
    off(changed.net)
    names = places(dense)
    places(changed)
    batches = [(x,) for x in data(2, 20)]
    if make is Graph:
        batches = [(x, torch.rand(20, 20, dtype=torch.float64)) for (x,) in batches]
    seen: list[int] = []
    changed.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    done = finetune(changed, dense, names, batches, Finetuning(30, samples=8))
    assert done.is_nearer
    assert {*seen} == {20}
    done.undo()
